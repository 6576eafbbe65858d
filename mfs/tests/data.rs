//! Reading, writing, truncating and write-back on one node.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use mfs::ops::Operations;
use storage_control::mem_device::Fault;
use storage_control::{Durability, Request};
use support::{Short, errno, is_no_space, pattern, run};

const MIB_64: u64 = 16_384;

/// The offsets around which things change: inline content, blocks, chunks.
const EDGES: [usize; 9] = [0, 1, 3839, 3840, 3841, 4096, 65_535, 65_536, 200_000];

#[test]
fn files_of_every_size_are_read_back_after_write_back_and_remount() {
    run(1, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        for (i, size) in EDGES.into_iter().enumerate() {
            let (_, handle) = fs.file(fs.root(), &format!("f{i}")).await;
            if size > 0 {
                fs.put(handle, 0, &pattern(i as u64, size)).await.unwrap();
            }
            assert_eq!(fs.get(handle, 0, size + 10).await, pattern(i as u64, size));
            fs.fsync(handle, false).await.unwrap();
            assert_eq!(fs.get(handle, 0, size + 10).await, pattern(i as u64, size));
        }
        bed.unmount_and_check(fs).await;
        let fs = bed.mount().await;
        for (i, size) in EDGES.into_iter().enumerate() {
            let found = fs.lookup(fs.root(), format!("f{i}").as_bytes()).await.unwrap();
            assert_eq!(found.size, size as u64);
            assert_eq!(fs.whole(found.ino).await, pattern(i as u64, size));
        }
        bed.unmount_and_check(fs).await;
    });
}

