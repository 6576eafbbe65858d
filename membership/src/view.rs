//! A view: the agreed members, what each masters, whose recovery is open, and what the devices are called. The body of
//! the quorum register.
//!
//! Always (checked by [`View::check`] on every body read and every body written):
//! - every journal that exists is used by one member, or waits for one recovery, or is clean: never two of these;
//! - an incarnation is in recovery at most once, and no node with an open recovery is a member;
//! - an incarnation that was let in once is in `past` for good, and is never let in again;
//! - the ADM is a member wherever there are members, and each of them masters its share of the shards;
//! - every device has one name, and every name one device (see [`NamingDatabase`]);
//! - a change of members, shards, ADM or devices is a new generation; progress of a fence or replay is not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use storage_control::{Generation, Incarnation, NodeId};

use crate::devices::NamingDatabase;
use crate::shards::{SHARDS, ShardMap, ShardSet};

/// Most members a view may have; also the bound of node numbers (slots of the largest quorum region).
pub const MAX_MEMBERS: usize = 256;
/// Longest name of a node, in bytes.
pub const MAX_NAME: usize = 64;
/// Most journals a filesystem may have: one per member and one per open recovery at most.
pub const MAX_JOURNALS: u16 = 1024;

/// SHA-256 of a node's TLS public key certificate.
pub type Fingerprint = [u8; 32];

/// One node that belongs to the matrix and has the filesystem mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its slot.
    pub node: NodeId,
    /// Which start of its daemon.
    pub incarnation: Incarnation,
    /// What people call it.
    pub name: String,
    /// Where its interconnect listens.
    pub addr: SocketAddr,
    /// The only key its peers accept from it.
    pub fingerprint: Fingerprint,
    /// The journal it writes.
    pub journal: u16,
}

/// How far the recovery of an excluded incarnation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FenceState {
    /// It may still be writing.
    FencePending,
    /// It cannot write any more; its journal is not replayed.
    FencedDirty,
}

/// An excluded incarnation whose journal is not yet replayed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// The excluded node.
    pub node: NodeId,
    /// The excluded incarnation.
    pub incarnation: Incarnation,
    /// Its journal; `None` for a former that died before it had one.
    pub journal: Option<u16>,
    /// Fence confirmed or not.
    pub state: FenceState,
    /// Which incarnation replays the journal. A replayer that is itself excluded stays named until its own fence
    /// is confirmed: until then it may still be writing the journal's blocks.
    pub replayer: Option<(NodeId, Incarnation)>,
    /// The replay failed: this recovery stays open, its locks stay locked, the operator is told (MFS-5).
    pub failed: bool,
    /// The shards it mastered: what they may have granted is known only after its recovery.
    pub shards: ShardSet,
}

/// A node on its way to become the ADM, or the first member, under a generation that is taken in any case (SMS-6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// The candidate.
    pub node: NodeId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// The generation that its view will have.
    pub generation: Generation,
}

/// The agreed state of a matrix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Number of this view; views with a larger number are later.
    pub generation: Generation,
    /// The largest generation ever taken, by views and candidates. Never used again.
    pub burnt: Generation,
    /// The SAN administrator; without meaning while there are no members.
    pub adm: NodeId,
    /// An election, or a forming, in progress.
    pub candidate: Option<Candidate>,
    /// The devices of the matrix and their names.
    pub names: NamingDatabase,
    /// Everybody who may write, by slot.
    pub members: BTreeMap<NodeId, Member>,
    /// Who masters which shard.
    pub shards: ShardMap,
    /// Excluded incarnations that are not recovered, in the order of their exclusion.
    pub recoveries: Vec<Recovery>,
    /// How many journals exist: numbers below are made.
    pub journals: u16,
    /// The last incarnation of each node that was a member or a former. One that was stopped while it was admitted,
    /// excluded and recovered learns here that its time is over.
    pub past: BTreeMap<NodeId, Incarnation>,
}

