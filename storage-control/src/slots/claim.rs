//! Claiming a slot.
//!
//! - A slot is taken only if it was never used, its holder said that it stopped, its holder is proven dead, or
//!   it was unchanged for the full wait. A slot that changes is alive, whoever it says it is.
//! - A claim counts when its nonce is read back after every competing write is over.
//! - Where a lock on the slot's byte excludes every other writer of the device, it replaces both waits.
//! - The blocks of a slot are never cleared.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use super::area::{Look, SlotArea};
use super::keeper::{Beat, RenewError, SlotKeeper};
use super::record::{Nonce, PeerSet, SlotContents, SlotRecord, SlotState, stored_name};
use super::watch::Watch;
use crate::file_device::{FileDevice, FileIdentity};
use crate::gate::Gate;
use crate::ids::{BlockAddr, Clock, Incarnation, NodeId};
use crate::label::LabelError;
use crate::lease::{LeaseTimes, STALL_MS};
use crate::process::ProcessIdentity;

/// The locks on the slots' bytes.
pub trait SlotLocks: Send + Sync {
    /// Takes the lock of a slot block without waiting; true if it is ours now.
    fn try_lock(&self, slot_block: BlockAddr) -> io::Result<bool>;
    /// Gives it back.
    fn unlock(&self, slot_block: BlockAddr) -> io::Result<()>;
    /// Whether the lock excludes every other writer of the device, on any host.
    fn excludes_all(&self) -> bool;
    /// The file the locks lie on.
    fn file(&self) -> FileIdentity;
}

impl SlotLocks for FileDevice {
    fn try_lock(&self, slot_block: BlockAddr) -> io::Result<bool> {
        FileDevice::try_lock(self, slot_block)
    }

    fn unlock(&self, slot_block: BlockAddr) -> io::Result<()> {
        FileDevice::unlock(self, slot_block)
    }

    fn excludes_all(&self) -> bool {
        self.medium().lock_excludes_all()
    }

    fn file(&self) -> FileIdentity {
        self.identity()
    }
}

/// No locks: a device in memory, or one whose nodes must trust time alone.
pub struct NoLocks;

impl SlotLocks for NoLocks {
    fn try_lock(&self, _: BlockAddr) -> io::Result<bool> {
        Ok(true)
    }

    fn unlock(&self, _: BlockAddr) -> io::Result<()> {
        Ok(())
    }

    fn excludes_all(&self) -> bool {
        false
    }

    fn file(&self) -> FileIdentity {
        FileIdentity::default()
    }
}

/// Who claims.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claimant {
    /// The node's name.
    pub node_name: String,
    /// The host's name.
    pub host_name: String,
    /// The claiming process.
    pub process: ProcessIdentity,
    /// Where it listens.
    pub address: SocketAddr,
    /// Of its key.
    pub fingerprint: [u8; 32],
}

/// Why no slot could be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// All slots have live holders.
    #[error("all {slots} slots are in use")]
    Full {
        /// How many there are.
        slots: u16,
    },
    /// Nothing bounds the life of a write to this device.
    #[error(
        "nothing says how long a write to this device can be delayed, so no other node can be excluded safely; \
         if you know a bound, give it with --io-timeout SECONDS"
    )]
    Unbounded,
    /// Other claimants were faster every time.
    #[error("other nodes took every slot this node tried to claim; try again")]
    Raced,
    /// The device's label is not this file system's, or cannot be read.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// The device did not answer as it should.
    #[error("claiming a slot: {0}")]
    Io(#[from] io::Error),
}

/// A slot that was claimed.
pub struct Claimed {
    /// Keeps it.
    pub keeper: SlotKeeper,
    /// What was in it before; its holder is surely gone.
    pub previous: Option<SlotRecord>,
    /// The largest Lamport clock in any slot: to be received before the first tick.
    pub clock: Clock,
}

/// How a slot can become ours.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Readiness {
    /// Nobody can be behind it.
    Now,
    /// Only if it stays unchanged for the full wait.
    AfterWait,
}

struct Attempt<'a> {
    area: &'a SlotArea,
    gate: &'a Gate,
    locks: &'a Arc<dyn SlotLocks>,
    who: Claimant,
    times: LeaseTimes,
    watch: Watch,
}

