//! The network: connections between incarnations, each message in its order, delays, cuts in one direction or both,
//! resets. It stands for the interconnect (src/interconnect): what that promises, this does.
//!
//! Always: of the lock messages made under one generation a peer gets a beginning or all, over one connection; what was
//! on its way when a connection ended is lost.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use dlm::Message as LockMessage;
use membership::{Input, Message};
use parking_lot::Mutex;
use storage_control::{Clock, Generation, Incarnation, Instant, LamportClock, NodeId, Runtime, SimRuntime};
use tokio::sync::mpsc::UnboundedSender;

use crate::daemon::Event;
use crate::host::Host;

pub(crate) type Who = (NodeId, Incarnation);

/// What goes over a connection.
#[derive(Clone, Debug)]
pub(crate) enum Frame {
    Membership(Message),
    Lock(Generation, LockMessage),
}

/// A node on the net.
pub(crate) struct End {
    pub(crate) host: Host,
    pub(crate) events: UnboundedSender<Event>,
    /// Every frame carries its sender's: what a lock protects has a later version under its next holder.
    clock: Arc<LamportClock>,
    /// Whom it wants to be connected with.
    pub(crate) peers: BTreeSet<Who>,
    /// Whose keys it accepts.
    pub(crate) trusted: BTreeSet<Who>,
    /// Lock messages to members that are not connected yet.
    queues: BTreeMap<Who, VecDeque<Frame>>,
    /// The latest generation of lock messages to a member, and up to which none may go any more.
    sent: BTreeMap<Who, (Generation, Option<Generation>)>,
}

struct Link {
    ends: [Who; 2],
    number: u64,
    /// Frames on their way, by sender.
    flying: BTreeMap<Who, VecDeque<(Clock, Frame)>>,
    /// Since when a direction has been cut.
    stuck: Option<Instant>,
}

#[derive(Default)]
struct State {
    ends: BTreeMap<Who, End>,
    links: BTreeMap<(NodeId, NodeId), Link>,
    next: u64,
    cut: BTreeSet<(NodeId, NodeId)>,
    /// When the last connection of a pair ended.
    ended: BTreeMap<(NodeId, NodeId), Instant>,
}

/// The net. Cloning gives another handle.
#[derive(Clone)]
pub(crate) struct Net {
    world: SimRuntime,
    state: Arc<Mutex<State>>,
}

/// A connection over which nothing comes for so long is given up.
const USER_TIMEOUT: Duration = Duration::from_secs(5);
const DIAL_EVERY: Duration = Duration::from_millis(60);

fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}

impl Net {
    pub(crate) fn new(world: &SimRuntime) -> Net {
        Net { world: world.clone(), state: Arc::default() }
    }

    pub(crate) fn enter(
        &self,
        who: Who,
        host: Host,
        events: UnboundedSender<Event>,
        clock: Arc<LamportClock>,
    ) {
        let end = End {
            host,
            events,
            clock,
            peers: BTreeSet::new(),
            trusted: BTreeSet::new(),
            queues: BTreeMap::new(),
            sent: BTreeMap::new(),
        };
        self.state.lock().ends.insert(who, end);
    }

    /// The node is gone: its connections end.
    pub(crate) fn leave(&self, who: Who) {
        self.state.lock().ends.remove(&who);
        self.disconnect_all(who.0);
    }

    pub(crate) fn set_peers(&self, me: Who, peers: BTreeSet<Who>) {
        let mut state = self.state.lock();
        if let Some(end) = state.ends.get_mut(&me) {
            end.queues.retain(|who, _| peers.contains(who));
            end.peers = peers;
        }
    }

    pub(crate) fn set_trust(&self, me: Who, trusted: BTreeSet<Who>) {
        let closed: Vec<NodeId> = {
            let mut state = self.state.lock();
            let Some(end) = state.ends.get_mut(&me) else { return };
            end.trusted = trusted;
            let trusted = end.trusted.clone();
            let other = |link: &Link| if link.ends[0] == me { link.ends[1] } else { link.ends[0] };
            let mine = state.links.values().filter(|link| link.ends.contains(&me));
            mine.map(other).filter(|who| !trusted.contains(who)).map(|who| who.0).collect()
        };
        closed.into_iter().for_each(|node| self.disconnect(me.0, node));
    }

    pub(crate) fn send(&self, from: Who, to: NodeId, frame: Frame) {
        let mut state = self.state.lock();
        let linked = state
            .links
            .get(&pair(from.0, to))
            .map(|link| if link.ends[0] == from { link.ends[1] } else { link.ends[0] });
        let Some(end) = state.ends.get_mut(&from) else { return };
        let wanted = end.peers.iter().find(|who| who.0 == to).copied();
        let Frame::Lock(generation, _) = &frame else {
            if linked.is_some() {
                self.fly(&mut state, from, to, frame);
            }
            return;
        };
        let Some(who) = wanted.or(linked) else { return };
        let (latest, over) = end.sent.entry(who).or_insert((*generation, None));
        *latest = (*latest).max(*generation);
        if over.is_some_and(|over| *generation <= over) {
            return;
        }
        if linked == Some(who) {
            self.fly(&mut state, from, to, frame);
        } else {
            end.queues.entry(who).or_default().push_back(frame);
        }
    }

    fn fly(&self, state: &mut State, from: Who, to: NodeId, frame: Frame) {
        let key = pair(from.0, to);
        let Some(clock) = state.ends.get(&from).map(|end| end.clock.now()) else { return };
        let Some(link) = state.links.get_mut(&key) else { return };
        link.flying.entry(from).or_default().push_back((clock, frame));
        let number = link.number;
        let (net, delay) = (self.clone(), Duration::from_micros(20 + self.world.random() % 400));
        self.world.spawn(Box::pin(async move {
            net.world.sleep(delay).await;
            while net.is_cut(from.0, to) {
                net.world.sleep(Duration::from_millis(50)).await;
            }
            net.arrive(key, number, from);
        }));
    }

