//! The allocator: picks blocks in memory under group locks, logs them in transactions.
//!
//! - A group's bitmap is mirrored only while this node holds the group's lock; the mirror is built from blocks read
//!   under it and dropped before it goes.
//! - What a reservation picked belongs to it until it is logged or dropped.
//! - Freed data are picked again only when the freeing transaction is stable; freed metadata at once as metadata,
//!   as data only when every journal has moved past them.
//! - Promised blocks are never picked by anybody else; a group goes only when the groups that stay back everything
//!   that dirty data were promised (promise.rs).
//! - At most one group lock is waited for at a time, and only by who holds none and keeps none from going; others
//!   are taken by try.

mod bits;
mod callouts;
mod log;
mod mirror;
mod promise;
mod reserve;
mod usage;

use std::{collections::HashMap, fmt, sync::Arc};

use lcl::{Guard, Lcl, LockError, Mode, Scope};
use parking_lot::Mutex;
use storage_control::{BlockAddr, BoxFuture};

pub use self::{
    log::FreeGuard,
    promise::Promise,
    reserve::{Reservation, Want},
    usage::Usage,
};
use self::{mirror::Mirror, usage::Counters};
use crate::{
    FsError, LockName,
    format::{
        group::{BitmapImage, GroupImage},
        header::BlockKind,
    },
    store::{
        Store, TxnSeq, block_of,
        wait::{WaitQueue, join_all},
    },
};

/// Contiguous blocks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Run {
    /// First block.
    pub addr: BlockAddr,
    /// How many.
    pub len: u32,
}

/// The data layer, as the allocator needs it.
pub trait Consumer: Send + Sync {
    /// A group whose free blocks back promises is about to go: write back dirty data, so that promises are
    /// consumed (the group can still be used meanwhile: `Want::no_wait`) or given up. Asked again until enough are: what
    /// others write back meanwhile can be left to them. Must not wait for a group,
    /// whose holder may wait for this one, nor for anything that a local operation holds while it waits for a group.
    fn consume_promises(&self, group: u32) -> BoxFuture<()>;

    /// Space is short: ask every node to checkpoint, and return when their tails are known
    /// (`Store::set_peer_tail`). Does nothing where there are no others.
    fn gather_tails(&self) -> BoxFuture<()> {
        Box::pin(async {})
    }
}

/// A group whose lock this node holds.
enum Held {
    Loading {
        /// As below.
        leaving: bool,
    },
    Here {
        mirror: Box<Mirror>,
        /// The lock is about to go: its blocks back no new promises.
        leaving: bool,
    },
}

struct State {
    groups: HashMap<u32, Held>,
    /// Where the last reservation without a wish found its blocks.
    home: u32,
    /// Blocks that ordinary work can get from groups that stay.
    available: u64,
    /// Promised, to operations under way and to dirty data.
    promised: u64,
    /// Of those, to dirty data.
    kept: u64,
    /// Of those, picked already by reservations under way.
    drawing: u64,
}

impl State {
    /// Changes a mirror and keeps `available` right.
    fn change<R>(&mut self, group: u32, change: impl FnOnce(&mut Mirror) -> R) -> Option<R> {
        match self.groups.get_mut(&group)? {
            Held::Loading { .. } => None,
            Held::Here { mirror, leaving } => {
                let before = if *leaving { 0 } else { mirror.available() };
                let result = change(mirror);
                let after = if *leaving { 0 } else { mirror.available() };
                self.available = self.available + u64::from(after) - u64::from(before);
                Some(result)
            }
        }
    }

    /// Freed data of stable transactions are free, in every held group.
    fn thaw(&mut self, stable: TxnSeq) {
        let cooling = |held: &Held| matches!(held, Held::Here { mirror, .. } if mirror.is_cooling());
        let groups: Vec<u32> =
            self.groups.iter().filter(|(_, held)| cooling(held)).map(|(group, _)| *group).collect();
        for group in groups {
            self.change(group, |mirror| mirror.thaw(stable));
        }
    }

    fn mirror(&self, group: u32) -> Option<&Mirror> {
        match self.groups.get(&group)? {
            Held::Loading { .. } => None,
            Held::Here { mirror, .. } => Some(mirror),
        }
    }