/// Found by the reference model: the read of a hole behind small content brought back the content's old bytes.
#[test]
fn a_hole_behind_small_content_does_not_bring_back_old_bytes() {
    run(4, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (_, handle) = fs.file(fs.root(), "f").await;
        fs.put(handle, 0, &pattern(1, 2161)).await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        fs.put(handle, 0, b"!").await.unwrap();
        fs.put(handle, 8192, b"?").await.unwrap();
        let mut wanted = pattern(1, 2161);
        wanted[0] = b'!';
        wanted.resize(8192, 0);
        wanted.push(b'?');
        assert!(fs.get(handle, 0, 9000).await == wanted);
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn holes_read_as_zeros_and_take_no_space() {
    run(2, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        fs.put(handle, 1 << 40, b"far").await.unwrap();
        fs.put(handle, 10_000, b"near").await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        let attr = fs.getattr(file.ino).await.unwrap().attr;
        assert_eq!(attr.size, (1 << 40) + 3);
        assert!(attr.blocks_512 <= 3 * 8);
        assert_eq!(fs.get(handle, 9_998, 8).await, b"\0\0near\0\0");
        assert_eq!(fs.get(handle, (1 << 40) - 2, 100).await, b"\0\0far");
        assert_eq!(fs.get(handle, 1 << 41, 100).await, b"");
        // Largest file.
        assert_eq!(errno(fs.put(handle, i64::MAX as u64 - 2, b"abc").await), libc::EFBIG);
        assert_eq!(errno(fs.resize(file.ino, u64::MAX).await), libc::EFBIG);
        fs.resize(file.ino, 8 << 40).await.unwrap();
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn what_lies_behind_an_old_end_never_comes_back() {
    run(3, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        for (i, keep) in [0_usize, 100, 3000, 4096, 5000, 70_000].into_iter().enumerate() {
            for grow_by_write in [false, true] {
                for flush_between in [false, true] {
                    let name = format!("f{i}{grow_by_write}{flush_between}");
                    let (file, handle) = fs.file(fs.root(), &name).await;
                    fs.put(handle, 0, &[7; 100_000]).await.unwrap();
                    fs.fsync(handle, false).await.unwrap();
                    fs.resize(file.ino, keep as u64).await.unwrap();
                    if flush_between {
                        fs.fsync(handle, false).await.unwrap();
                    }
                    let mut wanted = vec![7; keep];
                    wanted.resize(120_000, 0);
                    if grow_by_write {
                        fs.put(handle, 119_999, b"x").await.unwrap();
                        wanted[119_999] = b'x';
                    } else {
                        fs.resize(file.ino, 120_000).await.unwrap();
                    }
                    assert_eq!(fs.get(handle, 0, 200_000).await, wanted, "{name}");
                    fs.fsync(handle, false).await.unwrap();
                    fs.release(handle).await.unwrap();
                }
            }
        }
        bed.unmount_and_check(fs).await;
        let fs = bed.mount().await;
        let found = fs.lookup(fs.root(), b"f4truetrue").await.unwrap().ino;
        let whole = fs.whole(found).await;
        assert!(whole[..5000].iter().all(|b| *b == 7) && whole[5000..119_999].iter().all(|b| *b == 0));
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn small_files_move_between_dinode_and_blocks() {
    run(4, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        fs.put(handle, 0, &pattern(1, 1000)).await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        bed.sleep(20).await;
        // Growing by truncation alone, beyond the dinode.
        fs.resize(file.ino, 1 << 20).await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        let mut wanted = pattern(1, 1000);
        wanted.resize(1 << 20, 0);
        assert_eq!(fs.get(handle, 0, 2 << 20).await, wanted);
        fs.resize(file.ino, 10).await.unwrap();
        fs.put(handle, 5, b"abc").await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        assert_eq!(fs.get(handle, 0, 100).await[..8], [&pattern(1, 5)[..], b"abc"].concat());
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn appends_go_to_the_end_whatever_offset_is_given() {
    run(5, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, one) = fs.file(fs.root(), "f").await;
        let two = fs.open(file.ino, libc::O_WRONLY | libc::O_APPEND).await.unwrap().handle;
        let mut wanted = Vec::new();
        for i in 0..200_u8 {
            let record = [i; 100];
            fs.append(if i % 2 == 0 { one } else { two }, &record).await.unwrap();
            wanted.extend_from_slice(&record);
            if i % 50 == 49 {
                fs.fsync(one, false).await.unwrap();
                bed.sleep(7).await;
            }
        }
        assert_eq!(fs.whole(file.ino).await, wanted);
        assert_eq!(
            errno(fs.put(fs.open(file.ino, libc::O_RDONLY).await.unwrap().handle, 0, b"x").await),
            libc::EBADF
        );
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn old_data_are_written_back_without_being_asked() {
    run(6, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        fs.put(handle, 0, &pattern(1, 50_000)).await.unwrap();
        assert!(fs.dirty_bytes() >= 50_000);
        bed.sleep(12).await;
        assert_eq!(fs.dirty_bytes(), 0);
        fs.put(handle, 100, b"again").await.unwrap();
        fs.release(handle).await.unwrap();
        fs.forget(file.ino, 1);
        bed.sleep(12).await;
        assert_eq!(fs.dirty_bytes(), 0);
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn writers_wait_when_there_is_too_much_dirty_data() {
    run(7, 4 * MIB_64, |bed| async move {
        let options = mfs::Options { dirty_limit_bytes: 1 << 20, ..mfs::Options::default() };
        let fs = bed.mount_with(options).await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        for i in 0..64 {
            fs.put(handle, i << 18, &pattern(i, 1 << 18)).await.unwrap();
            assert!(fs.dirty_bytes() <= (1 << 20) + (1 << 18));
        }
        fs.fsync(handle, false).await.unwrap();
        for i in 0..64 {
            assert_eq!(fs.get(handle, i << 18, 1 << 18).await, pattern(i, 1 << 18));
        }
        assert!(fs.getattr(file.ino).await.unwrap().attr.blocks_512 >= 64 << 9);
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn a_full_filesystem_says_so_at_write_and_keeps_what_it_took() {
    run(8, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        let mut written = 0_u64;
        let error = loop {
            match fs.put(handle, written, &pattern(written, 1 << 18)).await {
                Ok(n) => written += n as u64,
                Err(error) => break error,
            }
        };
        assert!(is_no_space(&error), "{error}");
        assert!(written > 30 << 20, "{written}");
        fs.fsync(handle, false).await.unwrap();
        // Blocks that are there can be written again, and removing makes room.
        fs.put(handle, 4096, b"over").await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        assert_eq!(fs.get(handle, 4096, 4).await, b"over");
        fs.resize(file.ino, written / 2).await.unwrap();
        let (_, other) = fs.file(fs.root(), "g").await;
        fs.put(other, 0, &pattern(2, 1 << 20)).await.unwrap();
        fs.fsync(other, false).await.unwrap();
        fs.unlink(fs.root(), b"f").await.unwrap();
        fs.release(handle).await.unwrap();
        bed.sleep(10).await;
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn fragmented_files_get_trees_and_lose_them() {
    run(9, 2 * MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        // Every other block, so that nothing joins.
        for i in 0..2000_u64 {
            fs.put(handle, i * 2 * 4096, &i.to_le_bytes().repeat(512)).await.unwrap();
            if i % 97 == 0 {
                fs.fsync(handle, false).await.unwrap();
            }
        }
        fs.fsync(handle, false).await.unwrap();
        for i in 0..2000_u64 {
            assert_eq!(fs.get(handle, i * 2 * 4096, 8).await, i.to_le_bytes());
            assert_eq!(fs.get(handle, (i * 2 + 1) * 4096 - 8, 8).await, i.to_le_bytes());
        }
        fs.resize(file.ino, 1000 * 4096).await.unwrap();
        assert_eq!(fs.get(handle, 998 * 4096, 8).await, 499_u64.to_le_bytes());
        fs.resize(file.ino, 0).await.unwrap();
        assert_eq!(fs.getattr(file.ino).await.unwrap().attr.blocks_512, 0);
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn a_lost_write_is_told_once_at_fsync() {
    run(10, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        fs.put(handle, 0, &pattern(1, 100_000)).await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        let broken = Arc::new(AtomicBool::new(true));
        let hits = Arc::new(AtomicUsize::new(0));
        let (b, h) = (broken.clone(), hits.clone());
        // Large writes are file data; the journal's are not touched.
        bed.device.inject(move |request| match request {
            Request::Write(_, blocks, _) if blocks >= 20 && b.load(SeqCst) => {
                h.fetch_add(1, SeqCst);
                Fault::Errno(libc::EIO)
            }
            _ => Fault::None,
        });
        fs.put(handle, 0, &pattern(2, 100_000)).await.unwrap();
        assert_eq!(errno(fs.fsync(handle, false).await), libc::EIO);
        assert!(hits.load(SeqCst) > 0);
        broken.store(false, SeqCst);
        fs.fsync(handle, false).await.unwrap();
        assert_eq!(fs.whole(file.ino).await, pattern(1, 100_000), "what is on disk");
        fs.put(handle, 0, &pattern(3, 100_000)).await.unwrap();
        broken.store(true, SeqCst);
        bed.sleep(12).await;
        assert_eq!(errno(fs.flush(handle).await), libc::EIO);
        fs.flush(handle).await.unwrap();
        broken.store(false, SeqCst);
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn after_withdrawal_everything_is_an_io_error() {
    run(11, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        fs.put(handle, 0, b"abc").await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        fs.put(handle, 3, b"def").await.unwrap();
        fs.withdraw("the lease is lost");
        assert_eq!(fs.withdrawn().await, "the lease is lost");
        assert_eq!(errno(fs.getattr(file.ino).await), libc::EIO);
        assert_eq!(errno(fs.put(handle, 0, b"x").await), libc::EIO);
        assert_eq!(errno(fs.fsync(handle, false).await), libc::EIO);
        assert_eq!(errno(fs.lookup(fs.root(), b"f").await), libc::EIO);
        assert!(fs.unmount().await.is_err());
        drop(fs);
        let fs = bed.mount().await;
        let file = fs.lookup(fs.root(), b"f").await.unwrap().ino;
        assert_eq!(fs.whole(file).await, b"abc");
        bed.unmount_and_check(fs).await;
    });
}

/// An inode that nobody knew for a while has a past all the same: `fsync` of it is about that too.
#[test]
fn fsync_covers_what_was_written_before_the_inode_was_forgotten() {
    run(12, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (file, handle) = fs.file(fs.root(), "f").await;
        fs.put(handle, 0, &pattern(1, 100_000)).await.unwrap();
        fs.release(handle).await.unwrap();
        fs.forget(file.ino, 1);
        bed.sleep(8).await;
        let found = fs.lookup(fs.root(), b"f").await.unwrap().ino;
        let handle = fs.open(found, libc::O_RDONLY).await.unwrap().handle;
        fs.fsync(handle, false).await.unwrap();
        fs.withdraw("the power goes");
        drop(fs);
        bed.device.crash(|_| false);
        let fs = bed.mount().await;
        let found = fs.lookup(fs.root(), b"f").await.unwrap().ino;
        assert_eq!(fs.whole(found).await, pattern(1, 100_000));
        bed.unmount_and_check(fs).await;
    });
}

#[test]
fn a_failing_journal_ends_the_mount_and_harms_nothing() {
    run(13, MIB_64, |bed| async move {
        let fs = bed.mount().await;
        let (_, handle) = fs.file(fs.root(), "f").await;
        fs.put(handle, 0, &pattern(1, 50_000)).await.unwrap();
        fs.fsync(handle, false).await.unwrap();
        bed.device.inject(|request| match request {
            Request::Write(_, _, Durability::Stable) => Fault::Errno(libc::EIO),
            _ => Fault::None,
        });
        fs.put(handle, 50_000, &pattern(2, 50_000)).await.unwrap();
        assert_eq!(errno(fs.fsync(handle, false).await), libc::EIO);
        fs.withdrawn().await;
        assert_eq!(errno(fs.getattr(fs.root()).await), libc::EIO);
        drop(fs);
        bed.device.inject_nothing();
        let fs = bed.mount().await;
        let found = fs.lookup(fs.root(), b"f").await.unwrap().ino;
        assert_eq!(fs.whole(found).await[..50_000], pattern(1, 50_000));
        bed.unmount_and_check(fs).await;
    });
}
