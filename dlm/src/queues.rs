//! One resource at its master: the three queues.
//!
//! Always:
//! - every two granted modes of different nodes are compatible, and a departed node's mode counts as granted;
//! - a node has at most one lock and at most one request, and a request covers what the node holds;
//! - where granting is allowed, the first converting request, or with nobody converting the first waiting one,
//!   is not grantable: whoever could be granted has been;
//! - nobody converts behind a request that waits for him: the later one is refused as a deadlock;
//! - every holder that is in the way of a request has been told the mode wanted, once since his mode changed.

use std::collections::VecDeque;

use storage_control::{Generation, Incarnation, Instant, NodeId};

use crate::epoch::Epoch;
use crate::message::{EntryAsk, Op, Refusal};
use crate::mode::ModeSet;
use crate::{Mode, Value, ValueBlock};

const NANOS_PER_MS: u64 = 1_000_000;

/// A granted lock of a member.
#[derive(Clone, Debug)]
pub(crate) struct Lock {
    pub(crate) node: NodeId,
    pub(crate) mode: Mode,
    pub(crate) since: Instant,
    /// The modes this holder has been called back for.
    told: ModeSet,
    /// The view in which the node last confirmed it.
    seen: Generation,
}

/// What an excluded incarnation held when it went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ghost {
    pub(crate) node: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) mode: Mode,
    pub(crate) since: Instant,
}

/// A request in a queue.
#[derive(Clone, Debug)]
pub(crate) struct Waiter {
    pub(crate) node: NodeId,
    pub(crate) op: Op,
    pub(crate) want: Mode,
    pub(crate) since: Instant,
}

/// What the master says to a node about this resource.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Effect {
    Grant { node: NodeId, op: Op, mode: Mode, value: Option<Value> },
    Refuse { node: NodeId, op: Op, why: Refusal },
    Call { node: NodeId, wanted: Mode },
}

/// The circumstances of a step.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(crate) now: Instant,
    pub(crate) generation: Generation,
    /// Whether the shard may grant at all.
    pub(crate) open: Open,
}

/// What a shard may grant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Open {
    /// Everything.
    Yes,
    /// Reports are missing: nothing.
    Reporting,
    /// All have reported, but a former master is not recovered: only what a report proves untouched by the dead.
    Recovering,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Queues {
    pub(crate) locks: Vec<Lock>,
    pub(crate) converting: VecDeque<Waiter>,
    pub(crate) waiting: VecDeque<Waiter>,
    pub(crate) ghosts: Vec<Ghost>,
    /// The value block as last written (few resources have one); `valid` says whether it may be given out.
    pub(crate) value: Option<Box<Value>>,
    pub(crate) valid: bool,
    /// A survivor reported EX when the shard came: no departed node can hold anything here.
    untouched: bool,
}

impl Queues {
    pub(crate) fn is_empty(&self) -> bool {
        self.locks.is_empty()
            && self.converting.is_empty()
            && self.waiting.is_empty()
            && self.ghosts.is_empty()
    }

    pub(crate) fn is_waited_for(&self) -> bool {
        !self.converting.is_empty() || !self.waiting.is_empty()
    }

    pub(crate) fn held(&self, node: NodeId) -> Mode {
        self.locks.iter().find(|lock| lock.node == node).map_or(Mode::NL, |lock| lock.mode)
    }

    /// All requests in the order in which they will be granted.
    pub(crate) fn requests(&self) -> impl Iterator<Item = &Waiter> {
        self.converting.iter().chain(&self.waiting)
    }

    fn valid_value(&self) -> Option<Value> {
        self.value.as_deref().copied().filter(|_| self.valid)
    }

    /// Whether no other node's granted mode, living or departed, is in the way.
    fn compatible(&self, node: NodeId, want: Mode) -> bool {
        self.locks.iter().all(|lock| lock.node == node || lock.mode.compatible(want))
            && self.ghosts.iter().all(|ghost| ghost.mode.compatible(want))
    }

