//! `lookup`, `getattr`, `setattr`, extended attributes, `readlink`, `statfs`.

use std::sync::atomic::Ordering::SeqCst;

use dlm::Mode;

use super::{Attr, Fresh, Ino, Result, SetAttr, SetTime, StatFs, XattrSet};
use crate::alloc::Want;
use crate::dir;
use crate::error::FsError;
use crate::filesystem::{Filesystem, Held, later};
use crate::inode::{self, Content, FileType};
use crate::xattr;
use storage_control::WallTime;

impl Filesystem {
    pub(super) async fn find(&self, parent: Ino, name: &[u8]) -> Result<Attr> {
        dir::check_name(name)?;
        let dir = self.hold(parent, Mode::PR).await?;
        dir.as_live_dir()?;
        let entry = dir::lookup(&self.store, &dir.dinode, name).await?.ok_or(FsError::NotFound)?;
        if entry.ino == parent.0 {
            return Err(FsError::corrupt("directory", parent.block(), "it contains itself"));
        }
        // The directory stays locked: until the inode is, its name keeps it alive.
        let child = self.hold_entry(&entry, Mode::PR).await?;
        let inode = self.table.looked_up(child.ino(), child.dinode.generation);
        Ok(self.attr(&inode, &child.dinode))
    }

    /// Attributes of a locked inode for a kernel to keep until the lease ends or the lock goes.
    fn fresh(&self, held: &Held) -> Fresh {
        let valid_for = (self.lease)();
        if !valid_for.is_zero() {
            held.inode.attributes_given.store(true, SeqCst);
        }
        Fresh { attr: self.attr(&held.inode, &held.dinode), valid_for }
    }

    pub(super) async fn attributes(&self, ino: Ino) -> Result<Fresh> {
        let held = self.hold(ino, Mode::PR).await?;
        Ok(self.fresh(&held))
    }

    pub(super) async fn set_attributes(&self, ino: Ino, set: SetAttr) -> Result<Fresh> {
        self.writable()?;
        let mut held = self.hold(ino, Mode::EX).await?;
        if let Some(size) = set.size {
            match held.dinode.kind {
                FileType::Regular => self.set_size(&mut held, size).await?,
                FileType::Directory => return Err(FsError::IsDir),
                _ => return Err(FsError::Invalid),
            }
        }
        if set.mode.or(set.uid).or(set.gid).is_some() || set.atime.is_some() || set.mtime.is_some() {
            self.set_other(&mut held, set).await?;
        }
        Ok(self.fresh(&held))
    }

    async fn set_other(&self, held: &mut Held, set: SetAttr) -> Result<()> {
        let inode = held.inode.clone();
        let _edit = inode.edit.write().await;
        self.read_again(held).await?;
        let mut txn = self.store.begin(1).await?;
        let now = self.now();
        let at = |time| match time {
            SetTime::At(time) => time,
            SetTime::Now => now,
        };
        {
            let mut state = inode.data.lock();
            let d = &mut held.dinode;
            if let Some(mode) = set.mode {
                d.perm = mode & 0o7777;
                state.pending.clear_perm = 0;
            }
            d.uid = set.uid.unwrap_or(d.uid);
            d.gid = set.gid.unwrap_or(d.gid);
            if let Some(atime) = set.atime {
                d.atime = at(atime);
                state.pending.atime = None;
            }
            if let Some(mtime) = set.mtime {
                d.mtime = match mtime {
                    SetTime::At(time) => time,
                    SetTime::Now => later(state.pending.mtime.unwrap_or(d.mtime), now),
                };
                state.pending.mtime = None;
            }
        }
        self.touch_inode(held, now);
        let result = inode::write(&mut txn, &held.dinode).await;
        self.changed(&txn, &inode);
        self.finish(txn, result)
    }

