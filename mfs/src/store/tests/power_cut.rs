//! Random transactions, the power cut at every write: after replay the disk holds a committed state.

use std::collections::BTreeMap;

use storage_control::mem_device::{self, Recorded};

use super::*;
use crate::testing::{BLOCKS, Random, formatted, open_store, options};

/// What happened on the device, and what was promised after each change.
struct History {
    before: mem_device::Image,
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
