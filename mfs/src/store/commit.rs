//! Group commit: handles join the running transaction; a commit closes it, waits for its handles and writes one
//! record.
//!
//! Commits follow each other: a record is written only when the one before is stable, so a record in the ring
//! proves that all before it were stable. Between the closing of a transaction and the freezing of its blocks no
//! handle is open.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use storage_control::{BLOCK_SIZE, BlockAddr, Clock, Durability, IoSlice, LamportClock};

use super::{Frozen, Inner, Txn, TxnSeq};
use crate::{
    FsError, LockName,
    format::journal::record_blocks,
    journal::{Head, Ring, encode, image_record},
};

/// Changes are stable after this time even if nobody asks.
const COMMIT_EVERY_MS: u64 = 5000;
/// Without a new handle for this long, everything goes in place and the tail moves.
const IDLE_CHECKPOINT_MS: u64 = 1000;
/// How often the clock is looked at.
const TICK_MS: u64 = 500;

const _: () = assert!(TICK_MS <= IDLE_CHECKPOINT_MS && IDLE_CHECKPOINT_MS < COMMIT_EVERY_MS);

/// The transaction that handles join.
pub(crate) struct Running {
    pub(crate) seq: TxnSeq,
    /// No new handle may join.
    closing: bool,
    handles: usize,
    /// Unused credits of open handles.
    pub(crate) reserved: usize,
    pub(crate) blocks: Vec<BlockAddr>,
    pub(crate) owners: HashSet<LockName>,
}

impl Running {
    fn new(seq: TxnSeq) -> Running {
        Running { seq, closing: false, handles: 0, reserved: 0, blocks: Vec::new(), owners: HashSet::new() }
    }
}

/// A closed transaction whose record is being written.
struct Committing {
    seq: TxnSeq,
    owners: HashSet<LockName>,
}

/// How far a shutdown has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// In use.
    No,
    /// Nothing begins any more.
    Draining,
    /// Everything is in place: the journal is to be marked clean.
    Drained,
    /// It is.
    Clean,
}

/// How far transactions have come: running, committing, stable, passed by the tail.
pub(crate) struct Progress {
    pub(crate) running: Running,
    committing: Option<Committing>,
    pub(crate) stable: TxnSeq,
    /// Commit at least up to this one.
    wanted: TxnSeq,
    /// The stable tail is behind this one.
    pub(crate) passed: TxnSeq,
    /// Move the tail at least behind this one.
    pub(crate) tail_wanted: TxnSeq,
    tail_clock: Clock,
    pub(crate) ring: Ring,
    last_record: u64,
    /// The last `Store` is gone.
    pub(crate) stopped: bool,
    end: End,
    /// Counts handles.
    begun: u64,
}

impl Progress {
    pub(crate) fn new(ring: Ring, now: Clock) -> Progress {
        Progress {
            running: Running::new(TxnSeq(1)),
            committing: None,
            stable: TxnSeq(0),
            wanted: TxnSeq(0),
            passed: TxnSeq(0),
            tail_wanted: TxnSeq(0),
            tail_clock: now,
            ring,
            last_record: 0,
            stopped: false,
            end: End::No,
            begun: 0,
        }
    }

    /// The newest transaction that holds or may hold changes.
    pub(crate) fn newest(&self) -> TxnSeq {
        let running = &self.running;
        if running.closing || running.handles > 0 || !running.blocks.is_empty() {
            self.running.seq
        } else {
            TxnSeq(self.running.seq.0 - 1)
        }
    }

    /// The newest transaction that is not stable and holds a block of this lock.
    pub(crate) fn newest_of(&self, owner: LockName) -> Option<TxnSeq> {
        if self.running.owners.contains(&owner) {
            return Some(self.running.seq);
        }
        self.committing.as_ref().filter(|c| c.owners.contains(&owner)).map(|c| c.seq)
    }

    /// See `Store::tail_clock`: with an empty journal, every later version is above the current clock.
    pub(crate) fn tail_clock(&mut self, clock: &LamportClock) -> Clock {
        if self.ring.is_empty() {
            self.tail_clock = self.tail_clock.max(clock.now());
        }
        self.tail_clock
    }

    /// The tail clock that holds once the tail is behind `target`.
    pub(crate) fn tail_clock_after(&self, target: TxnSeq, clock: &LamportClock) -> Clock {
        match self.ring.first_after(target) {
            Some(live) => Clock(live.version.0 - 1),
            None => clock.now(),
        }
        .max(self.tail_clock)
    }

    /// The tail behind `target` is stable.
    pub(crate) fn pass(&mut self, target: TxnSeq, tail_clock: Clock) {
        self.ring.release(target);
        self.passed = self.passed.max(target);
        self.tail_clock = self.tail_clock.max(tail_clock);
    }
}

