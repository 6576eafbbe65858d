//! The register's rules, without I/O: CASPaxos over the blocks of Disk Paxos.
//!
//! An acceptor is a set of blocks, one for each slot: a node writes its own and reads everybody's. A run has a
//! ballot of its own and two phases; in each it writes its own block to the acceptors and then reads all
//! blocks there, and the phase is done when a majority of acceptors is. It gives up where it reads a larger
//! promised ballot than its own.
//!
//! - Phase 1 promises the ballot; the value accepted with the largest ballot seen is the current one.
//! - Phase 2 accepts, under the ballot, the current value or its successor. A majority makes it committed.
//! - All values ever committed form one chain: each has the sequence of the one before it plus one.
//! - No ballot is used twice: it ends with the slot, and its round is larger than all seen. This needs the
//!   slot's block to be kept when the slot changes hands, and one writer of a block at a time.
//!
//! A read, too, is acted upon only after phase 2: a value accepted by a node that then gave up may yet lose.

use crate::ids::NodeId;
use crate::layout::BodyBuffer;

/// How many operations back a block remembers. Who settles an operation later than that gets no answer.
pub const RECENT_OPS: usize = 128;

/// The number of a run: its round above the slot it belongs to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Ballot(pub u64);

impl Ballot {
    /// The ballot of a slot in a round.
    pub fn new(round: u64, node: NodeId) -> Ballot {
        Ballot(round << 16 | u64::from(node.0))
    }

    /// The round.
    pub fn round(self) -> u64 {
        self.0 >> 16
    }

    /// The slot's first ballot after this one.
    fn next(self, node: NodeId) -> Ballot {
        Ballot::new(self.round() + 1, node)
    }
}

/// Names one compare-and-set, so that its outcome can be found again. Random.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OpId(pub u128);

/// FNV-1a of a body: tells a whole body from a half overwritten one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BodyHash(pub u64);

impl BodyHash {
    /// The hash of a body.
    pub fn of(body: &[u8]) -> BodyHash {
        let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
        BodyHash(body.iter().fold(0xCBF2_9CE4_8422_2325, step))
    }
}

/// A value of the register, without its body.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Value {
    /// Its place in the chain.
    pub sequence: u64,
    /// Of its body.
    pub hash: BodyHash,
    /// Length of its body in bytes.
    pub len: u32,
    /// The operations that made it and the values before it, the latest last; at most [`RECENT_OPS`].
    pub recent: Vec<OpId>,
}

impl Value {
    /// The first value, which mkfs writes.
    pub fn first(op: OpId, body: &[u8]) -> Value {
        Value { sequence: 1, hash: BodyHash::of(body), len: body.len() as u32, recent: vec![op] }
    }

    fn successor(&self, op: &Op) -> Value {
        let skip = (self.recent.len() + 1).saturating_sub(RECENT_OPS);
        let recent = self.recent[skip..].iter().copied().chain([op.id]).collect();
        Value { sequence: self.sequence + 1, hash: op.hash, len: op.len, recent }
    }

    /// Whether an operation that expected this sequence would no longer be among the recent ones.
    pub fn forgot(&self, expected: u64) -> bool {
        self.sequence.saturating_sub(expected) > self.recent.len() as u64
    }

    /// The sequence that an operation made, if it is among the recent ones.
    pub fn sequence_of(&self, op: OpId) -> Option<u64> {
        let back = self.recent.iter().rev().position(|&recent| recent == op)?;
        Some(self.sequence - back as u64)
    }
}

/// A value with the ballot under which it was accepted, and where its body lies.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Accepted {
    /// The ballot.
    pub ballot: Ballot,
    /// The value.
    pub value: Value,
    /// Which buffer of the block's owner, on the same acceptor, holds the body.
    pub buffer: BodyBuffer,
}

/// One node's block on one acceptor.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Block {
    /// The owner takes part in no smaller ballot.
    pub promised: Ballot,
    /// What it accepted last.
    pub accepted: Option<Accepted>,
}

/// A compare-and-set.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Op {
    /// Its name.
    pub id: OpId,
    /// The sequence it replaces.
    pub expected: u64,
    /// Of the new body.
    pub hash: BodyHash,
    /// Length of the new body in bytes.
    pub len: u32,
}

/// Where a body can be read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BodyPlace {
    /// The acceptor.
    pub acceptor: usize,
    /// The node whose buffer it is.
    pub node: NodeId,
    /// Which of the two.
    pub buffer: BodyBuffer,
}

