//! Write-back: dirty data get blocks and go to the device, then the map and the size follow.
//!
//! For new blocks: reserve in memory, write, flush, then one transaction logs bitmap, map and size. Blocks that
//! the file has already are written in place. A failure that is not the end of this node's access is remembered
//! for `fsync` and `close`, and the data are gone.

use std::ops::Range;
use std::sync::Arc;

use storage_control::{BLOCK_SIZE, BlockAddr, Durability, IoSlice};

use super::chunks::{CHUNK_BLOCKS, Captured};
use super::{FileState, Pending, WriteSeq};
use crate::alloc::{Reservation, Run, Want};
use crate::error::FsError;
use crate::extent::{self, Extent, Mapping};
use crate::filesystem::{Filesystem, group_of};
use crate::inode::{self, Content, Dinode, Needs};
use crate::inode_table::Inode;
use crate::ops::Result;

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Blocks taken for write-back at a time, at most: 32 MiB.
pub(super) const BATCH_BLOCKS: u64 = 8192;
/// Blocks in one request to the device: 1 MiB.
const REQUEST_BLOCKS: u64 = 256;
/// Credits one transaction of a write-back may take.
const MAX_CREDITS: u32 = 200;

/// How far write-back goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum HowFar {
    All,
    /// All that finds space without waiting for a group; the rest stays dirty.
    AtOnce,
    /// Times alone are not worth a transaction.
    Data,
}

impl Filesystem {
    /// Writes back everything of an inode. Its lock is here, or on its way down with nobody inside.
    pub(super) async fn write_back(&self, inode: &Arc<Inode>, what: HowFar) -> Result<()> {
        let _one_at_a_time = inode.writeback.lock().await;
        let mut most = BATCH_BLOCKS;
        while self.write_back_batch(inode, what, &mut most).await? {}
        Ok(())
    }

    /// Writes back up to `most` blocks; whether more may be left. On a full and fragmented filesystem a batch may have to
    /// become smaller: what many pieces might need for the map is far more than what they will.
    pub(super) async fn write_back_batch(
        &self,
        inode: &Arc<Inode>,
        what: HowFar,
        most: &mut u64,
    ) -> Result<bool> {
        {
            let state = inode.data.lock();
            let data = state.chunks.any_dirty() || state.pending.size.is_some();
            if !data && (what == HowFar::Data || state.pending.is_none()) {
                return Ok(false);
            }
        }
        let dinode = inode::read(&self.store, inode.ino.0).await?;
        let size = inode.data.lock().size(dinode.size);
        if let Content::Data(bytes) = &dinode.content {
            if size <= dinode.inline_room() as u64 {
                return self.write_back_inline(inode).await;
            }
            if !bytes.is_empty() {
                // Small content leaves the dinode: it is written like everything else.
                self.load(inode, &[0], size).await?;
                let busy = inode.data.lock().chunks.dirty(0..1);
                self.data.add_busy(busy);
            }
        }
        let (captured, pending, more) = {
            let mut state = inode.data.lock();
            let captured = state.chunks.capture(*most);
            (captured, state.pending, state.chunks.any_dirty())
        };
        match self.write_captured(inode, &dinode, &captured, pending, more, what).await {
            Ok(pending_done) => {
                self.written(inode, &captured, pending_done);
                Ok(more)
            }
            Err(error) if is_closed(self, &error) => {
                inode.data.lock().chunks.give_back(&captured);
                Err(error)
            }
            // Nothing was written yet.
            Err(FsError::NoSpace) if blocks_of(&captured) > 1 => {
                *most = blocks_of(&captured) / 2;
                inode.data.lock().chunks.give_back(&captured);
                Ok(true)
            }
            Err(FsError::NoSpace) if what == HowFar::AtOnce => {
                inode.data.lock().chunks.give_back(&captured);
                Ok(false)
            }
            Err(error) => {
                tracing::error!(%error, ino = inode.ino.0, "file data are lost");
                let mut state = inode.data.lock();
                let freed = state.chunks.lost(&captured);
                state.error.get_or_insert(error);
                if state.chunks.busy_blocks() == 0 {
                    state.promise = None;
                }
                drop(state);
                self.data.sub_busy(freed);
                // Size and times are still to be written; they fail for good only with the whole store.
                Ok(more)
            }
        }
    }

