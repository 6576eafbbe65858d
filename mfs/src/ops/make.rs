//! New names: `mknod`, `create`, `mkdir`, `symlink`, `link`.
//!
//! The directory is locked first. A new inode's block is reserved, then its lock is taken, then the
//! transaction begins. In a group this node masters none of that costs a message.

use dlm::Mode;
use lcl::{Guard, Scope};

use super::{Attr, Caller, Ino, Result};
use crate::alloc::Want;
use crate::dir::{self, Target};
use crate::error::FsError;
use crate::filesystem::{Filesystem, group_of, later};
use crate::format::dinode::AREA_SIZE;
use crate::inode::{self, Content, Dinode, FileType, Needs};
use crate::lock_name::LockName;

/// What a new inode is.
pub(super) struct New<'a> {
    pub(super) kind: FileType,
    /// Low twelve bits of `st_mode`.
    pub(super) perm: u32,
    pub(super) rdev: u32,
    /// Target of a symbolic link, else nothing.
    pub(super) target: &'a [u8],
    /// Take the open lock too.
    pub(super) open: bool,
}

/// A new inode, counted as looked up.
pub(super) struct Made {
    pub(super) attr: Attr,
    /// Held still: nobody else has seen the inode.
    pub(super) guard: Guard,
    pub(super) open_lock: Option<Guard>,
}

const S_ISGID: u32 = libc::S_ISGID;

impl Filesystem {
    pub(super) async fn make(&self, caller: Caller, parent: Ino, name: &[u8], new: New<'_>) -> Result<Made> {
        self.writable()?;
        dir::check_name(name)?;
        if new.target.len() > AREA_SIZE {
            return Err(FsError::NameTooLong);
        }
        let mut dir = self.hold(parent, Mode::EX).await?;
        dir.as_live_dir()?;
        if dir::lookup(&self.store, &dir.dinode, name).await?.is_some() {
            return Err(FsError::Exists);
        }
        let is_dir = new.kind == FileType::Directory;
        if is_dir && dir.dinode.nlink == u32::MAX {
            return Err(FsError::TooManyLinks);
        }
        let needs = dir::insert_needs(&dir.dinode) + Needs { meta: 1, credits: 2 };
        // Directories are spread, what is in them lies near them.
        let near = if is_dir { Some(self.alloc.spread()) } else { group_of(&self.geometry, parent) };
        let mut reservation = self.alloc.reserve(Want { meta: needs.meta, near, ..Want::default() }).await?;
        let ino = Ino(reservation.meta().0);
        let guard = self.lock(LockName::Inode(ino.0), Mode::EX, Scope::Process).await?;
        let open_lock = match new.open {
            true => Some(self.lock(LockName::Open(ino.0), Mode::PR, Scope::Server).await?),
            false => None,
        };

        let now = self.now();
        let dinode = self.new_dinode(caller, &dir.dinode, ino, &new);
        let mut txn = self.store.begin(needs.credits + reservation.credits()).await?;
        let result = async {
            inode::create(&mut txn, &dinode);
            reservation.log_meta(&mut txn, ino.block()).await?;
            dir::insert(&self.store, &mut txn, &mut reservation, &mut dir.dinode, name, Target::of(&dinode))
                .await?;
            dir.dinode.nlink += u32::from(is_dir);
            touch_dir(&mut dir.dinode, now);
            inode::write(&mut txn, &dir.dinode).await
        }
        .await;
        let inode = self.table.looked_up(ino, dinode.generation);
        self.changed(&txn, &inode);
        self.changed(&txn, &dir.inode);
        self.finish(txn, result)?;
        Ok(Made { attr: self.attr(&inode, &dinode), guard, open_lock })
    }

    fn new_dinode(&self, caller: Caller, dir: &Dinode, ino: Ino, new: &New<'_>) -> Dinode {
        let generation = self.clock.tick().0;
        let mut dinode = Dinode::new(ino.0, generation, new.kind, new.perm, self.now());
        dinode.uid = caller.uid;
        dinode.gid = caller.gid;
        if dir.perm & S_ISGID != 0 {
            dinode.gid = dir.gid;
            if new.kind == FileType::Directory {
                dinode.perm |= S_ISGID;
            }
        }
        dinode.rdev = new.rdev.into();
        if new.kind == FileType::Directory {
            dinode.parent = dir.ino;
        }
        if new.kind == FileType::Symlink {
            dinode.size = new.target.len() as u64;
            dinode.content = Content::Data(new.target.to_vec());
        }
        dinode
    }

    pub(super) async fn add_link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Attr> {
        self.writable()?;
        dir::check_name(name)?;
        let mut dir = self.hold(parent, Mode::EX).await?;
        dir.as_live_dir()?;
        if ino == parent {
            return Err(FsError::Perm);
        }
        let mut file = self.hold(ino, Mode::EX).await?;
        if file.dinode.is_dir() {
            return Err(FsError::Perm);
        }
        if file.dinode.nlink == 0 {
            return Err(FsError::NotFound);
        }
        if file.dinode.nlink == u32::MAX {
            return Err(FsError::TooManyLinks);
        }
        if dir::lookup(&self.store, &dir.dinode, name).await?.is_some() {
            return Err(FsError::Exists);
        }
        let needs = dir::insert_needs(&dir.dinode) + Needs { meta: 0, credits: 2 };
        let near = group_of(&self.geometry, parent);
        let mut reservation = self.alloc.reserve(Want { meta: needs.meta, near, ..Want::default() }).await?;

        let inode = file.inode.clone();
        let _edit = inode.edit.write().await;
        self.read_again(&mut file).await?;
        let now = self.now();
        let mut txn = self.store.begin(needs.credits + reservation.credits()).await?;
        let target = Target::of(&file.dinode);
        let result = async {
            dir::insert(&self.store, &mut txn, &mut reservation, &mut dir.dinode, name, target).await?;
            touch_dir(&mut dir.dinode, now);
            inode::write(&mut txn, &dir.dinode).await?;
            file.dinode.nlink += 1;
            self.touch_inode(&mut file, now);
            inode::write(&mut txn, &file.dinode).await
        }
        .await;
        self.changed(&txn, &file.inode);
        self.changed(&txn, &dir.inode);
        self.finish(txn, result)?;
        self.table.looked_up(ino, file.dinode.generation);
        Ok(self.attr(&file.inode, &file.dinode))
    }
}

/// The directory's entries changed.
pub(super) fn touch_dir(dir: &mut Dinode, now: storage_control::WallTime) {
    dir.mtime = later(dir.mtime, now);
    dir.ctime = later(dir.ctime, now);
}
