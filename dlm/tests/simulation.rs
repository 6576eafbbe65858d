//! Random operations, deaths, joins and new views on a simulated network, from a seed.
//!
//! After every step: no two nodes hold incompatible modes, where an excluded node counts with what it really
//! holds until its fence (shared modes) or recovery (modes that write); a value block that a grant carries is the
//! last one written, and never one that a dead writer may have overwritten; nobody's lock is lost. At the end,
//! when everybody gives up what he is called back for: nobody waits, and masters and holders agree.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use dlm::{Departed, Dlm, Epoch, MODES, Message, Mode, Output, Refusal, Resource, ValueBlock};
use membership::ShardMap;
use storage_control::{Generation, Incarnation, Instant, NodeId};

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        if all.is_empty() { None } else { Some(all[self.below(all.len())]) }
    }
}

#[derive(PartialEq, Clone, Copy, Debug)]
enum Life {
    Member,
    /// Excluded, and does not know: goes on in its old view.
    Zombie,
    /// Excluded and stopped; what it held is still to be reckoned with.
    Dead,
}

type Name = (NodeId, Incarnation);

struct Node {
    dlm: Dlm,
    life: Life,
    /// What its client believes to hold.
    holds: BTreeMap<Resource, Mode>,
    /// What others want of it.
    wanted: BTreeMap<Resource, Vec<Mode>>,
}

struct World {
    rng: Rng,
    now: u64,
    nodes: BTreeMap<Name, Node>,
    links: BTreeMap<(Name, Name), VecDeque<Message>>,
    /// What was sent on a link in this generation or an earlier one never arrives.
    broken: BTreeMap<(Name, Name), Generation>,
    epochs: Vec<Arc<Epoch>>,
    incarnations: u64,
    resources: Vec<Resource>,
    /// The last value written under each resource; `None` where a writer died.
    values: BTreeMap<Resource, Option<ValueBlock>>,
    grants: u64,
    log: Vec<String>,
}

fn resources() -> Vec<Resource> {
    let spread =
        (0..1000u64).map(|n| Resource { shard: (n * 37 % 1024) as u16, kind: 1, number: n, part: 0 });
    spread.filter(|res| res.partition() == 0).take(7).collect()
}

impl World {
    fn new(seed: u64) -> World {
        let mut world = World {
            rng: Rng(seed),
            now: 1_000_000,
            nodes: BTreeMap::new(),
            links: BTreeMap::new(),
            broken: BTreeMap::new(),
            epochs: Vec::new(),
            incarnations: 0,
            resources: resources(),
            values: BTreeMap::new(),
            grants: 0,
            log: Vec::new(),
        };
        let members = 1 + world.rng.below(4);
        let members: BTreeMap<NodeId, Incarnation> =
            (0..members).map(|node| (NodeId(node as u16), world.start(NodeId(node as u16)))).collect();
        let nodes: BTreeSet<NodeId> = members.keys().copied().collect();
        let shards = ShardMap::all_to(NodeId(0)).deal(&nodes);
        world.publish(members, shards, Vec::new());
        world
    }

    fn note(&mut self, line: String) {
        self.log.push(line);
    }

    fn time(&mut self) -> Instant {
        self.now += 1_000_000;
        Instant(self.now)
    }

    fn start(&mut self, node: NodeId) -> Incarnation {
        self.incarnations += 1;
        let incarnation = Incarnation(self.incarnations);
        let dlm = Dlm::new(node, incarnation, 0);
        let new = Node { dlm, life: Life::Member, holds: BTreeMap::new(), wanted: BTreeMap::new() };
        self.nodes.insert((node, incarnation), new);
        incarnation
    }

    fn latest(&self) -> Arc<Epoch> {
        self.epochs.last().expect("there is a first view").clone()
    }