/// Why bytes that decode are still no view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a possible view: {0}")]
pub struct BadView(pub &'static str);

impl View {
    /// The view of a filesystem that nobody has mounted yet, with `journals` clean journals, on these devices.
    pub fn empty(journals: u16, names: NamingDatabase) -> View {
        View {
            generation: Generation(0),
            burnt: Generation(0),
            adm: NodeId(0),
            candidate: None,
            names,
            members: BTreeMap::new(),
            shards: ShardMap::all_to(NodeId(0)),
            recoveries: Vec::new(),
            journals,
            past: BTreeMap::new(),
        }
    }

    /// The master of a shard; `None` where nobody is a member, or past the last shard.
    pub fn master(&self, shard: u16) -> Option<NodeId> {
        self.shards.get(shard).filter(|node| self.members.contains_key(node))
    }

    /// The member in this slot.
    pub fn member(&self, node: NodeId) -> Option<&Member> {
        self.members.get(&node)
    }

    /// Whether exactly this incarnation is a member.
    pub fn is_member(&self, node: NodeId, incarnation: Incarnation) -> bool {
        self.member(node).is_some_and(|member| member.incarnation == incarnation)
    }

    /// Whether this incarnation, or a later one of the node, was ever let in.
    pub fn was_in(&self, node: NodeId, incarnation: Incarnation) -> bool {
        self.past.get(&node).is_some_and(|last| *last >= incarnation)
    }

    /// The open recovery of exactly this incarnation.
    pub fn recovery(&self, node: NodeId, incarnation: Incarnation) -> Option<&Recovery> {
        self.recoveries.iter().find(|r| r.node == node && r.incarnation == incarnation)
    }

    /// The journals that no member uses and no recovery waits for, ascending.
    pub fn clean_journals(&self) -> impl Iterator<Item = u16> + '_ {
        (0..self.journals).filter(|index| {
            self.members.values().all(|member| member.journal != *index)
                && self.recoveries.iter().all(|recovery| recovery.journal != Some(*index))
        })
    }

    /// The shards that must wait: some open recovery's node mastered them.
    pub fn waiting_shards(&self) -> ShardSet {
        (0..SHARDS as u16)
            .filter(|shard| self.recoveries.iter().any(|recovery| recovery.shards.contains(*shard)))
            .collect()
    }

    /// The invariants of the module's header.
    pub fn check(&self) -> Result<(), BadView> {
        let bad = |why| Err(BadView(why));
        if self.members.len() > MAX_MEMBERS || self.recoveries.len() > MAX_MEMBERS {
            return bad("more nodes than slots");
        }
        if self.past.len() > MAX_MEMBERS
            || self.members.values().any(|m| self.past.get(&m.node) != Some(&m.incarnation))
        {
            return bad("a member that is not the last of its node");
        }
        if self.journals > MAX_JOURNALS {
            return bad("more journals than can be");
        }
        if self.burnt < self.generation {
            return bad("a generation that was never taken");
        }
        if self.candidate.is_some_and(|c| c.generation > self.burnt || c.generation <= self.generation) {
            return bad("a candidate's generation is not taken, or not newer");
        }
        self.names.check(self.generation)?;
        if !self.members.is_empty() && !self.members.contains_key(&self.adm) {
            return bad("the ADM is not a member");
        }
        if self.members.iter().any(|(node, member)| {
            *node != member.node || usize::from(node.0) >= MAX_MEMBERS || member.name.len() > MAX_NAME
        }) {
            return bad("a member under another's number, or with too long a name");
        }
        let mut journals = BTreeSet::new();
        let used =
            self.members.values().map(|m| m.journal).chain(self.recoveries.iter().filter_map(|r| r.journal));
        for journal in used {
            if journal >= self.journals || !journals.insert(journal) {
                return bad("a journal that does not exist or has two uses");
            }
        }
        let mut dead = BTreeSet::new();
        for recovery in &self.recoveries {
            if self.members.contains_key(&recovery.node)
                || !dead.insert((recovery.node, recovery.incarnation))
            {
                return bad("a node in recovery twice, or member as well");
            }
        }
        if !self.members.is_empty() {
            let (each, over) = (SHARDS / self.members.len(), SHARDS % self.members.len());
            let fair = self.members.keys().all(|node| {
                let count = self.shards.of(*node).len();
                count == each || (over > 0 && count == each + 1)
            });
            if !fair {
                return bad("shards that are not dealt evenly");
            }
        }
        Ok(())
    }
}
