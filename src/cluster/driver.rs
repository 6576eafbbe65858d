//! Drives the membership core of one node: gives it what happens, does what it says.
//!
//! Always:
//! - The core is touched by this thread alone; outputs are carried out in order, the long ones started in order.
//! - A view is given to the hooks before any frame of its generation passes for that reason, and before the slot is
//!   renewed in its knowledge.
//! - The register's newest content is acknowledged to the slot's keeper only after the core has acted upon it: an
//!   excluded node has shut its gate before it could renew again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use membership::frame::Channel;
use membership::{
    CloseReason as Reason, Input, Membership, Message, NodeSet, Notice, Output, Phase, SlotSeen, View, codec,
};
use parking_lot::{Mutex, RwLock};
use storage_control::slots::{Look, PeerSet, SlotKeeper, SlotRecord, SlotState};
use storage_control::{BoxFuture, Clock, CloseReason, Gate, GateRefused, Instant, NodeId, Register, Runtime};

use super::ClusterHooks;
use super::devices::Opened;
use super::fencing::{Fencing, unread};
use super::register::{read, write};
use super::renewal::{News, Publication};
use crate::interconnect::{Interconnect, Peer, Who};

/// The core gets a tick at least so often.
const TICK: Duration = Duration::from_millis(100);
/// A replay by a node that forms the matrix waits for its first lease; looked for so often.
const LEASE_LOOK: Duration = Duration::from_millis(5);
/// Most events that wait for the driver.
pub(super) const MAX_EVENTS: usize = 8192;

/// What reaches the driver.
pub(super) enum Event {
    Input(Input),
    Looked(Box<Look>),
    Renewal(News),
    /// Somebody showed a key that is in no slot as last read.
    UnknownKey,
    /// The end of a read of the register that began then.
    Read(Instant, Option<(u64, Arc<View>)>),
    /// Ends as a killed process does.
    #[cfg(test)]
    Stop,
}

/// How far the node has come, for those who wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// On its way in; what it waits for.
    Joining(Option<String>),
    /// A member that holds a lease, with its journal.
    Member(u16),
    /// Left in order.
    Left,
    /// Not let in, or thrown out.
    Failed(String),
}

/// What the driver shows to everybody else.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shown {
    pub(crate) register: Option<(u64, Arc<View>)>,
    pub(crate) phase: Option<Phase>,
    pub(crate) standings: Vec<(NodeId, membership::Standing)>,
    pub(crate) coordinator: Option<NodeId>,
    /// Members that know the current naming database.
    pub(crate) knowing: Vec<NodeId>,
    /// All slots that were ever claimed, as last read.
    pub(crate) slots: BTreeMap<NodeId, SlotRecord>,
    /// The latest notices, the newest last.
    pub(crate) notices: Vec<String>,
    /// The lease has lapsed and may come back.
    pub(crate) lapsed: bool,
}

/// So many notices are kept.
const KEPT_NOTICES: usize = 32;

pub(super) struct Driver {
    pub(super) me: Who,
    pub(super) core: Membership,
    pub(super) keeper: SlotKeeper,
    pub(super) gate: Gate,
    pub(super) register: Register,
    pub(super) opened: Opened,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) hooks: Arc<dyn ClusterHooks>,
    pub(super) net: Arc<Interconnect>,
    pub(super) fencing: Arc<Fencing>,
    pub(super) installed: Arc<RwLock<Option<Arc<View>>>>,
    pub(super) publication: Arc<Mutex<Publication>>,
    pub(super) shown: Arc<Mutex<Shown>>,
    pub(super) progress: tokio::sync::watch::Sender<Progress>,
    pub(super) events: Sender<Event>,
    pub(super) poke: Sender<()>,
    pub(super) state: State,
}

#[derive(Default)]
pub(super) struct State {
    acknowledged: u64,
    behind: bool,
    admitted: bool,
    read_began: Instant,
    /// Slots as last read.
    slots: BTreeMap<NodeId, SlotRecord>,
    /// The claims of incarnations that may have to be fenced: a slot may have a new holder by then.
    claims: BTreeMap<Who, SlotRecord>,
    trust_made_of: Option<(u64, Vec<Who>)>,
    over: bool,
}

impl Driver {
    /// Runs until the node is no member any more, or is stopped.
    pub(super) fn run(mut self, events: &Receiver<Event>) {
        let mut next_tick = self.runtime.now();
        while !self.state.over {
            let wait = next_tick.since(self.runtime.now());
            match events.recv_timeout(wait) {
                #[cfg(test)]
                Ok(Event::Stop) => return,
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(event) => self.happened(event),
                Err(RecvTimeoutError::Timeout) => {
                    next_tick = self.runtime.now() + TICK;
                    self.give(Input::Tick);
                    self.show();
                }
            }
        }
    }

