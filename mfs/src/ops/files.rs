//! Open files and directories.

use dlm::Mode;
use lcl::{Guard, Scope};
use std::sync::atomic::Ordering::SeqCst;

use super::make::{Made, New};
use super::{Attr, Caller, Dirent, Handle, Ino, Opened, ReadBuf, Result, Write};
use crate::dir;
use crate::error::FsError;
use crate::filesystem::{Filesystem, Held, OpenFile};
use crate::format::dirent::{COOKIE_DOT, COOKIE_DOTDOT};
use crate::inode::FileType;
use crate::lock_name::LockName;

/// What `flags` of `open(2)` ask for.
struct Access {
    read: bool,
    write: bool,
}

impl Access {
    fn of(flags: i32) -> Result<Self> {
        match flags & libc::O_ACCMODE {
            libc::O_RDONLY => Ok(Self { read: true, write: false }),
            libc::O_WRONLY => Ok(Self { read: false, write: true }),
            libc::O_RDWR => Ok(Self { read: true, write: true }),
            _ => Err(FsError::Invalid),
        }
    }

    fn both(&self) -> bool {
        self.read && self.write
    }
}

impl Filesystem {
    pub(super) async fn open_by_number(&self, ino: Ino, flags: i32) -> Result<Opened> {
        let access = Access::of(flags)?;
        if access.write {
            self.writable()?;
        }
        // Before the inode's lock, as the reaper does.
        let open_lock = self.lock(LockName::Open(ino.0), Mode::PR, Scope::Server).await?;
        let mode = if access.both() { Mode::EX } else { Mode::PR };
        let held = self.hold(ino, mode).await?;
        match held.dinode.kind {
            FileType::Regular => {}
            FileType::Directory if access.write => return Err(FsError::IsDir),
            FileType::Symlink => return Err(FsError::Loop),
            _ => return Err(FsError::Invalid),
        }
        if held.inode.reaped.load(SeqCst) {
            return Err(FsError::Stale);
        }
        Ok(self.opened(&held, access, open_lock))
    }

    fn opened(&self, held: &Held, access: Access, open_lock: Guard) -> Opened {
        held.inode.opened(access.both(), open_lock);
        let (read, write) = (access.read, access.write);
        let handle = self.open_file(OpenFile { inode: held.inode.clone(), read, write, dir: false });
        // Writes go past the page cache: no page is locked while one waits for a cluster lock, and an append
        // arrives whole. Every change gives a new modification time, by which a kernel knows its old pages.
        Opened { handle, direct_io: write, keep_cache: !write }
    }

    pub(super) async fn create_and_open(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        perm: u32,
        flags: i32,
    ) -> Result<(Attr, Opened)> {
        let access = Access::of(flags)?;
        let new = New { kind: FileType::Regular, perm, rdev: 0, target: &[], open: true };
        let made = match self.make(caller, parent, name, new).await {
            // It was not there when the caller looked. Whether he may open it is for him to find out.
            Err(FsError::Exists) if flags & libc::O_EXCL == 0 => return Err(FsError::Stale),
            made => made?,
        };
        let Made { attr, guard, open_lock } = made;
        let held = self.with_dinode(attr.ino, guard).await?;
        let open_lock = open_lock.expect("the open lock was asked for");
        Ok((attr, self.opened(&held, access, open_lock)))
    }

    pub(super) async fn read_handle(&self, handle: Handle, offset: u64, len: usize) -> Result<ReadBuf> {
        let file = self.file(handle)?;
        if !file.read && !file.write {
            return Err(FsError::BadFd);
        }
        let held = self.hold_file(&file, Mode::PR).await?;
        self.read_file(&held, offset, len, file.write).await
    }

    pub(super) async fn write_handle(&self, handle: Handle, write: Write) -> Result<usize> {
        self.writable()?;
        let file = self.file(handle)?;
        if !file.write {
            return Err(FsError::BadFd);
        }
        let sync = write.sync;
        let written = self.write_file(&file, write).await?;
        if sync {
            self.make_stable(&file.inode, false).await?;
        }
        Ok(written)
    }

