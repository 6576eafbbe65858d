//! The allocator over a store in memory.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use storage_control::{Clock, Runtime, SimRuntime};

use super::*;
use crate::{
    format::group::{BLOCKS_PER_BITMAP, BlockState},
    testing::{BLOCKS, Node, Random, formatted, options},
};

/// The bits of every group as they are now, and the counters checked against them.
fn states(node: &Node) -> HashMap<BlockAddr, BlockState> {
    let alloc = node.alloc.clone();
    node.world.run(async move {
        let store = alloc.store();
        let geometry = *store.geometry();
        let mut states = HashMap::new();
        for group in 0..geometry.groups {
            let _guard = alloc.enter(group, How::Wait).await.unwrap();
            let (start, owner) = (geometry.group_start(group), LockName::Group(group));
            let header = store.read(start, BlockKind::Group, owner).await.unwrap();
            let head = GroupImage::of(block_of(&header));
            assert_eq!(head.defect(&geometry, group), None);
            let mut counts = [0_u32; 4];
            for block in 0..geometry.blocks_in(group) {
                let index = block / BLOCKS_PER_BITMAP;
                let mut fresh = Box::new([0; 4096]);
                let state = if head.bitmaps_written.get() >> index & 1 == 1 {
                    let image =
                        store.read(bitmap_addr(start, index), BlockKind::Bitmap, owner).await.unwrap();
                    BitmapImage::of(block_of(&image)).get(block % BLOCKS_PER_BITMAP)
                } else {
                    let map = BitmapImage::of_mut(&mut fresh);
                    map.format(&geometry, group, index);
                    map.get(block % BLOCKS_PER_BITMAP)
                };
                counts[state as usize] += 1;
                states.insert(BlockAddr(start.0 + u64::from(block)), state);
            }
            let header = [head.free, head.data, head.metadata, head.freed_metadata].map(|n| n.get());
            assert_eq!(header, counts, "counters of group {group}");
            if let Some(mirror) = alloc.0.state.lock().mirror(group) {
                mirror.assert_consistent();
            }
        }
        states
    })
}

fn count(node: &Node, state: BlockState) -> usize {
    states(node).values().filter(|&&s| s == state).count()
}

/// Reserves and logs in a transaction of its own.
async fn allocate(alloc: &Alloc, want: Want) -> Result<(Vec<BlockAddr>, Vec<Run>), FsError> {
    let mut res = alloc.reserve(want).await?;
    let mut txn = alloc.store().begin(res.credits() + want.meta).await?;
    let mut metas = Vec::new();
    for _ in 0..want.meta {
        let addr = res.meta();
        res.log_meta(&mut txn, addr).await?;
        txn.create(addr, BlockKind::Xattr, LockName::Inode(addr.0), |_| ());
        metas.push(addr);
    }
    for run in res.runs() {
        res.log_run(&mut txn, *run).await?;
    }
    Ok((metas, res.runs().to_vec()))
}

async fn free_run(alloc: &Alloc, run: Run) {
    let guard = alloc.lock_groups_for_free(&[run.addr]).await.unwrap();
    let mut txn = alloc.store().begin(guard.credits()).await.unwrap();
    guard.free_run(&mut txn, run).await.unwrap();
}

async fn free_meta(alloc: &Alloc, addr: BlockAddr) {
    let guard = alloc.lock_groups_for_free(&[addr]).await.unwrap();
    let mut txn = alloc.store().begin(guard.credits() + 1).await.unwrap();
    guard.free_meta(&mut txn, addr).await.unwrap();
}

/// Gives up every lock, as another node's requests would make it do.
fn give_up_all(node: &Node) {
    let lcl = node.lcl.clone();
    node.world.run(async move { lcl.trim(0).await });
    assert!(node.alloc.0.state.lock().groups.is_empty());
}

#[test]
fn what_is_logged_is_in_the_bitmap_and_what_is_not_comes_back() {
    let node = Node::new(1, BLOCKS);
    let before = states(&node);
    let alloc = node.alloc.clone();
    let (metas, runs) = node.world.run(async move {
        let dropped = alloc.reserve(Want { meta: 3, data: 70, ..Want::default() }).await.unwrap();
        assert_eq!(dropped.runs().iter().map(|run| run.len).sum::<u32>(), 70);
        drop(dropped);
        allocate(&alloc, Want { meta: 2, data: 50, ..Want::default() }).await.unwrap()
    });
    let after = states(&node);
    for (addr, state) in &after {
        let in_run = runs.iter().any(|run| (run.addr.0..run.addr.0 + u64::from(run.len)).contains(&addr.0));
        let expected = match () {
            () if metas.contains(addr) => BlockState::Metadata,
            () if in_run => BlockState::Data,
            () => before[addr],
        };
        assert_eq!(*state, expected, "block {addr}");
    }
    give_up_all(&node);
    assert_eq!(states(&node), after, "the disk says the same");
}

