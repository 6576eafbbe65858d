//! Records: how a transaction's images are laid out in the ring, and how they are recognised again.
//!
//! A record is believed only as a whole: every descriptor and every image has its checksum, and each
//! descriptor entry repeats its image's, so parts of different records never pass for one.

use std::sync::Arc;

use storage_control::{AlignedBuf, BLOCK_SIZE, BlockAddr, Clock};

use super::head::Place;
use crate::{
    FsError, LockName,
    format::{
        header::{self, Block, BlockKind, Header},
        journal::{ENTRIES, MUST_UNDERSTAND, RECORD_IMAGES, RecordImage, descriptors, record_blocks},
    },
    store::Frozen,
};

/// What a record says about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RecordHead {
    pub(crate) epoch: u64,
    pub(crate) seq: u64,
    pub(crate) stable_seq: u64,
    pub(crate) version: Clock,
    pub(crate) images: usize,
    pub(crate) descriptors: usize,
    pub(crate) record_type: u16,
    pub(crate) flags: u16,
}

impl RecordHead {
    pub(crate) fn blocks(&self) -> usize {
        self.images + self.descriptors
    }
}

/// Lays out a record for place `at` of the ring; image i is block `descriptors + i` of the buffer, sealed.
pub(crate) fn encode(place: &Place, at: u64, head: RecordHead, frozen: &[Frozen]) -> Arc<AlignedBuf> {
    debug_assert_eq!(head.images, frozen.len());
    let mut buf = AlignedBuf::zeroed_blocks(record_blocks(frozen.len()));
    let (descriptor_bytes, image_bytes) = buf.split_at_mut(head.descriptors * BLOCK_SIZE);
    let mut images = image_bytes.chunks_exact_mut(BLOCK_SIZE).zip(frozen);
    for (index, bytes) in descriptor_bytes.chunks_exact_mut(BLOCK_SIZE).enumerate() {
        let descriptor: &mut Block = bytes.try_into().expect("a chunk is one block");
        let addr = place.ring(at + index as u64);
        header::init(descriptor, BlockKind::Record, addr, place.secret, place.owner());
        let record = RecordImage::of_mut(descriptor);
        record.epoch = head.epoch.into();
        record.seq = head.seq.into();
        record.stable_seq = head.stable_seq.into();
        record.record_type = head.record_type.into();
        record.flags = head.flags.into();
        record.images = (head.images as u32).into();
        record.descriptors = (head.descriptors as u16).into();
        record.index = (index as u16).into();
        for (entry, (bytes, frozen)) in record.entries.iter_mut().zip(images.by_ref()) {
            bytes.copy_from_slice(&frozen.image);
            let image: &mut Block = bytes.try_into().expect("a chunk is one block");
            entry.checksum = header::seal(image, head.version).into();
            entry.addr = frozen.addr.0.into();
        }
        header::seal(descriptor, head.version);
    }
    Arc::new(buf)
}

/// The head of a record of images.
pub(crate) fn image_record(
    epoch: u64,
    seq: u64,
    stable_seq: u64,
    version: Clock,
    images: usize,
) -> RecordHead {
    RecordHead {
        epoch,
        seq,
        stable_seq,
        version,
        images,
        descriptors: descriptors(images),
        record_type: RECORD_IMAGES,
        flags: MUST_UNDERSTAND,
    }
}

/// Reads a descriptor found at place `at`; `None` if it is none of this journal.
pub(crate) fn parse_descriptor(block: &Block, place: &Place, at: u64) -> Option<(RecordHead, usize)> {
    let owner = place.owner();
    header::verify(block, BlockKind::Record, place.ring(at), &place.secret, owner).ok()?;
    let record = RecordImage::of(block);
    let head = RecordHead {
        epoch: record.epoch.get(),
        seq: record.seq.get(),
        stable_seq: record.stable_seq.get(),
        version: Header::of(block).clock(),
        images: record.images.get() as usize,
        descriptors: record.descriptors.get() as usize,
        record_type: record.record_type.get(),
        flags: record.flags.get(),
    };
    let index = record.index.get() as usize;
    let fits = head.images > 0
        && head.images <= place.ring_blocks as usize
        && head.descriptors == descriptors(head.images)
        && index < head.descriptors
        && at + head.blocks() as u64 - index as u64 <= place.ring_blocks;
    fits.then_some((head, index))
}

/// An image of a record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ImageRef {
    pub(crate) addr: BlockAddr,
    pub(crate) owner: LockName,
    /// Block of the record's buffer.
    pub(crate) block: usize,
}

/// Reads the images of a whole record whose first descriptor is `head`; `None` if any part of it is torn.
pub(crate) fn parse_images(
    buf: &AlignedBuf,
    place: &Place,
    at: u64,
    head: &RecordHead,
) -> Option<Vec<ImageRef>> {
    let block = |n: usize| -> &Block {
        buf[n * BLOCK_SIZE..][..BLOCK_SIZE].try_into().expect("the buffer holds the whole record")
    };
    let mut images = Vec::with_capacity(head.images);
    for index in 0..head.descriptors {
        let descriptor = block(index);
        if parse_descriptor(descriptor, place, at + index as u64) != Some((*head, index)) {
            return None;
        }
        let left = head.images - images.len();
        for entry in RecordImage::of(descriptor).entries.iter().take(left.min(ENTRIES)) {
            let n = head.descriptors + images.len();
            let addr = BlockAddr(entry.addr.get());
            let image = Header::of(block(n));
            let sound = header::is_ours(block(n), addr, &place.secret).is_ok()
                && image.checksum == entry.checksum
                && image.clock() == head.version;
            images.push(ImageRef { addr, owner: image.owner().filter(|_| sound)?, block: n });
        }
    }
    Some(images)
}

/// Refuses a record that must be understood and is not.
pub(crate) fn check_understood(head: &RecordHead, addr: BlockAddr) -> Result<bool, FsError> {
    if head.record_type == RECORD_IMAGES {
        Ok(true)
    } else if head.flags & MUST_UNDERSTAND == 0 {
        Ok(false)
    } else {
        Err(FsError::corrupt("journal record", addr, "it needs a newer program"))
    }
}
