//! Block cache and transactions over one journal.
//!
//! - A block changes only inside a transaction, and goes in place only from a stable record.
//! - Transactions become stable in the order of their numbers; all blocks of one carry the same version.
//! - The journal's tail passes a record only when its blocks, or newer images in later records, are in place and
//!   flushed; what the tail passed counts as passed only when the tail itself is stable.
//! - After a failed metadata write nothing begins, commits or goes in place any more: the node withdraws.
//!
//! Edits of one block exclude each other. That edits of different handles make sense together is the business of
//! cluster locks. A closure given to `edit` or `create` must not call the store.

mod cache;
mod callouts;
mod commit;
mod pending;
mod txn;
pub(crate) mod wait;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use storage_control::{AlignedBuf, BlockAddr, Clock, Device, LamportClock, Runtime};

pub use cache::block_of;
pub(crate) use cache::{Frozen, block_mut};
pub use txn::Txn;

use self::{cache::Cache, commit::Progress, pending::PendingBlocks, wait::WaitQueue};
use crate::{
    FsError, LockName,
    format::{
        header::{self, BlockKind, Header},
        superblock::{Geometry, Superblock},
    },
    journal::{Head, Place, Ring},
};

/// One 4 KiB block as this node sees it now. Its header's version is that of its last commit; the checksum is
/// computed on the way to the disk.
pub type Image = Arc<AlignedBuf>;

/// Number of a transaction of this mount.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TxnSeq(pub u64);

/// Blocks kept in memory unless told otherwise: 128 MiB.
pub const CACHE_BLOCKS: usize = 32_768;

/// Everything a store is, shared with its handles and background tasks.
pub(crate) struct Inner {
    device: Arc<dyn Device>,
    clock: Arc<LamportClock>,
    runtime: Arc<dyn Runtime>,
    superblock: Superblock,
    place: Place,
    epoch: u64,
    cache: Cache,
    progress: Mutex<Progress>,
    pending: Mutex<PendingBlocks>,
    failed: Mutex<Option<FsError>>,
    is_failed: AtomicBool,
    peer_tail: AtomicU64,
    commits: AtomicU64,
    /// Waits for room in the running transaction or in the ring.
    room: WaitQueue,
    /// Waits for the last open handle.
    handles: WaitQueue,
    /// Waits for a transaction to be stable.
    stable: WaitQueue,
    /// Waits for blocks to be in place.
    placed: WaitQueue,
    /// Waits for the tail to move.
    moved: WaitQueue,
    /// The committer and the checkpointer wait for work.
    work: WaitQueue,
}

/// Stops the background tasks when the last `Store` goes.
struct Handle(Arc<Inner>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.progress.lock().stopped = true;
        self.0.work.wake_all();
    }
}

/// The metadata of a mounted filesystem. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    handle: Arc<Handle>,
}

/// Counters for status and tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct StoreStats {
    /// Records written.
    pub commits: u64,
    /// Epoch of the journal.
    pub epoch: u64,
    /// Blocks in the running transaction.
    pub running_blocks: usize,
    /// Committed blocks not yet in place.
    pub pending_blocks: usize,
    /// Blocks in the cache.
    pub cached_blocks: usize,
    /// Ring blocks between tail and head.
    pub ring_used: u64,
    /// Ring blocks in all.
    pub ring_blocks: u64,
}

impl Store {
    /// Takes a clean journal into use: a new, replayed or properly shut down one. `FsError::DirtyJournal` if it is
    /// none of these.
    pub async fn open(
        device: Arc<dyn Device>,
        superblock: Superblock,
        journal: u16,
        clock: Arc<LamportClock>,
        runtime: Arc<dyn Runtime>,
    ) -> Result<Store, FsError> {
        Self::open_with_cache(device, superblock, journal, clock, runtime, CACHE_BLOCKS).await
    }

