//! Fencing: making sure that an excluded node writes nothing more, before anything acts on its absence.
//!
//! - A fence is confirmed or it is not; a method that cannot be sure says `Pending`, `Failed` or `NotApplicable`.
//! - A method is asked only after the register says "fence pending" for the victim: an excluded node does not
//!   renew its slot any more ([`crate::slots::SlotKeeper::renew`]).
//! - Methods are tried in order; whatever is being waited for can be seen ([`Fencer::under_way`]).

mod lease_expiry;
mod same_host;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use parking_lot::Mutex;

pub use lease_expiry::LeaseExpiry;
pub use same_host::SameHostProof;

use crate::ids::{Incarnation, NodeId};
use crate::lease::LeaseTimes;
use crate::runtime::{Instant, Runtime};
use crate::slots::{Look, SlotRecord, SlotState};

/// A fence under way.
pub type FenceFuture<'a> = Pin<Box<dyn Future<Output = Result<Confirmed, FenceError>> + Send + 'a>>;

/// Why nothing of the victim can be written any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub enum Proof {
    /// It said itself that it stopped, and nothing of it was under way.
    SaidSo,
    /// Its slot has a new holder, who took it under the rules of claiming.
    SlotReused,
    /// Its process is gone: the lock on its one descriptor has fallen.
    ProcessGone,
    /// Its slot was unchanged for longer than its lease and its last write can live.
    LeaseExpired,
}

/// A confirmed fence.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Confirmed {
    /// The method that confirmed it.
    pub method: &'static str,
    /// Why it is sure.
    pub proof: Proof,
}

/// Why a method has not confirmed a fence.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FenceError {
    /// The method can never fence this victim.
    #[error("not applicable: {0}")]
    NotApplicable(String),
    /// It should have been able to, but was not.
    #[error("failed: {0}")]
    Failed(String),
    /// Not yet; ask again then.
    #[error("pending: {why}")]
    Pending {
        /// When asking again may help.
        until: Instant,
        /// What is waited for.
        why: String,
    },
}

/// A way to fence.
pub trait FenceMethod: Send + Sync {
    /// A short name, as `status` shows it.
    fn name(&self) -> &'static str;
    /// Whether this node could fence that peer in this way; if not, why.
    fn can_fence(&self, peer: &SlotRecord) -> Result<(), String>;
    /// What it protects from and what not, in words for `status`.
    fn protects(&self) -> String;
    /// Tries to fence.
    fn fence<'a>(&'a self, victim: &'a SlotRecord) -> FenceFuture<'a>;
}

/// No method could fence the victim.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("node {node} cannot be fenced: {}", reasons.iter().map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join("; "))]
pub struct NotFenced {
    /// The victim.
    pub node: NodeId,
    /// By method, why.
    pub reasons: Vec<(&'static str, FenceError)>,
}

/// A fence that is not confirmed yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnderWay {
    /// The victim.
    pub node: NodeId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Since when.
    pub since: Instant,
    /// By method, what it says.
    pub waiting: Vec<(&'static str, FenceError)>,
}

/// Tries fence methods in order. Cloning gives another handle.
#[derive(Clone)]
pub struct Fencer {
    methods: Arc<[Box<dyn FenceMethod>]>,
    runtime: Arc<dyn Runtime>,
    under_way: Arc<Mutex<BTreeMap<(NodeId, Incarnation), UnderWay>>>,
}

impl Fencer {
    /// A fencer with these methods, best first.
    pub fn new(methods: Vec<Box<dyn FenceMethod>>, runtime: Arc<dyn Runtime>) -> Fencer {
        Fencer { methods: methods.into(), runtime, under_way: Arc::default() }
    }

    /// What protects from a node that does not stop: by method, in words.
    pub fn protection(&self) -> Vec<(&'static str, String)> {
        self.methods.iter().map(|method| (method.name(), method.protects())).collect()
    }

    /// The first method that could fence that peer, or by method why not. A second writer that cannot be fenced
    /// must not be let in.
    pub fn can_fence(&self, peer: &SlotRecord) -> Result<&'static str, Vec<(&'static str, String)>> {
        let mut reasons = Vec::new();
        for method in self.methods.iter() {
            match method.can_fence(peer) {
                Ok(()) => return Ok(method.name()),
                Err(why) => reasons.push((method.name(), why)),
            }
        }
        Err(reasons)
    }

    /// Fences that are waited for.
    pub fn under_way(&self) -> Vec<UnderWay> {
        self.under_way.lock().values().cloned().collect()
    }

    /// Asks every method once, in order.
    pub async fn try_fence(&self, victim: &SlotRecord) -> Result<Confirmed, NotFenced> {
        let mut reasons = Vec::new();
        for method in self.methods.iter() {
            match method.fence(victim).await {
                Ok(confirmed) => return Ok(confirmed),
                Err(why) => reasons.push((method.name(), why)),
            }
        }
        Err(NotFenced { node: victim.node, reasons })
    }

    /// Fences, however long it takes. An error only where no method can do it, now or later.
    pub async fn fence(&self, victim: &SlotRecord) -> Result<Confirmed, NotFenced> {
        let key = (victim.node, victim.incarnation);
        let since = self.runtime.now();
        let shown = Shown { fencer: self, key };
        loop {
            let not_yet = match self.try_fence(victim).await {
                Ok(confirmed) => {
                    tracing::info!(node = %victim.node, ?confirmed, "fenced");
                    return Ok(confirmed);
                }
                Err(not_yet) => not_yet,
            };
            let until = not_yet.reasons.iter().filter_map(|(_, why)| match why {
                FenceError::Pending { until, .. } => Some(*until),
                FenceError::NotApplicable(_) | FenceError::Failed(_) => None,
            });
            let Some(until) = until.min() else { return Err(not_yet) };
            let waiting = not_yet.reasons;
            shown
                .fencer
                .under_way
                .lock()
                .insert(key, UnderWay { node: victim.node, incarnation: victim.incarnation, since, waiting });
            // At least a little: a method that says "now" must not make this a busy loop.
            let wait = until.since(self.runtime.now());
            let wait = wait.clamp(std::time::Duration::from_millis(5), LeaseTimes::POLL_EVERY);
            self.runtime.sleep(wait).await;
        }
    }
}

/// Ends the showing of a fence, also where its future is dropped.
struct Shown<'a> {
    fencer: &'a Fencer,
    key: (NodeId, Incarnation),
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        self.fencer.under_way.lock().remove(&self.key);
    }
}

/// What a look alone proves about a victim.
fn proven_by_slot(look: &Look, victim: &SlotRecord) -> Option<Proof> {
    let found = look.record(victim.node)?;
    if found.nonce != victim.nonce {
        return (found.incarnation > victim.incarnation).then_some(Proof::SlotReused);
    }
    (found.state == SlotState::Stopped).then_some(Proof::SaidSo)
}

#[cfg(test)]
mod tests;
