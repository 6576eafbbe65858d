//! What the core is told, and what it says.

use std::sync::Arc;

use storage_control::{Generation, Incarnation, NodeId};

use super::watch::{SlotSeen, Standing};
use crate::message::{Message, Refusal};
use crate::view::View;

/// Something that happened. The first two answer outputs; each such output is answered exactly once.
#[derive(Clone, Debug)]
pub enum Input {
    /// Answers [`Output::Cas`].
    CasDone(CasOutcome),
    /// Answers [`Output::ReadRegister`] with the register's content; `None` if it could not be read.
    RegisterRead(Option<(u64, Arc<View>)>),
    /// All claimed slots but our own, from one complete read. To be given at least every `HEARTBEAT_MS`; nothing is
    /// given when the read fails.
    Slots(Vec<SlotSeen>),
    /// A slot's `register sequence` or a look at the register's blocks shows that there is something newer.
    RegisterMoved,
    /// The handshake with this incarnation succeeded.
    Connected {
        /// The node.
        node: NodeId,
        /// Its incarnation, by its certificate and its slot.
        incarnation: Incarnation,
    },
    /// Its connection ended. To be given at once.
    Disconnected {
        /// The node.
        node: NodeId,
        /// The incarnation that was connected.
        incarnation: Incarnation,
    },
    /// A message on the membership channel from a connected incarnation.
    Received {
        /// Who sent it.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// What it says.
        message: Message,
    },
    /// Answers [`Output::Probe`] where there is a proof: the process is gone, and its writes with it.
    ProvenDead {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
    },
    /// Answers [`Output::Fence`]: confirmed, or why not.
    FenceDone {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// Confirmed, or the reason.
        result: Result<(), String>,
    },
    /// Answers [`Output::Replay`].
    ReplayDone {
        /// Whose journal it was.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// Replayed and stable, or the reason.
        result: Result<(), String>,
    },
    /// Answers [`Output::MakeJournal`].
    JournalMade {
        /// The journal.
        index: u16,
        /// Made and stable, or the reason.
        result: Result<(), String>,
    },
    /// Answers [`Output::FindDevices`].
    DevicesFound {
        /// The version of the naming database.
        version: Generation,
        /// Every device of it is here, or what is wrong.
        result: Result<(), String>,
    },
    /// The lease ran out although the slot was renewed again since. While this is open the gate stays shut.
    LeaseLapsed,
    /// The operator unmounts: locks are given up, the journal is empty.
    Leave,
    /// Time passes. To be given at least every 100 ms.
    Tick,
}

/// How a compare-and-set ended.
#[derive(Clone, Debug)]
pub enum CasOutcome {
    /// The register holds our view, under this sequence.
    Committed(u64),
    /// It holds something else.
    Conflict(u64, Arc<View>),
    /// Nobody knows.
    Unknown,
}

/// Something to do. Outputs are to be carried out in order; those that take time (`ReadRegister`, `Cas`, `Probe`,
/// `Fence`, `Replay`, `MakeJournal`, `FindDevices`) are started in order and run beside the others.
#[derive(Clone, Debug)]
pub enum Output {
    /// Read the register with a completed ballot that begins after this output.
    ReadRegister,
    /// Write the register if its sequence is still this one.
    Cas {
        /// The sequence on which the view was made.
        expected: u64,
        /// What it shall hold.
        view: Arc<View>,
    },
    /// This view is committed and has this node in it. The lock manager must have it BEFORE any message of its
    /// generation is given to it, and BEFORE any output that follows this one.
    InstallView(Arc<View>),
    /// An incarnation that was in an installed view can no longer write, or has left in order.
    Fenced {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
    },
    /// Its journal is replayed as well: its locks are free. Comes AFTER the `Fenced` of the same incarnation.
    Recovered {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
    },
    /// Send, if it is connected; losing it does no harm.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: Message,
    },
    /// Look for a proof that this incarnation is dead, without killing or waiting for anything.
    Probe {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
    },
    /// Cut this incarnation off the devices. The register already says that it is excluded.
    Fence {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
    },
    /// Replay this journal. The register already says that its owner is fenced, and names this node. Comes only when the
    /// one before is answered.
    Replay {
        /// Whose it was.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// Its number.
        journal: u16,
    },
    /// Make a journal; it may exist already, from a try whose end nobody saw.
    MakeJournal {
        /// Its number.
        index: u16,
    },
    /// Find every device of this view's naming database, by the id in its label.
    FindDevices(Arc<View>),
    /// The lapsed lease may be taken up again: a completed ballot that began after the lapse shows this incarnation a
    /// member still.
    ReviveLease,
    /// Stop: shut the gate for good, wake all waiters with errors. Nothing follows this.
    CloseGate(CloseReason),
    /// This node has left in order; the slot may be given back. Nothing follows this.
    Left,
    /// The join was refused for good. Nothing follows this.
    Refused(Refusal),
    /// Something that a person should know.
    Notice(Notice),
}

/// Why this node must stop.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The others go on without it.
    #[error("this node was excluded from the matrix in generation {0}")]
    Excluded(Generation),
    /// A journal could not be replayed by the first node to mount.
    #[error("journal {journal} of node {node} could not be replayed: run matrix fsck")]
    Unrecoverable {
        /// Whose it was.
        node: NodeId,
        /// Its number.
        journal: u16,
    },
    /// A device of the matrix is not here, or what was to be mounted is none.
    #[error("{0}")]
    Devices(String),
    /// The filesystem has no journal at all.
    #[error("the filesystem has no clean journal and no node that could make one: run matrix fsck")]
    NoJournal,
}

/// What a person should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Waiting for another node that is forming the matrix.
    WaitingForFormer(NodeId),
    /// Waiting to be admitted by this ADM, to which there is no connection yet.
    WaitingForAdm(NodeId),
    /// Refused for now; asked again.
    NotYet(Refusal),
    /// A device of the current naming database is not here: this node cannot become ADM. Looked for again.
    DevicesMissing(String),
    /// The ADM is lost, and no member is known to know the naming database.
    NoCandidate,
    /// Members were excluded.
    Excluding(Vec<NodeId>),
    /// A fence failed; it is tried again.
    FenceFailed {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// Why.
        why: String,
    },
    /// A journal could not be replayed; its locks stay locked (MFS-5).
    ReplayFailed {
        /// Whose it was.
        node: NodeId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// Why, where it was this node that tried.
        why: String,
    },
}

/// Where this node stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The register is not read yet.
    Starting,
    /// Not a member: asking to join, or forming.
    Outside,
    /// A member.
    Member,
    /// A member that is leaving.
    Leaving,
    /// Stopped, left or refused.
    Over,
}

/// For `status`.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Where this node stands.
    pub phase: Phase,
    /// The register's sequence and content as last known.
    pub register: Option<(u64, Arc<View>)>,
    /// How every other member looks.
    pub standings: Vec<(NodeId, Standing)>,
    /// The members that are known to know the current naming database, this node among them.
    pub knowing: Vec<NodeId>,
    /// The node that decides what is decided without the ADM.
    pub coordinator: Option<NodeId>,
}
