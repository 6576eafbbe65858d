//! Transactions against a device in memory: cut the power anywhere, replay, compare with a model.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use storage_control::{
    AlignedBuf, BlockAddr, Clock, Device, Durability, IoSlice, MemDevice, Request, Runtime, SimRuntime,
    mem_device::{Fault, Recorded},
};

use super::*;
use crate::{
    format::{header::BlockKind, superblock::Superblock},
    journal::{ReplayReport, replay, scan},
    testing::{BLOCKS, Node, Random, formatted, open_store, options},
};

const KIND: BlockKind = BlockKind::Xattr;

fn place(node: &Superblock, n: u64) -> BlockAddr {
    // The last group holds nothing else.
    let group = node.geometry.groups - 1;
    BlockAddr(node.geometry.group_start(group).0 + 100 + n)
}

fn owner(n: u64) -> LockName {
    LockName::Inode(n)
}

fn value_of(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[64..72].try_into().unwrap())
}

fn set_value(block: &mut header::Block, value: u64) {
    block[64..72].copy_from_slice(&value.to_le_bytes());
    block[4088..].copy_from_slice(&value.to_le_bytes());
}

/// The value on the device, if a sound block is there.
fn on_disk(device: &MemDevice, sb: &Superblock, n: u64) -> Option<u64> {
    let buf = device.peek(place(sb, n), 1);
    let block = block_of(&buf);
    header::verify(block, KIND, place(sb, n), &sb.secret, owner(n)).ok()?;
    assert_eq!(block[64..72], block[4088..], "an image is whole");
    Some(value_of(block))
}

fn replay_now(world: &SimRuntime, device: &MemDevice, sb: &Superblock, journal: u16) -> ReplayReport {
    let (on, sb): (Arc<dyn Device>, _) = (Arc::new(device.clone()), sb.clone());
    let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
    world.run(async move { replay(&on, &sb, journal, &runtime).await }).expect("the journal replays")
}

async fn put(store: &Store, sb: &Superblock, blocks: &[u64], value: u64, fresh: bool) -> TxnSeq {
    let mut txn = store.begin(blocks.len() as u32).await.unwrap();
    for &n in blocks {
        if fresh {
            txn.create(place(sb, n), KIND, owner(n), |block| set_value(block, value));
        } else {
            txn.edit(place(sb, n), KIND, owner(n), |block| set_value(block, value)).await.unwrap();
        }
    }
    txn.seq()
}

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

/// What happened on the device, and what was promised after each change.
struct History {
    before: storage_control::mem_device::Image,
    changes: Vec<Recorded>,
    /// For each change, the newest transaction known to be stable before it.
    stable: Vec<TxnSeq>,
    /// What the blocks hold after each transaction.
    states: BTreeMap<TxnSeq, BTreeMap<u64, u64>>,
}

const CELLS: u64 = 300;