    /// What was captured is on the device and reachable.
    fn written(&self, inode: &Arc<Inode>, captured: &[Captured], pending: Pending) {
        let mut state = inode.data.lock();
        let freed = state.chunks.written(captured);
        forget_pending(&mut state, &pending);
        if state.chunks.busy_blocks() == 0 {
            state.promise = None;
        }
        if !state.is_dirty() {
            state.dirty_since = None;
        }
        drop(state);
        self.data.sub_busy(freed);
        self.data.used(inode, captured.iter().map(|c| c.no));
    }

    /// Puts small content into the dinode.
    async fn write_back_inline(&self, inode: &Arc<Inode>) -> Result<bool> {
        let _edit = inode.edit.write().await;
        let mut dinode = inode::read(&self.store, inode.ino.0).await?;
        let mut txn = self.store.begin(1).await?;
        let (captured, pending, size) = {
            let mut state = inode.data.lock();
            (state.chunks.capture(1), state.pending, state.size(dinode.size))
        };
        // Between the look at the size and here it may have grown.
        if size > dinode.inline_room() as u64 {
            inode.data.lock().chunks.give_back(&captured);
            return Ok(true);
        }
        let mut bytes = match std::mem::replace(&mut dinode.content, Content::None) {
            Content::Data(bytes) => bytes,
            _ => unreachable!("only write-back moves content out of a dinode"),
        };
        bytes.resize(size as usize, 0);
        inode.data.lock().chunks.copy_out(0, &mut bytes);
        dinode.content = Content::Data(bytes);
        dinode.size = size;
        apply_times(&mut dinode, &pending);
        let result = inode::write(&mut txn, &dinode).await;
        self.changed(&txn, inode);
        self.finish(txn, result)?;
        self.written(inode, &captured, pending);
        Ok(false)
    }

    /// Writes captured blocks and what belongs to them; returns what of `pending` is in the dinode now.
    async fn write_captured(
        &self,
        inode: &Arc<Inode>,
        dinode: &Dinode,
        captured: &[Captured],
        pending: Pending,
        more: bool,
        what: HowFar,
    ) -> Result<Pending> {
        let runs = merged_runs(captured);
        let mut layout = self.layout(dinode, &runs).await?;
        let space = self.allocate(inode, dinode, &mut layout, what).await?;
        let written = self.write_blocks(inode, &layout, captured).await?;
        // What is beyond this batch is not on the device: neither is the size that counts it.
        let size = match (pending.size, runs.last()) {
            (Some(size), Some(last)) if more => Some(size.min(last.end * BLOCK)),
            (Some(_), None) if more => None,
            (size, _) => size,
        };
        let only_times = space.is_none() && size.is_none();
        if only_times && (more || what == HowFar::Data || pending.is_none()) {
            return Ok(Pending::default());
        }
        if let Some(seq) = written
            && !only_times
        {
            self.flush_upto(seq).await?;
        }
        let new: Vec<Extent> = layout.iter().filter(|p| p.new).map(|p| p.extent).collect();
        self.log(inode, new, space, size, if more { Pending::default() } else { pending }).await?;
        Ok(if more { Pending::default() } else { pending })
    }

    /// Where the runs of blocks lie; holes are marked as new and have no place yet.
    async fn layout(&self, dinode: &Dinode, runs: &[Range<u64>]) -> Result<Vec<Placed>> {
        let mut layout = Vec::new();
        for run in runs {
            for mapping in extent::map(&self.store, dinode, run.start, run.end - run.start).await? {
                match mapping {
                    Mapping::Data(extent) => layout.push(Placed { extent, new: false }),
                    Mapping::Hole { logical, len } => {
                        let len = u32::try_from(len).expect("a batch has fewer blocks");
                        layout.push(Placed { extent: Extent::new(logical, BlockAddr(0), len), new: true });
                    }
                }
            }
        }
        Ok(layout)
    }

