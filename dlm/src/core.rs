//! One partition of a node's lock manager: its own locks (requester) and the shards it masters (master).
//!
//! Always:
//! - per resource the node has at most one lock and one request on its way;
//! - what a member holds is at most what its master has recorded, so a master that keeps its shard never stops;
//! - while a request is on its way the node does not go down, so a grant can never cross a release;
//! - nothing is done for a message of an older view; one of a newer view waits until that view is here.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use membership::ShardSet;
use storage_control::{Generation, Incarnation, Instant, NodeId};

use crate::epoch::Epoch;
use crate::message::{Body, Fault, Message, Op, Output, Refusal, check_name};
use crate::queues::{Effect, Open, Queues, Step};
use crate::resource::NameHash;
use crate::{Mode, PARTITIONS, Resource, Value, ValueBlock};

/// A lock of this node.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    pub(crate) held: Mode,
    /// The value block as of the last grant or of our own write.
    pub(crate) value: Option<Box<Value>>,
    pub(crate) ask: Option<OwnAsk>,
}

/// A request on its way or in a queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnAsk {
    pub(crate) op: Op,
    pub(crate) want: Mode,
    pub(crate) no_queue: bool,
    pub(crate) cancelled: bool,
    pub(crate) since: Instant,
}

/// Identity of a departed incarnation.
pub(crate) type Dead = (NodeId, Incarnation);

/// One partition of the lock manager of one incarnation of a node.
#[derive(Debug)]
pub struct Dlm {
    pub(crate) me: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) partition: usize,
    pub(crate) epoch: Option<Arc<Epoch>>,
    pub(crate) own: HashMap<Resource, Own, NameHash>,
    last_op: Op,
    pub(crate) queues: HashMap<Resource, Queues, NameHash>,
    /// Members whose report of this view is not complete.
    pub(crate) unreported: BTreeSet<NodeId>,
    /// Mastered shards that came with reports still missing.
    pub(crate) incomplete: ShardSet,
    /// Mastered shards that wait for recoveries, and for which.
    pub(crate) held_back: BTreeMap<u16, BTreeSet<Dead>>,
    /// The last operation number of each member.
    pub(crate) last_seen: BTreeMap<NodeId, Op>,
    /// Messages of a view that is not here yet.
    pub(crate) early: BTreeMap<NodeId, VecDeque<Message>>,
    pub(crate) out: VecDeque<Output>,
}

impl Dlm {
    /// A partition without a view: requests wait until there is one.
    pub fn new(me: NodeId, incarnation: Incarnation, partition: usize) -> Dlm {
        assert!(partition < PARTITIONS, "a partition of the protocol");
        Dlm {
            me,
            incarnation,
            partition,
            epoch: None,
            own: HashMap::default(),
            last_op: Op(0),
            queues: HashMap::default(),
            unreported: BTreeSet::new(),
            incomplete: ShardSet::EMPTY,
            held_back: BTreeMap::new(),
            last_seen: BTreeMap::new(),
            early: BTreeMap::new(),
            out: VecDeque::new(),
        }
    }

