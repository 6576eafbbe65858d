//! The filesystem's way to the gate: a lease that ran out may come back, so what it refuses for that reason waits.
//!
//! A request fails only when the device fails it or the gate is closed for good. It passes the gate's check again
//! each time, so nothing gets through while there is no lease.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use storage_control::gate::refusal;
use storage_control::{
    AlignedBuf, BlockAddr, Device, Durability, Gate, GateRefused, IoFuture, IoSlice, Runtime,
};

/// How often a request that waits for the lease tries again.
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// A device behind the gate.
#[derive(Clone)]
pub(super) struct PatientDevice {
    gate: Gate,
    runtime: Arc<dyn Runtime>,
}

impl PatientDevice {
    pub(super) fn new(gate: Gate, runtime: Arc<dyn Runtime>) -> PatientDevice {
        PatientDevice { gate, runtime }
    }

    /// The first try is made at once, in the caller; the rest only if the lease was the reason.
    fn with_lease<T: Send + 'static>(
        &self,
        mut request: impl FnMut(&Gate) -> IoFuture<T> + Send + 'static,
    ) -> IoFuture<T> {
        let first = request(&self.gate);
        let this = self.clone();
        Box::pin(async move {
            let mut result = first.await;
            while result.as_ref().is_err_and(lacks_lease) {
                this.runtime.sleep(TRY_AGAIN).await;
                result = request(&this.gate).await;
            }
            result
        })
    }
}

fn lacks_lease(error: &io::Error) -> bool {
    matches!(refusal(error), Some(GateRefused::NoLease))
}

impl Device for PatientDevice {
    fn blocks(&self) -> u64 {
        self.gate.blocks()
    }

    fn read(&self, at: BlockAddr, blocks: usize) -> IoFuture<AlignedBuf> {
        self.with_lease(move |gate| gate.read(at, blocks))
    }

    fn write(&self, at: BlockAddr, data: Vec<IoSlice>, durability: Durability) -> IoFuture<()> {
        self.with_lease(move |gate| gate.write(at, data.clone(), durability))
    }

    fn flush(&self) -> IoFuture<()> {
        self.with_lease(Device::flush)
    }
}

#[cfg(test)]
mod tests {
    use storage_control::gate::CloseReason;
    use storage_control::{MemDevice, TestRuntime, block_on};

    use super::*;

    fn device() -> (Gate, PatientDevice, Arc<dyn Runtime>) {
        let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
        let gate = Gate::new(Arc::new(MemDevice::new(100)), Arc::clone(&runtime));
        (gate.clone(), PatientDevice::new(gate, Arc::clone(&runtime)), runtime)
    }

    #[test]
    fn a_write_without_lease_waits_until_there_is_one() {
        let (gate, device, runtime) = device();
        let write = device.write(BlockAddr(1), vec![AlignedBuf::zeroed(4096).into()], Durability::Cached);
        assert_eq!(gate.stats().writes, 0);
        gate.extend_lease(runtime.now() + Duration::from_secs(60));
        block_on(write).expect("written");
        assert_eq!(gate.stats().writes, 1);
    }

    #[test]
    fn a_closed_gate_ends_the_wait() {
        let (gate, device, _) = device();
        let read = device.read(BlockAddr(1), 1);
        gate.close(CloseReason::Excluded);
        let error = block_on(read).expect_err("closed");
        assert!(matches!(refusal(&error), Some(GateRefused::Closed(_))));
    }
}
