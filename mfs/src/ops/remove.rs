//! Names that go: `unlink`, `rmdir`.
//!
//! An inode that loses its last name becomes an orphan in the same transaction; the reaper frees it when no
//! node has it open any more.

use dlm::Mode;

use super::make::touch_dir;
use super::{Ino, Result};
use crate::alloc::{Reservation, Want};
use crate::dir;
use crate::error::FsError;
use crate::filesystem::{Filesystem, Held};
use crate::format::dinode::flags;
use crate::inode;
use crate::orphan::{Orphan, OrphanKind, Slot};
use crate::store::Txn;

impl Filesystem {
    /// Removes a name: of an empty directory, or of anything but a directory.
    pub(super) async fn remove_name(&self, parent: Ino, name: &[u8], is_rmdir: bool) -> Result<()> {
        self.writable()?;
        dir::check_name(name)?;
        let mut dir = self.hold(parent, Mode::EX).await?;
        dir.as_live_dir()?;
        let removal = dir::plan_remove(&self.store, &dir.dinode, name).await?.ok_or(FsError::NotFound)?;
        let mut child = self.hold_entry(&removal.dirent, Mode::EX).await?;
        match (is_rmdir, child.dinode.is_dir()) {
            (true, false) => return Err(FsError::NotDir),
            (false, true) => return Err(FsError::IsDir),
            (true, true) if !dir::is_empty(&child.dinode) => return Err(FsError::NotEmpty),
            (true, true) | (false, false) => {}
        }
        let slot = self.orphan_slot_for(&child);
        let mut reservation = self.reserve_slot(slot.as_ref()).await?;
        // Two group locks are not waited for at a time: then the empty leaf stays, for later names.
        let leaf_guard = match removal.frees {
            Some(leaf) if reservation.is_none() => Some(self.alloc.lock_groups_for_free(&[leaf]).await?),
            Some(_) | None => None,
        };

        let inode = child.inode.clone();
        let _edit = inode.edit.write().await;
        self.read_again(&mut child).await?;
        let now = self.now();
        let credits = dir::REMOVE_CREDITS
            + 2
            + slot.as_ref().map_or(0, |slot| slot.needs().credits)
            + reservation.as_ref().map_or(0, Reservation::credits)
            + leaf_guard.as_ref().map_or(0, |guard| guard.credits());
        let mut txn = self.store.begin(credits).await?;
        let result = async {
            dir::remove(&self.store, &mut txn, leaf_guard.as_ref(), &mut dir.dinode, &removal).await?;
            dir.dinode.nlink -= u32::from(is_rmdir);
            touch_dir(&mut dir.dinode, now);
            inode::write(&mut txn, &dir.dinode).await?;
            self.touch_inode(&mut child, now);
            self.drop_name(&mut txn, &mut child, slot, reservation.as_mut()).await
        }
        .await;
        self.changed(&txn, &child.inode);
        self.changed(&txn, &dir.inode);
        self.finish(txn, result)?;
        self.reap_if_orphan(&child);
        Ok(())
    }

    /// A slot in the orphan table for an inode that is about to lose a name, if that is its last.
    pub(super) fn orphan_slot_for(&self, child: &Held) -> Option<Slot> {
        (child.dinode.is_dir() || child.dinode.nlink == 1).then(|| self.orphans.slot())
    }

    /// Space for the growth of the orphan table.
    pub(crate) async fn reserve_slot(&self, slot: Option<&Slot>) -> Result<Option<Reservation>> {
        match slot.map_or(0, |slot| slot.needs().meta) {
            0 => Ok(None),
            meta => Ok(Some(self.alloc.reserve(Want { meta, urgent: true, ..Want::default() }).await?)),
        }
    }

    /// Takes a name away from the inode and writes its dinode; without names it is an orphan.
    pub(super) async fn drop_name(
        &self,
        txn: &mut Txn,
        child: &mut Held,
        slot: Option<Slot>,
        reservation: Option<&mut Reservation>,
    ) -> Result<()> {
        match slot {
            None => child.dinode.nlink -= 1,
            Some(slot) => {
                child.dinode.nlink = 0;
                child.dinode.set(flags::ORPHAN, true);
                let (ino, generation) = (child.dinode.ino, child.dinode.generation);
                let orphan = Orphan { ino, generation, kind: OrphanKind::Free };
                self.orphans.add(txn, reservation, slot, orphan).await?;
            }
        }
        inode::write(txn, &child.dinode).await
    }

    pub(super) fn reap_if_orphan(&self, child: &Held) {
        if child.dinode.has(flags::ORPHAN) {
            self.reap_later(child.inode.clone());
        }
    }
}