#[test]
fn allocation_fills_the_device_to_its_reserve_and_no_further() {
    let node = Node::new(1, BLOCKS);
    let alloc = node.alloc.clone();
    let (usage, total) = node.world.run(async move {
        let usage = alloc.statfs().await.unwrap();
        let mut total = 0;
        let mut last = FsError::NotFound;
        for size in [1000, 100, 10, 1] {
            loop {
                match allocate(&alloc, Want { data: size, ..Want::default() }).await {
                    Ok((_, runs)) => total += runs.iter().map(|run| u64::from(run.len)).sum::<u64>(),
                    Err(error) => {
                        last = error;
                        break;
                    }
                }
            }
        }
        assert!(matches!(last, FsError::NoSpace));
        assert_eq!(alloc.statfs().await.unwrap().available, 0);
        // Work that frees space still gets a block.
        allocate(&alloc, Want { meta: 1, urgent: true, ..Want::default() }).await.unwrap();
        (usage, total)
    });
    assert_eq!(total, usage.available);
    assert_eq!(count(&node, BlockState::Data) as u64, total);
}

#[test]
fn freed_data_are_reused_only_when_the_freeing_transaction_is_stable() {
    let node = Node::new(1, BLOCKS);
    let alloc = node.alloc.clone();
    node.world.run(async move {
        let mut runs = Vec::new();
        while let Ok((_, more)) = allocate(&alloc, Want { data: 500, ..Want::default() }).await {
            runs.extend(more);
        }
        while let Ok((_, more)) = allocate(&alloc, Want { data: 1, ..Want::default() }).await {
            runs.extend(more);
        }
        alloc.store().commit().await.unwrap();
        let before = alloc.store().stats().commits;
        free_run(&alloc, runs[0]).await;
        assert_eq!(alloc.promise(1).unwrap_err().errno(), libc::ENOSPC, "not stable yet");
        assert_eq!(alloc.store().stats().commits, before);
        allocate(&alloc, Want { data: runs[0].len, ..Want::default() }).await.unwrap();
        assert!(alloc.store().stats().commits > before, "the commit was forced");
    });
}

#[test]
fn freed_metadata_become_data_only_when_every_journal_has_passed_them() {
    let node = Node::new(1, BLOCKS);
    node.store.set_peer_tail(Clock(0));
    let alloc = node.alloc.clone();
    node.world.run(async move {
        let (metas, _) = allocate(&alloc, Want { meta: 200, ..Want::default() }).await.unwrap();
        for &addr in &metas {
            free_meta(&alloc, addr).await;
        }
        let (again, _) = allocate(&alloc, Want { meta: 1, ..Want::default() }).await.unwrap();
        assert!(metas.contains(&again[0]), "freed metadata serve as metadata at once");
        let mut runs = Vec::new();
        for size in [1000, 100, 10, 1] {
            while let Ok((_, more)) = allocate(&alloc, Want { data: size, ..Want::default() }).await {
                runs.extend(more);
            }
        }
        let inside =
            |run: &Run| metas.iter().any(|m| (run.addr.0..run.addr.0 + u64::from(run.len)).contains(&m.0));
        assert!(!runs.iter().any(inside), "a peer's journal may still hold images of them");
        alloc.store().set_peer_tail(alloc.store().clock().now());
        let (_, more) = allocate(&alloc, Want { data: 100, ..Want::default() }).await.unwrap();
        assert!(more.iter().any(inside), "there is nothing else");
    });
    states(&node);
}

#[test]
fn a_free_image_is_in_place_before_the_group_goes() {
    let node = Node::new(1, BLOCKS);
    let alloc = node.alloc.clone();
    let addr = node.world.run(async move {
        let (metas, _) = allocate(&alloc, Want { meta: 1, ..Want::default() }).await.unwrap();
        alloc.store().settle(LockName::Inode(metas[0].0)).await.unwrap();
        free_meta(&alloc, metas[0]).await;
        metas[0]
    });
    give_up_all(&node);
    let buf = node.device.peek(addr, 1);
    let head = crate::format::header::Header::of(block_of(&buf));
    assert_eq!(head.kind.get(), BlockKind::Free as u16);
    let group = node.store.geometry().group_of(addr).unwrap();
    assert_eq!(head.owner(), Some(LockName::Group(group)));
    assert!(node.store.cached(addr).is_none());
}