/// What the core wants done.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Output {
    /// On this acceptor: write the body (where one is asked for), THEN the block, both stable, THEN read all
    /// blocks, and report with [`Core::accessed`] or [`Core::failed`].
    Access {
        /// The acceptor.
        acceptor: usize,
        /// The own block's new contents.
        block: Block,
        /// Write the body of the block's value into this buffer first.
        body: Option<BodyBuffer>,
    },
    /// Find the body with this hash, at one of these places, and report with [`Core::fetched`].
    Fetch {
        /// The value whose body is wanted.
        value: Value,
        /// Where it lies.
        places: Vec<BodyPlace>,
    },
    /// The run is over.
    Done(Verdict),
}

/// How a run ended.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Verdict {
    /// The current value, committed. Of an operation: it is not in effect and never will be, because the
    /// value has another sequence than expected.
    Current(Value),
    /// The operation is in effect; it made this sequence. The value is the current one, committed.
    Committed {
        /// The sequence that the operation made.
        sequence: u64,
        /// The current value.
        value: Value,
    },
    /// Too many commits have passed to tell whether the operation is among them.
    Forgotten(Value),
    /// A larger ballot is under way. The operation may be in effect or not: run again with the same id.
    Preempted,
    /// Too few acceptors answered. As `Preempted`, but the own blocks must be read again before the next run.
    NoMajority,
    /// No acceptor has a value: mkfs did not run to its end.
    Uninitialised,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Promise,
    /// The body of the value must be in hand before the value can be accepted.
    Fetch,
    Accept,
    Over,
}

/// One node's side of the register: at most one run at a time.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Core {
    me: NodeId,
    /// The own block on each acceptor, as it was written last. `None`: not known (unreachable, or not to be believed).
    own: Vec<Option<Block>>,
    /// The ballot and phase of the access under way on each acceptor: never more than one, or an older write
    /// could land after a newer one.
    busy: Vec<Option<(Ballot, Phase)>>,
    /// The largest ballot seen anywhere.
    seen: Ballot,
    run: Run,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Run {
    ballot: Ballot,
    op: Option<Op>,
    phase: Phase,
    /// The acceptors that are done with this phase.
    done: Vec<usize>,
    failed: Vec<usize>,
    best: Option<(Ballot, Value)>,
    places: Vec<BodyPlace>,
    /// What phase 2 accepts, and how the run ends if it succeeds.
    proposal: Option<(Value, Verdict)>,
}

impl Core {
    /// A core that continues from the own blocks as they lie on the acceptors.
    /// `None` for an acceptor that could not be read; it is then left out until the next `Core`.
    pub fn new(me: NodeId, own: Vec<Option<Block>>) -> Core {
        let seen = own.iter().flatten().map(|block| block.promised).max().unwrap_or_default();
        let run = Run {
            ballot: Ballot::default(),
            op: None,
            phase: Phase::Over,
            done: Vec::new(),
            failed: Vec::new(),
            best: None,
            places: Vec::new(),
            proposal: None,
        };
        let busy = vec![None; own.len()];
        Core { me, own, busy, seen, run }
    }

    /// Starts a run: of an operation, or of a read.
    ///
    /// # Panics
    /// Where a run is under way.
    pub fn start(&mut self, op: Option<Op>) -> Vec<Output> {
        assert!(self.run.phase == Phase::Over, "one run at a time");
        let ballot = self.seen.next(self.me);
        self.seen = ballot;
        self.run = Run {
            ballot,
            op,
            phase: Phase::Promise,
            done: Vec::new(),
            failed: (0..self.own.len()).filter(|&acceptor| self.own[acceptor].is_none()).collect(),
            best: None,
            places: Vec::new(),
            proposal: None,
        };
        self.enter_phase()
    }

    /// Whether the last run came so far that its operation may be in effect, or may come into effect.
    pub fn has_proposed(&self) -> bool {
        self.run.op.is_some() && self.run.proposal.is_some()
    }

    /// The own block was written to the acceptor, and these are the others' blocks read there afterwards.
    pub fn accessed(&mut self, acceptor: usize, others: &[(NodeId, Block)]) -> Vec<Output> {
        let highest = others.iter().map(|(_, block)| block.promised).max().unwrap_or_default();
        self.seen = self.seen.max(highest);
        let answered = self.busy[acceptor].take().expect("an access was under way");
        if !self.is_running() {
            return Vec::new();
        }
        if answered != (self.run.ballot, self.run.phase) {
            // The answer to an older access: now this run's may follow.
            return self.access(acceptor).into_iter().collect();
        }
        if highest > self.run.ballot {
            return self.over(Verdict::Preempted);
        }
        if self.run.phase == Phase::Promise {
            let own = self.own[acceptor].clone().map(|block| (self.me, block));
            for (node, block) in others.iter().cloned().chain(own) {
                if let Some(accepted) = block.accepted {
                    self.consider(acceptor, node, accepted);
                }
            }
        }
        self.run.done.push(acceptor);
        self.after_answer()
    }

