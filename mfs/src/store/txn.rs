//! Handles of the running transaction.

use std::sync::Arc;

use storage_control::BlockAddr;

use super::{Inner, TxnSeq, cache::Edited};
use crate::{
    FsError, LockName,
    format::header::{Block, BlockKind},
};

/// A handle of a transaction. Dropping it joins its changes to the transaction; there is no undo, so everything that
/// can fail is checked before the first edit. All its changes become stable together or not at all.
pub struct Txn {
    inner: Arc<Inner>,
    seq: TxnSeq,
    credits: u32,
    /// Something was changed: from here on every edit must succeed.
    changed: bool,
}

impl Txn {
    pub(super) fn new(inner: Arc<Inner>, seq: TxnSeq, credits: u32) -> Txn {
        Txn { inner, seq, credits, changed: false }
    }

    /// Number of the transaction.
    pub fn seq(&self) -> TxnSeq {
        self.seq
    }

    /// How many more blocks it may change.
    pub fn credits(&self) -> u32 {
        self.credits
    }

    /// Changes the body (bytes from 64 on) of a block; of the header, flags and owner generation may be changed,
    /// the rest is the store's. The caller holds the owner's lock exclusively. Where it fails after an earlier
    /// change of the handle the store stops: half a change must not become stable.
    pub async fn edit<R>(
        &mut self,
        addr: BlockAddr,
        kind: BlockKind,
        owner: LockName,
        change: impl FnOnce(&mut Block) -> R,
    ) -> Result<R, FsError> {
        let result = self.try_edit(addr, kind, owner, change).await;
        match &result {
            Ok(_) => self.changed = true,
            Err(error) if self.changed => self.inner.fail(error.clone()),
            Err(_) => {}
        }
        result
    }

    async fn try_edit<R>(
        &mut self,
        addr: BlockAddr,
        kind: BlockKind,
        owner: LockName,
        change: impl FnOnce(&mut Block) -> R,
    ) -> Result<R, FsError> {
        let mut change = Some(change);
        loop {
            match self.inner.cache.edit(addr, kind, owner, self.seq, &mut change)? {
                Edited::Done(result, first) => {
                    if first {
                        self.join(addr, owner);
                    }
                    return Ok(result);
                }
                Edited::Missing => {
                    self.inner.read(addr, kind, owner).await?;
                }
            }
        }
    }

    /// Makes a fresh block of zeros with a header, in the place of whatever was there.
    pub fn create<R>(
        &mut self,
        addr: BlockAddr,
        kind: BlockKind,
        owner: LockName,
        change: impl FnOnce(&mut Block) -> R,
    ) -> R {
        self.changed = true;
        let (result, first) = self.inner.cache.create(addr, kind, owner, self.seq, change);
        if first {
            self.join(addr, owner);
        } else {
            // The block may have had another owner in this transaction.
            self.inner.progress.lock().running.owners.insert(owner);
        }
        result
    }

    /// The block is new to the transaction.
    fn join(&mut self, addr: BlockAddr, owner: LockName) {
        debug_assert!(self.credits > 0, "credits cover every block of a handle ({addr} of {owner})");
        let charged = self.credits.min(1);
        self.credits -= charged;
        let mut progress = self.inner.progress.lock();
        let running = &mut progress.running;
        debug_assert_eq!(running.seq, self.seq, "a transaction waits for its handles");
        running.reserved -= charged as usize;
        running.blocks.push(addr);
        running.owners.insert(owner);
    }
}

impl Drop for Txn {
    fn drop(&mut self) {
        self.inner.end_handle(self.credits);
    }
}

impl std::fmt::Debug for Txn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Txn").field("seq", &self.seq).field("credits", &self.credits).finish()
    }
}