    /// A new generation. Connections may break with it: then the rest of what was sent before is lost.
    fn publish(
        &mut self,
        members: BTreeMap<NodeId, Incarnation>,
        shards: ShardMap,
        recoveries: Vec<Departed>,
    ) {
        let last = self.epochs.last().map_or(0, |epoch| epoch.generation.0);
        let generation = Generation(last + 1 + self.rng.below(2) as u64);
        self.note(format!("view {generation}: {members:?}, recoveries {recoveries:?}"));
        let pairs: Vec<(Name, Name)> = self.links.keys().copied().collect();
        for pair in pairs {
            if self.rng.chance(50) {
                let queue = self.links.get_mut(&pair).expect("just listed");
                let kept = self.rng.below(queue.len() + 1);
                queue.truncate(kept);
                self.broken.insert(pair, Generation(last));
            }
        }
        self.epochs.push(Arc::new(Epoch { generation, members, shards, recoveries }));
    }

    fn change_members(
        &mut self,
        change: impl FnOnce(&mut BTreeMap<NodeId, Incarnation>, &mut Vec<Departed>),
    ) {
        let latest = self.latest();
        let mut members = latest.members.clone();
        let mut recoveries = latest.recoveries.clone();
        change(&mut members, &mut recoveries);
        let nodes: BTreeSet<NodeId> = members.keys().copied().collect();
        self.publish(members, latest.shards.deal(&nodes), recoveries);
    }

    fn live(&self) -> Vec<Name> {
        let runs = |node: &Node| matches!(node.life, Life::Member | Life::Zombie);
        self.nodes.iter().filter(|(_, node)| runs(node)).map(|(name, _)| *name).collect()
    }

    fn members(&self) -> Vec<Name> {
        self.latest().members.iter().map(|(node, incarnation)| (*node, *incarnation)).collect()
    }

    /// Carries out what the node's core says.
    fn drain(&mut self, name: Name) {
        while let Some(output) = self.nodes.get_mut(&name).expect("a node").dlm.poll() {
            match output {
                Output::Send { to, message } => self.send(name, to, message),
                Output::Granted { res, mode, value } => {
                    self.grants += 1;
                    self.note(format!("{name:?} holds {res} in {mode}"));
                    // Beside CR there may be a writer whose value is still on its way.
                    if let Some(value) = value.filter(|_| mode.fixes_value()) {
                        let last = self.values.get(&res).copied().flatten();
                        assert_eq!(Some(value.block), last, "{res}: the value is the last one written");
                    }
                    let node = self.nodes.get_mut(&name).expect("a node");
                    node.holds.insert(res, mode);
                }
                Output::Refused { res, why } => {
                    self.note(format!("{name:?} refused {res}: {why:?}"));
                    let node = self.nodes.get_mut(&name).expect("a node");
                    if why == Refusal::Deadlock {
                        node.wanted.entry(res).or_default().push(Mode::EX);
                    }
                }
                Output::Blocking { res, wanted } => {
                    let node = self.nodes.get_mut(&name).expect("a node");
                    node.wanted.entry(res).or_default().push(wanted);
                }
                Output::Fault { from, fault } => panic!("{name:?} got from {from}: {fault}"),
            }
        }
        let node = &self.nodes[&name];
        node.dlm.assert_consistent();
        for res in &self.resources {
            let believed = node.holds.get(res).copied().unwrap_or(Mode::NL);
            assert_eq!(node.dlm.held(res), believed, "{name:?} keeps {res}");
        }
    }

    fn send(&mut self, from: Name, to: NodeId, message: Message) {
        let sender = self.nodes[&from].dlm.generation();
        let view =
            self.epochs.iter().find(|epoch| Some(epoch.generation) == sender).expect("sends in a view");
        let to = (to, view.members[&to]);
        let lost = self.broken.get(&(from, to)).is_some_and(|generation| message.generation <= *generation);
        if !lost {
            self.links.entry((from, to)).or_default().push_back(message);
        }
    }

    fn deliver(&mut self, (from, to): (Name, Name)) {
        let queue = self.links.get_mut(&(from, to)).expect("a link");
        let Some(message) = queue.pop_front() else { return };
        if self.rng.chance(3) {
            queue.push_back(message.clone());
        }
        let now = self.time();
        let Some(node) = self.nodes.get_mut(&to) else { return };
        if node.life == Life::Dead {
            return;
        }
        self.log.push(format!("{from:?} -> {to:?}: {message:?}"));
        let result = node.dlm.message(now, from.0, message);
        // The frame layer drops what comes from an incarnation that is not in the message's view.
        assert_eq!(result, Ok(()), "{from:?} -> {to:?}");
        self.drain(to);
    }

