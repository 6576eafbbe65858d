//! Several nodes that cache a shared disk under their locks, on simulated time, from a seed.
//!
//! Every resource protects one number on the disk. Nodes cache it under PR, change it under EX, and write it back
//! in the flush callout; their kernels cache it too, read it without asking for a lock, and are told to forget by
//! the purge callout. Whoever reads, under a lock or in the kernel, must see the number written last on any node.
//! Nodes die (their journal is replayed before their locks go) and come back; connections lose messages when the
//! view changes; waits are given up.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use dlm::{Departed, Epoch, Fault, Message};
use lcl::{
    CalloutError, Callouts, Config, Guard, Lcl, LockError, Mode, PURGE_ROUNDS, Resource, Scope, ValueBlock,
    Wire,
};
use membership::ShardMap;
use parking_lot::Mutex;
use storage_control::{BoxFuture, Generation, Incarnation, NodeId, Runtime, SimRuntime};

const KIND: u8 = 3;
const RESOURCES: u64 = 6;

fn res(number: u64) -> Resource {
    Resource { shard: (number * 300 % 1024) as u16, kind: KIND, number, part: 0 }
}

/// The lock space of two incarnations of a node is different: names are both.
type Name = (NodeId, Incarnation);

#[derive(Default)]
struct Shared {
    /// What is on the disk.
    disk: BTreeMap<Resource, u64>,
    /// What was written last, wherever it is.
    truth: BTreeMap<Resource, u64>,
    nodes: BTreeMap<Name, Machine>,
    links: BTreeMap<(Name, Name), VecDeque<Message>>,
    /// Nothing of these generations arrives on the link any more.
    broken: BTreeMap<(Name, Name), Generation>,
    reads: u64,
    values: u64,
    kernel_reads: u64,
    writes: u64,
}

/// One node's memory.
struct Machine {
    lcl: Lcl,
    alive: bool,
    /// The daemon's cache: the number, and whether it is newer than the disk's.
    cache: BTreeMap<Resource, (u64, bool)>,
    /// The kernel's cache.
    kernel: BTreeMap<Resource, u64>,
    /// Purge rounds of the way down under way.
    rounds: BTreeMap<Resource, u32>,
}

#[derive(Clone)]
struct Cluster {
    runtime: SimRuntime,
    shared: Arc<Mutex<Shared>>,
    epoch: Arc<Mutex<Epoch>>,
}

struct Link {
    cluster: Cluster,
    from: Name,
}

impl Wire for Link {
    fn send(&self, to: NodeId, message: Message) {
        let cluster = self.cluster.clone();
        let incarnation = {
            let shared = self.cluster.shared.lock();
            let known = shared.nodes.keys().filter(|name| name.0 == to).map(|name| name.1).max();
            known.expect("messages go to known nodes")
        };
        let pair = (self.from, (to, incarnation));
        let mut shared = cluster.shared.lock();
        if shared.broken.get(&pair).is_some_and(|generation| message.generation <= *generation) {
            return;
        }
        shared.links.entry(pair).or_default().push_back(message);
        drop(shared);
        let delay = Duration::from_micros(20 + cluster.runtime.random() % 300);
        self.cluster.runtime.spawn(Box::pin(async move {
            cluster.runtime.sleep(delay).await;
            cluster.deliver(pair);
        }));
    }

    fn fault(&self, from: NodeId, fault: Fault) {
        panic!("{:?} got from {from}: {fault}", self.from);
    }
}

/// The client of one node.
struct Client {
    cluster: Cluster,
    me: Name,
}

impl Callouts for Client {
    fn purge(&self, res: Resource, held: Mode, keep: Mode) -> BoxFuture<()> {
        let (cluster, me) = (self.cluster.clone(), self.me);
        Box::pin(async move {
            assert!(cluster.on(me, |machine, _| machine.lcl.held(res)) == held, "purged while held");
            // The kernel may ask for what it still has to write or read: it must be answered.
            if cluster.runtime.random() % 3 == 0 && !cluster.is_dead(me) {
                let lcl = cluster.lcl(me);
                let guard = lcl.try_cached(res, held, Scope::Server);
                assert!(guard.is_some() || lcl.closed().is_some(), "uses are admitted during a purge");
                cluster.on(me, |machine, _| machine.kernel.remove(&res));
            }
            cluster.nap(200).await;
            cluster.on(me, |machine, _| {
                *machine.rounds.entry(res).or_default() += 1;
                if !keep.covers(Mode::PR) {
                    machine.kernel.remove(&res);
                }
            });
        })
    }