    fn may_grant(&self, open: Open) -> bool {
        match open {
            Open::Yes => true,
            Open::Reporting => false,
            Open::Recovering => self.untouched,
        }
    }

    /// Whether a correct member can ask for this: it has no request here, and asks for no less than it holds.
    pub(crate) fn may_ask(&self, node: NodeId, want: Mode) -> bool {
        self.requests().all(|waiter| waiter.node != node) && want.covers(self.held(node))
    }

    /// Whether a request would be granted now without disturbing anybody.
    pub(crate) fn grants_at_once(&self, node: NodeId, want: Mode, open: Open) -> bool {
        self.may_grant(open) && !self.is_waited_for() && self.compatible(node, want)
    }

    /// A request arrives.
    pub(crate) fn ask(
        &mut self,
        step: Step,
        node: NodeId,
        op: Op,
        want: Mode,
        no_queue: bool,
        effects: &mut Vec<Effect>,
    ) {
        let held = self.held(node);
        let first = held != Mode::NL || !self.is_waited_for();
        if self.may_grant(step.open) && first && self.compatible(node, want) {
            self.grant(step, node, op, want, effects);
            // Only a holder's own conversion can be in the way of someone now; the sweep tells him.
            if self.is_waited_for() {
                self.advance(step, effects);
            }
        } else if no_queue {
            effects.push(Effect::Refuse { node, op, why: Refusal::Busy });
            if self.may_grant(step.open) {
                self.call(node, want, effects);
            }
        } else {
            let waiter = Waiter { node, op, want, since: step.now };
            if held == Mode::NL {
                self.waiting.push_back(waiter);
            } else {
                self.converting.push_back(waiter);
            }
            self.advance(step, effects);
        }
    }

    /// Takes a request out of its queue; a request that is not there has had its answer.
    pub(crate) fn cancel(&mut self, step: Step, node: NodeId, ask: Op, effects: &mut Vec<Effect>) {
        let before = self.converting.len() + self.waiting.len();
        let gone = |waiter: &Waiter| waiter.node == node && waiter.op == ask;
        self.converting.retain(|waiter| !gone(waiter));
        self.waiting.retain(|waiter| !gone(waiter));
        if self.converting.len() + self.waiting.len() < before {
            effects.push(Effect::Refuse { node, op: ask, why: Refusal::Cancelled });
            self.advance(step, effects);
        }
    }

    /// A holder went down. `false`: he cannot have.
    pub(crate) fn down(
        &mut self,
        step: Step,
        node: NodeId,
        to: Mode,
        value: Option<ValueBlock>,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Some(at) = self.locks.iter().position(|lock| lock.node == node) else { return false };
        let lock = &mut self.locks[at];
        let from = lock.mode;
        if !from.covers(to) || self.converting.iter().any(|waiter| waiter.node == node) {
            return false;
        }
        if let Some(block) = value {
            if !from.writes_value() {
                return false;
            }
            let sequence = self.value.as_ref().map_or(0, |v| v.sequence) + 1;
            self.value = Some(Box::new(Value { sequence, block }));
            self.valid = true;
        }
        if to == Mode::NL {
            self.locks.swap_remove(at);
        } else {
            lock.mode = to;
            lock.told = ModeSet::EMPTY;
        }
        self.advance(step, effects);
        true
    }

    fn grant(&mut self, step: Step, node: NodeId, op: Op, mode: Mode, effects: &mut Vec<Effect>) {
        match self.locks.iter_mut().find(|lock| lock.node == node) {
            Some(lock) => {
                lock.mode = mode;
                lock.since = step.now;
                lock.told = ModeSet::EMPTY;
            }
            None => self.locks.push(Lock {
                node,
                mode,
                since: step.now,
                told: ModeSet::EMPTY,
                seen: step.generation,
            }),
        }
        effects.push(Effect::Grant { node, op, mode, value: self.valid_value() });
    }