    /// Gives the holes blocks, and reserves what the map may need for them.
    async fn allocate(
        &self,
        inode: &Inode,
        dinode: &Dinode,
        layout: &mut Vec<Placed>,
        what: HowFar,
    ) -> Result<Option<Reservation>> {
        let Some(first) = layout.iter().find(|p| p.new).map(|p| p.extent.logical) else { return Ok(None) };
        let data: u32 = layout.iter().filter(|p| p.new).map(|p| p.extent.len).sum();
        let before = match first.checked_sub(1) {
            Some(block) => extent::map(&self.store, dinode, block, 1).await?.pop(),
            None => None,
        };
        let goal = match before {
            Some(Mapping::Data(e)) => Some(BlockAddr(e.physical.0 + 1)),
            Some(Mapping::Hole { .. }) | None => None,
        };
        let near = match goal {
            Some(goal) => self.geometry.group_of(goal),
            None => group_of(&self.geometry, inode.ino),
        };
        let mut meta = self.map_needs(dinode, layout).await?.meta;
        let no_wait = what == HowFar::AtOnce;
        loop {
            let want = Want { meta, data, near, goal, contiguous_hint: data, urgent: false, no_wait };
            let space = match self.reserve_from_promise(inode, want).await {
                // The block was promised its space; what is short is space for the map.
                Err(FsError::NoSpace) if data == 1 => {
                    self.reserve_from_promise(inode, Want { urgent: true, ..want }).await?
                }
                space => space?,
            };
            let placed = place(layout, space.runs());
            // Several runs for one hole are several extents. Nothing is written yet: ask again for more.
            let needed = self.map_needs(dinode, &placed).await?.meta;
            if needed <= meta {
                *layout = placed;
                return Ok(Some(space));
            }
            meta = needed * 2;
            let promise = space.promise_again();
            self.keep_promise(&mut inode.data.lock(), Some(promise), u64::MAX);
        }
    }

    /// What mapping the new extents may need in all.
    async fn map_needs(&self, dinode: &Dinode, layout: &[Placed]) -> Result<Needs> {
        let mut needs = Needs::default();
        for placed in layout.iter().filter(|p| p.new) {
            let e = &placed.extent;
            needs = needs + extent::insert_needs(&self.store, dinode, e.logical, e.len.into()).await?;
        }
        Ok(needs)
    }

    async fn reserve_from_promise(&self, inode: &Inode, want: Want) -> Result<Reservation> {
        let promise = inode.data.lock().promise.take();
        let Some(mut promise) = promise else { return self.alloc.reserve(want).await };
        let result = self.alloc.reserve_promised(&mut promise, want).await;
        self.keep_promise(&mut inode.data.lock(), Some(promise), u64::MAX);
        result
    }

    /// Writes the blocks to their places, all at once.
    async fn write_blocks(
        &self,
        inode: &Inode,
        layout: &[Placed],
        captured: &[Captured],
    ) -> Result<Option<WriteSeq>> {
        let mut requests = Vec::new();
        for placed in layout {
            let e = &placed.extent;
            let mut at = e.logical;
            while at < e.end() {
                let end = e.end().min(at + REQUEST_BLOCKS);
                let place = BlockAddr(e.physical.0 + (at - e.logical));
                requests.push(self.device.write(place, gather(captured, at..end), Durability::Cached));
                at = end;
            }
        }
        if requests.is_empty() {
            return Ok(None);
        }
        let mut result = Ok(());
        for request in requests {
            // Each is under way already, and none may be left behind.
            let done = request.await;
            if result.is_ok() {
                result = done;
            }
        }
        let seq = self.data.flush.completed();
        // Where one failed others have changed what every read sees: the next `fsync` is about that too.
        inode.data.lock().last_write = Some(seq);
        result?;
        Ok(Some(seq))
    }

    /// Logs bitmap, map and size, in as many transactions as it takes.
    async fn log(
        &self,
        inode: &Arc<Inode>,
        new: Vec<Extent>,
        mut space: Option<Reservation>,
        size: Option<u64>,
        pending: Pending,
    ) -> Result<()> {
        let mut rest = &new[..];
        loop {
            // Only write-back, which excludes itself, changes the map.
            let dinode = inode::read(&self.store, inode.ino.0).await?;
            let bitmaps = space.as_ref().map_or(0, Reservation::credits);
            let (count, needs) = self.fitting(&dinode, rest, bitmaps).await?;
            let (now, later) = rest.split_at(count);
            let _edit = inode.edit.write().await;
            let mut dinode = inode::read(&self.store, inode.ino.0).await?;
            let mut txn = self.store.begin(needs.credits + 1 + bitmaps).await?;
            let result = async {
                if !now.is_empty() || size.is_some_and(|size| size > dinode.inline_room() as u64) {
                    leave_inline(&mut dinode);
                }
                for extent in now {
                    let space = space.as_mut().expect("new extents come out of a reservation");
                    space.log_run(&mut txn, Run { addr: extent.physical, len: extent.len }).await?;
                    extent::insert(&self.store, &mut txn, space, &mut dinode, *extent).await?;
                }
                if let Some(size) = size {
                    let reached = now.last().map_or(0, |e| e.end() * BLOCK);
                    dinode.size = if later.is_empty() { size } else { dinode.size.max(reached.min(size)) };
                }
                if later.is_empty() {
                    apply_times(&mut dinode, &pending);
                }
                inode::write(&mut txn, &dinode).await
            }
            .await;
            self.changed(&txn, inode);
            self.finish::<()>(txn, result)?;
            if later.is_empty() {
                return Ok(());
            }
            rest = later;
        }
    }