impl Inner {
    /// See `Store::begin`.
    pub(super) async fn begin(inner: &Arc<Inner>, credits: u32) -> Result<Txn, FsError> {
        let max = inner.place.max_images();
        if credits as usize > max {
            tracing::error!(credits, max, "a transaction larger than a quarter of the journal was asked for");
            return Err(FsError::NoSpace);
        }
        // The common case neither waits nor allocates.
        if let Some(result) = inner.try_begin(credits as usize, max) {
            return result.map(|seq| Txn::new(Arc::clone(inner), seq, credits));
        }
        let seq = inner.room.until(|| inner.try_begin(credits as usize, max)).await?;
        Ok(Txn::new(Arc::clone(inner), seq, credits))
    }

    fn try_begin(&self, credits: usize, max: usize) -> Option<Result<TxnSeq, FsError>> {
        if let Err(error) = self.check_failed() {
            return Some(Err(error));
        }
        let mut progress = self.progress.lock();
        if progress.end != End::No {
            return Some(Err(FsError::Closed("the filesystem is being unmounted")));
        }
        if progress.running.closing {
            return None;
        }
        let size = progress.running.blocks.len() + progress.running.reserved + credits;
        if size > max {
            progress.wanted = progress.wanted.max(progress.running.seq);
            drop(progress);
            self.work.wake_all();
            return None;
        }
        if progress.ring.place(record_blocks(size) as u64).is_none() {
            progress.tail_wanted = progress.tail_wanted.max(progress.stable);
            drop(progress);
            self.work.wake_all();
            return None;
        }
        let running = &mut progress.running;
        running.handles += 1;
        running.reserved += credits;
        let seq = running.seq;
        let large = running.blocks.len() > max / 2;
        progress.begun += 1;
        if large && progress.wanted < seq {
            progress.wanted = seq;
            drop(progress);
            self.work.wake_all();
        }
        Some(Ok(seq))
    }

    /// A handle with that many unused credits is dropped.
    pub(super) fn end_handle(&self, unused: u32) {
        let last = {
            let mut progress = self.progress.lock();
            progress.running.handles -= 1;
            progress.running.reserved -= unused as usize;
            progress.running.closing && progress.running.handles == 0
        };
        if last {
            self.handles.wake_all();
        }
    }

    /// See `Store::commit_upto`.
    pub(super) async fn commit_upto(&self, seq: TxnSeq) -> Result<(), FsError> {
        self.check_failed()?;
        let seq = {
            let mut progress = self.progress.lock();
            if progress.stable >= seq {
                return Ok(());
            }
            // A number that no transaction has yet is stable when the running one is.
            let seq = seq.min(progress.running.seq);
            progress.wanted = progress.wanted.max(seq);
            seq
        };
        self.work.wake_all();
        self.stable
            .until(|| match self.check_failed() {
                Err(error) => Some(Err(error)),
                Ok(()) => (self.progress.lock().stable >= seq).then_some(Ok(())),
            })
            .await
    }

    /// Closes the running transaction and writes its record.
    async fn commit_running(&self) -> Result<(), FsError> {
        self.progress.lock().running.closing = true;
        self.handles
            .until(|| match self.check_failed() {
                Err(error) => Some(Err(error)),
                Ok(()) => (self.progress.lock().running.handles == 0).then_some(Ok(())),
            })
            .await?;
        let closed = self.close_running()?;
        self.room.wake_all();
        let Some(Closed { seq, head, at, frozen }) = closed else {
            self.stable.wake_all();
            return Ok(());
        };
        let record = encode(&self.place, at, head, &frozen);
        // The images go at once, so that later edits need not copy them.
        let blocks: Vec<_> = frozen.into_iter().map(|block| (block.addr, block.owner)).collect();
        self.check_failed()?;
        let whole = IoSlice::whole(Arc::clone(&record));
        self.device.write(self.place.ring(at), vec![whole], Durability::Stable).await?;
        {
            let mut pending = self.pending.lock();
            for (n, (addr, owner)) in blocks.into_iter().enumerate() {
                let offset = (head.descriptors + n) * BLOCK_SIZE;
                let image = IoSlice { buf: Arc::clone(&record), offset, len: BLOCK_SIZE };
                pending.insert(addr, owner, seq, image);
            }
        }
        let mut progress = self.progress.lock();
        progress.stable = seq;
        progress.committing = None;
        progress.last_record = head.seq;
        if progress.ring.used() > progress.ring.blocks() / 2 {
            progress.tail_wanted = progress.tail_wanted.max(seq);
        }
        drop(progress);
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.stable.wake_all();
        self.room.wake_all();
        Ok(())
    }

    /// Gives the transaction its version and its place in the ring, freezes its blocks and opens the next one.
    fn close_running(&self) -> Result<Option<Closed>, FsError> {
        let (seq, mut blocks, head, at) = {
            let mut progress = self.progress.lock();
            let progress = &mut *progress;
            let seq = progress.running.seq;
            let next = Running::new(TxnSeq(seq.0 + 1));
            if progress.running.blocks.is_empty() {
                progress.running = next;
                progress.stable = seq;
                return Ok(None);
            }
            let blocks = std::mem::take(&mut progress.running.blocks);
            let owners = std::mem::take(&mut progress.running.owners);
            let version = self.clock.tick();
            let live = progress.ring.push(seq, record_blocks(blocks.len()) as u64, version);
            let Some(live) = live else {
                debug_assert!(false, "begin makes room for the record");
                return Err(FsError::Io(Arc::new(std::io::Error::other("the journal is full"))));
            };
            let head = image_record(self.epoch, live.record, progress.last_record, version, blocks.len());
            progress.committing = Some(Committing { seq, owners });
            (seq, blocks, head, live.at)
        };
        blocks.sort_unstable();
        let frozen = blocks.into_iter().map(|addr| self.cache.freeze(addr, head.version)).collect();
        self.progress.lock().running = Running::new(TxnSeq(seq.0 + 1));
        Ok(Some(Closed { seq, head, at, frozen }))
    }