    /// `open` with that many blocks of cache.
    pub async fn open_with_cache(
        device: Arc<dyn Device>,
        superblock: Superblock,
        journal: u16,
        clock: Arc<LamportClock>,
        runtime: Arc<dyn Runtime>,
        cache_blocks: usize,
    ) -> Result<Store, FsError> {
        let place = Place::of(&superblock, journal)?;
        let before = Head::read(&*device, &place).await?;
        if !before.clean {
            return Err(FsError::DirtyJournal(journal));
        }
        let impossible = |_| FsError::corrupt("journal header", place.start, "its clock is impossible");
        clock.receive(before.clock).map_err(impossible)?;
        clock.receive(superblock.version).map_err(impossible)?;
        let mut head = before.next_epoch(false, clock.now());
        head.write_both(&*device, &place).await?;
        let inner = Arc::new(Inner {
            cache: Cache::new(superblock.secret, cache_blocks),
            progress: Mutex::new(Progress::new(Ring::new(place.ring_blocks), clock.now())),
            pending: Mutex::default(),
            failed: Mutex::new(None),
            is_failed: AtomicBool::new(false),
            peer_tail: AtomicU64::new(0),
            commits: AtomicU64::new(0),
            room: WaitQueue::default(),
            handles: WaitQueue::default(),
            stable: WaitQueue::default(),
            placed: WaitQueue::default(),
            moved: WaitQueue::default(),
            work: WaitQueue::default(),
            epoch: head.epoch,
            device,
            clock,
            runtime,
            superblock,
            place,
        });
        commit::start(&inner, head);
        Ok(Store { handle: Arc::new(Handle(inner)) })
    }

    fn inner(&self) -> &Arc<Inner> {
        &self.handle.0
    }

    /// The device below.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.inner().device
    }

    /// The runtime it was opened with.
    pub fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.inner().runtime
    }

    /// The clock it was opened with.
    pub fn clock(&self) -> &Arc<LamportClock> {
        &self.inner().clock
    }

    /// The superblock it was opened with.
    pub fn superblock(&self) -> &Superblock {
        &self.inner().superblock
    }

    /// Where blocks and groups are.
    pub fn geometry(&self) -> &Geometry {
        &self.inner().superblock.geometry
    }

    /// The slot of its journal.
    pub fn journal(&self) -> u16 {
        self.inner().place.journal
    }

    /// The block, from the cache or from disk, verified. The caller holds the owner's lock.
    pub async fn read(&self, addr: BlockAddr, kind: BlockKind, owner: LockName) -> Result<Image, FsError> {
        self.inner().read(addr, kind, owner).await
    }

    /// The block if it is cached.
    pub fn cached(&self, addr: BlockAddr) -> Option<Image> {
        self.inner().cache.peek(addr)
    }

    /// Opens a handle of the running transaction. `credits` is the most distinct blocks the handle will change.
    /// Waits while the transaction or the journal is full. No cluster lock may be awaited while the handle is open.
    pub async fn begin(&self, credits: u32) -> Result<Txn, FsError> {
        Inner::begin(self.inner(), credits).await
    }

    /// The most credits a handle can have.
    pub fn max_credits(&self) -> u32 {
        self.inner().place.max_images() as u32
    }

    /// Number of the running transaction.
    pub fn running(&self) -> TxnSeq {
        self.inner().progress.lock().running.seq
    }

    /// The last stable transaction.
    pub fn stable(&self) -> TxnSeq {
        self.inner().progress.lock().stable
    }

    /// Makes everything stable that any handle changed so far. Never call with a handle open.
    pub async fn commit(&self) -> Result<(), FsError> {
        let seq = self.inner().progress.lock().newest();
        self.commit_upto(seq).await
    }

    /// Makes transaction `seq` and all before it stable.
    pub async fn commit_upto(&self, seq: TxnSeq) -> Result<(), FsError> {
        self.inner().commit_upto(seq).await
    }

    /// Before a lock goes down from an exclusive mode: its blocks' records are stable, then the blocks are in place.
    pub async fn settle(&self, owner: LockName) -> Result<(), FsError> {
        Inner::settle(self.inner(), owner).await
    }

    /// Drops the cached blocks of a settled lock. A block that is not settled would outlive the lock, and overwrite
    /// what others write under it: the store stops.
    pub fn forget(&self, owner: LockName) {
        if let Err(addr) = self.inner().cache.forget(owner) {
            debug_assert!(false, "block {addr} of {owner} is settled before it is forgotten");
            let why = format!("block {addr} of {owner} was to be forgotten before it was settled");
            self.inner().fail(FsError::Io(Arc::new(std::io::Error::other(why))));
        }
    }

    /// Commits, puts everything in place, flushes and moves the tail.
    pub async fn checkpoint(&self) -> Result<(), FsError> {
        self.commit().await?;
        let target = self.stable();
        self.inner().checkpoint_upto(target).await
    }

    /// Every image this journal may still bring back, now or later, is newer than this.
    pub fn tail_clock(&self) -> Clock {
        self.inner().progress.lock().tail_clock(&self.inner().clock)
    }

    /// The least tail clock of all other journals that hold or may get records. Until it is set, no freed metadata
    /// block becomes a data block.
    pub fn set_peer_tail(&self, least: Clock) {
        self.inner().peer_tail.store(least.0, Ordering::Release);
    }

    /// Every journal has moved past images up to this clock.
    pub fn all_past(&self) -> Clock {
        self.tail_clock().min(Clock(self.inner().peer_tail.load(Ordering::Acquire)))
    }

    /// Why the store stopped, if it did.
    pub fn failed(&self) -> Option<FsError> {
        self.inner().failed.lock().clone()
    }

    /// Waits until the store stops because of an error.
    pub async fn failure(&self) -> FsError {
        self.inner().stable.until(|| self.failed()).await
    }

    /// Stops the store: memory and journal could disagree from here on.
    pub(crate) fn fail(&self, error: FsError) {
        self.inner().fail(error);
    }

    /// The lease is lost or the node withdraws: nothing is begun, committed or put in place any more.
    pub fn close(&self, why: &'static str) {
        self.inner().fail(FsError::Closed(why));
    }

    /// Lets nothing begin any more, commits, puts everything in place, marks the journal clean and ends the
    /// background tasks.
    pub async fn shutdown(&self) -> Result<(), FsError> {
        self.inner().shutdown().await
    }

    /// Counters.
    pub fn stats(&self) -> StoreStats {
        let inner = self.inner();
        let progress = inner.progress.lock();
        StoreStats {
            commits: inner.commits.load(Ordering::Relaxed),
            epoch: inner.epoch,
            running_blocks: progress.running.blocks.len(),
            ring_used: progress.ring.used(),
            ring_blocks: progress.ring.blocks(),
            pending_blocks: inner.pending.lock().len(),
            cached_blocks: inner.cache.len(),
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.stats()).finish()
    }
}

