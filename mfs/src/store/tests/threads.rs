//! Real threads: what the one thread of a simulation cannot show.

use storage_control::{Request, TestRuntime, block_on, mem_device::Fault};

use super::*;
use crate::testing::{BLOCKS, Random, formatted, options};

fn opened() -> (MemDevice, Superblock, Store) {
    let (device, sb) = formatted(&SimRuntime::new(1), options(BLOCKS));
    let (on, runtime) = (Arc::new(device.clone()), Arc::new(TestRuntime::new()));
    let store = block_on(Store::open(on, sb.clone(), 0, Arc::default(), runtime)).unwrap();
    (device, sb, store)
}

/// Found by random operations on three real mounts: a block left the list of pending ones, and only then was it
/// marked as in place. Who settled its lock in between found nothing pending and forgot a block that still counted
/// as dirty. It stayed in the cache, outlived the lock, and overwrote the dinode that another node had written.
#[test]
fn a_block_is_marked_in_place_before_its_lock_can_be_found_settled() {
    let (device, sb, store) = opened();
    block_on(put(&store, &sb, &[1], 7, true));
    device.inject(|request| match request {
        Request::Write(_, _, Durability::Cached) => Fault::Hold,
        Request::Write(_, _, Durability::Stable) | Request::Read(..) | Request::Flush => Fault::None,
    });
    std::thread::scope(|scope| {
        let settling = scope.spawn(|| block_on(store.settle(owner(1))));
        while device.held() == 0 {
            std::thread::yield_now();
        }
        let inner = store.inner();
        inner.cache.while_held(place(&sb, 1), || {
            device.release_held();
            // It lands, and cannot be marked. Whoever is about to do so keeps the list to himself.
            let mut kept = 0;
            while kept < 1000 {
                match inner.pending.try_lock() {
                    Some(pending) => {
                        assert!(pending.len() > 0, "nothing is pending, and the block counts as dirty");
                        kept = 0;
                    }
                    None => kept += 1,
                }
                std::thread::yield_now();
            }
        });
        settling.join().unwrap().unwrap();
    });
    store.forget(owner(1));
    assert!(store.failed().is_none());
    assert!(store.cached(place(&sb, 1)).is_none());
}

/// Every wake-up arrives, and the journal wraps while blocks are settled.
#[test]
fn threads_that_write_commit_and_settle_at_once_all_get_through() {
    let (device, sb, store) = opened();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (store, sb) = (store.clone(), sb.clone());
            scope.spawn(move || {
                let mut random = Random(thread);
                let cells: Vec<u64> = (0..50).map(|n| thread * 50 + n).collect();
                block_on(async move {
                    put(&store, &sb, &cells, 1, true).await;
                    for value in 2..400 {
                        let n = random.below(50) as usize;
                        let size = 1 + random.below(10) as usize;
                        put(&store, &sb, &cells[n..(n + size).min(50)], value, false).await;
                        match random.below(20) {
                            0 => store.commit().await.unwrap(),
                            1 => store.settle(owner(cells[n])).await.unwrap(),
                            2 => store.checkpoint().await.unwrap(),
                            3 => {
                                store.settle(owner(cells[n])).await.unwrap();
                                store.forget(owner(cells[n]));
                                let at = place(&sb, cells[n]);
                                let image = store.read(at, KIND, owner(cells[n])).await.unwrap();
                                assert_eq!(value_of(&image), value);
                            }
                            _ => {}
                        }
                    }
                    put(&store, &sb, &cells, 1000 + thread, false).await;
                });
            });
        }
    });
    block_on(store.shutdown()).unwrap();
    for n in 0..200 {
        assert_eq!(on_disk(&device, &sb, n), Some(1000 + n / 50));
    }
}