    /// Grants what can be granted, conversions first, refuses deadlocks, calls back who is in the way.
    pub(crate) fn advance(&mut self, step: Step, effects: &mut Vec<Effect>) {
        if !self.may_grant(step.open) {
            return;
        }
        self.refuse_deadlocks(effects);
        while let Some(first) = self.converting.front()
            && self.compatible(first.node, first.want)
        {
            let Waiter { node, op, want, .. } = self.converting.pop_front().expect("there is a first");
            self.grant(step, node, op, want, effects);
        }
        while self.converting.is_empty()
            && let Some(first) = self.waiting.front()
            && self.compatible(first.node, first.want)
        {
            let Waiter { node, op, want, .. } = self.waiting.pop_front().expect("there is a first");
            self.grant(step, node, op, want, effects);
        }
        let asked: Vec<(NodeId, Mode)> = self.requests().map(|waiter| (waiter.node, waiter.want)).collect();
        for (node, want) in asked {
            self.call(node, want, effects);
        }
    }

    /// Refuses every conversion behind one that waits for what this one's node holds: neither could ever go on.
    fn refuse_deadlocks(&mut self, effects: &mut Vec<Effect>) {
        let mut at = 1;
        while at < self.converting.len() {
            let held = self.held(self.converting[at].node);
            if self.converting.iter().take(at).any(|ahead| !ahead.want.compatible(held)) {
                let Waiter { node, op, .. } = self.converting.remove(at).expect("inside the queue");
                effects.push(Effect::Refuse { node, op, why: Refusal::Deadlock });
            } else {
                at += 1;
            }
        }
    }

    /// Tells every holder in the way of `node`'s wish, once.
    fn call(&mut self, node: NodeId, wanted: Mode, effects: &mut Vec<Effect>) {
        for lock in &mut self.locks {
            if lock.node != node && !lock.mode.compatible(wanted) && lock.told.insert(wanted) {
                effects.push(Effect::Call { node: lock.node, wanted });
            }
        }
    }

    /// A new view: the requests come again with the reports. Until a node has reported it must be granted
    /// nothing, for its report would not know of it.
    pub(crate) fn forget_requests(&mut self) {
        self.converting.clear();
        self.waiting.clear();
    }

    /// An incarnation is no member any longer. `fenced`: whether it surely stopped reading; `None`: it left
    /// nothing that needs recovery.
    pub(crate) fn depart(&mut self, node: NodeId, incarnation: Incarnation, fenced: Option<bool>) {
        let Some(at) = self.locks.iter().position(|lock| lock.node == node) else { return };
        let Lock { mode, since, .. } = self.locks.swap_remove(at);
        match fenced {
            None => {}
            Some(true) if !mode.writes() => {}
            Some(_) => self.ghosts.push(Ghost { node, incarnation, mode, since }),
        }
        if mode.writes_value() {
            self.valid = false; // also where its recovery was over before we heard of it
        }
    }

    /// A departed incarnation is fenced (`recovered` false) or fenced and replayed.
    pub(crate) fn release_ghosts(&mut self, node: NodeId, incarnation: Incarnation, recovered: bool) {
        self.ghosts.retain(|ghost| {
            (ghost.node, ghost.incarnation) != (node, incarnation) || (!recovered && ghost.mode.writes())
        });
    }

    /// Lets ghosts go whose recovery is over, or whose fence is all they waited for.
    pub(crate) fn settle_ghosts(&mut self, epoch: &Epoch) {
        self.ghosts.retain(|ghost| {
            let open =
                epoch.recoveries.iter().find(|d| (d.node, d.incarnation) == (ghost.node, ghost.incarnation));
            open.is_some_and(|dead| ghost.mode.writes() || !dead.fenced)
        });
    }

