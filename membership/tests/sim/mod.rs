//! A whole matrix of membership cores under one seed: a simulated register, slots, network, leases and fences.
//!
//! What is checked is written in `World::check_*`; each says which of the safety sentences it stands for.

mod devices;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use membership::times::{HEARTBEAT_MS, LEASE_MS, RENEW_MS};
use membership::{
    Applicant, CasOutcome, FenceState, Input, Membership, Message, Output, Phase, SlotSeen, View,
};
use storage_control::{Generation, Incarnation, Instant, NodeId};

type Who = (NodeId, Incarnation);

/// What may happen in a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) nodes: u16,
    /// All on one host: a dead process is proven dead, a paused one is killed by the fence.
    pub(crate) proofs: bool,
    /// Fences fail now and then, and take long.
    pub(crate) slow_fences: bool,
    /// How long faults go on, in seconds.
    pub(crate) trouble_secs: u64,
}

pub(crate) struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Debug)]
enum Event {
    Tick(Who),
    Renew(Who),
    ReadSlots(Who),
    Peek(Who),
    Dial(Who),
    Give(Who, Input),
    Devices(Who, Generation, Result<(), String>),
    CasLands {
        by: Who,
        expected: u64,
        view: Arc<View>,
        lost: bool,
    },
    ReadLands(Who),
    Deliver {
        from: Who,
        to: Who,
        link: u64,
        message: Message,
    },
    FencePoll {
        by: Who,
        victim: Who,
        seen: Option<(Incarnation, u64)>,
        since: u64,
    },
    ReplayEnds {
        by: Who,
        victim: Who,
    },
    LinkTimeout {
        a: Who,
        b: Who,
        link: u64,
    },
    Resume(NodeId),
    Restart(NodeId),
    Trouble,
    /// A connection between two members that are not the ADM breaks, and nothing else happens.
    Break,
}

struct Node {
    who: Who,
    core: Membership,
    alive: bool,
    paused: bool,
    closed: bool,
    installed: Option<Arc<View>>,
    lease_until: u64,
    lapsed: bool,
    replaying: BTreeSet<Who>,
    /// What came while it was stopped, in order.
    waiting: Vec<Input>,
}

pub(crate) struct World {
    scenario: Scenario,
    random: Random,
    now: u64,
    order: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Event>,
    nodes: BTreeMap<NodeId, Node>,
    slots: BTreeMap<NodeId, (SlotSeen, u64)>,
    register: (u64, Arc<View>),
    links: BTreeMap<(NodeId, NodeId), u64>,
    next_link: u64,
    /// When the last connection of a pair ended: its end is told before the next begins.
    ended: BTreeMap<(NodeId, NodeId), u64>,
    blocked: BTreeSet<(NodeId, NodeId)>,
    disk_blocked: BTreeSet<NodeId>,
    generations: BTreeMap<u64, Arc<View>>,
    fenced: BTreeSet<Who>,
    recovered: BTreeSet<Who>,
    /// Who has asked to leave.
    leaving: BTreeSet<Who>,
    left: BTreeSet<Who>,
    /// The newest version of the naming database whose devices each incarnation has found.
    knows: BTreeMap<Who, Generation>,
    /// The latest generation of whose messages some may have been lost.
    lost_in: u64,
    trouble_until: u64,
    trace: Vec<String>,
}

const MS: u64 = 1_000_000;

impl World {
    pub(crate) fn new(scenario: Scenario) -> World {
        let mut world = World {
            scenario,
            random: Random(scenario.seed),
            now: 1_000 * MS,
            order: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            nodes: BTreeMap::new(),
            slots: BTreeMap::new(),
            register: (1, Arc::new(View::empty(1, devices::names()))),
            links: BTreeMap::new(),
            next_link: 0,
            ended: BTreeMap::new(),
            blocked: BTreeSet::new(),
            disk_blocked: BTreeSet::new(),
            generations: BTreeMap::new(),
            fenced: BTreeSet::new(),
            recovered: BTreeSet::new(),
            leaving: BTreeSet::new(),
            left: BTreeSet::new(),
            knows: BTreeMap::new(),
            lost_in: 0,
            trouble_until: 0,
            trace: Vec::new(),
        };
        world.trouble_until = world.now + scenario.trouble_secs * 1_000 * MS;
        for n in 0..scenario.nodes {
            let delay = world.random.below(3_000) * MS;
            world.after(delay, Event::Restart(NodeId(n)));
        }
        world.after(8_000 * MS, Event::Trouble);
        world.after((scenario.trouble_secs + 60) * 1_000 * MS, Event::Break);
        world
    }

