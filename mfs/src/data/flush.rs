//! Flushes of the device, shared by all who wait for one.
//!
//! A write is stable once a flush that began after it completed has ended. After a flush that failed nobody knows
//! what the device has, and none succeeds any more: a later one would report stable what may be lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use storage_control::Device;
use tokio::sync::Mutex;

use crate::error::FsError;

/// Counts a device's completed data writes.
pub(crate) struct DataFlush {
    device: Arc<dyn Device>,
    completed: AtomicU64,
    /// Writes known to be stable, or why that cannot be known.
    stable: Mutex<Result<u64, FsError>>,
}

/// A point in the sequence of completed writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WriteSeq(u64);

impl DataFlush {
    pub(crate) fn new(device: Arc<dyn Device>) -> Self {
        Self { device, completed: AtomicU64::new(0), stable: Mutex::new(Ok(0)) }
    }

    /// Tells that data writes have completed: to be made stable by `upto` of the returned point.
    pub(crate) fn completed(&self) -> WriteSeq {
        WriteSeq(self.completed.fetch_add(1, SeqCst) + 1)
    }

    /// The last point there is.
    pub(crate) fn latest(&self) -> WriteSeq {
        WriteSeq(self.completed.load(SeqCst))
    }

    /// Returns when the writes up to this point are stable.
    pub(crate) async fn upto(&self, seq: WriteSeq) -> Result<(), FsError> {
        let mut stable = self.stable.lock().await;
        if (*stable).clone()? >= seq.0 {
            return Ok(());
        }
        let completed = self.completed.load(SeqCst);
        *stable = self.device.flush().await.map(|()| completed).map_err(FsError::from);
        (*stable).clone().map(drop)
    }
}