    /// What to do next; outputs are to be carried out in order.
    pub fn poll(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// The view in force.
    pub fn generation(&self) -> Option<Generation> {
        self.epoch.as_ref().map(|epoch| epoch.generation)
    }

    /// The mode this node holds.
    pub fn held(&self, res: &Resource) -> Mode {
        self.own.get(res).map_or(Mode::NL, |own| own.held)
    }

    /// Whether a request for this resource has had no answer yet.
    pub fn is_asking(&self, res: &Resource) -> bool {
        self.own.get(res).is_some_and(|own| own.ask.is_some())
    }

    /// Whether this node masters the shard.
    pub fn masters(&self, shard: u16) -> bool {
        self.master(shard) == Some(self.me)
    }

    pub(crate) fn master(&self, shard: u16) -> Option<NodeId> {
        self.epoch.as_ref().and_then(|epoch| epoch.master(shard))
    }

    /// Asks for a mode that covers what is held and `want`. Ends with [`Output::Granted`] or [`Output::Refused`];
    /// at once where this node is master and nothing is in the way. There must be no request on its way.
    pub fn request(&mut self, now: Instant, res: Resource, want: Mode, no_queue: bool) {
        assert!(want != Mode::NL, "a request is for access");
        assert_eq!(check_name(&res, self.partition), Ok(()), "clients name resources of existing shards");
        let op = self.next_op();
        let own = self.own.entry(res).or_insert(Own { held: Mode::NL, value: None, ask: None });
        assert!(own.ask.is_none(), "one request per resource at a time");
        let want = own.held.join(want);
        own.ask = Some(OwnAsk { op, want, no_queue, cancelled: false, since: now });
        self.tell_master(now, res, Body::Ask { res, op, want, no_queue });
    }

    /// Whether [`Dlm::request`] would be granted at once without a message to anybody.
    pub fn is_free_here(&self, res: &Resource, want: Mode) -> bool {
        if !self.masters(res.shard) {
            return false;
        }
        let want = self.held(res).join(want);
        match self.queues.get(res) {
            None => self.open(res.shard) == Open::Yes,
            Some(queues) => queues.grants_at_once(self.me, want, self.open(res.shard)),
        }
    }

    /// Goes down to `to` (NL: gives the lock back), writing the value block if the mode held allowed it. There
    /// must be no request on its way, and `to` must be below what is held.
    pub fn downconvert(&mut self, now: Instant, res: Resource, to: Mode, value: Option<ValueBlock>) {
        let op = self.next_op();
        let own = self.own.get_mut(&res).expect("only a held lock goes down");
        assert!(own.ask.is_none(), "no lock goes down while a request is on its way");
        assert!(own.held != to && own.held.covers(to), "down is below");
        assert!(value.is_none() || own.held.writes_value(), "the value block is written under PW or EX");
        if let Some(block) = value {
            let sequence = own.value.as_ref().map_or(0, |v| v.sequence) + 1;
            own.value = Some(Box::new(Value { sequence, block }));
        }
        if to == Mode::NL {
            self.own.remove(&res);
        } else {
            own.held = to;
        }
        self.tell_master(now, res, Body::Down { res, op, to, value });
    }

    /// Takes back the request on its way, if there is one. Its answer still comes: cancelled, or granted.
    pub fn cancel(&mut self, now: Instant, res: Resource) {
        let op = self.next_op();
        let Some(ask) = self.own.get_mut(&res).and_then(|own| own.ask.as_mut()) else { return };
        if ask.cancelled {
            return;
        }
        ask.cancelled = true;
        let ask = ask.op;
        match self.master(res.shard) {
            Some(_) => self.tell_master(now, res, Body::Cancel { res, op, ask }),
            None => self.refused(res, ask, Refusal::Cancelled),
        }
    }

    fn next_op(&mut self) -> Op {
        self.last_op.0 += 1;
        self.last_op
    }

    /// To the shard's master; without one, the next view's report says it all.
    fn tell_master(&mut self, now: Instant, res: Resource, body: Body) {
        match self.master(res.shard) {
            None => {}
            Some(master) if master == self.me => {
                self.as_master(now, self.me, body).expect("our own messages are sound");
            }
            Some(master) => self.send(master, body),
        }
    }

    pub(crate) fn send(&mut self, to: NodeId, body: Body) {
        let generation = self.generation().expect("there are peers only in a view");
        self.out.push_back(Output::Send { to, message: Message { generation, body } });
    }

    /// A message from a member. `Err`: no correct member sends it, and its sender is not to be believed any more.
    pub fn message(&mut self, now: Instant, from: NodeId, message: Message) -> Result<(), Fault> {
        let current = self.generation();
        if current.is_none_or(|generation| message.generation > generation) {
            return self.keep_early(from, message);
        }
        if current.is_some_and(|generation| message.generation < generation) {
            return Ok(());
        }
        if !self.epoch.as_ref().is_some_and(|epoch| epoch.members.contains_key(&from)) {
            return Err(Fault::NotMember(from));
        }
        match message.body {
            body @ (Body::Ask { .. } | Body::Cancel { .. } | Body::Down { .. }) => {
                self.as_master(now, from, body)
            }
            Body::Report { entries, last, .. } => self.report(now, from, entries, last),
            body @ (Body::Granted { .. } | Body::Refused { .. } | Body::Blocking { .. }) => {
                self.as_requester(from, body)
            }
        }
    }

    /// Plays the master for `from`, who may be this node itself.
    fn as_master(&mut self, now: Instant, from: NodeId, body: Body) -> Result<(), Fault> {
        let (res, op) = match &body {
            Body::Ask { res, op, .. } | Body::Cancel { res, op, .. } | Body::Down { res, op, .. } => {
                (*res, *op)
            }
            Body::Granted { .. } | Body::Refused { .. } | Body::Blocking { .. } | Body::Report { .. } => {
                unreachable!("only what goes to a resource's master comes here")
            }
        };
        check_name(&res, self.partition)?;
        if !self.masters(res.shard) {
            return Err(Fault::NotMaster(res.shard));
        }
        if self.last_seen.get(&from).is_some_and(|last| op <= *last) {
            return Ok(()); // a duplicate
        }
        self.last_seen.insert(from, op);
        let step = self.step(now, res.shard);
        let mut effects = Vec::new();
        match (body, self.queues.get_mut(&res)) {
            (Body::Ask { want, no_queue, .. }, known) => {
                let sound = known.as_ref().is_none_or(|q| q.may_ask(from, want));
                if want == Mode::NL || !sound {
                    return Err(Fault::Contradiction(res));
                }
                let queues = self.queues.entry(res).or_default();
                queues.ask(step, from, op, want, no_queue, &mut effects);
            }
            (Body::Cancel { ask, .. }, Some(queues)) => queues.cancel(step, from, ask, &mut effects),
            (Body::Cancel { .. }, None) => {} // answered long ago, and given back since
            (Body::Down { to, value, .. }, Some(queues)) => {
                if !queues.down(step, from, to, value, &mut effects) {
                    return Err(Fault::Contradiction(res));
                }
            }
            (Body::Down { .. }, None) => return Err(Fault::Contradiction(res)),
            (
                Body::Granted { .. } | Body::Refused { .. } | Body::Blocking { .. } | Body::Report { .. },
                _,
            ) => {
                unreachable!("told apart above")
            }
        }
        self.carry_out(res, effects);
        Ok(())
    }

    /// What the shard's master told us.
    fn as_requester(&mut self, from: NodeId, body: Body) -> Result<(), Fault> {
        let res = match &body {
            Body::Granted { res, .. } | Body::Refused { res, .. } | Body::Blocking { res, .. } => *res,
            Body::Ask { .. } | Body::Cancel { .. } | Body::Down { .. } | Body::Report { .. } => {
                unreachable!("only a master's answers come here")
            }
        };
        check_name(&res, self.partition)?;
        if self.master(res.shard) != Some(from) {
            return Err(Fault::NotFromMaster(res.shard));
        }
        match body {
            Body::Granted { op, mode, value, .. } => return self.granted(res, op, mode, value),
            Body::Refused { op, why, .. } => self.refused(res, op, why),
            Body::Blocking { wanted, .. } => self.blocking(res, wanted),
            Body::Ask { .. } | Body::Cancel { .. } | Body::Down { .. } | Body::Report { .. } => {
                unreachable!("refused above")
            }
        }
        Ok(())
    }

    fn granted(&mut self, res: Resource, op: Op, mode: Mode, value: Option<Value>) -> Result<(), Fault> {
        let Some(own) = self.own.get_mut(&res) else { return Ok(()) };
        match own.ask {
            Some(ask) if ask.op == op && ask.want == mode => {}
            Some(ask) if ask.op == op => return Err(Fault::Contradiction(res)),
            Some(_) | None => return Ok(()), // a duplicate
        }
        *own = Own { held: mode, value: value.map(Box::new), ask: None };
        self.out.push_back(Output::Granted { res, mode, value });
        Ok(())
    }

    pub(crate) fn refused(&mut self, res: Resource, op: Op, why: Refusal) {
        let Some(own) = self.own.get_mut(&res) else { return };
        if own.ask.is_none_or(|ask| ask.op != op) {
            return; // a duplicate
        }
        own.ask = None;
        if own.held == Mode::NL {
            self.own.remove(&res);
        }
        self.out.push_back(Output::Refused { res, why });
    }

    fn blocking(&mut self, res: Resource, wanted: Mode) {
        // A release may have crossed the callback.
        if !self.held(&res).compatible(wanted) {
            self.out.push_back(Output::Blocking { res, wanted });
        }
    }

    /// Whether a shard mastered here may grant.
    pub(crate) fn open(&self, shard: u16) -> Open {
        if self.incomplete.contains(shard) {
            Open::Reporting
        } else if self.held_back.contains_key(&shard) {
            Open::Recovering
        } else {
            Open::Yes
        }
    }

    pub(crate) fn step(&self, now: Instant, shard: u16) -> Step {
        let generation = self.generation().expect("masters act in a view");
        Step { now, generation, open: self.open(shard) }
    }

    /// Tells each node what the queues decided; drops a resource that nobody has or wants.
    pub(crate) fn carry_out(&mut self, res: Resource, effects: Vec<Effect>) {
        if self.queues.get(&res).is_some_and(Queues::is_empty) {
            self.queues.remove(&res);
        }
        for effect in effects {
            match effect {
                Effect::Grant { node, op, mode, value } if node == self.me => {
                    self.granted(res, op, mode, value).expect("we grant ourselves what we asked for");
                }
                Effect::Refuse { node, op, why } if node == self.me => self.refused(res, op, why),
                Effect::Call { node, wanted } if node == self.me => self.blocking(res, wanted),
                Effect::Grant { node, op, mode, value } => {
                    self.send(node, Body::Granted { res, op, mode, value });
                }
                Effect::Refuse { node, op, why } => self.send(node, Body::Refused { res, op, why }),
                Effect::Call { node, wanted } => self.send(node, Body::Blocking { res, wanted }),
            }
        }
    }

    /// The invariants of the module headers, of every resource mastered here; for tests.
    pub fn assert_consistent(&self) {
        for (res, queues) in &self.queues {
            assert!(self.masters(res.shard), "{res} is mastered here");
            assert!(!queues.is_empty(), "{res} is kept for somebody");
            queues.assert_consistent(self.open(res.shard));
            let own = self.own.get(res);
            let held = own.map_or(Mode::NL, |own| own.held);
            if !self.unreported.contains(&self.me) {
                assert_eq!(queues.held(self.me), held, "{res}: what we hold of our own");
            }
        }
        for (res, own) in &self.own {
            assert!(own.held != Mode::NL || own.ask.is_some(), "{res} is kept for a reason");
        }
        assert!(
            self.incomplete.is_empty() || !self.unreported.is_empty(),
            "nobody waits for complete reports"
        );
    }
}
