//! What this node sees of the others, and what it makes of it.
//!
//! Silence counts only while this node itself could hear and read: after a stall of its own every window starts
//! anew. So a stall that everybody sees excludes nobody. A node alive on either network or disk is never judged
//! dead by silence on the other, except by a silence on disk that has outlived every lease.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use storage_control::{Generation, Incarnation, Instant, NodeId};

use super::clique;
use crate::message::NodeSet;
use crate::times::{BROKEN_MS, DISK_SILENCE_MS, HEARD_MS, SILENCE_MS, STALL_MS, ms};
use crate::view::{Fingerprint, View};

/// A claimed slot as it was read from the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSeen {
    /// Which slot.
    pub node: NodeId,
    /// The incarnation that claimed it.
    pub incarnation: Incarnation,
    /// Rises with every renewal.
    pub sequence: u64,
    /// Whom it hears.
    pub heard: NodeSet,
    /// Whether it calls itself healthy.
    pub healthy: bool,
    /// Its holder says that it has stopped writing for good.
    pub stopped: bool,
    /// Why this node could not fence it, if it could not.
    pub unfenceable: Option<String>,
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub addr: SocketAddr,
    /// The key it published.
    pub fingerprint: Fingerprint,
}

/// What is known of one other node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    pub(crate) slot: Option<SlotSeen>,
    changed: Instant,
    heard: Instant,
    pub(crate) connected: Option<Incarnation>,
    pub(crate) proven_dead: Option<Incarnation>,
    says: Option<Says>,
}

/// What a node last said of itself over the network.
#[derive(Clone, Copy, Debug)]
struct Says {
    incarnation: Incarnation,
    healthy: bool,
    names: Option<Generation>,
}

/// How a member looks from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Seen on the disk, heard on the network.
    Well,
    /// Alive on the disk, not heard on the network.
    Unheard,
    /// Not seen on the disk for longer than its lease, but heard.
    Stalled,
    /// Proven dead, stopped by its own word, replaced by a later incarnation, or silent for too long.
    Dead,
}

/// What this node makes of a view.
#[derive(Clone, Debug, Default)]
pub(crate) struct Judgement {
    /// Members that have to go.
    pub(crate) out: BTreeSet<NodeId>,
    /// This node is on the side that has to go: it decides nothing.
    pub(crate) losing: bool,
}

#[derive(Debug)]
pub(crate) struct Watch {
    me: NodeId,
    pub(crate) peers: BTreeMap<NodeId, Peer>,
    /// Nothing before this counts on the network.
    network_from: Instant,
    /// Nothing before this counts on the disk.
    disk_from: Instant,
    last_slots: Option<Instant>,
    last_step: Option<Instant>,
    broken: BTreeMap<(NodeId, NodeId), Instant>,
}

impl Watch {
    pub(crate) fn new(me: NodeId) -> Watch {
        Watch {
            me,
            peers: BTreeMap::new(),
            network_from: Instant(0),
            disk_from: Instant(0),
            last_slots: None,
            last_step: None,
            broken: BTreeMap::new(),
        }
    }

    /// To be called with every input: notices that this node itself was stopped.
    pub(crate) fn step(&mut self, now: Instant) {
        if self.last_step.is_none_or(|last| now.since(last) > ms(STALL_MS)) {
            self.network_from = now;
            self.disk_from = now;
            self.broken.clear();
        }
        self.last_step = Some(now);
    }

    /// All claimed slots, read completely.
    pub(crate) fn slots(&mut self, now: Instant, slots: Vec<SlotSeen>) {
        if self.last_slots.is_none_or(|last| now.since(last) > ms(STALL_MS)) {
            self.disk_from = now;
            self.broken.clear();
        }
        self.last_slots = Some(now);
        let claimed: BTreeSet<NodeId> = slots.iter().map(|slot| slot.node).collect();
        for (node, peer) in &mut self.peers {
            if !claimed.contains(node) {
                peer.slot = None;
            }
        }
        for slot in slots {
            let peer = self.peers.entry(slot.node).or_default();
            let same =
                |seen: &SlotSeen| (seen.incarnation, seen.sequence) == (slot.incarnation, slot.sequence);
            if !peer.slot.as_ref().is_some_and(same) {
                peer.changed = now;
            }
            peer.slot = Some(slot);
        }
    }

    pub(crate) fn connected(&mut self, now: Instant, node: NodeId, incarnation: Incarnation) {
        let peer = self.peers.entry(node).or_default();
        peer.connected = Some(incarnation);
        peer.heard = now;
    }

    /// Returns whether this connection was the current one.
    pub(crate) fn disconnected(&mut self, node: NodeId, incarnation: Incarnation) -> bool {
        match self.peers.get_mut(&node) {
            Some(peer) if peer.connected == Some(incarnation) => {
                peer.connected = None;
                true
            }
            _ => false,
        }
    }

    pub(crate) fn heard(&mut self, now: Instant, node: NodeId) {
        self.peers.entry(node).or_default().heard = now;
    }

    pub(crate) fn proven_dead(&mut self, node: NodeId, incarnation: Incarnation) {
        self.peers.entry(node).or_default().proven_dead = Some(incarnation);
    }

