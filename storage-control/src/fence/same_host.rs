//! The operating system's proof that a process of this host is gone.
//!
//! The lock of a slot lies on the one descriptor through which its holder writes the device. When the lock falls
//! the descriptor is closed, and every write that went through it is over: D is 0. The proof counts only where
//! victim and prover run under the same boot of one kernel and have opened the same file.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::{Confirmed, FenceError, FenceFuture, FenceMethod, Proof, proven_by_slot};
use crate::file_device::FileIdentity;
use crate::ids::{BlockAddr, NodeId};
use crate::lease::LeaseTimes;
use crate::process::{self, ProcessIdentity};
use crate::runtime::Runtime;
use crate::slots::{SlotArea, SlotLocks, SlotRecord};
use crate::sys;

/// How long one try waits for the lock of a process that was killed: its I/O must come back first.
const LOCK_WAIT_MS: u64 = 5_000;
/// The lock is tried again after so long, then twice as long, ...
const FIRST_RETRY_MS: u64 = 1;
/// ... up to so long.
const LONGEST_RETRY_MS: u64 = 32;

const NAME: &str = "same host";

/// Kills a process of this host and waits for its lock.
pub struct SameHostProof {
    area: SlotArea,
    locks: Arc<dyn SlotLocks>,
    runtime: Arc<dyn Runtime>,
    me: NodeId,
    boot_id: [u8; 16],
}

impl SameHostProof {
    /// The method as node `me` uses it, whose locks lie on the descriptor behind `locks`.
    pub fn new(
        area: SlotArea,
        locks: Arc<dyn SlotLocks>,
        runtime: Arc<dyn Runtime>,
        me: NodeId,
    ) -> io::Result<SameHostProof> {
        Ok(SameHostProof { area, locks, runtime, me, boot_id: process::boot_id()? })
    }

    async fn prove(&self, victim: &SlotRecord) -> Result<Confirmed, FenceError> {
        self.can_fence(victim).map_err(FenceError::NotApplicable)?;
        let confirmed = |proof| Confirmed { method: NAME, proof };
        if let Some(proof) = self.proven_by_slot(victim).await? {
            return Ok(confirmed(proof));
        }
        let lock = self.area.label().quorum.slot_block(victim.node);
        let begun = self.runtime.now();
        let mut retry_ms = FIRST_RETRY_MS;
        let mut killed = Killed::NotYet;
        loop {
            if self.lock_has_fallen(lock)? {
                // The lock may have been a later holder's; then the slot says so.
                let proof = self.proven_by_slot(victim).await?;
                return Ok(confirmed(proof.unwrap_or(Proof::ProcessGone)));
            }
            if killed == Killed::NotYet {
                killed = kill(victim.process)?;
            }
            let waited = self.runtime.now().since(begun);
            match killed {
                Killed::Stranger if waited > Duration::from_millis(4 * LONGEST_RETRY_MS) => {
                    return Err(FenceError::Failed(format!(
                        "the slot's lock is held, but not by process {} that the slot names (another pid namespace?)",
                        victim.process.pid
                    )));
                }
                Killed::NotYet | Killed::Yes | Killed::Gone | Killed::Stranger
                    if waited > Duration::from_millis(LOCK_WAIT_MS) =>
                {
                    return Err(FenceError::Pending {
                        until: self.runtime.now() + LeaseTimes::POLL_EVERY,
                        why: format!("process {} was killed; its last I/O is not over", victim.process.pid),
                    });
                }
                Killed::NotYet | Killed::Yes | Killed::Gone | Killed::Stranger => {}
            }
            self.runtime.sleep(Duration::from_millis(retry_ms)).await;
            retry_ms = (2 * retry_ms).min(LONGEST_RETRY_MS);
        }
    }

    async fn proven_by_slot(&self, victim: &SlotRecord) -> Result<Option<Proof>, FenceError> {
        match self.area.look().await {
            Ok(look) => Ok(proven_by_slot(&look, victim)),
            Err(error) => Err(FenceError::Failed(error.to_string())),
        }
    }

    /// Takes the lock and gives it back at once: the slot's next owner wants it.
    fn lock_has_fallen(&self, lock: BlockAddr) -> Result<bool, FenceError> {
        let failed = |error: io::Error| FenceError::Failed(error.to_string());
        let fallen = self.locks.try_lock(lock).map_err(failed)?;
        if fallen {
            self.locks.unlock(lock).map_err(failed)?;
        }
        Ok(fallen)
    }
}

impl FenceMethod for SameHostProof {
    fn name(&self) -> &'static str {
        NAME
    }

    fn can_fence(&self, peer: &SlotRecord) -> Result<(), String> {
        if peer.node == self.me {
            Err("a node does not fence itself".into())
        } else if peer.process.boot_id != self.boot_id {
            Err("it runs on another host, or ran before this host's last start".into())
        } else if peer.file != self.locks.file() || peer.file == FileIdentity::default() {
            Err("it has opened the device by another file".into())
        } else {
            Ok(())
        }
    }

    fn protects(&self) -> String {
        "nodes of this host that have opened the device by the same path: killed, and their end awaited"
            .into()
    }

    fn fence<'a>(&'a self, victim: &'a SlotRecord) -> FenceFuture<'a> {
        Box::pin(self.prove(victim))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Killed {
    NotYet,
    Yes,
    /// There is no such process.
    Gone,
    /// The pid belongs to another process.
    Stranger,
}

/// Kills exactly this process: the descriptor is opened first, then its pid is checked against the start time.
fn kill(victim: ProcessIdentity) -> Result<Killed, FenceError> {
    let failed = |error: io::Error| FenceError::Failed(format!("killing process {}: {error}", victim.pid));
    let pidfd = match sys::pidfd_open(victim.pid) {
        Ok(pidfd) => pidfd,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(Killed::Gone),
        Err(error) => return Err(failed(error)),
    };
    match process::start_time(victim.pid).map_err(failed)? {
        Some(started) if started == victim.start_time => {
            tracing::warn!(pid = victim.pid, "killing a node of this host that is to be fenced");
            sys::pidfd_kill(&pidfd).map_err(failed)?;
            Ok(Killed::Yes)
        }
        Some(_) => Ok(Killed::Stranger),
        None => Ok(Killed::Gone),
    }
}
