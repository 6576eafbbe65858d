//! Allocation groups: one header block, then the bitmap blocks, then everything else.
//!
//! A bitmap block is written with the first change of a bit in it; until then (see `bitmaps_written`) its blocks
//! are free, apart from the group's own header and bitmap blocks. The counters of the header always agree with
//! the bits.

use storage_control::BLOCK_SIZE;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use super::header::{Block, Header};
use super::superblock::Geometry;

/// Smallest group: 8 MiB.
pub const MIN_GROUP_BLOCKS: u32 = 2048;
/// Largest group: 1 GiB.
pub const MAX_GROUP_BLOCKS: u32 = 262_144;
/// A rest of the device smaller than this does not become a group.
pub const MIN_LAST_GROUP_BLOCKS: u64 = 256;

/// Bytes of a bitmap block before the bits.
pub const BITMAP_HEAD: usize = 128;
/// Blocks that one bitmap block describes.
pub const BLOCKS_PER_BITMAP: u32 = ((BLOCK_SIZE - BITMAP_HEAD) * 4) as u32;

const _: () = assert!(MAX_GROUP_BLOCKS.div_ceil(BLOCKS_PER_BITMAP) <= 32, "bitmaps_written has 32 bits");

/// In `BitmapImage::last_metadata_free`, in memory only: "the version of the transaction being built"; the commit
/// replaces it.
pub const STAMP_AT_COMMIT: u64 = u64::MAX;

/// What a block is used for: two bits in the bitmap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum BlockState {
    /// Nothing.
    Free = 0,
    /// File data, without header.
    Data = 1,
    /// A block with a header, or part of a journal.
    Metadata = 2,
    /// Freed, but a journal may still hold an image of it: metadata at once, data only later.
    FreedMetadata = 3,
}

impl BlockState {
    /// From two bits.
    pub fn from_bits(bits: u8) -> BlockState {
        match bits & 3 {
            0 => BlockState::Free,
            1 => BlockState::Data,
            2 => BlockState::Metadata,
            _ => BlockState::FreedMetadata,
        }
    }
}

/// On disk: first block of a group.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GroupImage {
    /// Kind 2, owner `Group`.
    pub header: Header,
    /// Number of the group.
    pub index: U32,
    /// Blocks in it, header and bitmaps included.
    pub blocks: U32,
    /// Bitmap blocks, right behind the header.
    pub bitmap_blocks: U32,
    /// Bit i: bitmap block i is on disk.
    pub bitmaps_written: U32,
    /// Blocks by state.
    pub free: U32,
    /// Blocks by state.
    pub data: U32,
    /// Blocks by state.
    pub metadata: U32,
    /// Blocks by state.
    pub freed_metadata: U32,
    /// Blocks promised to late allocations: room for later, 0.
    pub promised: U64,
    /// Tree of reference counts: room for later, 0.
    pub refcount_root: U64,
    /// List of reservations: room for later, 0.
    pub reservations_root: U64,
    /// Clock stamp: room for later, 0.
    pub stamp: U64,
    /// Zero.
    pub reserved: [u8; 3968],
}

/// On disk: two bits for each of `BLOCKS_PER_BITMAP` blocks.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BitmapImage {
    /// Kind 3, owner `Group`.
    pub header: Header,
    /// Number of the group.
    pub group: U32,
    /// Which of the group's bitmap blocks.
    pub index: U32,
    /// Version of the last transaction that freed a metadata block here.
    pub last_metadata_free: U64,
    /// Zero.
    pub reserved: [u8; 48],
    /// Block 4k + i of the range: bits 2i and 2i+1 of byte k.
    pub bits: [u8; BLOCK_SIZE - BITMAP_HEAD],
}

const _: () = assert!(size_of::<GroupImage>() == BLOCK_SIZE);
const _: () = assert!(size_of::<BitmapImage>() == BLOCK_SIZE);

impl GroupImage {
    /// View of a block.
    pub fn of(block: &Block) -> &GroupImage {
        GroupImage::ref_from_bytes(block).expect("a group header is one block")
    }

    /// View of a block, to change.
    pub fn of_mut(block: &mut Block) -> &mut GroupImage {
        GroupImage::mut_from_bytes(block).expect("a group header is one block")
    }

