//! Reservations: which groups are asked, in which order, and what is picked there.

use lcl::Guard;
use storage_control::BlockAddr;

use super::{Alloc, How, Promise, Run, bitmap_addr, mirror::PickedMeta};
use crate::{
    FsError, LockName,
    format::{
        group::{BLOCKS_PER_BITMAP, BitmapImage, STAMP_AT_COMMIT},
        header::BlockKind,
    },
    lock_name::SHARDS,
    store::block_of,
};

/// Groups of its own that a node tries before it waits for one.
const OWN_TRIES: usize = 4;

/// What a reservation should hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Want {
    /// Metadata blocks.
    pub meta: u32,
    /// Data blocks.
    pub data: u32,
    /// The group to look in first.
    pub near: Option<u32>,
    /// The data block to start at if it is free, so that a file grows in one piece.
    pub goal: Option<BlockAddr>,
    /// Runs at least this long are worth a search; 0 for no wish.
    pub contiguous_hint: u32,
    /// Work that will free space: may use what each group keeps back.
    pub urgent: bool,
    /// For who keeps a group from going, as the purge callout does: nobody is waited for, `NoSpace` may mean that
    /// waiting would have helped, and groups that are going are drawn on, first of all.
    pub no_wait: bool,
}

/// What was picked in one group, and its lock.
pub(super) struct Part {
    pub(super) group: u32,
    pub(super) metas: Vec<PickedMeta>,
    pub(super) runs: Vec<(u32, u32)>,
    _guard: Guard,
}

/// Picked blocks. What is not logged when it is dropped goes back. It keeps the groups' locks: drop it when the
/// transaction's handle is dropped, and before another group's lock is waited for.
pub struct Reservation {
    pub(super) alloc: Alloc,
    pub(super) parts: Vec<Part>,
    metas: Vec<BlockAddr>,
    runs: Vec<Run>,
    want: Want,
    /// Blocks taken off a promise.
    pub(super) drawn: u64,
    /// Picked blocks that are still promised: of a reservation under way.
    pub(super) drawing: u64,
}

impl Reservation {
    fn empty(alloc: &Alloc, want: Want) -> Reservation {
        Reservation {
            alloc: alloc.clone(),
            parts: Vec::new(),
            metas: Vec::new(),
            runs: Vec::new(),
            want,
            drawn: 0,
            drawing: 0,
        }
    }

    /// The next picked metadata block.
    ///
    /// # Panics
    /// Where more are asked for than were wanted.
    pub fn meta(&mut self) -> BlockAddr {
        self.metas.pop().expect("a reservation holds the metadata blocks that were wanted")
    }

    /// How many metadata blocks are left to ask for.
    pub fn metas_left(&self) -> usize {
        self.metas.len()
    }

    /// The picked data runs.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Most bitmap and header blocks that logging will change: part of the transaction's credits.
    pub fn credits(&self) -> u32 {
        let mut credits = 0;
        for part in &self.parts {
            let mut touched = 0_u32;
            for meta in &part.metas {
                touched |= 1 << (meta.block / BLOCKS_PER_BITMAP);
            }
            for &(start, len) in &part.runs {
                for index in start / BLOCKS_PER_BITMAP..=(start + len - 1) / BLOCKS_PER_BITMAP {
                    touched |= 1 << index;
                }
            }
            credits += 1 + touched.count_ones();
        }
        credits
    }

    /// Gives everything back; what was taken off a promise is promised again.
    pub fn promise_again(mut self) -> Promise {
        // First the promise, then the blocks: nobody gets in between. Until then they count as being drawn.
        let promise = Promise::again(&self.alloc, self.drawn);
        self.drawing += self.drawn;
        promise
    }

    fn metas_missing(&self) -> u32 {
        self.want.meta - self.metas.len() as u32
    }

    fn data_missing(&self) -> u32 {
        self.want.data - self.runs.iter().map(|run| run.len).sum::<u32>()
    }

    fn picked(&self) -> u64 {
        self.metas.len() as u64 + self.runs.iter().map(|run| u64::from(run.len)).sum::<u64>()
    }

