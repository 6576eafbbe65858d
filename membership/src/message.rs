//! What members tell each other on the membership channel.
//!
//! A message is never the only source of a decision: views come from the register (and are repeated here to save
//! the others a read), everything else is asked for again until the register shows its effect.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use storage_control::{Generation, Incarnation, NodeId};

use crate::view::{BadView, Fingerprint, MAX_MEMBERS, MAX_NAME, View};

/// A set of nodes, one bit per slot.
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeSet(pub [u64; MAX_MEMBERS / 64]);

impl NodeSet {
    /// Adds a node; a number past the last slot is in no set.
    pub fn insert(&mut self, node: NodeId) {
        if let Some(word) = self.0.get_mut(usize::from(node.0) / 64) {
            *word |= 1 << (node.0 % 64);
        }
    }

    /// Whether the node is in the set.
    pub fn contains(&self, node: NodeId) -> bool {
        self.0.get(usize::from(node.0) / 64).is_some_and(|word| word >> (node.0 % 64) & 1 == 1)
    }

    /// The nodes in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        (0..MAX_MEMBERS as u16).map(NodeId).filter(|node| self.contains(*node))
    }
}

impl FromIterator<NodeId> for NodeSet {
    fn from_iter<I: IntoIterator<Item = NodeId>>(nodes: I) -> NodeSet {
        let mut set = NodeSet::default();
        nodes.into_iter().for_each(|node| set.insert(node));
        set
    }
}

impl fmt::Debug for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|node| node.0)).finish()
    }
}

/// What a node says of itself when it wants to be admitted. The same facts stand in its slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applicant {
    /// Its slot.
    pub node: NodeId,
    /// This start of its daemon.
    pub incarnation: Incarnation,
    /// Its name.
    pub name: String,
    /// Where its interconnect listens.
    pub addr: SocketAddr,
    /// Its key.
    pub fingerprint: Fingerprint,
}

/// Why a node is not admitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The key in the request, in the connection and in the slot are not one and the same.
    #[error(
        "the key is not the one published in the node's slot: another daemon uses this slot, or the request is forged"
    )]
    WrongKey,
    /// The applicant's register is not ours: a clone, a snapshot, or a rolled-back device.
    #[error(
        "the node's view of the disk has generation {theirs}, this matrix {ours}: not the same disk, or an old copy of it"
    )]
    WrongGeneration {
        /// What the applicant read.
        theirs: Generation,
        /// What the ADM knows.
        ours: Generation,
    },
    /// Every slot's worth of members is there.
    #[error("the matrix has {0} members, as many as the format allows")]
    Full(u16),
    /// The applicant itself says that it is not well.
    #[error("the node is not healthy: it does not reach its storage in time")]
    Unhealthy,
    /// No version of the protocol in common.
    #[error("the node speaks protocol version {theirs}, this matrix {ours}")]
    UnknownVersion {
        /// The applicant's.
        theirs: u16,
        /// The ADM's.
        ours: u16,
    },
    /// An earlier incarnation of the same node is not recovered yet. Try again.
    #[error("the node's former incarnation {0} is still being fenced and recovered")]
    FormerPending(Incarnation),
    /// The recovery of an earlier incarnation failed. The operator must act.
    #[error("the recovery of the node's former incarnation {0} failed: the filesystem needs fsck")]
    FormerFailed(Incarnation),
    /// All journals are in use and another could not be made.
    #[error("no journal could be made for the node: {0}")]
    NoJournal(String),
    /// Another live daemon has this name.
    #[error("a member is called {0} already: choose another name with --node")]
    NameTaken(String),
    /// The one asked is not the ADM. Try again.
    #[error("the node asked is not the ADM")]
    NotAdm,
    /// No fencing method reaches the node: a second writer is not let in (SCL-2).
    #[error("the node could not be fenced if it failed: {0}")]
    NoFence(String),
    /// This incarnation was a member before.
    #[error("this start of the daemon was a member and was excluded: start it again")]
    Ended,
    /// The applicant has not found the devices of the current naming database. Try again.
    #[error("the node knows the devices of generation {theirs}, this matrix has those of generation {ours}")]
    NamesUnknown {
        /// The version it knows.
        theirs: Generation,
        /// The ADM's.
        ours: Generation,
    },
}

