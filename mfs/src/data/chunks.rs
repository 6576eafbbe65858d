//! The bytes of one file that are in memory.
//!
//! A block is absent, clean, dirty, or being written back; one being written may be dirty again. What is dirty
//! or being written is never dropped. Bytes of a present block beyond the end of the file are zero. A buffer
//! that is being written to the device is never changed: a new write copies it first.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use storage_control::{AlignedBuf, BLOCK_SIZE};

/// Blocks in a chunk.
pub(crate) const CHUNK_BLOCKS: u64 = 16;
/// Bytes in a chunk.
pub(crate) const CHUNK_BYTES: usize = CHUNK_BLOCKS as usize * BLOCK_SIZE;

const BLOCK: u64 = BLOCK_SIZE as u64;

const _: () = assert!(CHUNK_BLOCKS <= u16::BITS as u64);

/// One bit per block of a chunk.
type Bits = u16;

/// Number of a chunk in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ChunkNo(pub(crate) u64);

struct Chunk {
    buf: Arc<AlignedBuf>,
    present: Bits,
    dirty: Bits,
    writing: Bits,
}

impl Chunk {
    fn new() -> Self {
        Self { buf: Arc::new(AlignedBuf::zeroed(CHUNK_BYTES)), present: 0, dirty: 0, writing: 0 }
    }

    fn busy(&self) -> Bits {
        self.dirty | self.writing
    }
}

/// Bits of the blocks `range` (of the file) in chunk `no`.
fn bits(no: ChunkNo, range: &Range<u64>) -> Bits {
    let first = no.0 * CHUNK_BLOCKS;
    let start = range.start.clamp(first, first + CHUNK_BLOCKS) - first;
    let end = range.end.clamp(first, first + CHUNK_BLOCKS) - first;
    if start >= end {
        return 0;
    }
    let ones = ((1_u32 << (end - start)) - 1) as Bits;
    ones << start
}

/// Blocks that `[offset, offset + len)` touches.
pub(crate) fn blocks_of(offset: u64, len: u64) -> Range<u64> {
    if len == 0 { offset / BLOCK..offset / BLOCK } else { offset / BLOCK..(offset + len).div_ceil(BLOCK) }
}

/// The dirty blocks of one chunk, taken for write-back.
#[derive(Clone)]
pub(crate) struct Captured {
    pub(crate) no: ChunkNo,
    blocks: Bits,
    pub(crate) buf: Arc<AlignedBuf>,
}

impl Captured {
    /// Runs of captured blocks, as blocks of the file.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let first = self.no.0 * CHUNK_BLOCKS;
        let mut rest = u32::from(self.blocks);
        let mut at = 0;
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            let skip = rest.trailing_zeros();
            rest >>= skip;
            let len = rest.trailing_ones();
            rest = rest.checked_shr(len).unwrap_or(0);
            let start = first + u64::from(at + skip);
            at += skip + len;
            Some(start..start + u64::from(len))
        })
    }
}

/// See the module's header.
#[derive(Default)]
pub(crate) struct Chunks {
    chunks: BTreeMap<ChunkNo, Chunk>,
    busy_blocks: u64,
}

impl Chunks {
    /// Blocks that are dirty or being written.
    pub(crate) fn busy_blocks(&self) -> u64 {
        self.busy_blocks
    }

    /// Whether any block is dirty.
    pub(crate) fn any_dirty(&self) -> bool {
        self.busy_blocks > 0 && self.chunks.values().any(|c| c.dirty != 0)
    }

    /// Whether the block is present.
    pub(crate) fn has(&self, block: u64) -> bool {
        let no = ChunkNo(block / CHUNK_BLOCKS);
        self.chunks.get(&no).is_some_and(|c| c.present & bits(no, &(block..block + 1)) != 0)
    }

    /// Blocks of the range that a write would make busy.
    pub(crate) fn count_new(&self, range: &Range<u64>) -> u64 {
        let busy: u64 =
            self.within(range).map(|(no, c)| (c.busy() & bits(no, range)).count_ones() as u64).sum();
        (range.end - range.start) - busy
    }