    fn flush(&self, res: Resource, held: Mode, keep: Mode) -> BoxFuture<Result<(), CalloutError>> {
        let (cluster, me) = (self.cluster.clone(), self.me);
        Box::pin(async move {
            let value = cluster.on(me, |machine, _| {
                assert_eq!(machine.lcl.held(res), held, "flushed while held");
                let rounds = machine.rounds.remove(&res).expect("a flush follows a purge");
                let missed = !keep.covers(Mode::PR) && machine.kernel.remove(&res).is_some();
                assert!(!missed || rounds == PURGE_ROUNDS, "{rounds} rounds missed what the kernel read");
                machine.cache.get(&res).copied()
            });
            cluster.nap(400).await;
            if cluster.is_dead(me) {
                return Ok(());
            }
            cluster.on(me, |machine, disk| {
                assert_eq!(machine.lcl.held(res), held, "callouts end before the lock goes");
                let now = machine.cache.get(&res).copied();
                let dirty = |cached: Option<(u64, bool)>| cached.filter(|(_, dirty)| *dirty);
                assert_eq!(dirty(now), dirty(value), "nobody writes meanwhile");
                if let Some((number, true)) = now {
                    disk.insert(res, number);
                    machine.cache.insert(res, (number, false));
                }
                if !keep.covers(Mode::PR) {
                    machine.cache.remove(&res);
                }
            });
            Ok(())
        })
    }

    fn acquired(&self, res: Resource, mode: Mode) {
        let shared = self.cluster.shared.lock();
        for (name, machine) in &shared.nodes {
            if *name != self.me && machine.alive {
                let cached = machine.cache.get(&res);
                assert!(mode != Mode::EX || cached.is_none(), "{name:?} still caches {res}");
                assert!(cached.is_none_or(|(_, dirty)| !dirty), "{name:?} has not written {res} back");
            }
        }
    }
}

impl Cluster {
    fn start(seed: u64) -> Cluster {
        let epoch = Epoch {
            generation: Generation(0),
            members: BTreeMap::new(),
            shards: ShardMap::all_to(NodeId(0)),
            recoveries: Vec::new(),
        };
        Cluster { runtime: SimRuntime::new(seed), shared: Arc::default(), epoch: Arc::new(Mutex::new(epoch)) }
    }

    fn on<R>(&self, me: Name, f: impl FnOnce(&mut Machine, &mut BTreeMap<Resource, u64>) -> R) -> R {
        let mut shared = self.shared.lock();
        let Shared { nodes, disk, .. } = &mut *shared;
        f(nodes.get_mut(&me).expect("a node"), disk)
    }

    fn lcl(&self, me: Name) -> Lcl {
        self.shared.lock().nodes[&me].lcl.clone()
    }

    fn is_dead(&self, me: Name) -> bool {
        !self.shared.lock().nodes[&me].alive
    }

    fn below(&self, n: u64) -> u64 {
        self.runtime.random() % n
    }

    async fn nap(&self, most_us: u64) {
        let us = self.below(most_us);
        if us > most_us / 4 {
            self.runtime.sleep(Duration::from_micros(us)).await;
        }
    }

    fn deliver(&self, pair: (Name, Name)) {
        let (message, lcl) = {
            let mut shared = self.shared.lock();
            let Some(message) = shared.links.get_mut(&pair).and_then(VecDeque::pop_front) else { return };
            let to = &shared.nodes[&pair.1];
            if !to.alive {
                return;
            }
            (message, to.lcl.clone())
        };
        lcl.message(pair.0.0, message).expect("members are correct");
    }

    /// A new node, not yet a member.
    fn boot(&self, name: Name) {
        let config = Config {
            min_hold: Duration::from_micros(self.below(2000)),
            idle_hold: Duration::from_micros(self.below(300)),
            max_cached: 1 << 10,
        };
        let wire = Arc::new(Link { cluster: self.clone(), from: name });
        let lcl = Lcl::new(name.0, name.1, Arc::new(self.runtime.clone()), wire, config);
        lcl.set_callouts(KIND, Arc::new(Client { cluster: self.clone(), me: name }));
        let machine = Machine {
            lcl,
            alive: true,
            cache: BTreeMap::new(),
            kernel: BTreeMap::new(),
            rounds: BTreeMap::new(),
        };
        self.shared.lock().nodes.insert(name, machine);
    }

    /// A new view; members hear of it at different times, and connections may break.
    fn change(&self, change: impl FnOnce(&mut Epoch)) {
        let epoch = {
            let mut epoch = self.epoch.lock();
            change(&mut epoch);
            epoch.generation.0 += 1;
            let members: BTreeSet<NodeId> = epoch.members.keys().copied().collect();
            epoch.shards = epoch.shards.deal(&members);
            Arc::new(epoch.clone())
        };
        {
            let mut shared = self.shared.lock();
            let pairs: Vec<(Name, Name)> = shared.links.keys().copied().collect();
            for pair in pairs {
                if self.below(2) == 0 {
                    let queue = shared.links.get_mut(&pair).expect("just listed");
                    let kept = self.below(queue.len() as u64 + 1);
                    queue.truncate(kept as usize);
                    shared.broken.insert(pair, Generation(epoch.generation.0 - 1));
                }
            }
        }
        self.spread(epoch);
    }