#[test]
fn freeing_twice_is_found_and_stops_the_store() {
    let node = Node::new(1, BLOCKS);
    let alloc = node.alloc.clone();
    node.world.run(async move {
        let (_, runs) = allocate(&alloc, Want { data: 4, ..Want::default() }).await.unwrap();
        free_run(&alloc, runs[0]).await;
        let guard = alloc.lock_groups_for_free(&[runs[0].addr]).await.unwrap();
        let mut txn = alloc.store().begin(guard.credits()).await.unwrap();
        assert_eq!(guard.free_run(&mut txn, runs[0]).await.unwrap_err().errno(), libc::EUCLEAN);
        assert!(alloc.store().failed().is_some());
    });
}

#[test]
fn many_operations_allocate_and_free_at_once() {
    for seed in 0..4 {
        let node = Node::new(seed, BLOCKS);
        let (alloc, world) = (node.alloc.clone(), node.world.clone());
        let owned: Arc<Mutex<HashMap<BlockAddr, usize>>> = Arc::default();
        let running = Arc::new(AtomicUsize::new(8));
        for task in 0..8 {
            let (alloc, world, owned, running) =
                (alloc.clone(), world.clone(), Arc::clone(&owned), Arc::clone(&running));
            node.world.spawn(Box::pin(async move {
                let mut random = Random(seed * 100 + task as u64);
                let (mut metas, mut runs) = (Vec::new(), Vec::new());
                for _ in 0..120 {
                    match random.below(5) {
                        0 | 1 => {
                            let want = Want {
                                meta: random.below(3) as u32,
                                data: random.below(40) as u32,
                                near: (random.below(2) == 0).then_some(random.below(7) as u32),
                                ..Want::default()
                            };
                            let (new_metas, new_runs) = allocate(&alloc, want).await.unwrap();
                            let mut owned = owned.lock();
                            for addr in blocks(&new_runs).chain(new_metas.iter().copied()) {
                                assert_eq!(owned.insert(addr, task), None, "{addr} was allocated twice");
                            }
                            metas.extend(new_metas);
                            runs.extend(new_runs);
                        }
                        2 if !metas.is_empty() => {
                            let addr = metas.swap_remove(random.below(metas.len() as u64) as usize);
                            owned.lock().remove(&addr);
                            free_meta(&alloc, addr).await;
                        }
                        3 if !runs.is_empty() => {
                            let run = runs.swap_remove(random.below(runs.len() as u64) as usize);
                            owned.lock().retain(|addr, _| blocks(&[run]).all(|gone| gone != *addr));
                            free_run(&alloc, run).await;
                        }
                        4 => world.sleep(Duration::from_millis(random.below(300))).await,
                        _ => alloc.store().commit().await.unwrap(),
                    }
                }
                running.fetch_sub(1, Ordering::Relaxed);
            }));
        }
        while running.load(Ordering::Relaxed) > 0 {
            node.world.advance(Duration::from_millis(50));
            if seed % 2 == 1 {
                let lcl = node.lcl.clone();
                node.world.run(async move { lcl.trim(2).await });
            }
        }
        let owned = owned.lock().len();
        let used = |n: &Node| count(n, BlockState::Data) + count(n, BlockState::Metadata);
        let empty = used(&Node::new(seed, BLOCKS));
        assert_eq!(used(&node), empty + owned);
    }
}

fn blocks(runs: &[Run]) -> impl Iterator<Item = BlockAddr> + '_ {
    runs.iter().flat_map(|run| (run.addr.0..run.addr.0 + u64::from(run.len)).map(BlockAddr))
}

