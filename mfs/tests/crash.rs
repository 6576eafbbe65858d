//! The power goes at any time, and of what was not flushed any part may be there: what was fsynced is there whole,
//! the tree is in order, and life goes on.

mod support;

use mfs::ops::Operations;
use proptest::prelude::*;
use support::model::{Model, Op, op};
use support::{ME, Short, pattern, run};

/// Walks the whole tree and reads every file.
async fn read_everything(fs: &mfs::Filesystem) {
    let mut dirs = vec![fs.root()];
    while let Some(dir) = dirs.pop() {
        for name in fs.names(dir).await.iter().filter(|n| *n != "." && *n != "..") {
            let attr = fs.lookup(dir, name.as_bytes()).await.unwrap();
            match attr.file_type() {
                libc::S_IFDIR => dirs.push(attr.ino),
                libc::S_IFREG => assert_eq!(fs.whole(attr.ino).await.len() as u64, attr.size),
                _ => {}
            }
        }
    }
}

/// A number drawn from another.
fn mix(seed: u64, n: u64) -> u64 {
    let mut x = seed ^ n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 27)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_was_fsynced_survives(ops in proptest::collection::vec(op(), 1..150), seed in any::<u64>(), keep in 0..4_u64) {
        run(seed, 16_384, move |bed| async move {
            let fs = bed.mount().await;
            let mut model = Model::new(fs.root());
            for op in &ops {
                match op {
                    Op::Wait { secs } => bed.sleep((*secs).into()).await,
                    Op::Remount => {}
                    _ => model.apply(&fs, op).await,
                }
            }
            fs.withdraw("the power goes");
            drop(fs);
            // Nothing, all, or an arbitrary part of what was not flushed.
            bed.device.crash(|block| match keep {
                0 => false,
                1 => true,
                n => mix(seed, block.write * 131 + block.at.0).is_multiple_of(n),
            });
            bed.fsck().await;
            let fs = bed.mount().await;
            model.compare_synced(&fs).await;
            read_everything(&fs).await;
            fs.file(fs.root(), "life goes on").await;
            bed.sleep(20).await;
            bed.unmount_and_check(fs).await;
        });
    }
}

#[test]
fn a_truncation_cut_short_is_finished_by_the_next_mount() {
    for stop_after in 1..12 {
        run(stop_after, 4 * 16_384, move |bed| async move {
            let fs = bed.mount().await;
            let (file, handle) = fs.file(fs.root(), "f").await;
            // Pieces in many groups, so that freeing takes many steps.
            for i in 0..40_u64 {
                fs.put(handle, i << 22, &pattern(i, 1 << 20)).await.unwrap();
                fs.fsync(handle, false).await.unwrap();
            }
            fs.store().checkpoint().await.unwrap();
            let before = fs.store().stats().commits;
            // The power goes after a few commits.
            let shared = fs.clone();
            let work = async move {
                let _ = shared.resize(file.ino, 5000).await;
                let _ = shared.fsync(handle, false).await;
            };
            storage_control::Runtime::spawn(&bed.runtime, Box::pin(work));
            while fs.store().stats().commits < before + 1 {
                storage_control::Runtime::sleep(&bed.runtime, std::time::Duration::from_millis(stop_after))
                    .await;
                if bed.runtime.random() % 3 == 0 {
                    fs.store().commit().await.unwrap();
                }
            }
            fs.withdraw("the power goes");
            drop(fs);
            bed.device.crash(|block| block.at.0 % stop_after == 0);
            let fs = bed.mount().await;
            bed.sleep(5).await;
            let file = fs.lookup(fs.root(), b"f").await.unwrap();
            assert!(file.size == 5000 || file.size > 39 << 22, "{}", file.size);
            assert_eq!(fs.whole(file.ino).await[..5000], pattern(0, 5000));
            bed.unmount_and_check(fs).await;
        });
    }
}

#[test]
fn orphans_left_by_a_crash_are_freed() {
    run(3, 16_384, |bed| async move {
        let fs = bed.mount().await;
        let root = fs.root();
        let (_, first) = fs.file(root, "keep").await;
        fs.release(first).await.unwrap();
        fs.store().checkpoint().await.unwrap();
        let free = fs.statfs().await.unwrap().free;
        for i in 0..200 {
            let (_, handle) = fs.file(root, &format!("f{i}")).await;
            fs.put(handle, 0, &pattern(i, 20_000)).await.unwrap();
            fs.fsync(handle, false).await.unwrap();
            // Open, so that nobody frees them.
            fs.unlink(root, format!("f{i}").as_bytes()).await.unwrap();
        }
        fs.mkdir(ME, root, b"d", 0o755).await.unwrap();
        fs.store().commit().await.unwrap();
        fs.withdraw("the power goes");
        drop(fs);
        bed.device.crash(|_| false);
        bed.fsck().await;
        let fs = bed.mount().await;
        bed.sleep(5).await;
        fs.rmdir(root, b"d").await.unwrap();
        bed.sleep(5).await;
        fs.store().checkpoint().await.unwrap();
        assert_eq!(fs.names(root).await, [".", "..", "keep"]);
        // The orphan table may have kept a block that it grew by.
        assert!(free - fs.statfs().await.unwrap().free <= 1);
        bed.unmount_and_check(fs).await;
    });
}