    fn spread(&self, epoch: Arc<Epoch>) {
        for (node, incarnation) in &epoch.members {
            let (cluster, epoch, name) = (self.clone(), epoch.clone(), (*node, *incarnation));
            self.runtime.spawn(Box::pin(async move {
                cluster.nap(1000).await;
                if !cluster.is_dead(name) {
                    cluster.lcl(name).install_epoch(&epoch);
                }
            }));
        }
    }

    fn kill(&self, name: Name) {
        let lcl = self.lcl(name);
        self.on(name, |machine, _| {
            machine.alive = false;
            machine.kernel.clear();
        });
        lcl.close("killed");
        self.change(|epoch| {
            epoch.members.remove(&name.0);
            epoch.recoveries.push(Departed { node: name.0, incarnation: name.1, fenced: false });
        });
    }

    /// Fence and replay of a dead node, and its return.
    async fn recover(&self, name: Name) {
        self.nap(3000).await;
        let epoch = {
            let mut epoch = self.epoch.lock();
            epoch.recoveries.iter_mut().filter(|d| d.node == name.0).for_each(|dead| dead.fenced = true);
            Arc::new(epoch.clone())
        };
        self.spread(epoch);
        self.nap(5000).await;
        {
            let mut shared = self.shared.lock();
            let cache = std::mem::take(&mut shared.nodes.get_mut(&name).expect("a node").cache);
            let dirty =
                cache.into_iter().filter(|(_, (_, dirty))| *dirty).map(|(res, (number, _))| (res, number));
            shared.disk.extend(dirty);
        }
        let epoch = {
            let mut epoch = self.epoch.lock();
            epoch.recoveries.retain(|dead| dead.node != name.0);
            Arc::new(epoch.clone())
        };
        self.spread(epoch);
        for (node, incarnation) in self.epoch.lock().members.clone() {
            self.lcl((node, incarnation)).recovered(name.0, name.1);
        }
    }

    /// One operation of a program on a node.
    async fn operate(&self, me: Name) -> Result<(), LockError> {
        let lcl = self.lcl(me);
        let res = res(self.below(RESOURCES));
        let write = self.below(3) == 0;
        let mode = if write { Mode::EX } else { Mode::PR };
        let scope = if self.below(2) == 0 { Scope::Process } else { Scope::Server };
        let guard = match self.below(10) {
            0 => match lcl.try_acquire(res, mode, scope).await? {
                Some(guard) => guard,
                None => return Ok(()),
            },
            1 => {
                let patience = self.runtime.sleep(Duration::from_micros(self.below(2000)));
                match either(lcl.acquire(res, mode, scope), patience).await {
                    Some(guard) => guard?,
                    None => return Ok(()),
                }
            }
            _ => lcl.acquire(res, mode, scope).await?,
        };
        assert_eq!((guard.mode(), guard.resource()), (mode, res));
        if self.below(4) == 0 {
            self.nap(500).await;
        }
        self.use_it(me, &guard, write);
        Ok(())
    }

    fn use_it(&self, me: Name, guard: &Guard, write: bool) {
        let res = guard.resource();
        let mut shared = self.shared.lock();
        let Shared { disk, truth, nodes, reads, writes, values, .. } = &mut *shared;
        let machine = nodes.get_mut(&me).expect("a node");
        if !machine.alive {
            return; // the gate is closed
        }
        let on_disk = disk.get(&res).copied().unwrap_or(0);
        let (number, _) = *machine.cache.entry(res).or_insert((on_disk, false));
        assert_eq!(
            number,
            truth.get(&res).copied().unwrap_or(0),
            "{me:?} reads {res} under {}",
            guard.mode()
        );
        if let Some(value) = guard.value() {
            *values += 1;
            assert_eq!(
                u64::from_le_bytes(value.0[..8].try_into().expect("eight bytes")),
                number,
                "value of {res}"
            );
        }
        *reads += 1;
        machine.kernel.insert(res, number);
        if write {
            *writes += 1;
            machine.cache.insert(res, (number + 1, true));
            machine.kernel.insert(res, number + 1);
            truth.insert(res, number + 1);
            let mut value = ValueBlock([0; 64]);
            value.0[..8].copy_from_slice(&(number + 1).to_le_bytes());
            guard.set_value(value);
        }
    }