#[test]
fn promised_blocks_are_nobody_elses() {
    let node = Node::new(1, BLOCKS);
    let alloc = node.alloc.clone();
    node.world.run(async move {
        assert!(alloc.promise(1).is_err(), "no group is held yet");
        let all = alloc.statfs().await.unwrap().available;
        let mut promise = alloc.promise_wait(all - 100).await.unwrap();
        assert!(promise.keep());
        assert_eq!(alloc.statfs().await.unwrap().available, 100);
        assert!(matches!(
            allocate(&alloc, Want { data: 101, ..Want::default() }).await,
            Err(FsError::NoSpace)
        ));
        allocate(&alloc, Want { data: 100, ..Want::default() }).await.unwrap();
        assert!(alloc.promise_wait(1).await.is_err());
        let want = Want { data: 1000, ..Want::default() };
        let res = alloc.reserve_promised(&mut promise, want).await.unwrap();
        assert_eq!(promise.blocks(), all - 1100);
        let mut txn = alloc.store().begin(res.credits()).await.unwrap();
        for run in res.runs() {
            res.log_run(&mut txn, *run).await.unwrap();
        }
        drop((txn, res));
        drop(promise);
        assert_eq!(alloc.statfs().await.unwrap().available, all - 1100);
    });
}

struct Writes {
    alloc: Alloc,
    promise: Mutex<Option<Promise>>,
}

impl Consumer for Writes {
    fn consume_promises(&self, _group: u32) -> BoxFuture<()> {
        let (alloc, promise) = (self.alloc.clone(), self.promise.lock().take());
        Box::pin(async move {
            let Some(mut promise) = promise else { return };
            let want = Want { data: promise.blocks() as u32, no_wait: true, ..Want::default() };
            let res = alloc.reserve_promised(&mut promise, want).await.unwrap();
            let mut txn = alloc.store().begin(res.credits()).await.unwrap();
            for run in res.runs() {
                res.log_run(&mut txn, *run).await.unwrap();
            }
        })
    }
}

#[test]
fn promises_are_consumed_before_their_groups_go() {
    let node = Node::new(1, BLOCKS);
    let (alloc, lcl) = (node.alloc.clone(), node.lcl.clone());
    node.world.run(async move {
        let mut promise = alloc.promise_wait(2000).await.unwrap();
        assert!(promise.keep());
        let writes = Arc::new(Writes { alloc: alloc.clone(), promise: Mutex::new(Some(promise)) });
        alloc.set_consumer(Arc::clone(&writes) as Arc<dyn Consumer>);
        lcl.trim(0).await;
        assert!(writes.promise.lock().is_none());
        assert_eq!(alloc.0.state.lock().promised, 0);
    });
    assert_eq!(count(&node, BlockState::Data), 2000);
}

#[test]
fn a_crash_loses_no_block_and_gives_none_twice() {
    for seed in 0..10 {
        let world = SimRuntime::new(seed);
        let (device, sb) = formatted(&world, options(BLOCKS));
        let node = Node::mount(&world, &device, &sb, 0);
        let alloc = node.alloc.clone();
        world.run(async move {
            let mut random = Random(seed);
            let mut metas = Vec::new();
            for _ in 0..60 {
                let want = Want { meta: 1, data: random.below(30) as u32, ..Want::default() };
                let (new, runs) = allocate(&alloc, want).await.unwrap();
                metas.extend(new);
                match random.below(4) {
                    0 => free_meta(&alloc, metas.swap_remove(0)).await,
                    1 if !runs.is_empty() => free_run(&alloc, runs[0]).await,
                    2 => alloc.store().commit().await.unwrap(),
                    _ => {}
                }
            }
        });
        node.store.close("the test crashes the node");
        let mut random = Random(seed);
        device.crash(|_| random.below(2) == 0);
        let (on, copy): (Arc<dyn storage_control::Device>, _) = (Arc::new(device.clone()), sb.clone());
        let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
        world.run(async move { crate::journal::replay(&on, &copy, 0, &runtime).await }).unwrap();
        states(&Node::mount(&world, &device, &sb, 1));
    }
}

#[test]
fn a_file_that_grows_stays_in_one_piece() {
    let node = Node::new(1, BLOCKS);
    let alloc = node.alloc.clone();
    node.world.run(async move {
        let (_, first) = allocate(&alloc, Want { data: 16, ..Want::default() }).await.unwrap();
        allocate(&alloc, Want { data: 16, goal: Some(BlockAddr(first[0].addr.0 + 500)), ..Want::default() })
            .await
            .unwrap();
        let goal = BlockAddr(first[0].addr.0 + 16);
        let (_, more) =
            allocate(&alloc, Want { data: 16, goal: Some(goal), ..Want::default() }).await.unwrap();
        assert_eq!(more, [Run { addr: goal, len: 16 }]);
    });
}
