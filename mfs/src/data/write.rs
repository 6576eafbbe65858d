//! `write`: bytes go into memory under the exclusive lock, to the device later.

use std::ops::Range;
use std::sync::Arc;

use dlm::Mode;
use storage_control::BLOCK_SIZE;

use super::MAX_FILE_BYTES;
use super::chunks::blocks_of;
use crate::alloc::Promise;
use crate::error::FsError;
use crate::extent::{self, Mapping};
use crate::filesystem::{Filesystem, Held, OpenFile, later};
use crate::inode::{self, Content, FileType};
use crate::inode_table::Inode;
use crate::ops::{Result, Write};

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Promised for a file's map, beside its data. What a badly fragmented one needs beyond that comes out of the
/// groups' reserve.
const MAP_BLOCKS: u64 = 8;

impl Filesystem {
    /// Writes all of it or nothing.
    pub(crate) async fn write_file(&self, file: &OpenFile, write: Write) -> Result<usize> {
        let len = write.data.len() as u64;
        if len == 0 {
            return Ok(0);
        }
        loop {
            if let Some(written) = self.try_write(file, &write).await? {
                return Ok(written);
            }
        }
    }

    /// `None`: the space promised has gone with its group before the data were there; to be tried again.
    async fn try_write(&self, file: &OpenFile, write: &Write) -> Result<Option<usize>> {
        let len = write.data.len() as u64;
        // Both may wait for write-back, which needs locks: before this one.
        self.data.wait_for_room().await;
        let most_blocks = len.div_ceil(BLOCK) + 2 + MAP_BLOCKS;
        let mut promise = match self.alloc.promise_wait(most_blocks).await {
            Ok(promise) => Some(promise),
            // Blocks that the file has already need no space.
            Err(FsError::NoSpace) => None,
            Err(error) => return Err(error),
        };
        let held = self.hold_file(file, Mode::EX).await?;
        if held.dinode.kind != FileType::Regular {
            return Err(FsError::Invalid);
        }
        let size = held.inode.data.lock().size(held.dinode.size);
        let offset = if write.append { size } else { write.offset };
        let end = offset.checked_add(len).filter(|end| *end <= MAX_FILE_BYTES).ok_or(FsError::TooBig)?;
        self.prepare_blocks(&held, offset..end, size).await?;
        if promise.is_none() && !self.has_blocks(&held, &write_range(offset, end, size)).await? {
            return Err(FsError::NoSpace);
        }
        if promise.as_mut().is_some_and(|promise| !promise.keep()) {
            return Ok(None);
        }
        self.put(&held, offset, write, promise, size);
        Ok(Some(write.data.len()))
    }

    /// Loads what is not overwritten whole: the first and the last block, and the old last block if the file
    /// grows behind it, where the device may have anything beyond the old end.
    async fn prepare_blocks(&self, held: &Held, range: Range<u64>, size: u64) -> Result<()> {
        let mut partial = Vec::new();
        if !range.start.is_multiple_of(BLOCK) {
            partial.push(range.start / BLOCK);
        }
        if !range.end.is_multiple_of(BLOCK) && range.end < size {
            partial.push(range.end / BLOCK);
        }
        if range.end > size && !size.is_multiple_of(BLOCK) {
            partial.push(size / BLOCK);
        }
        // Small content leaves the dinode as a whole.
        if matches!(&held.dinode.content, Content::Data(bytes) if !bytes.is_empty()) {
            partial.push(0);
        }
        partial.sort_unstable();
        partial.dedup();
        self.load(&held.inode, &partial, size).await
    }

    /// Whether all blocks of the range are allocated or promised.
    async fn has_blocks(&self, held: &Held, range: &Range<u64>) -> Result<bool> {
        let blocks = blocks_of(range.start, range.end - range.start);
        if held.inode.data.lock().chunks.count_new(&blocks) == 0 {
            return Ok(true);
        }
        let _unchanged = held.inode.edit.read().await;
        let dinode = inode::read(&self.store, held.inode.ino.0).await?;
        if matches!(&dinode.content, Content::Data(_)) {
            return Ok(range.end <= dinode.inline_room() as u64);
        }
        let map = extent::map(&self.store, &dinode, blocks.start, blocks.end - blocks.start).await?;
        Ok(map.iter().all(|m| matches!(m, Mapping::Data(e) if !e.is_unwritten())))
    }

    fn put(&self, held: &Held, offset: u64, write: &Write, promise: Option<Promise>, size: u64) {
        let inode = &held.inode;
        let end = offset + write.data.len() as u64;
        let now = self.now();
        let mut state = inode.data.lock();
        let mut busy = state.chunks.copy_in(offset, &write.data);
        if end > size {
            busy += dirty_tail(&mut state.chunks, size);
            state.pending.size = Some(end);
        }
        let d = &held.dinode;
        let p = &mut state.pending;
        p.mtime = Some(later(p.mtime.unwrap_or(d.mtime), now));
        p.ctime = Some(later(p.ctime.unwrap_or(d.ctime), now));
        if write.kill_suid {
            p.clear_perm |= set_id_bits(d.perm);
        }
        self.keep_promise(&mut state, promise, busy);
        self.data.became_dirty(inode, &mut state, self.runtime.now());
        drop(state);
        self.data.add_busy(busy);
    }

    /// Keeps of a promise what newly dirty blocks may need.
    pub(super) fn keep_promise(&self, state: &mut super::FileState, promise: Option<Promise>, blocks: u64) {
        let Some(mut promise) = promise else { return };
        let blocks = if state.promise.is_none() { blocks.saturating_add(MAP_BLOCKS) } else { blocks };
        if promise.blocks() > blocks {
            drop(promise.split(promise.blocks() - blocks));
        }
        match &mut state.promise {
            Some(kept) => kept.merge(promise),
            None => state.promise = Some(promise),
        }
    }

    /// Grows a file without writing: a hole follows the old end.
    pub(super) async fn grow(&self, held: &Held, size: u64, new_size: u64) -> Result<()> {
        if new_size > MAX_FILE_BYTES {
            return Err(FsError::TooBig);
        }
        self.prepare_blocks(held, new_size..new_size, size).await?;
        let inode: &Arc<Inode> = &held.inode;
        let mut state = inode.data.lock();
        let busy = dirty_tail(&mut state.chunks, size);
        state.pending.size = Some(new_size);
        self.data.became_dirty(inode, &mut state, self.runtime.now());
        drop(state);
        self.data.add_busy(busy);
        Ok(())
    }
}

/// The old last block is written too if the file grows behind it: its bytes beyond the old end become part of
/// the file.
fn dirty_tail(chunks: &mut super::Chunks, size: u64) -> u64 {
    if size.is_multiple_of(BLOCK) { 0 } else { chunks.dirty(size / BLOCK..size / BLOCK + 1) }
}

fn write_range(offset: u64, end: u64, size: u64) -> Range<u64> {
    if end > size && size < offset { size.min(offset)..end } else { offset..end }
}

/// The set-id bits that a write by an ordinary user takes away.
fn set_id_bits(perm: u32) -> u32 {
    let gid = if perm & libc::S_IXGRP != 0 { libc::S_ISGID } else { 0 };
    libc::S_ISUID | gid
}
