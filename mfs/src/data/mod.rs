//! File data: cached and dirty bytes, reading, writing, truncation, write-back.
//!
//! Dirty data of an inode, and attributes that are not in its dinode yet, exist only while this node holds the
//! inode's lock exclusively; they are on disk before the lock goes. Blocks are allocated at write-back, from
//! space promised at `write`. File data are stable on the device before a transaction makes them reachable.

mod chunks;
mod flush;
mod read;
mod schedule;
mod truncate;
mod write;
mod writeback;

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Weak};
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use storage_control::{BLOCK_SIZE, Device, Instant, WallTime};
use tokio::sync::Notify;

use crate::alloc::Promise;
use crate::error::FsError;
use crate::inode_table::Inode;
use crate::ops::Ino;
use crate::store::TxnSeq;

use chunks::{CHUNK_BYTES, ChunkNo, Chunks};
use flush::{DataFlush, WriteSeq};

/// Dirty data older than this are written back.
pub const WRITE_BACK_AFTER: Duration = Duration::from_secs(5);
/// How often their age is looked at.
const AGE_CHECK: Duration = Duration::from_secs(1);
/// Largest file: what the extent map and `off_t` can express, less a block.
pub const MAX_FILE_BYTES: u64 = i64::MAX as u64 - BLOCK_SIZE as u64;

/// Attributes that the dinode does not have yet.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Pending {
    pub(crate) size: Option<u64>,
    pub(crate) atime: Option<WallTime>,
    pub(crate) mtime: Option<WallTime>,
    pub(crate) ctime: Option<WallTime>,
    /// Permission bits to take away (set-id bits after a write).
    pub(crate) clear_perm: u32,
}

impl Pending {
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// What one inode has in memory.
#[derive(Default)]
pub struct FileState {
    pub(crate) chunks: Chunks,
    pub(crate) pending: Pending,
    /// Space for dirty blocks.
    pub(crate) promise: Option<Promise>,
    /// A write-back error that nobody was told of.
    pub(crate) error: Option<FsError>,
    pub(crate) dirty_since: Option<Instant>,
    /// The last transaction that changed the inode, since it was taken into the table. `None`: one before that.
    pub(crate) last_txn: Option<TxnSeq>,
    /// The last data write that has completed, unless it is known to be stable.
    pub(crate) last_write: Option<WriteSeq>,
}

impl FileState {
    /// All data writes up to this point are stable.
    pub(crate) fn flushed(&mut self, upto: WriteSeq) {
        self.last_write.take_if(|last| *last <= upto);
    }

    /// Whether it must not be forgotten: something is not on the disk, or not for sure.
    pub(crate) fn is_needed(&self) -> bool {
        self.is_dirty() || self.last_write.is_some()
    }

    /// Whether anything is not on disk.
    pub(crate) fn is_dirty(&self) -> bool {
        self.chunks.busy_blocks() > 0 || !self.pending.is_none()
    }

    /// Size of the file, given the dinode's.
    pub(crate) fn size(&self, dinode: u64) -> u64 {
        self.pending.size.unwrap_or(dinode)
    }
}

/// Dirty and clean data of all inodes together.
pub(crate) struct DataCache {
    /// Writers wait above this many blocks that are dirty or being written.
    limit_blocks: u64,
    busy_blocks: AtomicU64,
    /// Told when blocks became clean.
    room: Notify,
    /// Told when write-back should begin before its time.
    pub(crate) wanted: Notify,
    /// Inodes in the order in which they became dirty.
    queue: Mutex<VecDeque<(Instant, Weak<Inode>)>>,
    /// Chunks with clean blocks, least recently used first to go.
    clean: Mutex<LruCache<(Ino, ChunkNo), Weak<Inode>>>,
    pub(crate) flush: DataFlush,
}

impl DataCache {
    pub(crate) fn new(device: Arc<dyn Device>, dirty_limit_bytes: u64, clean_limit_bytes: u64) -> Self {
        let chunks = NonZeroUsize::new(clean_limit_bytes as usize / CHUNK_BYTES).unwrap_or(NonZeroUsize::MIN);
        Self {
            limit_blocks: (dirty_limit_bytes / BLOCK_SIZE as u64).max(1),
            busy_blocks: AtomicU64::new(0),
            room: Notify::new(),
            wanted: Notify::new(),
            queue: Mutex::default(),
            clean: Mutex::new(LruCache::new(chunks)),
            flush: DataFlush::new(device),
        }
    }

    /// Bytes that are dirty or being written.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.busy_blocks.load(SeqCst) * BLOCK_SIZE as u64
    }

    /// Waits until there is room for more dirty data. Not while any lock is held: making room needs locks.
    pub(crate) async fn wait_for_room(&self) {
        loop {
            let mut room = std::pin::pin!(self.room.notified());
            room.as_mut().enable();
            if self.busy_blocks.load(SeqCst) < self.limit_blocks {
                return;
            }
            self.wanted.notify_one();
            room.await;
        }
    }

    /// Whether write-back should go on whatever the age of the data.
    pub(crate) fn is_crowded(&self) -> bool {
        self.busy_blocks.load(SeqCst) > self.limit_blocks / 2
    }

    pub(crate) fn add_busy(&self, blocks: u64) {
        if self.busy_blocks.fetch_add(blocks, SeqCst) + blocks > self.limit_blocks / 2 {
            self.wanted.notify_one();
        }
    }

    pub(crate) fn sub_busy(&self, blocks: u64) {
        if blocks > 0 {
            self.busy_blocks.fetch_sub(blocks, SeqCst);
            self.room.notify_waiters();
        }
    }

    /// Remembers that the inode is dirty since now, if it was clean.
    pub(crate) fn became_dirty(&self, inode: &Arc<Inode>, state: &mut FileState, now: Instant) {
        if state.dirty_since.is_none() {
            state.dirty_since = Some(now);
            self.queue.lock().push_back((now, Arc::downgrade(inode)));
        }
    }

    /// The inode that has been dirty longest, if that is since before `limit`.
    pub(crate) fn oldest_dirty(&self, limit: Instant) -> Option<Arc<Inode>> {
        let mut queue = self.queue.lock();
        while let Some((since, inode)) = queue.front() {
            if *since > limit {
                return None;
            }
            let inode = inode.upgrade();
            queue.pop_front();
            if inode.is_some() {
                return inode;
            }
        }
        None
    }

    /// Notes use of the clean blocks of these chunks; drops the least recently used above the limit.
    pub(crate) fn used(&self, inode: &Arc<Inode>, chunks: impl IntoIterator<Item = ChunkNo>) {
        for no in chunks {
            let evicted = self.clean.lock().push((inode.ino, no), Arc::downgrade(inode));
            if let Some(((ino, no), evicted)) = evicted
                && (ino, no) != (inode.ino, no)
                && let Some(other) = evicted.upgrade()
            {
                other.data.lock().chunks.drop_clean(no);
            }
        }
    }
}
