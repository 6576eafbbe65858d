//! On-disk nodes shared by all trees: index nodes, and the head of every leaf.
//!
//! A node at level n has children at level n - 1; leaves are level 0. Keys of a node start with 0
//! and rise strictly. A child covers the keys from its own (the first child: from where its node starts) to the
//! next child's.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::HEADER_LEN;
use storage_control::BLOCK_SIZE;

/// Offset in the block of [`NodeHead`].
pub const HEAD_AT: usize = HEADER_LEN;
/// Offset in the block of the entries.
pub const ENTRIES_AT: usize = HEAD_AT + size_of::<NodeHead>();
/// Bytes for entries in an index node or a leaf.
pub const ENTRIES_SIZE: usize = BLOCK_SIZE - ENTRIES_AT;
/// Entries in a full index node.
pub const INDEX_MAX: usize = ENTRIES_SIZE / size_of::<RawIndexEntry>();
/// Levels of index nodes, the root in the dinode included.
pub const MAX_DEPTH: u8 = 6;

const _: () = assert!(size_of::<NodeHead>() == 16);
const _: () = assert!(size_of::<RawIndexEntry>() == 16);
const _: () = assert!(INDEX_MAX == 251);

/// The head of index nodes and leaves, after the block header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct NodeHead {
    /// 0 for a leaf.
    pub level: U16,
    /// Entries in the block.
    pub count: U16,
    /// Bytes the entries take.
    pub used: U16,
    /// Zero.
    pub reserved_a: U16,
    /// Zero.
    pub reserved_b: U64,
}

/// One child of an index node.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawIndexEntry {
    /// Lowest key below the child; 0 for the first child.
    pub key: U64,
    /// Block of the child.
    pub child: U64,
}
