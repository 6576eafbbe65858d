//! What a check found.

use std::fmt;

use serde::Serialize;
use storage_control::BlockAddr;

use crate::error::FsError;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth saying; nothing is wrong.
    Note,
    /// Space is lost, data are not.
    Leak,
    /// The format's promises are broken.
    Error,
}

/// One finding: a sentence in three parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// The thing: "directory 4711", "bitmap of group 3".
    pub what: String,
    /// The block to look at.
    #[serde(rename = "block")]
    pub at: BlockAddr,
    /// What is wrong with it.
    pub why: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Note => "note",
            Severity::Leak => "leak",
            Severity::Error => "error",
        };
        write!(f, "{severity}: {} (block {}): {}", self.what, self.at, self.why)
    }
}

/// What the filesystem holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// All inodes, orphans included.
    pub inodes: u64,
    /// Directories among them.
    pub directories: u64,
    /// Names, `.` and `..` not counted.
    pub names: u64,
    /// Inodes that wait in orphan tables.
    pub orphans: u64,
    /// Blocks of file data.
    pub data_blocks: u64,
    /// Blocks of metadata and journals.
    pub metadata_blocks: u64,
    /// Freed metadata blocks that do not serve as data yet.
    pub freed_metadata_blocks: u64,
    /// Free blocks.
    pub free_blocks: u64,
    /// Journals.
    pub journals: u64,
    /// Journals with records that are not replayed.
    pub dirty_journals: u64,
}

/// The outcome of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The first findings, up to the limit in [`super::Options`].
    pub findings: Vec<Finding>,
    /// Findings beyond the limit.
    pub more: u64,
    /// What was counted.
    pub stats: Stats,
    /// Why the check could not be carried out or finished.
    pub failed: Option<String>,
    errors: u64,
    limit: usize,
}

impl Report {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    pub(super) fn add(
        &mut self,
        severity: Severity,
        what: impl Into<String>,
        at: BlockAddr,
        why: impl Into<String>,
    ) {
        if severity > Severity::Note {
            self.errors += 1;
        }
        if self.findings.len() < self.limit {
            self.findings.push(Finding { severity, what: what.into(), at, why: why.into() });
        } else {
            self.more += 1;
        }
    }

    pub(super) fn error(&mut self, what: impl Into<String>, at: BlockAddr, why: impl Into<String>) {
        self.add(Severity::Error, what, at, why);
    }

    /// Takes in an error met while reading `what` at `at`.
    pub(super) fn failure(&mut self, what: impl Into<String>, at: BlockAddr, error: &FsError) {
        match error {
            FsError::Corrupt { what: part, addr, why } => {
                self.error(what, *addr, format!("{part}: {why}"));
            }
            other => self.error(what, at, format!("cannot be read: {other}")),
        }
    }

    /// Whether nothing is wrong. Notes do not count.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.failed.is_none()
    }

    /// As fsck(8): 0 clean, 4 errors left, 8 the check itself failed, or both bits.
    pub fn exit_code(&self) -> i32 {
        let errors = if self.errors > 0 { 4 } else { 0 };
        let failed = if self.failed.is_some() { 8 } else { 0 };
        errors | failed
    }
}
