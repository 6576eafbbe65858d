//! What mkfs does to the part of a device that this crate owns: [`prepare`], then the file system's own work, then
//! [`finish`].
//!
//! Between the two the device has no label: whatever happens, it carries no file system that could be mounted.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::buf::AlignedBuf;
use crate::device::{Device, Durability};
use crate::ids::{BLOCK_SIZE, BlockAddr, NodeId};
use crate::label::{Label, LabelError};
use crate::lease::{LeaseTimes, STALL_MS};
use crate::process;
use crate::register::{Acceptor, AcceptorId, OpId, RegisterError};
use crate::runtime::Runtime;
use crate::signature::{self, Signature};
use crate::slots::{ClaimError, SlotArea, SlotLocks, live_nodes};

/// What the user asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PrepareOptions {
    /// The label text; at most 64 bytes.
    pub text: String,
    /// Bound on the life of a write.
    pub io_timeout: Option<Duration>,
    /// Overwrite whatever is there, even if it is in use.
    pub force: bool,
}

/// Why a device is not overwritten.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// It carries something.
    #[error("the device carries {0}; use --force to overwrite it")]
    Carries(Signature),
    /// Nodes use it.
    #[error("the device is in use by {}; unmount it there, or use --force", .0.join(", "))]
    InUse(Vec<String>),
    /// Whether nodes use it cannot be seen.
    #[error("whether other nodes use this device cannot be seen: {0}; use --force if none does")]
    Unsure(#[source] ClaimError),
    /// Another mkfs wrote its label after this one.
    #[error("another mkfs has overwritten the device at the same time")]
    Raced,
    /// The label is impossible or cannot be written.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// The register cannot be written.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The device did not answer as it should.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Checks that the device may be overwritten, removes the old label, and writes the quorum region with what
/// `first_body` makes of the label as the register's first value. The label it returns is not on the device yet.
pub async fn prepare(
    device: &Arc<dyn Device>,
    locks: &dyn SlotLocks,
    times: LeaseTimes,
    runtime: &Arc<dyn Runtime>,
    options: &PrepareOptions,
    first_body: &(dyn Fn(&Label) -> Vec<u8> + Sync),
) -> Result<Label, PrepareError> {
    if !options.force {
        check_free(device, locks, times, runtime).await?;
    }
    let label = Label::new(device.blocks(), &options.text, options.io_timeout, runtime.wall())?;
    Label::wipe(&**device).await?;
    wipe_end(&**device).await?;
    let id = AcceptorId::single(label.fs);
    let acceptor = Acceptor { device: Arc::clone(device), layout: label.quorum, id };
    acceptor.format(&first_body(&label), OpId(uuid::Uuid::new_v4().as_u128())).await?;
    Ok(label)
}

/// The device is formatted: makes everything stable, writes the label, and sees that it stays.
pub async fn finish(
    device: &dyn Device,
    locks: &dyn SlotLocks,
    times: LeaseTimes,
    runtime: &dyn Runtime,
    label: &Label,
) -> Result<(), PrepareError> {
    device.flush().await?;
    label.write(device).await?;
    if !locks.excludes_all() {
        // Where nothing bounds a write, this is the best that can be done; a later mkfs is seen by every renewal.
        let wait = times.settle_wait().unwrap_or(Duration::from_millis(STALL_MS));
        runtime.sleep(wait).await;
    }
    let found = Label::read(device).await?;
    if found.nonce == label.nonce { Ok(()) } else { Err(PrepareError::Raced) }
}

async fn check_free(
    device: &Arc<dyn Device>,
    locks: &dyn SlotLocks,
    times: LeaseTimes,
    runtime: &Arc<dyn Runtime>,
) -> Result<(), PrepareError> {
    let Some(found) = signature::detect(&**device).await? else { return Ok(()) };
    if found != Signature::Matrix {
        return Err(PrepareError::Carries(found));
    }
    let label = match Label::read(&**device).await {
        Ok(label) => label,
        // A damaged label says nothing about slots.
        Err(LabelError::Io(error)) => return Err(error.into()),
        Err(
            LabelError::NotMatrix { .. }
            | LabelError::NewerVersion { .. }
            | LabelError::OlderVersion { .. }
            | LabelError::Corrupt(_)
            | LabelError::Truncated { .. }
            | LabelError::ForeignFilesystem { .. }
            | LabelError::ForeignDevice { .. },
        ) => return Err(PrepareError::Carries(found)),
    };
    let area = SlotArea::without_gate(Arc::clone(device), label, Arc::clone(runtime));
    let live = live_nodes(&area, locks, process::boot_id()?, times).await.map_err(PrepareError::Unsure)?;
    if live.is_empty() {
        return Err(PrepareError::Carries(found));
    }
    let look = area.look().await?;
    let name = |node: &NodeId| match look.record(*node) {
        Some(record) => format!("node {} on {}", record.node_name, record.host_name),
        None => format!("slot {node}"),
    };
    Err(PrepareError::InUse(live.iter().map(name).collect()))
}

/// The last block holds a copy of the superblock: an old one must not outlive the old label.
async fn wipe_end(device: &dyn Device) -> io::Result<()> {
    let last = BlockAddr(device.blocks() - 1);
    device.write(last, vec![AlignedBuf::zeroed(BLOCK_SIZE).into()], Durability::Stable).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::medium::WriteLife;
    use crate::mem_device::MemDevice;
    use crate::register::Register;
    use crate::runtime::SimRuntime;
    use crate::slots::NoLocks;

    const TIMES: LeaseTimes = LeaseTimes { write_life: WriteLife::Bounded(Duration::from_secs(1)) };

    fn make(world: &SimRuntime, device: &MemDevice, force: bool) -> Result<Label, PrepareError> {
        let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
        let device: Arc<dyn Device> = Arc::new(device.clone());
        world.run(async move {
            let options = PrepareOptions { text: "films".into(), force, ..PrepareOptions::default() };
            let label = prepare(&device, &NoLocks, TIMES, &runtime, &options, &|_| b"first".to_vec()).await?;
            finish(&*device, &NoLocks, TIMES, &*runtime, &label).await?;
            Ok(label)
        })
    }

    #[test]
    fn a_prepared_device_has_a_label_and_the_first_value_of_the_register() {
        let (world, device) = (SimRuntime::new(1), MemDevice::new(20_000));
        let label = make(&world, &device, false).unwrap();
        let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
        let register = Register::on_device(NodeId(3), Arc::new(device.clone()), &label, runtime, 1);
        let snapshot = world.run(async move { register.read().await }).unwrap();
        assert_eq!((snapshot.sequence, &*snapshot.body), (1, &b"first"[..]));
        device.crash(|_| false);
        assert_eq!(world.run(async move { Label::read(&device).await }).unwrap(), label);
    }

    #[test]
    fn a_device_that_carries_something_is_not_overwritten_unless_forced() {
        let (world, device) = (SimRuntime::new(1), MemDevice::new(20_000));
        device.poke(BlockAddr(0), |block| block[..4].copy_from_slice(b"XFSB"));
        assert!(matches!(make(&world, &device, false), Err(PrepareError::Carries(Signature::Xfs))));
        make(&world, &device, true).unwrap();
        assert!(matches!(make(&world, &device, false), Err(PrepareError::Carries(Signature::Matrix))));
    }

    #[test]
    fn a_power_cut_during_mkfs_leaves_a_device_without_label() {
        let (world, device) = (SimRuntime::new(1), MemDevice::new(20_000));
        make(&world, &device, false).unwrap();
        device.record();
        make(&world, &device, true).unwrap();
        let changes = device.take_recorded();
        let copy = MemDevice::new(20_000);
        for change in &changes[..changes.len() - 1] {
            copy.apply(change);
            let now = copy.clone();
            assert!(world.run(async move { Label::read(&now).await }).is_err());
        }
    }

    #[test]
    fn of_two_mkfs_at_the_same_time_the_first_label_loses() {
        let (world, device) = (SimRuntime::new(1), MemDevice::new(20_000));
        let late = device.clone();
        let wait = world.sleep(Duration::from_secs(1));
        world.spawn(Box::pin(async move {
            wait.await;
            let other = Label::new(20_000, "other", None, Default::default()).unwrap();
            other.write(&late).await.unwrap();
        }));
        assert!(matches!(make(&world, &device, false), Err(PrepareError::Raced)));
    }
}
