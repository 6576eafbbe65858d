//! What the lock manager needs of a view.

use std::collections::BTreeMap;

use membership::{FenceState, ShardMap, View};
use storage_control::{Generation, Incarnation, NodeId};

/// An excluded incarnation that is not recovered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Departed {
    /// The node.
    pub node: NodeId,
    /// The excluded incarnation.
    pub incarnation: Incarnation,
    /// Its fence is confirmed: it reads and writes no more.
    pub fenced: bool,
}

/// Members, masters and open recoveries of one generation.
#[derive(Clone, PartialEq, Debug)]
pub struct Epoch {
    /// The view's number.
    pub generation: Generation,
    /// Who may hold locks.
    pub members: BTreeMap<NodeId, Incarnation>,
    /// Who decides in which shard.
    pub shards: ShardMap,
    /// Whose locks wait.
    pub recoveries: Vec<Departed>,
}

impl Epoch {
    /// One member that masters everything.
    pub fn solo(me: NodeId, incarnation: Incarnation) -> Epoch {
        Epoch {
            generation: Generation(1),
            members: BTreeMap::from([(me, incarnation)]),
            shards: ShardMap::all_to(me),
            recoveries: Vec::new(),
        }
    }

    /// The member that masters a shard.
    pub fn master(&self, shard: u16) -> Option<NodeId> {
        self.shards.get(shard).filter(|node| self.members.contains_key(node))
    }
}

impl From<&View> for Epoch {
    fn from(view: &View) -> Epoch {
        Epoch {
            generation: view.generation,
            members: view.members.values().map(|member| (member.node, member.incarnation)).collect(),
            shards: view.shards.clone(),
            recoveries: view
                .recoveries
                .iter()
                .map(|recovery| Departed {
                    node: recovery.node,
                    incarnation: recovery.incarnation,
                    fenced: match recovery.state {
                        FenceState::FencePending => false,
                        FenceState::FencedDirty => true,
                    },
                })
                .collect(),
        }
    }
}