    /// Locks the inode of an open file. It cannot be another than the one that was opened: the open lock keeps
    /// it.
    pub(crate) async fn hold_file(&self, file: &OpenFile, mode: Mode) -> Result<Held> {
        let held = self.hold(file.inode.ino, mode).await?;
        if held.dinode.generation != file.inode.generation { Err(FsError::Stale) } else { Ok(held) }
    }

    pub(super) fn take_error(&self, handle: Handle) -> Result<()> {
        self.alive()?;
        let file = self.file(handle)?;
        let error = file.inode.data.lock().error.take();
        error.map_or(Ok(()), Err)
    }

    pub(super) fn release_handle(&self, handle: Handle) -> Result<()> {
        let file = self.close_file(handle)?;
        file.end();
        let ino = file.inode.ino;
        drop(file);
        self.table.release_unused(ino);
        Ok(())
    }

    pub(super) async fn fsync_handle(&self, handle: Handle, data_only: bool) -> Result<()> {
        self.alive()?;
        let file = self.file(handle)?;
        self.make_stable(&file.inode, data_only).await
    }

    pub(super) async fn open_dir(&self, ino: Ino) -> Result<Handle> {
        let held = self.hold(ino, Mode::PR).await?;
        if !held.dinode.is_dir() {
            return Err(FsError::NotDir);
        }
        Ok(self.open_file(OpenFile { inode: held.inode.clone(), read: true, write: false, dir: true }))
    }

    async fn hold_dir(&self, handle: Handle) -> Result<Held> {
        let file = self.file(handle)?;
        if !file.dir {
            return Err(FsError::NotDir);
        }
        // An open directory that was removed meanwhile has no entries.
        self.hold_file(&file, Mode::PR)
            .await
            .map_err(|e| if let FsError::Stale = e { FsError::NotFound } else { e })
    }

    pub(super) async fn list_dir(&self, handle: Handle, from: u64, max: usize) -> Result<Vec<Dirent>> {
        let held = self.hold_dir(handle).await?;
        Ok(self.entries(&held, from, max).await?.into_iter().map(|(dirent, _)| dirent).collect())
    }

    /// Entries with what they were made of, which `.` and `..` do not have.
    async fn entries(
        &self,
        held: &Held,
        from: u64,
        max: usize,
    ) -> Result<Vec<(Dirent, Option<dir::Dirent>)>> {
        let mut list = Vec::new();
        if held.dinode.nlink == 0 {
            return Ok(list);
        }
        let own = |cookie, ino, name: &[u8]| {
            (Dirent { ino: Ino(ino), next: cookie, file_type: libc::S_IFDIR, name: name.to_vec() }, None)
        };
        if from < COOKIE_DOT && list.len() < max {
            list.push(own(COOKIE_DOT, held.dinode.ino, b"."));
        }
        if from < COOKIE_DOTDOT && list.len() < max {
            list.push(own(COOKIE_DOTDOT, held.dinode.parent, b".."));
        }
        let rest = max - list.len();
        for entry in dir::list(&self.store, &held.dinode, from.max(COOKIE_DOTDOT), rest).await? {
            let (next, file_type) = (entry.cookie, entry.kind.mode_bits());
            let dirent = Dirent { ino: Ino(entry.ino), next, file_type, name: entry.name.clone() };
            list.push((dirent, Some(entry)));
        }
        Ok(list)
    }

    pub(super) async fn list_dir_plus(
        &self,
        handle: Handle,
        from: u64,
        max: usize,
    ) -> Result<Vec<(Dirent, Attr)>> {
        let held = self.hold_dir(handle).await?;
        let mut list = Vec::new();
        for (dirent, entry) in self.entries(&held, from, max).await? {
            let attr = match entry {
                Some(entry) => {
                    let child = self.hold_entry(&entry, Mode::PR).await?;
                    let inode = self.table.looked_up(child.ino(), child.dinode.generation);
                    self.attr(&inode, &child.dinode)
                }
                // Of `..` nobody uses more than the number, and its lock comes before this one.
                None => Attr { ino: dirent.ino, ..self.attr(&held.inode, &held.dinode) },
            };
            list.push((dirent, attr));
        }
        Ok(list)
    }

    pub(super) async fn fsync_dir(&self, handle: Handle) -> Result<()> {
        self.alive()?;
        let file = self.file(handle)?;
        let last = file.inode.data.lock().last_txn;
        self.commit_changes(last).await
    }
}