/// Claims a slot: this node's own former one, else one never used, else any that nobody holds.
pub async fn claim(
    area: &SlotArea,
    gate: &Gate,
    locks: &Arc<dyn SlotLocks>,
    who: Claimant,
    times: LeaseTimes,
) -> Result<Claimed, ClaimError> {
    let who =
        Claimant { node_name: stored_name(&who.node_name), host_name: stored_name(&who.host_name), ..who };
    Attempt { area, gate, locks, who, times, watch: Watch::new() }.run().await
}

impl Attempt<'_> {
    async fn run(mut self) -> Result<Claimed, ClaimError> {
        if !self.locks.excludes_all() && self.times.full_wait().is_none() {
            return Err(ClaimError::Unbounded);
        }
        let first = self.look().await?;
        let mut raced = false;
        for node in self.candidates(&first) {
            let slot_block = self.area.label.quorum.slot_block(node);
            if !self.locks.try_lock(slot_block)? {
                // Its holder lives on this host.
                continue;
            }
            let claimed = match self.may_take(node, &first).await {
                Ok(true) => self.take(node).await,
                Ok(false) => Ok(None),
                Err(error) => Err(error),
            };
            match claimed {
                Ok(Some(claimed)) => return Ok(claimed),
                Ok(None) => {
                    raced |= first.slots[usize::from(node.0)] == SlotContents::Blank;
                    self.locks.unlock(slot_block)?;
                }
                Err(error) => {
                    self.locks.unlock(slot_block)?;
                    return Err(error);
                }
            }
        }
        Err(if raced { ClaimError::Raced } else { ClaimError::Full { slots: self.area.label.quorum.slots } })
    }

    async fn look(&mut self) -> Result<Look, ClaimError> {
        let look = self.area.look().await?;
        self.watch.observe(&look);
        Ok(look)
    }

    /// All slots in the order in which they are tried.
    fn candidates(&self, look: &Look) -> Vec<NodeId> {
        let rank = |node: &NodeId| {
            let contents = &look.slots[usize::from(node.0)];
            let own = contents.record().is_some_and(|record| {
                record.node_name == self.who.node_name && record.host_name == self.who.host_name
            });
            let kind = match contents {
                SlotContents::Record(_) if own => 0,
                SlotContents::Blank => 1,
                SlotContents::Record(_) => 2,
                SlotContents::Unreadable(_) => 3,
            };
            (kind, if own { Readiness::Now } else { self.readiness(contents) }, *node)
        };
        let mut nodes: Vec<NodeId> = self.area.label.quorum.nodes().collect();
        nodes.sort_by_key(rank);
        nodes
    }

    /// How a slot whose lock is ours can be taken.
    fn readiness(&self, contents: &SlotContents) -> Readiness {
        let record = match contents {
            SlotContents::Blank => return Readiness::Now,
            SlotContents::Record(record) => record,
            SlotContents::Unreadable(_) => return Readiness::AfterWait,
        };
        if record.state == SlotState::Stopped {
            return Readiness::Now;
        }
        let same_boot = record.process.boot_id == self.who.process.boot_id;
        let same_file = record.file == self.locks.file() && record.file != FileIdentity::default();
        // The same-host proof: its lock has fallen. Or: only this host can write, and it was another boot.
        let proven = same_boot && same_file || self.locks.excludes_all() && !same_boot;
        if proven { Readiness::Now } else { Readiness::AfterWait }
    }

    /// Waits until the slot is surely nobody's; false if it is somebody's.
    async fn may_take(&mut self, node: NodeId, first: &Look) -> Result<bool, ClaimError> {
        let index = usize::from(node.0);
        let current = self.look().await?;
        if current.slots[index] != first.slots[index] {
            return Ok(false);
        }
        match self.readiness(&current.slots[index]) {
            Readiness::Now => Ok(true),
            Readiness::AfterWait => {
                let wait = self.times.full_wait().ok_or(ClaimError::Unbounded)?;
                loop {
                    if self.watch.was_seen_changing(node) {
                        return Ok(false);
                    }
                    if self.watch.unchanged_for(node) >= wait {
                        return Ok(true);
                    }
                    self.area.runtime.sleep(LeaseTimes::POLL_EVERY).await;
                    self.look().await?;
                }
            }
        }
    }

    /// Writes a nonce and reads it back. `None` if somebody else was faster.
    async fn take(&mut self, node: NodeId) -> Result<Option<Claimed>, ClaimError> {
        let before = self.look().await?;
        let previous = before.record(node).cloned();
        if self.watch.was_seen_changing(node) {
            return Ok(None);
        }
        let proven = previous.is_some()
            && self.readiness(&before.slots[usize::from(node.0)]) == Readiness::Now
            && previous.as_ref().is_some_and(|record| record.state != SlotState::Stopped);
        let record = self.new_record(node, previous.as_ref());
        let late = self.area.runtime.now().since(before.issued).as_millis() > u128::from(STALL_MS);
        if late {
            return Ok(None);
        }
        self.area.write(&record).await?;
        if !self.locks.excludes_all() && !proven {
            let wait = self.times.settle_wait().ok_or(ClaimError::Unbounded)?;
            self.area.runtime.sleep(wait).await;
        }
        let after = self.look().await?;
        if after.record(node).is_none_or(|found| found.nonce != record.nonce) {
            return Ok(None);
        }
        tracing::info!(%node, incarnation = %record.incarnation, "slot claimed");
        let keeper =
            SlotKeeper::new(self.area.clone(), self.gate.clone(), Arc::clone(self.locks), record.clone());
        // Opens the register to the node: it was long ago that the nonce was written.
        let beat = Beat { clock: record.clock, journal_tail: record.journal_tail, ..Beat::default() };
        match keeper.renew(beat).await {
            Ok(_) => {}
            Err(RenewError::Io(error)) => return Err(error.into()),
            Err(RenewError::Label(error)) => return Err(error.into()),
            Err(RenewError::Closed(_) | RenewError::Delayed) => return Ok(None),
        }
        Ok(Some(Claimed { keeper, previous, clock: after.clock() }))
    }

    fn new_record(&self, node: NodeId, previous: Option<&SlotRecord>) -> SlotRecord {
        SlotRecord {
            node,
            state: SlotState::Claiming,
            nonce: Nonce::random(),
            incarnation: Incarnation(previous.map_or(0, |record| record.incarnation.0) + 1),
            sequence: previous.map_or(0, |record| record.sequence) + 1,
            clock: previous.map_or(Clock(0), |record| record.clock),
            // The former holder's journal is not replayed yet.
            journal_tail: previous.map_or(Clock(0), |record| record.journal_tail),
            process: self.who.process,
            file: self.locks.file(),
            health: 0,
            address: self.who.address,
            fingerprint: self.who.fingerprint,
            heard: PeerSet::default(),
            node_name: self.who.node_name.clone(),
            host_name: self.who.host_name.clone(),
        }
    }
}

