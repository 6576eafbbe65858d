//! How full the filesystem is: from mirrors where there are some, else from group headers on disk, at most a
//! second old.
//!
//! A header read without its lock may be behind its holder's mirror; it guides the search for space and
//! `statfs`, nothing else.

use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use storage_control::Instant;

use super::{Alloc, mirror::reserve_of};
use crate::{
    FsError,
    format::{group::GroupImage, header},
    store::{block_of, wait::join_all},
};

/// Counters of other nodes' groups are read again after this time.
const STALE_AFTER_MS: u64 = 1000;
/// The most headers one `statfs` reads again.
const REFRESH_GROUPS: u32 = 1024;
/// Reads under way at once.
const WAVE: usize = 64;
/// A group whose header was never read.
const UNKNOWN: u32 = u32::MAX;

/// Numbers for `statfs`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Blocks in all groups.
    pub blocks: u64,
    /// Not in use.
    pub free: u64,
    /// Not in use, not kept back and not promised.
    pub available: u64,
}

/// What is known of each group without its lock.
pub(super) struct Counters {
    free: Vec<AtomicU32>,
    available: Vec<AtomicU32>,
    read_at: AtomicU64,
    all_read: AtomicBool,
    next: AtomicU32,
}

impl Counters {
    pub(super) fn new(groups: u32) -> Counters {
        let unknown = || (0..groups).map(|_| AtomicU32::new(UNKNOWN)).collect();
        Counters {
            free: unknown(),
            available: unknown(),
            read_at: AtomicU64::new(0),
            all_read: AtomicBool::new(false),
            next: AtomicU32::new(0),
        }
    }

    pub(super) fn set(&self, group: u32, free: u32, available: u32) {
        self.free[group as usize].store(free, Ordering::Relaxed);
        self.available[group as usize].store(available, Ordering::Relaxed);
    }

    /// As far as is known; a group nobody looked at may have everything.
    pub(super) fn available(&self, group: u32) -> u32 {
        self.available[group as usize].load(Ordering::Relaxed)
    }

    /// Whether it is worth looking for that many blocks, freed ones included.
    pub(super) fn may_have(&self, group: u32, blocks: u32) -> bool {
        self.free[group as usize].load(Ordering::Relaxed) >= blocks
    }
}

impl Alloc {
    /// How full the filesystem is.
    pub async fn statfs(&self) -> Result<Usage, FsError> {
        let now = self.0.store.runtime().now();
        let counters = &self.0.counters;
        if !counters.all_read.load(Ordering::Relaxed) {
            self.refresh_counters(u32::MAX).await?;
            counters.all_read.store(true, Ordering::Relaxed);
            counters.read_at.store(now.0, Ordering::Relaxed);
        } else if now.since(Instant(counters.read_at.load(Ordering::Relaxed)))
            >= Duration::from_millis(STALE_AFTER_MS)
        {
            counters.read_at.store(now.0, Ordering::Relaxed);
            self.refresh_counters(REFRESH_GROUPS).await?;
        }
        let geometry = self.0.store.geometry();
        let state = self.0.state.lock();
        let mut usage = Usage::default();
        for group in 0..geometry.groups {
            usage.blocks += u64::from(geometry.blocks_in(group));
            let (free, available) = match state.mirror(group) {
                Some(mirror) => {
                    (mirror.free_in_time(), mirror.free_in_time().saturating_sub(mirror.reserve()))
                }
                None => {
                    let free = counters.free[group as usize].load(Ordering::Relaxed);
                    let free = if free == UNKNOWN { 0 } else { free };
                    (free, free.saturating_sub(reserve_of(geometry.blocks_in(group))))
                }
            };
            usage.free += u64::from(free);
            usage.available += u64::from(available);
        }
        usage.available = usage.available.saturating_sub(state.promised);
        Ok(usage)
    }

    /// Reads at most `most` headers of groups without a mirror, going on where the last call ended.
    pub(super) async fn refresh_counters(&self, most: u32) -> Result<(), FsError> {
        let store = &self.0.store;
        let geometry = *store.geometry();
        let counters = &self.0.counters;
        let first = counters.next.load(Ordering::Relaxed);
        let most = most.min(geometry.groups);
        let groups: Vec<u32> = {
            let state = self.0.state.lock();
            let turn = (0..most).map(|n| (first.wrapping_add(n)) % geometry.groups);
            turn.filter(|&group| state.mirror(group).is_none()).collect()
        };
        counters.next.store((first.wrapping_add(most)) % geometry.groups, Ordering::Relaxed);
        for wave in groups.chunks(WAVE) {
            let read = |&group: &u32| store.device().read(geometry.group_start(group), 1);
            let headers = join_all(wave.iter().map(read).collect()).await;
            for (&group, buf) in wave.iter().zip(headers) {
                let buf = buf?;
                let block = block_of(&buf);
                let addr = geometry.group_start(group);
                let head = GroupImage::of(block);
                // A header being written or damaged tells nothing; who takes the lock will see.
                if header::is_ours(block, addr, &store.superblock().secret).is_ok()
                    && head.defect(&geometry, group).is_none()
                {
                    let free = head.free.get();
                    let reserve = reserve_of(geometry.blocks_in(group));
                    counters.set(group, free + head.freed_metadata.get(), free.saturating_sub(reserve));
                }
            }
        }
        Ok(())
    }
}
