//! Errors of the filesystem, and their errno numbers in one table.

use std::{io, sync::Arc};

use storage_control::BlockAddr;

use crate::format::superblock::SuperblockError;

/// What an operation of the filesystem can fail with. Cheap to clone: a failure may answer many waiters.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FsError {
    /// No such name or inode.
    #[error("no such file or directory")]
    NotFound,
    /// The name is taken.
    #[error("file exists")]
    Exists,
    /// A directory was needed.
    #[error("not a directory")]
    NotDir,
    /// A directory was given where none may be.
    #[error("is a directory")]
    IsDir,
    /// The directory still has entries.
    #[error("directory not empty")]
    NotEmpty,
    /// No free block in any group this node can reach.
    #[error("no space left in the filesystem")]
    NoSpace,
    /// A name above 255 bytes, or a link target above its limit.
    #[error("name too long")]
    NameTooLong,
    /// Past the largest file size.
    #[error("file too large")]
    TooBig,
    /// The inode is gone, or its number serves another file now.
    #[error("stale file handle")]
    Stale,
    /// A block on disk is not what its place promises.
    #[error("{what} at block {addr} is corrupt: {why}; unmount and run `matrix fsck`")]
    Corrupt {
        /// Which structure was expected.
        what: &'static str,
        /// Where.
        addr: BlockAddr,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The device failed.
    #[error("input/output error: {0}")]
    Io(#[source] Arc<io::Error>),
    /// This node's access ended: the lease is lost, the node withdrew or is unmounting.
    #[error("this node no longer has access to the filesystem: {0}")]
    Closed(&'static str),
    /// The journal holds records that nobody replayed yet.
    #[error("journal {0} needs replay before it can be used")]
    DirtyJournal(u16),
    /// The superblock cannot be used.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// Too many symbolic links, or a directory moved below itself.
    #[error("too many levels of symbolic links")]
    Loop,
    /// Across filesystems.
    #[error("cross-device link")]
    CrossDevice,
    /// An argument makes no sense.
    #[error("invalid argument")]
    Invalid,
    /// Needs a privilege.
    #[error("operation not permitted")]
    Perm,
    /// The permission bits refuse.
    #[error("permission denied")]
    Access,
    /// No such extended attribute.
    #[error("no data available")]
    NoData,
    /// The caller's buffer is too small, or a number out of range.
    #[error("result too large for the buffer")]
    Range,
    /// More names than a link count can hold.
    #[error("too many links")]
    TooManyLinks,
    /// Mounted read-only.
    #[error("read-only file system")]
    ReadOnly,
    /// In use.
    #[error("device or resource busy")]
    Busy,
    /// Not offered by this filesystem.
    #[error("operation not supported")]
    NotSupported,
    /// The caller went away before the operation took effect.
    #[error("interrupted")]
    Interrupted,
    /// Would have to wait.
    #[error("try again")]
    Again,
    /// The descriptor does not allow it.
    #[error("bad file descriptor")]
    BadFd,
    /// More than a table can hold.
    #[error("file table overflow")]
    TableFull,
}

impl FsError {
    /// The errno number the kernel and programs see.
    pub fn errno(&self) -> i32 {
        match self {
            FsError::NotFound => libc::ENOENT,
            FsError::Exists => libc::EEXIST,
            FsError::NotDir => libc::ENOTDIR,
            FsError::IsDir => libc::EISDIR,
            FsError::NotEmpty => libc::ENOTEMPTY,
            FsError::NoSpace => libc::ENOSPC,
            FsError::NameTooLong => libc::ENAMETOOLONG,
            FsError::TooBig => libc::EFBIG,
            FsError::Stale => libc::ESTALE,
            FsError::Corrupt { .. } => libc::EUCLEAN,
            FsError::Io(_) | FsError::Closed(_) => libc::EIO,
            FsError::DirtyJournal(_) => libc::EBUSY,
            FsError::Superblock(e) => e.errno(),
            FsError::Loop => libc::ELOOP,
            FsError::CrossDevice => libc::EXDEV,
            FsError::Invalid => libc::EINVAL,
            FsError::Perm => libc::EPERM,
            FsError::Access => libc::EACCES,
            FsError::NoData => libc::ENODATA,
            FsError::Range => libc::ERANGE,
            FsError::TooManyLinks => libc::EMLINK,
            FsError::ReadOnly => libc::EROFS,
            FsError::Busy => libc::EBUSY,
            FsError::NotSupported => libc::EOPNOTSUPP,
            FsError::Interrupted => libc::EINTR,
            FsError::Again => libc::EAGAIN,
            FsError::BadFd => libc::EBADF,
            FsError::TableFull => libc::ENFILE,
        }
    }

    /// A corrupt structure: what was expected, where, and what is wrong.
    pub fn corrupt(what: &'static str, addr: BlockAddr, why: &'static str) -> FsError {
        FsError::Corrupt { what, addr, why }
    }
}

impl From<io::Error> for FsError {
    fn from(e: io::Error) -> FsError {
        FsError::Io(Arc::new(e))
    }
}
