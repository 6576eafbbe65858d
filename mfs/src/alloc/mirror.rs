//! A group's bitmap in memory, while this node holds the group's lock. Sans-IO.
//!
//! A block is in at most one of: free, recyclable (freed metadata), cooling (freed data whose transaction is not
//! stable), picked (by a reservation, not yet logged). Everything else is in use.

use std::collections::VecDeque;

use super::bits::BitSet;
use crate::{
    format::group::{BLOCKS_PER_BITMAP, BitmapImage, BlockState, bitmap_blocks},
    store::TxnSeq,
};

/// A run of data this long is not worth searching on for a longer one.
const GOOD_RUN_BLOCKS: u32 = 256;
/// Blocks kept back in each group for work that frees space.
const RESERVE_BLOCKS: u32 = 32;
/// Smaller groups keep back this part.
const RESERVE_FRACTION: u32 = 64;

/// A metadata block picked by a reservation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PickedMeta {
    pub(crate) block: u32,
    /// It was freed metadata, not free.
    pub(crate) recycled: bool,
}

#[derive(Debug)]
pub(crate) struct Mirror {
    blocks: u32,
    free: BitSet,
    recyclable: BitSet,
    picked: BitSet,
    cooling: VecDeque<(TxnSeq, u32, u32)>,
    cooling_blocks: u32,
    /// Bit i: bitmap block i is on disk or in a transaction.
    pub(crate) written: u32,
    data_cursor: u32,
    meta_cursor: u32,
}

impl Mirror {
    /// A group of that many blocks, all in use so far.
    pub(crate) fn new(blocks: u32, written: u32) -> Mirror {
        Mirror {
            blocks,
            free: BitSet::new(blocks),
            recyclable: BitSet::new(blocks),
            picked: BitSet::new(blocks),
            cooling: VecDeque::new(),
            cooling_blocks: 0,
            written,
            // Metadata from the start of the group, data from behind the first eighth.
            data_cursor: blocks / 8,
            meta_cursor: 0,
        }
    }

    /// Takes over the states in bitmap block `index`.
    pub(crate) fn load(&mut self, index: u32, map: &BitmapImage) {
        let first = index * BLOCKS_PER_BITMAP;
        for block in first..self.blocks.min(first + BLOCKS_PER_BITMAP) {
            match map.get(block - first) {
                BlockState::Free => {
                    self.free.insert(block);
                }
                BlockState::FreedMetadata => {
                    self.recyclable.insert(block);
                }
                BlockState::Data | BlockState::Metadata => {}
            }
        }
    }

    /// Blocks kept back for work that frees space.
    pub(crate) fn reserve(&self) -> u32 {
        reserve_of(self.blocks)
    }

    /// Blocks ordinary work can get now, as data or metadata.
    pub(crate) fn available(&self) -> u32 {
        self.free.count().saturating_sub(self.reserve())
    }

    /// Free blocks, and such that will be.
    pub(crate) fn free_in_time(&self) -> u32 {
        self.free.count() + self.recyclable.count() + self.cooling_blocks + self.picked.count()
    }

    /// Freed metadata blocks that wait to be free.
    pub(crate) fn recyclable(&self) -> u32 {
        self.recyclable.count()
    }

    fn takable(&self, urgent: bool) -> u32 {
        if urgent { self.free.count() } else { self.available() }
    }

    /// Picks a metadata block; freed ones first. `free_too`: a free one may be taken.
    pub(crate) fn take_meta(&mut self, urgent: bool, free_too: bool) -> Option<PickedMeta> {
        let next = |set: &BitSet, cursor| set.first_from(cursor).or_else(|| set.first_from(0));
        let picked = if let Some(block) = next(&self.recyclable, self.meta_cursor) {
            self.recyclable.remove(block);
            PickedMeta { block, recycled: true }
        } else if free_too && self.takable(urgent) > 0 {
            let block = next(&self.free, self.meta_cursor)?;
            self.free.remove(block);
            PickedMeta { block, recycled: false }
        } else {
            return None;
        };
        self.picked.insert(picked.block);
        self.meta_cursor = picked.block + 1;
        Some(picked)
    }

