//! A mounted filesystem: its parts, its life, and what every operation begins with.
//!
//! Between `mount` and `unmount` this node owns its journal and that journal's orphan table. After `withdraw`
//! nothing succeeds any more and nothing more is written.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use dashmap::DashMap;
use dlm::Mode;
use lcl::{Guard, Lcl, LockError, Scope};
use parking_lot::Mutex;
use storage_control::{BlockAddr, BoxFuture, Device, LamportClock, Runtime, WallTime};
use tokio::sync::Notify;

use crate::alloc::Alloc;
use crate::background::Background;
use crate::callouts::{InodeCallouts, KernelCache, MetadataCallouts, PromiseConsumer};
use crate::data::DataCache;
use crate::dir;
use crate::error::FsError;
use crate::format::header::Defect;
use crate::format::superblock::{Geometry, Superblock};
use crate::inode::{self, Content, Dinode};
use crate::inode_table::{Inode, InodeTable};
use crate::lock_name::LockName;
use crate::ops::{Attr, Handle, Ino, Result};
use crate::orphan::Table;
use crate::store::{Store, Txn};

/// How often an operation that waits for the lease looks for it.
const LEASE_LOOK: Duration = Duration::from_millis(5);

/// How much longer this node's lease is good; zero when it is not healthy.
pub type LeaseTime = Arc<dyn Fn() -> Duration + Send + Sync>;

/// Asks every other node to checkpoint and publish its journal's tail; done when the tails are known and have been
/// given to [`Store::set_peer_tail`].
pub type GatherTails = Arc<dyn Fn() -> BoxFuture<()> + Send + Sync>;

/// What the layers around give to a mount.
pub struct Parts {
    /// The device, behind the gate.
    pub device: Arc<dyn Device>,
    /// As read and checked.
    pub superblock: Superblock,
    /// Number of this node's journal, replayed and empty.
    pub journal: u16,
    /// The node's locks. The filesystem sets the callouts of its kinds of locks.
    pub lcl: Lcl,
    /// The node's clock, already above all slots and journals.
    pub clock: Arc<LamportClock>,
    /// Time and tasks.
    pub runtime: Arc<dyn Runtime>,
    /// Caches of the kernel that the filesystem is mounted for.
    pub kernel: Arc<dyn KernelCache>,
    /// Bounds what that kernel may keep.
    pub lease: LeaseTime,
}

/// How to mount.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Nothing may be changed.
    pub read_only: bool,
    /// Access times are not kept (otherwise as `relatime`).
    pub no_atime: bool,
    /// Writers wait above this much dirty data.
    pub dirty_limit_bytes: u64,
    /// File data kept in memory beside the kernel's page cache.
    pub clean_limit_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { read_only: false, no_atime: false, dirty_limit_bytes: 256 << 20, clean_limit_bytes: 64 << 20 }
    }
}

/// An open file or directory.
pub(crate) struct OpenFile {
    pub(crate) inode: Arc<Inode>,
    pub(crate) read: bool,
    pub(crate) write: bool,
    pub(crate) dir: bool,
}

impl OpenFile {
    /// Takes back what opening counted.
    pub(crate) fn end(&self) {
        if !self.dir {
            self.inode.closed(self.read && self.write);
        }
    }
}

/// A mounted filesystem.
pub struct Filesystem {
    pub(crate) store: Store,
    pub(crate) alloc: Alloc,
    pub(crate) lcl: Lcl,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) geometry: Geometry,
    pub(crate) journal: u16,
    pub(crate) clock: Arc<LamportClock>,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) kernel: Arc<dyn KernelCache>,
    pub(crate) table: InodeTable,
    pub(crate) data: DataCache,
    pub(crate) orphans: Table,
    pub(crate) background: Background,
    /// Adopted orphan tables, and how to stop working on them.
    pub(crate) adoptions: Mutex<BTreeMap<u16, Background>>,
    pub(crate) options: Options,
    pub(crate) lease: LeaseTime,
    pub(crate) this: std::sync::Weak<Filesystem>,
    root: Ino,
    handles: DashMap<Handle, Arc<OpenFile>>,
    next_handle: AtomicU64,
    /// Keeps this node's orphan table its own.
    orphans_guard: Mutex<Option<Guard>>,
    withdrawn: OnceLock<String>,
    withdrawing: Notify,
    gather_tails: OnceLock<GatherTails>,
}

/// A locked inode and its dinode as of now.
pub(crate) struct Held {
    pub(crate) guard: Guard,
    pub(crate) inode: Arc<Inode>,
    pub(crate) dinode: Dinode,
}