    /// What a member holds and asks, as it says itself after a new view. Of a shard that just came (`fresh`)
    /// nothing else is known; else the record was at least as much as the truth. `false`: that cannot be.
    pub(crate) fn report(
        &mut self,
        step: Step,
        node: NodeId,
        held: Mode,
        value: Option<Value>,
        ask: Option<EntryAsk>,
        fresh: bool,
    ) -> bool {
        let says_nothing = held == Mode::NL && ask.is_none();
        let asks_twice = ask.is_some() && self.requests().any(|waiter| waiter.node == node);
        if says_nothing
            || asks_twice
            || ask.is_some_and(|ask| !ask.want.covers(held))
            || !self.compatible(node, held)
        {
            return false;
        }
        let known = self.held(node);
        if fresh {
            self.untouched |= held == Mode::EX;
        } else if !known.covers(held) {
            return false;
        }
        self.settle_value(known, held, value);
        match self.locks.iter().position(|lock| lock.node == node) {
            Some(at) if held == Mode::NL => {
                self.locks.swap_remove(at);
            }
            Some(at) => {
                self.locks[at].mode = held;
                self.locks[at].seen = step.generation;
            }
            None if held == Mode::NL => {}
            None => self.locks.push(Lock {
                node,
                mode: held,
                since: step.now,
                told: ModeSet::EMPTY,
                seen: step.generation,
            }),
        }
        if let Some(ask) = ask {
            self.place_request(step, node, held, ask);
        }
        true
    }

    fn settle_value(&mut self, known: Mode, held: Mode, value: Option<Value>) {
        let newer = value.filter(|v| {
            held.fixes_value() && self.value.as_ref().is_none_or(|own| v.sequence > own.sequence)
        });
        if let Some(value) = newer {
            (self.value, self.valid) = (Some(Box::new(value)), true);
        } else if known.writes_value() && !held.fixes_value() {
            self.valid = false; // written or not, we cannot know: the message with it is lost
        }
    }

    /// A request's age finds its place among the others.
    fn place_request(&mut self, step: Step, node: NodeId, held: Mode, ask: EntryAsk) {
        let EntryAsk { op, want, waited_ms } = ask;
        let since = Instant(step.now.0.saturating_sub(waited_ms.saturating_mul(NANOS_PER_MS)));
        let queue = if held == Mode::NL { &mut self.waiting } else { &mut self.converting };
        let at = queue.partition_point(|waiter| (waiter.since, waiter.node) <= (since, node));
        queue.insert(at, Waiter { node, op, want, since });
    }

    /// The node's report is complete: what it did not mention it does not have; callbacks to it start anew.
    pub(crate) fn end_report(&mut self, generation: Generation, node: NodeId) {
        let Some(at) = self.locks.iter().position(|lock| lock.node == node) else { return };
        if self.locks[at].seen == generation {
            self.locks[at].told = ModeSet::EMPTY;
        } else {
            let lost = self.locks.swap_remove(at);
            self.valid &= !lost.mode.writes_value();
        }
    }

    /// The header's invariants.
    pub(crate) fn assert_consistent(&self, open: Open) {
        for (i, lock) in self.locks.iter().enumerate() {
            assert!(lock.mode != Mode::NL, "a lock holds something: {self:?}");
            for other in &self.locks[i + 1..] {
                assert!(lock.node != other.node, "one lock per node: {self:?}");
                assert!(lock.mode.compatible(other.mode), "granted locks are compatible: {self:?}");
            }
            assert!(
                self.ghosts.iter().all(|ghost| ghost.mode.compatible(lock.mode)),
                "nothing granted beside what a departed node may hold: {self:?}"
            );
        }
        for waiter in &self.waiting {
            assert!(self.held(waiter.node) == Mode::NL, "who waits holds nothing: {self:?}");
        }
        for waiter in &self.converting {
            assert!(self.held(waiter.node) != Mode::NL, "who converts holds something: {self:?}");
        }
        for waiter in self.requests() {
            assert_eq!(self.requests().filter(|other| other.node == waiter.node).count(), 1, "{self:?}");
        }
        if self.may_grant(open)
            && let Some(first) = self.requests().next()
        {
            assert!(!self.compatible(first.node, first.want), "the first request is not grantable: {self:?}");
        }
    }
}