    /// How many of the extents fit a transaction, and what they need.
    async fn fitting(&self, dinode: &Dinode, extents: &[Extent], bitmaps: u32) -> Result<(usize, Needs)> {
        let budget = MAX_CREDITS.min(self.store.max_credits() / 4).saturating_sub(bitmaps);
        let mut total = Needs::default();
        for (i, extent) in extents.iter().enumerate() {
            let needs = extent::insert_needs(&self.store, dinode, extent.logical, extent.len.into()).await?;
            let sum = total + needs;
            if i > 0 && sum.credits > budget {
                return Ok((i, total));
            }
            total = sum;
        }
        Ok((extents.len(), total))
    }
}

/// Whether a failed access to the device means that this node is out of the filesystem. Then nobody is told of lost
/// data: the whole mount is lost.
fn is_closed(fs: &Filesystem, error: &FsError) -> bool {
    matches!(error, FsError::Closed(_)) || fs.alive().is_err()
}

/// Blocks of the file and their place on the device.
#[derive(Clone, Copy)]
struct Placed {
    extent: Extent,
    /// Not in the map yet.
    new: bool,
}

/// Gives the holes of a layout these runs; a hole that gets several becomes several.
fn place(layout: &[Placed], runs: &[Run]) -> Vec<Placed> {
    let mut runs = runs.iter().copied();
    let mut run = Run { addr: BlockAddr(0), len: 0 };
    let mut placed = Vec::with_capacity(layout.len());
    for piece in layout {
        if !piece.new {
            placed.push(*piece);
            continue;
        }
        let (mut logical, mut left) = (piece.extent.logical, piece.extent.len);
        while left > 0 {
            if run.len == 0 {
                run = runs.next().expect("a reservation has as many blocks as were wanted");
            }
            let len = left.min(run.len);
            placed.push(Placed { extent: Extent::new(logical, run.addr, len), new: true });
            (logical, left) = (logical + u64::from(len), left - len);
            run = Run { addr: BlockAddr(run.addr.0 + u64::from(len)), len: run.len - len };
        }
    }
    placed
}

/// Content that outgrew the dinode is in blocks from now on.
fn leave_inline(dinode: &mut Dinode) {
    if let Content::Data(_) = dinode.content {
        dinode.content = Content::Extents(Vec::new());
    }
}

fn blocks_of(captured: &[Captured]) -> u64 {
    captured.iter().flat_map(Captured::runs).map(|run| run.end - run.start).sum()
}

/// The captured blocks as runs, in order.
fn merged_runs(captured: &[Captured]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for run in captured.iter().flat_map(Captured::runs) {
        match runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => runs.push(run),
        }
    }
    runs
}

/// The bytes of captured blocks.
fn gather(captured: &[Captured], blocks: Range<u64>) -> Vec<IoSlice> {
    let mut slices = Vec::new();
    let mut at = blocks.start;
    while at < blocks.end {
        let no = at / CHUNK_BLOCKS;
        let i = captured.binary_search_by_key(&no, |c| c.no.0).expect("the blocks were captured");
        let end = blocks.end.min((no + 1) * CHUNK_BLOCKS);
        slices.push(IoSlice {
            buf: captured[i].buf.clone(),
            offset: ((at - no * CHUNK_BLOCKS) * BLOCK) as usize,
            len: ((end - at) * BLOCK) as usize,
        });
        at = end;
    }
    slices
}

fn apply_times(dinode: &mut Dinode, pending: &Pending) {
    dinode.atime = pending.atime.unwrap_or(dinode.atime);
    dinode.mtime = pending.mtime.unwrap_or(dinode.mtime);
    // A change of attributes meanwhile may have set a later one.
    dinode.ctime = dinode.ctime.max(pending.ctime.unwrap_or(dinode.ctime));
    dinode.perm &= !pending.clear_perm;
}

/// What is in the dinode now is not pending any more, unless it changed meanwhile.
fn forget_pending(state: &mut FileState, done: &Pending) {
    let p = &mut state.pending;
    let same = |now: &mut Option<_>, done: Option<_>| {
        if *now == done {
            *now = None;
        }
    };
    same(&mut p.atime, done.atime);
    same(&mut p.mtime, done.mtime);
    same(&mut p.ctime, done.ctime);
    p.clear_perm &= !done.clear_perm;
    if p.size == done.size {
        p.size = None;
    }
}
