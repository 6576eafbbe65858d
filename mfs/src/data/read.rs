//! Reading file data: from memory what is there, the rest from the device, zeros for holes.

use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;

use dlm::Mode;
use storage_control::{AlignedBuf, BLOCK_SIZE, BlockAddr, IoFuture};

use super::chunks::blocks_of;
use crate::extent::{self, Mapping};
use crate::filesystem::{Filesystem, Held, later};
use crate::inode::{self, Content};
use crate::inode_table::Inode;
use crate::ops::{ReadBuf, Result};
use std::sync::Arc;

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Reads up to this size stay in memory where the kernel does not keep them.
const KEEP_UP_TO: usize = 64 << 10;
/// Access times older than this are renewed although nothing was written.
const RELATIME_SECS: i64 = 24 * 60 * 60;

/// Blocks of a file and where they lie: `None` is a hole.
pub(super) struct Piece {
    pub(super) blocks: Range<u64>,
    pub(super) at: Option<BlockAddr>,
}

impl Filesystem {
    /// Reads a locked file. `keep` says that no page cache above will answer the next read of the same place.
    pub(crate) async fn read_file(
        &self,
        held: &Held,
        offset: u64,
        len: usize,
        keep: bool,
    ) -> Result<ReadBuf> {
        let inode = &held.inode;
        // Counted while the lock is held, before the answer: whoever takes the lock away sees it.
        inode.fills.fetch_add(1, SeqCst);
        let size = inode.data.lock().size(held.dinode.size);
        let len = size.saturating_sub(offset).min(len as u64) as usize;
        if len == 0 {
            return Ok(ReadBuf::new(AlignedBuf::zeroed(0), 0, 0));
        }
        self.touch_atime(held);
        let first = offset / BLOCK;
        let blocks = blocks_of(offset, len as u64);
        let mut buf = AlignedBuf::zeroed_blocks((blocks.end - blocks.start) as usize);
        let start = (offset - first * BLOCK) as usize;
        let missing = inode.data.lock().chunks.copy_out(offset, &mut buf[start..start + len]);
        if missing.is_empty() {
            let numbers = inode.data.lock().chunks.numbers(&blocks);
            self.data.used(inode, numbers);
            return Ok(ReadBuf::new(buf, start, len));
        }
        let pieces = match self.locate(inode, &missing).await? {
            // Inline content is shorter than a block: where the first one is in memory, that is newer.
            Located::Inline(_) if missing.iter().all(|run| run.start > 0) => {
                return Ok(ReadBuf::new(buf, start, len));
            }
            Located::Inline(bytes) => {
                let from = (offset as usize).min(bytes.len());
                let to = (offset as usize + len).min(bytes.len());
                buf[start..start + to - from].copy_from_slice(&bytes[from..to]);
                return Ok(ReadBuf::new(buf, start, len));
            }
            Located::Blocks(pieces) => pieces,
        };
        // One run that covers everything needs no copy.
        if let [Piece { blocks: run, at: Some(at) }] = &pieces[..]
            && *run == blocks
        {
            buf = self.device.read(*at, (run.end - run.start) as usize).await?;
        } else {
            self.read_pieces(&pieces, |block, bytes| {
                let at = ((block - first) * BLOCK) as usize;
                buf[at..at + bytes.len()].copy_from_slice(bytes);
            })
            .await?;
        }
        if keep && len <= KEEP_UP_TO {
            for run in missing {
                let bytes = ((run.start - first) * BLOCK) as usize..((run.end - first) * BLOCK) as usize;
                let mut state = inode.data.lock();
                state.chunks.fill(run.start, &buf[bytes], size);
                let numbers = state.chunks.numbers(&run);
                drop(state);
                self.data.used(inode, numbers);
            }
        }
        Ok(ReadBuf::new(buf, start, len))
    }