impl Held {
    pub(crate) fn ino(&self) -> Ino {
        self.inode.ino
    }

    /// Refuses what is not a directory that has names.
    pub(crate) fn as_live_dir(&self) -> Result<()> {
        if !self.dinode.is_dir() {
            return Err(FsError::NotDir);
        }
        if self.dinode.nlink == 0 { Err(FsError::NotFound) } else { Ok(()) }
    }
}

/// Allocation of what belongs together is near; its group, to start from.
pub(crate) fn group_of(geometry: &Geometry, ino: Ino) -> Option<u32> {
    geometry.group_of(BlockAddr(ino.0))
}

impl Filesystem {
    /// Mounts: this node's journal has been replayed and is its own.
    pub async fn mount(parts: Parts, options: Options) -> Result<Arc<Filesystem>> {
        let Parts { device, superblock, journal, lcl, clock, runtime, kernel, lease } = parts;
        let (geometry, root) = (superblock.geometry, Ino(superblock.root.0));
        let journal_at = superblock.journal(journal).ok_or(FsError::Invalid)?;
        let store = Store::open(device.clone(), superblock, journal, clock.clone(), runtime.clone()).await?;
        let alloc = Alloc::new(store.clone(), lcl.clone());
        let orphans_lock = LockName::Orphans(journal).resource(&geometry);
        let orphans_guard = lcl.acquire(orphans_lock, Mode::EX, Scope::Server).await?;
        let orphans = Table::load(&store, journal, crate::recover::orphan_root(journal_at)).await?;
        let fs = Arc::new_cyclic(|this| Filesystem {
            data: DataCache::new(device.clone(), options.dirty_limit_bytes, options.clean_limit_bytes),
            store,
            alloc,
            device,
            geometry,
            journal,
            clock,
            runtime,
            kernel,
            table: InodeTable::default(),
            orphans,
            background: Background::default(),
            adoptions: Mutex::default(),
            options,
            lease,
            this: this.clone(),
            root,
            handles: DashMap::new(),
            next_handle: AtomicU64::new(1),
            orphans_guard: Mutex::new(Some(orphans_guard)),
            withdrawn: OnceLock::new(),
            withdrawing: Notify::new(),
            gather_tails: OnceLock::new(),
            lcl,
        });
        fs.lcl.set_callouts(LockName::INODE, Arc::new(InodeCallouts(fs.this.clone())));
        let metadata = Arc::new(MetadataCallouts(fs.this.clone()));
        for name in [LockName::Rename, LockName::Journals, LockName::Open(0), LockName::Orphans(0)] {
            fs.lcl.set_callouts(name.kind(), metadata.clone());
        }
        fs.alloc.set_consumer(Arc::new(PromiseConsumer(fs.this.clone())));
        // A dinode that cannot be read would show at the first request only.
        let root_dir = fs.hold(root, Mode::PR).await?;
        root_dir.as_live_dir()?;
        drop(root_dir);
        fs.background.spawn(&*fs.runtime, fs.clone().write_back_by_age());
        if !options.read_only {
            fs.adopt_own_orphans();
        }
        Ok(fs)
    }

    /// Brings everything to disk and gives up all locks. The kernel mount is gone by now. Orphans that other
    /// nodes still have open stay in this journal's table, for whoever mounts or recovers it next.
    pub async fn unmount(&self) -> Result<()> {
        self.background.stop().await;
        self.handles.retain(|_, file| {
            file.end();
            false
        });
        self.alive()?;
        for inode in self.table.all() {
            self.write_back_all_of(&inode).await?;
        }
        self.flush_all().await?;
        self.store.checkpoint().await?;
        self.orphans_guard.lock().take();
        self.lcl.release_all().await.map_err(|error| {
            self.withdraw(&error.to_string());
            FsError::Closed("locks could not be given up")
        })?;
        self.store.shutdown().await
    }

    /// Files of which data could not be written back, and nobody was told by `fsync` or `close`.
    pub fn untold_losses(&self) -> usize {
        self.table.all().iter().filter(|inode| inode.data.lock().error.is_some()).count()
    }

    /// The end of this node's part in the filesystem: the lease is lost, or the device failed where that cannot
    /// be mended. Every operation, also those under way, ends with an I/O error. The caller aborts the kernel
    /// mount, so that cached data serve nobody either.
    pub fn withdraw(&self, reason: &str) {
        if self.withdrawn.set(reason.to_owned()).is_ok() {
            tracing::error!(reason, "withdrawing from the filesystem");
            self.store.close("this node withdrew");
            self.lcl.close(reason);
            self.background.begin_stop();
            self.withdrawing.notify_waiters();
        }
    }

