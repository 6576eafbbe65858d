//! Keeping a slot: renewals, and the lease that follows from them.
//!
//! - Every renewal first looks: another nonce in the slot, or another file system on the device, closes the gate.
//! - A slot is renewed only by a node that knows the newest value of the register: an excluded node falls silent.
//! - The lease is extended from before the write was issued, and only for an admitted node.
//! - The register may be written for as long as nobody can have claimed the slot since its last renewal.
//! - A lease that ran out is not extended by a renewal alone, but after a ballot said that the node is a member.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::area::{Look, SlotArea};
use super::claim::SlotLocks;
use super::record::{PeerSet, SlotRecord, SlotState};
use crate::gate::{CloseReason, Gate};
use crate::ids::{Clock, Incarnation, NodeId};
use crate::label::LabelError;
use crate::lease::{LeaseTimes, STALL_MS};
use crate::runtime::Instant;
use crate::turn::Turns;

/// Looks whose write was delayed for too long are repeated so often.
const MAX_LOOKS: u32 = 3;

/// What a node tells the others with a renewal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Beat {
    /// Its Lamport clock.
    pub clock: Clock,
    /// Nothing in its journal is older.
    pub journal_tail: Clock,
    /// Peers it hears.
    pub heard: PeerSet,
    /// 0: healthy.
    pub health: u32,
}

/// How a renewal ended.
#[derive(Clone, Debug)]
pub enum Renewed {
    /// The slot is renewed; the lease, if the node is admitted, lasts until `until`.
    Renewed {
        /// What the look before it showed.
        look: Look,
        /// When the lease runs out; `None` before admission.
        until: Option<Instant>,
    },
    /// The lease is NOT renewed: the register has a newer value than this node knows. Read it, act on it, then
    /// [`SlotKeeper::acknowledge`] its sequence and renew again.
    Behind {
        /// What the look showed.
        look: Look,
    },
    /// The slot is renewed, but the lease had run out. Only [`SlotKeeper::revive`] brings it back.
    Expired {
        /// What the look before it showed.
        look: Look,
    },
}

/// Why a renewal failed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The gate is closed, perhaps just now.
    #[error("{0}")]
    Closed(CloseReason),
    /// The device did not answer as it should. Try again: the lease decides how often.
    #[error("renewing the slot: {0}")]
    Io(#[from] io::Error),
    /// The label could not be read.
    #[error("renewing the slot: {0}")]
    Label(LabelError),
    /// The machine was too slow between looking and writing.
    #[error("renewing the slot: this node was stopped between its look and its write")]
    Delayed,
}

struct Kept {
    record: SlotRecord,
    /// The newest sequence of the register that the node has acted upon.
    acknowledged: u64,
    admitted: bool,
    /// Before the last renewal's write was issued.
    renewed_from: Option<Instant>,
}

/// A claimed slot. Cloning gives another handle.
#[derive(Clone)]
pub struct SlotKeeper {
    area: SlotArea,
    gate: Gate,
    locks: Arc<dyn SlotLocks>,
    kept: Arc<Mutex<Kept>>,
    turns: Turns,
}

impl SlotKeeper {
    pub(super) fn new(
        area: SlotArea,
        gate: Gate,
        locks: Arc<dyn SlotLocks>,
        record: SlotRecord,
    ) -> SlotKeeper {
        let kept = Kept { record, acknowledged: 0, admitted: false, renewed_from: None };
        SlotKeeper { area, gate, locks, kept: Arc::new(Mutex::new(kept)), turns: Turns::default() }
    }

    /// The slot's number: the node's id.
    pub fn node(&self) -> NodeId {
        self.kept.lock().record.node
    }

    /// This claim's incarnation.
    pub fn incarnation(&self) -> Incarnation {
        self.kept.lock().record.incarnation
    }

    /// The record as it was written last.
    pub fn record(&self) -> SlotRecord {
        self.kept.lock().record.clone()
    }

    /// The region the slot lies in.
    pub fn area(&self) -> &SlotArea {
        &self.area
    }

    /// The node has read this value of the register, committed, and acted upon it.
    pub fn acknowledge(&self, sequence: u64) {
        let mut kept = self.kept.lock();
        kept.acknowledged = kept.acknowledged.max(sequence);
    }

    /// The register's committed value says that this incarnation is a member: from the next renewal on it
    /// has a lease.
    pub fn admit(&self) {
        self.kept.lock().admitted = true;
    }

