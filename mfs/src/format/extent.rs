//! On-disk extents.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dinode::AREA_SIZE;
use super::index::ENTRIES_SIZE;

/// Extents in a full leaf.
pub const LEAF_MAX: usize = ENTRIES_SIZE / size_of::<RawExtent>();
/// Extents in a dinode without inline extended attributes.
pub const INLINE_MAX: usize = AREA_SIZE / size_of::<RawExtent>();
/// Blocks in the longest extent.
pub const LEN_MAX: u32 = 1 << 31;
/// One past the last block a file may have.
pub const LOGICAL_END: u64 = 1 << 51;

const _: () = assert!(size_of::<RawExtent>() == 24);
const _: () = assert!(INLINE_MAX < LEAF_MAX, "the extents of a dinode and one more fit a leaf");

/// Bits of [`RawExtent::flags`].
pub mod flags {
    /// Allocated, reads as zeros.
    pub const UNWRITTEN: u32 = 1;
    /// Other files may have these blocks too (reserved).
    pub const SHARED: u32 = 1 << 1;
    /// Compressed or encrypted (reserved).
    pub const ENCODED: u32 = 1 << 2;
    /// All bits this version knows.
    pub const KNOWN: u32 = UNWRITTEN;
}

/// A run of a file's blocks.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawExtent {
    /// First block in the file.
    pub logical: U64,
    /// First block on the device, low 32 of 48 bits.
    pub physical_low: U32,
    /// High 16 of 48 bits.
    pub physical_high: U16,
    /// Index in the superblock's device table.
    pub device: U16,
    /// Blocks, at least 1.
    pub len: U32,
    /// See [`flags`].
    pub flags: U32,
}
