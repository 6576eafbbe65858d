//! Orphans: inodes without a name, freed when no node has them open; truncations a crash cut short.
//!
//! Every step is a transaction of its own and can be the last: whoever owns the table next goes on. The orphan's
//! entry goes together with its dinode.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use dlm::Mode;
use lcl::{Guard, Scope};
use storage_control::BlockAddr;

use crate::background::Background;
use crate::error::FsError;
use crate::filesystem::{Filesystem, Held};
use crate::format::dinode::flags;
use crate::format::superblock::Superblock;
use crate::inode::{self, Dinode, FREE_STEP_CREDITS};
use crate::inode_table::Inode;
use crate::lock_name::LockName;
use crate::ops::{Ino, Result};
use crate::orphan::{self, Orphan, OrphanKind, Table};

/// Root block of the orphan table in a journal's region.
pub(crate) fn orphan_root(journal_start: BlockAddr) -> BlockAddr {
    BlockAddr(journal_start.0 + 2)
}

/// How often, and after what time again, an orphan table that is in use is asked for.
const ADOPT_TRIES: u32 = 20;
const ADOPT_AGAIN: Duration = Duration::from_millis(500);

impl Filesystem {
    /// An inode of this node lost its last name.
    pub(crate) fn reap_later(&self, inode: Arc<Inode>) {
        let orphan = Orphan { ino: inode.ino.0, generation: inode.generation, kind: OrphanKind::Free };
        drop(inode);
        let stop = self.background.clone();
        self.process_later(stop, self.orphans.clone(), orphan, ());
    }

    /// What the last mount of this journal left.
    pub(crate) fn adopt_own_orphans(&self) {
        for orphan in self.orphans.list() {
            self.process_later(self.background.clone(), self.orphans.clone(), orphan, ());
        }
    }

    /// Takes over the orphans of a dead node: its journal has been replayed and its locks are free. Returns how
    /// many there are; they are dealt with in the background. If the node comes back before that, it gets its
    /// table back and goes on by itself.
    pub async fn adopt(&self, journal: u16) -> Result<usize> {
        self.writable()?;
        if journal == self.journal {
            return Ok(0);
        }
        let Some(guard) = self.free_table(journal).await? else { return Ok(0) };
        // Read anew: the journal may have been made after this node mounted.
        let (superblock, _) = Superblock::read(&*self.device, self.geometry.fs_start).await?;
        let start = superblock.journal(journal).ok_or(FsError::Invalid)?;
        let table = Table::load(&self.store, journal, orphan_root(start)).await?;
        let orphans = table.list();
        let stop = Background::default();
        self.adoptions.lock().insert(journal, stop.clone());
        // The lock goes when the last of them is done or stopped.
        let guard = Arc::new(guard);
        for orphan in &orphans {
            self.process_later(stop.clone(), table.clone(), *orphan, guard.clone());
        }
        Ok(orphans.len())
    }

    /// The lock of an orphan table that nobody uses. `None`: somebody does, who keeps it until he unmounts and looks after
    /// it himself; it must not be waited for, since this node could not leave before him.
    async fn free_table(&self, journal: u16) -> Result<Option<Guard>> {
        for _ in 0..ADOPT_TRIES {
            if let Some(guard) = self.try_lock(LockName::Orphans(journal), Mode::EX, Scope::Server).await? {
                return Ok(Some(guard));
            }
            // Perhaps its shard is still being put together.
            if self.background.unless_stopped(self.runtime.sleep(ADOPT_AGAIN)).await.is_none() {
                break;
            }
        }
        Ok(None)
    }

    /// The owner of an adopted table is back and wants it.
    pub(crate) fn give_back_orphans(&self, journal: u16) {
        if let Some(stop) = self.adoptions.lock().remove(&journal) {
            stop.begin_stop();
        }
    }

    fn process_later(&self, stop: Background, table: Table, orphan: Orphan, keep: impl Send + 'static) {
        let Some(fs) = self.this.upgrade() else { return };
        self.background.spawn(&*self.runtime, async move {
            let work = async {
                match orphan.kind {
                    OrphanKind::Free => fs.reap(&stop, &table, orphan).await,
                    OrphanKind::Truncate => fs.truncate_on(&stop, &table, orphan).await,
                }
            };
            if let Err(error) = work.await
                && fs.alive().is_ok()
            {
                // It stays in the table: the next mount tries again, and fsck reports what is wrong with it.
                tracing::error!(%error, ino = orphan.ino, "an orphan cannot be freed");
            }
            drop(keep);
        });
    }

