//! Records that are torn, damaged or late, and the journals of two nodes that hand blocks to each other.

use storage_control::mem_device::Recorded;

use super::*;
use crate::{
    journal::scan,
    testing::{BLOCKS, Random, formatted, open_store, options},
};

/// Two committed records, the store dropped without a checkpoint.
fn two_records(world: &SimRuntime) -> (MemDevice, Superblock, Vec<BlockAddr>) {
    let (device, sb) = formatted(world, options(BLOCKS));
    let store = open_store(world, &device, &sb, 0);
    device.record();
    let (theirs, copy) = (store.clone(), sb.clone());
    world.run(async move {
        for value in [1, 2] {
            put(&theirs, &copy, &[1, 2, 3], value, value == 1).await;
            theirs.commit().await.unwrap();
        }
    });
    let writes = device.take_recorded().into_iter().filter_map(|change| match change {
        Recorded::Write { at, durability: Durability::Stable, .. } => Some(at),
        Recorded::Write { .. } | Recorded::Flush => None,
    });
    let records = writes.collect();
    store.close("the test crashes the node");
    (device, sb, records)
}

#[test]
fn a_torn_last_record_is_the_end_and_a_damaged_earlier_one_is_corruption() {
    let world = SimRuntime::new(9);
    for (record, block) in [(0, 0), (0, 2), (1, 0), (1, 2)] {
        let (device, sb, records) = two_records(&world);
        assert_eq!(records.len(), 2);
        device.poke(BlockAddr(records[record].0 + block), |bytes| bytes[1000] ^= 1);
        let (on, copy): (Arc<dyn Device>, _) = (Arc::new(device.clone()), sb.clone());
        let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
        let result = world.run(async move { replay(&on, &copy, 0, &runtime).await });
        if record == 1 {
            assert_eq!(result.unwrap().records, 1);
            assert_eq!(on_disk(&device, &sb, 1), Some(1));
        } else {
            assert_eq!(result.unwrap_err().errno(), libc::EUCLEAN);
            assert_eq!(on_disk(&device, &sb, 1), None, "nothing is written from a damaged journal");
        }
    }
}

#[test]
fn a_record_that_lands_after_replay_is_ignored() {
    let world = SimRuntime::new(9);
    let (device, sb, records) = two_records(&world);
    let late = device.peek(records[1], 4);
    device.poke(records[1], |bytes| bytes.fill(0));
    assert_eq!(replay_now(&world, &device, &sb, 0).records, 1);
    world.run({
        let device = device.clone();
        async move {
            for n in 0..4 {
                write_block(&device, BlockAddr(records[1].0 + n), &late[n as usize * 4096..][..4096]).await;
            }
        }
    });
    assert_eq!(replay_now(&world, &device, &sb, 0).records, 0);
    drop(open_store(&world, &device, &sb, 0));
    assert_eq!(replay_now(&world, &device, &sb, 0).records, 0);
    assert_eq!(on_disk(&device, &sb, 1), Some(1));
}

#[test]
fn a_scan_names_the_locks_and_changes_nothing() {
    let world = SimRuntime::new(9);
    let (device, sb, _) = two_records(&world);
    let (on, copy): (Arc<dyn Device>, _) = (Arc::new(device.clone()), sb.clone());
    let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
    let writes = device.writes();
    let scan = world.run(async move { scan(&on, &copy, 0, &runtime).await }).unwrap();
    assert_eq!((scan.empty, scan.records), (false, 2));
    assert_eq!(scan.owners.into_iter().collect::<Vec<_>>(), [owner(1), owner(2), owner(3)]);
    assert!(scan.clock > Clock(1));
    assert_eq!(device.writes(), writes);
}