    /// The acceptor did not answer, or what it answered is not to be believed.
    pub fn failed(&mut self, acceptor: usize) -> Vec<Output> {
        // What lies there now is not known: the write may have happened or not.
        self.own[acceptor] = None;
        self.busy[acceptor] = None;
        if self.run.phase == Phase::Over || self.run.failed.contains(&acceptor) {
            return Vec::new();
        }
        self.run.failed.push(acceptor);
        self.after_answer()
    }

    /// The body asked for with [`Output::Fetch`] is in hand, or (false) no place has it.
    pub fn fetched(&mut self, found: bool) -> Vec<Output> {
        if self.run.phase != Phase::Fetch {
            return Vec::new();
        }
        if !found {
            // Its owner has moved on since, under a larger ballot.
            return self.over(Verdict::Preempted);
        }
        self.run.phase = Phase::Accept;
        self.enter_phase()
    }

    fn consider(&mut self, acceptor: usize, node: NodeId, accepted: Accepted) {
        let place = BodyPlace { acceptor, node, buffer: accepted.buffer };
        match &self.run.best {
            Some((ballot, _)) if *ballot > accepted.ballot => {}
            Some((ballot, _)) if *ballot == accepted.ballot => self.run.places.push(place),
            Some(_) | None => {
                self.run.best = Some((accepted.ballot, accepted.value));
                self.run.places = vec![place];
            }
        }
    }

    fn majority(&self) -> usize {
        self.own.len() / 2 + 1
    }

    fn after_answer(&mut self) -> Vec<Output> {
        if self.run.done.len() >= self.majority() {
            return match self.run.phase {
                Phase::Promise => self.choose(),
                Phase::Accept => {
                    let (_, verdict) = self.run.proposal.clone().expect("phase 2 has a proposal");
                    self.over(verdict)
                }
                Phase::Fetch | Phase::Over => Vec::new(),
            };
        }
        if self.own.len() - self.run.failed.len() < self.majority() {
            return self.over(Verdict::NoMajority);
        }
        Vec::new()
    }

    /// Phase 1 is done: decides what phase 2 proposes.
    fn choose(&mut self) -> Vec<Output> {
        let Some((_, current)) = self.run.best.clone() else {
            return self.over(Verdict::Uninitialised);
        };
        let keep = |verdict: fn(Value) -> Verdict| (current.clone(), verdict(current.clone()));
        let proposal = match &self.run.op {
            None => keep(Verdict::Current),
            Some(op) => match current.sequence_of(op.id) {
                Some(sequence) => (current.clone(), Verdict::Committed { sequence, value: current.clone() }),
                None if current.sequence == op.expected => {
                    let value = current.successor(op);
                    (value.clone(), Verdict::Committed { sequence: value.sequence, value })
                }
                None if current.forgot(op.expected) => keep(Verdict::Forgotten),
                None => keep(Verdict::Current),
            },
        };
        let new = proposal.0 != current;
        self.run.proposal = Some(proposal);
        if new {
            // The body came with the operation.
            self.run.phase = Phase::Accept;
            return self.enter_phase();
        }
        self.run.phase = Phase::Fetch;
        vec![Output::Fetch { value: current, places: self.run.places.clone() }]
    }

    fn is_running(&self) -> bool {
        match self.run.phase {
            Phase::Promise | Phase::Accept => true,
            Phase::Fetch | Phase::Over => false,
        }
    }

    /// Asks every acceptor whose own block is known; those with an access under way follow after it.
    fn enter_phase(&mut self) -> Vec<Output> {
        self.run.done.clear();
        if self.own.len() - self.run.failed.len() < self.majority() {
            return self.over(Verdict::NoMajority);
        }
        (0..self.own.len()).filter_map(|acceptor| self.access(acceptor)).collect()
    }

    fn access(&mut self, acceptor: usize) -> Option<Output> {
        let own = self.own[acceptor].as_mut().filter(|_| self.busy[acceptor].is_none())?;
        let mut body = None;
        own.promised = self.run.ballot;
        if self.run.phase == Phase::Accept {
            let (value, _) = self.run.proposal.as_ref().expect("phase 2 has a proposal");
            let buffer = match &own.accepted {
                Some(accepted) if accepted.value == *value => accepted.buffer,
                // Never the buffer that the block on the acceptor refers to.
                Some(accepted) => *body.insert(accepted.buffer.other()),
                None => *body.insert(BodyBuffer::A),
            };
            own.accepted = Some(Accepted { ballot: self.run.ballot, value: value.clone(), buffer });
        }
        self.busy[acceptor] = Some((self.run.ballot, self.run.phase));
        Some(Output::Access { acceptor, block: own.clone(), body })
    }

    fn over(&mut self, verdict: Verdict) -> Vec<Output> {
        self.run.phase = Phase::Over;
        vec![Output::Done(verdict)]
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
