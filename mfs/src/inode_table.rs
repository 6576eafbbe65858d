//! Inodes this node knows.
//!
//! An inode is in the table while the kernel counts a lookup of it, a file of it is open, or it has data or
//! attributes that are not on disk. What an entry says about content is true only while this node holds the
//! inode's lock; what it says about use (lookups, opens) is this node's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use dashmap::DashMap;
use lcl::Guard;
use parking_lot::Mutex;
use tokio::sync::{Mutex as AsyncMutex, Notify, RwLock};

use crate::data::FileState;
use crate::ops::Ino;

/// An inode of this node.
pub struct Inode {
    /// Its number.
    pub ino: Ino,
    /// Its generation: another inode that gets the same number later is another `Inode`.
    pub generation: u64,
    uses: Mutex<Uses>,
    /// Told when the last open file goes.
    closed: Notify,
    /// Cached and dirty data, attributes not yet in the dinode.
    pub data: Mutex<FileState>,
    /// Serialises write-back, truncation and changes of extended attributes. Taken inside the inode's lock,
    /// before groups are locked.
    pub writeback: AsyncMutex<()>,
    /// Held to change the dinode (in write mode, just before a transaction begins) or to look at its extents
    /// (in read mode). Taken last; nobody waits for anything but the store while holding it.
    pub edit: RwLock<()>,
    /// READs answered: each may have filled pages of the kernel's cache.
    pub fills: AtomicU64,
    /// `fills` when the pages were dropped last.
    pub purged: AtomicU64,
    /// The kernel was given attributes to keep.
    pub attributes_given: AtomicBool,
    /// Orphan whose blocks are being freed.
    pub reaped: AtomicBool,
}

#[derive(Default)]
struct Uses {
    lookups: u64,
    opens: u64,
    /// Open for reading and writing: its pages may be mapped and stored to without a request.
    read_write_opens: u64,
    /// The open lock, while files are open.
    open_lock: Option<Guard>,
}

impl Inode {
    fn new(ino: Ino, generation: u64) -> Self {
        Self {
            ino,
            generation,
            uses: Mutex::default(),
            closed: Notify::new(),
            data: Mutex::default(),
            writeback: AsyncMutex::default(),
            edit: RwLock::default(),
            fills: AtomicU64::new(0),
            purged: AtomicU64::new(0),
            attributes_given: AtomicBool::new(false),
            reaped: AtomicBool::new(false),
        }
    }

    /// Counts an open file. `lock` is the open lock, taken before.
    pub fn opened(&self, read_write: bool, lock: Guard) {
        let mut uses = self.uses.lock();
        uses.opens += 1;
        uses.read_write_opens += u64::from(read_write);
        uses.open_lock.get_or_insert(lock);
    }

    /// Takes back what `opened` counted.
    pub fn closed(&self, read_write: bool) {
        let lock = {
            let mut uses = self.uses.lock();
            uses.opens -= 1;
            uses.read_write_opens -= u64::from(read_write);
            if uses.opens == 0 { uses.open_lock.take() } else { None }
        };
        if lock.is_some() {
            drop(lock);
            self.closed.notify_waiters();
        }
    }

    /// Whether a file of it is open here.
    pub fn is_open(&self) -> bool {
        self.uses.lock().opens > 0
    }

    /// Whether pages of it may change without a request: then the lock is held exclusively or not at all.
    pub fn may_be_stored_to(&self) -> bool {
        self.uses.lock().read_write_opens > 0
    }

    /// Waits until no file of it is open here.
    pub async fn wait_closed(&self) {
        loop {
            let notified = self.closed.notified();
            let mut notified = std::pin::pin!(notified);
            notified.as_mut().enable();
            if !self.is_open() {
                return;
            }
            notified.await;
        }
    }

    /// Whether the kernel may have pages of it that are newer than the last purge.
    pub fn has_pages(&self) -> bool {
        self.fills.load(SeqCst) != self.purged.load(SeqCst)
    }

    /// Whether somebody above knows it by its number.
    pub fn is_remembered(&self) -> bool {
        let uses = self.uses.lock();
        uses.lookups > 0 || uses.opens > 0
    }

    fn in_use(&self) -> bool {
        self.is_remembered() || self.data.lock().is_needed()
    }
}

/// All of them.
#[derive(Default)]
pub struct InodeTable {
    inodes: DashMap<Ino, Arc<Inode>>,
}

impl InodeTable {
    /// The inode with this number, whatever its generation.
    pub fn get(&self, ino: Ino) -> Option<Arc<Inode>> {
        self.inodes.get(&ino).map(|i| i.clone())
    }

    /// The inode, put into the table if it is not there. An entry of another generation is a predecessor that
    /// is gone: it leaves the table, its lookups go over to the new one since the kernel counts by number.
    pub fn get_or_insert(&self, ino: Ino, generation: u64) -> Arc<Inode> {
        self.count_lookups(ino, generation, 0)
    }

    /// Counts a lookup that the kernel will be told of.
    pub fn looked_up(&self, ino: Ino, generation: u64) -> Arc<Inode> {
        self.count_lookups(ino, generation, 1)
    }

    fn count_lookups(&self, ino: Ino, generation: u64, lookups: u64) -> Arc<Inode> {
        let mut inode = self.inodes.entry(ino).or_insert_with(|| Arc::new(Inode::new(ino, generation)));
        if inode.generation != generation {
            let new = Inode::new(ino, generation);
            new.uses.lock().lookups = inode.uses.lock().lookups;
            *inode = Arc::new(new);
        }
        inode.uses.lock().lookups += lookups;
        inode.clone()
    }

    /// Takes back lookups.
    pub fn forget(&self, ino: Ino, count: u64) {
        if let Some(inode) = self.get(ino) {
            let mut uses = inode.uses.lock();
            uses.lookups = uses.lookups.saturating_sub(count);
        }
        self.release_unused(ino);
    }

    /// Drops the entry if nothing needs it.
    pub fn release_unused(&self, ino: Ino) {
        self.inodes.remove_if(&ino, |_, inode| Arc::strong_count(inode) == 1 && !inode.in_use());
    }

    /// Drops every entry that nothing needs.
    pub fn sweep(&self) {
        self.inodes.retain(|_, inode| Arc::strong_count(inode) > 1 || inode.in_use());
    }

    /// Everything in it.
    pub fn all(&self) -> Vec<Arc<Inode>> {
        self.inodes.iter().map(|i| i.clone()).collect()
    }
}
