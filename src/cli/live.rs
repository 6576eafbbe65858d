//! Whether somebody uses a device right now: what mkfs and fsck ask before they begin.

use std::path::Path;
use std::sync::Arc;

use storage_control::lease::LeaseTimes;
use storage_control::process::boot_id;
use storage_control::slots::{ClaimError, NoLocks, SlotArea, SlotLocks, live_nodes};
use storage_control::{FileDevice, Label, OpenAs, OpenError, Runtime, TestRuntime, block_on};

/// A device opened by a command that wants to be alone with it.
pub(super) struct Alone {
    pub(super) device: FileDevice,
    /// Opened for writing, so that its locks can be tried.
    writable: bool,
}

/// Opens `path`. A device that cannot be written can still be read.
pub(super) fn open(path: &Path) -> Result<Alone, OpenError> {
    let exclusive = OpenAs { write: true, exclusive: true, ..OpenAs::default() };
    match FileDevice::open(path, exclusive) {
        Err(OpenError::ReadOnly { .. } | OpenError::Permission { .. }) => {
            let device =
                FileDevice::open(path, OpenAs { write: false, exclusive: false, ..OpenAs::default() })?;
            Ok(Alone { device, writable: false })
        }
        opened => Ok(Alone { device: opened?, writable: true }),
    }
}

impl Alone {
    /// Names of the nodes that hold a slot now. Waits for as long as a lease lives where only time can tell.
    pub(super) fn users(&self, label: &Label) -> Result<Vec<String>, String> {
        let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
        let area = SlotArea::without_gate(Arc::new(self.device.clone()), label.clone(), runtime);
        let locks: &dyn SlotLocks = if self.writable { &self.device } else { &NoLocks };
        let times = LeaseTimes { write_life: self.device.medium().write_life(label.io_timeout) };
        let boot = boot_id().map_err(|e| e.to_string())?;
        let found = block_on(async {
            let live = live_nodes(&area, locks, boot, times).await?;
            let look = area.look().await?;
            let name =
                |node| look.record(node).map_or_else(|| format!("node {node}"), |r| r.node_name.clone());
            Ok::<_, ClaimError>(live.into_iter().map(name).collect())
        });
        found.map_err(|e| e.to_string())
    }
}