    /// The change time rises, also above one that is not in the dinode yet.
    pub(crate) fn touch_inode(&self, held: &mut Held, now: WallTime) {
        let old = held.inode.data.lock().pending.ctime.take();
        held.dinode.ctime = later(old.unwrap_or(held.dinode.ctime), now);
    }

    /// Reads the dinode again, now that nobody else can change it: write-back may have, since the inode was
    /// locked.
    pub(crate) async fn read_again(&self, held: &mut Held) -> Result<()> {
        held.dinode = inode::read(&self.store, held.inode.ino.0).await?;
        Ok(())
    }

    pub(super) async fn link_target(&self, ino: Ino) -> Result<Vec<u8>> {
        let held = self.hold(ino, Mode::PR).await?;
        match (held.dinode.kind, held.dinode.content) {
            (FileType::Symlink, Content::Data(target)) => Ok(target),
            (FileType::Symlink, _) => {
                Err(FsError::corrupt("symbolic link", ino.block(), "its target is not in the dinode"))
            }
            (_, _) => Err(FsError::Invalid),
        }
    }

    pub(super) async fn set_xattr(&self, ino: Ino, name: &[u8], value: &[u8], how: XattrSet) -> Result<()> {
        let how = match how {
            XattrSet::Any => xattr::SetMode::Any,
            XattrSet::Create => xattr::SetMode::Create,
            XattrSet::Replace => xattr::SetMode::Replace,
        };
        self.check_xattr_name(name)?;
        self.change_xattrs(ino, async |held| xattr::set(&self.store, &held.dinode, name, value, how).await)
            .await
    }

    pub(super) async fn remove_xattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        self.check_xattr_name(name)?;
        self.change_xattrs(ino, async |held| xattr::remove(&self.store, &held.dinode, name).await).await
    }

    async fn change_xattrs(
        &self,
        ino: Ino,
        prepare: impl AsyncFnOnce(&Held) -> Result<xattr::Change>,
    ) -> Result<()> {
        self.writable()?;
        let mut held = self.hold(ino, Mode::EX).await?;
        // Attributes and content share the dinode: no write-back meanwhile.
        let inode = held.inode.clone();
        let _no_writeback = inode.writeback.lock().await;
        self.read_again(&mut held).await?;
        let change = prepare(&held).await?;
        let needs = change.needs();
        let mut reservation = self.alloc.reserve(Want { meta: needs.meta, ..Want::default() }).await?;
        let _edit = inode.edit.write().await;
        let mut txn = self.store.begin(needs.credits + 1 + reservation.credits()).await?;
        let result = async {
            xattr::apply(&mut txn, &mut reservation, &mut held.dinode, change).await?;
            self.touch_inode(&mut held, self.now());
            inode::write(&mut txn, &held.dinode).await
        }
        .await;
        self.changed(&txn, &inode);
        self.finish(txn, result)
    }

    /// ACLs wait for a transport that can negotiate them; kernel capabilities and the like are welcome.
    fn check_xattr_name(&self, name: &[u8]) -> Result<()> {
        if name.starts_with(b"system.") { Err(FsError::NotSupported) } else { Ok(()) }
    }

    pub(super) async fn xattr_value(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        self.check_xattr_name(name)?;
        let held = self.hold(ino, Mode::PR).await?;
        xattr::get(&self.store, &held.dinode, name).await?.ok_or(FsError::NoData)
    }

    pub(super) async fn xattr_names(&self, ino: Ino) -> Result<Vec<u8>> {
        let held = self.hold(ino, Mode::PR).await?;
        let mut names = Vec::new();
        for one in xattr::list(&self.store, &held.dinode).await? {
            names.extend_from_slice(&one.name);
            names.push(0);
        }
        Ok(names)
    }

    pub(super) async fn usage(&self) -> Result<StatFs> {
        self.alive()?;
        let usage = self.alloc.statfs().await?;
        let (blocks, free, available) = (usage.blocks, usage.free, usage.available);
        Ok(StatFs { blocks, free, available, files: blocks, files_free: available })
    }
}