    fn is_complete(&self) -> bool {
        self.metas_missing() == 0 && self.data_missing() == 0
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.alloc.0.state.lock();
        state.drawing -= self.drawing;
        for part in &self.parts {
            state.change(part.group, |mirror| {
                part.metas.iter().for_each(|&meta| mirror.give_back_meta(meta));
                part.runs.iter().for_each(|&(start, len)| mirror.give_back(start, len));
            });
        }
    }
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reservation").field("metas", &self.metas).field("runs", &self.runs).finish()
    }
}

impl Alloc {
    /// Picks blocks, in this order: the wished group, groups held already, groups this node masters, others by try;
    /// when space is short after forcing out what is freed, by waiting. No transaction handle may be open, and the
    /// caller has no other reservation and no `FreeGuard`: it may wait for a group, unless it wants `no_wait`.
    pub async fn reserve(&self, want: Want) -> Result<Reservation, FsError> {
        self.reserve_backed(want, 0).await
    }

    /// The same with that many blocks of the caller's own promises to draw on. What is held has them: several at once may
    /// be refused for want of metadata blocks, and are to be asked for again one by one; nobody is waited for before.
    pub(super) async fn reserve_backed(&self, want: Want, backed: u64) -> Result<Reservation, FsError> {
        if want.no_wait {
            return self.reserve_at_once(want, backed).await;
        }
        let mut res = Reservation::empty(self, want);
        let geometry = *self.0.store.geometry();
        let home = self.0.state.lock().home;
        let goal = want.goal.and_then(|goal| geometry.group_of(goal));
        let near = want.near.filter(|&group| group < geometry.groups);
        for group in [goal, near, near.is_none().then_some(home)].into_iter().flatten() {
            let how = if self.masters(group) { How::Try } else { How::Cached };
            if self.take_from(&mut res, group, how, backed).await? {
                return Ok(res);
            }
        }
        // What goes waits for promises to be drawn: first from there.
        let going = if backed > 0 { self.0.state.lock().going() } else { Vec::new() };
        if self.take_from_all(&mut res, going, How::Cached, backed).await?
            || self.take_from_all(&mut res, self.held_groups(home), How::Cached, backed).await?
        {
            return Ok(res);
        }
        // Asking for a group makes its holder give it up: first one of the own, even if that takes a wait.
        let own = self.other_groups(true);
        let tried = own.iter().copied().take(OWN_TRIES).collect();
        if self.take_from_all(&mut res, tried, How::Try, backed).await? {
            return Ok(res);
        }
        let patient = backed == 0 || want.data <= 1;
        if let Some(&emptiest) = own.first()
            && patient
            && res.parts.is_empty()
            && self.take_from(&mut res, emptiest, How::Wait, backed).await?
        {
            return Ok(res);
        }
        if self.take_from_all(&mut res, self.other_groups(true), How::Try, backed).await?
            || self.take_from_all(&mut res, self.other_groups(false), How::Try, backed).await?
        {
            return Ok(res);
        }
        drop(res);
        if patient { self.reserve_forced(want, backed).await } else { Err(FsError::NoSpace) }
    }

    /// Waits for no group and forces nothing. What is going is used up before what stays: only that leaves the
    /// other promises their blocks.
    async fn reserve_at_once(&self, want: Want, backed: u64) -> Result<Reservation, FsError> {
        let mut res = Reservation::empty(self, want);
        let (going, home) = {
            let state = self.0.state.lock();
            (state.going(), state.home)
        };
        if self.take_from_all(&mut res, going, How::Cached, backed).await?
            || self.take_from_all(&mut res, self.held_groups(home), How::Cached, backed).await?
            || self.take_from_all(&mut res, self.other_groups(true), How::Try, backed).await?
            || self.take_from_all(&mut res, self.other_groups(false), How::Try, backed).await?
        {
            return Ok(res);
        }
        Err(FsError::NoSpace)
    }

    /// Space is short: everything freed is made usable, and groups are waited for.
    async fn reserve_forced(&self, want: Want, backed: u64) -> Result<Reservation, FsError> {
        self.force().await?;
        let mut res = Reservation::empty(self, want);
        if self.take_from_all(&mut res, self.held_groups(0), How::Cached, backed).await?
            || self.take_from_all(&mut res, self.other_groups(true), How::Try, backed).await?
            || self.take_from_all(&mut res, self.other_groups(false), How::Try, backed).await?
        {
            return Ok(res);
        }
        // Who waits for a group's lock holds no other: what was picked so far goes back.
        drop(res);
        for group in self.other_groups(false) {
            let mut res = Reservation::empty(self, want);
            if self.take_from(&mut res, group, How::Wait, backed).await?
                || self.take_from_all(&mut res, self.held_groups(0), How::Cached, backed).await?
            {
                return Ok(res);
            }
        }
        Err(FsError::NoSpace)
    }

