//! One node: the command line, and that what was written is there after unmounting and after a crash.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use common::{Lab, Plan, SOON, path, text, wait_until};

#[test]
fn files_survive_unmounting() {
    let mut lab = Plan::nodes(1).start();
    let big: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    fs::create_dir_all(lab.path(0, "a/b/c")).expect("mkdir");
    fs::write(lab.path(0, "a/b/c/small"), b"hello").expect("write");
    fs::write(lab.path(0, "a/big"), &big).expect("write");
    symlink("b/c/small", lab.path(0, "a/link")).expect("symlink");
    fs::hard_link(lab.path(0, "a/big"), lab.path(0, "a/second")).expect("link");
    fs::set_permissions(lab.path(0, "a/big"), fs::Permissions::from_mode(0o640)).expect("chmod");
    lab.umount(0);
    lab.mount(0);
    assert_eq!(fs::read(lab.path(0, "a/link")).expect("read"), b"hello");
    assert!(fs::read(lab.path(0, "a/second")).expect("read") == big);
    let found = fs::metadata(lab.path(0, "a/big")).expect("stat");
    assert_eq!((found.mode() & 0o7777, found.nlink(), found.len()), (0o640, 2, big.len() as u64));
    lab.assert_clean();
}

#[test]
fn names_are_renamed_replaced_and_removed() {
    let mut lab = Plan::nodes(1).start();
    let at = |name: &str| lab.path(0, name);
    fs::create_dir(at("d")).expect("mkdir");
    fs::write(at("d/one"), b"1").expect("write");
    fs::write(at("two"), b"2").expect("write");
    fs::rename(at("d/one"), at("two")).expect("rename over");
    assert_eq!(fs::read(at("two")).expect("read"), b"1");
    assert!(!at("d/one").exists());
    fs::create_dir_all(at("d/e")).expect("mkdir");
    let error = fs::rename(at("d"), at("d/e/f")).expect_err("a directory cannot move below itself");
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    let error = fs::remove_dir(at("d")).expect_err("not empty");
    assert_eq!(error.raw_os_error(), Some(libc::ENOTEMPTY));
    fs::remove_dir(at("d/e")).expect("rmdir");
    fs::remove_dir(at("d")).expect("rmdir");
    fs::remove_file(at("two")).expect("unlink");
    assert_eq!(fs::read_dir(at("")).expect("readdir").count(), 0);
    lab.assert_clean();
}