    fn deliver_some(&mut self) {
        let busy: Vec<(Name, Name)> =
            self.links.iter().filter(|(_, queue)| !queue.is_empty()).map(|(pair, _)| *pair).collect();
        if let Some(pair) = self.rng.pick(&busy) {
            self.deliver(pair);
        }
    }

    fn request(&mut self) {
        let Some(name) = ({
            let live = self.live();
            self.rng.pick(&live)
        }) else {
            return;
        };
        let res = self.resources[self.rng.below(self.resources.len())];
        let mode = MODES[1 + self.rng.below(5)];
        let no_queue = self.rng.chance(20);
        let now = self.time();
        let node = self.nodes.get_mut(&name).expect("a node");
        if node.dlm.is_asking(&res) {
            return;
        }
        let free = node.dlm.is_free_here(&res, mode);
        self.log.push(format!("{name:?} asks {res} for {mode}, no_queue {no_queue}"));
        node.dlm.request(now, res, mode, no_queue);
        assert!(!free || !node.dlm.is_asking(&res), "free here means granted at once");
        self.drain(name);
    }

    fn go_down(&mut self, name: Name, res: Resource, to: Mode) {
        let now = self.time();
        let write = self.rng.chance(60);
        let node = self.nodes.get_mut(&name).expect("a node");
        let from = node.holds[&res];
        let value = (write && from.writes_value()).then(|| {
            let mut bytes = [0; 64];
            bytes[..8].copy_from_slice(&self.now.to_le_bytes());
            ValueBlock(bytes)
        });
        self.log.push(format!("{name:?} takes {res} from {from} down to {to}, value {value:?}"));
        if let Some(value) = value {
            self.values.insert(res, Some(value));
        }
        if to == Mode::NL {
            node.holds.remove(&res);
        } else {
            node.holds.insert(res, to);
        }
        if let Some(wanted) = node.wanted.get_mut(&res) {
            wanted.retain(|wanted| !wanted.compatible(to));
        }
        node.dlm.downconvert(now, res, to, value);
        self.drain(name);
    }

    /// A holder gives up something: what others want, or anything if `freely`.
    fn release_some(&mut self, freely: bool) -> bool {
        let mut choices = Vec::new();
        for name in self.live() {
            let node = &self.nodes[&name];
            for (res, held) in &node.holds {
                let wanted = node.wanted.get(res).is_some_and(|all| all.iter().any(|w| !w.compatible(*held)));
                if !node.dlm.is_asking(res) && (freely || wanted) {
                    choices.push((name, *res, *held));
                }
            }
        }
        let Some((name, res, held)) = self.rng.pick(&choices) else { return false };
        let wanted = self.nodes[&name].wanted.get(&res).cloned().unwrap_or_default();
        let fits =
            |mode: &Mode| *mode != held && held.covers(*mode) && wanted.iter().all(|w| w.compatible(*mode));
        let lower: Vec<Mode> = MODES.into_iter().filter(fits).collect();
        let to = self.rng.pick(&lower).unwrap_or(Mode::NL);
        self.go_down(name, res, to);
        true
    }

    fn cancel(&mut self) {
        let live = self.live();
        let Some(name) = self.rng.pick(&live) else { return };
        let res = self.resources[self.rng.below(self.resources.len())];
        let now = self.time();
        self.nodes.get_mut(&name).expect("a node").dlm.cancel(now, res);
        self.drain(name);
    }