    fn insert(&mut self, group: u32, mirror: Mirror) {
        // The lock may have been called back while the bitmaps were read.
        let leaving = matches!(self.groups.get(&group), Some(Held::Loading { leaving: true }));
        self.available += if leaving { 0 } else { u64::from(mirror.available()) };
        self.groups.insert(group, Held::Here { mirror: Box::new(mirror), leaving });
    }

    /// Groups whose locks are about to go.
    fn going(&self) -> Vec<u32> {
        let going = |held: &Held| matches!(held, Held::Here { leaving: true, .. });
        let mut groups: Vec<u32> =
            self.groups.iter().filter(|(_, held)| going(held)).map(|(group, _)| *group).collect();
        groups.sort_unstable();
        groups
    }

    /// Blocks of a group for who draws on a kept promise of `backed` blocks, and has `picked` already: the groups that
    /// go count, since they wait for him.
    fn budget_of_promise(&self, group: u32, backed: u64, picked: u64) -> u64 {
        let going = self.going();
        let there = |&group: &u32| self.mirror(group).map_or(0, |mirror| u64::from(mirror.available()));
        let available = self.available + going.iter().map(there).sum::<u64>();
        let left = backed.saturating_sub(picked);
        let budget = available.saturating_sub((self.kept - self.drawing).saturating_sub(left));
        if going.contains(&group) { budget.max(left) } else { budget }
    }

    /// Blocks for who was promised nothing.
    fn budget(&self) -> u64 {
        self.available.saturating_sub(self.promised - self.drawing)
    }

    /// The group's blocks back no promises any more.
    fn leave(&mut self, group: u32) {
        match self.groups.get_mut(&group) {
            Some(Held::Here { mirror, leaving }) if !*leaving => {
                *leaving = true;
                self.available -= u64::from(mirror.available());
            }
            Some(Held::Loading { leaving }) => *leaving = true,
            Some(Held::Here { .. }) | None => {}
        }
    }

    fn remove(&mut self, group: u32) -> Option<Box<Mirror>> {
        self.leave(group);
        match self.groups.remove(&group)? {
            Held::Loading { .. } => None,
            Held::Here { mirror, .. } => Some(mirror),
        }
    }

    /// What is promised to dirty data and not backed by a group that stays.
    fn unbacked(&self) -> u64 {
        (self.kept - self.drawing).saturating_sub(self.available)
    }
}

pub(crate) struct Inner {
    store: Store,
    lcl: Lcl,
    state: Mutex<State>,
    loaded: WaitQueue,
    counters: Counters,
    consumer: Mutex<Option<Arc<dyn Consumer>>>,
}

/// The allocator of a mount. Cheap to clone.
#[derive(Clone)]
pub struct Alloc(Arc<Inner>);

/// How a group's lock is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    /// Without a message.
    Cached,
    /// Without waiting for others.
    Try,
    /// Whatever it takes.
    Wait,
}

impl Alloc {
    /// An allocator over a store; registers the callouts for group locks.
    pub fn new(store: Store, lcl: Lcl) -> Alloc {
        let groups = store.geometry().groups;
        let state = State { groups: HashMap::new(), home: 0, available: 0, promised: 0, kept: 0, drawing: 0 };
        let inner = Arc::new(Inner {
            counters: Counters::new(groups),
            state: Mutex::new(state),
            loaded: WaitQueue::default(),
            consumer: Mutex::new(None),
            store,
            lcl,
        });
        callouts::register(&inner);
        Alloc(inner)
    }

    /// Who writes back dirty data before promises lose their group.
    pub fn set_consumer(&self, consumer: Arc<dyn Consumer>) {
        *self.0.consumer.lock() = Some(consumer);
    }

    fn consumer(&self) -> Option<Arc<dyn Consumer>> {
        self.0.consumer.lock().clone()
    }

    /// The store below.
    pub fn store(&self) -> &Store {
        &self.0.store
    }

