//! Proofs and fences: what the driver starts, and how it is answered.

use std::sync::Arc;
use std::time::Duration;

use storage_control::fence::{FenceMethod, Fencer, LeaseExpiry, SameHostProof};
use storage_control::lease::LeaseTimes;
use storage_control::slots::{NO_ADDRESS, Nonce, PeerSet, SlotArea, SlotLocks, SlotRecord, SlotState, Watch};
use storage_control::{Clock, Incarnation, NodeId, Runtime};

use crate::interconnect::Who;

/// A process that dies closes its sockets before the kernel has let go of its last descriptor: the proof is looked for
/// this long.
const PROBE_FOR: Duration = Duration::from_millis(400);
/// Between two looks for it.
const PROBE_EVERY: Duration = Duration::from_millis(2);

/// Which methods may be used (`-o fence=`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum FenceChoice {
    /// The proof of the same host where it applies, else the lease.
    #[default]
    All,
    /// The lease alone.
    LeaseOnly,
}

/// The fence methods of one node.
pub(super) struct Fencing {
    pub(super) fencer: Fencer,
    same_host: Option<Arc<SameHostProof>>,
    area: SlotArea,
    locks: Arc<dyn SlotLocks>,
    runtime: Arc<dyn Runtime>,
}

impl Fencing {
    pub(super) fn new(
        choice: FenceChoice,
        me: NodeId,
        area: &SlotArea,
        locks: &Arc<dyn SlotLocks>,
        times: LeaseTimes,
        watch: Arc<parking_lot::Mutex<Watch>>,
        runtime: &Arc<dyn Runtime>,
    ) -> std::io::Result<Fencing> {
        let proof = || SameHostProof::new(area.clone(), Arc::clone(locks), Arc::clone(runtime), me);
        let mut methods: Vec<Box<dyn FenceMethod>> = Vec::new();
        let same_host = match choice {
            FenceChoice::All => {
                methods.push(Box::new(proof()?));
                Some(Arc::new(proof()?))
            }
            FenceChoice::LeaseOnly => None,
        };
        methods.push(Box::new(LeaseExpiry::new(area.clone(), watch, times, Arc::clone(runtime))));
        Ok(Fencing {
            fencer: Fencer::new(methods, Arc::clone(runtime)),
            same_host,
            area: area.clone(),
            locks: Arc::clone(locks),
            runtime: Arc::clone(runtime),
        })
    }

    /// Why a node could not be fenced from here.
    pub(super) fn unfenceable(&self, record: &SlotRecord) -> Option<String> {
        let reasons = self.fencer.can_fence(record).err()?;
        Some(reasons.iter().map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join("; "))
    }

    /// Looks for the proof that a process of this host is gone, without killing anything. True if there is one.
    pub(super) async fn probe(&self, record: &SlotRecord) -> bool {
        let applies = self.same_host.as_ref().is_some_and(|method| method.can_fence(record).is_ok());
        if !applies {
            return false;
        }
        let block = self.area.label().quorum.slot_block(record.node);
        let begun = self.runtime.now();
        loop {
            match self.locks.try_lock(block) {
                Ok(true) => return self.locks.unlock(block).is_ok(),
                Ok(false) => {}
                Err(_) => return false,
            }
            if self.runtime.now().since(begun) > PROBE_FOR {
                return false;
            }
            self.runtime.sleep(PROBE_EVERY).await;
        }
    }

    /// Fences, however long it takes.
    pub(super) async fn fence(&self, record: &SlotRecord) -> Result<(), String> {
        match self.fencer.fence(record).await {
            Ok(confirmed) => {
                tracing::info!(node = %record.node, incarnation = %record.incarnation, ?confirmed, "fence confirmed");
                Ok(())
            }
            Err(not_fenced) => Err(not_fenced.to_string()),
        }
    }
}

/// What stands for a victim whose slot nobody can read: no process of this host, a claim that no slot shows. Its lease
/// can be waited for all the same.
pub(super) fn unread((node, incarnation): Who) -> SlotRecord {
    SlotRecord {
        node,
        state: SlotState::Held,
        nonce: Nonce([0; 16]),
        incarnation: Incarnation(incarnation.0),
        sequence: 0,
        clock: Clock(0),
        journal_tail: Clock(0),
        process: Default::default(),
        file: Default::default(),
        health: 0,
        address: NO_ADDRESS,
        fingerprint: [0; 32],
        heard: PeerSet::default(),
        node_name: String::new(),
        host_name: String::new(),
    }
}
