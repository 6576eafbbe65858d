//! The device fails one node's requests: what was reported stable is there, and a node that cannot know what is
//! stable reports nothing any more and leaves its locks to recovery.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use mfs::ops::{Handle, Ino, Operations, Write};
use storage_control::mem_device::Fault;
use storage_control::{BoxFuture, Durability, Request, Runtime};
use support::access::Access;
use support::cluster::Node;
use support::{Bed, Short, errno, on_nodes, pattern};

/// What of a node's requests fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    /// File data, and metadata on their way in place.
    Cached,
    /// Records and headers of the journal.
    Journal,
    Flush,
}

impl Kind {
    fn of(request: Request) -> Kind {
        match request {
            Request::Read(..) => Kind::Read,
            Request::Write(_, _, Durability::Cached) => Kind::Cached,
            Request::Write(_, _, Durability::Stable) => Kind::Journal,
            Request::Flush => Kind::Flush,
        }
    }
}

/// The next request of a kind fails, and no later one: a device that answers again has not brought anything back.
/// Tells whether it has happened.
fn fail_next(access: &Access, kind: Kind) -> Arc<AtomicBool> {
    let failed = Arc::new(AtomicBool::new(false));
    let happened = failed.clone();
    access.inject(move |request| {
        if Kind::of(request) == kind && !happened.swap(true, SeqCst) {
            return Fault::Errno(libc::EIO);
        }
        Fault::None
    });
    failed
}

/// Soon the node has withdrawn: nothing succeeds, and nothing is reported stable.
async fn expect_withdrawn(bed: &Bed, node: &Node, handle: Handle) {
    bed.sleep(5).await;
    assert_eq!(errno(node.fs.fsync(handle, false).await), libc::EIO);
    assert_eq!(errno(node.fs.fsync(handle, true).await), libc::EIO);
    let write = Write { offset: 0, data: b"x".to_vec(), append: false, kill_suid: false, sync: true };
    assert_eq!(errno(node.fs.write(handle, write).await), libc::EIO);
    assert_eq!(errno(node.fs.getattr(node.fs.root()).await), libc::EIO);
    assert!(node.fs.unmount().await.is_err(), "it would report everything stable");
}

/// A node whose flush or journal write fails while it makes something stable.
fn fails_at_fsync(kind: Kind) {
    on_nodes(1, 3, move |bed, cluster, mut nodes| async move {
        let root = nodes[0].fs.root();
        let (kept, kept_handle) = nodes[0].fs.file(root, "kept").await;
        nodes[0].fs.put(kept_handle, 0, &pattern(1, 100_000)).await.unwrap();
        nodes[0].fs.fsync(kept_handle, false).await.unwrap();
        let (_, lost_handle) = nodes[0].fs.file(root, "lost").await;
        nodes[0].fs.put(lost_handle, 0, &pattern(2, 100_000)).await.unwrap();
        let failed = fail_next(&nodes[0].access, kind);
        assert_eq!(errno(nodes[0].fs.fsync(lost_handle, false).await), libc::EIO);
        assert!(failed.load(SeqCst));
        assert_eq!(errno(nodes[0].fs.fsync(lost_handle, false).await), libc::EIO, "the device answers again");
        expect_withdrawn(&bed, &nodes[0], kept_handle).await;

        let dead = nodes.remove(0);
        let (fs, ino) = (nodes[0].fs.clone(), kept.ino);
        let written = bed.join(async move {
            let handle = fs.open(ino, libc::O_WRONLY).await.unwrap().handle;
            fs.put(handle, 100_000, b"more").await.unwrap();
            fs.fsync(handle, false).await.unwrap();
        });
        cluster.kill(&dead);
        cluster.recover(&dead, &nodes[1]).await;
        written.await;
        let wanted = [pattern(1, 100_000), b"more".to_vec()].concat();
        assert!(nodes[1].fs.whole(ino).await == wanted);
        let (cluster, nodes) = cluster.power_cut(nodes).await;
        assert!(nodes[0].fs.whole(ino).await == wanted);
        cluster.stop(nodes).await;
    });
}

#[test]
fn a_failed_flush_ends_the_node_and_nothing_is_reported_stable_later() {
    fails_at_fsync(Kind::Flush);
}

#[test]
fn a_failed_journal_write_ends_the_node_and_nothing_is_reported_stable_later() {
    fails_at_fsync(Kind::Journal);
}

/// The sweep of the inode table, once a minute, flushes for nobody in particular. It once looked away when that
/// failed, and the next flush, of whoever asked for it, reported stable what the device had thrown away.
#[test]
fn a_flush_that_fails_while_nobody_waits_is_not_forgotten() {
    for second in 40..70 {
        on_nodes(second, 1, move |bed, cluster, mut nodes| async move {
            let a = nodes.remove(0);
            let (file, handle) = a.fs.file(a.fs.root(), "f").await;
            a.fs.put(handle, 0, &pattern(1, 100_000)).await.unwrap();
            a.fs.fsync(handle, false).await.unwrap();
            bed.sleep(second).await;
            a.fs.put(handle, 0, &pattern(2, 100_000)).await.unwrap();
            let failed = fail_next(&a.access, Kind::Flush);
            for _ in 0..200 {
                if failed.load(SeqCst) {
                    break;
                }
                bed.runtime.sleep(Duration::from_millis(100)).await;
            }
            assert!(failed.load(SeqCst), "nothing was flushed");
            // What was in the device's cache is gone.
            bed.device.crash(|_| false);
            let result = a.fs.fsync(handle, false).await;
            let (cluster, nodes) = cluster.power_cut(vec![a]).await;
            let content = nodes[0].fs.whole(file.ino).await;
            assert!(result.is_err() || content == pattern(2, 100_000), "second {second}: lost after fsync");
            assert_eq!(result.map_err(|e| e.errno()), Err(libc::EIO), "second {second}");
            cluster.stop(nodes).await;
        });
    }
}