    /// A lagging member installs the next view it is in, or jumps to the latest.
    fn install(&mut self, name: Name) {
        let current = self.nodes[&name].dlm.generation();
        let ahead: Vec<Arc<Epoch>> = self
            .epochs
            .iter()
            .filter(|epoch| Some(epoch.generation) > current && epoch.members.get(&name.0) == Some(&name.1))
            .cloned()
            .collect();
        if let Some(epoch) = if self.rng.chance(70) { ahead.first() } else { ahead.last() } {
            let now = self.time();
            self.log.push(format!("{name:?} installs {}", epoch.generation));
            self.nodes.get_mut(&name).expect("a node").dlm.install_view(now, epoch.clone());
            self.drain(name);
        }
    }

    fn exclude(&mut self) {
        let members = self.members();
        if members.len() < 2 {
            return;
        }
        let Some(name) = self.rng.pick(&members) else { return };
        self.nodes.get_mut(&name).expect("a node").life =
            if self.rng.chance(50) { Life::Zombie } else { Life::Dead };
        if self.nodes[&name].life == Life::Dead {
            self.stopped(name);
        }
        self.change_members(|members, recoveries| {
            members.remove(&name.0);
            recoveries.push(Departed { node: name.0, incarnation: name.1, fenced: false });
        });
    }

    /// A node wrote its last: values it could have been writing are void.
    fn stopped(&mut self, name: Name) {
        self.note(format!("{name:?} stops"));
        for (res, mode) in &self.nodes[&name].holds {
            if mode.writes_value() {
                self.values.insert(*res, None);
            }
        }
    }

    fn join(&mut self) {
        let latest = self.latest();
        let free: Vec<NodeId> =
            (0..5).map(NodeId).filter(|node| !latest.members.contains_key(node)).collect();
        let Some(node) = self.rng.pick(&free) else { return };
        let incarnation = self.start(node);
        self.change_members(|members, _| {
            members.insert(node, incarnation);
        });
    }

    /// A member that holds and asks nothing leaves.
    fn leave(&mut self) {
        let idle: Vec<Name> = self
            .members()
            .into_iter()
            .filter(|name| {
                let node = &self.nodes[name];
                node.holds.is_empty() && self.resources.iter().all(|res| !node.dlm.is_asking(res))
            })
            .collect();
        if self.members().len() < 2 {
            return;
        }
        let Some(name) = self.rng.pick(&idle) else { return };
        // It holds nothing, so nobody has to wait for it.
        self.nodes.get_mut(&name).expect("a node").life = Life::Dead;
        self.change_members(|members, _| {
            members.remove(&name.0);
        });
    }

    /// A fence or a replay is done; the news reaches some nodes at once, others with the register's next reading.
    fn recover(&mut self) {
        let mut latest = (*self.latest()).clone();
        if latest.recoveries.is_empty() {
            return;
        }
        let at = self.rng.below(latest.recoveries.len());
        let Departed { node, incarnation, fenced } = latest.recoveries[at];
        let name = (node, incarnation);
        if fenced {
            latest.recoveries.remove(at);
            self.nodes.get_mut(&name).expect("a node").holds.clear();
            self.note(format!("{name:?} recovered"));
        } else {
            latest.recoveries[at].fenced = true;
            let excluded = self.nodes.get_mut(&name).expect("a node");
            if excluded.life == Life::Zombie {
                excluded.life = Life::Dead;
                self.stopped(name);
            }
            // What it held shared no longer counts.
            self.nodes.get_mut(&name).expect("a node").holds.retain(|_, mode| mode.writes());
            self.note(format!("{name:?} fenced"));
        }
        let latest = Arc::new(latest);
        *self.epochs.last_mut().expect("a view") = latest.clone();
        for member in self.live() {
            if self.rng.chance(50) {
                continue;
            }
            let now = self.time();
            let dlm = &mut self.nodes.get_mut(&member).expect("a node").dlm;
            match self.rng.below(2) {
                0 if fenced => dlm.recovered(now, node, incarnation),
                0 => dlm.fenced(now, node, incarnation),
                _ if dlm.generation() == Some(latest.generation) => dlm.install_view(now, latest.clone()),
                _ => {}
            }
            self.drain(member);
        }
    }