    /// Brings blocks of a locked file into memory, as far as they are not there. Bytes beyond `size` become zero.
    pub(super) async fn load(&self, inode: &Arc<Inode>, blocks: &[u64], size: u64) -> Result<()> {
        let missing: Vec<Range<u64>> = {
            let state = inode.data.lock();
            blocks.iter().filter(|b| !state.chunks.has(**b)).map(|b| *b..*b + 1).collect()
        };
        if missing.is_empty() {
            return Ok(());
        }
        let mut loaded = Vec::new();
        match self.locate(inode, &missing).await? {
            Located::Inline(bytes) => {
                let mut block = vec![0; BLOCK_SIZE];
                block[..bytes.len()].copy_from_slice(&bytes);
                for run in missing {
                    loaded
                        .push((run.start, if run.start == 0 { block.clone() } else { vec![0; BLOCK_SIZE] }));
                }
            }
            Located::Blocks(pieces) => {
                for run in &missing {
                    loaded.push((run.start, vec![0; BLOCK_SIZE]));
                }
                self.read_pieces(&pieces, |block, bytes| {
                    for (i, bytes) in bytes.chunks_exact(BLOCK_SIZE).enumerate() {
                        if let Some((_, dest)) = loaded.iter_mut().find(|(b, _)| *b == block + i as u64) {
                            dest.copy_from_slice(bytes);
                        }
                    }
                })
                .await?;
            }
        }
        let mut state = inode.data.lock();
        for (block, bytes) in loaded {
            state.chunks.fill(block, &bytes, size);
        }
        Ok(())
    }

    /// Where runs of blocks lie.
    async fn locate(&self, inode: &Inode, runs: &[Range<u64>]) -> Result<Located> {
        // Write-back may be changing the map.
        let _unchanged = inode.edit.read().await;
        let dinode = inode::read(&self.store, inode.ino.0).await?;
        if let Content::Data(bytes) = dinode.content {
            return Ok(Located::Inline(bytes));
        }
        let mut pieces = Vec::new();
        for run in runs {
            for mapping in extent::map(&self.store, &dinode, run.start, run.end - run.start).await? {
                pieces.push(match mapping {
                    Mapping::Hole { logical, len } => Piece { blocks: logical..logical + len, at: None },
                    Mapping::Data(e) => {
                        Piece { blocks: e.logical..e.end(), at: (!e.is_unwritten()).then_some(e.physical) }
                    }
                });
            }
        }
        Ok(Located::Blocks(pieces))
    }

    /// Reads what is on the device, all at once.
    async fn read_pieces(&self, pieces: &[Piece], mut got: impl FnMut(u64, &[u8])) -> Result<()> {
        let reads: Vec<(u64, IoFuture<AlignedBuf>)> = pieces
            .iter()
            .filter_map(|piece| {
                let blocks = (piece.blocks.end - piece.blocks.start) as usize;
                piece.at.map(|at| (piece.blocks.start, self.device.read(at, blocks)))
            })
            .collect();
        // Each is under way already.
        for (block, read) in reads {
            got(block, &read.await?);
        }
        Ok(())
    }

    /// `relatime`, where it costs no lock.
    fn touch_atime(&self, held: &Held) {
        if self.options.no_atime || self.options.read_only {
            return;
        }
        if self.lcl.held(held.guard.resource()) != Mode::EX {
            return;
        }
        // Refused while the lock is on its way down: nothing becomes dirty behind the last write-back under it.
        let Some(_guard) = self.inode_lock_in_hand(&held.inode) else { return };
        let now = self.now();
        let mut state = held.inode.data.lock();
        let atime = state.pending.atime.unwrap_or(held.dinode.atime);
        let mtime = state.pending.mtime.unwrap_or(held.dinode.mtime);
        let ctime = state.pending.ctime.unwrap_or(held.dinode.ctime);
        if atime <= mtime || atime <= ctime || now.secs - atime.secs >= RELATIME_SECS {
            state.pending.atime = Some(later(atime, now));
            self.data.became_dirty(&held.inode, &mut state, self.runtime.now());
        }
    }
}

/// Where the content of a file is.
enum Located {
    /// In the dinode.
    Inline(Vec<u8>),
    Blocks(Vec<Piece>),
}
