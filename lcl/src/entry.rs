//! One lock of this node: the cached mode, its users, who waits here, and its way down.
//!
//! Always:
//! - every user's mode is covered by the mode held; users of process scope are compatible with each other;
//! - among process-scope requests nobody overtakes: who cannot get in keeps those behind him out;
//! - a lock goes down only from [`Phase::Closed`], when everybody inside is covered by the mode kept;
//! - there is no request to the DLM on its way while the lock is on its way down.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use dlm::{MODES, Mode, ModeSet, ValueBlock};
use storage_control::Instant;

use crate::api::{Config, Scope};
use crate::wait::{Cell, Outcome};

/// How many users there are in each mode.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Users([u32; MODES.len()]);

impl Users {
    fn add(&mut self, mode: Mode) {
        self.0[mode as usize] += 1;
    }

    fn remove(&mut self, mode: Mode) {
        let count = &mut self.0[mode as usize];
        *count = count.checked_sub(1).expect("who leaves was inside");
    }

    /// The modes in use, with how many use them.
    pub(crate) fn modes(&self) -> impl Iterator<Item = (Mode, u32)> + '_ {
        MODES.into_iter().zip(self.0).filter(|(_, count)| *count > 0)
    }

    fn admit(&self, mode: Mode) -> bool {
        self.modes().all(|(inside, _)| inside.compatible(mode))
    }

    fn all_covered_by(&self, keep: Mode) -> bool {
        self.modes().all(|(inside, _)| keep.covers(inside))
    }
}

/// Who waits on this node.
#[derive(Debug)]
pub(crate) struct Waiter {
    pub(crate) mode: Mode,
    pub(crate) scope: Scope,
    /// Refuse rather than wait for anybody.
    pub(crate) no_queue: bool,
    pub(crate) since: Instant,
    pub(crate) cell: Arc<Cell>,
}

/// The lock's way down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Not on its way down.
    Open,
    /// Somebody wants it; the minimum hold time runs unless `urgent`.
    Called {
        /// Nothing is gained by holding it longer.
        urgent: bool,
    },
    /// The purge callout runs; `used` says whether a use that `keep` does not cover was inside meanwhile.
    Purging {
        /// The mode to keep.
        keep: Mode,
        /// The purge may have missed something.
        used: bool,
    },
    /// Only what `keep` covers gets in; the flush callout runs when the others have left.
    Closed {
        /// The mode to keep.
        keep: Mode,
    },
    /// The flush callout failed: kept for good.
    Failed,
}

/// Times this lock's requests have waited since it was last cached anew.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Waits {
    /// Requests that had to wait.
    pub count: u64,
    /// Their waiting times in sum.
    pub total: Duration,
    /// The longest.
    pub longest: Duration,
}

#[derive(Debug)]
pub(crate) struct Entry {
    /// The mode that users may rely on; [`Entry::opening`] may be granted on top.
    pub(crate) held: Mode,
    /// Granted, but the client's `acquired` callout has not returned: nobody gets in.
    pub(crate) opening: Option<Mode>,
    pub(crate) granted_at: Instant,
    pub(crate) last_use: Instant,
    pub(crate) process: Users,
    pub(crate) server: Users,
    pub(crate) queue: VecDeque<Waiter>,
    /// A request to the DLM that has no answer yet: the mode, and whether it is a no-queue one.
    pub(crate) asking: Option<(Mode, bool)>,
    pub(crate) phase: Phase,
    /// Modes others want that the held one is in the way of.
    pub(crate) wanted: ModeSet,
    pub(crate) value: Option<Box<ValueBlock>>,
    pub(crate) value_written: bool,
    /// To wake when the lock's way down goes on or ends.
    pub(crate) watchers: Vec<Waker>,
    pub(crate) waits: Waits,
}

impl Entry {
    pub(crate) fn new(now: Instant) -> Entry {
        Entry {
            held: Mode::NL,
            opening: None,
            granted_at: now,
            last_use: now,
            process: Users::default(),
            server: Users::default(),
            queue: VecDeque::new(),
            asking: None,
            phase: Phase::Open,
            wanted: ModeSet::EMPTY,
            value: None,
            value_written: false,
            watchers: Vec::new(),
            waits: Waits::default(),
        }
    }

    /// Nothing is held, wanted or under way: the entry can be dropped.
    pub(crate) fn is_unused(&self) -> bool {
        self.held == Mode::NL
            && self.opening.is_none()
            && self.queue.is_empty()
            && self.asking.is_none()
            && self.phase == Phase::Open
    }

    /// Held, and nobody has or wants anything to do with it.
    pub(crate) fn is_idle(&self) -> bool {
        self.held != Mode::NL
            && self.opening.is_none()
            && self.queue.is_empty()
            && self.asking.is_none()
            && self.phase == Phase::Open
            && self.is_drained(Mode::NL)
    }

    /// Whether everybody inside is covered by `keep`.
    pub(crate) fn is_drained(&self, keep: Mode) -> bool {
        self.process.all_covered_by(keep) && self.server.all_covered_by(keep)
    }

    /// Whether this use could begin now, were nobody before it.
    fn admits(&self, mode: Mode, scope: Scope) -> bool {
        let reachable = match self.phase {
            Phase::Open | Phase::Called { .. } | Phase::Purging { .. } | Phase::Failed => self.held,
            Phase::Closed { keep } => keep,
        };
        self.opening.is_none()
            && reachable.covers(mode)
            && match scope {
                Scope::Process => self.process.admit(mode),
                Scope::Server => true,
            }
    }

