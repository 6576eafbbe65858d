//! One partition: its part of the DLM and the cached locks, behind one mutex.
//!
//! Always, when the mutex is free:
//! - whoever could get in is in, and what the others need has been asked for;
//! - a lock that is in somebody's way is on its way down, or will be as soon as its request is answered;
//! - every output of the DLM has been dealt with; every entry is kept for a reason.

use std::sync::Arc;
use std::task::Waker;

use dlm::{Dlm, Fault, Mode, NameHash, Output, PARTITIONS, Refusal, Resource, ValueBlock};
use lru::LruCache;
use storage_control::{Instant, NodeId};

use crate::api::{Config, Scope, Wire};
use crate::entry::{Entry, Phase, Waiter};
use crate::hooks::Hooks;
use crate::stats::Stats;
use crate::wait::{Cell, Outcome};

/// What to do once the mutex is free.
#[derive(Default)]
pub(crate) struct Effects {
    pub(crate) wakers: Vec<Waker>,
    /// Grants that the client must hear of before the first use.
    pub(crate) acquired: Vec<(Resource, Mode)>,
    /// Locks whose way down begins.
    pub(crate) demote: Vec<Resource>,
    /// There are too many cached locks.
    pub(crate) trim: bool,
}

/// The circumstances of a step.
pub(crate) struct Step<'a> {
    pub(crate) now: Instant,
    pub(crate) wire: &'a dyn Wire,
    pub(crate) hooks: &'a Hooks,
    pub(crate) config: &'a Config,
    pub(crate) effects: Effects,
}

pub(crate) struct Partition {
    pub(crate) dlm: Dlm,
    /// In the order of their last acquisition.
    pub(crate) entries: LruCache<Resource, Entry, NameHash>,
    pub(crate) closed: bool,
    pub(crate) trimming: bool,
    pub(crate) stats: Stats,
}

/// How a purge round ended.
pub(crate) enum Purged {
    /// Nothing was missed, or it was tried often enough.
    DoorClosed,
    /// Uses were inside meanwhile.
    Again,
}

impl Partition {
    pub(crate) fn new(dlm: Dlm) -> Partition {
        Partition {
            dlm,
            entries: LruCache::unbounded_with_hasher(NameHash::default()),
            closed: false,
            trimming: false,
            stats: Stats::default(),
        }
    }

    /// The entry of a resource, now the most recently used.
    pub(crate) fn entry(&mut self, step: &mut Step<'_>, res: Resource) -> &mut Entry {
        if !self.entries.contains(&res) && self.entries.len() >= limit(step.config) && !self.trimming {
            self.trimming = true;
            step.effects.trim = true;
        }
        self.entries.get_or_insert_mut(res, || Entry::new(step.now))
    }

    /// Begins a use at once if the lock is here and nobody is in the way.
    pub(crate) fn enter_at_once(&mut self, res: Resource, mode: Mode, scope: Scope) -> bool {
        self.entries.get_mut(&res).is_some_and(|entry| entry.enter_at_once(mode, scope))
    }

    /// Puts a request at the end of the local queue, or answers it at once.
    pub(crate) fn wait(&mut self, step: &mut Step<'_>, res: Resource, waiter: Waiter) {
        let no_queue = waiter.no_queue;
        let mode = waiter.mode;
        let entry = self.entry(step, res);
        let ready = entry.asking.is_none() && entry.opening.is_none() && entry.phase == Phase::Open;
        if no_queue && (entry.held.covers(mode) || !ready) {
            // Somebody on this node is in the way, or a request of somebody else is under way.
            step.effects.wakers.extend(waiter.cell.finish(Outcome::Refused));
        } else {
            entry.queue.push_back(waiter);
            if no_queue {
                self.ask(step, res, mode, true);
            }
        }
        self.settle(step, res);
    }

    /// Asks the DLM for a mode.
    pub(crate) fn ask(&mut self, step: &mut Step<'_>, res: Resource, want: Mode, no_queue: bool) {
        self.entry(step, res).asking = Some((want, no_queue));
        self.dlm.request(step.now, res, want, no_queue);
    }

    /// A wait is given up: the request is withdrawn unless others here need it too. What is granted nevertheless
    /// stays cached.
    pub(crate) fn abandon(&mut self, step: &mut Step<'_>, res: Resource, of: &Arc<Cell>) {
        self.stats.cancelled += 1;
        let Some(entry) = self.entries.peek_mut(&res) else { return };
        entry.queue.retain(|waiter| !Arc::ptr_eq(&waiter.cell, of));
        if entry.asking.is_some() && !entry.needs_more() {
            self.dlm.cancel(step.now, res);
        }
        self.settle(step, res);
    }