    /// What an incarnation says of its storage, and of the naming database.
    pub(crate) fn said(
        &mut self,
        (node, incarnation): (NodeId, Incarnation),
        healthy: bool,
        names: Option<Generation>,
    ) {
        self.peers.entry(node).or_default().says = Some(Says { incarnation, healthy, names });
    }

    fn says(&self, node: NodeId, incarnation: Incarnation) -> Option<Says> {
        self.peers.get(&node)?.says.filter(|says| says.incarnation == incarnation)
    }

    /// The version of the naming database that it says it knows.
    pub(crate) fn names_known(&self, node: NodeId, incarnation: Incarnation) -> Option<Generation> {
        self.says(node, incarnation)?.names
    }

    /// Whether it reaches the storage, by its own word and by what is seen from here (SMS-6).
    pub(crate) fn reaches_storage(&self, now: Instant, node: NodeId, incarnation: Incarnation) -> bool {
        if node == self.me {
            return self.healthy(now);
        }
        let well = self.standing(now, node, incarnation) == Standing::Well;
        well && self.says(node, incarnation).is_some_and(|says| says.healthy)
    }

    pub(crate) fn is_connected(&self, node: NodeId, incarnation: Incarnation) -> bool {
        self.peers.get(&node).is_some_and(|peer| peer.connected == Some(incarnation))
    }

    pub(crate) fn is_proven_dead(&self, node: NodeId, incarnation: Incarnation) -> bool {
        self.peers.get(&node).is_some_and(|peer| peer.proven_dead == Some(incarnation))
    }

    pub(crate) fn slot(&self, node: NodeId) -> Option<&SlotSeen> {
        self.peers.get(&node).and_then(|peer| peer.slot.as_ref())
    }

    /// Whether this node reads the slots in time.
    pub(crate) fn healthy(&self, now: Instant) -> bool {
        self.last_slots.is_some_and(|last| now.since(last) <= ms(STALL_MS))
    }

    fn hears(&self, now: Instant, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(|peer| {
            peer.connected.is_some() && now.since(peer.heard.max(self.network_from)) < ms(HEARD_MS)
        })
    }

    /// Whom this node hears: what it publishes in its slot and its heartbeats.
    pub(crate) fn hearing(&self, now: Instant) -> NodeSet {
        self.peers.keys().copied().filter(|node| self.hears(now, *node)).collect()
    }

    /// How one incarnation looks.
    pub(crate) fn standing(&self, now: Instant, node: NodeId, incarnation: Incarnation) -> Standing {
        let unknown = Peer::default();
        let peer = self.peers.get(&node).unwrap_or(&unknown);
        let over = |slot: &SlotSeen| {
            slot.incarnation > incarnation || (slot.stopped && slot.incarnation == incarnation)
        };
        if peer.slot.as_ref().is_some_and(over) || node == self.me || peer.proven_dead == Some(incarnation) {
            // Our own slot is ours: whoever had it before is an earlier incarnation.
            return Standing::Dead;
        }
        let unheard = now.since(peer.heard.max(self.network_from));
        let unseen = now.since(peer.changed.max(self.disk_from));
        if self.healthy(now) {
            if unseen >= ms(DISK_SILENCE_MS) || (unseen >= ms(SILENCE_MS) && unheard >= ms(SILENCE_MS)) {
                return Standing::Dead;
            }
            if unseen >= ms(SILENCE_MS) {
                return Standing::Stalled;
            }
        }
        if self.hears(now, node) { Standing::Well } else { Standing::Unheard }
    }

    /// Judges a view of which this node is a member.
    pub(crate) fn judge(&mut self, now: Instant, view: &View) -> Judgement {
        let (dead, alive): (BTreeSet<NodeId>, BTreeSet<NodeId>) =
            view.members.values().map(|member| member.node).partition(|node| {
                *node != self.me
                    && self.standing(now, *node, view.members[node].incarnation) == Standing::Dead
            });
        self.note_broken(now, &alive);
        let broken = self
            .broken
            .iter()
            .filter(|(_, since)| now.since(**since) >= ms(BROKEN_MS))
            .map(|(pair, _)| *pair);
        let kept = clique::keep(&alive, &broken.collect(), view.adm);
        if !kept.contains(&self.me) {
            return Judgement { out: BTreeSet::new(), losing: true };
        }
        let out = dead.into_iter().chain(alive.difference(&kept).copied()).collect();
        Judgement { out, losing: false }
    }

    /// Keeps the time since when each pair of living members does not hear each other, by either's account.
    fn note_broken(&mut self, now: Instant, alive: &BTreeSet<NodeId>) {
        let hearing: BTreeMap<NodeId, NodeSet> = alive
            .iter()
            .map(|node| match self.slot(*node) {
                _ if *node == self.me => (*node, self.hearing(now)),
                Some(slot) => (*node, slot.heard),
                None => (*node, NodeSet::default()),
            })
            .collect();
        let mut broken = BTreeMap::new();
        for a in alive {
            for b in alive.range(NodeId(a.0 + 1)..) {
                if !(hearing[a].contains(*b) && hearing[b].contains(*a)) {
                    let since = self.broken.get(&(*a, *b)).copied().unwrap_or(now);
                    broken.insert((*a, *b), since);
                }
            }
        }
        self.broken = broken;
    }
}
