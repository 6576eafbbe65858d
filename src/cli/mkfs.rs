//! `matrix mkfs`: makes a filesystem; what is on the device is overwritten only if it is nothing or --force says so.
//!
//! The old label goes first and the new one comes last: a device whose making was cut short holds no filesystem.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use membership::{NamingDatabase, View};
use storage_control::lease::LeaseTimes;
use storage_control::mkfs::{self, PrepareOptions};
use storage_control::slots::Nonce;
use storage_control::{
    BLOCK_SIZE, Device, DeviceName, FileDevice, Label, OpenAs, Runtime, TestRuntime, block_on,
};

use super::progress::Progress;
use super::size;
use crate::failure::Failure;

#[derive(Args)]
pub(super) struct MkfsArgs {
    /// Device or image file; a file that does not exist is made when --size is given
    path: PathBuf,
    /// Size, such as 512M or 2G [default: all of the device]
    #[arg(long, value_parser = size::parse)]
    size: Option<u64>,
    /// Name of the filesystem, at most 64 bytes
    #[arg(long, default_value = "")]
    label: String,
    /// Longest life in seconds of a write that the device has accepted, where it cannot be found out
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u16).range(1..=3600))]
    io_timeout: Option<u16>,
    /// What every node of the matrix calls the device, whatever its path there
    #[arg(long, value_name = "NAME", default_value = FIRST_DEVICE)]
    device_name: DeviceName,
    /// Overwrite another filesystem, and one that is in use
    #[arg(long)]
    force: bool,
}

/// The name of a matrix's first device, where the user gives none.
const FIRST_DEVICE: &str = "disk1";

/// What to make.
pub(super) struct Plan<'a> {
    pub(super) size: Option<u64>,
    pub(super) label: &'a str,
    pub(super) io_timeout: Option<Duration>,
    pub(super) device_name: DeviceName,
    pub(super) force: bool,
}

impl Plan<'_> {
    /// What is made where the user only says that.
    pub(super) fn plain() -> Plan<'static> {
        let device_name = FIRST_DEVICE.parse().expect("a name");
        Plan { size: None, label: "", io_timeout: None, device_name, force: false }
    }
}

pub(super) fn run(args: MkfsArgs) -> Result<ExitCode, Failure> {
    let plan = Plan {
        size: args.size,
        label: &args.label,
        io_timeout: args.io_timeout.map(|s| Duration::from_secs(s.into())),
        device_name: args.device_name,
        force: args.force,
    };
    let label = make(&args.path, &plan)?;
    println!(
        "{}: {} filesystem {} on device {}, for up to {} nodes",
        args.path.display(),
        size::show(label.device_blocks * BLOCK_SIZE as u64),
        label.fs,
        plan.device_name,
        label.quorum.slots,
    );
    Ok(ExitCode::SUCCESS)
}

/// Makes a filesystem at `path` and tells its label.
pub(super) fn make(path: &Path, plan: &Plan<'_>) -> Result<Label, Failure> {
    let device = open(path, plan.size)?;
    block_on(write(&device, plan)).map_err(|e| Failure::new(format!("{}: {e}", path.display())))
}

fn open(path: &Path, size: Option<u64>) -> Result<FileDevice, Failure> {
    let how = OpenAs { write: true, exclusive: !path.is_file(), ..OpenAs::default() };
    match (path.exists(), size) {
        (true, None) => FileDevice::open(path, how).map_err(Failure::new),
        (true, Some(wanted)) => {
            let device = FileDevice::open(path, how).map_err(Failure::new)?;
            let bytes = device.blocks() * BLOCK_SIZE as u64;
            if bytes == wanted / BLOCK_SIZE as u64 * BLOCK_SIZE as u64 {
                return Ok(device);
            }
            Err(Failure::new(format!(
                "{}: exists and has {}: leave --size {} out, or remove it first",
                path.display(),
                size::show(bytes),
                size::show(wanted)
            )))
        }
        (false, Some(bytes)) => {
            let least = mfs::mkfs::MIN_BLOCKS * BLOCK_SIZE as u64;
            if bytes < least {
                return Err(Failure::new(format!(
                    "{}: {} is too small: a filesystem needs at least {}",
                    path.display(),
                    size::show(bytes),
                    size::show(least)
                )));
            }
            FileDevice::create(path, bytes / BLOCK_SIZE as u64 * BLOCK_SIZE as u64, how).map_err(Failure::new)
        }
        (false, None) => Err(Failure::new(format!(
            "{}: no such file or device: name an existing one, or give --size to make an image file",
            path.display()
        ))),
    }
}

async fn write(device: &FileDevice, plan: &Plan<'_>) -> Result<Label, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let shared: Arc<dyn Device> = Arc::new(device.clone());
    if shared.blocks() < mfs::mkfs::MIN_BLOCKS {
        return Err(text(&mfs::mkfs::MkfsError::TooSmall(shared.blocks())));
    }
    let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
    let times = LeaseTimes { write_life: device.medium().write_life(plan.io_timeout) };
    let prepare =
        PrepareOptions { text: plan.label.to_string(), io_timeout: plan.io_timeout, force: plan.force };
    let journals = mfs::mkfs::journals_for(shared.blocks());
    let nobody = |label: &Label| {
        let names = NamingDatabase::of_one(plan.device_name.clone(), label.device, label.device_blocks);
        membership::codec::encode_view(&View::empty(journals, names))
    };
    let label = mkfs::prepare(&shared, device, times, &runtime, &prepare, &nobody).await;
    let label = label.map_err(|e| text(&e))?;
    let options = mfs::mkfs::Options {
        blocks: label.device_blocks,
        fs_start: label.fs_start,
        label: label.text.clone(),
        uuid: label.fs.into_bytes(),
        secret: Nonce::random().0,
        now: label.created,
        journals: Some(journals),
        group_blocks: None,
    };
    let progress = Progress::new("making groups");
    let made = mfs::mkfs::mkfs(&shared, &options, |done, total| progress.set(done, total)).await;
    made.map_err(|e| text(&e))?;
    mkfs::finish(&*shared, device, times, &*runtime, &label).await.map_err(|e| text(&e))?;
    Ok(label)
}
