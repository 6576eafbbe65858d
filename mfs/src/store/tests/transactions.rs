//! Transactions of one node: what is seen, what is stable, what a failure ends.

use std::{collections::BTreeMap, time::Duration};

use storage_control::{Request, mem_device::Fault};

use super::*;
use crate::testing::{BLOCKS, Node, Random, formatted, open_store, options};

#[test]
fn an_edit_is_seen_at_once_and_is_on_disk_after_settle() {
    let node = Node::new(1, BLOCKS);
    let (store, device, sb) = (node.store.clone(), node.device.clone(), node.store.superblock().clone());
    node.world.run(async move {
        put(&store, &sb, &[1], 7, true).await;
        let image = store.read(place(&sb, 1), KIND, owner(1)).await.unwrap();
        assert_eq!(value_of(&image), 7);
        put(&store, &sb, &[1], 8, false).await;
        assert_eq!(value_of(&image), 7, "an image somebody holds does not change");
        assert_eq!(on_disk(&device, &sb, 1), None, "nothing goes in place before its record");
        store.settle(owner(1)).await.unwrap();
        assert_eq!(on_disk(&device, &sb, 1), Some(8));
        store.forget(owner(1));
        assert!(store.cached(place(&sb, 1)).is_none());
        let image = store.read(place(&sb, 1), KIND, owner(1)).await.unwrap();
        assert_eq!(value_of(&image), 8);
        let wrong = store.read(place(&sb, 1), KIND, owner(2)).await.unwrap_err();
        assert!(matches!(wrong, FsError::Corrupt { .. }));
    });
}

#[test]
fn a_commit_waits_for_open_handles_and_takes_their_changes() {
    let node = Node::new(1, BLOCKS);
    let (store, sb, world) = (node.store.clone(), node.store.superblock().clone(), node.world.clone());
    node.world.run(async move {
        let mut open = store.begin(2).await.unwrap();
        put(&store, &sb, &[1], 1, true).await;
        let (theirs, waker) = (store.clone(), world.clone());
        let place_of_2 = place(&sb, 2);
        world.spawn(Box::pin(async move {
            waker.sleep(Duration::from_millis(30)).await;
            open.create(place_of_2, KIND, owner(2), |block| set_value(block, 2));
            drop(theirs);
        }));
        let before = world.now();
        store.commit().await.unwrap();
        assert!(world.now().since(before) >= Duration::from_millis(30));
        assert_eq!(store.stats().commits, 1);
        store.checkpoint().await.unwrap();
        assert_eq!(store.stats().pending_blocks, 0);
    });
    assert_eq!(on_disk(&node.device, node.store.superblock(), 2), Some(2));
}

#[test]
fn changes_become_stable_by_age_and_the_journal_empties_when_idle() {
    let node = Node::new(1, BLOCKS);
    let (store, sb, world) = (node.store.clone(), node.store.superblock().clone(), node.world.clone());
    node.world.run(async move {
        let seq = put(&store, &sb, &[1], 1, true).await;
        world.sleep(Duration::from_secs(10)).await;
        assert!(store.stable() >= seq);
        assert_eq!((store.stats().pending_blocks, store.stats().ring_used), (0, 0));
        assert_eq!(store.tail_clock(), store.clock().now());
    });
}

#[test]
fn a_failed_record_stops_the_store() {
    let node = Node::new(1, BLOCKS);
    let (store, sb, device) = (node.store.clone(), node.store.superblock().clone(), node.device.clone());
    node.world.run(async move {
        put(&store, &sb, &[1], 1, true).await;
        device.inject(|request| match request {
            Request::Write(..) => Fault::Errno(libc::EIO),
            Request::Read(..) | Request::Flush => Fault::None,
        });
        assert_eq!(store.commit().await.unwrap_err().errno(), libc::EIO);
        assert_eq!(store.begin(1).await.unwrap_err().errno(), libc::EIO);
        assert!(store.failed().is_some());
        device.inject_nothing();
        assert!(store.commit().await.is_err(), "a store that failed stays failed");
        assert_eq!(on_disk(&device, &sb, 1), None);
    });
}

#[test]
fn a_failed_edit_after_a_change_stops_the_store() {
    let node = Node::new(1, BLOCKS);
    let (store, sb) = (node.store.clone(), node.store.superblock().clone());
    node.world.run(async move {
        let mut txn = store.begin(2).await.unwrap();
        assert!(txn.edit(place(&sb, 3), KIND, owner(3), |_| ()).await.is_err());
        assert!(store.failed().is_none(), "nothing was changed yet");
        txn.create(place(&sb, 1), KIND, owner(1), |_| ());
        assert!(txn.edit(place(&sb, 3), KIND, owner(3), |_| ()).await.is_err());
        assert!(store.failed().is_some());
    });
}