/// Runs random transactions that fill the journal several times.
fn random_history(seed: u64, steps: u64) -> (SimRuntime, Superblock, History) {
    let world = SimRuntime::new(seed);
    let (device, sb) = formatted(&world, options(BLOCKS));
    let store = open_store(&world, &device, &sb, 0);
    let mut history = History {
        before: device.durable_image(),
        changes: Vec::new(),
        stable: Vec::new(),
        states: BTreeMap::new(),
    };
    device.record();
    let mut random = Random(seed);
    let mut state = BTreeMap::new();
    for value in 1..=steps {
        let stable = store.stable();
        let size = if random.below(4) == 0 { 1 + random.below(150) } else { 1 + random.below(4) };
        let mut blocks: Vec<u64> = (0..size).map(|_| random.below(CELLS)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let (theirs, copy, cells, known) = (store.clone(), sb.clone(), blocks.clone(), state.clone());
        let action = random.below(6);
        let seq = world.run(async move {
            let mut txn = theirs.begin(cells.len() as u32).await.unwrap();
            for n in &cells {
                let at = place(&copy, *n);
                if known.contains_key(n) {
                    txn.edit(at, KIND, owner(*n), |block| set_value(block, value)).await.unwrap();
                } else {
                    txn.create(at, KIND, owner(*n), |block| set_value(block, value));
                }
            }
            let seq = txn.seq();
            drop(txn);
            match action {
                0 | 1 => theirs.commit().await.unwrap(),
                2 => theirs.settle(owner(cells[0])).await.unwrap(),
                3 if value % 7 == 0 => theirs.checkpoint().await.unwrap(),
                _ => {}
            }
            seq
        });
        for n in blocks {
            state.insert(n, value);
        }
        history.states.insert(seq, state.clone());
        let changes = device.take_recorded();
        history.stable.extend(changes.iter().map(|_| stable));
        history.changes.extend(changes);
    }
    (world, sb, history)
}

/// The unflushed blocks at a cut, tracked beside the device.
#[derive(Default)]
struct Cut {
    unflushed: Vec<(BlockAddr, Arc<[u8; 4096]>)>,
}

impl Cut {
    fn apply(&mut self, change: &Recorded) {
        match change {
            Recorded::Flush => self.unflushed.clear(),
            Recorded::Write { at, blocks, durability: Durability::Cached } => {
                let addrs = (at.0..).map(BlockAddr);
                self.unflushed.extend(addrs.zip(blocks.iter().cloned()));
            }
            Recorded::Write { at, blocks, durability: Durability::Stable } => {
                self.unflushed.retain(|(addr, _)| !(at.0..at.0 + blocks.len() as u64).contains(&addr.0));
            }
        }
    }
}

async fn write_block(device: &MemDevice, at: BlockAddr, block: &[u8]) {
    let data = vec![IoSlice::from(AlignedBuf::copy_of(block))];
    device.write(at, data, Durability::Stable).await.unwrap();
}

/// A device as the power cut leaves it: everything durable and a random subset of the rest, perhaps with the first
/// part of the write that was under way.
fn after_cut(shadow: &MemDevice, cut: &Cut, next: Option<&Recorded>, random: &mut Random) -> MemDevice {
    let device = MemDevice::from_image(&shadow.durable_image());
    let survives = random.below(4);
    storage_control::block_on(async {
        for (addr, block) in &cut.unflushed {
            if random.below(4) < survives {
                write_block(&device, *addr, &**block).await;
            }
        }
        if let Some(Recorded::Write { at, blocks, .. }) = next
            && random.below(2) == 0
        {
            // Any blocks of it may have landed, in any order.
            for (addr, block) in (at.0..).zip(blocks) {
                if random.below(2) == 0 {
                    write_block(&device, BlockAddr(addr), &**block).await;
                }
            }
        }
    });
    device
}

fn cells(device: &MemDevice, sb: &Superblock) -> BTreeMap<u64, u64> {
    (0..CELLS).filter_map(|n| on_disk(device, sb, n).map(|value| (n, value))).collect()
}

#[test]
fn a_power_cut_at_any_write_leaves_a_committed_state() {
    for seed in 1..=4 {
        let (world, sb, history) = random_history(seed, 120);
        let mut random = Random(seed * 77);
        let shadow = MemDevice::from_image(&history.before);
        let mut cut = Cut::default();
        assert!(history.changes.len() > 60, "only {} changes", history.changes.len());
        for (n, change) in history.changes.iter().enumerate() {
            if random.below(3) == 0 {
                let device = after_cut(&shadow, &cut, Some(change), &mut random);
                replay_now(&world, &device, &sb, 0);
                let found = cells(&device, &sb);
                let empty = BTreeMap::new();
                let stable = history.stable[n];
                let allowed = history.states.range(stable..).map(|(_, state)| state);
                let none = (stable == TxnSeq(0)).then_some(&empty);
                assert!(
                    allowed.chain(none).any(|state| *state == found),
                    "seed {seed}, cut before change {n}: no committed state since {stable:?}"
                );
                assert_eq!(replay_now(&world, &device, &sb, 0).written, 0, "a second replay changes nothing");
                assert_eq!(cells(&device, &sb), found);
            }
            shadow.apply(change);
            cut.apply(change);
        }
    }
}

#[test]
fn a_crash_during_replay_is_replayed_again() {
    let (world, sb, history) = random_history(11, 60);
    let mut random = Random(4);
    let shadow = MemDevice::from_image(&history.before);
    let mut cut = Cut::default();
    for (n, change) in history.changes.iter().enumerate() {
        shadow.apply(change);
        cut.apply(change);
        if n % 20 != 19 {
            continue;
        }
        let crashed = after_cut(&shadow, &cut, None, &mut random);
        let image = crashed.durable_image();
        crashed.record();
        replay_now(&world, &crashed, &sb, 0);
        let expected = cells(&crashed, &sb);
        let changes = crashed.take_recorded();
        for stop in 0..changes.len() {
            if changes.len() > 30 && random.below(8) != 0 {
                continue;
            }
            let again = MemDevice::from_image(&image);
            changes[..stop].iter().for_each(|change| again.apply(change));
            let survives = random.below(4);
            again.crash(|_| random.below(4) < survives);
            replay_now(&world, &again, &sb, 0);
            assert_eq!(cells(&again, &sb), expected, "change {n}, replay cut at {stop}");
        }
    }
}

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

/// Real threads: every wake-up arrives, and the journal wraps while blocks are settled.
#[test]
fn threads_that_write_commit_and_settle_at_once_all_get_through() {
    let world = SimRuntime::new(1);
    let (device, sb) = formatted(&world, options(BLOCKS));
    let runtime: Arc<dyn Runtime> = Arc::new(storage_control::TestRuntime::new());
    let clock = Arc::new(LamportClock::default());
    let on: Arc<dyn Device> = Arc::new(device.clone());
    let opening = Store::open(on, sb.clone(), 0, clock, Arc::clone(&runtime));
    let store = storage_control::block_on(opening).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (store, sb) = (store.clone(), sb.clone());
            scope.spawn(move || {
                let mut random = Random(thread);
                let cells: Vec<u64> = (0..50).map(|n| thread * 50 + n).collect();
                storage_control::block_on(async move {
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
    storage_control::block_on(store.shutdown()).unwrap();
    for n in 0..200 {
        assert_eq!(on_disk(&device, &sb, n), Some(1000 + n / 50));
    }
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
