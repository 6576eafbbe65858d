//! The read-only check of everything the format promises.
//!
//! Nothing is ever written to the device. Every block is looked at by the one thing that may use it: what two
//! things use, what is used and marked free, and what is marked used and used by nothing are findings. Memory
//! is two bits per block, the numbers of directories still to read, and an entry per inode with several names.

mod layout;
mod names;
mod overlay;
mod report;
mod space;
#[cfg(test)]
mod tests;
mod tree;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use storage_control::label::Label;
use storage_control::{AlignedBuf, BlockAddr, Device, Runtime};

pub use report::{Finding, Report, Severity, Stats};

use crate::LockName;
use crate::error::FsError;
use crate::format::group::BlockState;
use crate::format::header::{Block, BlockKind, verify};
use crate::format::superblock::Superblock;
use space::{Refusal, Uses};
use walk::Linked;

/// How far a check has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is counted.
    pub what: &'static str,
    /// How many are done.
    pub done: u64,
    /// Of how many; 0 when that is not known.
    pub total: u64,
}

/// How to check.
pub struct Options {
    /// Replay journals that hold records into memory and check the state that results, as the next mount would
    /// find it. The runtime gives the pause before a torn record is believed.
    pub replay: Option<Arc<dyn Runtime>>,
    /// Told now and then.
    pub progress: Option<Box<dyn Fn(Progress) + Send + Sync>>,
    /// Dinodes that are read at the same time.
    pub reads_in_flight: usize,
    /// Findings that are kept; further ones are only counted.
    pub max_findings: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { replay: None, progress: None, reads_in_flight: 32, max_findings: 1000 }
    }
}

/// Checks the filesystem on a device; nobody may have it mounted. What keeps the check from being carried out
/// (no label or superblock, a failing device) ends up in [`Report::failed`].
pub async fn check(device: Arc<dyn Device>, options: Options) -> Report {
    match Label::read(&*device).await {
        Ok(label) => check_at(device, label.fs_start, options).await,
        Err(error) => {
            let mut report = Report::new(options.max_findings);
            report.failed = Some(error.to_string());
            report
        }
    }
}

/// The same where the superblock's place is known.
pub async fn check_at(device: Arc<dyn Device>, fs_start: BlockAddr, options: Options) -> Report {
    let mut report = Report::new(options.max_findings);
    if let Err(error) = run(device, fs_start, &options, &mut report).await {
        report.failed = Some(error.to_string());
    }
    report
}

async fn run(
    device: Arc<dyn Device>,
    fs_start: BlockAddr,
    options: &Options,
    report: &mut Report,
) -> Result<(), FsError> {
    let (superblock, _) = Superblock::read(&*device, fs_start).await?;
    let device = layout::replay(device, &superblock, options, report).await?;
    // What replay brought back counts, so the comparison with the copy comes after it.
    let superblock = layout::superblock(&*device, fs_start, report).await?;
    let mut checker = Checker {
        uses: Uses::new(superblock.geometry),
        device,
        superblock,
        options,
        report: std::mem::take(report),
        linked: BTreeMap::new(),
        orphans: BTreeMap::new(),
        truncating: BTreeSet::new(),
    };
    checker.take_group_heads();
    checker.check_journals().await;
    checker.walk_names().await;
    checker.walk_orphans().await;
    checker.note_finished_truncations();
    checker.check_groups().await;
    *report = checker.report;
    Ok(())
}

/// A check under way.
struct Checker<'a> {
    device: Arc<dyn Device>,
    superblock: Superblock,
    options: &'a Options,
    report: Report,
    /// Who uses which block.
    uses: Uses,
    /// Inodes with a link count above 1.
    linked: BTreeMap<u64, Linked>,
    /// Inodes in orphan tables that are to be freed: journal and generation.
    orphans: BTreeMap<u64, (u16, u64)>,
    /// Inodes in orphan tables with a truncation under way.
    truncating: BTreeSet<u64>,
}

impl Checker<'_> {
    /// Takes blocks into use for `what`; a finding and false if they are not there or used already.
    fn take(&mut self, what: &str, addr: BlockAddr, len: u64, state: BlockState) -> bool {
        let why = match self.uses.take(addr, len, state) {
            Ok(()) => return true,
            Err((_, Refusal::Outside)) => format!("block {addr} lies outside of every group"),
            Err((block, Refusal::Taken(_))) => format!("block {block} is used twice"),
        };
        self.report.error(what, addr, why);
        false
    }

    /// Checks a block that was read.
    fn verify(
        &self,
        image: &AlignedBuf,
        addr: BlockAddr,
        kind: BlockKind,
        owner: LockName,
    ) -> Result<Box<Block>, FsError> {
        let block: Box<Block> = Box::new(image[..].try_into().expect("one block was read"));
        verify(&block, kind, addr, &self.superblock.secret, owner)?;
        Ok(block)
    }

    /// Reads and checks a block.
    async fn block(&self, addr: BlockAddr, kind: BlockKind, owner: LockName) -> Result<Box<Block>, FsError> {
        if addr.0 >= self.device.blocks() {
            return Err(FsError::corrupt(kind.name(), addr, "it lies outside the device"));
        }
        let image = self.device.read(addr, 1).await?;
        self.verify(&image, addr, kind, owner)
    }

    fn progress(&self, what: &'static str, done: u64, total: u64) {
        if let Some(progress) = &self.options.progress {
            progress(Progress { what, done, total });
        }
    }
}
