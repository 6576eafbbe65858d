//! [`Operations`] of a mounted filesystem: each is carried out in the module of its kind.

use super::make::New;
use super::rename::Place;
use super::*;
use crate::filesystem::Filesystem;
use crate::inode::FileType;

impl Operations for Filesystem {
    fn root(&self) -> Ino {
        self.root_ino()
    }

    async fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr> {
        self.find(parent, name).await
    }

    fn forget(&self, ino: Ino, count: u64) {
        self.table.forget(ino, count);
    }

    async fn getattr(&self, ino: Ino) -> Result<Fresh> {
        self.attributes(ino).await
    }

    async fn setattr(&self, ino: Ino, set: SetAttr) -> Result<Fresh> {
        self.set_attributes(ino, set).await
    }

    async fn mknod(&self, caller: Caller, parent: Ino, name: &[u8], mode: u32, rdev: u32) -> Result<Attr> {
        let kind = match FileType::from_mode(mode) {
            Some(FileType::Directory) => return Err(FsError::Perm),
            Some(FileType::Symlink) | None => return Err(FsError::Invalid),
            Some(kind) => kind,
        };
        let rdev = if matches!(kind, FileType::CharDevice | FileType::BlockDevice) { rdev } else { 0 };
        let new = New { kind, perm: mode & 0o7777, rdev, target: &[], open: false };
        Ok(self.make(caller, parent, name, new).await?.attr)
    }

    async fn create(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> Result<(Attr, Opened)> {
        self.create_and_open(caller, parent, name, mode & 0o7777, flags).await
    }

    async fn mkdir(&self, caller: Caller, parent: Ino, name: &[u8], mode: u32) -> Result<Attr> {
        // As on other filesystems of Linux, set-id bits are not for `mkdir` to set.
        let perm = mode & 0o1777;
        let new = New { kind: FileType::Directory, perm, rdev: 0, target: &[], open: false };
        Ok(self.make(caller, parent, name, new).await?.attr)
    }

    async fn symlink(&self, caller: Caller, parent: Ino, name: &[u8], target: &[u8]) -> Result<Attr> {
        if target.is_empty() {
            return Err(FsError::NotFound);
        }
        let new = New { kind: FileType::Symlink, perm: 0o777, rdev: 0, target, open: false };
        Ok(self.make(caller, parent, name, new).await?.attr)
    }

    async fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        self.link_target(ino).await
    }

    async fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Attr> {
        self.add_link(ino, parent, name).await
    }

    async fn unlink(&self, parent: Ino, name: &[u8]) -> Result<()> {
        self.remove_name(parent, name, false).await
    }

    async fn rmdir(&self, parent: Ino, name: &[u8]) -> Result<()> {
        self.remove_name(parent, name, true).await
    }

    async fn rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        let (from, to) = (Place { dir: parent, name }, Place { dir: new_parent, name: new_name });
        self.move_name(from, to, flags).await
    }

    async fn open(&self, ino: Ino, flags: i32) -> Result<Opened> {
        self.open_by_number(ino, flags).await
    }

    async fn read(&self, handle: Handle, offset: u64, len: usize) -> Result<ReadBuf> {
        self.read_handle(handle, offset, len).await
    }

    async fn write(&self, handle: Handle, write: Write) -> Result<usize> {
        self.write_handle(handle, write).await
    }

    async fn flush(&self, handle: Handle) -> Result<()> {
        self.take_error(handle)
    }

    async fn release(&self, handle: Handle) -> Result<()> {
        self.release_handle(handle)
    }

    async fn fsync(&self, handle: Handle, data_only: bool) -> Result<()> {
        self.fsync_handle(handle, data_only).await
    }

    async fn opendir(&self, ino: Ino) -> Result<Handle> {
        self.open_dir(ino).await
    }

    async fn readdir(&self, handle: Handle, from: u64, max: usize) -> Result<Vec<Dirent>> {
        self.list_dir(handle, from, max).await
    }

    async fn readdirplus(&self, handle: Handle, from: u64, max: usize) -> Result<Vec<(Dirent, Attr)>> {
        self.list_dir_plus(handle, from, max).await
    }

    async fn releasedir(&self, handle: Handle) -> Result<()> {
        self.release_handle(handle)
    }

    async fn fsyncdir(&self, handle: Handle) -> Result<()> {
        self.fsync_dir(handle).await
    }

    async fn statfs(&self) -> Result<StatFs> {
        self.usage().await
    }

    async fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], how: XattrSet) -> Result<()> {
        self.set_xattr(ino, name, value, how).await
    }

    async fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        self.xattr_value(ino, name).await
    }

    async fn listxattr(&self, ino: Ino) -> Result<Vec<u8>> {
        self.xattr_names(ino).await
    }

    async fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        self.remove_xattr(ino, name).await
    }
}
