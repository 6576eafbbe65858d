//! Filesystem operations: the interface transports call, and the filesystem's implementation of it.
//!
//! Every operation takes its cluster locks and reserves its space first, then checks everything that can fail,
//! then changes blocks in one transaction: it happens whole or not at all. Locks are taken parents before
//! children; of two that have no such order the second by try, and the operation starts again if that is
//! refused. Operations are plain `async fn`s of no particular runtime, and they may be polled first in one
//! place and then in another.

mod attributes;
mod files;
mod implementation;
mod make;
mod remove;
mod rename;
mod types;

use std::future::Future;

use crate::error::FsError;

pub use types::*;

/// A result of an operation.
pub type Result<T> = std::result::Result<T, FsError>;

/// What a transport asks of a filesystem. Names are bytes without `/`.
///
/// A future that is dropped before it is ready may leave the operation done or not done, never half done.
pub trait Operations: Send + Sync + 'static {
    /// The inode number of the root directory.
    fn root(&self) -> Ino;

    /// The inode `name` stands for in `parent`. Counts a lookup, as `create`, `mknod`, `mkdir`, `symlink`,
    /// `link` and `readdirplus` do, until [`Operations::forget`].
    fn lookup(&self, parent: Ino, name: &[u8]) -> impl Future<Output = Result<Attr>> + Send;

    /// Takes back `count` lookups.
    fn forget(&self, ino: Ino, count: u64);

    /// The attributes, and how long they may be kept.
    fn getattr(&self, ino: Ino) -> impl Future<Output = Result<Fresh>> + Send;

    /// Changes attributes; a size cuts or extends the file.
    fn setattr(&self, ino: Ino, set: SetAttr) -> impl Future<Output = Result<Fresh>> + Send;

    /// Makes a file, device, pipe or socket (`mode` has the type).
    fn mknod(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        rdev: u32,
    ) -> impl Future<Output = Result<Attr>> + Send;

    /// Makes a regular file, or finds it if it is there and `flags` has no `O_EXCL`, and opens it.
    fn create(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> impl Future<Output = Result<(Attr, Opened)>> + Send;

    /// Makes a directory.
    fn mkdir(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
    ) -> impl Future<Output = Result<Attr>> + Send;

    /// Makes a symbolic link.
    fn symlink(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        target: &[u8],
    ) -> impl Future<Output = Result<Attr>> + Send;

    /// The target of a symbolic link.
    fn readlink(&self, ino: Ino) -> impl Future<Output = Result<Vec<u8>>> + Send;

    /// Gives an inode one more name.
    fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> impl Future<Output = Result<Attr>> + Send;

    /// Removes a name of something that is not a directory.
    fn unlink(&self, parent: Ino, name: &[u8]) -> impl Future<Output = Result<()>> + Send;

    /// Removes an empty directory.
    fn rmdir(&self, parent: Ino, name: &[u8]) -> impl Future<Output = Result<()>> + Send;

    /// Gives `name` in `parent` the new place `new_name` in `new_parent`.
    fn rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Opens a file (`flags` as in `open(2)`).
    fn open(&self, ino: Ino, flags: i32) -> impl Future<Output = Result<Opened>> + Send;

    /// Reads up to `len` bytes at `offset`.
    fn read(&self, handle: Handle, offset: u64, len: usize) -> impl Future<Output = Result<ReadBuf>> + Send;

    /// Writes; the number of bytes written.
    fn write(&self, handle: Handle, write: Write) -> impl Future<Output = Result<usize>> + Send;

    /// A descriptor of the open file was closed: reports a write-back error of the past, once.
    fn flush(&self, handle: Handle) -> impl Future<Output = Result<()>> + Send;

    /// The open file has gone.
    fn release(&self, handle: Handle) -> impl Future<Output = Result<()>> + Send;

    /// Returns when the file (with `data_only` what is needed to read it back) is on stable storage.
    fn fsync(&self, handle: Handle, data_only: bool) -> impl Future<Output = Result<()>> + Send;

    /// Opens a directory.
    fn opendir(&self, ino: Ino) -> impl Future<Output = Result<Handle>> + Send;

    /// At most `max` names after the place `from` (0 is the start).
    fn readdir(
        &self,
        handle: Handle,
        from: u64,
        max: usize,
    ) -> impl Future<Output = Result<Vec<Dirent>>> + Send;

    /// The same with attributes. All but `.` and `..` count as looked up: the caller forgets what it drops.
    fn readdirplus(
        &self,
        handle: Handle,
        from: u64,
        max: usize,
    ) -> impl Future<Output = Result<Vec<(Dirent, Attr)>>> + Send;

    /// The open directory has gone.
    fn releasedir(&self, handle: Handle) -> impl Future<Output = Result<()>> + Send;

    /// Returns when the directory is on stable storage.
    fn fsyncdir(&self, handle: Handle) -> impl Future<Output = Result<()>> + Send;

    /// Space of the filesystem.
    fn statfs(&self) -> impl Future<Output = Result<StatFs>> + Send;

    /// Sets an extended attribute.
    fn setxattr(
        &self,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        how: XattrSet,
    ) -> impl Future<Output = Result<()>> + Send;

    /// The value of an extended attribute.
    fn getxattr(&self, ino: Ino, name: &[u8]) -> impl Future<Output = Result<Vec<u8>>> + Send;

    /// The names of all extended attributes, each with a zero byte behind it.
    fn listxattr(&self, ino: Ino) -> impl Future<Output = Result<Vec<u8>>> + Send;

    /// Removes an extended attribute.
    fn removexattr(&self, ino: Ino, name: &[u8]) -> impl Future<Output = Result<()>> + Send;
}
