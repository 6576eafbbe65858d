//! Promises: space for late allocation, promised at `write` and consumed by write-back.
//!
//! A promise is given for an operation under way, and kept when there are dirty data that need it. Always: the kept
//! promises together never exceed what the held groups have, the going ones counted; a group goes only when those that
//! stay back all kept promises. So who draws on a kept promise never waits for a group. A promise that is not kept yet
//! may lose its group: [`Promise::keep`] says so, and the operation asks anew.

use super::{Alloc, How, Reservation, State, Want};
use crate::FsError;

/// Blocks that nobody else can get. Dropping it gives them up.
pub struct Promise {
    alloc: Alloc,
    blocks: u64,
    kept: bool,
}

impl Promise {
    /// From here on there are data that need it. False: its group has gone meanwhile, and there may be no space.
    pub fn keep(&mut self) -> bool {
        let mut state = self.alloc.0.state.lock();
        if !self.kept && state.kept - state.drawing + self.blocks <= state.available {
            state.kept += self.blocks;
            self.kept = true;
        }
        self.kept
    }

    /// How many.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Takes over another promise.
    pub fn merge(&mut self, mut other: Promise) {
        debug_assert_eq!(self.kept, other.kept, "both are for dirty data, or neither");
        self.blocks += std::mem::take(&mut other.blocks);
    }

    /// For blocks that are about to be given back, and were taken off a kept promise: counted as being drawn till then.
    pub(super) fn again(alloc: &Alloc, blocks: u64) -> Promise {
        let mut state = alloc.0.state.lock();
        state.promised += blocks;
        state.kept += blocks;
        state.drawing += blocks;
        drop(state);
        Promise { alloc: alloc.clone(), blocks, kept: true }
    }

    /// Ends it under the mutex that the caller holds.
    fn give_up(mut self, state: &mut State) {
        let blocks = std::mem::take(&mut self.blocks);
        state.promised -= blocks;
        if self.kept {
            state.kept -= blocks;
        }
    }

    /// Splits off at most `blocks`.
    pub fn split(&mut self, blocks: u64) -> Promise {
        let blocks = blocks.min(self.blocks);
        self.blocks -= blocks;
        Promise { alloc: self.alloc.clone(), blocks, kept: self.kept }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if self.blocks > 0 {
            let mut state = self.alloc.0.state.lock();
            state.promised -= self.blocks;
            if self.kept {
                state.kept -= self.blocks;
            }
        }
    }
}

impl std::fmt::Debug for Promise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Promise").field(&self.blocks).finish()
    }
}

impl Alloc {
    /// Promises blocks of groups whose locks this node holds: neither I/O nor a message. `NoSpace` means that
    /// `promise_wait` must be asked.
    pub fn promise(&self, blocks: u64) -> Result<Promise, FsError> {
        let mut state = self.0.state.lock();
        let wanted = state.promised.checked_add(blocks).ok_or(FsError::NoSpace)?;
        if wanted - state.drawing > state.available {
            state.thaw(self.0.store.stable());
        }
        if wanted - state.drawing > state.available {
            return Err(FsError::NoSpace);
        }
        state.promised = wanted;
        Ok(Promise { alloc: self.clone(), blocks, kept: false })
    }

    /// Promises blocks, taking locks of more groups as needed. No transaction handle may be open. Where the caller
    /// holds a reservation, it may fail with `NoSpace` although there is some.
    pub async fn promise_wait(&self, blocks: u64) -> Result<Promise, FsError> {
        for forced in [false, true] {
            if forced {
                self.force().await?;
            }
            if let Ok(promise) = self.promise(blocks) {
                return Ok(promise);
            }
            for own in [true, false] {
                let how = if forced && !own { How::Wait } else { How::Try };
                for group in self.other_groups(own) {
                    // The lock stays cached, and the group's blocks back promises.
                    drop(self.enter(group, how).await?);
                    if let Ok(promise) = self.promise(blocks) {
                        return Ok(promise);
                    }
                }
            }
        }
        Err(FsError::NoSpace)
    }

    /// Picks blocks that were promised; what was picked is taken off the promise, which is a kept one.
    pub async fn reserve_promised(&self, promise: &mut Promise, want: Want) -> Result<Reservation, FsError> {
        assert!(promise.kept, "dirty data have a kept promise");
        let mut res = self.reserve_backed(want, promise.blocks).await?;
        let drawn = promise.split(u64::from(want.meta) + u64::from(want.data));
        res.drawn = drawn.blocks();
        // Picked and promised at the same time for no moment that anybody sees.
        let mut state = self.0.state.lock();
        state.drawing -= std::mem::take(&mut res.drawing);
        drawn.give_up(&mut state);
        drop(state);
        Ok(res)
    }
}