    async fn take_from_all(
        &self,
        res: &mut Reservation,
        groups: Vec<u32>,
        how: How,
        backed: u64,
    ) -> Result<bool, FsError> {
        for group in groups {
            if self.take_from(res, group, how, backed).await? {
                return Ok(true);
            }
        }
        Ok(res.is_complete())
    }

    /// Picks what is missing in a group. True if nothing is missing any more.
    async fn take_from(
        &self,
        res: &mut Reservation,
        group: u32,
        how: How,
        backed: u64,
    ) -> Result<bool, FsError> {
        if res.is_complete() {
            return Ok(true);
        }
        let Some(guard) = self.enter(group, how).await? else { return Ok(false) };
        if self.is_short(group, res.data_missing() + res.metas_missing()) {
            self.recycle(group).await?;
        }
        self.pick(res, group, guard, backed);
        Ok(res.is_complete())
    }

    fn is_short(&self, group: u32, want: u32) -> bool {
        let mut state = self.0.state.lock();
        let stable = self.0.store.stable();
        let short = state.change(group, |mirror| {
            mirror.thaw(stable);
            mirror.available() < want && mirror.recyclable() > 0
        });
        short == Some(true)
    }

    fn pick(&self, res: &mut Reservation, group: u32, guard: Guard, backed: u64) {
        let start_of_group = self.0.store.geometry().group_start(group);
        let stable = self.0.store.stable();
        let want = res.want;
        let (metas_missing, data_missing) = (res.metas_missing(), res.data_missing());
        let goal = want.goal.and_then(|goal| goal.0.checked_sub(start_of_group.0));
        let goal = goal.and_then(|goal| u32::try_from(goal).ok());
        let mut metas = Vec::new();
        let mut runs = Vec::new();
        {
            let mut state = self.0.state.lock();
            state.change(group, |mirror| mirror.thaw(stable));
            let budget = match want {
                Want { urgent: true, .. } => u64::MAX,
                _ if backed > 0 || want.no_wait => state.budget_of_promise(group, backed, res.picked()),
                _ => state.budget(),
            };
            let mut budget = u32::try_from(budget).unwrap_or(u32::MAX);
            state.change(group, |mirror| {
                while (metas.len() as u32) < metas_missing {
                    let Some(meta) = mirror.take_meta(want.urgent, budget > 0) else { break };
                    budget -= u32::from(!meta.recycled);
                    metas.push(meta);
                }
                let mut missing = data_missing;
                while missing.min(budget) > 0 {
                    let goal = goal.filter(|_| runs.is_empty());
                    let run = mirror.take_run(goal, missing.min(budget), want.contiguous_hint, want.urgent);
                    let Some((start, len)) = run else { break };
                    missing -= len;
                    budget -= len;
                    runs.push((start, len));
                }
            });
            let now: u64 = metas.len() as u64 + runs.iter().map(|run| u64::from(run.1)).sum::<u64>();
            let drawing = (res.picked() + now).min(backed) - res.drawing;
            state.drawing += drawing;
            res.drawing += drawing;
            if !(metas.is_empty() && runs.is_empty()) && want.near.is_none() {
                state.home = group;
            }
        }
        self.add_part(res, group, metas, runs, guard);
    }

    fn add_part(
        &self,
        res: &mut Reservation,
        group: u32,
        metas: Vec<PickedMeta>,
        runs: Vec<(u32, u32)>,
        guard: Guard,
    ) {
        if metas.is_empty() && runs.is_empty() {
            return;
        }
        let start = self.0.store.geometry().group_start(group).0;
        let addr = |block: u32| BlockAddr(start + u64::from(block));
        // `meta` pops from the end: the lowest address first.
        res.metas.splice(0..0, metas.iter().rev().map(|meta| addr(meta.block)));
        res.runs.extend(runs.iter().map(|&(start, len)| Run { addr: addr(start), len }));
        res.parts.push(Part { group, metas, runs, _guard: guard });
    }