/// Slots that someone holds now, for mkfs and other programs that must be alone: waits where only time tells.
/// An error where nothing bounds the wait and some slot was used and not released.
pub async fn live_nodes(
    area: &SlotArea,
    locks: &dyn SlotLocks,
    boot_id: [u8; 16],
    times: LeaseTimes,
) -> Result<Vec<NodeId>, ClaimError> {
    let mut live = Vec::new();
    let mut unsure = Vec::new();
    let mut watch = Watch::new();
    let first = area.look().await?;
    watch.observe(&first);
    for node in area.label.quorum.nodes() {
        let slot_block = area.label.quorum.slot_block(node);
        if !locks.try_lock(slot_block)? {
            live.push(node);
            continue;
        }
        locks.unlock(slot_block)?;
        let proven = |record: &SlotRecord| {
            let same_boot = record.process.boot_id == boot_id;
            let same_file = record.file == locks.file() && record.file != FileIdentity::default();
            same_boot && same_file || locks.excludes_all() && !same_boot
        };
        match &first.slots[usize::from(node.0)] {
            SlotContents::Blank => {}
            SlotContents::Record(record) if record.state == SlotState::Stopped || proven(record) => {}
            SlotContents::Record(_) | SlotContents::Unreadable(_) => unsure.push(node),
        }
    }
    if unsure.is_empty() {
        return Ok(live);
    }
    let wait = times.full_wait().ok_or(ClaimError::Unbounded)?;
    while unsure.iter().any(|&node| !watch.was_seen_changing(node) && watch.unchanged_for(node) < wait) {
        area.runtime.sleep(LeaseTimes::POLL_EVERY).await;
        watch.observe(&area.look().await?);
    }
    live.extend(unsure.into_iter().filter(|&node| watch.was_seen_changing(node)));
    live.sort_unstable();
    Ok(live)
}
