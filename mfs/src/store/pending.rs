//! Committed blocks on their way in place, and the movement of the journal's tail.
//!
//! Of each block only the newest stable image is kept, and at most one write of it is under way: an older image
//! never lands on a newer one.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use storage_control::{BLOCK_SIZE, BlockAddr, Durability, IoSlice};

use super::{Inner, TxnSeq, wait::join_all};
use crate::{FsError, LockName, journal::Head};

/// The longest write in place, in blocks.
const MAX_WRITE_BLOCKS: usize = 256;
/// Writes in place under way at once, for each batch.
const MAX_WRITES: usize = 32;

struct Pending {
    owner: LockName,
    seq: TxnSeq,
    /// Part of the record's buffer.
    image: IoSlice,
    in_flight: bool,
}

/// Stable images that are not yet in place.
#[derive(Default)]
pub(crate) struct PendingBlocks {
    blocks: HashMap<BlockAddr, Pending>,
    owners: HashMap<LockName, HashSet<BlockAddr>>,
}

/// An image whose write has been started.
struct Started {
    addr: BlockAddr,
    seq: TxnSeq,
    image: IoSlice,
}

impl PendingBlocks {
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Takes a stable image in the place of an older one.
    pub(crate) fn insert(&mut self, addr: BlockAddr, owner: LockName, seq: TxnSeq, image: IoSlice) {
        match self.blocks.get_mut(&addr) {
            Some(pending) => {
                let before = std::mem::replace(&mut pending.owner, owner);
                pending.seq = seq;
                pending.image = image;
                if before != owner {
                    self.disown(before, addr);
                    self.owners.entry(owner).or_default().insert(addr);
                }
            }
            None => {
                self.blocks.insert(addr, Pending { owner, seq, image, in_flight: false });
                self.owners.entry(owner).or_default().insert(addr);
            }
        }
    }

    fn disown(&mut self, owner: LockName, addr: BlockAddr) {
        if let Some(blocks) = self.owners.get_mut(&owner) {
            blocks.remove(&addr);
            if blocks.is_empty() {
                self.owners.remove(&owner);
            }
        }
    }

    /// Starts the write of a block unless one is under way.
    fn start(&mut self, addr: BlockAddr) -> Option<Started> {
        let pending = self.blocks.get_mut(&addr).filter(|pending| !pending.in_flight)?;
        pending.in_flight = true;
        Some(Started { addr, seq: pending.seq, image: pending.image.clone() })
    }

    fn start_owned(&mut self, owner: LockName) -> Vec<Started> {
        let addrs: Vec<BlockAddr> = self.owners.get(&owner).into_iter().flatten().copied().collect();
        addrs.into_iter().filter_map(|addr| self.start(addr)).collect()
    }

    fn start_upto(&mut self, target: TxnSeq) -> Vec<Started> {
        let old = self.blocks.iter().filter(|(_, pending)| pending.seq <= target);
        let addrs: Vec<BlockAddr> = old.map(|(addr, _)| *addr).collect();
        addrs.into_iter().filter_map(|addr| self.start(addr)).collect()
    }

    /// A write ended. True if that image is still the newest: the block is in place.
    fn landed(&mut self, addr: BlockAddr, seq: TxnSeq) -> bool {
        let Some(pending) = self.blocks.get_mut(&addr) else { return false };
        pending.in_flight = false;
        if pending.seq != seq {
            return false;
        }
        let owner = pending.owner;
        self.blocks.remove(&addr);
        self.disown(owner, addr);
        true
    }

    fn has_upto(&self, target: TxnSeq) -> bool {
        self.blocks.values().any(|pending| pending.seq <= target)
    }
}

/// Writes of contiguous blocks, in the order of their addresses.
struct Run {
    at: BlockAddr,
    pieces: Vec<IoSlice>,
    blocks: Vec<(BlockAddr, TxnSeq)>,
}

