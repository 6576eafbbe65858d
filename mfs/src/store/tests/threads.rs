//! Real threads: what the one thread of a simulation cannot show.

use storage_control::{TestRuntime, block_on};

use super::*;
use crate::testing::{BLOCKS, Random, formatted, options};

fn opened() -> (MemDevice, Superblock, Store) {
    let (device, sb) = formatted(&SimRuntime::new(1), options(BLOCKS));
    let (on, runtime) = (Arc::new(device.clone()), Arc::new(TestRuntime::new()));
    let store = block_on(Store::open(on, sb.clone(), 0, Arc::default(), runtime)).unwrap();
    (device, sb, store)
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