    /// Restores the module's invariants for one resource after any change to it.
    pub(crate) fn settle(&mut self, step: &mut Step<'_>, res: Resource) {
        if self.closed {
            return;
        }
        let Some(entry) = self.entries.peek_mut(&res) else { return };
        entry.admit_waiters(step.now, &mut step.effects.wakers);
        if entry.opening.is_none()
            && !matches!(entry.asking, Some((_, true)))
            && entry.refuse_tries(&mut step.effects.wakers)
        {
            entry.admit_waiters(step.now, &mut step.effects.wakers);
        }
        let ready = entry.phase == Phase::Open && entry.asking.is_none() && entry.opening.is_none();
        if ready && entry.keep() != entry.held {
            send_down(entry, step, res, false);
        } else if let Some(want) = entry.to_ask() {
            entry.asking = Some((want, false));
            self.dlm.request(step.now, res, want, false);
        } else if ready || entry.phase == Phase::Failed {
            step.effects.wakers.append(&mut entry.watchers);
            if entry.is_unused() {
                self.entries.pop(&res);
            }
        }
    }

    /// Deals with all that the DLM has to say.
    pub(crate) fn pump(&mut self, step: &mut Step<'_>) {
        while let Some(output) = self.dlm.poll() {
            if self.closed {
                continue;
            }
            match output {
                Output::Send { to, message } => {
                    self.stats.messages_sent += 1;
                    step.wire.send(to, message);
                }
                Output::Granted { res, mode, value } => {
                    self.granted(step, res, mode, value.map(|value| value.block));
                }
                Output::Refused { res, why } => self.refused(step, res, why),
                Output::Blocking { res, wanted } => {
                    self.stats.callbacks += 1;
                    let entry = self.entries.peek_mut(&res).expect("a held lock has an entry");
                    entry.wanted.insert(wanted);
                    self.settle(step, res);
                }
                Output::Fault { from, fault } => self.fault(step, from, fault),
            }
        }
    }

    pub(crate) fn fault(&mut self, step: &Step<'_>, from: NodeId, fault: Fault) {
        self.stats.faults += 1;
        step.wire.fault(from, fault);
    }

    fn granted(&mut self, step: &mut Step<'_>, res: Resource, mode: Mode, value: Option<ValueBlock>) {
        let here = self.dlm.masters(res.shard);
        *(if here { &mut self.stats.grants_local } else { &mut self.stats.grants_remote }) += 1;
        let entry = self.entries.peek_mut(&res).expect("a request has an entry");
        entry.asking = None;
        (entry.granted_at, entry.last_use) = (step.now, step.now);
        if !entry.value_written {
            entry.value = value.map(Box::new);
        }
        if step.hooks.has(res.kind) {
            entry.opening = Some(mode);
            step.effects.acquired.push((res, mode));
        } else {
            entry.held = mode;
        }
        self.settle(step, res);
    }

    fn refused(&mut self, step: &mut Step<'_>, res: Resource, why: Refusal) {
        let entry = self.entries.peek_mut(&res).expect("a request has an entry");
        entry.asking = None;
        match why {
            Refusal::Busy | Refusal::Cancelled => {}
            Refusal::Deadlock => {
                self.stats.deadlocks += 1;
                entry.wanted.insert(Mode::EX);
                send_down(entry, step, res, true);
            }
        }
        self.settle(step, res);
    }

    /// The client has heard of the grant: users may enter.
    pub(crate) fn opened(&mut self, step: &mut Step<'_>, res: Resource) {
        let Some(entry) = self.entries.peek_mut(&res) else { return };
        if let Some(mode) = entry.opening.take() {
            entry.held = mode;
        }
        self.settle(step, res);
    }

    /// A use ends, if nobody waits for that; the common case.
    pub(crate) fn leave_unnoticed(&mut self, now: Instant, res: Resource, mode: Mode, scope: Scope) -> bool {
        let entry = self.entries.peek_mut(&res).expect("a used lock has an entry");
        let unnoticed = entry.queue.is_empty() && entry.phase == Phase::Open;
        if unnoticed {
            entry.leave(now, mode, scope);
        }
        unnoticed
    }

    /// A use ends.
    pub(crate) fn leave(&mut self, step: &mut Step<'_>, res: Resource, mode: Mode, scope: Scope) {
        let entry = self.entries.peek_mut(&res).expect("a used lock has an entry");
        entry.leave(step.now, mode, scope);
        if let Phase::Closed { keep } = entry.phase
            && entry.is_drained(keep)
        {
            step.effects.wakers.append(&mut entry.watchers);
        }
        if !entry.queue.is_empty() {
            self.settle(step, res);
        }
    }