    /// The kernel serves a read from its cache, without a word to the daemon.
    fn kernel_read(&self, me: Name) {
        let res = res(self.below(RESOURCES));
        let mut shared = self.shared.lock();
        let machine = &shared.nodes[&me];
        if let Some(number) = machine.kernel.get(&res).filter(|_| machine.alive) {
            assert_eq!(Some(number), shared.truth.get(&res).or(Some(&0)), "{me:?}: the kernel's {res}");
            shared.kernel_reads += 1;
        }
    }

    fn program(&self, me: Name, operations: u32, done: Arc<Mutex<u32>>) {
        let cluster = self.clone();
        self.runtime.spawn(Box::pin(async move {
            for _ in 0..operations {
                if cluster.operate(me).await.is_err() {
                    assert!(cluster.is_dead(me), "only the dead get errors");
                    break;
                }
                cluster.kernel_read(me);
                cluster.nap(300).await;
            }
            *done.lock() += 1;
        }));
    }

    fn check(&self) {
        let lcls: Vec<Lcl> = {
            let shared = self.shared.lock();
            shared.nodes.values().filter(|machine| machine.alive).map(|machine| machine.lcl.clone()).collect()
        };
        lcls.iter().for_each(Lcl::assert_consistent);
    }
}

/// The first future's result, unless the second is done before.
async fn either<T>(wanted: impl Future<Output = T>, limit: impl Future<Output = ()>) -> Option<T> {
    let mut wanted = pin!(wanted);
    let mut limit = pin!(limit);
    poll_fn(move |context| {
        if let Poll::Ready(value) = wanted.as_mut().poll(context) {
            return Poll::Ready(Some(value));
        }
        limit.as_mut().poll(context).map(|()| None)
    })
    .await
}

struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to repeat: SEED={} cargo test -p lcl --test cluster", self.0);
        }
    }
}

/// Three nodes, three programs each; `trouble` kills nodes and breaks connections.
fn run(seed: u64, trouble: bool) -> (u64, u64) {
    let _seed = Seed(seed);
    let cluster = Cluster::start(seed);
    let names: Vec<Name> = (0..3).map(|node| (NodeId(node), Incarnation(1))).collect();
    names.iter().for_each(|name| cluster.boot(*name));
    cluster.change(|epoch| epoch.members = names.iter().copied().collect());
    let done = Arc::new(Mutex::new(0));
    let mut programs = 0;
    let mut start = |cluster: &Cluster, name: Name| {
        for _ in 0..3 {
            cluster.program(name, 60, done.clone());
            programs += 1;
        }
    };
    names.iter().for_each(|name| start(&cluster, *name));
    if trouble {
        let mut incarnation = 1;
        for _ in 0..4 {
            cluster.runtime.advance(Duration::from_micros(500 + cluster.below(8000)));
            cluster.check();
            if cluster.below(3) == 0 {
                cluster.change(|_| {});
                continue;
            }
            let members: Vec<Name> = cluster.epoch.lock().members.clone().into_iter().collect();
            let victim = members[cluster.below(members.len() as u64) as usize];
            cluster.kill(victim);
            let recovering = cluster.clone();
            cluster.runtime.run(async move { recovering.recover(victim).await });
            incarnation += 1;
            let reborn = (victim.0, Incarnation(incarnation));
            cluster.boot(reborn);
            cluster.change(|epoch| {
                epoch.members.insert(reborn.0, reborn.1);
            });
            start(&cluster, reborn);
        }
    }
    for _ in 0..10_000 {
        if *done.lock() == programs {
            break;
        }
        cluster.runtime.advance(Duration::from_millis(5));
    }
    assert_eq!(*done.lock(), programs, "everybody comes to an end");
    cluster.check();
    leave(&cluster);
    let shared = cluster.shared.lock();
    assert_eq!(shared.disk, shared.truth, "what was written is on the disk");
    assert!(
        shared.values > shared.reads / 4,
        "values come with grants: {} of {}",
        shared.values,
        shared.reads
    );
    (shared.reads, shared.writes)
}

/// Every node gives all back.
fn leave(cluster: &Cluster) {
    let members: Vec<Name> = cluster.epoch.lock().members.clone().into_iter().collect();
    for name in members {
        let lcl = cluster.lcl(name);
        cluster.runtime.run(async move { lcl.release_all().await }).expect("nothing fails here");
        assert_eq!(cluster.lcl(name).stats().cached, 0);
    }
    cluster.runtime.advance(Duration::from_millis(5));
    cluster.check();
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SEEDS").unwrap_or(default),
    }
}

#[test]
fn readers_see_the_last_write_on_any_node() {
    for seed in seeds(15) {
        let (reads, writes) = run(seed, false);
        assert!(reads > 300 && writes > 80, "worth something: {reads} reads, {writes} writes");
    }
}

#[test]
fn and_when_nodes_die_and_connections_break() {
    seeds(25).for_each(|seed| {
        run(seed, true);
    });
}
