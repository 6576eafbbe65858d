//! The membership core of one node.
//!
//! Always:
//! - What the register says is true; everything else is a hint. Nothing is installed, fenced or replayed that is
//!   not committed in the register.
//! - At most one compare-and-set or read of the register is under way, and a compare-and-set is made from the newest
//!   content known.
//! - A node that knows a content of the register without itself, having been a member, stops for good.
//! - Where a connection between members broke and came back, a new view of the same members follows: the lock
//!   manager tells everything anew in every view, and so needs no other repair of lost messages.
//! - What to do follows from the state, not from the history: every step compares what the register says with what
//!   is known, and asks for the difference. A lost message or answer is asked for again.

mod administer;
mod clique;
mod election;
mod io;
mod naming;
mod outside;
mod talk;
mod watch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use storage_control::{Generation, Incarnation, Instant, NodeId};

pub use io::{CasOutcome, CloseReason, Input, Notice, Output, Phase, Snapshot};
pub use watch::{SlotSeen, Standing};

use crate::message::{Applicant, Message, NodeSet};
use crate::times::{HEARTBEAT_MS, TELL_MS, ms};
use crate::view::{FenceState, View};
use election::Election;
use watch::{Judgement, Watch};

/// One start of one node's daemon.
pub(crate) type Who = (NodeId, Incarnation);

/// A reason is kept and sent in so many characters: messages are bounded.
const MAX_REASON: usize = 500;

/// Work that was asked for and may be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Work {
    UnderWay,
    Done,
    Failed { why: String, at: Instant },
}

/// The register, from this node's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RegisterUse {
    Idle,
    Reading,
    Writing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lease {
    Held,
    /// Lapsed; the read that decides has not begun.
    Lapsed,
    /// Lapsed; the read that decides is under way.
    Deciding,
}

/// An applicant and what it asked with.
#[derive(Clone, Debug)]
struct Application {
    applicant: Applicant,
    version: u16,
    generation: Generation,
    healthy: bool,
    names: Generation,
}

/// See the module.
#[derive(Debug)]
pub struct Membership {
    me: Applicant,
    slots: u16,
    now: Instant,
    phase: Phase,
    watch: Watch,
    /// The newest content of the register known to be committed.
    register: Option<(u64, Arc<View>)>,
    register_use: RegisterUse,
    /// Under way: what the compare-and-set would make of the register.
    writing: Option<Arc<View>>,
    must_read: bool,
    /// Since when something newer than what we know is said to be there.
    moved: Option<Instant>,
    lease: Lease,
    /// The content last shown to the daemon, with this node in it.
    shown: Option<Arc<View>>,
    fences: BTreeMap<Who, Work>,
    replays: BTreeMap<Who, Work>,
    journal: Option<(u16, Work)>,
    /// The version of the naming database whose devices were looked for, and whether all are here.
    names: Option<(Generation, Work)>,
    applications: BTreeMap<NodeId, Application>,
    leavers: BTreeSet<Who>,
    /// Members whose connection broke: what was on its way is lost.
    broken: BTreeSet<Who>,
    /// Messages of this generation may be lost.
    lost: Option<Generation>,
    election: Election,
    probed: BTreeSet<Who>,
    refused_for_generation: u32,
    last_notice: Option<Notice>,
    next_beat: Instant,
    next_ask: Instant,
    out: VecDeque<Output>,
}

impl Membership {
    /// The core of a node that has claimed its slot, on a device with this many slots.
    pub fn new(me: Applicant, slots: u16, now: Instant) -> Membership {
        Membership {
            watch: Watch::new(me.node),
            me,
            slots,
            now,
            phase: Phase::Starting,
            register: None,
            register_use: RegisterUse::Idle,
            writing: None,
            must_read: true,
            moved: None,
            lease: Lease::Held,
            shown: None,
            fences: BTreeMap::new(),
            replays: BTreeMap::new(),
            journal: None,
            names: None,
            applications: BTreeMap::new(),
            leavers: BTreeSet::new(),
            broken: BTreeSet::new(),
            lost: None,
            election: Election::default(),
            probed: BTreeSet::new(),
            refused_for_generation: 0,
            last_notice: None,
            next_beat: now,
            next_ask: now,
            out: VecDeque::new(),
        }
    }