/// Two nodes hand blocks to and fro, then one or both crash; journals are replayed in either order.
#[test]
fn blocks_handed_to_and_fro_survive_crashes_of_either_node_or_both() {
    for seed in 0..40 {
        let world = SimRuntime::new(seed);
        let (device, sb) = formatted(&world, options(BLOCKS));
        let stores = [open_store(&world, &device, &sb, 0), open_store(&world, &device, &sb, 1)];
        let mut random = Random(seed);
        const PAIRS: u64 = 4;
        let mut holder = [None; PAIRS as usize];
        let mut last = [0_u64; PAIRS as usize];
        let mut stable = [0_u64; PAIRS as usize];
        for value in 1..60 {
            let pair = random.below(PAIRS) as usize;
            let node = random.below(2) as usize;
            let (a, b) = (pair as u64 * 2, pair as u64 * 2 + 1);
            if let Some(other) = holder[pair].filter(|&other: &usize| other != node) {
                // The lock moves; the message carries the clock.
                let (from, to) = (stores[other].clone(), stores[node].clone());
                world.run(async move {
                    for n in [a, b] {
                        from.settle(owner(n)).await.unwrap();
                        from.forget(owner(n));
                    }
                    to.clock().receive(from.clock().now()).unwrap();
                });
                stable[pair] = last[pair];
            }
            holder[pair] = Some(node);
            let (store, copy, fresh) = (stores[node].clone(), sb.clone(), last[pair] == 0);
            let action = random.below(5);
            world.run(async move {
                put(&store, &copy, &[a, b], value, fresh).await;
                match action {
                    0 => store.commit().await.unwrap(),
                    1 => store.checkpoint().await.unwrap(),
                    _ => {}
                }
            });
            last[pair] = value;
            if action < 2 {
                for (pair, holder) in holder.iter().enumerate() {
                    if *holder == Some(node) {
                        stable[pair] = last[pair];
                    }
                }
            }
        }
        let power_cut = random.below(2) == 0;
        for store in &stores {
            store.close("the test crashes the node");
        }
        if power_cut {
            let survives = random.below(4);
            device.crash(|_| random.below(4) < survives);
        }
        let first = random.below(2) as u16;
        replay_now(&world, &device, &sb, first);
        replay_now(&world, &device, &sb, 1 - first);
        for pair in 0..PAIRS as usize {
            let a = on_disk(&device, &sb, pair as u64 * 2);
            let b = on_disk(&device, &sb, pair as u64 * 2 + 1);
            assert_eq!(a, b, "seed {seed}: a transaction is there as a whole or not at all");
            let found = a.unwrap_or(0);
            assert!((stable[pair]..=last[pair]).contains(&found), "seed {seed}: pair {pair} holds {found}");
        }
    }
}

#[test]
fn a_survivor_replays_while_it_writes_blocks_it_got_from_the_dead_node() {
    let world = SimRuntime::new(3);
    let (device, sb) = formatted(&world, options(BLOCKS));
    let [dead, live] = [open_store(&world, &device, &sb, 0), open_store(&world, &device, &sb, 1)];
    let (one, two, copy) = (dead.clone(), live.clone(), sb.clone());
    world.run(async move {
        put(&one, &copy, &[1, 2], 1, true).await;
        one.settle(owner(1)).await.unwrap();
        one.forget(owner(1));
        put(&one, &copy, &[2], 2, false).await;
        one.commit().await.unwrap();
        two.clock().receive(one.clock().now()).unwrap();
        put(&two, &copy, &[1], 3, false).await;
        two.settle(owner(1)).await.unwrap();
    });
    dead.close("the test crashes the node");
    let report = replay_now(&world, &device, &sb, 0);
    assert_eq!((report.written, report.skipped), (1, 1));
    assert_eq!((on_disk(&device, &sb, 1), on_disk(&device, &sb, 2)), (Some(3), Some(2)));
    assert!(live.failed().is_none());
}

#[test]
fn golden_checksum_of_a_record() {
    let world = SimRuntime::new(9);
    let (device, _, records) = two_records(&world);
    let buf = device.peek(records[0], 1);
    assert_eq!(
        Header::of(block_of(&buf)).checksum.get(),
        0x7deff727,
        "when this fails, the format has changed"
    );
}
