//! Logging: what was picked or freed becomes bits and counters in a transaction.
//!
//! Bits and counters change in the same handle. A bit that is not what the caller believes is corruption, found
//! before anything is changed in that bitmap block.

use lcl::Guard;
use storage_control::BlockAddr;

use super::{Alloc, How, Reservation, Run, bitmap_addr};
use crate::{
    FsError, LockName,
    format::{
        group::{BLOCKS_PER_BITMAP, BitmapImage, BlockState, GroupImage, STAMP_AT_COMMIT, bitmap_blocks},
        header::{Block, BlockKind},
    },
    store::Txn,
};

/// Blocks that changed their state, by the state before.
#[derive(Clone, Copy, Default)]
struct Changed([u32; 4]);

/// The states a block may come from.
fn may_become(from: BlockState, to: BlockState) -> bool {
    match to {
        BlockState::Data | BlockState::Metadata => {
            matches!(from, BlockState::Free | BlockState::FreedMetadata)
        }
        BlockState::Free => from == BlockState::Data,
        BlockState::FreedMetadata => from == BlockState::Metadata,
    }
}

/// Sets bits of one bitmap block; `Err` and nothing changed if one of them is not what it should be.
fn set_bits(block: &mut Block, first: u32, len: u32, to: BlockState) -> Result<Changed, ()> {
    let map = BitmapImage::of_mut(block);
    let mut changed = Changed::default();
    for n in first..first + len {
        let from = map.get(n);
        if !may_become(from, to) {
            return Err(());
        }
        changed.0[from as usize] += 1;
    }
    for n in first..first + len {
        map.set(n, to);
    }
    if to == BlockState::FreedMetadata {
        map.last_metadata_free = STAMP_AT_COMMIT.into();
    }
    Ok(changed)
}

impl Alloc {
    /// Changes the state of blocks of a group in bitmap and header.
    async fn mark(
        &self,
        txn: &mut Txn,
        group: u32,
        start: u32,
        len: u32,
        to: BlockState,
    ) -> Result<(), FsError> {
        let store = &self.0.store;
        let geometry = *store.geometry();
        let (header, owner) = (geometry.group_start(group), LockName::Group(group));
        let mut total = Changed::default();
        let mut at = start;
        while at < start + len {
            let index = at / BLOCKS_PER_BITMAP;
            let first = at % BLOCKS_PER_BITMAP;
            let part = (start + len - at).min(BLOCKS_PER_BITMAP - first);
            let addr = bitmap_addr(header, index);
            let fresh = {
                // Under the mutex, so that only one operation makes the block.
                let mut state = self.0.state.lock();
                let fresh = state.change(group, |mirror| {
                    let fresh = mirror.written >> index & 1 == 0;
                    mirror.written |= 1 << index;
                    fresh
                });
                (fresh == Some(true)).then(|| {
                    txn.create(addr, BlockKind::Bitmap, owner, |block| {
                        BitmapImage::of_mut(block).format(&geometry, group, index);
                        set_bits(block, first, part, to)
                    })
                })
            };
            let changed = match fresh {
                Some(changed) => changed,
                None => {
                    let set = |block: &mut Block| set_bits(block, first, part, to);
                    txn.edit(addr, BlockKind::Bitmap, owner, set).await?
                }
            };
            let Ok(changed) = changed else {
                let error = FsError::corrupt("bitmap", addr, "a block is not in the state its user believes");
                // Part of the change may be in the transaction already.
                store.fail(error.clone());
                return Err(error);
            };
            for (sum, part) in total.0.iter_mut().zip(changed.0) {
                *sum += part;
            }
            at += part;
        }
        let written = (start / BLOCKS_PER_BITMAP..=(start + len - 1) / BLOCKS_PER_BITMAP)
            .fold(0_u32, |mask, index| mask | 1 << index);
        txn.edit(header, BlockKind::Group, owner, |block| {
            let head = GroupImage::of_mut(block);
            for (from, blocks) in total.0.iter().enumerate() {
                head.count(BlockState::from_bits(from as u8), to, *blocks);
            }
            head.bitmaps_written = (head.bitmaps_written.get() | written).into();
        })
        .await
    }

    fn place(&self, addr: BlockAddr) -> Result<(u32, u32), FsError> {
        let geometry = self.0.store.geometry();
        let outside = || FsError::corrupt("block", addr, "its address is outside of every group");
        let group = geometry.group_of(addr).ok_or_else(outside)?;
        Ok((group, (addr.0 - geometry.group_start(group).0) as u32))
    }

