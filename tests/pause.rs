//! A daemon stopped for longer than its lease: the others go on and change its files; when it runs again it writes
//! nothing, its programs get errors, and it can be mounted again. With each fencing method.

mod common;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::{Lab, Plan, wait_until};

/// Longer than the wait for a lease to expire and its journal to be replayed.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(40);

fn stop_and_resume(options: &'static str) {
    let mut lab = Plan::nodes(3).options(options).start();
    fs::write(lab.path(0, "shared"), b"of node 0").expect("write");
    // Dirty data under an exclusive lock: what a resumed daemon would love to write.
    let mut dirty =
        OpenOptions::new().create(true).truncate(true).write(true).open(lab.path(0, "dirty")).expect("open");
    dirty.write_all(&[b'0'; 200_000]).expect("write");
    let stopped = lab.pid(0);
    lab.stop(0);

    wait_until("node 1 gets the stopped node's files", TAKEN_OVER_WITHIN, || {
        let path = lab.path(1, "shared");
        let (done, result) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(fs::write(path, b"of node 1").is_ok()));
        result.recv_timeout(TAKEN_OVER_WITHIN).unwrap_or(false)
    });
    let theirs =
        OpenOptions::new().create(true).truncate(true).write(true).open(lab.path(2, "dirty")).expect("open");
    theirs.write_all_at(&[b'2'; 200_000], 0).expect("write");
    theirs.sync_all().expect("fsync");
    drop(theirs);

    lab.resume(0);
    wait_until("the resumed daemon ends by itself or was killed", common::SOON, || !common::alive(stopped));
    assert!(
        dirty.write_all(b"more").and_then(|()| dirty.sync_all()).is_err(),
        "its programs must get errors"
    );
    drop(dirty);
    assert_contents(&lab, 1);
    lab.clear(0);
    lab.mount(0);
    assert_contents(&lab, 0);
    lab.assert_clean();
}

fn assert_contents(lab: &Lab, n: usize) {
    assert_eq!(fs::read(lab.path(n, "shared")).expect("read"), b"of node 1");
    assert!(fs::read(lab.path(n, "dirty")).expect("read") == [b'2'; 200_000], "a stale write came through");
}

#[test]
fn a_paused_node_writes_nothing_with_the_same_host_proof() {
    stop_and_resume("");
}

#[test]
fn a_paused_node_writes_nothing_with_leases_only() {
    stop_and_resume("fence=lease,io_timeout=2");
}

#[test]
fn a_short_pause_costs_nobody_anything() {
    let mut lab = Plan::nodes(2).options("fence=lease,io_timeout=2").start();
    fs::write(lab.path(0, "f"), b"1").expect("write");
    lab.stop(0);
    std::thread::sleep(Duration::from_millis(500)); // the pause itself, not a wait for something
    lab.resume(0);
    fs::write(lab.path(1, "f"), b"2").expect("write");
    assert_eq!(fs::read(lab.path(0, "f")).expect("read"), b"2");
    assert!(lab.is_alive(0) && lab.is_alive(1));
    lab.assert_clean();
}