impl Inner {
    fn check_failed(&self) -> Result<(), FsError> {
        if self.is_failed.load(Ordering::Acquire)
            && let Some(error) = self.failed.lock().clone()
        {
            return Err(error);
        }
        Ok(())
    }

    /// Stops the store; the first reason stays.
    fn fail(&self, error: FsError) {
        {
            let mut failed = self.failed.lock();
            if failed.is_none() {
                tracing::error!(%error, journal = self.place.journal, "the metadata store stops");
                *failed = Some(error);
            }
        }
        self.is_failed.store(true, Ordering::Release);
        for queue in [&self.room, &self.handles, &self.stable, &self.placed, &self.moved, &self.work] {
            queue.wake_all();
        }
    }

    async fn read(&self, addr: BlockAddr, kind: BlockKind, owner: LockName) -> Result<Image, FsError> {
        if let Some(image) = self.cache.get(addr, kind, owner)? {
            return Ok(image);
        }
        if addr.0 >= self.superblock.geometry.blocks {
            return Err(FsError::corrupt(kind.name(), addr, "its address is outside of the filesystem"));
        }
        let verify = |buf: &AlignedBuf| {
            let block = block_of(buf);
            header::verify(block, kind, addr, &self.superblock.secret, owner)?;
            let impossible = |_| FsError::corrupt(kind.name(), addr, "its version is impossible");
            self.clock.receive(Header::of(block).clock()).map_err(impossible)
        };
        let mut buf = self.device.read(addr, 1).await?;
        if verify(&buf).is_err() {
            // A bad checksum is read again before it is believed.
            buf = self.device.read(addr, 1).await?;
            verify(&buf)?;
        }
        self.cache.insert_read(addr, kind, owner, Arc::new(buf))
    }
}

#[cfg(test)]
mod tests;