    async fn log_picked(&self, txn: &mut Txn, run: Run, to: BlockState) -> Result<(), FsError> {
        let (group, block) = self.place(run.addr)?;
        let picked = self
            .0
            .state
            .lock()
            .mirror(group)
            .is_some_and(|mirror| (block..block + run.len).all(|block| mirror.is_picked(block)));
        assert!(picked, "only picked blocks are logged: {run:?}");
        self.mark(txn, group, block, run.len, to).await?;
        self.0.state.lock().change(group, |mirror| mirror.logged(block, run.len));
        Ok(())
    }

    /// Takes the lock of the group in which all these blocks lie. The caller holds no reservation and no other
    /// group, and has no transaction handle open.
    pub async fn lock_groups_for_free(&self, addrs: &[BlockAddr]) -> Result<FreeGuard, FsError> {
        let guard = self.free_guard(addrs, How::Wait).await?;
        guard.ok_or(FsError::Closed("its locks are gone"))
    }

    /// The same without waiting, for who holds a reservation.
    pub async fn try_lock_groups_for_free(&self, addrs: &[BlockAddr]) -> Result<Option<FreeGuard>, FsError> {
        self.free_guard(addrs, How::Try).await
    }

    async fn free_guard(&self, addrs: &[BlockAddr], how: How) -> Result<Option<FreeGuard>, FsError> {
        let first = addrs.first().ok_or(FsError::Invalid)?;
        let (group, _) = self.place(*first)?;
        for &addr in addrs {
            if self.place(addr)?.0 != group {
                return Err(FsError::Invalid);
            }
        }
        let guard = self.enter(group, how).await?;
        Ok(guard.map(|guard| FreeGuard { alloc: self.clone(), group, _guard: guard }))
    }
}

impl Reservation {
    /// Logs a picked metadata block.
    pub async fn log_meta(&self, txn: &mut Txn, addr: BlockAddr) -> Result<(), FsError> {
        self.alloc.log_picked(txn, Run { addr, len: 1 }, BlockState::Metadata).await
    }

    /// Logs picked data blocks: one of `runs()` or a part of one.
    pub async fn log_run(&self, txn: &mut Txn, run: Run) -> Result<(), FsError> {
        self.alloc.log_picked(txn, run, BlockState::Data).await
    }

    /// Logs picked data blocks as metadata: a journal.
    pub(crate) async fn log_run_as_metadata(&self, txn: &mut Txn, run: Run) -> Result<(), FsError> {
        self.alloc.log_picked(txn, run, BlockState::Metadata).await
    }
}

/// The lock of a group, to free blocks of it.
pub struct FreeGuard {
    alloc: Alloc,
    group: u32,
    _guard: Guard,
}

impl FreeGuard {
    /// The group.
    pub fn group(&self) -> u32 {
        self.group
    }

    /// Whether a block lies in the group.
    pub fn covers(&self, addr: BlockAddr) -> bool {
        self.alloc.0.store.geometry().group_of(addr) == Some(self.group)
    }

    /// Most bitmap and header blocks that freeing changes. Each freed metadata block takes one more unless the
    /// handle changed it before.
    pub fn credits(&self) -> u32 {
        1 + bitmap_blocks(self.alloc.0.store.geometry().blocks_in(self.group))
    }

    /// Frees data blocks; they are reusable when the transaction is stable.
    pub async fn free_run(&self, txn: &mut Txn, run: Run) -> Result<(), FsError> {
        let block = self.inside(run)?;
        self.alloc.mark(txn, self.group, block, run.len, BlockState::Free).await?;
        let seq = txn.seq();
        self.alloc.0.state.lock().change(self.group, |mirror| mirror.freed_data(seq, block, run.len));
        Ok(())
    }

    /// Frees a metadata block: logs its "free" image, owned by the group.
    pub async fn free_meta(&self, txn: &mut Txn, addr: BlockAddr) -> Result<(), FsError> {
        let block = self.inside(Run { addr, len: 1 })?;
        self.alloc.mark(txn, self.group, block, 1, BlockState::FreedMetadata).await?;
        txn.create(addr, BlockKind::Free, LockName::Group(self.group), |_| ());
        self.alloc.0.state.lock().change(self.group, |mirror| mirror.freed_meta(block));
        Ok(())
    }

    fn inside(&self, run: Run) -> Result<u32, FsError> {
        let (group, block) = self.alloc.place(run.addr)?;
        let end = u64::from(block) + u64::from(run.len);
        let size = self.alloc.0.store.geometry().blocks_in(self.group);
        if group != self.group || run.len == 0 || end > u64::from(size) {
            return Err(FsError::corrupt("extent", run.addr, "it crosses its allocation group"));
        }
        Ok(block)
    }
}

impl std::fmt::Debug for FreeGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FreeGuard").field("group", &self.group).finish()
    }
}