    fn within(&self, range: &Range<u64>) -> impl Iterator<Item = (ChunkNo, &Chunk)> {
        let chunks = ChunkNo(range.start / CHUNK_BLOCKS)..ChunkNo(range.end.div_ceil(CHUNK_BLOCKS));
        let chunks = if chunks.start < chunks.end { Some(self.chunks.range(chunks)) } else { None };
        chunks.into_iter().flatten().map(|(no, c)| (*no, c))
    }

    /// Copies what is present of `[offset, offset + out.len())` and returns the runs of blocks that are not.
    pub(crate) fn copy_out(&self, offset: u64, out: &mut [u8]) -> Vec<Range<u64>> {
        let mut missing: Vec<Range<u64>> = Vec::new();
        let end = offset + out.len() as u64;
        for block in blocks_of(offset, out.len() as u64) {
            let no = ChunkNo(block / CHUNK_BLOCKS);
            match self.chunks.get(&no) {
                Some(chunk) if chunk.present & bits(no, &(block..block + 1)) != 0 => {
                    let from = (block * BLOCK).max(offset);
                    let to = ((block + 1) * BLOCK).min(end);
                    let at = (from - no.0 * CHUNK_BYTES as u64) as usize;
                    let len = (to - from) as usize;
                    let dest = (from - offset) as usize;
                    out[dest..dest + len].copy_from_slice(&chunk.buf[at..at + len]);
                }
                _ => match missing.last_mut() {
                    Some(run) if run.end == block => run.end += 1,
                    _ => missing.push(block..block + 1),
                },
            }
        }
        missing
    }

