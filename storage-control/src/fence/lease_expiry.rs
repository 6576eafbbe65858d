//! A victim whose slot did not change for longer than its lease, and its last write, can live.
//!
//! Only a look that was issued after the fence was asked for confirms it: what was seen before may be older than
//! the exclusion.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::{Confirmed, FenceError, FenceFuture, FenceMethod, Proof, proven_by_slot};
use crate::lease::LeaseTimes;
use crate::runtime::Runtime;
use crate::slots::{SlotArea, SlotRecord, Watch};

const NAME: &str = "lease";

/// Waits for the end of the victim's lease.
pub struct LeaseExpiry {
    area: SlotArea,
    /// Shared with whoever looks at the slots anyway, so that the victim's window is running already.
    watch: Arc<Mutex<Watch>>,
    times: LeaseTimes,
    runtime: Arc<dyn Runtime>,
}

impl LeaseExpiry {
    /// The method, with the times that follow from the device.
    pub fn new(
        area: SlotArea,
        watch: Arc<Mutex<Watch>>,
        times: LeaseTimes,
        runtime: Arc<dyn Runtime>,
    ) -> LeaseExpiry {
        LeaseExpiry { area, watch, times, runtime }
    }

    fn wait(&self) -> Result<Duration, String> {
        self.times.full_wait().ok_or_else(|| {
            "nothing says how long a write to this device can be delayed; give a bound with --io-timeout"
                .into()
        })
    }

    async fn expire(&self, victim: &SlotRecord) -> Result<Confirmed, FenceError> {
        let wait = self.wait().map_err(FenceError::NotApplicable)?;
        let look = match self.area.look().await {
            Ok(look) => look,
            Err(error) => {
                self.watch.lock().stalled();
                return Err(FenceError::Pending {
                    until: self.runtime.now() + LeaseTimes::POLL_EVERY,
                    why: format!("this node cannot see the slots itself: {error}"),
                });
            }
        };
        let mut watch = self.watch.lock();
        watch.observe(&look);
        if let Some(proof) = proven_by_slot(&look, victim) {
            return Ok(Confirmed { method: NAME, proof });
        }
        if watch.unchanged_for(victim.node) >= wait {
            return Ok(Confirmed { method: NAME, proof: Proof::LeaseExpired });
        }
        let until = watch.unchanged_until(victim.node, wait).expect("a slot that was looked at has a window");
        let left = until.since(look.issued);
        let why = format!("its slot must be unchanged for another {} ms", left.as_millis());
        Err(FenceError::Pending { until, why })
    }
}

impl FenceMethod for LeaseExpiry {
    fn name(&self) -> &'static str {
        NAME
    }

    fn can_fence(&self, _: &SlotRecord) -> Result<(), String> {
        self.wait().map(drop)
    }

    fn protects(&self) -> String {
        match self.wait() {
            Ok(wait) => format!(
                "any node, {} ms after its last renewal; not a virtual machine that may be paused",
                wait.as_millis()
            ),
            Err(why) => format!("nothing: {why}"),
        }
    }

    fn fence<'a>(&'a self, victim: &'a SlotRecord) -> FenceFuture<'a> {
        Box::pin(self.expire(victim))
    }
}