impl Refusal {
    /// Whether trying again may help without anybody acting.
    pub fn is_transient(&self) -> bool {
        match self {
            Refusal::FormerPending(_)
            | Refusal::NotAdm
            | Refusal::Unhealthy
            | Refusal::NamesUnknown { .. } => true,
            Refusal::WrongKey
            | Refusal::WrongGeneration { .. }
            | Refusal::Full(_)
            | Refusal::UnknownVersion { .. }
            | Refusal::FormerFailed(_)
            | Refusal::NoJournal(_)
            | Refusal::NoFence(_)
            | Refusal::Ended
            | Refusal::NameTaken(_) => false,
        }
    }
}

/// A message on the membership channel. New cases are added at the end: the position is the number on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Everybody to everybody they are connected to, twice a second.
    Heartbeat {
        /// The sequence of the register that the sender knows.
        sequence: u64,
        /// Whom the sender hears over the network.
        heard: NodeSet,
        /// Whether its storage answers in time.
        healthy: bool,
        /// The version of the naming database that it knows, if it knows one.
        names: Option<Generation>,
    },
    /// An applicant to the ADM.
    Join {
        /// Who asks.
        applicant: Applicant,
        /// Its protocol version.
        version: u16,
        /// The generation that it read from its own device.
        generation: Generation,
        /// Whether its storage answers in time.
        healthy: bool,
        /// The version of the naming database of which it has found every device.
        names: Generation,
    },
    /// The ADM to an applicant.
    Refused(Refusal),
    /// The register's content at a sequence, after it was committed.
    Register {
        /// Its sequence.
        sequence: u64,
        /// Its body.
        view: Box<View>,
    },
    /// A member that has given up its locks and emptied its journal, to the ADM.
    Leave,
    /// A member to the ADM: this incarnation of that node is proven dead (SCL-2, same-host proof).
    Dead {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
    },
    /// A replayer to the ADM.
    Replayed {
        /// Whose journal it was.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// What went wrong, if something did.
        failure: Option<String>,
    },
    /// The coordinator to its choice of candidate (SMS-6).
    Nominate {
        /// The generation of the view whose ADM is lost.
        generation: Generation,
    },
    /// The candidate to the coordinator: it has taken this generation in the register.
    Elected {
        /// The generation taken.
        generation: Generation,
    },
    /// The coordinator to the candidate: commit.
    Permit {
        /// The generation taken.
        generation: Generation,
    },
    /// The coordinator to the candidate: give up.
    Undo {
        /// The generation taken.
        generation: Generation,
    },
    /// A member to the ADM: messages of this generation may be lost, a new view of the same members is wanted.
    Lost {
        /// The generation.
        generation: Generation,
    },
}

impl Message {
    /// What decoding cannot see.
    pub fn check(&self) -> Result<(), BadView> {
        match self {
            Message::Register { view, .. } => view.check(),
            Message::Join { applicant, .. } if applicant.name.len() > MAX_NAME => {
                Err(BadView("too long a name"))
            }
            Message::Join { applicant, .. } if usize::from(applicant.node.0) >= MAX_MEMBERS => {
                Err(BadView("a node number past the last slot"))
            }
            Message::Heartbeat { .. }
            | Message::Join { .. }
            | Message::Refused(_)
            | Message::Leave
            | Message::Dead { .. }
            | Message::Replayed { .. }
            | Message::Nominate { .. }
            | Message::Elected { .. }
            | Message::Permit { .. }
            | Message::Undo { .. }
            | Message::Lost { .. } => Ok(()),
        }
    }
}