/// Metadata cannot go in place while the lock is wanted elsewhere: the lock stays where it is until the node is
/// recovered, and its journal brings the image.
#[test]
fn a_failed_write_in_place_keeps_the_lock_until_the_journal_is_replayed() {
    on_nodes(2, 2, |bed, cluster, mut nodes| async move {
        let (file, handle) = nodes[0].fs.file(nodes[0].fs.root(), "f").await;
        nodes[0].fs.put(handle, 0, &pattern(1, 2000)).await.unwrap();
        nodes[0].fs.fsync(handle, false).await.unwrap();
        // Only metadata are left to be written.
        let failed = fail_next(&nodes[0].access, Kind::Cached);
        let (fs, ino) = (nodes[1].fs.clone(), file.ino);
        let granted = Arc::new(AtomicBool::new(false));
        let seen = granted.clone();
        let read = bed.join(async move {
            let content = fs.whole(ino).await;
            seen.store(true, SeqCst);
            content
        });
        expect_withdrawn(&bed, &nodes[0], handle).await;
        assert!(failed.load(SeqCst));
        let dead = nodes.remove(0);
        cluster.kill(&dead);
        bed.sleep(5).await;
        assert!(!granted.load(SeqCst), "the lock of a node that was not recovered was granted");
        cluster.recover(&dead, &nodes[0]).await;
        assert!(read.await == pattern(1, 2000));
        cluster.stop(nodes).await;
    });
}

/// A node whose data could not be written lives on: the loss is told once, and others see what the disk has.
fn data_are_lost(way: impl FnOnce(&Bed, &Node, &Node, Ino) -> BoxFuture<()> + Send + 'static) {
    on_nodes(3, 2, move |bed, cluster, nodes| async move {
        let (a, b) = (&nodes[0], &nodes[1]);
        let (file, handle) = a.fs.file(a.fs.root(), "f").await;
        a.fs.put(handle, 0, &pattern(1, 100_000)).await.unwrap();
        a.fs.fsync(handle, false).await.unwrap();
        // Only data are left to be written.
        bed.sleep(5).await;
        a.fs.put(handle, 0, &pattern(2, 100_000)).await.unwrap();
        let failed = fail_next(&a.access, Kind::Cached);
        way(&bed, a, b, file.ino).await;
        assert_eq!(errno(a.fs.fsync(handle, false).await), libc::EIO);
        assert!(failed.load(SeqCst));
        a.fs.fsync(handle, false).await.unwrap();
        assert!(b.fs.whole(file.ino).await == pattern(1, 100_000));
        assert!(a.fs.whole(file.ino).await == pattern(1, 100_000));
        a.fs.put(handle, 0, &pattern(3, 100_000)).await.unwrap();
        a.fs.fsync(handle, false).await.unwrap();
        let (cluster, nodes) = cluster.power_cut(nodes).await;
        assert!(nodes[1].fs.whole(file.ino).await == pattern(3, 100_000));
        cluster.stop(nodes).await;
    });
}

#[test]
fn data_that_cannot_be_written_at_fsync_are_told_once() {
    data_are_lost(|_, _, _, _| Box::pin(std::future::ready(())));
}

#[test]
fn data_that_cannot_be_written_by_age_are_told_once() {
    data_are_lost(|bed, _, _, _| {
        let bed = bed.clone();
        Box::pin(async move { bed.sleep(10).await })
    });
}

#[test]
fn data_that_cannot_be_written_before_the_lock_goes_are_told_once() {
    data_are_lost(|_, _, b, ino| {
        let fs = b.fs.clone();
        Box::pin(async move { drop(fs.whole(ino).await) })
    });
}

/// Of several requests one failed: what the others wrote was seen by every read, and the next `fsync` did not flush
/// it.
#[test]
fn what_a_failed_write_left_on_the_device_is_stable_after_the_next_fsync() {
    on_nodes(4, 1, |bed, cluster, mut nodes| async move {
        let a = nodes.remove(0);
        let (file, handle) = a.fs.file(a.fs.root(), "f").await;
        a.fs.put(handle, 0, &pattern(1, 3 << 20)).await.unwrap();
        a.fs.fsync(handle, false).await.unwrap();
        bed.sleep(5).await;
        a.fs.put(handle, 0, &pattern(2, 3 << 20)).await.unwrap();
        let failed = fail_next(&a.access, Kind::Cached);
        assert_eq!(errno(a.fs.fsync(handle, false).await), libc::EIO);
        assert!(failed.load(SeqCst));
        a.fs.fsync(handle, false).await.unwrap();
        let seen = a.fs.whole(file.ino).await;
        assert!(seen != pattern(1, 3 << 20) && seen != pattern(2, 3 << 20));
        bed.device.crash(|_| false);
        let (cluster, nodes) = cluster.power_cut(vec![a]).await;
        assert!(nodes[0].fs.whole(file.ino).await == seen);
        cluster.stop(nodes).await;
    });
}