    fn happened(&mut self, event: Event) {
        match event {
            Event::Input(input) => self.give(input),
            Event::Looked(look) => self.looked(&look),
            Event::Read(began, content) => {
                self.state.read_began = began;
                self.give(Input::RegisterRead(content));
            }
            Event::Renewal(news) => self.renewed(news),
            // A renewal looks at all slots as well.
            Event::UnknownKey => drop(self.poke.try_send(())),
            #[cfg(test)]
            Event::Stop => self.state.over = true,
        }
    }

    fn give(&mut self, input: Input) {
        self.core.handle(self.runtime.now(), input);
        while let Some(output) = self.core.poll() {
            self.carry_out(output);
        }
        if !self.state.over {
            self.follow_up();
        }
    }

    /// Everything that follows from the core's state rather than from an output.
    fn follow_up(&mut self) {
        let (heard, healthy) = self.core.publication();
        *self.publication.lock() = Publication { heard: peer_set(heard), healthy };
        let Some((sequence, view)) = self.core.register().cloned() else { return };
        let forming =
            view.members.is_empty() && view.candidate.is_some_and(|c| (c.node, c.incarnation) == self.me);
        if !self.state.admitted && (forming || view.is_member(self.me.0, self.me.1)) {
            // A former replays journals, which takes a lease; whoever comes after it fences it like a member.
            self.state.admitted = true;
            self.keeper.admit();
            let _ = self.poke.try_send(());
        }
        if sequence > self.state.acknowledged {
            self.state.acknowledged = sequence;
            self.keeper.acknowledge(sequence);
            if std::mem::take(&mut self.state.behind) {
                let _ = self.poke.try_send(());
            }
        }
        self.meet(&view);
        self.trust(sequence, &view);
    }

    /// Has the interconnect connect with whom the core wants to talk.
    fn meet(&self, view: &View) {
        let outside = !view.is_member(self.me.0, self.me.1);
        let peers = self.core.peers().into_iter().map(|member| Peer {
            who: (member.node, member.incarnation),
            addr: member.addr,
            fingerprint: member.fingerprint,
            dial: outside || self.me.0 > member.node,
        });
        self.net.set_peers(peers.collect());
    }

    /// Accepts the keys of the view and of claimed slots; where a slot has a later incarnation, that one's.
    fn trust(&mut self, sequence: u64, view: &View) {
        let live = |record: &&SlotRecord| record.state != SlotState::Stopped && record.node != self.me.0;
        let claimed: Vec<Who> =
            self.state.slots.values().filter(live).map(|r| (r.node, r.incarnation)).collect();
        let made_of = Some((sequence, claimed));
        if self.state.trust_made_of == made_of {
            return;
        }
        let members = view.members.values().map(|m| (m.fingerprint, (m.node, m.incarnation)));
        let mut accepted: BTreeMap<_, Who> = members.filter(|(_, who)| who.0 != self.me.0).collect();
        for record in self.state.slots.values().filter(live) {
            let who = (record.node, record.incarnation);
            let newer = |known: &Who| known.0 != who.0 || known.1 < who.1;
            if record.fingerprint != [0; 32] && accepted.get(&record.fingerprint).is_none_or(newer) {
                accepted.insert(record.fingerprint, who);
            }
        }
        self.net.set_trust(accepted);
        self.state.trust_made_of = made_of;
    }

    fn looked(&mut self, look: &Look) {
        self.state.slots = look.records().map(|record| (record.node, record.clone())).collect();
        for record in look.records() {
            self.state.claims.insert((record.node, record.incarnation), record.clone());
        }
        if let Some((_, view)) = self.core.register() {
            let needed = |who: &Who| {
                view.is_member(who.0, who.1)
                    || view.recovery(who.0, who.1).is_some()
                    || view.candidate.is_some_and(|c| (c.node, c.incarnation) == *who)
                    || self.state.slots.get(&who.0).is_some_and(|record| record.incarnation == who.1)
            };
            self.state.claims.retain(|who, _| needed(who));
        }
        let seen = self.state.slots.values().filter(|record| record.node != self.me.0);
        let seen: Vec<SlotSeen> = seen.map(|record| self.as_seen(record)).collect();
        let moved = self.core.register().is_some_and(|(sequence, _)| look.head.sequence > *sequence);
        self.give(Input::Slots(seen));
        if moved && !self.state.over {
            self.give(Input::RegisterMoved);
        }
    }

    fn as_seen(&self, record: &SlotRecord) -> SlotSeen {
        SlotSeen {
            node: record.node,
            incarnation: record.incarnation,
            sequence: record.sequence,
            heard: node_set(record.heard),
            healthy: record.health == 0,
            stopped: record.state == SlotState::Stopped,
            unfenceable: self.fencing.unfenceable(record),
            name: record.node_name.clone(),
            addr: record.address,
            fingerprint: record.fingerprint,
        }
    }

