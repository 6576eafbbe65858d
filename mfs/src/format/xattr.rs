//! On-disk extended attributes.
//!
//! One list of entries {name length u8, value length u24, name, value}, sorted by name: inline in the dinode,
//! or cut into the blocks of a chain. Blocks at the end of a chain may hold nothing.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::HEADER_LEN;
use storage_control::BLOCK_SIZE;

/// Offset in the block of [`XattrHead`].
pub const HEAD_AT: usize = HEADER_LEN;
/// Offset in the block of the bytes of the list.
pub const BYTES_AT: usize = HEAD_AT + size_of::<XattrHead>();
/// Bytes of the list in a full block.
pub const BYTES_MAX: usize = BLOCK_SIZE - BYTES_AT;
/// Longest name, namespace included.
pub const NAME_MAX: usize = 255;
/// Longest value.
pub const VALUE_MAX: usize = 64 << 10;
/// Longest list: one longest value and as much again for all others.
pub const LIST_MAX: usize = 128 << 10;
/// Blocks in the longest chain.
pub const CHAIN_MAX: usize = LIST_MAX.div_ceil(BYTES_MAX);
/// Bytes of an entry before its name.
pub const ENTRY_HEAD: usize = 4;

const _: () = assert!(size_of::<XattrHead>() == 16);
const _: () = assert!(CHAIN_MAX == 33);

/// The head of a block of the chain.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrHead {
    /// The next block, or 0.
    pub next: U64,
    /// Bytes of the list in this block.
    pub used: U32,
    /// Zero.
    pub reserved: U32,
}