    /// Takes in what happened; what to do about it comes from [`Membership::poll`].
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.now = now;
        if self.phase == Phase::Over {
            return;
        }
        self.watch.step(now);
        self.take(input);
        if self.phase != Phase::Over {
            self.step();
        }
    }

    /// The next thing to do. To be called until there is none, after every input.
    pub fn poll(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// What this node publishes in its slot: whom it hears, and whether it is well.
    pub fn publication(&self) -> (NodeSet, bool) {
        (self.watch.hearing(self.now), self.watch.healthy(self.now))
    }

    /// Whom this node wants to be connected with: all members, or the ADM while it is outside.
    pub fn peers(&self) -> Vec<crate::view::Member> {
        let Some((_, view)) = &self.register else { return Vec::new() };
        let wanted = |node: NodeId| match self.phase {
            Phase::Starting | Phase::Over => false,
            Phase::Outside => node == view.adm,
            Phase::Member | Phase::Leaving => true,
        };
        view.members.values().filter(|m| m.node != self.me.node && wanted(m.node)).cloned().collect()
    }

    /// Where this node stands.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The newest content of the register known to be committed, with its sequence.
    pub fn register(&self) -> Option<&(u64, Arc<View>)> {
        self.register.as_ref()
    }

    /// The state, for people.
    pub fn snapshot(&mut self) -> Snapshot {
        let view = self.register.as_ref().map(|(_, view)| Arc::clone(view));
        let standings = view.iter().flat_map(|view| view.members.values());
        let standings = standings
            .filter(|member| member.node != self.me.node)
            .map(|member| (member.node, self.watch.standing(self.now, member.node, member.incarnation)))
            .collect();
        let judgement = view.as_ref().map(|view| self.watch.judge(self.now, view)).unwrap_or_default();
        let knowing = view.as_ref().map(|view| self.eligible(view)).unwrap_or_default();
        let coordinator = view.and_then(|view| coordinator(&view, &judgement));
        Snapshot {
            phase: self.phase.clone(),
            register: self.register.clone(),
            standings,
            knowing,
            coordinator,
        }
    }

    fn who(&self) -> Who {
        (self.me.node, self.me.incarnation)
    }

    fn send(&mut self, to: NodeId, message: Message) {
        self.out.push_back(Output::Send { to, message });
    }

    /// Says something once, until something else is to be said.
    fn notice(&mut self, notice: Notice) {
        if self.last_notice.as_ref() != Some(&notice) {
            self.last_notice = Some(notice.clone());
            self.out.push_back(Output::Notice(notice));
        }
    }

    fn end(&mut self, output: Output) {
        self.phase = Phase::Over;
        self.out.push_back(output);
    }

    fn take(&mut self, input: Input) {
        let now = self.now;
        match input {
            Input::CasDone(outcome) => self.cas_done(outcome),
            Input::RegisterRead(read) => self.register_read(read),
            Input::Slots(slots) => self.watch.slots(now, slots),
            Input::RegisterMoved => self.moved = self.moved.or(Some(now)),
            Input::Connected { node, incarnation } => {
                self.watch.connected(now, node, incarnation);
                // An applicant asks at once; a member answers with what it knows.
                self.next_ask = now;
                self.next_beat = now;
                if self.broken.remove(&(node, incarnation)) {
                    self.lost = self.view().map(|view| view.generation);
                }
            }
            Input::Disconnected { node, incarnation } => {
                if self.watch.disconnected(node, incarnation) {
                    if self.view().is_some_and(|view| view.is_member(node, incarnation)) {
                        self.broken.insert((node, incarnation));
                    }
                    self.out.push_back(Output::Probe { node, incarnation });
                }
            }
            Input::Received { node, incarnation, message } => {
                if self.watch.is_connected(node, incarnation) {
                    self.watch.heard(now, node);
                    self.received((node, incarnation), message);
                }
            }
            Input::ProvenDead { node, incarnation } => {
                self.watch.proven_dead(node, incarnation);
                self.next_ask = now;
            }
            Input::FenceDone { node, incarnation, result } => {
                if let Err(why) = &result {
                    self.notice(Notice::FenceFailed { node, incarnation, why: why.clone() });
                }
                self.fences.insert((node, incarnation), Work::ended(result, now));
            }
            Input::ReplayDone { node, incarnation, result } => {
                self.replays.insert((node, incarnation), Work::ended(result, now));
                self.next_ask = now;
            }
            Input::JournalMade { index, result } => self.journal = Some((index, Work::ended(result, now))),
            Input::DevicesFound { version, result } => self.devices_found(version, result),
            Input::LeaseLapsed => {
                if self.lease == Lease::Held {
                    self.lease = Lease::Lapsed;
                    self.must_read = true;
                }
            }
            Input::Leave => match self.phase {
                Phase::Member => self.phase = Phase::Leaving,
                // Not admitted: nothing to give back but the slot.
                Phase::Starting | Phase::Outside => self.end(Output::Left),
                Phase::Leaving | Phase::Over => {}
            },
            Input::Tick => {}
        }
    }

    fn cas_done(&mut self, outcome: CasOutcome) {
        self.register_use = RegisterUse::Idle;
        let written = self.writing.take();
        match (outcome, written) {
            (CasOutcome::Committed(sequence), Some(view)) => {
                self.adopt(sequence, Arc::clone(&view));
                self.tell(sequence, &view);
            }
            (CasOutcome::Conflict(sequence, view), _) => self.adopt(sequence, view),
            (CasOutcome::Unknown | CasOutcome::Committed(_), _) => self.must_read = true,
        }
    }

    fn register_read(&mut self, read: Option<(u64, Arc<View>)>) {
        self.register_use = RegisterUse::Idle;
        let Some((sequence, view)) = read else {
            self.must_read = true;
            if self.lease == Lease::Deciding {
                self.lease = Lease::Lapsed;
            }
            return;
        };
        self.adopt(sequence, view);
        if self.lease == Lease::Deciding && self.phase != Phase::Over {
            self.lease = Lease::Held;
            self.out.push_back(Output::ReviveLease);
        }
    }

    fn view(&self) -> Option<&Arc<View>> {
        self.register.as_ref().map(|(_, view)| view)
    }

    /// Takes a committed content of the register, shows the daemon what is new in it.
    fn adopt(&mut self, sequence: u64, view: Arc<View>) {
        if self.register.as_ref().is_some_and(|(known, _)| *known >= sequence) {
            return;
        }
        self.register = Some((sequence, Arc::clone(&view)));
        self.moved = None;
        self.forget_settled(&view);
        let member = view.is_member(self.me.node, self.me.incarnation);
        let excluded = view.recovery(self.me.node, self.me.incarnation).is_some();
        let over = !member && view.was_in(self.me.node, self.me.incarnation);
        match self.phase {
            Phase::Leaving if !member && !excluded => return self.end(Output::Left),
            Phase::Member | Phase::Leaving if !member => {
                return self.end(Output::CloseGate(CloseReason::Excluded(view.generation)));
            }
            Phase::Starting | Phase::Outside if over => {
                return self.end(Output::CloseGate(CloseReason::Excluded(view.generation)));
            }
            Phase::Starting | Phase::Outside if member => self.phase = Phase::Member,
            Phase::Starting => self.phase = Phase::Outside,
            Phase::Outside | Phase::Member | Phase::Leaving | Phase::Over => {}
        }
        if member {
            self.show(view);
        }
    }

    /// Tells the daemon what changed since it was last told.
    fn show(&mut self, view: Arc<View>) {
        let before = self.shown.replace(Arc::clone(&view));
        if before.as_ref().is_none_or(|before| before.generation != view.generation) {
            self.out.push_back(Output::InstallView(Arc::clone(&view)));
            // New members learn at once how this one is.
            self.next_beat = self.now;
        }
        let Some(before) = before else { return };
        let stopped = |view: &View, who: Who| {
            let pending = view.recovery(who.0, who.1).is_some_and(|r| r.state == FenceState::FencePending);
            !pending && !view.is_member(who.0, who.1)
        };
        let open =
            |view: &View, who: Who| view.recovery(who.0, who.1).is_some() || view.is_member(who.0, who.1);
        let known = before.members.values().map(|member| (member.node, member.incarnation));
        let known: Vec<Who> =
            known.chain(before.recoveries.iter().map(|r| (r.node, r.incarnation))).collect();
        for &(node, incarnation) in &known {
            let who = (node, incarnation);
            if !stopped(&before, who) && stopped(&view, who) {
                self.out.push_back(Output::Fenced { node, incarnation });
            }
        }
        for &(node, incarnation) in known.iter().filter(|who| !open(&view, **who)) {
            self.out.push_back(Output::Recovered { node, incarnation });
        }
        for recovery in view.recoveries.iter().filter(|r| r.failed) {
            let (node, incarnation) = (recovery.node, recovery.incarnation);
            if before.recovery(node, incarnation).is_none_or(|r| !r.failed) {
                let why = match self.replays.get(&(node, incarnation)) {
                    Some(Work::Failed { why, .. }) => why.clone(),
                    _ => String::from("the replayer reported a failure"),
                };
                self.out.push_back(Output::Notice(Notice::ReplayFailed { node, incarnation, why }));
            }
        }
    }

    /// Drops notes about what the register has settled.
    fn forget_settled(&mut self, view: &View) {
        self.fences.retain(|who, _| view.recovery(who.0, who.1).is_some());
        self.replays.retain(|who, _| view.recovery(who.0, who.1).is_some());
        self.leavers.retain(|who| view.is_member(who.0, who.1));
        self.broken.retain(|who| view.is_member(who.0, who.1));
        self.lost = self.lost.filter(|generation| *generation == view.generation);
        self.applications.retain(|_, a| !view.is_member(a.applicant.node, a.applicant.incarnation));
        if self.journal.as_ref().is_some_and(|(index, _)| *index < view.journals) {
            self.journal = None;
        }
        self.election.adopted(view, self.now);
    }

    fn step(&mut self) {
        if let Some(view) = self.view().cloned() {
            let judgement = match self.phase {
                Phase::Member | Phase::Leaving => self.watch.judge(self.now, &view),
                Phase::Starting | Phase::Outside | Phase::Over => Judgement::default(),
            };
            match self.phase {
                Phase::Outside | Phase::Member | Phase::Leaving => self.find_devices(&view),
                Phase::Starting | Phase::Over => {}
            }
            match self.phase {
                // The names of the devices come first (SMS-7).
                Phase::Outside if !self.knows_names(&view) => {}
                Phase::Outside => self.outside(&view),
                Phase::Member | Phase::Leaving => self.member(&view, &judgement),
                Phase::Starting | Phase::Over => {}
            }
        }
        if self.now >= self.next_beat {
            self.next_beat = self.now + ms(HEARTBEAT_MS);
            self.heartbeat();
        }
        // Who committed it is about to tell us; a ballot now would only get in the way of the next one.
        let patience = if self.phase == Phase::Outside { ms(0) } else { ms(TELL_MS) };
        if self.moved.is_some_and(|since| self.now.since(since) >= patience) {
            self.must_read = true;
        }
        if self.must_read && self.register_use == RegisterUse::Idle && self.phase != Phase::Over {
            self.must_read = false;
            self.moved = None;
            self.register_use = RegisterUse::Reading;
            if self.lease == Lease::Lapsed {
                self.lease = Lease::Deciding;
            }
            self.out.push_back(Output::ReadRegister);
        }
    }

    fn member(&mut self, view: &Arc<View>, judgement: &Judgement) {
        self.replay_assigned(view);
        if view.adm == self.me.node {
            if !judgement.losing {
                self.administer(view, &judgement.out);
            }
        } else {
            self.report(view, judgement);
            if !judgement.losing {
                self.elect(view, judgement);
            }
        }
    }

    /// Begins the replays that the register gives to this node, one after the other: two journals may hold the same
    /// block where the device lost what was not flushed, and of two at once that both find an older version on the disk
    /// the older could be written last.
    fn replay_assigned(&mut self, view: &View) {
        if self.replays.values().any(|work| *work == Work::UnderWay) {
            return;
        }
        for recovery in &view.recoveries {
            let who = (recovery.node, recovery.incarnation);
            let mine = recovery.replayer == Some(self.who()) && recovery.state == FenceState::FencedDirty;
            let Some(journal) = recovery.journal else { continue };
            if mine && !recovery.failed && !self.replays.contains_key(&who) {
                self.replays.insert(who, Work::UnderWay);
                self.out.push_back(Output::Replay { node: who.0, incarnation: who.1, journal });
                return;
            }
        }
    }

    /// Writes the register, if nothing else is under way there.
    fn write(&mut self, view: View) {
        let Some((expected, current)) = &self.register else { return };
        if self.register_use != RegisterUse::Idle || self.must_read || **current == view {
            return;
        }
        debug_assert_eq!(view.check(), Ok(()), "{view:?}");
        let view = Arc::new(view);
        self.register_use = RegisterUse::Writing;
        self.writing = Some(Arc::clone(&view));
        self.out.push_back(Output::Cas { expected: *expected, view });
    }
}

/// The lowest slot of the view that is not judged out (SMS-5). Advice: two of them do no harm.
fn coordinator(view: &View, judgement: &Judgement) -> Option<NodeId> {
    view.members.keys().copied().find(|node| !judgement.out.contains(node))
}

impl Work {
    fn ended(result: Result<(), String>, at: Instant) -> Work {
        match result {
            Ok(()) => Work::Done,
            Err(why) => Work::Failed { why: why.chars().take(MAX_REASON).collect(), at },
        }
    }
}