    /// Picks a run of at most `want` free blocks: at `goal` if it is free, else the first of at least `hint` behind
    /// the last one, else the longest.
    pub(crate) fn take_run(
        &mut self,
        goal: Option<u32>,
        want: u32,
        hint: u32,
        urgent: bool,
    ) -> Option<(u32, u32)> {
        let want = want.min(self.takable(urgent));
        if want == 0 {
            return None;
        }
        let enough = want.min(hint.clamp(1, GOOD_RUN_BLOCKS));
        let at_goal = goal.filter(|&goal| self.free.contains(goal));
        let (start, len) = match at_goal.and_then(|goal| self.free.runs(goal, goal + 1).next()) {
            Some(run) => run,
            None => self.best_run(goal.unwrap_or(self.data_cursor), enough)?,
        };
        let len = len.min(want);
        for block in start..start + len {
            self.free.remove(block);
            self.picked.insert(block);
        }
        self.data_cursor = start + len;
        Some((start, len))
    }

    fn best_run(&self, from: u32, enough: u32) -> Option<(u32, u32)> {
        let mut best: Option<(u32, u32)> = None;
        for run in self.free.runs(from, self.blocks).chain(self.free.runs(0, from)) {
            if run.1 >= enough {
                return Some(run);
            }
            if best.is_none_or(|best| run.1 > best.1) {
                best = Some(run);
            }
        }
        best
    }

    /// Picks a run of exactly that many free blocks.
    pub(crate) fn take_contiguous(&mut self, want: u32) -> Option<u32> {
        if want > self.available() {
            return None;
        }
        let (start, _) = self.free.runs(0, self.blocks).find(|run| run.1 >= want)?;
        for block in start..start + want {
            self.free.remove(block);
            self.picked.insert(block);
        }
        Some(start)
    }

    /// A picked block is logged: it is in use.
    pub(crate) fn logged(&mut self, start: u32, len: u32) {
        for block in start..start + len {
            let was = self.picked.remove(block);
            debug_assert!(was, "only a picked block is logged");
        }
    }

    pub(crate) fn is_picked(&self, block: u32) -> bool {
        self.picked.contains(block)
    }

    /// Gives back the blocks of a run that were not logged.
    pub(crate) fn give_back(&mut self, start: u32, len: u32) {
        for block in start..start + len {
            if self.picked.remove(block) {
                self.free.insert(block);
            }
        }
    }

    /// Gives back a metadata block if it was not logged.
    pub(crate) fn give_back_meta(&mut self, meta: PickedMeta) {
        if self.picked.remove(meta.block) {
            let set = if meta.recycled { &mut self.recyclable } else { &mut self.free };
            set.insert(meta.block);
        }
    }

    /// Data blocks were freed in a transaction.
    pub(crate) fn freed_data(&mut self, seq: TxnSeq, start: u32, len: u32) {
        self.cooling.push_back((seq, start, len));
        self.cooling_blocks += len;
    }

    /// A metadata block was freed; it may serve as metadata at once.
    pub(crate) fn freed_meta(&mut self, block: u32) {
        self.recyclable.insert(block);
    }

    /// Freed data blocks wait for their transaction.
    pub(crate) fn is_cooling(&self) -> bool {
        !self.cooling.is_empty()
    }

    /// Freed data blocks of stable transactions are free.
    pub(crate) fn thaw(&mut self, stable: TxnSeq) {
        while let Some(&(seq, start, len)) = self.cooling.front() {
            if seq > stable {
                break;
            }
            self.cooling.pop_front();
            self.cooling_blocks -= len;
            for block in start..start + len {
                self.free.insert(block);
            }
        }
    }

