//! What nodes tell each other, and what the core asks of its driver.
//!
//! Always: every message names the generation it was sent in; every message to a master carries an operation
//! number that rises with each message of its sender's partition; every [`Body::Ask`] gets exactly one
//! [`Body::Granted`] or [`Body::Refused`] with its number, or a new view settles it.

use membership::SHARDS;
use serde::{Deserialize, Serialize};
use storage_control::{Generation, NodeId};

use crate::{Mode, PARTITIONS, Resource, Value, ValueBlock};

/// Number of one operation of one incarnation; later ones are larger.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct Op(pub u64);

/// Most entries in one [`Body::Report`]: 512 of at most about 130 bytes stay far below the frame's limit.
pub const REPORT_ENTRIES: usize = 512;

/// One message of the lock manager.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Message {
    /// The sender's view.
    pub generation: Generation,
    /// What it says.
    pub body: Body,
}

/// The messages, with their directions.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Body {
    /// To the master: I want this mode (a new lock, or a conversion of the one I hold).
    Ask {
        /// The resource.
        res: Resource,
        /// Number of this request.
        op: Op,
        /// The mode wanted; it covers the one held.
        want: Mode,
        /// Refuse rather than queue.
        no_queue: bool,
    },
    /// To the master: I no longer wait for request `ask`.
    Cancel {
        /// The resource.
        res: Resource,
        /// Number of this message.
        op: Op,
        /// The request to take out of the queue.
        ask: Op,
    },
    /// To the master: I went down to `to`; NL gives the lock back.
    Down {
        /// The resource.
        res: Resource,
        /// Number of this message.
        op: Op,
        /// The mode still held.
        to: Mode,
        /// The value block, if the holder of PW or EX wrote it.
        value: Option<ValueBlock>,
    },
    /// To the requester: request `op` is granted.
    Granted {
        /// The resource.
        res: Resource,
        /// The request.
        op: Op,
        /// The mode now held.
        mode: Mode,
        /// The value block, if valid.
        value: Option<Value>,
    },
    /// To the requester: request `op` is not granted and not queued; what was held is held.
    Refused {
        /// The resource.
        res: Resource,
        /// The request.
        op: Op,
        /// Why.
        why: Refusal,
    },
    /// To a holder: somebody waits for `wanted`, and your mode is in the way.
    Blocking {
        /// The resource.
        res: Resource,
        /// The mode wanted.
        wanted: Mode,
    },
    /// To every master after a new view: all that I hold and ask in the shards you master, in parts.
    Report {
        /// Of this partition.
        partition: u16,
        /// At most [`REPORT_ENTRIES`].
        entries: Vec<Entry>,
        /// The report is complete.
        last: bool,
    },
}

/// One lock in a report.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// The resource.
    pub res: Resource,
    /// The mode held.
    pub held: Mode,
    /// The value block as the holder knows it.
    pub value: Option<Value>,
    /// A request that waits.
    pub ask: Option<EntryAsk>,
}

/// A waiting request in a report.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct EntryAsk {
    /// Its number.
    pub op: Op,
    /// The mode wanted.
    pub want: Mode,
    /// How long it has waited, in milliseconds: decides its place among others' requests.
    pub waited_ms: u64,
}

/// Why a request was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Refusal {
    /// A no-queue request that could not be granted at once.
    Busy,
    /// Another conversion waits for this lock to go down: give up what is held, then ask anew.
    Deadlock,
    /// Cancelled by the requester.
    Cancelled,
}

/// What the driver must do; in the order given.
#[derive(Clone, PartialEq, Debug)]
pub enum Output {
    /// Queue a message for a member. Messages to one member of one partition must stay in order, and none may
    /// be lost while both keep the view.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: Message,
    },
    /// The node now holds `mode`.
    Granted {
        /// The resource.
        res: Resource,
        /// The mode held.
        mode: Mode,
        /// The value block, if valid.
        value: Option<Value>,
    },
    /// The request is over; what was held before is still held.
    Refused {
        /// The resource.
        res: Resource,
        /// Why.
        why: Refusal,
    },
    /// Somebody waits for `wanted`: give up as much as is in its way, as soon as decency allows.
    Blocking {
        /// The resource.
        res: Resource,
        /// The mode wanted.
        wanted: Mode,
    },
    /// A message kept for this view turned out to be one that no correct member sends.
    Fault {
        /// Its sender.
        from: NodeId,
        /// What is wrong.
        fault: Fault,
    },
}

/// A message that no correct member sends. The connection it came from is not to be used any longer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// The sender is no member of the view.
    #[error("lock message from node {0}, which is not a member")]
    NotMember(NodeId),
    /// A resource of a shard that cannot be, or of another partition.
    #[error("lock message about the impossible resource {0}")]
    BadResource(Resource),
    /// Sent to a node that does not master the shard.
    #[error("lock message for shard {0} to a node that is not its master")]
    NotMaster(u16),
    /// Answers and callbacks come from the shard's master alone.
    #[error("answer for shard {0} from a node that is not its master")]
    NotFromMaster(u16),
    /// What a message says cannot be true in the state its sender must be in.
    #[error("lock message that contradicts what its sender holds of {0}")]
    Contradiction(Resource),
    /// More messages of a later view than a member can have sent.
    #[error("too many lock messages of a view that is not here yet")]
    TooEarly,
    /// A report with too many entries.
    #[error("report of {0} entries")]
    TooLong(usize),
}

impl Message {
    /// The partition of the receiver's lock manager that this message is for. Any number may stand in a foreign
    /// message: the result is below [`PARTITIONS`], and the core refuses what does not fit.
    pub fn partition(&self) -> usize {
        match &self.body {
            Body::Ask { res, .. }
            | Body::Cancel { res, .. }
            | Body::Down { res, .. }
            | Body::Granted { res, .. }
            | Body::Refused { res, .. }
            | Body::Blocking { res, .. } => res.partition(),
            Body::Report { partition, .. } => usize::from(*partition) % PARTITIONS,
        }
    }
}

/// Whether the name can belong to this partition.
pub(crate) fn check_name(res: &Resource, partition: usize) -> Result<(), Fault> {
    if usize::from(res.shard) < SHARDS && res.partition() == partition {
        Ok(())
    } else {
        Err(Fault::BadResource(*res))
    }
}