    /// Writes; blocks written in part must be present unless the rest of them is beyond the end of the file.
    /// All touched blocks are dirty then. Returns how many were not busy before.
    pub(crate) fn copy_in(&mut self, offset: u64, data: &[u8]) -> u64 {
        let mut newly = 0;
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let no = ChunkNo(at / CHUNK_BYTES as u64);
            let start = (at % CHUNK_BYTES as u64) as usize;
            let len = (data.len() - done).min(CHUNK_BYTES - start);
            let touched = bits(no, &blocks_of(at, len as u64));
            let chunk = self.chunks.entry(no).or_insert_with(Chunk::new);
            let buf = Arc::make_mut(&mut chunk.buf);
            // An absent block may have bytes of its past.
            let (first, last) = (start / BLOCK_SIZE, (start + len - 1) / BLOCK_SIZE);
            for block in [first, last] {
                if chunk.present & (1 << block) == 0 {
                    buf[block * BLOCK_SIZE..(block + 1) * BLOCK_SIZE].fill(0);
                }
            }
            buf[start..start + len].copy_from_slice(&data[done..done + len]);
            newly += u64::from((touched & !chunk.busy()).count_ones());
            chunk.present |= touched;
            chunk.dirty |= touched;
            done += len;
        }
        self.busy_blocks += newly;
        newly
    }

    /// Makes absent blocks present and clean, from `block` on; `data` is whole blocks. Bytes beyond the end of
    /// the file become zero.
    pub(crate) fn fill(&mut self, block: u64, data: &[u8], size: u64) {
        for (i, bytes) in data.chunks_exact(BLOCK_SIZE).enumerate() {
            let block = block + i as u64;
            let no = ChunkNo(block / CHUNK_BLOCKS);
            let bit = bits(no, &(block..block + 1));
            let chunk = self.chunks.entry(no).or_insert_with(Chunk::new);
            if chunk.present & bit != 0 {
                continue;
            }
            let inside = size.saturating_sub(block * BLOCK).min(BLOCK) as usize;
            let at = (block % CHUNK_BLOCKS) as usize * BLOCK_SIZE;
            let buf = Arc::make_mut(&mut chunk.buf);
            buf[at..at + inside].copy_from_slice(&bytes[..inside]);
            buf[at + inside..at + BLOCK_SIZE].fill(0);
            chunk.present |= bit;
        }
    }

    /// Makes present blocks of the range dirty; returns how many were not busy before.
    pub(crate) fn dirty(&mut self, range: Range<u64>) -> u64 {
        let mut newly = 0;
        let chunks = ChunkNo(range.start / CHUNK_BLOCKS)..ChunkNo(range.end.div_ceil(CHUNK_BLOCKS));
        if chunks.start < chunks.end {
            for (no, chunk) in self.chunks.range_mut(chunks) {
                let touched = bits(*no, &range) & chunk.present;
                newly += u64::from((touched & !chunk.busy()).count_ones());
                chunk.dirty |= touched;
            }
        }
        self.busy_blocks += newly;
        newly
    }

    /// Forgets everything beyond `size`, dirty or not; nothing beyond is being written. Returns how many blocks
    /// are not busy any more.
    pub(crate) fn cut(&mut self, size: u64) -> u64 {
        let end = size.div_ceil(BLOCK);
        let mut freed = 0;
        let beyond = end..u64::MAX;
        let mut empty = Vec::new();
        for (no, chunk) in self.chunks.range_mut(ChunkNo(end / CHUNK_BLOCKS)..) {
            let gone = bits(*no, &beyond);
            debug_assert_eq!(chunk.writing & gone, 0, "truncation waits for write-back");
            freed += u64::from((chunk.busy() & gone).count_ones());
            chunk.present &= !gone;
            chunk.dirty &= !gone;
            if chunk.present == 0 {
                empty.push(*no);
            }
        }
        for no in empty {
            self.chunks.remove(&no);
        }
        self.busy_blocks -= freed;
        let tail = size / BLOCK;
        if !size.is_multiple_of(BLOCK) && self.has(tail) {
            let chunk =
                self.chunks.get_mut(&ChunkNo(tail / CHUNK_BLOCKS)).expect("a present block has a chunk");
            let at = (tail % CHUNK_BLOCKS) as usize * BLOCK_SIZE;
            Arc::make_mut(&mut chunk.buf)[at + (size % BLOCK) as usize..at + BLOCK_SIZE].fill(0);
        }
        freed
    }

    /// Takes up to `max_blocks` dirty blocks for write-back, lowest first.
    pub(crate) fn capture(&mut self, max_blocks: u64) -> Vec<Captured> {
        let mut taken = Vec::new();
        let mut count = 0;
        for (no, chunk) in &mut self.chunks {
            if chunk.dirty == 0 {
                continue;
            }
            let mut blocks = chunk.dirty;
            while count + u64::from(blocks.count_ones()) > max_blocks {
                blocks &= !(1 << blocks.ilog2());
            }
            if blocks == 0 {
                break;
            }
            count += u64::from(blocks.count_ones());
            taken.push(Captured { no: *no, blocks, buf: chunk.buf.clone() });
            chunk.writing |= blocks;
            chunk.dirty &= !blocks;
        }
        taken
    }

    /// What was captured is on the device now. Returns how many blocks are not busy any more.
    pub(crate) fn written(&mut self, captured: &[Captured]) -> u64 {
        self.end_writing(captured, |_, _| {})
    }

    /// Writing failed for good: the blocks are forgotten unless they were written again since.
    pub(crate) fn lost(&mut self, captured: &[Captured]) -> u64 {
        self.end_writing(captured, |chunk, blocks| chunk.present &= !(blocks & !chunk.dirty))
    }

    /// Writing was given up for now: the blocks are dirty again.
    pub(crate) fn give_back(&mut self, captured: &[Captured]) {
        self.end_writing(captured, |chunk, blocks| chunk.dirty |= blocks);
    }

    fn end_writing(&mut self, captured: &[Captured], what: impl Fn(&mut Chunk, Bits)) -> u64 {
        let mut freed = 0;
        for taken in captured {
            let Some(chunk) = self.chunks.get_mut(&taken.no) else { continue };
            let before = chunk.busy();
            chunk.writing &= !taken.blocks;
            what(chunk, taken.blocks);
            freed += u64::from((before & !chunk.busy()).count_ones());
            if chunk.present == 0 {
                self.chunks.remove(&taken.no);
            }
        }
        self.busy_blocks -= freed;
        freed
    }

    /// Drops the clean blocks of a chunk; whether that was all of it.
    pub(crate) fn drop_clean(&mut self, no: ChunkNo) -> bool {
        let Some(chunk) = self.chunks.get_mut(&no) else { return true };
        chunk.present &= chunk.busy();
        if chunk.present == 0 {
            self.chunks.remove(&no);
            return true;
        }
        false
    }

    /// Drops everything that is not busy.
    pub(crate) fn drop_all_clean(&mut self) {
        self.chunks.retain(|_, chunk| {
            chunk.present &= chunk.busy();
            chunk.present != 0
        });
    }

    /// Chunks that the range of blocks touches and that are there.
    pub(crate) fn numbers(&self, range: &Range<u64>) -> Vec<ChunkNo> {
        self.within(range).map(|(no, _)| no).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(chunks: &Chunks, offset: u64, len: usize) -> (Vec<u8>, Vec<Range<u64>>) {
        let mut out = vec![0xee; len];
        let missing = chunks.copy_out(offset, &mut out);
        (out, missing)
    }

    #[test]
    fn what_is_written_is_read_and_the_rest_is_missing() {
        let mut chunks = Chunks::default();
        assert_eq!(chunks.copy_in(65_536 - 4096, &[7; 8192]), 2);
        let (out, missing) = read(&chunks, 65_536 - 8192, 16_384);
        assert_eq!(missing, [14..15, 17..18]);
        assert!(out[4096..12_288].iter().all(|b| *b == 7));
        assert_eq!(chunks.busy_blocks(), 2);
    }

    #[test]
    fn a_block_written_again_during_write_back_stays_dirty() {
        let mut chunks = Chunks::default();
        chunks.copy_in(0, &[1; 4096]);
        let captured = chunks.capture(100);
        assert_eq!(chunks.copy_in(0, &[2; 4096]), 0);
        assert_eq!(captured[0].buf[0], 1, "the captured buffer does not change");
        assert_eq!(chunks.written(&captured), 0);
        assert!(chunks.any_dirty());
        let captured = chunks.capture(100);
        assert_eq!(chunks.written(&captured), 1);
        assert_eq!(chunks.busy_blocks(), 0);
        assert_eq!(read(&chunks, 0, 1).0, [2]);
    }

    #[test]
    fn filling_does_not_overwrite_and_zeroes_beyond_the_end() {
        let mut chunks = Chunks::default();
        chunks.copy_in(0, &[1; 4096]);
        chunks.fill(0, &[9; 8192], 4096 + 10);
        let (out, missing) = read(&chunks, 0, 8192);
        assert!(missing.is_empty());
        assert_eq!((out[0], out[4096 + 9], out[4096 + 10]), (1, 9, 0));
    }

    #[test]
    fn a_cut_forgets_dirty_blocks_and_zeroes_the_tail() {
        let mut chunks = Chunks::default();
        chunks.copy_in(0, &[1; 3 * 4096]);
        assert_eq!(chunks.cut(5000), 1);
        assert_eq!(chunks.busy_blocks(), 2);
        let (out, missing) = read(&chunks, 0, 3 * 4096);
        assert_eq!(missing, vec![2..3; 1]);
        assert_eq!((out[4999], out[5000]), (1, 0));
    }

    #[test]
    fn captured_runs_are_found() {
        let mut chunks = Chunks::default();
        chunks.copy_in(0, &[1; 2 * 4096]);
        chunks.copy_in(5 * 4096, &[1; 11 * 4096]);
        let captured = chunks.capture(100);
        assert_eq!(captured[0].runs().collect::<Vec<_>>(), [0..2, 5..16]);
    }

    #[test]
    fn a_block_that_comes_back_has_no_bytes_of_its_past() {
        let mut chunks = Chunks::default();
        chunks.copy_in(0, &[7; 8192]);
        chunks.cut(4096);
        chunks.copy_in(4096 + 100, &[1; 10]);
        let (out, _) = read(&chunks, 4096, 4096);
        assert_eq!((out[99], out[100], out[110]), (0, 1, 0));
    }

    #[test]
    fn lost_blocks_are_absent_afterwards() {
        let mut chunks = Chunks::default();
        chunks.copy_in(0, &[1; 4096]);
        let captured = chunks.capture(100);
        assert_eq!(chunks.lost(&captured), 1);
        assert!(!chunks.has(0));
    }
}
