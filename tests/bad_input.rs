//! Damaged, foreign and hostile input: a clear error each time, no panic, nothing lost.

mod common;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use common::random::Random;
use common::{Lab, Plan, path, text};

const BLOCK: u64 = 4096;

/// A lab with one node and a filesystem that has something of everything, unmounted.
fn filled() -> Lab {
    let mut lab = Plan::nodes(1).size("64M").start();
    fs::create_dir_all(lab.path(0, "dir/sub")).expect("mkdir");
    for n in 0..300 {
        fs::write(lab.path(0, &format!("dir/file-with-a-long-name-{n:04}")), vec![1u8; 100 + n])
            .expect("write");
    }
    fs::write(lab.path(0, "large"), vec![2u8; 3 << 20]).expect("write");
    let sparse = fs::File::create(lab.path(0, "holes")).expect("create");
    for n in 0..2_000 {
        sparse.write_all_at(b"x", n * 16_384).expect("write");
    }
    drop(sparse);
    lab.umount(0);
    lab
}

/// Mount or fsck of a damaged image: the one says why not, the other finds it; neither panics.
#[track_caller]
fn assert_refused(lab: &mut Lab, words: &[&str]) {
    let said = lab.try_mount(0).expect_err("the damage must be noticed");
    assert!(words.iter().any(|w| said.contains(w)), "none of {words:?} in: {said}");
    assert!(!said.contains("panicked"), "{said}");
    let (code, said) = lab.fsck();
    assert!(matches!(code, 4 | 8), "fsck: {code} {said}");
    assert!(!said.contains("panicked"), "{said}");
}

fn patch(image: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new()
        .write(true)
        .open(image)
        .and_then(|f| f.write_all_at(bytes, at))
        .expect("patch the image");
}

#[test]
fn a_truncated_image_is_refused() {
    let mut lab = filled();
    OpenOptions::new().write(true).open(lab.image()).and_then(|f| f.set_len(32 << 20)).expect("truncate");
    assert_refused(&mut lab, &["cut off"]);
}

#[test]
fn a_foreign_file_is_refused() {
    let mut lab = Plan::nodes(1).size("64M").make();
    fs::write(lab.image(), vec![0x5a; 64 << 20]).expect("write");
    assert_refused(&mut lab, &["not a Matrix"]);
    fs::write(lab.image(), b"").expect("write");
    let said = lab.try_mount(0).expect_err("an empty file is no filesystem");
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn a_damaged_label_is_refused() {
    let mut lab = filled();
    let mut block = vec![0; BLOCK as usize];
    let image = fs::File::open(lab.image()).expect("open");
    image.read_exact_at(&mut block, 0).expect("read");
    for at in [0usize, 8, 40, 100, 4095] {
        let flipped = block[at] ^ 0x10;
        patch(&lab.image(), at as u64, &[flipped]);
        assert_refused(&mut lab, &["label", "newer", "not a Matrix"]);
        patch(&lab.image(), 0, &block);
    }
    lab.mount(0);
    lab.assert_clean();
}

#[test]
fn flipped_bits_in_metadata_are_found_and_never_crash_the_daemon() {
    let mut lab = filled();
    let image = lab.image();
    let good = fs::read(&image).expect("read");
    let mut kinds = std::collections::BTreeMap::<u16, Vec<u64>>::new();
    for (number, block) in (0..).zip(good.chunks_exact(BLOCK as usize)) {
        if let Some(kind) = metadata_kind(block, number) {
            kinds.entry(kind).or_default().push(number);
        }
    }
    assert!(
        IN_USE.iter().all(|kind| kinds.contains_key(kind)),
        "kinds of metadata found: {:?}",
        kinds.keys()
    );
    for (kind, blocks) in &kinds {
        let victim = blocks[blocks.len() / 2];
        patch(&image, victim * BLOCK + 1_000, &[good[(victim * BLOCK) as usize + 1_000] ^ 1]);
        let (code, said) = lab.fsck();
        assert!(!said.contains("panicked"), "{said}");
        let found = matches!(code, 4 | 8);
        assert!(found || !IN_USE.contains(kind), "kind {kind}, block {victim}: {code} {said}");
        if lab.try_mount(0).is_ok() {
            walk(&lab.at(0));
            assert!(lab.is_alive(0), "kind {kind}: the daemon died\n{}", lab.log(0));
            lab.clear(0);
        }
        assert!(!lab.log(0).contains("panicked"), "kind {kind}, block {victim}:\n{}", lab.log(0));
        fs::write(&image, &good).expect("restore");
    }
    lab.mount(0);
    assert!(fs::read(lab.path(0, "large")).expect("read") == vec![2u8; 3 << 20]);
    lab.assert_clean();
}

/// Numbers of the kinds of metadata, as mfs/FORMAT.md has them, of which one flipped bit must be found: superblock,
/// group header, bitmap, dinode, extent node, directory leaf.
const IN_USE: [u16; 6] = [1, 2, 3, 8, 9, 10];

/// The kind of a metadata block that lies at its own address; copies in journals do not.
fn metadata_kind(block: &[u8], number: u64) -> Option<u16> {
    let at_home = block[..4] == *b"MFSB" && block[8..16] == number.to_le_bytes();
    at_home.then(|| u16::from_le_bytes([block[4], block[5]]))
}

/// Reads everything; errors are expected, hangs and crashes are not.
fn walk(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let _ = entry.metadata();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path()),
            Ok(_) => drop(fs::read(entry.path())),
            Err(_) => {}
        }
    }
}

