//! Dinodes as typed values.
//!
//! A decoded [`Dinode`] satisfies every rule of the format that one block can tell: its content fits its type
//! and its area, inline data are as long as its size, trees have at least one child and at most
//! [`MAX_DEPTH`](crate::format::index::MAX_DEPTH) levels. Functions of `dir`, `extent` and `xattr` change a `Dinode` in memory and the other
//! blocks in the transaction; the caller ends with [`write()`] in the same transaction. After an error the
//! value in memory is worth nothing and is read again.

mod codec;
#[cfg(test)]
mod tests;

use std::ops::Add;

use storage_control::{AlignedBuf, BlockAddr, WallTime};

use crate::error::FsError;
use crate::extent::Extent;
use crate::format::dinode::{AREA_SIZE, flags};
use crate::format::header::BlockKind;
use crate::index::Root;
use crate::lock_name::LockName;
use crate::store::{Store, Txn};

/// Type of a file, as `st_mode >> 12`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FileType {
    /// Named pipe.
    Fifo = 1,
    /// Character device.
    CharDevice = 2,
    /// Directory.
    Directory = 4,
    /// Block device.
    BlockDevice = 6,
    /// Regular file.
    Regular = 8,
    /// Symbolic link.
    Symlink = 10,
    /// Socket.
    Socket = 12,
}

impl FileType {
    /// The type with this number.
    pub fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::Fifo,
            2 => Self::CharDevice,
            4 => Self::Directory,
            6 => Self::BlockDevice,
            8 => Self::Regular,
            10 => Self::Symlink,
            12 => Self::Socket,
            _ => return None,
        })
    }

    /// The type in the high bits of an `st_mode` (0 stands for a regular file, as in `mknod(2)`).
    pub fn from_mode(mode: u32) -> Option<Self> {
        match (mode >> 12) & 0xf {
            0 => Some(Self::Regular),
            raw => Self::from_raw(raw as u8),
        }
    }

    /// The high bits of an `st_mode`.
    pub fn mode_bits(self) -> u32 {
        u32::from(self as u8) << 12
    }

    /// What a new inode of this type holds.
    fn empty_content(self) -> Content {
        match self {
            Self::Directory => Content::Dirents(Vec::new()),
            Self::Regular | Self::Symlink => Content::Data(Vec::new()),
            Self::Fifo | Self::CharDevice | Self::BlockDevice | Self::Socket => Content::None,
        }
    }
}

/// What an inode holds, or the root of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: devices, pipes, sockets.
    None,
    /// The bytes of a small file or of a symbolic link, exactly `size` of them.
    Data(Vec<u8>),
    /// Extents, sorted and apart.
    Extents(Vec<Extent>),
    /// A tree of extents.
    ExtentTree(Root),
    /// Packed directory entries, sorted by cookie.
    Dirents(Vec<u8>),
    /// A tree of directory entries.
    DirentTree(Root),
}

/// Where the list of extended attributes is: inline unless `inline` is empty, else in the chain at `root`.
/// A chain may have blocks that hold nothing (see [`crate::xattr::next_to_free`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XattrPlace {
    /// The list, if it is inline.
    pub inline: Vec<u8>,
    /// First block of the chain.
    pub root: Option<BlockAddr>,
}

/// One inode as its block describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dinode {
    /// Inode number: the address of the dinode's block.
    pub ino: u64,
    /// The clock at creation: tells apart inodes that had the same number.
    pub generation: u64,
    /// Type of the file.
    pub kind: FileType,
    /// The low twelve bits of `st_mode`.
    pub perm: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names; for a directory 2 + its subdirectories; 0 when deleted.
    pub nlink: u32,
    /// Bytes. A directory's size is kept by `dir`.
    pub size: u64,
    /// Blocks of 4 KiB besides the dinode: data, tree nodes, extended attributes. Kept by `dir`, `extent`
    /// and `xattr`.
    pub blocks: u64,
    /// Bits of [`crate::format::dinode::flags`].
    pub flags: u32,
    /// Project for quotas.
    pub project: u32,
    /// Device number of a device node.
    pub rdev: u64,
    /// For a directory, the inode number of the directory that holds it (the root's is its own); else 0.
    pub parent: u64,
    /// Last access.
    pub atime: WallTime,
    /// Last change of content.
    pub mtime: WallTime,
    /// Last change of content or attributes.
    pub ctime: WallTime,
    /// Creation.
    pub btime: WallTime,
    /// Entries of a directory, `.` and `..` not counted. Kept by `dir`.
    pub entries: u64,
    /// What it holds.
    pub content: Content,
    /// Its extended attributes.
    pub xattrs: XattrPlace,
}

impl Dinode {
    /// A new inode: empty, one name (a directory: two), all times `now`.
    pub fn new(ino: u64, generation: u64, kind: FileType, perm: u32, now: WallTime) -> Self {
        Self {
            ino,
            generation,
            kind,
            perm: perm & 0o7777,
            uid: 0,
            gid: 0,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            size: 0,
            blocks: 0,
            flags: 0,
            project: 0,
            rdev: 0,
            parent: 0,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            entries: 0,
            content: kind.empty_content(),
            xattrs: XattrPlace::default(),
        }
    }