    /// Every journal has moved past the freed metadata blocks of bitmap block `index`: they are free. On disk they
    /// stay freed metadata until something is allocated there.
    pub(crate) fn recycle(&mut self, index: u32) {
        let first = index * BLOCKS_PER_BITMAP;
        let last = self.blocks.min(first + BLOCKS_PER_BITMAP);
        let blocks: Vec<u32> = self.recyclable.runs(first, last).flat_map(|(s, n)| s..s + n).collect();
        for block in blocks.into_iter().filter(|&block| block < last) {
            self.recyclable.remove(block);
            self.free.insert(block);
        }
    }

    pub(crate) fn bitmaps(&self) -> u32 {
        bitmap_blocks(self.blocks)
    }

    #[cfg(test)]
    pub(crate) fn assert_consistent(&self) {
        for block in 0..self.blocks {
            let cooling = self.cooling.iter().any(|&(_, start, len)| (start..start + len).contains(&block));
            let places = [
                self.free.contains(block),
                self.recyclable.contains(block),
                self.picked.contains(block),
                cooling,
            ];
            assert!(places.iter().filter(|&&there| there).count() <= 1, "block {block} is in {places:?}");
        }
    }
}

/// What a group of that many blocks keeps back.
pub(crate) fn reserve_of(blocks: u32) -> u32 {
    RESERVE_BLOCKS.min(blocks / RESERVE_FRACTION)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirror() -> Mirror {
        let mut mirror = Mirror::new(2048, 1);
        let mut block = [0; 4096];
        let map = BitmapImage::of_mut(&mut block);
        for n in 0..2 {
            map.set(n, BlockState::Metadata);
        }
        for n in 100..110 {
            map.set(n, BlockState::FreedMetadata);
        }
        mirror.load(0, map);
        mirror
    }

    #[test]
    fn freed_metadata_serves_as_metadata_only() {
        let mut mirror = mirror();
        assert_eq!(mirror.take_meta(false, true), Some(PickedMeta { block: 100, recycled: true }));
        while let Some((start, len)) = mirror.take_run(None, 100, 1, true) {
            assert!(start + len <= 100 || start >= 110);
        }
        assert_eq!(mirror.recyclable(), 9);
        mirror.recycle(0);
        assert!(mirror.take_run(None, 100, 1, true).is_some());
        mirror.assert_consistent();
    }

    #[test]
    fn what_was_picked_and_not_logged_comes_back() {
        let mut mirror = mirror();
        let before = mirror.available();
        let (start, len) = mirror.take_run(None, 50, 1, false).unwrap();
        mirror.logged(start, 20);
        mirror.give_back(start, len);
        assert_eq!(mirror.available(), before - 20);
        mirror.assert_consistent();
    }

    #[test]
    fn freed_data_wait_for_their_transaction() {
        let mut mirror = mirror();
        let (start, len) = mirror.take_run(None, 10, 1, false).unwrap();
        mirror.logged(start, len);
        let before = mirror.available();
        mirror.freed_data(TxnSeq(5), start, len);
        mirror.thaw(TxnSeq(4));
        assert_eq!(mirror.available(), before);
        mirror.thaw(TxnSeq(5));
        assert_eq!(mirror.available(), before + len);
    }

    #[test]
    fn ordinary_work_leaves_the_reserve() {
        let mut mirror = mirror();
        while mirror.take_run(None, 64, 1, false).is_some() {}
        assert_eq!(mirror.available(), 0);
        assert!(mirror.take_run(None, 64, 1, true).is_some());
    }

    #[test]
    fn a_file_grows_where_it_ends() {
        let mut mirror = mirror();
        let (start, len) = mirror.take_run(None, 8, 1, false).unwrap();
        mirror.take_run(Some(1000), 8, 1, false).unwrap();
        assert_eq!(mirror.take_run(Some(start + len), 8, 1, false), Some((start + len, 8)));
    }
}