    /// Picks a run of exactly `blocks`, to be logged as metadata: a journal.
    pub(crate) async fn reserve_contiguous(&self, blocks: u32) -> Result<Reservation, FsError> {
        let want = Want { data: blocks, ..Want::default() };
        let all = 0..self.0.store.geometry().groups;
        for group in all.filter(|&group| self.0.counters.may_have(group, blocks)) {
            let Some(guard) = self.enter(group, How::Wait).await? else { continue };
            self.recycle(group).await?;
            let stable = self.0.store.stable();
            let start = {
                let mut state = self.0.state.lock();
                let backed = state.budget() >= u64::from(blocks);
                let pick = |mirror: &mut super::Mirror| {
                    mirror.thaw(stable);
                    if backed { mirror.take_contiguous(blocks) } else { None }
                };
                state.change(group, pick).flatten()
            };
            if let Some(start) = start {
                let mut res = Reservation::empty(self, want);
                self.add_part(&mut res, group, Vec::new(), vec![(start, blocks)], guard);
                return Ok(res);
            }
        }
        Err(FsError::NoSpace)
    }

    /// A group for a new directory, so that directories spread: the emptiest one that costs no message.
    pub fn spread(&self) -> u32 {
        let groups = self.0.store.geometry().groups;
        let home = self.0.state.lock().home;
        let own = (0..groups).map(|n| (home + 1 + n) % groups).filter(|&group| self.masters(group));
        own.take(1024).max_by_key(|&group| self.0.counters.available(group)).unwrap_or(home)
    }

    pub(super) fn masters(&self, group: u32) -> bool {
        self.0.lcl.masters((u64::from(group) % SHARDS) as u16)
    }

    /// Groups whose mirror is there, from `home` on.
    pub(super) fn held_groups(&self, home: u32) -> Vec<u32> {
        let mut groups: Vec<u32> = self.0.state.lock().groups.keys().copied().collect();
        groups.sort_unstable_by_key(|&group| (group < home, group));
        groups
    }

    /// Groups whose mirror is not there and that may have space, the emptiest first.
    pub(super) fn other_groups(&self, own: bool) -> Vec<u32> {
        let all = 0..self.0.store.geometry().groups;
        let mut groups: Vec<u32> = {
            let state = self.0.state.lock();
            let may = |&group: &u32| {
                !state.groups.contains_key(&group)
                    && self.0.counters.may_have(group, 1)
                    && self.masters(group) == own
            };
            all.filter(may).collect()
        };
        groups.sort_by_key(|&group| std::cmp::Reverse(self.0.counters.available(group)));
        groups
    }

    /// Makes everything freed usable that can be: commit, checkpoint, ask the other nodes, look at all groups.
    pub(super) async fn force(&self) -> Result<(), FsError> {
        self.0.store.checkpoint().await?;
        if let Some(consumer) = self.consumer() {
            consumer.gather_tails().await;
        }
        self.0.state.lock().thaw(self.0.store.stable());
        for group in self.held_groups(0) {
            if let Some(_guard) = self.enter(group, How::Cached).await? {
                self.recycle(group).await?;
            }
        }
        self.refresh_counters(u32::MAX).await
    }

    /// Freed metadata that every journal has moved past become free. The caller holds the group's lock.
    async fn recycle(&self, group: u32) -> Result<(), FsError> {
        let store = &self.0.store;
        let start = store.geometry().group_start(group);
        let (bitmaps, written) = match self.0.state.lock().mirror(group) {
            Some(mirror) if mirror.recyclable() > 0 => (mirror.bitmaps(), mirror.written),
            Some(_) | None => return Ok(()),
        };
        let past = store.all_past();
        for index in (0..bitmaps).filter(|index| written >> index & 1 == 1) {
            let addr = bitmap_addr(start, index);
            store.read(addr, BlockKind::Bitmap, LockName::Group(group)).await?;
            let mut state = self.0.state.lock();
            // The stamp is looked at under the mutex: a block becomes recyclable only after its stamp is set.
            let Some(image) = store.cached(addr) else { continue };
            let stamp = BitmapImage::of(block_of(&image)).last_metadata_free.get();
            if stamp != STAMP_AT_COMMIT && stamp <= past.0 {
                state.change(group, |mirror| mirror.recycle(index));
            }
        }
        Ok(())
    }
}