    fn renewed(&mut self, news: News) {
        match news {
            News::Renewed(until) => {
                self.lapsed(false);
                let view = self.core.register().map(|(_, view)| Arc::clone(view));
                let mine = view
                    .as_ref()
                    .and_then(|view| view.member(self.me.0))
                    .filter(|m| m.incarnation == self.me.1);
                if let (Some(_), Some(member), Phase::Member) = (until, mine, self.core.phase()) {
                    self.report(Progress::Member(member.journal));
                }
            }
            News::Behind => {
                self.state.behind = true;
                self.give(Input::RegisterMoved);
            }
            News::Expired => {
                self.lapsed(true);
                self.give(Input::LeaseLapsed);
            }
            News::Failed(why) => self.notice(format!("the slot could not be renewed: {why}")),
            News::Closed(reason) => self.finish(Progress::Failed(reason.to_string())),
        }
    }

    fn lapsed(&mut self, lapsed: bool) {
        let was = std::mem::replace(&mut self.shown.lock().lapsed, lapsed);
        if was != lapsed {
            tracing::warn!(lapsed, "lease");
            self.hooks.suspended(lapsed);
        }
    }

    fn report(&mut self, progress: Progress) {
        self.progress.send_if_modified(|now| {
            let changed = *now != progress;
            *now = progress;
            changed
        });
    }

    fn notice(&mut self, text: String) {
        tracing::warn!("{text}");
        let mut shown = self.shown.lock();
        if shown.notices.last() != Some(&text) {
            shown.notices.push(text);
        }
        let over = shown.notices.len().saturating_sub(KEPT_NOTICES);
        shown.notices.drain(..over);
    }

    fn show(&mut self) {
        let snapshot = self.core.snapshot();
        let mut shown = self.shown.lock();
        shown.register = snapshot.register;
        shown.phase = Some(snapshot.phase);
        shown.standings = snapshot.standings;
        shown.coordinator = snapshot.coordinator;
        shown.knowing = snapshot.knowing;
        shown.slots.clone_from(&self.state.slots);
    }

