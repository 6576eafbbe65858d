//! Journals: two header copies, the orphan table, then a ring of records.
//!
//! A record is one contiguous run of blocks: descriptor blocks, then one image for each entry. It never wraps: where
//! it does not fit before the ring's end it starts at the ring's start. A record belongs to the journal only if
//! its epoch is the header's and its sequence number the one expected at its place.

use storage_control::BLOCK_SIZE;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::header::{Block, Header};

/// Smallest journal: 4 MiB.
pub const MIN_BLOCKS: u32 = 1024;
/// Largest journal: 128 MiB.
pub const MAX_BLOCKS: u32 = 32_768;

/// Offset of header copy A (B follows).
pub const HEADER_A: u64 = 0;
/// Offset of header copy B.
pub const HEADER_B: u64 = 1;
/// Offset of the orphan table.
pub const ORPHANS_AT: u64 = 2;
/// Offset of the ring.
pub const RING_AT: u64 = 3;

/// Entries in one descriptor block.
pub const ENTRIES: usize = (BLOCK_SIZE - 128) / 16;

/// Record type: images of metadata blocks. Must be understood.
pub const RECORD_IMAGES: u16 = 1;
/// Record flag: whoever does not know the type must refuse the journal.
pub const MUST_UNDERSTAND: u16 = 1;

/// On disk: one of the two header copies of a journal. The one with the larger epoch, then the larger count of
/// writes, is the newer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct JournalImage {
    /// Kind 4, owner `Orphans(journal)`.
    pub header: Header,
    /// Slot of the journal.
    pub journal: U16,
    /// 1: no record of this epoch needs replay and nobody writes any.
    pub clean: U16,
    /// Blocks of the ring.
    pub ring_blocks: U32,
    /// Counts the journal's uses; records of other epochs are ignored.
    pub epoch: U64,
    /// Counts the writes of header copies.
    pub writes: U64,
    /// Sequence number of the oldest record that may need replay.
    pub tail_seq: U64,
    /// Where in the ring it starts.
    pub tail_at: U64,
    /// Every image that this journal may still bring back is newer.
    pub tail_clock: U64,
    /// The node's clock when this was written.
    pub clock: U64,
    /// Zero.
    pub reserved: [u8; 3976],
}

/// On disk: an entry of a descriptor block.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct EntryImage {
    /// Address of the image's block.
    pub addr: U64,
    /// The image's checksum.
    pub checksum: U32,
    /// Zero.
    pub reserved: U32,
}

/// On disk: a descriptor block of a record.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RecordImage {
    /// Kind 5, owner `Orphans(journal)`; its version is that of all images.
    pub header: Header,
    /// The journal's epoch.
    pub epoch: U64,
    /// Sequence number, one more than the record before.
    pub seq: U64,
    /// All records up to this one were stable when this one was written.
    pub stable_seq: U64,
    /// What kind of record.
    pub record_type: U16,
    /// `MUST_UNDERSTAND`.
    pub flags: U16,
    /// Images in the whole record.
    pub images: U32,
    /// Descriptor blocks in the whole record.
    pub descriptors: U16,
    /// Which of them this is.
    pub index: U16,
    /// Zero.
    pub reserved: [u8; 28],
    /// Addresses and checksums of the images, in order.
    pub entries: [EntryImage; ENTRIES],
}

const _: () = assert!(size_of::<JournalImage>() == BLOCK_SIZE);
const _: () = assert!(size_of::<RecordImage>() == BLOCK_SIZE);
const _: () = assert!(size_of::<EntryImage>() == 16);

impl JournalImage {
    /// View of a block.
    pub fn of(block: &Block) -> &JournalImage {
        JournalImage::ref_from_bytes(block).expect("a journal header is one block")
    }

    /// View of a block, to change.
    pub fn of_mut(block: &mut Block) -> &mut JournalImage {
        JournalImage::mut_from_bytes(block).expect("a journal header is one block")
    }
}

impl RecordImage {
    /// View of a block.
    pub fn of(block: &Block) -> &RecordImage {
        RecordImage::ref_from_bytes(block).expect("a descriptor is one block")
    }

    /// View of a block, to change.
    pub fn of_mut(block: &mut Block) -> &mut RecordImage {
        RecordImage::mut_from_bytes(block).expect("a descriptor is one block")
    }
}

/// Descriptor blocks for that many images.
pub const fn descriptors(images: usize) -> usize {
    images.div_ceil(ENTRIES)
}

/// Blocks of a record with that many images.
pub const fn record_blocks(images: usize) -> usize {
    images + descriptors(images)
}