#[test]
fn a_large_directory_lists_every_name_once() {
    let mut lab = Plan::nodes(1).start();
    let dir = lab.path(0, "many");
    fs::create_dir(&dir).expect("mkdir");
    for n in 0..5_000 {
        File::create_new(dir.join(format!("a-name-of-some-length-{n:05}"))).expect("create");
    }
    let mut names: Vec<String> = fs::read_dir(&dir)
        .expect("readdir")
        .map(|e| e.expect("entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    let wanted: Vec<String> = (0..5_000).map(|n| format!("a-name-of-some-length-{n:05}")).collect();
    assert!(names == wanted, "{} names", names.len());
    for n in (0..5_000).step_by(2) {
        fs::remove_file(dir.join(format!("a-name-of-some-length-{n:05}"))).expect("unlink");
    }
    assert_eq!(fs::read_dir(&dir).expect("readdir").count(), 2_500);
    lab.assert_clean();
}

#[test]
fn sparse_files_read_zeros_where_nothing_was_written() {
    let mut lab = Plan::nodes(1).start();
    let far = 8u64 << 40;
    let file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(lab.path(0, "sparse"))
        .expect("open");
    file.write_all_at(b"end", far - 3).expect("write at 8 TiB");
    file.write_all_at(b"middle", 1 << 30).expect("write at 1 GiB");
    let mut buf = [1u8; 8192];
    file.read_exact_at(&mut buf, 4 << 30).expect("read a hole");
    assert!(buf.iter().all(|b| *b == 0));
    file.read_exact_at(&mut buf[..6], 1 << 30).expect("read");
    assert_eq!(&buf[..6], b"middle");
    assert_eq!(file.metadata().expect("stat").len(), far);
    assert!(file.metadata().expect("stat").blocks() < 1000);
    file.set_len(5).expect("truncate");
    drop(file);
    lab.assert_clean();
}

#[test]
fn a_full_filesystem_says_so_and_takes_files_again_after_removal() {
    let mut lab = Plan::nodes(1).size("64M").start();
    let fill = |lab: &Lab| -> Option<i32> {
        let mut file = File::create(lab.path(0, "fill")).expect("create");
        let chunk = vec![7u8; 1 << 20];
        for _ in 0..128 {
            if let Err(e) = file.write_all(&chunk) {
                return e.raw_os_error();
            }
        }
        file.sync_all().err().and_then(|e| e.raw_os_error())
    };
    assert_eq!(fill(&lab), Some(libc::ENOSPC));
    fs::remove_file(lab.path(0, "fill")).expect("unlink of the file that filled it");
    wait_until("the space comes back", SOON, || fs::write(lab.path(0, "again"), vec![1u8; 8 << 20]).is_ok());
    lab.assert_clean();
}

#[test]
fn fsynced_data_survive_a_killed_daemon() {
    let mut lab = Plan::nodes(1).start();
    let mut file = File::create(lab.path(0, "kept")).expect("create");
    file.write_all(&[9u8; 100_000]).expect("write");
    file.sync_all().expect("fsync");
    File::open(lab.at(0)).expect("open").sync_all().expect("fsync of the directory");
    fs::write(lab.path(0, "maybe"), b"not synced").expect("write");
    drop(file);
    lab.kill9(0);
    lab.mount(0);
    assert!(fs::read(lab.path(0, "kept")).expect("read") == [9u8; 100_000]);
    lab.assert_clean();
}

#[test]
fn an_unlinked_file_stays_usable_until_it_is_closed() {
    let mut lab = Plan::nodes(1).start();
    let used = || lab.path(0, "f");
    let mut file = OpenOptions::new().create_new(true).read(true).write(true).open(used()).expect("create");
    file.write_all(&[5u8; 1 << 20]).expect("write");
    fs::remove_file(used()).expect("unlink");
    let mut back = Vec::new();
    file.read_to_end(&mut back).expect("read at the end");
    let mut buf = vec![0u8; 1 << 20];
    file.read_exact_at(&mut buf, 0).expect("read");
    assert!(buf.iter().all(|b| *b == 5));
    drop(file);
    lab.assert_clean();
}

#[test]
fn a_busy_mount_is_not_torn_down() {
    let mut lab = Plan::nodes(1).start();
    let open = File::create(lab.path(0, "open")).expect("create");
    let dir = lab.at(0);
    let refused = lab.matrix(&["umount", path(&dir)]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    assert!(text(&refused).contains("use"), "{}", text(&refused));
    (&open).write_all(b"still works").expect("write");
    drop(open);
    lab.assert_clean();
}

#[test]
fn sigterm_unmounts_cleanly() {
    let mut lab = Plan::nodes(1).start();
    fs::write(lab.path(0, "f"), b"kept").expect("write");
    let pid = lab.pid(0);
    common::signal(pid, libc::SIGTERM);
    wait_until("the daemon ends", SOON, || !common::alive(pid));
    lab.clear(0);
    lab.mount(0);
    assert_eq!(fs::read(lab.path(0, "f")).expect("read"), b"kept");
    lab.assert_clean();
}

#[test]
fn extended_attributes_are_kept() {
    let mut lab = Plan::nodes(1).start();
    fs::write(lab.path(0, "f"), b"x").expect("write");
    let file = std::ffi::CString::new(path(&lab.path(0, "f"))).expect("plain");
    for (name, len) in [(c"user.small", 10usize), (c"user.large", 20_000)] {
        let value = vec![3u8; len];
        // SAFETY: zero-terminated names and a buffer of the length given, all alive over the call.
        let set = unsafe { libc::setxattr(file.as_ptr(), name.as_ptr(), value.as_ptr().cast(), len, 0) };
        common::check(set).expect("setxattr");
    }
    lab.umount(0);
    lab.mount(0);
    let mut back = vec![0u8; 65_536];
    // SAFETY: as above; the kernel writes at most the buffer's length.
    let len = unsafe {
        libc::getxattr(file.as_ptr(), c"user.large".as_ptr(), back.as_mut_ptr().cast(), back.len())
    };
    assert_eq!(len, 20_000);
    assert!(back[..20_000].iter().all(|b| *b == 3));
    lab.assert_clean();
}
