//! When dirty data are written back: by age, for want of memory, on demand, and before a lock goes.
//!
//! Dirty data of an inode exist only under its exclusive lock. Write-back uses the lock while it is here; where it
//! is going, its way down writes back, and waiting for a shared lock waits for that.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use dlm::Mode;
use lcl::{Guard, Scope};
use storage_control::Instant;
use tokio::sync::Semaphore;

use super::writeback::{BATCH_BLOCKS, HowFar};
use super::{AGE_CHECK, WRITE_BACK_AFTER, WriteSeq};
use crate::filesystem::Filesystem;
use crate::inode_table::Inode;
use crate::lock_name::LockName;
use crate::ops::Result;
use crate::store::TxnSeq;

/// Inodes written back at a time.
const AT_A_TIME: usize = 16;
/// Rounds of the age check between two sweeps of the inode table.
const SWEEP_EVERY: u32 = 60;

impl Filesystem {
    /// Writes back what has been dirty for long, or everything when memory is short, until the end.
    pub(crate) async fn write_back_by_age(self: Arc<Self>) {
        let slots = Arc::new(Semaphore::new(AT_A_TIME));
        let mut rounds = 0_u32;
        loop {
            let next = self.background.unless_stopped(self.next_round());
            if next.await.is_none() || self.alive().is_err() {
                return;
            }
            loop {
                let age = if self.data.is_crowded() { 0 } else { WRITE_BACK_AFTER.as_nanos() as u64 };
                let limit = Instant(self.runtime.now().0.saturating_sub(age));
                let Some(inode) = self.data.oldest_dirty(limit) else { break };
                let Ok(slot) = slots.clone().acquire_owned().await else { return };
                let fs = self.clone();
                self.background.spawn(&*self.runtime, async move {
                    // An error is the end of this node's access, or is remembered in the inode.
                    if let Err(error) = fs.write_back_cached(&inode).await {
                        tracing::warn!(%error, ino = inode.ino.0, "write-back failed");
                    }
                    let ino = inode.ino;
                    drop((inode, slot));
                    fs.table.release_unused(ino);
                });
            }
            rounds += 1;
            if rounds.is_multiple_of(SWEEP_EVERY) {
                self.sweep().await;
            }
        }
    }

    /// Lets go of inodes that nobody needs; whose data may not be stable is needed.
    async fn sweep(&self) {
        let upto = self.data.flush.latest();
        if self.flush_upto(upto).await.is_ok() {
            for inode in self.table.all() {
                inode.data.lock().flushed(upto);
            }
        }
        self.table.sweep();
    }

    async fn next_round(&self) {
        let mut tick = self.runtime.sleep(AGE_CHECK);
        let mut wanted = std::pin::pin!(self.data.wanted.notified());
        std::future::poll_fn(|cx| {
            if tick.as_mut().poll(cx).is_ready() {
                std::task::Poll::Ready(())
            } else {
                wanted.as_mut().poll(cx)
            }
        })
        .await
    }

    pub(super) fn inode_lock_in_hand(&self, inode: &Inode) -> Option<Guard> {
        let name = LockName::Inode(inode.ino.0).resource(&self.geometry);
        self.lcl.try_cached(name, Mode::EX, Scope::Server)
    }

    /// Writes back an inode whose lock is here; one whose lock is going is written back by that.
    async fn write_back_cached(&self, inode: &Arc<Inode>) -> Result<()> {
        let result = match self.inode_lock_in_hand(inode) {
            Some(_guard) => self.write_back(inode, HowFar::All).await,
            None => Ok(()),
        };
        // It left the queue of dirty inodes.
        let mut state = inode.data.lock();
        state.dirty_since = None;
        if state.is_dirty() && !inode.reaped.load(SeqCst) {
            self.data.became_dirty(inode, &mut state, self.runtime.now());
        }
        result
    }

    /// Writes back everything of an inode, whatever happens to its lock meanwhile.
    pub(crate) async fn write_back_all_of(&self, inode: &Arc<Inode>) -> Result<()> {
        if !inode.data.lock().is_dirty() {
            return Ok(());
        }
        self.write_back_under_lock(inode, HowFar::All).await
    }

    /// Writes back if the exclusive lock is here. If it is not, or is going, whoever has what was written makes it
    /// stable before the shared lock comes.
    async fn write_back_under_lock(&self, inode: &Arc<Inode>, what: HowFar) -> Result<()> {
        match self.inode_lock_in_hand(inode) {
            Some(_guard) => self.write_back(inode, what).await,
            None => self.lock(LockName::Inode(inode.ino.0), Mode::PR, Scope::Server).await.map(drop),
        }
    }

    /// Before the inode's lock goes: nobody is inside. The device has the data afterwards, for every node.
    pub(crate) async fn write_back_for_release(&self, inode: &Arc<Inode>) -> Result<()> {
        self.write_back(inode, HowFar::All).await?;
        self.flush_data_of(inode).await
    }

    /// `fsync`: returns when all that was written before, on any node, is stable, or with the error of an earlier write-back.
    pub(crate) async fn make_stable(&self, inode: &Arc<Inode>, data_only: bool) -> Result<()> {
        self.write_back_under_lock(inode, if data_only { HowFar::Data } else { HowFar::All }).await?;
        let (last_txn, error) = {
            let mut state = inode.data.lock();
            (state.last_txn, state.error.take())
        };
        if let Some(error) = error {
            return Err(error);
        }
        self.flush_data_of(inode).await?;
        self.commit_changes(last_txn).await
    }

    /// Writes back what has promised space. Who calls keeps a group from going: no group is waited for, and an inode
    /// in which somebody may be waiting for one is left out.
    pub(crate) async fn write_back_promised(&self) {
        for inode in self.table.all() {
            if inode.data.lock().promise.is_none() {
                continue;
            }
            let (Some(_guard), Ok(_alone)) = (self.inode_lock_in_hand(&inode), inode.writeback.try_lock())
            else {
                continue;
            };
            let mut most = BATCH_BLOCKS;
            loop {
                match self.write_back_batch(&inode, HowFar::AtOnce, &mut most).await {
                    Ok(true) => {}
                    Ok(false) => break,
                    // The end of this node's access: the lock that wanted this is kept.
                    Err(_) => return,
                }
            }
        }
    }

    /// Makes completed data writes of an inode stable.
    async fn flush_data_of(&self, inode: &Inode) -> Result<()> {
        let last_write = inode.data.lock().last_write;
        if let Some(seq) = last_write {
            self.flush_upto(seq).await?;
            inode.data.lock().flushed(seq);
        }
        Ok(())
    }

    /// Makes all data writes stable that have completed.
    pub(crate) async fn flush_all(&self) -> Result<()> {
        self.flush_upto(self.data.flush.latest()).await
    }

    /// Makes data writes stable. After a flush that failed none is ever reported stable again: this node withdraws.
    pub(super) async fn flush_upto(&self, seq: WriteSeq) -> Result<()> {
        let result = self.data.flush.upto(seq).await;
        if let Err(error) = &result {
            self.withdraw(&format!("the device could not be flushed: {error}"));
        }
        result
    }

    /// Makes an inode's changes stable. If none is known, the last may have been before it was forgotten.
    pub(crate) async fn commit_changes(&self, last: Option<TxnSeq>) -> Result<()> {
        match last {
            Some(txn) => self.store.commit_upto(txn).await,
            None => self.store.commit().await,
        }
    }
}