fn coalesce(started: Vec<Started>) -> Vec<Run> {
    let sorted: BTreeMap<BlockAddr, Started> = started.into_iter().map(|s| (s.addr, s)).collect();
    let mut runs: Vec<Run> = Vec::new();
    for (addr, started) in sorted {
        match runs.last_mut() {
            Some(run)
                if run.at.0 + run.blocks.len() as u64 == addr.0 && run.blocks.len() < MAX_WRITE_BLOCKS =>
            {
                match run.pieces.last_mut() {
                    Some(last)
                        if Arc::ptr_eq(&last.buf, &started.image.buf)
                            && last.offset + last.len == started.image.offset =>
                    {
                        last.len += BLOCK_SIZE;
                    }
                    _ => run.pieces.push(started.image),
                }
                run.blocks.push((addr, started.seq));
            }
            _ => runs.push(Run { at: addr, pieces: vec![started.image], blocks: vec![(addr, started.seq)] }),
        }
    }
    runs
}

impl Inner {
    /// Writes started blocks in place, in a task of its own: a write that was started is waited for even if nobody
    /// wants it any more.
    fn write_in_place(self: &Arc<Inner>, started: Vec<Started>) {
        if started.is_empty() {
            return;
        }
        let inner = Arc::clone(self);
        self.runtime.spawn(Box::pin(async move {
            let mut runs = coalesce(started).into_iter();
            loop {
                if inner.check_failed().is_err() {
                    return;
                }
                let wave: Vec<Run> = runs.by_ref().take(MAX_WRITES).collect();
                if wave.is_empty() {
                    return;
                }
                let write = |run: &Run| inner.device.write(run.at, run.pieces.clone(), Durability::Cached);
                let results = join_all(wave.iter().map(write).collect()).await;
                for (run, result) in wave.iter().zip(results) {
                    match result {
                        Ok(()) => inner.landed(run),
                        Err(error) => inner.fail(error.into()),
                    }
                }
                inner.placed.wake_all();
            }
        }));
    }

    fn landed(&self, run: &Run) {
        for &(addr, seq) in &run.blocks {
            // Under the mutex: who sees that nothing is pending may forget the block.
            let mut pending = self.pending.lock();
            if pending.landed(addr, seq) {
                self.cache.placed(addr, seq);
            }
        }
    }

    /// See `Store::settle`.
    pub(super) async fn settle(inner: &Arc<Inner>, owner: LockName) -> Result<(), FsError> {
        let unstable = inner.progress.lock().newest_of(owner);
        if let Some(seq) = unstable {
            inner.commit_upto(seq).await?;
        }
        inner
            .placed
            .until(|| {
                if let Err(error) = inner.check_failed() {
                    return Some(Err(error));
                }
                let started = {
                    let mut pending = inner.pending.lock();
                    if !pending.owners.contains_key(&owner) {
                        return Some(Ok(()));
                    }
                    pending.start_owned(owner)
                };
                inner.write_in_place(started);
                None
            })
            .await
    }

    /// Waits until the tail has passed a stable transaction.
    pub(super) async fn checkpoint_upto(&self, target: TxnSeq) -> Result<(), FsError> {
        {
            let mut progress = self.progress.lock();
            if progress.ring.is_empty() {
                progress.passed = progress.passed.max(target);
                return Ok(());
            }
            progress.tail_wanted = progress.tail_wanted.max(target);
        }
        self.work.wake_all();
        self.moved
            .until(|| match self.check_failed() {
                Err(error) => Some(Err(error)),
                Ok(()) => (self.progress.lock().passed >= target).then_some(Ok(())),
            })
            .await
    }

    /// Puts everything up to `target` in place, flushes, and moves the tail there.
    pub(super) async fn move_tail(
        inner: &Arc<Inner>,
        head: &mut Head,
        target: TxnSeq,
    ) -> Result<(), FsError> {
        inner
            .placed
            .until(|| {
                if let Err(error) = inner.check_failed() {
                    return Some(Err(error));
                }
                let started = {
                    let mut pending = inner.pending.lock();
                    if !pending.has_upto(target) {
                        return Some(Ok(()));
                    }
                    pending.start_upto(target)
                };
                inner.write_in_place(started);
                None
            })
            .await?;
        inner.device.flush().await?;
        {
            let progress = inner.progress.lock();
            (head.tail_seq, head.tail_at) = progress.ring.tail_after(target);
            head.tail_clock = progress.tail_clock_after(target, &inner.clock);
            head.clock = inner.clock.now();
        }
        inner.check_failed()?;
        head.write(&*inner.device, &inner.place).await?;
        inner.progress.lock().pass(target, head.tail_clock);
        inner.moved.wake_all();
        inner.room.wake_all();
        Ok(())
    }
}