    /// Completes when the filesystem has withdrawn, by itself or by `withdraw`, with the reason.
    pub async fn withdrawn(&self) -> String {
        loop {
            let mut withdrawing = std::pin::pin!(self.withdrawing.notified());
            withdrawing.as_mut().enable();
            if let Some(reason) = self.withdrawn.get() {
                return reason.clone();
            }
            withdrawing.await;
        }
    }

    /// How space that other nodes' journals hold back is asked for when it is needed. Where it is not set, there
    /// are no others.
    pub fn set_gather_tails(&self, gather: GatherTails) {
        let _ = self.gather_tails.set(gather);
    }

    pub(crate) fn gather_tails(&self) -> Option<BoxFuture<()>> {
        self.gather_tails.get().map(|gather| gather())
    }

    /// The block store, for recovery and for the tail clock that the node publishes.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The allocator.
    pub fn alloc(&self) -> &Alloc {
        &self.alloc
    }

    /// File data in memory that are not on disk.
    pub fn dirty_bytes(&self) -> u64 {
        self.data.dirty_bytes()
    }

    /// An error if nothing can succeed any more. A failed metadata write is found here by whoever comes next.
    pub(crate) fn alive(&self) -> Result<()> {
        if self.withdrawn.get().is_some() {
            return Err(FsError::Closed("this node withdrew"));
        }
        match self.store.failed() {
            None => Ok(()),
            Some(error) => {
                self.withdraw(&error.to_string());
                Err(error)
            }
        }
    }

    /// Refuses changes of a filesystem mounted read-only.
    pub(crate) fn writable(&self) -> Result<()> {
        self.alive()?;
        if self.options.read_only { Err(FsError::ReadOnly) } else { Ok(()) }
    }

    pub(crate) fn root_ino(&self) -> Ino {
        self.root
    }

    pub(crate) fn now(&self) -> WallTime {
        self.runtime.wall()
    }

    /// Waits while the lease is out: what is cached here may be out of date, so nothing is answered from it. The
    /// lease comes back, or the node withdraws.
    async fn leased(&self) -> Result<()> {
        while (self.lease)().is_zero() {
            self.alive()?;
            self.runtime.sleep(LEASE_LOOK).await;
        }
        self.alive()
    }

    /// Waits for a lock.
    pub(crate) async fn lock(&self, name: LockName, mode: Mode, scope: Scope) -> Result<Guard> {
        self.leased().await?;
        Ok(self.lcl.acquire(name.resource(&self.geometry), mode, scope).await?)
    }

    /// Takes a lock if nobody is in the way.
    pub(crate) async fn try_lock(&self, name: LockName, mode: Mode, scope: Scope) -> Result<Option<Guard>> {
        self.leased().await?;
        Ok(self.lcl.try_acquire(name.resource(&self.geometry), mode, scope).await?)
    }

    /// The lock of an inode for reading: exclusive where a mapping of this node may change the file without a
    /// request.
    async fn lock_to_read(&self, ino: Ino) -> Result<Guard> {
        loop {
            let stored_to = || self.table.get(ino).is_some_and(|inode| inode.may_be_stored_to());
            let mode = if stored_to() { Mode::EX } else { Mode::PR };
            let guard = self.lock(LockName::Inode(ino.0), mode, Scope::Process).await?;
            if mode == Mode::EX || !stored_to() {
                return Ok(guard);
            }
        }
    }

    /// Locks and reads an inode that a request names by number.
    pub(crate) async fn hold(&self, ino: Ino, mode: Mode) -> Result<Held> {
        let guard = match mode {
            Mode::PR => self.lock_to_read(ino).await?,
            _ => self.lock(LockName::Inode(ino.0), mode, Scope::Process).await?,
        };
        self.with_dinode(ino, guard).await
    }

    /// Reads an inode whose lock is held. A number outlives its inode: what is there now may be free, another
    /// kind of block, or another inode.
    pub(crate) async fn with_dinode(&self, ino: Ino, guard: Guard) -> Result<Held> {
        let dinode = inode::read(&self.store, ino.0).await.map_err(|e| stale_if_gone(e, ino))?;
        let inode = match self.table.get(ino) {
            Some(inode) if inode.generation == dinode.generation => inode,
            Some(inode) if inode.is_remembered() => return Err(FsError::Stale),
            Some(_) | None => self.table.get_or_insert(ino, dinode.generation),
        };
        Ok(Held { guard, inode, dinode })
    }

