//! Three nodes on real threads: programs, message delivery and ways down at the same time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use dlm::{Epoch, Fault, Message};
use lcl::{CalloutError, Callouts, Config, Lcl, Mode, Resource, Scope, Wire};
use membership::ShardMap;
use storage_control::{BoxFuture, Generation, Incarnation, NodeId, TestRuntime, block_on};

const KIND: u8 = 1;
const RESOURCES: usize = 4;
const TURNS: usize = 2000;

fn res(number: usize) -> Resource {
    Resource { shard: (number * 300) as u16, kind: KIND, number: number as u64, part: 0 }
}

/// Messages to a node, each with its sender.
type Inbox = mpsc::Sender<(NodeId, Message)>;

struct Link {
    me: NodeId,
    peers: BTreeMap<NodeId, Inbox>,
}

impl Wire for Link {
    fn send(&self, to: NodeId, message: Message) {
        // A receiver that has ended its test needs nothing more.
        let _ = self.peers[&to].send((self.me, message));
    }

    fn fault(&self, from: NodeId, fault: Fault) {
        panic!("{:?} got from {from:?}: {fault}", self.me);
    }
}

/// A number per resource on the shared disk, and who is inside on any node: -1 a writer, else the readers.
#[derive(Default)]
struct Disk {
    number: [AtomicU64; RESOURCES],
    inside: [AtomicI64; RESOURCES],
}

/// One node's cache of the numbers; `NONE` where it has none.
struct Cache {
    disk: Arc<Disk>,
    number: [AtomicU64; RESOURCES],
}

const NONE: u64 = u64::MAX;

impl Callouts for Cache {
    fn purge(&self, _: Resource, _: Mode, _: Mode) -> BoxFuture<()> {
        Box::pin(async {})
    }

    fn flush(&self, res: Resource, held: Mode, keep: Mode) -> BoxFuture<Result<(), CalloutError>> {
        let at = res.number as usize;
        let cached = self.number[at].load(SeqCst);
        if held == Mode::EX && cached != NONE {
            self.disk.number[at].store(cached, SeqCst);
        }
        if keep == Mode::NL {
            self.number[at].store(NONE, SeqCst);
        }
        Box::pin(async { Ok(()) })
    }
}

fn program(seed: u64, lcl: &Lcl, cache: &Cache, written: &[AtomicU64; RESOURCES]) {
    let mut random = seed;
    for _ in 0..TURNS {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (random >> 33) as usize % RESOURCES;
        let write = (random >> 40).is_multiple_of(3);
        let mode = if write { Mode::EX } else { Mode::PR };
        let guard = block_on(lcl.acquire(res(at), mode, Scope::Process)).expect("nobody closes");
        let inside = &cache.disk.inside[at];
        if write {
            assert_eq!(inside.swap(-1, SeqCst), 0, "a writer is alone");
        } else {
            assert!(inside.fetch_add(1, SeqCst) >= 0, "readers are among readers");
        }
        let mut number = cache.number[at].load(SeqCst);
        if number == NONE {
            number = cache.disk.number[at].load(SeqCst);
            cache.number[at].store(number, SeqCst);
        }
        if write {
            cache.number[at].store(number + 1, SeqCst);
            written[at].fetch_add(1, SeqCst);
            inside.store(0, SeqCst);
        } else {
            inside.fetch_sub(1, SeqCst);
        }
        drop(guard);
    }
}

#[test]
fn no_write_is_lost_and_nobody_waits_for_ever() {
    let nodes = [NodeId(0), NodeId(1), NodeId(2)];
    let disk = Arc::new(Disk::default());
    let (inboxes, outlets): (BTreeMap<_, _>, Vec<_>) = nodes
        .iter()
        .map(|node| {
            let (sender, receiver) = mpsc::channel();
            ((*node, sender), receiver)
        })
        .unzip();
    let epoch = Arc::new(Epoch {
        generation: Generation(1),
        members: nodes.iter().map(|node| (*node, Incarnation(1))).collect(),
        shards: ShardMap::all_to(NodeId(0)).deal(&nodes.into_iter().collect()),
        recoveries: Vec::new(),
    });
    let config = Config { min_hold: Duration::from_micros(300), ..Config::default() };
    let runtime = Arc::new(TestRuntime::new());
    let mut programs = Vec::new();
    let mut lcls = Vec::new();
    let written: Arc<[AtomicU64; RESOURCES]> = Arc::default();
    for (node, outlet) in nodes.into_iter().zip(outlets) {
        let wire = Arc::new(Link { me: node, peers: inboxes.clone() });
        let lcl = Lcl::new(node, Incarnation(1), runtime.clone(), wire, config);
        let cache =
            Arc::new(Cache { disk: disk.clone(), number: std::array::from_fn(|_| AtomicU64::new(NONE)) });
        lcl.set_callouts(KIND, cache.clone());
        let receiver = lcl.clone();
        std::thread::spawn(move || {
            for (from, message) in outlet {
                receiver.message(from, message).expect("members are correct");
            }
        });
        lcl.install_epoch(&epoch);
        for thread in 0..3 {
            let (lcl, cache, written) = (lcl.clone(), cache.clone(), written.clone());
            let seed = u64::from(node.0) * 10 + thread;
            programs.push(std::thread::spawn(move || program(seed, &lcl, &cache, &written)));
        }
        lcls.push(lcl);
    }
    programs.into_iter().for_each(|program| program.join().expect("a program ends well"));
    for lcl in &lcls {
        block_on(lcl.release_all()).expect("every flush succeeds");
        lcl.assert_consistent();
    }
    for at in 0..RESOURCES {
        assert_eq!(disk.number[at].load(SeqCst), written[at].load(SeqCst), "writes of {at}");
    }
}
