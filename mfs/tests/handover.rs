//! Stories of locks on their way from one node to another: nothing is written without the lock, nothing is left
//! behind.

mod support;

use std::time::Duration;

use mfs::ops::{Operations, RenameFlags};
use storage_control::mem_device::Fault;
use storage_control::{Durability, Request, Runtime};
use support::{ME, Short, on_nodes, pattern, seeds};

/// Found by random operations on three real mounts, seed 4: a read that came while the lock went from exclusive to
/// shared made the access time dirty behind the last write-back. A later `fsync` logged the dinode under the shared
/// lock, and the image could land on what others had written since.
#[test]
fn a_read_while_the_lock_goes_down_leaves_nothing_to_be_written_under_the_shared_one() {
    on_nodes(1, 2, |bed, cluster, nodes| async move {
        let (a, b) = (&nodes[0], &nodes[1]);
        let (file, handle) = a.fs.file(a.fs.root(), "f").await;
        let reader = a.fs.open(file.ino, libc::O_RDONLY).await.unwrap().handle;
        a.fs.put(handle, 0, &pattern(1, 100_000)).await.unwrap();
        a.fs.release(handle).await.unwrap();
        // The way down stands still in the middle of its write-back.
        a.access.inject(|request| match request {
            Request::Write(_, _, Durability::Cached) => Fault::Hold,
            Request::Write(_, _, Durability::Stable) | Request::Read(..) | Request::Flush => Fault::None,
        });
        let (there, ino) = (b.fs.clone(), file.ino);
        let read = bed.join(async move { there.whole(ino).await });
        bed.sleep(1).await;
        assert_eq!(a.fs.get(reader, 0, 10).await, pattern(1, 10));
        a.access.release();
        assert!(read.await == pattern(1, 100_000));
        let begun = a.access.writes();
        a.fs.fsync(reader, false).await.unwrap();
        assert_eq!(a.access.writes(), begun, "something was written under the shared lock");
        let (here, there) = (a.fs.getattr(ino).await.unwrap().attr, b.fs.getattr(ino).await.unwrap().attr);
        assert_eq!(here, there, "an attribute is known to one node only");
        let writer = b.fs.open(ino, libc::O_WRONLY).await.unwrap().handle;
        b.fs.put(writer, 0, b"changed").await.unwrap();
        assert_eq!(a.fs.get(reader, 0, 7).await, b"changed");
        assert!(a.fs.store().failed().is_none());
        cluster.stop(nodes).await;
    });
}

/// `fsync` once looked only at what its own node had written.
#[test]
fn fsync_makes_stable_what_another_node_wrote() {
    on_nodes(2, 2, |bed, cluster, nodes| async move {
        let (a, b) = (&nodes[0], &nodes[1]);
        let (file, handle) = a.fs.file(a.fs.root(), "f").await;
        let other = b.fs.open(file.ino, libc::O_WRONLY).await.unwrap().handle;
        b.fs.put(other, 0, &pattern(1, 100_000)).await.unwrap();
        a.fs.fsync(handle, false).await.unwrap();
        let (cluster, nodes) = cluster.power_cut(nodes).await;
        let file = nodes[1].fs.lookup(nodes[1].fs.root(), b"f").await.unwrap();
        assert!(nodes[1].fs.whole(file.ino).await == pattern(1, 100_000));
        drop(bed);
        cluster.stop(nodes).await;
    });
}

/// Found by random operations, seed 23 of tests/stress.rs: a rename that could not have its second directory at once
/// dropped the first, waited for the second, dropped that too and began again. Two programs did so in turn, each
/// in the way of the other's try, for ever and without a moment's rest.
#[test]
fn renames_between_the_same_directories_never_start_again_for_ever() {
    for seed in seeds(50) {
        on_nodes(seed, 2, move |bed, cluster, nodes| async move {
            let root = nodes[0].fs.root();
            let dirs = [nodes[0].fs.dir(root, "a").await, nodes[0].fs.dir(root, "b").await];
            let mut programs = Vec::new();
            for n in 0..6 {
                let (fs, runtime) = (nodes[n % 2].fs.clone(), bed.runtime.clone());
                let name = format!("f{}", n / 2);
                programs.push(bed.join(async move {
                    for round in 0..20 {
                        let (from, to) = (dirs[(n + round) % 2], dirs[(n + round + 1) % 2]);
                        let _ = fs.mknod(ME, from, name.as_bytes(), libc::S_IFREG | 0o644, 0).await;
                        let flags = RenameFlags { no_replace: false, exchange: n == 0 };
                        let _ = fs.rename(from, name.as_bytes(), to, name.as_bytes(), flags).await;
                        if runtime.random().is_multiple_of(2) {
                            runtime.sleep(Duration::from_micros(runtime.random() % 500)).await;
                        }
                    }
                }));
            }
            for program in programs {
                program.await;
            }
            cluster.stop(nodes).await;
        });
    }
}