    /// Starts the way down to NL of up to `most` idle locks, least recently used first, until `target` are left.
    pub(crate) fn trim(&mut self, step: &mut Step<'_>, target: usize, most: usize) -> Vec<Resource> {
        let excess = self.entries.len().saturating_sub(target).min(most);
        let looked_at = excess * 4 + 16; // those in use are passed over, but not without end
        let idle = self.entries.iter().rev().take(looked_at).filter(|(_, entry)| entry.is_idle());
        let victims: Vec<Resource> = idle.map(|(res, _)| *res).take(excess).collect();
        self.give_up(step, &victims);
        victims
    }

    /// Starts the way down to NL of these locks, where it can start.
    pub(crate) fn give_up(&mut self, step: &mut Step<'_>, victims: &[Resource]) {
        for res in victims {
            let Some(entry) = self.entries.peek_mut(res) else { continue };
            entry.wanted.insert(Mode::EX);
            match entry.phase {
                Phase::Called { .. } => entry.phase = Phase::Called { urgent: true },
                Phase::Open if entry.asking.is_none() && entry.opening.is_none() => {
                    send_down(entry, step, *res, true);
                }
                Phase::Open | Phase::Purging { .. } | Phase::Closed { .. } | Phase::Failed => {}
            }
        }
    }

    /// The hold is over: the mode held and the one to keep, or nothing if nobody minds any more.
    pub(crate) fn begin_purge(&mut self, step: &mut Step<'_>, res: Resource) -> Option<(Mode, Mode)> {
        let entry = self.entries.peek_mut(&res).expect("a lock on its way down has an entry");
        let (held, keep) = (entry.held, entry.keep());
        if held == keep {
            entry.phase = Phase::Open;
            self.settle(step, res);
            return None;
        }
        self.stats.demotions += 1;
        entry.phase = Phase::Purging { keep, used: !entry.is_drained(keep) };
        Some((held, keep))
    }

    /// A purge callout has returned. If uses were inside that may have filled a cache behind its back, another
    /// round starts with who is inside now; else the door closes.
    pub(crate) fn end_purge(&mut self, res: Resource, last_round: bool) -> Purged {
        let entry = self.entries.peek_mut(&res).expect("a lock on its way down has an entry");
        let Phase::Purging { keep, used } = entry.phase else {
            unreachable!("only its task takes a lock down")
        };
        if used && !last_round {
            entry.phase = Phase::Purging { keep, used: !entry.is_drained(keep) };
            self.stats.repeated_purges += 1;
            Purged::Again
        } else {
            entry.phase = Phase::Closed { keep };
            Purged::DoorClosed
        }
    }

    /// Nothing is to be purged.
    pub(crate) fn close_door(&mut self, res: Resource, keep: Mode) {
        let entry = self.entries.peek_mut(&res).expect("a lock on its way down has an entry");
        entry.phase = Phase::Closed { keep };
    }

    /// The flush callout is done: the lock goes down, or is kept for good.
    pub(crate) fn end_flush(&mut self, step: &mut Step<'_>, res: Resource, keep: Mode, stable: bool) {
        let entry = self.entries.peek_mut(&res).expect("a lock on its way down has an entry");
        if stable {
            let written = std::mem::take(&mut entry.value_written);
            let value = if written { entry.value.as_deref().copied() } else { None };
            self.dlm.downconvert(step.now, res, keep, value);
            entry.held = keep;
            entry.phase = Phase::Open;
            entry.drop_settled_wishes();
            if keep == Mode::NL {
                entry.value = None;
            }
        } else {
            self.stats.failed_flushes += 1;
            entry.phase = Phase::Failed;
        }
        self.settle(step, res);
    }

    /// Ends every wait; nothing is granted or given up any more.
    pub(crate) fn close(&mut self, effects: &mut Effects) {
        self.closed = true;
        for (_, entry) in self.entries.iter_mut() {
            for waiter in entry.queue.drain(..) {
                effects.wakers.extend(waiter.cell.finish(Outcome::Closed));
            }
            effects.wakers.append(&mut entry.watchers);
        }
    }

    pub(crate) fn assert_consistent(&self) {
        self.dlm.assert_consistent();
        for (res, entry) in &self.entries {
            entry.assert_consistent();
            assert!(!entry.is_unused() || self.closed, "{res} is kept for a reason");
            assert_eq!(entry.opening.unwrap_or(entry.held), self.dlm.held(res), "{res}: what the DLM says");
            assert_eq!(entry.asking.is_some(), self.dlm.is_asking(res), "{res}: a request on its way");
        }
    }
}

/// Most cached locks of a partition.
pub(crate) fn limit(config: &Config) -> usize {
    (config.max_cached / PARTITIONS).max(1)
}

fn send_down(entry: &mut Entry, step: &mut Step<'_>, res: Resource, urgent: bool) {
    entry.phase = Phase::Called { urgent };
    step.effects.demote.push(res);
}
