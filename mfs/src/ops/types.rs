//! Plain types of the operations' interface: no transport's types and no on-disk ones.

use std::time::Duration;

use storage_control::{AlignedBuf, BlockAddr, WallTime};

/// Number of an inode: the address of its dinode's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

impl Ino {
    /// Block of the dinode.
    pub fn block(self) -> BlockAddr {
        BlockAddr(self.0)
    }
}

impl std::fmt::Display for Ino {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "inode {}", self.0)
    }
}

/// An open file or directory of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle(pub u64);

/// Who asks: what a new inode's owner and the clearing of set-id bits depend on.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// What `stat` reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// Tells apart inodes that had the same number.
    pub generation: u64,
    /// File type and permissions, as in `st_mode`.
    pub mode: u32,
    /// Names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node.
    pub rdev: u32,
    /// Bytes.
    pub size: u64,
    /// Allocated blocks of 512 bytes.
    pub blocks_512: u64,
    /// Access time.
    pub atime: WallTime,
    /// Modification time.
    pub mtime: WallTime,
    /// Change time.
    pub ctime: WallTime,
    /// Birth time.
    pub btime: WallTime,
}

impl Attr {
    /// File type: `st_mode & S_IFMT`.
    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

/// Attributes, and how long the asking kernel may keep them: never longer than this node's lease.
#[derive(Clone, Copy, Debug)]
pub struct Fresh {
    /// The attributes.
    pub attr: Attr,
    /// How long they may be kept, if nothing invalidates them before.
    pub valid_for: Duration,
}

/// A time to set.
#[derive(Clone, Copy, Debug)]
pub enum SetTime {
    /// This time.
    At(WallTime),
    /// The time of the change.
    Now,
}

/// What to change; `None` stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// Permissions (type bits are not looked at).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Bytes.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
}

/// What a `write` brings.
#[derive(Debug)]
pub struct Write {
    /// Byte offset; not looked at with `append`.
    pub offset: u64,
    /// The bytes.
    pub data: Vec<u8>,
    /// Write at the end of the file, wherever that is when the lock is held.
    pub append: bool,
    /// The writer may not keep set-id bits alive.
    pub kill_suid: bool,
    /// Reply only when the bytes are stable.
    pub sync: bool,
}

/// An opened file.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// To be named in later requests, until `release`.
    pub handle: Handle,
    /// Reads and writes go past the page cache.
    pub direct_io: bool,
    /// Pages that the kernel has of this file stay good.
    pub keep_cache: bool,
}

/// Bytes read, fewer than asked for only at the end of the file.
#[derive(Debug)]
pub struct ReadBuf {
    buf: AlignedBuf,
    start: usize,
    len: usize,
}

impl ReadBuf {
    /// `len` bytes of `buf` from `start`.
    pub fn new(buf: AlignedBuf, start: usize, len: usize) -> Self {
        assert!(start + len <= buf.len(), "a read ends in its buffer");
        Self { buf, start, len }
    }
}

impl std::ops::Deref for ReadBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buf[self.start..self.start + self.len]
    }
}

/// A name in a directory listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirent {
    /// Inode number.
    pub ino: Ino,
    /// Where to go on after this entry.
    pub next: u64,
    /// File type, as in `st_mode`.
    pub file_type: u32,
    /// The name.
    pub name: Vec<u8>,
}

/// What `statfs` reports, in blocks of 4 KiB.
#[derive(Clone, Copy, Debug)]
pub struct StatFs {
    /// Blocks for files and directories.
    pub blocks: u64,
    /// Free ones.
    pub free: u64,
    /// Free ones that a program can have.
    pub available: u64,
    /// Inodes in use or possible: every free block can become one.
    pub files: u64,
    /// Inodes possible.
    pub files_free: u64,
}

/// Flags of `renameat2`.
#[derive(Clone, Copy, Debug, Default)]
pub struct RenameFlags {
    /// Fail if the new name exists.
    pub no_replace: bool,
    /// Both names exist and change places.
    pub exchange: bool,
}

/// Flags of `setxattr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrSet {
    /// Create or replace.
    Any,
    /// Fail if it exists.
    Create,
    /// Fail if it does not exist.
    Replace,
}