    /// Renews the slot once. The caller repeats it every [`LeaseTimes::RENEW_EVERY`].
    pub async fn renew(&self, beat: Beat) -> Result<Renewed, RenewError> {
        let _turn = self.turns.take().await;
        for _ in 0..MAX_LOOKS {
            let look = self.look().await?;
            let (behind, mut record) = {
                let kept = self.kept.lock();
                (kept.admitted && look.head.sequence > kept.acknowledged, kept.record.clone())
            };
            if behind && self.gate.check_register().is_ok() {
                return Ok(Renewed::Behind { look });
            }
            record.state = SlotState::Held;
            record.sequence += 1;
            record.clock = beat.clock;
            record.journal_tail = beat.journal_tail;
            record.heard = beat.heard;
            record.health = beat.health;
            let from = self.area.runtime.now();
            if from.since(look.issued) > Duration::from_millis(STALL_MS) {
                // What the look showed may be over.
                continue;
            }
            self.area.write(&record).await?;
            // Whoever wants the slot has seen this change, and waits from then on.
            self.gate.extend_slot(LeaseTimes::holder_deadline(from));
            if behind {
                // Without access to the register the node could never find out what it is behind of.
                self.kept.lock().record = record;
                return Ok(Renewed::Behind { look });
            }
            return Ok(self.renewed(record, from, look));
        }
        Err(RenewError::Delayed)
    }

    fn renewed(&self, record: SlotRecord, from: Instant, look: Look) -> Renewed {
        let now = self.area.runtime.now();
        let mut kept = self.kept.lock();
        kept.record = record;
        kept.renewed_from = Some(from);
        if !kept.admitted {
            return Renewed::Renewed { look, until: None };
        }
        if self.gate.lease_until().is_some_and(|until| until <= now) {
            return Renewed::Expired { look };
        }
        let until = LeaseTimes::holder_deadline(from);
        self.gate.extend_lease(until);
        Renewed::Renewed { look, until: Some(until) }
    }

    /// After [`Renewed::Expired`]: a completed ballot, begun after `ballot_begun`, says that this incarnation is
    /// still a member and not to be fenced. Returns whether the lease is valid again; if not, renew once more.
    pub fn revive(&self, ballot_begun: Instant) -> bool {
        let renewed_from = self.kept.lock().renewed_from;
        let Some(from) = renewed_from.map(|from| from.min(ballot_begun)) else { return false };
        self.gate.extend_lease(LeaseTimes::holder_deadline(from));
        self.gate.check().is_ok()
    }

    /// Looks, and checks that the slot is still this node's.
    async fn look(&self) -> Result<Look, RenewError> {
        if let Some(reason) = self.gate.closed() {
            return Err(RenewError::Closed(reason));
        }
        let look = match self.area.look().await {
            Ok(look) => look,
            Err(LabelError::Io(error)) => return Err(error.into()),
            Err(LabelError::ForeignFilesystem { .. } | LabelError::NotMatrix { .. }) => {
                return Err(self.close(CloseReason::ForeignFilesystem));
            }
            Err(LabelError::ForeignDevice { .. }) => return Err(self.close(CloseReason::ForeignDevice)),
            Err(
                error @ (LabelError::Corrupt(_)
                | LabelError::NewerVersion { .. }
                | LabelError::OlderVersion { .. }
                | LabelError::Truncated { .. }),
            ) => {
                return Err(RenewError::Label(error));
            }
        };
        let (node, nonce) = {
            let kept = self.kept.lock();
            (kept.record.node, kept.record.nonce)
        };
        match look.record(node) {
            Some(found) if found.nonce == nonce => Ok(look),
            Some(_) | None => Err(self.close(CloseReason::SlotTaken)),
        }
    }

    fn close(&self, reason: CloseReason) -> RenewError {
        self.gate.close(reason);
        RenewError::Closed(self.gate.closed().expect("the gate was closed just now"))
    }

    /// Ends the use of the slot: closes the gate if it is open, waits until nothing of this node is under way,
    /// says so in the slot, and lets its lock go. Others then need no wait and no fence.
    pub async fn release(&self) -> Result<(), RenewError> {
        let _turn = self.turns.take().await;
        self.gate.close(CloseReason::Left);
        self.gate.drained().await;
        let record = {
            let mut kept = self.kept.lock();
            kept.record.state = SlotState::Stopped;
            kept.record.sequence += 1;
            kept.record.clone()
        };
        let said = self.say_farewell(&record).await;
        // Nothing of this node is under way, whether it could say so or not.
        self.locks.unlock(self.area.label.quorum.slot_block(record.node))?;
        said
    }

    async fn say_farewell(&self, record: &SlotRecord) -> Result<(), RenewError> {
        let look = self.area.look().await.map_err(RenewError::Label)?;
        if look.record(record.node).is_some_and(|found| found.nonce == record.nonce) {
            self.area.write(record).await?;
        }
        Ok(())
    }
}
