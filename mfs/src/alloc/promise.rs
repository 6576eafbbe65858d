//! Promises: space for late allocation, promised at `write` and consumed by write-back.
//!
//! All promises together never exceed what the held groups have, unless a group had to go whose promises
//! could not be consumed in time.

use super::{Alloc, How, Reservation, Want};
use crate::FsError;

/// Blocks that nobody else can get. Dropping it gives them up.
pub struct Promise {
    alloc: Alloc,
    blocks: u64,
}

impl Promise {
    /// How many.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Takes over another promise.
    pub fn merge(&mut self, mut other: Promise) {
        self.blocks += std::mem::take(&mut other.blocks);
    }

    /// For blocks that are about to be given back.
    pub(super) fn again(alloc: &Alloc, blocks: u64) -> Promise {
        alloc.0.state.lock().promised += blocks;
        Promise { alloc: alloc.clone(), blocks }
    }

    /// Splits off at most `blocks`.
    pub fn split(&mut self, blocks: u64) -> Promise {
        let blocks = blocks.min(self.blocks);
        self.blocks -= blocks;
        Promise { alloc: self.alloc.clone(), blocks }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if self.blocks > 0 {
            self.alloc.0.state.lock().promised -= self.blocks;
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
        if wanted > state.available {
            state.thaw(self.0.store.stable());
        }
        if wanted > state.available {
            return Err(FsError::NoSpace);
        }
        state.promised = wanted;
        Ok(Promise { alloc: self.clone(), blocks })
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

    /// Picks blocks that were promised; what was picked is taken off the promise.
    pub async fn reserve_promised(&self, promise: &mut Promise, want: Want) -> Result<Reservation, FsError> {
        let mut res = self.reserve_backed(want, promise.blocks).await?;
        let drawn = promise.split(u64::from(want.meta) + u64::from(want.data));
        res.drawn = drawn.blocks();
        Ok(res)
    }
}