    /// Starts something that ends with an event.
    fn spawn(&self, task: impl Future<Output = Event> + Send + 'static) {
        let events = self.events.clone();
        self.runtime.spawn(Box::pin(async move {
            // Without a driver nobody wants the answer.
            let _ = events.send(task.await);
        }));
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::ReadRegister => self.spawn(read(self.register.clone(), Arc::clone(&self.runtime))),
            Output::Cas { expected, view } => self.spawn(write(self.register.clone(), expected, view)),
            Output::InstallView(view) => {
                // The lock manager reports to new members at once: there must be queues for them.
                self.meet(&view);
                self.hooks.install_view(Arc::clone(&view));
                *self.installed.write() = Some(view);
                self.show();
            }
            Output::Fenced { node, incarnation } => self.hooks.fenced(node, incarnation),
            Output::Recovered { node, incarnation } => self.hooks.recovered(node, incarnation),
            Output::Send { to, message } => self.send(to, &message),
            Output::Probe { node, incarnation } => self.probe((node, incarnation)),
            Output::Fence { node, incarnation } => self.fence((node, incarnation)),
            Output::Replay { node, incarnation, journal } => {
                let replay = self.replay(journal);
                self.spawn(async move {
                    Event::Input(Input::ReplayDone { node, incarnation, result: replay.await })
                });
            }
            Output::MakeJournal { index } => {
                let made = self.hooks.make_journal(index);
                self.spawn(async move { Event::Input(Input::JournalMade { index, result: made.await }) });
            }
            Output::FindDevices(view) => {
                let (version, names) = (view.names.version, view.names.clone());
                let found = self.opened.clone().find(names);
                self.spawn(async move { Event::Input(Input::DevicesFound { version, result: found.await }) });
            }
            Output::ReviveLease => {
                // If it is too late already, the next renewal says so again.
                let revived = self.keeper.revive(self.state.read_began);
                if revived {
                    self.lapsed(false);
                }
                let _ = self.poke.try_send(());
            }
            Output::CloseGate(reason) => {
                let why = match &reason {
                    Reason::Excluded(_) => CloseReason::Excluded,
                    Reason::Unrecoverable { .. } | Reason::Devices(_) | Reason::NoJournal => {
                        CloseReason::Withdrawn(reason.to_string())
                    }
                };
                self.gate.close(why);
                self.finish(Progress::Failed(reason.to_string()));
            }
            Output::Left => self.finish(Progress::Left),
            Output::Refused(refusal) => self.finish(Progress::Failed(refusal.to_string())),
            Output::Notice(notice) => self.say(&notice),
        }
    }

    /// The node's part is over: nothing more is sent or received, whoever waits is told.
    fn finish(&mut self, end: Progress) {
        self.state.over = true;
        self.show();
        if let Progress::Failed(why) = &end {
            self.gate.close(CloseReason::Withdrawn(why.clone()));
            self.net.stop();
            self.hooks.closed(why);
            self.report(end.clone());
        }
        let (keeper, net, progress) = (self.keeper.clone(), Arc::clone(&self.net), self.progress.clone());
        self.runtime.spawn(Box::pin(async move {
            // Closes the gate, waits for what is under way, says in the slot that this node has stopped.
            if let Err(error) = keeper.release().await {
                tracing::warn!(%error, "the slot could not be given back: others wait for its lease");
            }
            net.stop();
            // Who left in order may end its process now; a failure stays the last word.
            progress.send_if_modified(|now| {
                let left = end == Progress::Left;
                if left {
                    *now = end;
                }
                left
            });
        }));
    }

    fn send(&self, to: NodeId, message: &Message) {
        let generation = self.core.register().map(|(_, view)| view.generation).unwrap_or_default();
        self.net.send(to, Channel::Membership, generation, &codec::encode_message(message));
    }

    fn record_of(&self, who: Who) -> Option<SlotRecord> {
        self.state.claims.get(&who).cloned()
    }

    fn probe(&self, (node, incarnation): Who) {
        let Some(record) = self.record_of((node, incarnation)) else { return };
        let (fencing, events) = (Arc::clone(&self.fencing), self.events.clone());
        self.runtime.spawn(Box::pin(async move {
            if fencing.probe(&record).await {
                let _ = events.send(Event::Input(Input::ProvenDead { node, incarnation }));
            }
        }));
    }

    fn fence(&self, (node, incarnation): Who) {
        let record = self.record_of((node, incarnation)).unwrap_or_else(|| unread((node, incarnation)));
        let fencing = Arc::clone(&self.fencing);
        self.spawn(async move {
            let result = fencing.fence(&record).await;
            Event::Input(Input::FenceDone { node, incarnation, result })
        });
    }

    /// The replay, from when the gate lets writes pass.
    fn replay(&self, journal: u16) -> BoxFuture<Result<(), String>> {
        let (gate, runtime, hooks) = (self.gate.clone(), Arc::clone(&self.runtime), Arc::clone(&self.hooks));
        Box::pin(async move {
            while let Err(refused) = gate.check() {
                match refused {
                    GateRefused::NoLease => runtime.sleep(LEASE_LOOK).await,
                    closed @ GateRefused::Closed(_) => return Err(closed.to_string()),
                }
            }
            hooks.replay(journal).await
        })
    }

    fn say(&mut self, notice: &Notice) {
        let text = match notice {
            Notice::WaitingForFormer(node) => {
                format!("waiting for node {node}, which is recovering the filesystem")
            }
            Notice::WaitingForAdm(node) => format!("waiting for a connection to node {node}, the ADM"),
            Notice::NotYet(refusal) => format!("not admitted yet: {refusal}"),
            Notice::DevicesMissing(why) => format!("this node cannot become ADM: {why}"),
            Notice::NoCandidate => {
                "the ADM is lost, and no member that is heard here knows all devices of the matrix".to_owned()
            }
            Notice::Excluding(nodes) => {
                let nodes: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
                format!("excluding node {}", nodes.join(", "))
            }
            Notice::FenceFailed { node, why, .. } => format!("node {node} is not fenced yet: {why}"),
            Notice::ReplayFailed { node, why, .. } => format!(
                "the journal of node {node} could not be replayed, its locks stay locked: {why}; run matrix fsck"
            ),
        };
        let joining = matches!(*self.progress.borrow(), Progress::Joining(_));
        if joining {
            self.report(Progress::Joining(Some(text.clone())));
        }
        match notice {
            // Over when the mount is; who mounts is told by the progress.
            Notice::WaitingForFormer(_) | Notice::WaitingForAdm(_) | Notice::NotYet(_) if joining => {}
            _ => self.notice(text),
        }
    }
}

fn peer_set(nodes: NodeSet) -> PeerSet {
    nodes.iter().collect()
}

fn node_set(peers: PeerSet) -> NodeSet {
    peers.iter().collect()
}

/// The smallest journal tail of all who may have something in a journal; zero while one is unknown.
pub(super) fn least_tail(shown: &Shown) -> Clock {
    let Some((_, view)) = &shown.register else { return Clock(0) };
    let writers = view.members.values().map(|member| (member.node, member.incarnation));
    let open = view.recoveries.iter().filter(|r| r.journal.is_some()).map(|r| (r.node, r.incarnation));
    let tails = writers.chain(open).map(|(node, incarnation)| {
        let record = shown.slots.get(&node).filter(|record| record.incarnation == incarnation);
        record.map_or(Clock(0), |record| record.journal_tail)
    });
    tails.min().unwrap_or_default()
}