    /// See `Store::shutdown`.
    pub(super) async fn shutdown(&self) -> Result<(), FsError> {
        let seq = {
            let mut progress = self.progress.lock();
            if progress.end == End::No {
                progress.end = End::Draining;
            }
            progress.newest()
        };
        self.room.wake_all();
        self.commit_upto(seq).await?;
        self.checkpoint_upto(seq).await?;
        {
            let mut progress = self.progress.lock();
            if progress.end == End::Draining {
                progress.end = End::Drained;
            }
        }
        self.work.wake_all();
        self.moved
            .until(|| match self.check_failed() {
                Err(error) => Some(Err(error)),
                Ok(()) => (self.progress.lock().end == End::Clean).then_some(Ok(())),
            })
            .await
    }
}

/// A closed transaction on its way to the journal.
struct Closed {
    seq: TxnSeq,
    head: crate::journal::RecordHead,
    at: u64,
    frozen: Vec<Frozen>,
}

/// Starts the background tasks.
pub(super) fn start(inner: &Arc<Inner>, head: Head) {
    let runtime = Arc::clone(&inner.runtime);
    runtime.spawn(Box::pin(commit_loop(Arc::clone(inner))));
    runtime.spawn(Box::pin(checkpoint_loop(Arc::clone(inner), head)));
    runtime.spawn(Box::pin(tick_loop(Arc::clone(inner))));
}

enum Work<T> {
    Do(T),
    End,
}

async fn commit_loop(inner: Arc<Inner>) {
    loop {
        let work = inner
            .work
            .until(|| {
                if inner.check_failed().is_err() {
                    return Some(Work::End);
                }
                let progress = inner.progress.lock();
                if progress.stopped || progress.end == End::Clean {
                    Some(Work::End)
                } else if progress.wanted > progress.stable {
                    Some(Work::Do(()))
                } else {
                    None
                }
            })
            .await;
        match work {
            Work::End => return,
            Work::Do(()) => {
                if let Err(error) = inner.commit_running().await {
                    inner.fail(error);
                }
                inner.work.wake_all();
            }
        }
    }
}

async fn checkpoint_loop(inner: Arc<Inner>, mut head: Head) {
    loop {
        let work = inner
            .work
            .until(|| {
                if inner.check_failed().is_err() {
                    return Some(Work::End);
                }
                let progress = inner.progress.lock();
                if progress.stopped {
                    Some(Work::End)
                } else if progress.tail_wanted > progress.passed && progress.stable > progress.passed {
                    Some(Work::Do(Some(progress.stable)))
                } else if progress.end == End::Drained {
                    Some(Work::Do(None))
                } else {
                    None
                }
            })
            .await;
        let result = match work {
            Work::End => return,
            Work::Do(Some(target)) => Inner::move_tail(&inner, &mut head, target).await,
            Work::Do(None) => {
                head.clean = true;
                head.clock = inner.clock.now();
                let result = head.write_both(&*inner.device, &inner.place).await;
                if result.is_ok() {
                    inner.progress.lock().end = End::Clean;
                    inner.moved.wake_all();
                    inner.work.wake_all();
                    return;
                }
                result
            }
        };
        if let Err(error) = result {
            inner.fail(error);
        }
    }
}

/// Commits by age and checkpoints when idle.
async fn tick_loop(inner: Arc<Inner>) {
    let weak = Arc::downgrade(&inner);
    let runtime = Arc::clone(&inner.runtime);
    drop(inner);
    let mut begun_before = 0;
    let mut quiet_since = runtime.now();
    let mut clean_since = runtime.now();
    loop {
        runtime.sleep(Duration::from_millis(TICK_MS)).await;
        let Some(inner) = weak.upgrade() else { return };
        let now = runtime.now();
        {
            let mut progress = inner.progress.lock();
            if progress.stopped || progress.end == End::Clean || inner.check_failed().is_err() {
                return;
            }
            if progress.begun != begun_before {
                begun_before = progress.begun;
                quiet_since = now;
            }
            let seq = progress.running.seq;
            if progress.running.blocks.is_empty() {
                clean_since = now;
            } else if now.since(clean_since) >= Duration::from_millis(COMMIT_EVERY_MS) {
                progress.wanted = progress.wanted.max(seq);
                clean_since = now;
            }
            if now.since(quiet_since) >= Duration::from_millis(IDLE_CHECKPOINT_MS)
                && !progress.ring.is_empty()
            {
                progress.tail_wanted = progress.tail_wanted.max(progress.stable);
            }
        }
        inner.work.wake_all();
    }
}