    /// Takes a group's lock and makes sure that its mirror is there.
    async fn enter(&self, group: u32, how: How) -> Result<Option<Guard>, FsError> {
        let res = LockName::Group(group).resource(self.0.store.geometry());
        let lcl = &self.0.lcl;
        let guard = match how {
            How::Cached => lcl.try_cached(res, Mode::EX, Scope::Server),
            How::Try => lcl.try_acquire(res, Mode::EX, Scope::Server).await.map_err(closed)?,
            How::Wait => Some(lcl.acquire(res, Mode::EX, Scope::Server).await.map_err(closed)?),
        };
        if guard.is_some() {
            self.load(group).await?;
        }
        Ok(guard)
    }

    /// Builds the mirror of a group whose lock the caller holds.
    async fn load(&self, group: u32) -> Result<(), FsError> {
        let inner = &self.0;
        let mine = inner
            .loaded
            .until(|| {
                let mut state = inner.state.lock();
                match state.groups.get(&group) {
                    Some(Held::Here { .. }) => Some(false),
                    Some(Held::Loading { .. }) => None,
                    None => {
                        state.groups.insert(group, Held::Loading { leaving: false });
                        Some(true)
                    }
                }
            })
            .await;
        if !mine {
            return Ok(());
        }
        let loading = Loading { inner, group };
        let mirror = self.read_mirror(group).await?;
        inner.counters.set(group, mirror.free_in_time(), mirror.available());
        inner.state.lock().insert(group, mirror);
        drop(loading);
        Ok(())
    }

    async fn read_mirror(&self, group: u32) -> Result<Mirror, FsError> {
        let store = &self.0.store;
        let geometry = *store.geometry();
        let (start, owner) = (geometry.group_start(group), LockName::Group(group));
        let header = store.read(start, BlockKind::Group, owner).await?;
        let head = *GroupImage::of(block_of(&header));
        let corrupt = |what, addr, why| Err(FsError::corrupt(what, addr, why));
        if let Some(why) = head.defect(&geometry, group) {
            return corrupt("group header", start, why);
        }
        let written = head.bitmaps_written.get();
        let mut mirror = Mirror::new(geometry.blocks_in(group), written);
        let on_disk: Vec<u32> = (0..mirror.bitmaps()).filter(|i| written >> i & 1 == 1).collect();
        let read = |&index: &u32| Box::pin(store.read(bitmap_addr(start, index), BlockKind::Bitmap, owner));
        let images = join_all(on_disk.iter().map(read).collect()).await;
        let mut fresh = Box::new([0; storage_control::BLOCK_SIZE]);
        let mut images = images.into_iter();
        for index in 0..mirror.bitmaps() {
            if on_disk.contains(&index) {
                let image = images.next().expect("one image for each bitmap on disk")?;
                let map = BitmapImage::of(block_of(&image));
                if map.group.get() != group || map.index.get() != index {
                    return corrupt("bitmap", bitmap_addr(start, index), "it describes another range");
                }
                mirror.load(index, map);
            } else {
                let map = BitmapImage::of_mut(&mut fresh);
                map.format(&geometry, group, index);
                mirror.load(index, map);
            }
        }
        if mirror.free_in_time() != head.free.get() + head.freed_metadata.get() {
            return corrupt("group header", start, "its counters disagree with the bitmap");
        }
        Ok(mirror)
    }
}

/// Ends the loading of a mirror, however it ends.
struct Loading<'a> {
    inner: &'a Inner,
    group: u32,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        {
            let mut state = self.inner.state.lock();
            if let Some(Held::Loading { .. }) = state.groups.get(&self.group) {
                state.groups.remove(&self.group);
            }
        }
        self.inner.loaded.wake_all();
    }
}

/// Address of a bitmap block of the group that starts at `start`.
fn bitmap_addr(start: BlockAddr, index: u32) -> BlockAddr {
    BlockAddr(start.0 + 1 + u64::from(index))
}

fn closed(error: LockError) -> FsError {
    match error {
        LockError::Closed => FsError::Closed("its locks are gone"),
    }
}

impl fmt::Debug for Alloc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.lock();
        f.debug_struct("Alloc")
            .field("groups", &state.groups.len())
            .field("available", &state.available)
            .field("promised", &state.promised)
            .finish()
    }
}

#[cfg(test)]
mod tests;
