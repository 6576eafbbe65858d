//! `matrix fsck`: checks everything the format promises, changes nothing.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use mfs::fsck::{Options, Report, check};
use storage_control::{Label, Runtime, TestRuntime, block_on};

use super::progress::Progress;
use super::query::print;
use super::{live, size};
use crate::failure::Failure;

/// Exit code of fsck(8): the check could not be carried out.
const EXIT_CANNOT_CHECK: u8 = 8;
/// Exit code of fsck(8): wrong usage.
pub(super) const EXIT_USAGE: u8 = 16;

#[derive(Args)]
pub(super) struct FsckArgs {
    /// Device or image file; nobody may have it mounted
    path: PathBuf,
    /// Check what is on the disk as it is, without the records of journals that were not replayed
    #[arg(long)]
    as_is: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: FsckArgs) -> Result<ExitCode, Failure> {
    let cannot = |e: &dyn std::fmt::Display| {
        Failure::with_code(EXIT_CANNOT_CHECK, format!("{}: {e}", args.path.display()))
    };
    let alone = live::open(&args.path).map_err(|e| Failure::with_code(EXIT_CANNOT_CHECK, e))?;
    let label = block_on(Label::read(&alone.device)).map_err(|e| cannot(&e))?;
    let users = alone.users(&label).map_err(|e| cannot(&e))?;
    if !users.is_empty() {
        return Err(cannot(&format!("in use by {}: unmount it everywhere first", users.join(", "))));
    }
    let progress = Arc::new(Progress::new("checking"));
    let told = Arc::clone(&progress);
    let options = Options {
        replay: (!args.as_is).then(|| Arc::new(TestRuntime::new()) as Arc<dyn Runtime>),
        progress: Some(Box::new(move |p| told.set(p.done, p.total))),
        ..Options::default()
    };
    let report = block_on(check(Arc::new(alone.device), options));
    drop(progress);
    if args.json {
        print(&serde_json::to_string_pretty(&report).map_err(|e| cannot(&e))?);
    } else {
        show(&args.path, &report);
    }
    Ok(ExitCode::from(u8::try_from(report.exit_code()).unwrap_or(EXIT_CANNOT_CHECK)))
}

fn show(path: &Path, report: &Report) {
    for finding in &report.findings {
        print(&finding.to_string());
    }
    if report.more > 0 {
        print(&format!("... and {} more", report.more));
    }
    if let Some(why) = &report.failed {
        print(&format!("{}: the check could not be finished: {why}", path.display()));
        return;
    }
    let s = &report.stats;
    let bytes = |blocks: u64| size::show(blocks * storage_control::BLOCK_SIZE as u64);
    print(&format!(
        "{}: {}: {} inodes ({} directories, {} orphans), {} names, {} data, {} metadata, {} free, {} journals ({} not replayed)",
        path.display(),
        if report.is_clean() { "clean" } else { "ERRORS" },
        s.inodes,
        s.directories,
        s.orphans,
        s.names,
        bytes(s.data_blocks),
        bytes(s.metadata_blocks),
        bytes(s.free_blocks + s.freed_metadata_blocks),
        s.journals,
        s.dirty_journals,
    ));
}
