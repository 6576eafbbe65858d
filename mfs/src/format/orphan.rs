//! On-disk orphan tables: per journal, a root block in the journal's region and a chain behind it.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::HEADER_LEN;
use storage_control::BLOCK_SIZE;

/// Offset in the block of [`OrphanHead`].
pub const HEAD_AT: usize = HEADER_LEN;
/// Offset in the block of the slots.
pub const SLOTS_AT: usize = HEAD_AT + size_of::<OrphanHead>();
/// Slots in a block.
pub const SLOTS: usize = (BLOCK_SIZE - SLOTS_AT) / size_of::<RawOrphan>();
/// Blocks in the longest chain, the root included: about two million orphans.
pub const CHAIN_MAX: usize = 12_000;

const _: () = assert!(size_of::<OrphanHead>() == 16);
const _: () = assert!(size_of::<RawOrphan>() == 24);
const _: () = assert!(SLOTS == 167);

/// The head of a block of the table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OrphanHead {
    /// The next block, or 0.
    pub next: U64,
    /// Slots in use in this block.
    pub count: U32,
    /// Zero.
    pub reserved: U32,
}

/// One slot; all zero when free.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawOrphan {
    /// Inode number, 0 in a free slot.
    pub ino: U64,
    /// Its generation.
    pub generation: U64,
    /// 1 = free the inode, 2 = finish a truncation.
    pub kind: U32,
    /// Zero.
    pub reserved: U32,
}