    fn check_holders(&self) {
        for res in &self.resources {
            let holders: Vec<(Name, Mode)> = self
                .nodes
                .iter()
                .filter_map(|(name, node)| node.holds.get(res).map(|mode| (*name, *mode)))
                .collect();
            for (i, (one, mode)) in holders.iter().enumerate() {
                for (other, beside) in &holders[i + 1..] {
                    assert!(
                        mode.compatible(*beside),
                        "{res}: {one:?} in {mode} beside {other:?} in {beside}"
                    );
                }
            }
        }
    }

    fn step(&mut self) {
        match self.rng.below(1000) {
            0..450 => self.deliver_some(),
            450..650 => self.request(),
            650..720 => {
                self.release_some(true);
            }
            720..850 => {
                self.release_some(false);
            }
            850..875 => self.cancel(),
            875..955 => {
                let live = self.live();
                if let Some(name) = self.rng.pick(&live) {
                    self.install(name);
                }
            }
            955..965 => self.exclude(),
            965..975 => self.join(),
            975..980 => self.leave(),
            980..983 => self.change_members(|_, _| {}),
            _ => self.recover(),
        }
        self.check_holders();
    }

    /// No more trouble and no more requests: everybody who waits must get what he waits for.
    fn settle(&mut self) {
        while !self.latest().recoveries.is_empty() {
            self.recover();
            self.check_holders();
        }
        // The last view reaches everybody, with all that was lost before.
        self.change_members(|_, _| {});
        let latest = self.latest();
        for name in self.members() {
            let now = self.time();
            self.nodes.get_mut(&name).expect("a node").dlm.install_view(now, latest.clone());
            self.drain(name);
        }
        for _ in 0..20_000 {
            let busy = self.links.values().any(|queue| !queue.is_empty());
            if busy && self.rng.chance(80) {
                self.deliver_some();
            } else if !self.release_some(false) && !busy {
                break;
            }
            self.check_holders();
        }
        for name in self.members() {
            let node = &self.nodes[&name];
            for res in &self.resources {
                assert!(!node.dlm.is_asking(res), "{name:?} still waits for {res}: {:?}", self.snapshots());
            }
        }
        self.compare_masters_with_holders();
    }

    fn snapshots(&self) -> Vec<dlm::ResourceInfo> {
        self.members().iter().flat_map(|name| self.nodes[name].dlm.snapshot(Instant(self.now))).collect()
    }

    fn compare_masters_with_holders(&self) {
        let mut recorded: Vec<(Resource, NodeId, Mode)> = self
            .snapshots()
            .iter()
            .flat_map(|info| info.holders.iter().map(|holder| (info.res, holder.node, holder.mode)))
            .collect();
        recorded.sort();
        let mut held: Vec<(Resource, NodeId, Mode)> = self
            .members()
            .iter()
            .flat_map(|name| self.nodes[name].holds.iter().map(|(res, mode)| (*res, name.0, *mode)))
            .collect();
        held.sort();
        assert_eq!(recorded, held, "masters know what is held");
    }
}

/// Prints how to repeat the run when it fails.
struct Replay<'a>(u64, &'a mut World);

impl Drop for Replay<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let lines = self.1.log.len();
            let tail = if std::env::var("SEED").is_ok() { lines } else { 40 };
            eprintln!("{}", self.1.log[lines.saturating_sub(tail)..].join("\n"));
            eprintln!("to repeat: SEED={} cargo test -p dlm --test simulation", self.0);
        }
    }
}

fn run(seed: u64) -> u64 {
    let mut world = World::new(seed);
    let run = Replay(seed, &mut world);
    let steps = 200 + (seed % 7) * 100;
    for _ in 0..steps {
        run.1.step();
    }
    run.1.settle();
    run.1.grants
}

/// `SEED=n` runs one, `SEEDS=n` as many.
#[test]
fn no_incompatible_grants_and_no_lost_wakeups() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("SEED") {
        run(seed);
        return;
    }
    let seeds = number("SEEDS").unwrap_or(300);
    let grants: u64 = (0..seeds).map(run).sum();
    assert!(grants > seeds * 10, "the runs are worth something: {grants} grants");
}
