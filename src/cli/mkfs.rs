//! `matrix mkfs`: makes a filesystem; what is on the device is overwritten only if it is nothing or --force says so.
//!
//! The old label goes first and the new one comes last: a device whose making was cut short holds no filesystem.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use storage_control::{
    BLOCK_SIZE, Device, FileDevice, Label, LabelError, OpenAs, WallTime, WriteLife, block_on, slots::Nonce,
};

use super::live::{self, Alone};
use super::progress::Progress;
use super::size;
use crate::failure::{Context, Failure};

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
    /// Overwrite another filesystem, and one that is in use
    #[arg(long)]
    force: bool,
}

/// What to make.
pub(super) struct Plan<'a> {
    pub(super) size: Option<u64>,
    pub(super) label: &'a str,
    pub(super) io_timeout: Option<Duration>,
    pub(super) force: bool,
}

pub(super) fn run(args: MkfsArgs) -> Result<ExitCode, Failure> {
    let plan = Plan {
        size: args.size,
        label: &args.label,
        io_timeout: args.io_timeout.map(|s| Duration::from_secs(s.into())),
        force: args.force,
    };
    let label = make(&args.path, &plan)?;
    println!(
        "{}: {} filesystem {}, for up to {} nodes",
        args.path.display(),
        size::show(label.device_blocks * BLOCK_SIZE as u64),
        label.fs,
        label.quorum.slots,
    );
    Ok(ExitCode::SUCCESS)
}

/// Makes a filesystem at `path` and tells its label.
pub(super) fn make(path: &Path, plan: &Plan<'_>) -> Result<Label, Failure> {
    let name = path.display();
    let alone = open(path, plan.size)?;
    let device = &alone.device;
    let blocks = blocks_to_use(device, plan.size).context(&name)?;
    if let Some(why) = reason_to_refuse(&alone).context(&name)? {
        if !plan.force {
            return Err(Failure::new(format!("{name}: {why}: nothing was changed; --force overwrites it")));
        }
        eprintln!("matrix: {name}: overwriting {why}");
    }
    let label = Label::new(blocks, plan.label, plan.io_timeout, WallTime::system()).context(&name)?;
    let options = mfs::mkfs::Options {
        blocks,
        fs_start: label.fs_start,
        label: plan.label.to_string(),
        uuid: label.fs.into_bytes(),
        secret: Nonce::random().0,
        now: label.created,
        journals: None,
        group_blocks: None,
    };
    block_on(write(device, &label, &options)).context(&name)?;
    Ok(label)
}

fn open(path: &Path, size: Option<u64>) -> Result<Alone, Failure> {
    match (path.exists(), size) {
        (true, _) => live::open(path).map_err(Failure::new),
        (false, Some(bytes)) => {
            let whole = bytes / BLOCK_SIZE as u64 * BLOCK_SIZE as u64;
            check_size(whole).map_err(|e| Failure::new(format!("{}: {e}", path.display())))?;
            FileDevice::create(path, whole, OpenAs::default()).map_err(Failure::new)?;
            live::open(path).map_err(Failure::new)
        }
        (false, None) => Err(Failure::new(format!(
            "{}: no such file or device: name an existing one, or give --size to make an image file",
            path.display()
        ))),
    }
}

fn check_size(bytes: u64) -> Result<(), String> {
    let least = mfs::mkfs::MIN_BLOCKS * BLOCK_SIZE as u64;
    if bytes >= least {
        return Ok(());
    }
    Err(format!("{} is too small: a filesystem needs at least {}", size::show(bytes), size::show(least)))
}

fn blocks_to_use(device: &FileDevice, size: Option<u64>) -> Result<u64, String> {
    let bytes = device.blocks() * BLOCK_SIZE as u64;
    match size {
        Some(wanted) if wanted > bytes => {
            Err(format!("--size {} is more than the {} it has", size::show(wanted), size::show(bytes)))
        }
        wanted => {
            check_size(wanted.unwrap_or(bytes))?;
            Ok(wanted.unwrap_or(bytes) / BLOCK_SIZE as u64)
        }
    }
}

/// What the device holds, if it is not to be overwritten unasked.
fn reason_to_refuse(alone: &Alone) -> Result<Option<String>, String> {
    match block_on(Label::read(&alone.device)) {
        Ok(label) => {
            let users = alone.users(&label)?;
            if !users.is_empty() {
                return Ok(Some(format!("a Matrix filesystem that {} has mounted", users.join(", "))));
            }
            Ok(Some(format!(
                "a Matrix filesystem{}",
                if label.text.is_empty() { String::new() } else { format!(" labelled '{}'", label.text) }
            )))
        }
        Err(LabelError::NotMatrix { found }) => Ok(found.map(|found| found.to_string())),
        Err(LabelError::Io(e)) => Err(e.to_string()),
        Err(damaged) => Ok(Some(format!("a Matrix filesystem ({damaged})"))),
    }
}

async fn write(device: &FileDevice, label: &Label, options: &mfs::mkfs::Options) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    Label::wipe(device).await.map_err(|e| text(&e))?;
    let shared: Arc<dyn Device> = Arc::new(device.clone());
    let progress = Progress::new("making groups");
    mfs::mkfs::mkfs(&shared, options, |done, total| progress.set(done, total)).await.map_err(|e| text(&e))?;
    label.write(device).await.map_err(|e| text(&e))?;
    device.flush().await.map_err(|e| text(&e))?;
    // Another mkfs that was delayed may still land; only after the life of a write is the label surely ours.
    if let WriteLife::Bounded(life) = device.medium().write_life(label.io_timeout) {
        std::thread::sleep(life);
    }
    match Label::read(device).await {
        Ok(found) if found.nonce == label.nonce => Ok(()),
        Ok(_) => Err("another mkfs ran at the same time and won: nothing of this one counts".into()),
        Err(e) => Err(text(&e)),
    }
}
