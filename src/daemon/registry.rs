//! Which daemon serves which directory: one small file per mount under `/run/matrix/mounts`.
//!
//! Several daemons of one host have their own run directories; DIR alone must be enough to find the one that serves
//! it. An entry is advice: whether the daemon lives is told by the lock in its run directory, whether the mount is
//! there by the kernel's table. An entry of a dead daemon stays until its mount is cleared away.

use std::fs;
use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::run_dir::{RUN_ROOT, RunDir};

/// One mount as its daemon registered it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) device: PathBuf,
    pub(crate) node: String,
}

impl Entry {
    pub(crate) fn run_dir(&self) -> RunDir {
        RunDir::new(&self.run_dir)
    }
}

/// Registers a mount; replaces what a dead daemon left for the same directory.
pub(crate) fn add(entry: &Entry) -> io::Result<()> {
    let file = file_of(&entry.dir);
    if let Some(parent) = file.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    let half = file.with_extension(format!("new-{}", std::process::id()));
    fs::write(&half, serde_json::to_vec(entry)?)?;
    fs::rename(&half, &file)
}

/// Forgets the mount at `dir`, if `run_dir`'s daemon registered it.
pub(crate) fn remove(dir: &Path, run_dir: &Path) {
    if find(dir).is_some_and(|entry| entry.run_dir == run_dir) {
        let _ = fs::remove_file(file_of(dir));
    }
}

/// The entry for exactly `dir`.
pub(crate) fn find(dir: &Path) -> Option<Entry> {
    read(&file_of(dir)).filter(|entry| entry.dir == dir)
}

/// All entries, in the order of their directories.
pub(crate) fn all() -> Vec<Entry> {
    let files = fs::read_dir(root()).into_iter().flatten().flatten();
    let mut entries: Vec<Entry> = files.filter_map(|file| read(&file.path())).collect();
    entries.sort_by(|a, b| a.dir.cmp(&b.dir));
    entries
}

fn read(file: &Path) -> Option<Entry> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

fn root() -> PathBuf {
    Path::new(RUN_ROOT).join("mounts")
}

/// The entry's file: a hash of the whole path, and its last characters for people.
fn file_of(dir: &Path) -> PathBuf {
    let mut hasher = std::hash::DefaultHasher::new();
    dir.as_os_str().as_bytes().hash(&mut hasher);
    let readable: String =
        dir.to_string_lossy().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let tail = &readable[readable.len().saturating_sub(60)..];
    root().join(format!("{:016x}{tail}", hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_directory_has_a_file_of_its_own() {
        assert_ne!(file_of(Path::new("/mnt/a")), file_of(Path::new("/mnt/b")));
        let long = file_of(Path::new(&format!("/{}", "x".repeat(4000))));
        assert!(long.file_name().is_some_and(|n| n.len() <= 255));
    }
}