#[test]
fn a_small_cache_keeps_what_the_disk_does_not_have() {
    let world = SimRuntime::new(3);
    let (device, sb) = formatted(&world, options(BLOCKS));
    let on: Arc<dyn Device> = Arc::new(device);
    let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
    world.run(async move {
        let clock = Arc::new(LamportClock::default());
        let store = Store::open_with_cache(on, sb.clone(), 0, clock, runtime, 16).await.unwrap();
        let mut random = Random(5);
        let mut model = BTreeMap::new();
        for value in 1..3000 {
            let n = random.below(200);
            put(&store, &sb, &[n], value, !model.contains_key(&n)).await;
            model.insert(n, value);
            if random.below(50) == 0 {
                store.commit().await.unwrap();
            }
            if random.below(50) == 0 {
                store.checkpoint().await.unwrap();
                let (n, value) = model.iter().nth(random.below(model.len() as u64) as usize).unwrap();
                assert_eq!(value_of(&store.read(place(&sb, *n), KIND, owner(*n)).await.unwrap()), *value);
            }
        }
        store.checkpoint().await.unwrap();
        for n in 0..200 {
            let read = store.read(place(&sb, n), KIND, owner(n)).await.ok().map(|image| value_of(&image));
            assert_eq!(read, model.get(&n).copied());
        }
        assert!(store.stats().cached_blocks <= 16 + 200);
    });
}

#[test]
fn a_clean_shutdown_needs_no_replay_and_a_crash_does() {
    let world = SimRuntime::new(2);
    let (device, sb) = formatted(&world, options(BLOCKS));
    let store = open_store(&world, &device, &sb, 0);
    let (theirs, copy) = (store.clone(), sb.clone());
    world.run(async move {
        put(&theirs, &copy, &[1], 5, true).await;
        theirs.shutdown().await.unwrap();
        assert!(theirs.begin(1).await.is_err());
    });
    assert_eq!(replay_now(&world, &device, &sb, 0).records, 0);
    let store = open_store(&world, &device, &sb, 0);
    let (theirs, copy) = (store.clone(), sb.clone());
    world.run(async move {
        put(&theirs, &copy, &[1], 6, false).await;
        theirs.commit().await.unwrap();
    });
    drop(store);
    device.crash(|_| false);
    assert_eq!(on_disk(&device, &sb, 1), Some(5));
    let (on, copy) = (Arc::new(device.clone()), sb.clone());
    let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
    let refused = world.run(async move {
        let clock = Arc::new(LamportClock::default());
        Store::open(on, copy, 0, clock, runtime).await
    });
    assert!(matches!(refused, Err(FsError::DirtyJournal(0))));
    let report = replay_now(&world, &device, &sb, 0);
    assert_eq!((report.records, report.written, report.skipped), (1, 1, 0));
    assert_eq!(report.owners.into_iter().collect::<Vec<_>>(), [owner(1)]);
    assert_eq!(on_disk(&device, &sb, 1), Some(6));
    assert_eq!(replay_now(&world, &device, &sb, 0).records, 0);
    drop(open_store(&world, &device, &sb, 0));
}

#[test]
fn the_tail_clock_is_below_everything_that_may_come_back() {
    let node = Node::new(4, BLOCKS);
    let (store, sb) = (node.store.clone(), node.store.superblock().clone());
    node.world.run(async move {
        put(&store, &sb, &[1], 1, true).await;
        store.commit().await.unwrap();
        let version = Header::of(block_of(&store.cached(place(&sb, 1)).unwrap())).clock();
        assert!(store.tail_clock() < version, "the record may be replayed");
        store.settle(owner(1)).await.unwrap();
        assert!(store.tail_clock() < version, "in place is not passed");
        store.checkpoint().await.unwrap();
        assert!(store.tail_clock() >= version);
    });
}

/// Prints the cost of the hot path: `cargo test --release -p mfs -- --ignored speed --nocapture`.
#[test]
#[ignore = "a measurement"]
fn speed_of_the_hot_path() {
    let node = Node::new(1, 1 << 19);
    let (store, sb, alloc) = (node.store.clone(), node.store.superblock().clone(), node.alloc.clone());
    node.world.run(async move {
        put(&store, &sb, &(0..200).collect::<Vec<_>>(), 1, true).await;
        let each = |name: &str, start: std::time::Instant, n: u32| {
            println!("{name}: {:?}", start.elapsed() / n);
        };
        let start = std::time::Instant::now();
        for value in 0..200_000 {
            put(&store, &sb, &[value % 200], value, false).await;
        }
        each("begin, edit, end", start, 200_000);
        let start = std::time::Instant::now();
        for value in 0..200_000 {
            store.read(place(&sb, value % 200), KIND, owner(value % 200)).await.unwrap();
        }
        each("cached read", start, 200_000);
        let start = std::time::Instant::now();
        for _ in 0..20_000 {
            let want = crate::alloc::Want { meta: 1, data: 1, ..Default::default() };
            drop(alloc.reserve(want).await.unwrap());
        }
        each("reserve two blocks and give them back", start, 20_000);
        let start = std::time::Instant::now();
        for _ in 0..20_000 {
            let want = crate::alloc::Want { meta: 1, data: 1, ..Default::default() };
            let mut res = alloc.reserve(want).await.unwrap();
            let mut txn = store.begin(1 + res.credits()).await.unwrap();
            let addr = res.meta();
            res.log_meta(&mut txn, addr).await.unwrap();
            res.log_run(&mut txn, res.runs()[0]).await.unwrap();
            txn.create(addr, KIND, owner(addr.0), |_| ());
        }
        each("reserve and log two blocks, create one, commits included", start, 20_000);
        let start = std::time::Instant::now();
        store.checkpoint().await.unwrap();
        each("checkpoint", start, 1);
    });
}