    /// Locks and reads what a directory entry names; the directory is locked. What is wrong then is corrupt.
    pub(crate) async fn hold_entry(&self, entry: &dir::Dirent, mode: Mode) -> Result<Held> {
        let ino = Ino(entry.ino);
        let guard = match mode {
            Mode::PR => self.lock_to_read(ino).await?,
            _ => self.lock(LockName::Inode(ino.0), mode, Scope::Process).await?,
        };
        self.with_dinode_of(entry, guard).await
    }

    /// Reads what a directory entry names; both are locked.
    pub(crate) async fn with_dinode_of(&self, entry: &dir::Dirent, guard: Guard) -> Result<Held> {
        let ino = Ino(entry.ino);
        let dinode = inode::read(&self.store, ino.0).await?;
        if dinode.generation != entry.generation || dinode.kind != entry.kind {
            return Err(FsError::corrupt("dinode", ino.block(), "it is not the inode its name stands for"));
        }
        let inode = self.table.get_or_insert(ino, dinode.generation);
        Ok(Held { guard, inode, dinode })
    }

    /// What `stat` reports of a locked inode.
    pub(crate) fn attr(&self, inode: &Inode, dinode: &Dinode) -> Attr {
        let state = inode.data.lock();
        let p = &state.pending;
        let inline = matches!(&dinode.content, Content::Data(bytes) if !bytes.is_empty());
        let blocks = dinode.blocks + state.chunks.busy_blocks();
        Attr {
            ino: inode.ino,
            generation: dinode.generation,
            mode: dinode.mode() & !p.clear_perm,
            nlink: dinode.nlink,
            uid: dinode.uid,
            gid: dinode.gid,
            rdev: dinode.rdev as u32,
            size: state.size(dinode.size),
            // Programs take a file without blocks for one without data.
            blocks_512: if inline { blocks.max(1) * 8 } else { blocks * 8 },
            atime: p.atime.unwrap_or(dinode.atime),
            mtime: p.mtime.unwrap_or(dinode.mtime),
            ctime: p.ctime.unwrap_or(dinode.ctime),
            btime: dinode.btime,
        }
    }

    /// Remembers that the transaction changed the inode.
    pub(crate) fn changed(&self, txn: &Txn, inode: &Inode) {
        inode.data.lock().last_txn = Some(txn.seq());
    }

    /// Ends an operation's transaction. Everything that can fail was looked at before it began; what failed all
    /// the same has left it half done, and it must not reach the disk.
    pub(crate) fn finish<T>(&self, txn: Txn, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.store.close("a change could not be completed");
            self.withdraw(&format!("a change could not be completed: {error}"));
        }
        drop(txn);
        result
    }

    pub(crate) fn open_file(&self, file: OpenFile) -> Handle {
        let handle = Handle(self.next_handle.fetch_add(1, SeqCst));
        self.handles.insert(handle, Arc::new(file));
        handle
    }

    pub(crate) fn file(&self, handle: Handle) -> Result<Arc<OpenFile>> {
        self.handles.get(&handle).map(|f| f.clone()).ok_or(FsError::BadFd)
    }

    pub(crate) fn close_file(&self, handle: Handle) -> Result<Arc<OpenFile>> {
        self.handles.remove(&handle).map(|(_, f)| f).ok_or(FsError::BadFd)
    }
}

impl From<LockError> for FsError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Closed => FsError::Closed("this node has no locks any more"),
        }
    }
}

/// A time later than the old one: every change of an inode can be told from the one before.
pub(crate) fn later(old: WallTime, now: WallTime) -> WallTime {
    if now > old {
        return now;
    }
    match old.nanos {
        999_999_999 => WallTime { secs: old.secs.saturating_add(1), nanos: 0 },
        nanos => WallTime { secs: old.secs, nanos: nanos + 1 },
    }
}

/// The block of an inode that is gone is free, another kind of block, or file data.
fn stale_if_gone(error: FsError, ino: Ino) -> FsError {
    match &error {
        FsError::Corrupt { addr, why, .. } if *addr == ino.block() => {
            let gone = [Defect::Kind, Defect::Owner, Defect::Magic];
            if gone.iter().any(|defect| defect.why() == *why) { FsError::Stale } else { error }
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_rise_strictly_whatever_the_clock_says() {
        let t = |secs, nanos| WallTime { secs, nanos };
        assert_eq!(later(t(5, 0), t(6, 0)), t(6, 0));
        assert_eq!(later(t(5, 0), t(5, 0)), t(5, 1));
        assert_eq!(later(t(5, 999_999_999), t(1, 0)), t(6, 0));
    }
}
