//! What can be seen from outside (DLM-7): resources, holders, waiters, and who waits for whom.

use std::time::Duration;

use storage_control::{Incarnation, Instant, NodeId};

use crate::core::Dlm;
use crate::queues::{Open, Queues};
use crate::{Mode, Resource};

/// A resource at its master.
#[derive(Clone, PartialEq, Debug)]
pub struct ResourceInfo {
    /// Its name.
    pub res: Resource,
    /// Who holds it, departed nodes included.
    pub holders: Vec<HolderInfo>,
    /// Who waits for it, in the order of granting.
    pub waiters: Vec<WaiterInfo>,
    /// Writes of the value block, if it is valid.
    pub value_sequence: Option<u64>,
    /// Nothing is granted before reports or recoveries are in.
    pub held_back: bool,
}

/// A granted lock.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct HolderInfo {
    /// The holder.
    pub node: NodeId,
    /// Its mode.
    pub mode: Mode,
    /// For how long.
    pub age: Duration,
    /// Set where the holder is an excluded incarnation that waits for its fence or recovery.
    pub departed: Option<Incarnation>,
}

/// A request that waits.
#[derive(Clone, PartialEq, Debug)]
pub struct WaiterInfo {
    /// Who asks.
    pub node: NodeId,
    /// The mode it holds meanwhile.
    pub held: Mode,
    /// The mode it wants.
    pub want: Mode,
    /// For how long.
    pub age: Duration,
    /// The edges of the wait-for graph: holders in the way and requests before this one; departed nodes too.
    pub waits_for: Vec<NodeId>,
}

impl Dlm {
    /// Every resource mastered in this partition, by name.
    pub fn snapshot(&self, now: Instant) -> Vec<ResourceInfo> {
        let mut all: Vec<ResourceInfo> =
            self.queues.iter().map(|(res, queues)| info(now, *res, queues, self.open(res.shard))).collect();
        all.sort_by_key(|info| info.res);
        all
    }
}

fn info(now: Instant, res: Resource, queues: &Queues, open: Open) -> ResourceInfo {
    let mut holders: Vec<HolderInfo> = queues
        .locks
        .iter()
        .map(|lock| HolderInfo {
            node: lock.node,
            mode: lock.mode,
            age: now.since(lock.since),
            departed: None,
        })
        .chain(queues.ghosts.iter().map(|ghost| HolderInfo {
            node: ghost.node,
            mode: ghost.mode,
            age: now.since(ghost.since),
            departed: Some(ghost.incarnation),
        }))
        .collect();
    holders.sort_by_key(|holder| (holder.node, holder.departed));
    let mut waiters: Vec<WaiterInfo> = Vec::new();
    for waiter in queues.requests() {
        let mut waits_for: Vec<NodeId> = holders
            .iter()
            .filter(|holder| holder.departed.is_some() || holder.node != waiter.node)
            .filter(|holder| !holder.mode.compatible(waiter.want))
            .map(|holder| holder.node)
            .chain(waiters.iter().map(|ahead| ahead.node))
            .collect();
        waits_for.sort();
        waits_for.dedup();
        waiters.push(WaiterInfo {
            node: waiter.node,
            held: queues.held(waiter.node),
            want: waiter.want,
            age: now.since(waiter.since),
            waits_for,
        });
    }
    let value_sequence = queues.value.as_ref().filter(|_| queues.valid).map(|value| value.sequence);
    ResourceInfo { res, holders, waiters, value_sequence, held_back: open != Open::Yes }
}
