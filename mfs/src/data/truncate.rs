//! Changing a file's size.
//!
//! The new size and the first step of freeing are one transaction. If more steps are needed, the same
//! transaction marks the dinode as truncating and enters it in the orphan table, and the last step takes both
//! back: whoever finds the mark after a crash goes on.

use super::MAX_FILE_BYTES;
use crate::alloc::Reservation;
use crate::error::FsError;
use crate::extent;
use crate::filesystem::{Filesystem, Held, later};
use crate::format::dinode::flags;
use crate::inode::{self, Content, FREE_STEP_CREDITS, FreeStep};
use crate::ops::Result;
use crate::orphan::{self, Orphan, OrphanKind, Table};
use storage_control::BLOCK_SIZE;

const BLOCK: u64 = BLOCK_SIZE as u64;

impl Filesystem {
    /// Cuts or extends a regular file, locked exclusively.
    pub(crate) async fn set_size(&self, held: &mut Held, new: u64) -> Result<()> {
        if new > MAX_FILE_BYTES {
            return Err(FsError::TooBig);
        }
        let inode = held.inode.clone();
        // No write to a block that is about to be freed.
        let _no_writeback = inode.writeback.lock().await;
        self.read_again(held).await?;
        if held.dinode.has(flags::TRUNCATING) {
            self.finish_truncation(held, &self.orphans).await?;
        }
        let size = inode.data.lock().size(held.dinode.size);
        if new > size {
            self.grow(held, size, new).await?;
        } else if new < size {
            self.shrink(held, new).await?;
        }
        let now = self.now();
        let mut state = inode.data.lock();
        let (p, d) = (&mut state.pending, &held.dinode);
        p.mtime = Some(later(p.mtime.unwrap_or(d.mtime), now));
        p.ctime = Some(later(p.ctime.unwrap_or(d.ctime), now));
        self.data.became_dirty(&inode, &mut state, self.runtime.now());
        Ok(())
    }

    async fn shrink(&self, held: &mut Held, new: u64) -> Result<()> {
        let inode = held.inode.clone();
        if new >= held.dinode.size {
            let mut state = inode.data.lock();
            let freed = state.chunks.cut(new);
            state.pending.size = (new > held.dinode.size).then_some(new);
            drop(state);
            self.data.sub_busy(freed);
            return Ok(());
        }
        let first = new.div_ceil(BLOCK);
        let step = extent::next_to_free(&self.store, &held.dinode, first..u64::MAX).await?;
        match step {
            Some(step) => self.shrink_and_free(held, new, step).await?,
            None => self.shrink_only(held, new).await?,
        }
        self.cut_in_memory(held, new);
        if held.dinode.has(flags::TRUNCATING) {
            self.finish_truncation(held, &self.orphans).await?;
        }
        Ok(())
    }

    fn cut_in_memory(&self, held: &Held, new: u64) {
        let mut state = held.inode.data.lock();
        let freed = state.chunks.cut(new);
        state.pending.size = None;
        drop(state);
        self.data.sub_busy(freed);
    }

    /// No block is freed.
    async fn shrink_only(&self, held: &mut Held, new: u64) -> Result<()> {
        let inode = held.inode.clone();
        let _edit = inode.edit.write().await;
        let mut txn = self.store.begin(1).await?;
        held.dinode.size = new;
        if let Content::Data(bytes) = &mut held.dinode.content {
            bytes.truncate(new as usize);
        }
        let result = inode::write(&mut txn, &held.dinode).await;
        self.changed(&txn, &inode);
        self.finish(txn, result)
    }

    async fn shrink_and_free(&self, held: &mut Held, new: u64, step: FreeStep) -> Result<()> {
        let inode = held.inode.clone();
        let range = new.div_ceil(BLOCK)..u64::MAX;
        let slot = self.orphans.slot();
        let (mut reservation, guard) = loop {
            let Some(reservation) = self.reserve_slot(Some(&slot)).await? else {
                break (None, self.alloc.lock_groups_for_free(&[step.addr]).await?);
            };
            match self.alloc.try_lock_groups_for_free(&[step.addr]).await? {
                Some(guard) => break (Some(reservation), guard),
                // Waited for with nothing in hand, then again.
                None => {
                    drop(reservation);
                    drop(self.alloc.lock_groups_for_free(&[step.addr]).await?);
                }
            }
        };
        let _edit = inode.edit.write().await;
        let credits = FREE_STEP_CREDITS
            + 1
            + guard.credits()
            + slot.needs().credits
            + reservation.as_ref().map_or(0, Reservation::credits);
        let mut txn = self.store.begin(credits).await?;
        let result = async {
            let d = &mut held.dinode;
            d.size = new;
            extent::remove_step(&self.store, &mut txn, &guard, None, d, range.clone(), step).await?;
            if extent::next_to_free(&self.store, d, range).await?.is_some() {
                d.set(flags::TRUNCATING, true);
                let orphan = Orphan { ino: d.ino, generation: d.generation, kind: OrphanKind::Truncate };
                self.orphans.add(&mut txn, reservation.as_mut(), slot, orphan).await?;
            }
            inode::write(&mut txn, d).await
        }
        .await;
        self.changed(&txn, &inode);
        self.finish(txn, result)
    }

    /// Frees what is still mapped beyond the size. The inode is locked exclusively, and no write-back is under
    /// way. `table` is where the truncation is entered.
    pub(crate) async fn finish_truncation(&self, held: &mut Held, table: &Table) -> Result<()> {
        let inode = held.inode.clone();
        let range = held.dinode.size.div_ceil(BLOCK)..u64::MAX;
        loop {
            let step = extent::next_to_free(&self.store, &held.dinode, range.clone()).await?;
            let guard = match &step {
                Some(step) => Some(self.alloc.lock_groups_for_free(&[step.addr]).await?),
                None => None,
            };
            let _edit = inode.edit.write().await;
            let bitmaps = guard.as_ref().map_or(0, |g| g.credits());
            let mut txn = self.store.begin(FREE_STEP_CREDITS + 1 + bitmaps + orphan::REMOVE_CREDITS).await?;
            let result = async {
                let d = &mut held.dinode;
                if let (Some(step), Some(guard)) = (step, &guard) {
                    extent::remove_step(&self.store, &mut txn, guard, None, d, range.clone(), step).await?;
                }
                let done = extent::next_to_free(&self.store, d, range.clone()).await?.is_none();
                if done {
                    d.set(flags::TRUNCATING, false);
                    table.remove(&mut txn, d.ino, OrphanKind::Truncate).await?;
                }
                inode::write(&mut txn, d).await?;
                Ok(done)
            }
            .await;
            self.changed(&txn, &inode);
            if self.finish(txn, result)? {
                return Ok(());
            }
        }
    }
}
