//! Two nodes, messages delivered by hand: what happens while a try is answered.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use dlm::{Epoch, Fault, Message};
use lcl::{Config, Lcl, Mode, Resource, Scope, Wire};
use membership::ShardMap;
use parking_lot::Mutex;
use storage_control::{BoxFuture, Generation, Incarnation, NodeId, Runtime, SimRuntime};

const RES: Resource = Resource { shard: 3, kind: 1, number: 3, part: 0 };

type Messages = Arc<Mutex<VecDeque<(NodeId, NodeId, Message)>>>;

struct Link(NodeId, Messages);

impl Wire for Link {
    fn send(&self, to: NodeId, message: Message) {
        self.1.lock().push_back((self.0, to, message));
    }

    fn fault(&self, from: NodeId, fault: Fault) {
        panic!("{:?} got from {from:?}: {fault}", self.0);
    }
}

struct Pair {
    runtime: SimRuntime,
    messages: Messages,
    lcls: [Lcl; 2],
}

impl Pair {
    /// Node 1 is the master of everything.
    fn new() -> Pair {
        let (runtime, messages) = (SimRuntime::new(1), Messages::default());
        let epoch = Arc::new(Epoch {
            generation: Generation(1),
            members: BTreeMap::from([0, 1].map(|id| (NodeId(id), Incarnation(1)))),
            shards: ShardMap::all_to(NodeId(1)),
            recoveries: Vec::new(),
        });
        let lcls = [0, 1].map(|id| {
            let (id, wire) = (NodeId(id), Arc::new(Link(NodeId(id), messages.clone())));
            let lcl = Lcl::new(id, Incarnation(1), Arc::new(runtime.clone()), wire, Config::default());
            lcl.install_epoch(&epoch);
            lcl
        });
        Pair { runtime, messages, lcls }
    }

    /// Lets everything happen that can, with messages under way or not.
    fn turn(&self, deliver: bool) {
        self.runtime.advance(std::time::Duration::from_millis(1));
        while let Some((from, to, message)) = deliver.then(|| self.messages.lock().pop_front()).flatten() {
            self.lcls[usize::from(to.0)].message(from, message).expect("both are correct");
            self.runtime.advance(std::time::Duration::from_millis(1));
        }
        self.lcls.iter().for_each(Lcl::assert_consistent);
    }

    /// Begins to ask for a lock; the answer when there is one.
    fn ask<T: Send + 'static>(&self, asked: BoxFuture<T>) -> Arc<Mutex<Option<T>>> {
        let answer = Arc::new(Mutex::new(None));
        let slot = answer.clone();
        self.runtime.spawn(Box::pin(async move {
            let value = asked.await;
            *slot.lock() = Some(value);
        }));
        answer
    }
}

/// Found by random operations on three simulated nodes, seed 126 of mfs/tests/stress.rs: a reader came while a try
/// for the exclusive lock was on its way to the master and back, and stood behind it. The try was refused and went;
/// nobody looked at the reader again, who could have had the lock all the time. He kept what he held already, and
/// three nodes stood still.
#[test]
fn who_stood_behind_a_try_gets_in_when_it_is_refused() {
    let pair = Pair::new();
    let acquire = |node: usize, mode| {
        let lcl = pair.lcls[node].clone();
        pair.ask(Box::pin(async move { lcl.acquire(RES, mode, Scope::Process).await.unwrap() }))
    };
    let (there, here) = (acquire(1, Mode::PR), acquire(0, Mode::PR));
    pair.turn(true);
    assert!(there.lock().is_some());
    drop(here.lock().take().expect("readers share"));

    let lcl = pair.lcls[0].clone();
    let tried =
        pair.ask(Box::pin(async move { lcl.try_acquire(RES, Mode::EX, Scope::Process).await.unwrap() }));
    pair.turn(false);
    let behind = acquire(0, Mode::PR);
    pair.turn(false);
    assert!(behind.lock().is_none(), "nobody overtakes");
    pair.turn(true);
    assert!(tried.lock().take().expect("it is answered").is_none(), "the other node reads");
    assert!(behind.lock().is_some(), "the lock is here, and nobody is in the way");
}
