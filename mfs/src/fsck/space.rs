//! Who uses which block: collected while walking, compared with the bitmaps at the end. Two bits per block.

use storage_control::BlockAddr;

use super::Checker;
use super::report::Severity;
use crate::LockName;
use crate::format::group::{BLOCKS_PER_BITMAP, BitmapImage, BlockState, GroupImage, bitmap_blocks};
use crate::format::header::{Block, BlockKind, is_ours};
use crate::format::superblock::Geometry;
use crate::store::block_of;

/// The use of every block, as found by walking.
pub(super) struct Uses {
    geometry: Geometry,
    bits: Vec<u8>,
}

/// Why a block cannot be taken into use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Outside of all groups.
    Outside,
    /// Something else uses it, as this.
    Taken(BlockState),
}

impl Uses {
    pub(super) fn new(geometry: Geometry) -> Self {
        Self { geometry, bits: vec![0; geometry.blocks.div_ceil(4) as usize] }
    }

    pub(super) fn get(&self, addr: BlockAddr) -> BlockState {
        let byte = self.bits.get((addr.0 / 4) as usize).copied().unwrap_or(0);
        BlockState::from_bits(byte >> (addr.0 % 4 * 2))
    }

    fn set(&mut self, addr: BlockAddr, state: BlockState) {
        let shift = addr.0 % 4 * 2;
        let byte = &mut self.bits[(addr.0 / 4) as usize];
        *byte = *byte & !(3 << shift) | (state as u8) << shift;
    }

    /// Takes `len` blocks into use; those that something else uses stay as they are and the first of them is
    /// returned.
    pub(super) fn take(
        &mut self,
        addr: BlockAddr,
        len: u64,
        state: BlockState,
    ) -> Result<(), (BlockAddr, Refusal)> {
        let last = BlockAddr(addr.0.saturating_add(len.max(1) - 1));
        let group = self.geometry.group_of(addr);
        if group.is_none() || group != self.geometry.group_of(last) {
            return Err((addr, Refusal::Outside));
        }
        let mut refused = None;
        for block in (addr.0..=last.0).map(BlockAddr) {
            match self.get(block) {
                BlockState::Free => self.set(block, state),
                taken => {
                    refused.get_or_insert((block, Refusal::Taken(taken)));
                }
            }
        }
        refused.map_or(Ok(()), Err)
    }
}

fn word(state: BlockState) -> &'static str {
    match state {
        BlockState::Free => "free",
        BlockState::Data => "data",
        BlockState::Metadata => "metadata",
        BlockState::FreedMetadata => "freed metadata",
    }
}

/// A run of blocks of which bitmap and use say the same two things.
struct Run {
    start: u64,
    len: u64,
    mapped: BlockState,
    used: BlockState,
}