    /// Waits for a lock unless stopped, by the table's owner or by the unmount.
    async fn lock_unless_stopped(
        &self,
        stop: &Background,
        name: LockName,
        scope: Scope,
    ) -> Result<Option<lcl::Guard>> {
        let lock = stop.unless_stopped(self.lock(name, Mode::EX, scope));
        match self.background.unless_stopped(lock).await.flatten() {
            Some(guard) => guard.map(Some),
            None => Ok(None),
        }
    }

    /// Frees an orphan as soon as nobody has it open.
    async fn reap(&self, stop: &Background, table: &Table, orphan: Orphan) -> Result<()> {
        loop {
            if let Some(inode) = self.table.get(Ino(orphan.ino))
                && inode.generation == orphan.generation
            {
                let closed = stop.unless_stopped(inode.wait_closed());
                if self.background.unless_stopped(closed).await.flatten().is_none() {
                    return Ok(());
                }
            }
            let open = LockName::Open(orphan.ino);
            let Some(_open) = self.lock_unless_stopped(stop, open, Scope::Server).await? else {
                return Ok(());
            };
            let Some(mut held) = self.hold_orphan(stop, table, orphan, flags::ORPHAN).await? else {
                return Ok(());
            };
            if held.inode.is_open() {
                continue;
            }
            held.inode.reaped.store(true, SeqCst);
            return self.free(stop, table, &mut held).await;
        }
    }

    /// Finishes a truncation.
    async fn truncate_on(&self, stop: &Background, table: &Table, orphan: Orphan) -> Result<()> {
        let Some(mut held) = self.hold_orphan(stop, table, orphan, flags::TRUNCATING).await? else {
            return Ok(());
        };
        let inode = held.inode.clone();
        let _no_writeback = inode.writeback.lock().await;
        self.read_again(&mut held).await?;
        self.finish_truncation(&mut held, table).await
    }

    /// Locks an orphan. An entry whose inode does not bear its mark is done with and goes.
    async fn hold_orphan(
        &self,
        stop: &Background,
        table: &Table,
        orphan: Orphan,
        mark: u32,
    ) -> Result<Option<Held>> {
        let ino = Ino(orphan.ino);
        let name = LockName::Inode(orphan.ino);
        let Some(guard) = self.lock_unless_stopped(stop, name, Scope::Process).await? else {
            return Ok(None);
        };
        let dinode = inode::read(&self.store, orphan.ino).await;
        match dinode {
            Ok(dinode) if dinode.generation == orphan.generation && dinode.has(mark) => {
                let inode = self.table.get_or_insert(ino, dinode.generation);
                Ok(Some(Held { guard, inode, dinode }))
            }
            Ok(_) => {
                let mut txn = self.store.begin(orphan::REMOVE_CREDITS).await?;
                let result = table.remove(&mut txn, orphan.ino, orphan.kind).await;
                self.finish(txn, result)?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Frees everything of an inode that nobody can reach any more.
    async fn free(&self, stop: &Background, table: &Table, held: &mut Held) -> Result<()> {
        let inode = held.inode.clone();
        let _no_writeback = inode.writeback.lock().await;
        self.forget_data(&inode);
        self.read_again(held).await?;
        while let Some(step) = inode::next_to_free(&self.store, &held.dinode).await? {
            if stop.is_stopping() || self.background.is_stopping() {
                return Ok(());
            }
            let guard = self.alloc.lock_groups_for_free(&[step.addr]).await?;
            let _edit = inode.edit.write().await;
            let mut txn = self.store.begin(FREE_STEP_CREDITS + 1 + guard.credits()).await?;
            let result = async {
                inode::free_step(&self.store, &mut txn, &guard, &mut held.dinode, step).await?;
                inode::write(&mut txn, &held.dinode).await
            }
            .await;
            self.finish(txn, result)?;
        }
        self.free_dinode(table, &held.dinode).await
    }

    async fn free_dinode(&self, table: &Table, dinode: &Dinode) -> Result<()> {
        let guard = self.alloc.lock_groups_for_free(&[dinode.addr()]).await?;
        let mut txn = self.store.begin(1 + orphan::REMOVE_CREDITS + guard.credits()).await?;
        let result = async {
            table.remove(&mut txn, dinode.ino, OrphanKind::Free).await?;
            guard.free_meta(&mut txn, dinode.addr()).await
        }
        .await;
        self.finish(txn, result)
    }

    /// Nobody will read what is dirty.
    fn forget_data(&self, inode: &Inode) {
        let mut state = inode.data.lock();
        let freed = state.chunks.cut(0);
        state.pending = Default::default();
        state.promise = None;
        state.dirty_since = None;
        drop(state);
        self.data.sub_busy(freed);
    }
}
