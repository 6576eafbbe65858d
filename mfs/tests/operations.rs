//! Every operation, with its errors, on one node.

mod support;

use mfs::ops::{Operations, RenameFlags, SetAttr, SetTime, XattrSet};
use storage_control::WallTime;
use support::{ME, Short, errno, pattern, run};

const MIB_64: u64 = 16_384;
const PLAIN: RenameFlags = RenameFlags { no_replace: false, exchange: false };

#[test]
fn an_empty_filesystem_mounts_and_unmounts() {
    run(1, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let root = fs.getattr(fs.root()).await.unwrap().attr;
        assert_eq!((root.file_type(), root.nlink), (libc::S_IFDIR, 2));
        assert_eq!(fs.names(fs.root()).await, [".", ".."]);
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn what_was_made_is_there_after_the_next_mount() {
    run(2, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let root = fs.root();
        let d = fs.dir(root, "d").await;
        let (attr, handle) = fs.file(d, "small").await;
        assert_eq!((attr.mode, attr.uid, attr.gid, attr.nlink), (libc::S_IFREG | 0o644, 1000, 100, 1));
        fs.put(handle, 0, b"hello").await.unwrap();
        fs.release(handle).await.unwrap();
        let (_, handle) = fs.file(d, "large").await;
        let large = pattern(1, 300_000);
        fs.put(handle, 0, &large).await.unwrap();
        assert_eq!(fs.get(handle, 0, 300_000).await, large);
        fs.symlink(ME, d, b"link", b"../elsewhere").await.unwrap();
        let fifo = fs.mknod(ME, d, b"fifo", libc::S_IFIFO | 0o600, 7).await.unwrap();
        assert_eq!((fifo.file_type(), fifo.rdev), (libc::S_IFIFO, 0));
        let null = fs.mknod(ME, d, b"null", libc::S_IFCHR | 0o666, 0x103).await.unwrap();
        assert_eq!((null.file_type(), null.rdev), (libc::S_IFCHR, 0x103));
        bed.unmount_and_check(fs).await;

        let fs = bed.mount().await;
        let d = fs.lookup(root, b"d").await.unwrap();
        assert_eq!(d.nlink, 2);
        assert_eq!(fs.names(d.ino).await, [".", "..", "fifo", "large", "link", "null", "small"]);
        let small = fs.lookup(d.ino, b"small").await.unwrap().ino;
        assert_eq!(fs.whole(small).await, b"hello");
        let found = fs.lookup(d.ino, b"large").await.unwrap();
        assert_eq!(found.size, 300_000);
        assert!(found.blocks_512 * 512 >= 300_000);
        assert_eq!(fs.whole(found.ino).await, large);
        let link = fs.lookup(d.ino, b"link").await.unwrap();
        assert_eq!((link.file_type(), link.size), (libc::S_IFLNK, 12));
        assert_eq!(fs.readlink(link.ino).await.unwrap(), b"../elsewhere");
        assert_eq!(errno(fs.readlink(small).await), libc::EINVAL);
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn making_names_fails_as_posix_says() {
    run(3, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let root = fs.root();
        let (file, handle) = fs.file(root, "f").await;
        assert_eq!(errno(fs.mkdir(ME, root, b"f", 0o755).await), libc::EEXIST);
        assert_eq!(errno(fs.symlink(ME, root, b"f", b"x").await), libc::EEXIST);
        assert_eq!(errno(fs.mknod(ME, root, b"f", libc::S_IFREG, 0).await), libc::EEXIST);
        assert_eq!(errno(fs.create(ME, root, b"f", 0o644, libc::O_RDWR | libc::O_EXCL).await), libc::EEXIST);
        // Without O_EXCL whoever asks looks again and opens what is there.
        assert_eq!(errno(fs.create(ME, root, b"f", 0o644, libc::O_RDWR).await), libc::ESTALE);
        assert_eq!(errno(fs.mkdir(ME, file.ino, b"x", 0o755).await), libc::ENOTDIR);
        assert_eq!(errno(fs.lookup(file.ino, b"x").await), libc::ENOTDIR);
        assert_eq!(errno(fs.lookup(root, b"nothing").await), libc::ENOENT);
        assert_eq!(errno(fs.mkdir(ME, root, &[b'x'; 256], 0o755).await), libc::ENAMETOOLONG);
        assert_eq!(errno(fs.symlink(ME, root, b"s", &[b'x'; 5000]).await), libc::ENAMETOOLONG);
        fs.mkdir(ME, root, &[b'x'; 255], 0o755).await.unwrap();
        assert_eq!(errno(fs.open(root, libc::O_RDWR).await), libc::EISDIR);
        assert_eq!(errno(fs.opendir(file.ino).await), libc::ENOTDIR);
        fs.release(handle).await.unwrap();
        assert_eq!(errno(fs.release(handle).await), libc::EBADF);
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn set_gid_directories_give_their_group() {
    run(4, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let d = fs.dir(fs.root(), "d").await;
        fs.setattr(d, SetAttr { mode: Some(0o2775), gid: Some(55), ..SetAttr::default() }).await.unwrap();
        let (file, _) = fs.file(d, "f").await;
        assert_eq!((file.gid, file.mode & 0o7777), (55, 0o644));
        let sub = fs.mkdir(ME, d, b"sub", 0o755).await.unwrap();
        assert_eq!((sub.gid, sub.mode & 0o7777), (55, 0o2755));
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn removed_names_are_gone_and_their_space_comes_back() {
    run(5, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let root = fs.root();
        let (_, first) = fs.file(root, "first").await;
        fs.release(first).await.unwrap();
        fs.store().checkpoint().await.unwrap();
        let before = fs.statfs().await.unwrap().free;
        let (file, handle) = fs.file(root, "f").await;
        fs.put(handle, 0, &pattern(3, 5_000_000)).await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        assert!(fs.statfs().await.unwrap().free < before - 1000);
        fs.unlink(root, b"f").await.unwrap();
        assert_eq!(errno(fs.lookup(root, b"f").await), libc::ENOENT);
        assert_eq!(errno(fs.unlink(root, b"f").await), libc::ENOENT);
        // Still open: it can be read, written, and looked at.
        assert_eq!(fs.get(handle, 4096, 10).await, pattern(3, 5_000_000)[4096..4106]);
        fs.put(handle, 5_000_000, b"more").await.unwrap();
        assert_eq!(fs.getattr(file.ino).await.unwrap().attr.nlink, 0);
        fs.release(handle).await.unwrap();
        bed.sleep(1).await;
        fs.store().checkpoint().await.unwrap();
        assert_eq!(fs.statfs().await.unwrap().free, before);
        assert_eq!(errno(fs.getattr(file.ino).await), libc::ESTALE);
        assert_eq!(errno(fs.open(file.ino, libc::O_RDONLY).await), libc::ESTALE);

        let d = fs.dir(root, "d").await;
        fs.dir(d, "sub").await;
        assert_eq!(fs.getattr(root).await.unwrap().attr.nlink, 3);
        assert_eq!(errno(fs.rmdir(root, b"d").await), libc::ENOTEMPTY);
        assert_eq!(errno(fs.unlink(root, b"d").await), libc::EISDIR);
        assert_eq!(errno(fs.rmdir(root, b"first").await), libc::ENOTDIR);
        fs.rmdir(d, b"sub").await.unwrap();
        let open = fs.opendir(d).await.unwrap();
        fs.rmdir(root, b"d").await.unwrap();
        assert_eq!(errno(fs.mkdir(ME, d, b"x", 0o755).await), libc::ENOENT);
        bed.sleep(1).await;
        assert!(fs.readdir(open, 0, 10).await.map_or(true, |names| names.is_empty()));
        assert_eq!(fs.getattr(root).await.unwrap().attr.nlink, 2);
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn hard_links_are_counted() {
    run(6, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let root = fs.root();
        let d = fs.dir(root, "d").await;
        let (file, handle) = fs.file(root, "f").await;
        fs.put(handle, 0, b"content").await.unwrap();
        let linked = fs.link(file.ino, d, b"g").await.unwrap();
        assert_eq!((linked.ino, linked.nlink, linked.size), (file.ino, 2, 7));
        assert!(linked.ctime > file.ctime);
        assert_eq!(errno(fs.link(file.ino, d, b"g").await), libc::EEXIST);
        assert_eq!(errno(fs.link(d, root, b"dd").await), libc::EPERM);
        fs.unlink(root, b"f").await.unwrap();
        assert_eq!(fs.lookup(d, b"g").await.unwrap().nlink, 1);
        // Two names of one inode: renaming one to the other does nothing.
        fs.link(file.ino, d, b"h").await.unwrap();
        fs.rename(d, b"g", d, b"h", PLAIN).await.unwrap();
        assert_eq!(fs.names(d).await, [".", "..", "g", "h"]);
        fs.unlink(d, b"g").await.unwrap();
        fs.unlink(d, b"h").await.unwrap();
        assert_eq!(errno(fs.link(file.ino, d, b"again").await), libc::ENOENT);
        assert_eq!(fs.get(handle, 0, 100).await, b"content");
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn renames_move_replace_exchange_and_refuse() {
    run(7, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let root = fs.root();
        let (a, b) = (fs.dir(root, "a").await, fs.dir(root, "b").await);
        let sub = fs.dir(a, "sub").await;
        let (one, _) = fs.file(a, "one").await;
        let (two, _) = fs.file(b, "two").await;
        let no_replace = RenameFlags { no_replace: true, exchange: false };
        let exchange = RenameFlags { no_replace: false, exchange: true };

        fs.rename(a, b"one", a, b"uno", PLAIN).await.unwrap();
        assert_eq!(errno(fs.rename(a, b"one", b, b"x", PLAIN).await), libc::ENOENT);
        assert_eq!(errno(fs.rename(a, b"uno", b, b"two", no_replace).await), libc::EEXIST);
        assert_eq!(errno(fs.rename(a, b"uno", b, b"x", exchange).await), libc::ENOENT);
        fs.rename(a, b"uno", b, b"two", exchange).await.unwrap();
        assert_eq!(fs.lookup(a, b"uno").await.unwrap().ino, two.ino);
        assert_eq!(fs.lookup(b, b"two").await.unwrap().ino, one.ino);
        fs.rename(a, b"uno", b, b"two", PLAIN).await.unwrap();
        assert_eq!(fs.lookup(b, b"two").await.unwrap().ino, two.ino);
        assert_eq!(fs.getattr(one.ino).await.unwrap().attr.nlink, 0, "still open");

        // Directories.
        assert_eq!(errno(fs.rename(a, b"sub", b, b"two", PLAIN).await), libc::ENOTDIR);
        assert_eq!(errno(fs.rename(b, b"two", a, b"sub", PLAIN).await), libc::EISDIR);
        assert_eq!(errno(fs.rename(root, b"a", sub, b"x", PLAIN).await), libc::EINVAL);
        assert_eq!(errno(fs.rename(root, b"a", a, b"x", PLAIN).await), libc::EINVAL);
        assert_eq!(errno(fs.rename(a, b"sub", root, b"a", PLAIN).await), libc::ENOTEMPTY);
        assert_eq!(errno(fs.rename(a, b"sub", root, b"a", exchange).await), libc::EINVAL);
        assert_eq!(errno(fs.rename(root, b"a", root, b"b", PLAIN).await), libc::ENOTEMPTY);
        fs.rename(a, b"sub", b, b"moved", PLAIN).await.unwrap();
        assert_eq!(fs.getattr(a).await.unwrap().attr.nlink, 2);
        assert_eq!(fs.getattr(b).await.unwrap().attr.nlink, 3);
        let open = fs.opendir(sub).await.unwrap();
        assert_eq!(fs.readdir(open, 1, 1).await.unwrap()[0].ino, b, "`..` goes along");
        fs.rename(root, b"a", b, b"moved", PLAIN).await.unwrap();
        assert_eq!(fs.lookup(b, b"moved").await.unwrap().ino, a);
        assert_eq!(fs.getattr(root).await.unwrap().attr.nlink, 3);
        // A directory against a file, across directories.
        let (_, _) = fs.file(root, "f").await;
        fs.rename(b, b"moved", root, b"f", exchange).await.unwrap();
        assert_eq!(fs.getattr(root).await.unwrap().attr.nlink, 4);
        assert_eq!(fs.getattr(b).await.unwrap().attr.nlink, 2);
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn large_directories_list_each_name_once() {
    run(8, 4 * MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let d = fs.dir(fs.root(), "d").await;
        for i in 0..3000 {
            let name = format!("a-rather-long-name-to-fill-leaves-{i:05}");
            fs.mknod(ME, d, name.as_bytes(), libc::S_IFREG | 0o644, 0).await.unwrap();
        }
        // What is there all the time is listed once, while others come and go.
        let handle = fs.opendir(d).await.unwrap();
        let (mut seen, mut from, mut round) = (Vec::new(), 0, 0);
        loop {
            let part = fs.readdir(handle, from, 100).await.unwrap();
            let Some(last) = part.last() else { break };
            from = last.next;
            seen.extend(part.iter().map(|e| String::from_utf8(e.name.clone()).unwrap()));
            let name = format!("a-rather-long-name-to-fill-leaves-{:05}", 2000 + round);
            fs.unlink(d, name.as_bytes()).await.unwrap();
            fs.mknod(ME, d, format!("new{round}").as_bytes(), libc::S_IFREG, 0).await.unwrap();
            round += 1;
        }
        let before = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(before, seen.len());
        for i in 0..2000 {
            assert!(seen.contains(&format!("a-rather-long-name-to-fill-leaves-{i:05}")), "{i}");
        }
        for name in fs.names(d).await.iter().filter(|n| !n.starts_with('.')) {
            fs.unlink(d, name.as_bytes()).await.unwrap();
        }
        fs.rmdir(fs.root(), b"d").await.unwrap();
        bed.sleep(10).await;
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn attributes_are_set_and_times_rise() {
    run(9, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        let set = SetAttr { mode: Some(0o4711), uid: Some(5), gid: Some(6), ..SetAttr::default() };
        let changed = fs.setattr(file.ino, set).await.unwrap().attr;
        assert_eq!((changed.mode & 0o7777, changed.uid, changed.gid), (0o4711, 5, 6));
        assert!(changed.ctime > file.ctime);
        let at = WallTime { secs: -5, nanos: 7 };
        let set =
            SetAttr { mtime: Some(SetTime::At(at)), atime: Some(SetTime::At(at)), ..SetAttr::default() };
        let changed = fs.setattr(file.ino, set).await.unwrap().attr;
        assert_eq!((changed.mtime, changed.atime), (at, at));
        // Every write is a new modification time, however fast they come.
        let mut last = changed.mtime;
        for i in 0..10 {
            fs.put(handle, i, b"x").await.unwrap();
            let now = fs.getattr(file.ino).await.unwrap().attr;
            assert!(now.mtime > last && now.ctime >= now.mtime);
            last = now.mtime;
        }
        // An ordinary user's write takes set-id bits away.
        let write = mfs::ops::Write { offset: 0, data: vec![1], append: false, kill_suid: true, sync: false };
        fs.write(handle, write).await.unwrap();
        assert_eq!(fs.getattr(file.ino).await.unwrap().attr.mode & 0o7777, 0o711);
        let root = fs.root();
        assert_eq!(errno(fs.resize(root, 5).await), libc::EISDIR);
        bed.unmount_and_check(fs).await;
        let fs = bed.mount().await;
        let found = fs.lookup(root, b"f").await.unwrap();
        assert_eq!((found.mode & 0o7777, found.mtime >= last, found.size), (0o711, true, 10));
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn extended_attributes_are_kept_small_and_large() {
    run(10, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        fs.put(handle, 0, &pattern(1, 3000)).await.unwrap();
        let large = pattern(2, 60_000);
        fs.setxattr(file.ino, b"user.a", b"1", XattrSet::Create).await.unwrap();
        fs.setxattr(file.ino, b"user.large", &large, XattrSet::Any).await.unwrap();
        assert_eq!(errno(fs.setxattr(file.ino, b"user.a", b"2", XattrSet::Create).await), libc::EEXIST);
        assert_eq!(errno(fs.setxattr(file.ino, b"user.b", b"2", XattrSet::Replace).await), libc::ENODATA);
        assert_eq!(errno(fs.getxattr(file.ino, b"user.b").await), libc::ENODATA);
        assert_eq!(
            errno(fs.setxattr(file.ino, b"system.posix_acl_access", b"", XattrSet::Any).await),
            libc::EOPNOTSUPP
        );
        assert_eq!(fs.getxattr(file.ino, b"user.large").await.unwrap(), large);
        assert_eq!(fs.listxattr(file.ino).await.unwrap(), b"user.a\0user.large\0");
        fs.removexattr(file.ino, b"user.large").await.unwrap();
        assert_eq!(errno(fs.removexattr(file.ino, b"user.large").await), libc::ENODATA);
        assert_eq!(fs.whole(file.ino).await, pattern(1, 3000));
        // Together with small content it does not fit the dinode.
        fs.put(handle, 3000, &pattern(5, 700)).await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        fs.setxattr(file.ino, b"user.b", &[9; 900], XattrSet::Any).await.unwrap();
        bed.unmount_and_check(fs).await;
        let fs = bed.mount().await;
        let found = fs.lookup(fs.root(), b"f").await.unwrap().ino;
        assert_eq!(fs.getxattr(found, b"user.b").await.unwrap(), [9; 900]);
        assert_eq!(fs.whole(found).await[..3000], pattern(1, 3000));
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn a_read_only_mount_changes_nothing() {
    run(11, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (_, handle) = fs.file(fs.root(), "f").await;
        fs.put(handle, 0, b"abc").await.unwrap();
        bed.unmount_and_check(fs).await;
        let options = mfs::Options { read_only: true, ..mfs::Options::default() };
        let fs = bed.mount_with(options).await;
        let file = fs.lookup(fs.root(), b"f").await.unwrap().ino;
        assert_eq!(fs.whole(file).await, b"abc");
        assert_eq!(errno(fs.open(file, libc::O_RDWR).await), libc::EROFS);
        assert_eq!(errno(fs.unlink(fs.root(), b"f").await), libc::EROFS);
        assert_eq!(errno(fs.mkdir(ME, fs.root(), b"d", 0o755).await), libc::EROFS);
        assert_eq!(errno(fs.resize(file, 0).await), libc::EROFS);
        bed.unmount_and_check(fs).await;
    });
}
