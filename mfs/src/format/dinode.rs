//! On-disk dinode: one block, owned by its own inode lock.
//!
//! Behind the block header come the fixed fields, then one area shared by the content (from its front) and
//! the extended attributes (against its end). The two never overlap.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::HEADER_LEN;
use storage_control::BLOCK_SIZE;

/// Offset in the block of [`RawDinode`].
pub const FIXED_AT: usize = HEADER_LEN;
/// Offset in the block of the area for content and extended attributes.
pub const AREA_AT: usize = 256;
/// Bytes in that area.
pub const AREA_SIZE: usize = BLOCK_SIZE - AREA_AT;
/// Most bytes of the area that extended attributes may take: the root of a tree keeps at least the rest.
pub const XATTR_INLINE_MAX: usize = 1024;

const _: () = assert!(FIXED_AT + size_of::<RawDinode>() == AREA_AT);
const _: () = assert!(size_of::<RawDinode>() == 192);

/// What the content area holds. The numbers are on disk and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ContentFormat {
    /// Nothing: devices, pipes and sockets.
    None = 0,
    /// The bytes of a small file or of a symbolic link's target.
    Data = 1,
    /// Extents, sorted.
    Extents = 2,
    /// The root of a tree of extents.
    ExtentTree = 3,
    /// Directory entries, sorted by cookie.
    Dirents = 4,
    /// The root of a tree of directory entries.
    DirentTree = 5,
}

impl ContentFormat {
    /// The format with this number.
    pub fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0 => Self::None,
            1 => Self::Data,
            2 => Self::Extents,
            3 => Self::ExtentTree,
            4 => Self::Dirents,
            5 => Self::DirentTree,
            _ => return None,
        })
    }
}

/// Bits of [`RawDinode::flags`].
pub mod flags {
    /// Nothing about the file may change.
    pub const IMMUTABLE: u32 = 1;
    /// Only appending writes.
    pub const APPEND: u32 = 1 << 1;
    /// Blocks past the size are still to be freed; recovery finishes it.
    pub const TRUNCATING: u32 = 1 << 2;
    /// No name is left; an orphan table holds it.
    pub const ORPHAN: u32 = 1 << 3;
    /// All bits this version knows.
    pub const KNOWN: u32 = IMMUTABLE | APPEND | TRUNCATING | ORPHAN;
}

/// The fixed fields, at [`FIXED_AT`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawDinode {
    /// File type and permissions as in `st_mode`.
    pub mode: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Names; for a directory 2 + its subdirectories.
    pub nlink: U32,
    /// Bytes; for a directory those of its entries.
    pub size: U64,
    /// Blocks of 4 KiB that belong to the inode besides the dinode.
    pub blocks: U64,
    /// The clock at creation: tells apart inodes that had the same number.
    pub generation: U64,
    /// See [`flags`].
    pub flags: U32,
    /// Project for quotas.
    pub project: U32,
    /// Device number of a device node.
    pub rdev: U64,
    /// For a directory, the inode number of the directory that holds it.
    pub parent: U64,
    /// Access time, seconds.
    pub atime: I64,
    /// Modification time, seconds.
    pub mtime: I64,
    /// Change time, seconds.
    pub ctime: I64,
    /// Birth time, seconds.
    pub btime: I64,
    /// Access time, nanoseconds below 10^9.
    pub atime_ns: U32,
    /// Modification time, nanoseconds.
    pub mtime_ns: U32,
    /// Change time, nanoseconds.
    pub ctime_ns: U32,
    /// Birth time, nanoseconds.
    pub btime_ns: U32,
    /// See [`ContentFormat`].
    pub format: u8,
    /// Levels of index nodes, the root in the dinode included; 0 without a tree.
    pub depth: u8,
    /// Bytes of content in the area.
    pub content_len: U16,
    /// Bytes of inline extended attributes in the area.
    pub xattr_len: U16,
    /// Zero.
    pub reserved_a: U16,
    /// First block of extended attributes, or 0.
    pub xattr_root: U64,
    /// Entries of a directory.
    pub entries: U64,
    /// Room for the root of data checksums. Zero.
    pub checksum_root: U64,
    /// Room for the root of encryption data. Zero.
    pub encryption_root: U64,
    /// Zero.
    pub reserved_b: [u8; 40],
}