/// Address of a node's interconnect, from its status.
fn peer_address(lab: &Lab, n: usize) -> String {
    let status = lab.status(n);
    status["node"]["address"].as_str().expect("status names the address").to_string()
}

#[test]
fn garbage_at_the_peer_port_changes_nothing() {
    let mut lab = Plan::nodes(2).start();
    let address = peer_address(&lab, 0);
    for pattern in [&[0u8; 4096][..], &[0xff; 4096], b"GET / HTTP/1.1\r\n\r\n", &[0x16, 3, 1, 0xff, 0xff]] {
        let mut stream = TcpStream::connect(&address).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        for _ in 0..16 {
            if stream.write_all(pattern).is_err() {
                break;
            }
        }
        let _ = stream.shutdown(Shutdown::Write);
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply);
    }
    fs::write(lab.path(0, "f"), b"still fine").expect("write");
    assert_eq!(fs::read(lab.path(1, "f")).expect("read"), b"still fine");
    assert!(!lab.log(0).contains("panicked"));
    lab.assert_clean();
}

#[test]
fn a_newer_version_is_refused_as_such() {
    let mut lab = Plan::nodes(1).size("64M").make();
    patch(&lab.image(), 8, &(storage_control::label::LABEL_VERSION + 1).to_le_bytes());
    assert_refused(&mut lab, &["newer"]);
}

#[test]
fn a_full_cluster_refuses_the_next_node() {
    const SLOTS: u64 = 64;
    const FIRST_SLOT_BLOCK: u64 = 16;
    let mut lab = Plan::nodes(1).size("64M").make();
    // A live node holds the lock on its slot's first byte; so does this test, on all of them.
    let image = OpenOptions::new().read(true).write(true).open(lab.image()).expect("open");
    for slot in 0..SLOTS {
        lock(&image, (FIRST_SLOT_BLOCK + slot) * BLOCK);
    }
    let said = lab.try_mount(0).expect_err("no slot is free");
    assert!(said.contains("64 slots are in use"), "{said}");
    drop(image);
    lab.mount(0);
    lab.assert_clean();
}

/// Locks one byte of an open file, for as long as the file is open.
fn lock(file: &fs::File, at: u64) {
    // SAFETY: flock is plain data, zero is a value of it.
    let mut wanted: libc::flock = unsafe { std::mem::zeroed() };
    wanted.l_type = libc::F_WRLCK as libc::c_short;
    wanted.l_whence = libc::SEEK_SET as libc::c_short;
    wanted.l_start = at as libc::off_t;
    wanted.l_len = 1;
    // SAFETY: an open descriptor and a structure that lives over the call.
    let locked =
        unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(file), libc::F_OFD_SETLK, &raw const wanted) };
    common::check(locked).expect("the byte is free");
}

#[test]
fn a_hostile_client_of_the_control_socket_gets_an_error() {
    let mut lab = Plan::nodes(1).start();
    let socket = lab.run_dir(0).join("control.sock");
    for bytes in [&[0xffu8; 64][..], &[4, 0, 0, 0, b'n', b'u', b'l', b'l'], &[2, 0, 0, 0, b'{', b'}']] {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).expect("connect");
        stream.write_all(bytes).expect("send");
        let _ = stream.shutdown(Shutdown::Write);
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply);
        let reply = String::from_utf8_lossy(reply.get(4..).unwrap_or_default()).into_owned();
        assert!(reply.contains("refused"), "{reply}");
    }
    // Requests with a few bytes changed: an answer or the end of the connection, again and again.
    let (mut random, requests) = (Random::new(1), common::number("MATRIX_FUZZ_REQUESTS", 2_000));
    let good = [&br#"{"status":{}}"#[..], br#"{"hello":{}}"#, br#"{"locks":{"inode":12,"waiting":true}}"#];
    for number in 0..requests {
        let mut bytes = random.pick(&good).to_vec();
        for _ in 0..random.below(4) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = if random.chance(50) { random.next() as u8 } else { *random.pick(b"{}[]\":,0-9e") };
        }
        let length = if random.chance(90) { bytes.len() as u32 } else { random.next() as u32 };
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        let _ = stream.write_all(&[&length.to_le_bytes()[..], &bytes].concat());
        let _ = stream.shutdown(Shutdown::Write);
        let ended = stream.read_to_end(&mut Vec::new()).map_err(|e| e.kind());
        let request = String::from_utf8_lossy(&bytes);
        assert!(ended != Err(std::io::ErrorKind::WouldBlock), "request {number} has no end: {request}");
    }
    assert!(!lab.log(0).contains("panicked"), "{}", lab.log(0));
    let dir = lab.at(0);
    let status = lab.matrix(&["status", path(&dir)]);
    assert!(status.status.success(), "{}", text(&status));
    lab.assert_clean();
}