    /// Begins a use at once if nothing and nobody is in the way.
    pub(crate) fn enter_at_once(&mut self, mode: Mode, scope: Scope) -> bool {
        let overtakes =
            scope == Scope::Process && self.queue.iter().any(|waiter| waiter.scope == Scope::Process);
        let may = !overtakes && self.admits(mode, scope);
        if may {
            self.enter(mode, scope);
        }
        may
    }

    fn enter(&mut self, mode: Mode, scope: Scope) {
        match scope {
            Scope::Process => self.process.add(mode),
            Scope::Server => self.server.add(mode),
        }
        if let Phase::Purging { keep, used } = &mut self.phase {
            *used |= !keep.covers(mode);
        }
    }

    /// Ends a use.
    pub(crate) fn leave(&mut self, now: Instant, mode: Mode, scope: Scope) {
        match scope {
            Scope::Process => self.process.remove(mode),
            Scope::Server => self.server.remove(mode),
        }
        self.last_use = now;
    }

    /// Lets in whoever can get in, in order; wakes them into `wakers`.
    pub(crate) fn admit_waiters(&mut self, now: Instant, wakers: &mut Vec<Waker>) {
        let mut process_blocked = false;
        let mut at = 0;
        while let Some(&Waiter { mode, scope, since, .. }) = self.queue.get(at) {
            let blocked = scope == Scope::Process && process_blocked;
            if !blocked && self.admits(mode, scope) {
                self.enter(mode, scope);
                let waited = now.since(since);
                self.waits.count += 1;
                self.waits.total += waited;
                self.waits.longest = self.waits.longest.max(waited);
                let waiter = self.queue.remove(at).expect("inside the queue");
                wakers.extend(waiter.cell.finish(Outcome::Admitted));
            } else {
                process_blocked |= scope == Scope::Process;
                at += 1;
            }
        }
    }

    /// The answer to a no-queue request is in: who still waits for it goes away empty-handed. True if somebody did,
    /// who may have kept others out.
    pub(crate) fn refuse_tries(&mut self, wakers: &mut Vec<Waker>) -> bool {
        let before = self.queue.len();
        self.queue.retain(|waiter| {
            if waiter.no_queue {
                wakers.extend(waiter.cell.finish(Outcome::Refused));
            }
            !waiter.no_queue
        });
        self.queue.len() < before
    }

    /// What to ask the DLM for now: for the first waiter whom the held mode does not cover.
    pub(crate) fn to_ask(&self) -> Option<Mode> {
        if self.asking.is_some()
            || self.opening.is_some()
            || !matches!(self.phase, Phase::Open | Phase::Failed)
        {
            return None;
        }
        self.queue
            .iter()
            .find(|waiter| !self.held.covers(waiter.mode))
            .map(|waiter| self.held.join(waiter.mode))
    }

    /// Whether somebody here still waits for more than is held.
    pub(crate) fn needs_more(&self) -> bool {
        self.queue.iter().any(|waiter| !self.held.covers(waiter.mode))
    }

    /// The mode to go down to, given what others want: PR beside readers where that is less than is held, else
    /// NL. The held mode itself if nobody wants anything that it is in the way of.
    pub(crate) fn keep(&self) -> Mode {
        if self.wanted.iter().all(|wanted| self.held.compatible(wanted)) {
            self.held
        } else if self.held.covers(Mode::PR) && self.wanted.iter().all(|wanted| Mode::PR.compatible(wanted)) {
            Mode::PR
        } else {
            Mode::NL
        }
    }

    /// For how long the lock still stays, or `None` if it goes now.
    pub(crate) fn hold_time(&self, now: Instant, config: &Config) -> Option<Duration> {
        if self.phase == (Phase::Called { urgent: true }) {
            return None;
        }
        let since_grant = now.since(self.granted_at);
        let in_use = !self.is_drained(Mode::NL) || now.since(self.last_use) < config.idle_hold;
        if !in_use || since_grant >= config.min_hold {
            return None;
        }
        Some((config.min_hold - since_grant).min(config.idle_hold.max(MIN_NAP)))
    }

    /// Forgets wishes that the held mode is not in the way of.
    pub(crate) fn drop_settled_wishes(&mut self) {
        let mut open = ModeSet::EMPTY;
        for wanted in self.wanted.iter().filter(|wanted| !self.held.compatible(*wanted)) {
            open.insert(wanted);
        }
        self.wanted = open;
    }

    /// The header's invariants.
    pub(crate) fn assert_consistent(&self) {
        assert!(self.is_drained(self.held), "users are covered by the mode held: {self:?}");
        let inside: Vec<(Mode, u32)> = self.process.modes().collect();
        for (i, (mode, count)) in inside.iter().enumerate() {
            assert!(*count == 1 || mode.compatible(*mode), "process scope excludes: {self:?}");
            assert!(inside[i + 1..].iter().all(|(other, _)| mode.compatible(*other)), "{self:?}");
        }
        let going_down = !matches!(self.phase, Phase::Open | Phase::Failed);
        assert!(!(going_down && self.asking.is_some()), "no request on the way down: {self:?}");
        let mut process_blocked = false;
        for waiter in &self.queue {
            let blocked = waiter.scope == Scope::Process && process_blocked;
            assert!(
                blocked || !self.admits(waiter.mode, waiter.scope),
                "whoever could get in is in: {self:?}"
            );
            process_blocked |= waiter.scope == Scope::Process;
        }
    }
}

/// The shortest sleep of a hold, so that an `idle_hold` of zero does not spin.
const MIN_NAP: Duration = Duration::from_micros(50);