    /// Fills the body of a fresh group.
    pub fn format(&mut self, geometry: &Geometry, index: u32) {
        let blocks = geometry.blocks_in(index);
        let bitmaps = bitmap_blocks(blocks);
        self.index = index.into();
        self.blocks = blocks.into();
        self.bitmap_blocks = bitmaps.into();
        self.metadata = (1 + bitmaps).into();
        self.free = (blocks - 1 - bitmaps).into();
    }

    /// Adds to the counter of a state and takes from another's.
    pub fn count(&mut self, from: BlockState, to: BlockState, blocks: u32) {
        let place = self.counter(from);
        *place = place.get().saturating_sub(blocks).into();
        let place = self.counter(to);
        *place = place.get().saturating_add(blocks).into();
    }

    fn counter(&mut self, state: BlockState) -> &mut U32 {
        match state {
            BlockState::Free => &mut self.free,
            BlockState::Data => &mut self.data,
            BlockState::Metadata => &mut self.metadata,
            BlockState::FreedMetadata => &mut self.freed_metadata,
        }
    }

    /// What is wrong with the body of a header read from disk, if anything.
    pub fn defect(&self, geometry: &Geometry, index: u32) -> Option<&'static str> {
        let blocks = geometry.blocks_in(index);
        let sum = [self.free, self.data, self.metadata, self.freed_metadata]
            .iter()
            .try_fold(0_u32, |sum, n| sum.checked_add(n.get()));
        if self.index.get() != index {
            Some("it names another group")
        } else if self.blocks.get() != blocks || self.bitmap_blocks.get() != bitmap_blocks(blocks) {
            Some("impossible size")
        } else if u64::from(self.bitmaps_written.get()) >> bitmap_blocks(blocks) != 0 {
            Some("more bitmap blocks written than there are")
        } else if sum != Some(blocks) {
            Some("its counters do not add up")
        } else if self.reserved.iter().any(|&b| b != 0) {
            Some("reserved bytes are not zero")
        } else {
            None
        }
    }
}

impl BitmapImage {
    /// View of a block.
    pub fn of(block: &Block) -> &BitmapImage {
        BitmapImage::ref_from_bytes(block).expect("a bitmap is one block")
    }

    /// View of a block, to change.
    pub fn of_mut(block: &mut Block) -> &mut BitmapImage {
        BitmapImage::mut_from_bytes(block).expect("a bitmap is one block")
    }

    /// Fills the body of a bitmap block that was never written.
    pub fn format(&mut self, geometry: &Geometry, group: u32, index: u32) {
        self.group = group.into();
        self.index = index.into();
        self.bits.fill(0);
        if index == 0 {
            for block in 0..=bitmap_blocks(geometry.blocks_in(group)) {
                self.set(block, BlockState::Metadata);
            }
        }
    }

    /// State of a block, counted from the start of this bitmap block's range.
    pub fn get(&self, block: u32) -> BlockState {
        BlockState::from_bits(self.bits[block as usize / 4] >> (block % 4 * 2))
    }

    /// Sets the state of a block.
    pub fn set(&mut self, block: u32, state: BlockState) {
        let byte = &mut self.bits[block as usize / 4];
        *byte = *byte & !(3 << (block % 4 * 2)) | (state as u8) << (block % 4 * 2);
    }
}

/// How many bitmap blocks a group of this size has.
pub const fn bitmap_blocks(blocks: u32) -> u32 {
    blocks.div_ceil(BLOCKS_PER_BITMAP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_two_bits_each() {
        let mut block = [0; BLOCK_SIZE];
        let map = BitmapImage::of_mut(&mut block);
        for (i, state) in
            [BlockState::Data, BlockState::Metadata, BlockState::FreedMetadata, BlockState::Free]
                .iter()
                .enumerate()
        {
            map.set(i as u32, *state);
        }
        assert_eq!(map.bits[0], 0b00_11_10_01);
        assert_eq!(map.get(2), BlockState::FreedMetadata);
        map.set(2, BlockState::Free);
        assert_eq!(map.bits[0], 0b00_00_10_01);
        map.set(BLOCKS_PER_BITMAP - 1, BlockState::Data);
        assert_eq!(map.bits[map.bits.len() - 1], 0b01_00_00_00);
    }
}