    fn after(&mut self, delay: u64, event: Event) {
        self.order += 1;
        self.queue.push(Reverse((self.now + delay, self.order)));
        self.events.insert(self.order, event);
    }

    fn note(&mut self, text: String) {
        self.trace.push(format!("{:>9.3} {text}", self.now as f64 / 1e9));
    }

    fn fail(&self, why: &str) -> ! {
        let from = self.trace.len().saturating_sub(120);
        panic!("{why}\n{}\nreplay: {:?}", self.trace[from..].join("\n"), self.scenario);
    }

    /// Runs until the trouble is over and another while, then asks for progress.
    pub(crate) fn run(mut self) {
        let end = self.trouble_until + 90_000 * MS;
        while let Some(Reverse((at, order))) = self.queue.pop() {
            if at > end {
                break;
            }
            self.now = at;
            let event = self.events.remove(&order).expect("an event per queue entry");
            self.happen(event);
        }
        self.check_progress();
    }

    fn running(&mut self, who: Who) -> Option<&mut Node> {
        self.nodes.get_mut(&who.0).filter(|node| node.who == who && node.alive)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick(who) => {
                if self.running(who).is_none() {
                    return;
                }
                self.after(100 * MS, Event::Tick(who));
                self.give(who, Input::Tick);
                self.check_write(who);
            }
            Event::Renew(who) => self.renew(who),
            Event::ReadSlots(who) => {
                if self.running(who).is_none() {
                    return;
                }
                self.after(HEARTBEAT_MS * MS, Event::ReadSlots(who));
                if !self.disk_blocked.contains(&who.0) {
                    let others = self.slots.values().map(|(slot, _)| slot.clone());
                    let slots = others.filter(|slot| slot.node != who.0).collect();
                    self.give(who, Input::Slots(slots));
                }
            }
            Event::Peek(who) => {
                let sequence = self.register.0;
                let blocked = self.disk_blocked.contains(&who.0);
                let Some(node) = self.running(who) else { return };
                let known = node.core.register().map_or(0, |(sequence, _)| *sequence);
                self.after(HEARTBEAT_MS * MS, Event::Peek(who));
                if !blocked && known != sequence {
                    self.give(who, Input::RegisterMoved);
                }
            }
            Event::Dial(who) => self.dial(who),
            Event::Give(who, input) => self.give(who, input),
            Event::Devices(who, version, result) => self.devices_found(who, version, result),
            Event::CasLands { by, expected, view, lost } => self.cas_lands(by, expected, view, lost),
            Event::ReadLands(who) => {
                if self.disk_blocked.contains(&who.0) {
                    self.after(500 * MS, Event::Give(who, Input::RegisterRead(None)));
                } else {
                    let read = Some(self.register.clone());
                    let delay = self.random.below(10) * MS;
                    self.after(delay, Event::Give(who, Input::RegisterRead(read)));
                }
            }
            Event::Deliver { from, to, link, message } => {
                let key = pair(from.0, to.0);
                if self.links.get(&key) != Some(&link) {
                    return;
                }
                if self.blocked.contains(&(from.0, to.0)) {
                    return; // lost: the link will time out
                }
                self.give(to, Input::Received { node: from.0, incarnation: from.1, message });
            }
            Event::FencePoll { by, victim, seen, since } => self.fence_poll(by, victim, seen, since),
            Event::ReplayEnds { by, victim } => {
                let now = self.now;
                let Some(node) = self.running(by) else { return };
                if node.paused || now >= node.lease_until {
                    // Its writes wait for the lease; a node whose gate is closed never finishes.
                    if !node.closed {
                        self.after(200 * MS, Event::ReplayEnds { by, victim });
                    }
                    return;
                }
                node.replaying.remove(&victim);
                let (node, incarnation) = victim;
                self.give(by, Input::ReplayDone { node, incarnation, result: Ok(()) });
            }
            Event::LinkTimeout { a, b, link } => {
                let cut = self.blocked.contains(&(a.0, b.0)) || self.blocked.contains(&(b.0, a.0));
                if cut && self.links.get(&pair(a.0, b.0)) == Some(&link) {
                    self.disconnect(a.0, b.0);
                }
            }
            Event::Resume(node) => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.paused = false;
                    let who = node.who;
                    self.note(format!("{who:?} goes on"));
                    // What it was about to write when it was stopped comes first: the gate must hold it.
                    self.check_write(who);
                    let waiting = self.nodes.get_mut(&who.0).map(|node| std::mem::take(&mut node.waiting));
                    waiting.into_iter().flatten().for_each(|input| self.give(who, input));
                }
            }
            Event::Restart(node) => self.restart(node),
            Event::Trouble => self.trouble(),
            Event::Break => self.break_link(),
        }
    }

    fn restart(&mut self, id: NodeId) {
        let incarnation = self.nodes.get(&id).map_or(1, |node| node.who.1.0 + 1);
        if self.nodes.get(&id).is_some_and(|node| node.alive) {
            return;
        }
        // The claim: by proof, or by watching the slot for the full wait.
        if !self.scenario.proofs
            && let Some((_, changed)) = self.slots.get(&id).filter(|(slot, _)| !slot.stopped)
        {
            let free = changed + (LEASE_MS + LEASE_MS / 50) * MS;
            if self.now < free {
                let delay = free - self.now;
                return self.after(delay, Event::Restart(id));
            }
        }
        let who = (id, Incarnation(incarnation));
        let me = Applicant {
            node: id,
            incarnation: who.1,
            name: format!("n{}", id.0),
            addr: format!("10.0.0.{}:7000", id.0 + 1).parse().expect("an address"),
            fingerprint: [id.0 as u8; 32],
        };
        let slot = SlotSeen {
            node: id,
            incarnation: who.1,
            sequence: 1,
            heard: Default::default(),
            healthy: true,
            stopped: false,
            unfenceable: None,
            name: me.name.clone(),
            addr: me.addr,
            fingerprint: me.fingerprint,
        };
        self.slots.insert(id, (slot, self.now));
        let node = Node {
            who,
            core: Membership::new(me, 64, Instant(self.now)),
            alive: true,
            paused: false,
            closed: false,
            installed: None,
            lease_until: self.now + LEASE_MS * MS,
            lapsed: false,
            replaying: BTreeSet::new(),
            waiting: Vec::new(),
        };
        self.nodes.insert(id, node);
        self.note(format!("{who:?} starts"));
        self.after(0, Event::Tick(who));
        for event in [Event::Renew(who), Event::ReadSlots(who), Event::Peek(who), Event::Dial(who)] {
            let delay = self.random.below(100) * MS;
            self.after(delay, event);
        }
    }

    fn renew(&mut self, who: Who) {
        let now = self.now;
        let blocked = self.disk_blocked.contains(&who.0);
        let Some(node) = self.running(who) else { return };
        if node.closed {
            return;
        }
        let paused = node.paused;
        let (heard, healthy) = node.core.publication();
        let mut lapsed = false;
        if !paused && !blocked {
            if now < node.lease_until && !node.lapsed {
                node.lease_until = now + LEASE_MS * MS;
            } else {
                node.lapsed = true;
                lapsed = true;
            }
            let slot = self.slots.get_mut(&who.0).expect("a running node has a slot");
            assert_eq!(slot.0.incarnation, who.1, "nobody else claims the slot of a running node");
            slot.0.sequence += 1;
            slot.0.heard = heard;
            slot.0.healthy = healthy;
            slot.1 = now;
        }
        self.after(RENEW_MS * MS, Event::Renew(who));
        if lapsed {
            self.give(who, Input::LeaseLapsed);
        }
    }

    fn dial(&mut self, who: Who) {
        let Some(node) = self.running(who) else { return };
        let (peers, paused) = (node.core.peers(), node.paused);
        self.after(300 * MS, Event::Dial(who));
        if paused {
            return;
        }
        for peer in peers {
            let to = (peer.node, peer.incarnation);
            let cut = self.blocked.contains(&(who.0, to.0)) || self.blocked.contains(&(to.0, who.0));
            let known = self.slots.get(&who.0).is_some_and(|(slot, _)| slot.incarnation == who.1);
            let there =
                self.nodes.get(&to.0).is_some_and(|n| n.who == to && n.alive && !n.paused && !n.closed);
            let just_ended = self.ended.get(&pair(who.0, to.0)).is_some_and(|at| self.now < at + 5 * MS);
            if just_ended || cut || !known || !there || self.links.contains_key(&pair(who.0, to.0)) {
                continue;
            }
            self.next_link += 1;
            self.links.insert(pair(who.0, to.0), self.next_link);
            self.give(who, Input::Connected { node: to.0, incarnation: to.1 });
            self.give(to, Input::Connected { node: who.0, incarnation: who.1 });
        }
    }

    fn disconnect(&mut self, a: NodeId, b: NodeId) {
        if self.links.remove(&pair(a, b)).is_none() {
            return;
        }
        self.ended.insert(pair(a, b), self.now);
        for (one, other) in [(a, b), (b, a)] {
            let (Some(one), Some(other)) = (self.nodes.get(&one), self.nodes.get(&other)) else { continue };
            let (who, (node, incarnation)) = (one.who, other.who);
            if let Some(view) = one.installed.as_ref().filter(|view| view.is_member(node, incarnation)) {
                self.lost_in = self.lost_in.max(view.generation.0);
            }
            let delay = self.random.below(5) * MS;
            self.after(delay, Event::Give(who, Input::Disconnected { node, incarnation }));
        }
    }

    /// Breaks one connection between members that are not the ADM, if there is one: it can be made anew at once.
    fn break_link(&mut self) {
        let view = Arc::clone(&self.register.1);
        let plain = |node: &NodeId| *node != view.adm && view.member(*node).is_some();
        let links: Vec<(NodeId, NodeId)> =
            self.links.keys().copied().filter(|(a, b)| plain(a) && plain(b)).collect();
        if !links.is_empty() {
            let (a, b) = links[self.random.below(links.len() as u64) as usize];
            self.note(format!("the connection between {a} and {b} breaks"));
            self.disconnect(a, b);
        }
    }

    fn cas_lands(&mut self, by: Who, expected: u64, view: Arc<View>, lost: bool) {
        let outcome = if self.disk_blocked.contains(&by.0) {
            CasOutcome::Unknown
        } else if self.register.0 == expected {
            self.commit(by, view);
            CasOutcome::Committed(self.register.0)
        } else {
            CasOutcome::Conflict(self.register.0, Arc::clone(&self.register.1))
        };
        let outcome = if lost { CasOutcome::Unknown } else { outcome };
        let delay = self.random.below(10) * MS;
        self.after(delay, Event::Give(by, Input::CasDone(outcome)));
    }

    /// Every content the register ever has passes here.
    fn commit(&mut self, by: Who, view: Arc<View>) {
        if let Err(why) = view.check() {
            self.fail(&format!("{by:?} writes no view: {why}"));
        }
        let body = membership::codec::encode_view(&view);
        assert_eq!(membership::codec::decode_view(&body).expect("what is written can be read"), *view);
        let before = Arc::clone(&self.register.1);
        self.register = (self.register.0 + 1, Arc::clone(&view));
        self.note(format!(
            "{by:?} commits {}: generation {} adm {} candidate {:?} members {:?} recoveries {:?}",
            self.register.0,
            view.generation,
            view.adm,
            view.candidate.map(|c| c.node.0),
            view.members.values().map(|m| (m.node.0, m.incarnation.0)).collect::<Vec<_>>(),
            view.recoveries
                .iter()
                .map(|r| (r.node.0, r.incarnation.0, r.state, r.replayer.map(|w| w.0.0)))
                .collect::<Vec<_>>()
        ));
        if view.generation < before.generation || view.burnt < before.burnt {
            self.fail("generations go back");
        }
        // One ADM, one set of members and one shard map per generation.
        if let Some(same) = self.generations.get(&view.generation.0) {
            let alike = (same.adm, &same.members, &same.shards) == (view.adm, &view.members, &view.shards);
            if !alike {
                self.fail("a generation with two meanings");
            }
        }
        self.check_names(&before, &view);
        self.generations.insert(view.generation.0, Arc::clone(&view));
        for member in before.members.values() {
            let who = (member.node, member.incarnation);
            if !view.is_member(who.0, who.1) && view.recovery(who.0, who.1).is_none() {
                // It may be dead by now: it had given up everything before it asked.
                if !self.leaving.contains(&who) {
                    self.fail(&format!("{who:?} vanished without leaving or being excluded"));
                }
                self.left.insert(who);
            }
        }
        for recovery in &view.recoveries {
            let who = (recovery.node, recovery.incarnation);
            if recovery.state == FenceState::FencedDirty {
                self.fenced.insert(who);
            }
        }
        for recovery in &before.recoveries {
            let who = (recovery.node, recovery.incarnation);
            if view.recovery(who.0, who.1).is_none() {
                self.fenced.insert(who);
                self.recovered.insert(who);
            }
        }
        for who in self.fenced.clone() {
            if self.can_write(who) {
                self.fail(&format!("{who:?} is called fenced and can still write"));
            }
        }
    }

    fn can_write(&self, who: Who) -> bool {
        self.nodes.get(&who.0).is_some_and(|node| {
            node.who == who && node.alive && !node.closed && !node.lapsed && self.now < node.lease_until
        })
    }

    /// A member writes whenever its gate lets it.
    fn check_write(&mut self, who: Who) {
        let Some(node) = self.nodes.get(&who.0) else { return };
        let Some(mine) = node.installed.clone() else { return };
        if node.paused || !self.can_write(who) || node.who != who || *node.core.phase() == Phase::Leaving {
            return;
        }
        if self.fenced.contains(&who) || self.recovered.contains(&who) || self.left.contains(&who) {
            self.fail(&format!("{who:?} writes after its fence, recovery or leave"));
        }
        for other in self.nodes.values().filter(|other| other.who != who) {
            let Some(theirs) = &other.installed else { continue };
            if !self.can_write(other.who) {
                continue;
            }
            let apart = mine.members.values().all(|m| !theirs.is_member(m.node, m.incarnation));
            let known =
                theirs.recovery(who.0, who.1).is_some() || mine.recovery(other.who.0, other.who.1).is_some();
            if apart && !known {
                self.fail(&format!("{who:?} and {:?} write in disjoint views", other.who));
            }
        }
    }

    fn fence_poll(&mut self, by: Who, victim: Who, seen: Option<(Incarnation, u64)>, since: u64) {
        let Some(fencer) = self.running(by) else { return };
        if fencer.paused {
            return self.after(100 * MS, Event::FencePoll { by, victim, seen: None, since });
        }
        let gone = self.nodes.get(&victim.0).is_none_or(|node| node.who != victim || !node.alive);
        let now_seen = self.slots.get(&victim.0).map(|(slot, _)| (slot.incarnation, slot.sequence));
        let replaced = now_seen.is_some_and(|(incarnation, _)| incarnation > victim.1);
        if self.scenario.proofs && !gone {
            self.kill(victim.0);
            self.after(2_000 * MS, Event::Restart(victim.0));
        }
        let stopped =
            self.slots.get(&victim.0).is_some_and(|(slot, _)| slot.stopped && slot.incarnation == victim.1);
        let unchanged = seen == now_seen && self.now - since >= (LEASE_MS + LEASE_MS / 50) * MS;
        if replaced || stopped || self.scenario.proofs || unchanged {
            let (node, incarnation) = victim;
            self.note(format!("{by:?} confirms the fence of {victim:?}"));
            return self.give(by, Input::FenceDone { node, incarnation, result: Ok(()) });
        }
        let since = if seen == now_seen { since } else { self.now };
        self.after(100 * MS, Event::FencePoll { by, victim, seen: now_seen, since });
    }

    fn kill(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.alive) else { return };
        node.alive = false;
        let who = node.who;
        self.note(format!("{who:?} dies"));
        let peers: Vec<NodeId> = self.nodes.keys().copied().filter(|other| *other != id).collect();
        for peer in peers {
            self.disconnect(id, peer);
        }
    }

    fn give(&mut self, who: Who, input: Input) {
        let now = self.now;
        let Some(node) = self.running(who) else { return };
        if node.closed {
            return;
        }
        if node.paused {
            return match input {
                // Time does not queue up; everything else waits in sockets and completion queues.
                Input::Tick | Input::Slots(_) | Input::RegisterMoved => {}
                other => node.waiting.push(other),
            };
        }
        node.core.handle(Instant(now), input);
        let mut outputs = Vec::new();
        while let Some(output) = node.core.poll() {
            outputs.push(output);
        }
        outputs.into_iter().for_each(|output| self.carry_out(who, output));
    }

    fn carry_out(&mut self, who: Who, output: Output) {
        let delay = self.random.below(15) * MS;
        match output {
            Output::ReadRegister => self.after(delay, Event::ReadLands(who)),
            Output::Cas { expected, view } => {
                let lost = self.now < self.trouble_until && self.random.chance(5);
                self.after(delay, Event::CasLands { by: who, expected, view, lost });
            }
            Output::InstallView(view) => {
                let node = self.nodes.get_mut(&who.0).expect("a running node");
                let older =
                    node.installed.as_ref().is_some_and(|before| before.generation >= view.generation);
                if older || !view.is_member(who.0, who.1) {
                    self.fail(&format!("{who:?} installs generation {} out of order", view.generation));
                }
                node.installed = Some(view);
            }
            Output::Fenced { node, incarnation } => self.check_told(who, (node, incarnation), false),
            Output::Recovered { node, incarnation } => self.check_told(who, (node, incarnation), true),
            Output::Send { to, message } => {
                let Some(link) = self.links.get(&pair(who.0, to)).copied() else { return };
                let bytes = membership::codec::encode_message(&message);
                let message = membership::codec::decode_message(&bytes).expect("what is sent can be read");
                let to = self.nodes[&to].who;
                self.after(MS / 2, Event::Deliver { from: who, to, link, message });
            }
            Output::Probe { node, incarnation } => {
                let dead = self.nodes.get(&node).is_none_or(|n| n.who.1 != incarnation || !n.alive);
                if self.scenario.proofs && dead {
                    self.after(delay, Event::Give(who, Input::ProvenDead { node, incarnation }));
                }
            }
            Output::Fence { node, incarnation } => {
                let victim = (node, incarnation);
                let pending = self.register.1.recovery(node, incarnation).is_some();
                let gone = self.fenced.contains(&victim);
                if !pending && !gone {
                    self.fail(&format!("{who:?} fences {victim:?}, which the register does not exclude"));
                }
                let slow = self.scenario.slow_fences && self.now < self.trouble_until;
                if slow && self.random.chance(40) {
                    let result = Err(String::from("the agent did not answer"));
                    let input = Input::FenceDone { node, incarnation, result };
                    return self.after(delay * 100, Event::Give(who, input));
                }
                let delay = if slow { delay * 300 } else { delay };
                let since = self.now + delay;
                self.after(delay, Event::FencePoll { by: who, victim, seen: None, since });
            }
            Output::Replay { node, incarnation, journal: _ } => {
                let victim = (node, incarnation);
                if !self.fenced.contains(&victim) {
                    self.fail(&format!("{who:?} replays {victim:?} before its fence"));
                }
                let rival = self
                    .nodes
                    .values()
                    .find(|n| n.who != who && n.replaying.contains(&victim) && self.can_write(n.who));
                if let Some(rival) = rival {
                    let rival = rival.who;
                    self.fail(&format!("{who:?} and {rival:?} replay {victim:?} at once"));
                }
                let replaying = &mut self.nodes.get_mut(&who.0).expect("a running node").replaying;
                if !replaying.is_empty() {
                    self.fail(&format!("{who:?} replays two journals at once"));
                }
                replaying.insert(victim);
                self.after(delay * 20, Event::ReplayEnds { by: who, victim });
            }
            Output::MakeJournal { index } => {
                let result = Ok(());
                self.after(delay * 5, Event::Give(who, Input::JournalMade { index, result }));
            }
            Output::FindDevices(view) => self.find_devices(who, view.names.version, delay),
            Output::ReviveLease => {
                let now = self.now;
                let node = self.nodes.get_mut(&who.0).expect("a running node");
                node.lapsed = false;
                // The renewal before the lapse was noticed may be a second old.
                node.lease_until = now + (LEASE_MS - RENEW_MS) * MS;
                self.note(format!("{who:?} revives its lease"));
            }
            Output::CloseGate(reason) => {
                self.note(format!("{who:?} closes: {reason}"));
                self.stop(who, 1_000);
            }
            Output::Left => {
                self.note(format!("{who:?} has left"));
                self.slots.remove(&who.0);
                self.stop(who, 3_000);
            }
            Output::Refused(refusal) => {
                self.note(format!("{who:?} is refused: {refusal}"));
                self.stop(who, 2_000);
            }
            Output::Notice(notice) => self.note(format!("{who:?}: {notice:?}")),
        }
    }

    /// The daemon ends; it is started again after a while.
    fn stop(&mut self, who: Who, again_ms: u64) {
        let node = self.nodes.get_mut(&who.0).expect("a running node");
        node.closed = true;
        node.installed = None;
        let says_so = self.random.chance(50) && !self.disk_blocked.contains(&who.0);
        if let Some((slot, _)) = self.slots.get_mut(&who.0).filter(|_| says_so) {
            slot.stopped = true;
            slot.sequence += 1;
        }
        self.kill(who.0);
        self.after(again_ms * MS, Event::Restart(who.0));
    }

    fn check_told(&mut self, who: Who, about: Who, recovered: bool) {
        let truth = if recovered { &self.recovered } else { &self.fenced };
        if !truth.contains(&about) && !self.left.contains(&about) {
            self.fail(&format!("{who:?} hears too early that {about:?} is fenced or recovered"));
        }
    }

    fn trouble(&mut self) {
        if self.now >= self.trouble_until {
            self.blocked.clear();
            self.disk_blocked.clear();
            let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
            for id in ids {
                self.happen(Event::Resume(id));
                self.after(500 * MS, Event::Restart(id));
            }
            return;
        }
        let next = 200 + self.random.below(6_000);
        self.after(next * MS, Event::Trouble);
        let id = NodeId(self.random.below(u64::from(self.scenario.nodes)) as u16);
        match self.random.below(12) {
            0 | 1 => {
                self.kill(id);
                let delay = self.random.below(9_000) * MS;
                self.after(delay, Event::Restart(id));
            }
            2 => {
                // Everybody at once.
                if self.random.chance(30) {
                    for id in self.nodes.keys().copied().collect::<Vec<_>>() {
                        self.kill(id);
                        let delay = self.random.below(9_000) * MS;
                        self.after(delay, Event::Restart(id));
                    }
                }
            }
            3 => {
                if let Some(node) = self.nodes.get_mut(&id).filter(|node| node.alive) {
                    node.paused = true;
                    let who = node.who;
                    self.note(format!("{who:?} is stopped"));
                    let delay = self.random.below(15_000) * MS;
                    self.after(delay, Event::Resume(id));
                }
            }
            4 | 5 => {
                let other = NodeId(self.random.below(u64::from(self.scenario.nodes)) as u16);
                let one_way = self.random.chance(30);
                let all = self.random.chance(40);
                self.note(format!(
                    "the network between {id} and {other} (all: {all}, one way: {one_way}) is cut"
                ));
                for peer in self.nodes.keys().copied().collect::<Vec<_>>() {
                    if peer == id || !(all || peer == other) {
                        continue;
                    }
                    self.blocked.insert((id, peer));
                    if !one_way {
                        self.blocked.insert((peer, id));
                    }
                    if let (Some(link), Some(b)) =
                        (self.links.get(&pair(id, peer)).copied(), self.nodes.get(&peer))
                    {
                        let (a, b) = (self.nodes[&id].who, b.who);
                        self.after(3_000 * MS, Event::LinkTimeout { a, b, link });
                    }
                }
            }
            6 => {
                self.note(String::from("the network heals"));
                self.blocked.clear();
            }
            7 | 8 => self.break_link(),
            10 => self.change_devices(),
            9 => {
                if self.random.chance(50) {
                    self.note(format!("the disk is away from {id}"));
                    self.disk_blocked.insert(id);
                } else {
                    self.note(String::from("the disk is away from all"));
                    self.disk_blocked.extend(self.nodes.keys().copied());
                }
            }
            _ => {
                self.disk_blocked.clear();
                let phase = self.nodes.get_mut(&id).map(|node| (node.who, node.core.phase().clone()));
                if let Some((who, Phase::Member)) = phase
                    && self.random.chance(50)
                {
                    self.note(format!("{who:?} wants to leave"));
                    self.leaving.insert(who);
                    self.give(who, Input::Leave);
                }
            }
        }
    }

    fn check_progress(&mut self) {
        let view = Arc::clone(&self.register.1);
        let all = self.nodes.values().all(|node| {
            view.is_member(node.who.0, node.who.1)
                && node.installed.as_ref().is_some_and(|mine| mine.generation == view.generation)
                && self.can_write(node.who)
        });
        if !all || !view.recoveries.is_empty() || view.candidate.is_some() {
            self.fail("no progress after the trouble");
        }
        // Every view repairs what was lost before it; so a view must have followed each loss.
        if view.generation.0 <= self.lost_in {
            self.fail("messages were lost and no new view followed");
        }
    }
}

fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    if a < b { (a, b) } else { (b, a) }
}