    fn arrive(&self, key: (NodeId, NodeId), number: u64, from: Who) {
        let mut state = self.state.lock();
        let Some(link) = state.links.get_mut(&key).filter(|link| link.number == number) else { return };
        let Some((clock, frame)) = link.flying.get_mut(&from).and_then(VecDeque::pop_front) else { return };
        let to = if link.ends[0] == from { link.ends[1] } else { link.ends[0] };
        if let Some(end) = state.ends.get(&to) {
            end.clock.receive(clock).expect("no clock comes near its end");
            let _ = end.events.send(Event::Frame(from, frame));
        }
    }

    fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.state.lock().cut.contains(&(from, to))
    }

    /// Cuts one direction.
    pub(crate) fn cut(&self, from: NodeId, to: NodeId) {
        self.state.lock().cut.insert((from, to));
    }

    pub(crate) fn heal(&self) {
        self.state.lock().cut.clear();
    }

    /// Ends the connection of two nodes, if there is one; both are told a little later.
    pub(crate) fn disconnect(&self, a: NodeId, b: NodeId) {
        let mut state = self.state.lock();
        let Some(link) = state.links.remove(&pair(a, b)) else { return };
        let now = self.world.now();
        state.ended.insert(pair(a, b), now);
        for (me, other) in [(link.ends[0], link.ends[1]), (link.ends[1], link.ends[0])] {
            let Some(end) = state.ends.get_mut(&me) else { continue };
            if let Some((latest, over)) = end.sent.get_mut(&other) {
                *over = Some(*latest);
            }
            end.queues.remove(&other);
            let (events, world) = (end.events.clone(), self.world.clone());
            let delay = Duration::from_micros(self.world.random() % 4000);
            self.world.spawn(Box::pin(async move {
                world.sleep(delay).await;
                let input = Input::Disconnected { node: other.0, incarnation: other.1 };
                let _ = events.send(Event::Input(input));
            }));
        }
    }

    pub(crate) fn disconnect_all(&self, node: NodeId) {
        let keys: Vec<_> = self.state.lock().links.keys().copied().collect();
        for (a, b) in keys.into_iter().filter(|(a, b)| *a == node || *b == node) {
            self.disconnect(a, b);
        }
    }

    /// One connection chosen by `draw`.
    pub(crate) fn some_link(&self, draw: u64) -> Option<(NodeId, NodeId)> {
        let state = self.state.lock();
        let links: Vec<_> = state.links.keys().copied().collect();
        (!links.is_empty()).then(|| links[(draw % links.len() as u64) as usize])
    }

    /// Dials and gives up, for ever.
    pub(crate) async fn live(self) {
        loop {
            self.world.sleep(DIAL_EVERY).await;
            self.dial();
            self.give_up();
        }
    }

    fn dial(&self) {
        let now = self.world.now();
        let wanted: Vec<(Who, Who)> = {
            let state = self.state.lock();
            let active = |who: &Who| {
                state.ends.get(who).is_some_and(|end| !end.host.is_dead() && !end.host.is_paused())
            };
            let fresh = |a: NodeId, b: NodeId| {
                let ended = state.ended.get(&pair(a, b));
                !state.links.contains_key(&pair(a, b))
                    && ended.is_none_or(|at| now.since(*at) > Duration::from_millis(6))
                    && !state.cut.contains(&(a, b))
                    && !state.cut.contains(&(b, a))
            };
            let wishes = state.ends.iter().flat_map(|(me, end)| end.peers.iter().map(|peer| (*me, *peer)));
            let accepted =
                |me: &Who, peer: &Who| state.ends.get(peer).is_some_and(|end| end.trusted.contains(me));
            wishes
                .filter(|(me, peer)| active(me) && active(peer) && fresh(me.0, peer.0) && accepted(me, peer))
                .collect()
        };
        for (me, peer) in wanted {
            self.connect(me, peer);
        }
    }

    fn connect(&self, me: Who, peer: Who) {
        let mut state = self.state.lock();
        if state.links.contains_key(&pair(me.0, peer.0)) {
            return;
        }
        state.next += 1;
        let number = state.next;
        let link = Link { ends: [me, peer], number, flying: BTreeMap::new(), stuck: None };
        state.links.insert(pair(me.0, peer.0), link);
        for (one, other) in [(me, peer), (peer, me)] {
            let Some(end) = state.ends.get_mut(&one) else { continue };
            let input = Input::Connected { node: other.0, incarnation: other.1 };
            let _ = end.events.send(Event::Input(input));
            let queued = end.queues.remove(&other).unwrap_or_default();
            queued.into_iter().for_each(|frame| self.fly(&mut state, one, other.0, frame));
        }
    }

    /// Connections that are cut, or whose machine stands still, end after a while.
    fn give_up(&self) {
        let now = self.world.now();
        let mut over = Vec::new();
        {
            let state = &mut *self.state.lock();
            for (&(a, b), link) in &mut state.links {
                let gone = link.ends.iter().any(|who| !state.ends.contains_key(who));
                let dead = link.ends.iter().any(|who| state.ends.get(who).is_some_and(|e| e.host.is_dead()));
                if gone || dead || state.cut.contains(&(a, b)) || state.cut.contains(&(b, a)) {
                    let since = *link.stuck.get_or_insert(now);
                    if gone || dead || now.since(since) > USER_TIMEOUT {
                        over.push((a, b));
                    }
                } else {
                    link.stuck = None;
                }
            }
        }
        over.into_iter().for_each(|(a, b)| self.disconnect(a, b));
    }
}