    /// `st_mode`.
    pub fn mode(&self) -> u32 {
        self.kind.mode_bits() | self.perm
    }

    /// `st_blocks`: units of 512 bytes.
    pub fn blocks_512(&self) -> u64 {
        self.blocks.saturating_mul(8)
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// Whether all of these [`flags`] are set.
    pub fn has(&self, flags: u32) -> bool {
        self.flags & flags == flags
    }

    /// Sets or clears [`flags`].
    pub fn set(&mut self, flags: u32, on: bool) {
        debug_assert_eq!(flags & !flags::KNOWN, 0);
        self.flags = if on { self.flags | flags } else { self.flags & !flags };
    }

    /// Bytes of content that fit the dinode beside its inline extended attributes: files up to this size can
    /// stay inline.
    pub fn inline_room(&self) -> usize {
        AREA_SIZE - self.xattrs.inline.len()
    }

    /// The lock that owns the dinode and every block of its trees.
    pub fn owner(&self) -> LockName {
        LockName::Inode(self.ino)
    }

    /// The address of the dinode's block.
    pub fn addr(&self) -> BlockAddr {
        BlockAddr(self.ino)
    }

    /// Checks and takes apart the body of a dinode block (its header has been verified).
    pub fn decode(ino: u64, block: &[u8]) -> Result<Self, FsError> {
        codec::decode(ino, block)
    }

    /// Fills the body of a dinode block.
    pub fn encode(&self, block: &mut [u8; storage_control::BLOCK_SIZE]) {
        codec::encode(self, block);
    }
}

/// What a mutator may need at most, beside the caller's own edit of the dinode: fresh metadata blocks to
/// reserve before the transaction, and blocks of the inode it may change or create, in credits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Metadata blocks to reserve.
    pub meta: u32,
    /// Credits for tree and attribute blocks, new ones included; bitmaps and the dinode are not.
    pub credits: u32,
}

impl Add for Needs {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { meta: self.meta + other.meta, credits: self.credits + other.credits }
    }
}

/// The next piece of an inode to free. Its blocks lie in one allocation group; the caller takes the group's
/// lock, opens a transaction and hands the step to the function that carries it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeStep {
    /// A block of the piece: tells the group.
    pub addr: BlockAddr,
    pub(crate) piece: Piece,
}

/// What a [`FreeStep`] frees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Data blocks of the extents that end with the one holding logical block `last`.
    Data { last: u64 },
    /// An empty leaf or index node on the way to `key`.
    Node { key: u64 },
    /// The last block of the chain of extended attributes, after `before` (or the dinode).
    Xattr { before: Option<BlockAddr> },
}

/// Credits of a free step beside bitmaps and the dinode: the node above and the block itself.
pub const FREE_STEP_CREDITS: u32 = 2;

/// Reads and decodes a dinode.
pub async fn read(store: &Store, ino: u64) -> Result<Dinode, FsError> {
    let image = store.read(BlockAddr(ino), BlockKind::Dinode, LockName::Inode(ino)).await?;
    decode_image(ino, &image)
}

fn decode_image(ino: u64, image: &AlignedBuf) -> Result<Dinode, FsError> {
    Dinode::decode(ino, image)
}

/// Writes the dinode back in the transaction (one credit).
pub async fn write(txn: &mut Txn, dinode: &Dinode) -> Result<(), FsError> {
    txn.edit(dinode.addr(), BlockKind::Dinode, dinode.owner(), |block| dinode.encode(block)).await
}

/// Creates the block of a new dinode in the transaction (one credit).
pub fn create(txn: &mut Txn, dinode: &Dinode) {
    txn.create(dinode.addr(), BlockKind::Dinode, dinode.owner(), |block| dinode.encode(block));
}

/// The next piece to free of an inode that is to go altogether, the dinode's own block aside; `None` when
/// only that is left. A directory must have no entries.
pub async fn next_to_free(store: &Store, dinode: &Dinode) -> Result<Option<FreeStep>, FsError> {
    let content = match &dinode.content {
        Content::None | Content::Data(_) | Content::Dirents(_) => None,
        Content::Extents(_) | Content::ExtentTree(_) => {
            crate::extent::next_to_free(store, dinode, 0..u64::MAX).await?
        }
        Content::DirentTree(_) => crate::dir::next_to_free(store, dinode).await?,
    };
    match content {
        Some(step) => Ok(Some(step)),
        None => crate::xattr::next_to_free(store, dinode, true).await,
    }
}

/// Carries out a step of [`next_to_free`] and returns the runs of file data it freed. The caller writes the
/// dinode.
pub async fn free_step(
    store: &Store,
    txn: &mut Txn,
    guard: &crate::alloc::FreeGuard,
    dinode: &mut Dinode,
    step: FreeStep,
) -> Result<Vec<crate::alloc::Run>, FsError> {
    match (step.piece, &dinode.content) {
        (Piece::Xattr { .. }, _) => {
            crate::xattr::free_step(txn, guard, dinode, step).await?;
            Ok(Vec::new())
        }
        (_, Content::DirentTree(_)) => {
            crate::dir::free_step(store, txn, guard, dinode, step).await?;
            Ok(Vec::new())
        }
        _ => crate::extent::remove_step(store, txn, guard, None, dinode, 0..u64::MAX, step).await,
    }
}