impl Checker<'_> {
    /// Takes the fixed blocks of every group into use.
    pub(super) fn take_group_heads(&mut self) {
        let geometry = self.superblock.geometry;
        for group in 0..geometry.groups {
            let len = 1 + u64::from(bitmap_blocks(geometry.blocks_in(group)));
            self.take(&format!("group {group}"), geometry.group_start(group), len, BlockState::Metadata);
        }
    }

    /// Compares every group's header and bitmaps with what was found in use.
    pub(super) async fn check_groups(&mut self) {
        let geometry = self.superblock.geometry;
        for group in 0..geometry.groups {
            self.check_group(group).await;
            self.progress("groups", u64::from(group) + 1, u64::from(geometry.groups));
        }
    }

    async fn check_group(&mut self, group: u32) {
        let geometry = self.superblock.geometry;
        let start = geometry.group_start(group);
        let what = format!("group {group}");
        let header = match self.block(start, BlockKind::Group, LockName::Group(group)).await {
            Ok(block) => *GroupImage::of(&block),
            Err(error) => return self.report.failure(what, start, &error),
        };
        if let Some(why) = header.defect(&geometry, group) {
            return self.report.error(what, start, why);
        }
        let mut counts = [0_u32; 4];
        let mut run: Option<Run> = None;
        for index in 0..bitmap_blocks(geometry.blocks_in(group)) {
            let Some(bitmap) = self.bitmap(group, index, &header).await else { return };
            let bitmap = BitmapImage::of(&bitmap);
            let first = index * BLOCKS_PER_BITMAP;
            let blocks = BLOCKS_PER_BITMAP.min(geometry.blocks_in(group) - first);
            if (blocks..BLOCKS_PER_BITMAP).any(|block| bitmap.get(block) != BlockState::Free) {
                self.report.error(what.as_str(), start, "its bitmap marks blocks past its end");
            }
            for block in 0..blocks {
                let addr = BlockAddr(start.0 + u64::from(first + block));
                let mapped = bitmap.get(block);
                counts[mapped as usize] += 1;
                self.compare(group, &mut run, addr, mapped);
                if mapped == BlockState::FreedMetadata {
                    self.check_freed(group, addr).await;
                }
            }
        }
        self.end_run(group, run);
        let said =
            [header.free, header.data, header.metadata, header.freed_metadata].map(|count| count.get());
        if said != counts {
            self.report.error(
                what,
                start,
                format!("its header counts {said:?} blocks by state, its bitmaps {counts:?}"),
            );
        }
        let stats = &mut self.report.stats;
        stats.free_blocks += u64::from(counts[0]);
        stats.data_blocks += u64::from(counts[1]);
        stats.metadata_blocks += u64::from(counts[2]);
        stats.freed_metadata_blocks += u64::from(counts[3]);
    }

    /// A bitmap block, made up if it was never written.
    async fn bitmap(&mut self, group: u32, index: u32, header: &GroupImage) -> Option<Box<Block>> {
        let geometry = self.superblock.geometry;
        let addr = BlockAddr(geometry.group_start(group).0 + 1 + u64::from(index));
        if header.bitmaps_written.get() >> index & 1 == 0 {
            let mut block = Box::new([0; storage_control::BLOCK_SIZE]);
            BitmapImage::of_mut(&mut block).format(&geometry, group, index);
            return Some(block);
        }
        let what = format!("bitmap {index} of group {group}");
        match self.block(addr, BlockKind::Bitmap, LockName::Group(group)).await {
            Ok(block) => {
                let bitmap = BitmapImage::of(&block);
                if bitmap.group.get() != group || bitmap.index.get() != index {
                    self.report.error(what, addr, "it names another place");
                }
                Some(block)
            }
            Err(error) => {
                self.report.failure(what, addr, &error);
                None
            }
        }
    }

    fn compare(&mut self, group: u32, run: &mut Option<Run>, addr: BlockAddr, mapped: BlockState) {
        let used = self.uses.get(addr);
        if let Some(run) = run
            && (run.mapped, run.used) == (mapped, used)
        {
            run.len += 1;
            return;
        }
        let ended = run.replace(Run { start: addr.0, len: 1, mapped, used });
        self.end_run(group, ended);
    }

    fn end_run(&mut self, group: u32, run: Option<Run>) {
        let Some(Run { start, len, mapped, used }) = run else { return };
        let (severity, why) = match (mapped, used) {
            (BlockState::FreedMetadata, BlockState::Free) => return,
            (mapped, used) if mapped == used => return,
            (_, BlockState::Free) => {
                (Severity::Leak, format!("marked as {} and nothing uses them", word(mapped)))
            }
            (BlockState::Free | BlockState::FreedMetadata, _) => {
                (Severity::Error, format!("in use as {} and marked as {}", word(used), word(mapped)))
            }
            _ => (Severity::Error, format!("in use as {} and marked as {}", word(used), word(mapped))),
        };
        let what = match len {
            1 => format!("block {start} of group {group}"),
            _ => format!("blocks {start} to {} of group {group}", start + len - 1),
        };
        self.report.add(severity, what, BlockAddr(start), why);
    }

    /// A freed metadata block holds the image that says so, or what no longer is metadata: data are written to it
    /// before the bitmap says that it serves as data, and a crash may come in between.
    async fn check_freed(&mut self, group: u32, addr: BlockAddr) {
        let what = || format!("freed block {addr} of group {group}");
        let image = match self.device.read(addr, 1).await {
            Ok(image) => image,
            Err(error) => return self.report.failure(what(), addr, &error.into()),
        };
        if is_ours(block_of(&image), addr, &self.superblock.secret).is_err() {
            return;
        }
        if let Err(error) = self.verify(&image, addr, BlockKind::Free, LockName::Group(group)) {
            self.report.failure(what(), addr, &error);
        }
    }
}
