//! What kind of thing a device is, and how long a write that it has accepted can live.
//!
//! [`WriteLife`] is D of the lease arithmetic. Where nothing bounds it, it is `Unbounded`: never a guess.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where a device's data lie.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Medium {
    /// An image in a file system that no other host can write.
    LocalImage,
    /// An image in a network, cluster or unknown file system.
    SharedImage,
    /// A loop device over an image in a local file system; other loop devices may lie over the same image.
    LocalLoop,
    /// Any other block device, by its major and minor number.
    Block {
        /// Major device number.
        major: u32,
        /// Minor device number.
        minor: u32,
    },
}

/// The longest life of a write that the device has accepted: D.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteLife {
    /// After so long it has reached the medium or never will.
    Bounded(Duration),
    /// Nothing says so.
    Unbounded,
}

/// A command is tried once and again five times (`SD_MAX_RETRIES`, `nvme_max_retries`).
const TRIES: u32 = 6;
/// How long aborting a command that timed out may take, where the device does not say (`eh_timeout` of SCSI).
const ABORT_DEFAULT_MS: u64 = 10_000;
/// How deep block devices are stacked before we stop believing it.
const MAX_STACK: usize = 8;

/// File systems whose files only this host can write, by the magic number of statfs(2).
const LOCAL_FILESYSTEMS: &[u32] = &[
    0xEF53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
    0x0102_1994, // tmpfs
    0x8584_58F6, // ramfs
    0xF2F5_2010, // f2fs
    0x2FC1_2FC1, // zfs
    0xCA45_1A4E, // bcachefs
    0x794C_7630, // overlayfs
];

/// Whether only this host can write files of a file system.
pub(crate) fn is_local_filesystem(magic: u32) -> bool {
    LOCAL_FILESYSTEMS.contains(&magic)
}

impl Medium {
    /// D of this medium; `operator_bound` (from `--io-timeout`) takes the place of what the device says.
    pub fn write_life(&self, operator_bound: Option<Duration>) -> WriteLife {
        self.write_life_under(Path::new("/sys"), operator_bound)
    }

    fn write_life_under(&self, sysfs: &Path, operator_bound: Option<Duration>) -> WriteLife {
        match self {
            Medium::LocalImage | Medium::LocalLoop => WriteLife::Bounded(Duration::ZERO),
            Medium::SharedImage => operator_bound.map_or(WriteLife::Unbounded, WriteLife::Bounded),
            Medium::Block { major, minor } => match operator_bound {
                Some(bound) => WriteLife::Bounded(bound),
                None => device_write_life(&sysfs.join(format!("dev/block/{major}:{minor}")), 0),
            },
        }
    }

    /// Whether only this host can write the data.
    pub fn is_local(&self) -> bool {
        match self {
            Medium::LocalImage | Medium::LocalLoop => true,
            Medium::SharedImage | Medium::Block { .. } => false,
        }
    }

    /// Whether a lock on a byte of the device excludes every other writer of it.
    pub fn lock_excludes_all(&self) -> bool {
        match self {
            Medium::LocalImage => true,
            Medium::LocalLoop | Medium::SharedImage | Medium::Block { .. } => false,
        }
    }
}

/// The whole disk's directory in sysfs, where `device` may be a partition.
pub(crate) fn whole_disk(device: &Path) -> Option<PathBuf> {
    let device = fs::canonicalize(device).ok()?;
    if device.join("partition").exists() { device.parent().map(Path::to_owned) } else { Some(device) }
}

fn read_number(path: PathBuf) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn device_write_life(device: &Path, depth: usize) -> WriteLife {
    let Some(disk) = whole_disk(device).filter(|_| depth < MAX_STACK) else { return WriteLife::Unbounded };
    let multipath = fs::read_to_string(disk.join("dm/uuid")).is_ok_and(|uuid| uuid.starts_with("mpath-"));
    if multipath {
        // May queue for ever while it has no path.
        return WriteLife::Unbounded;
    }
    let below: Vec<PathBuf> = fs::read_dir(disk.join("slaves"))
        .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
        .unwrap_or_default();
    // Present only where the driver has a time-out of its own.
    let own = read_number(disk.join("queue/io_timeout")).filter(|&ms| ms > 0).map(|timeout_ms| {
        let abort_ms = read_number(disk.join("device/eh_timeout"))
            .map_or(ABORT_DEFAULT_MS, |secs| secs.saturating_mul(1000));
        Duration::from_millis(timeout_ms.saturating_mul(u64::from(TRIES)).saturating_add(abort_ms))
    });
    if below.is_empty() {
        return own.map_or(WriteLife::Unbounded, WriteLife::Bounded);
    }
    // Queues that lie over one another add their times.
    let mut longest = Duration::ZERO;
    for device in below {
        match device_write_life(&device, depth + 1) {
            WriteLife::Bounded(life) => longest = longest.max(life),
            WriteLife::Unbounded => return WriteLife::Unbounded,
        }
    }
    WriteLife::Bounded(longest.saturating_add(own.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(sysfs: &Path, number: &str, files: &[(&str, &str)]) {
        let dir = sysfs.join("dev/block").join(number);
        for (name, content) in files {
            let file = dir.join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        }
        fs::create_dir_all(dir).unwrap();
    }

    fn life(sysfs: &Path, minor: u32) -> WriteLife {
        Medium::Block { major: 8, minor }.write_life_under(sysfs, None)
    }

    #[test]
    fn a_write_lives_for_all_tries_and_the_abort() {
        let sysfs = tempfile::tempdir().unwrap();
        disk(sysfs.path(), "8:0", &[("queue/io_timeout", "30000\n"), ("device/eh_timeout", "5\n")]);
        assert_eq!(life(sysfs.path(), 0), WriteLife::Bounded(Duration::from_secs(6 * 30 + 5)));
    }

    #[test]
    fn a_device_without_a_timeout_is_unbounded_until_the_operator_bounds_it() {
        let sysfs = tempfile::tempdir().unwrap();
        disk(sysfs.path(), "8:0", &[]);
        assert_eq!(life(sysfs.path(), 0), WriteLife::Unbounded);
        assert_eq!(life(sysfs.path(), 99), WriteLife::Unbounded);
        let bound = Duration::from_secs(5);
        let medium = Medium::Block { major: 8, minor: 0 };
        assert_eq!(medium.write_life_under(sysfs.path(), Some(bound)), WriteLife::Bounded(bound));
    }

    #[test]
    fn stacked_queues_add_their_times() {
        let sysfs = tempfile::tempdir().unwrap();
        disk(sysfs.path(), "8:0", &[("queue/io_timeout", "1000")]);
        disk(sysfs.path(), "8:1", &[("queue/io_timeout", "2000"), ("device/eh_timeout", "1")]);
        disk(sysfs.path(), "8:2", &[("slaves/x", "")]);
        let slaves = sysfs.path().join("dev/block/8:2/slaves");
        fs::remove_file(slaves.join("x")).unwrap();
        for lower in ["8:0", "8:1"] {
            std::os::unix::fs::symlink(sysfs.path().join("dev/block").join(lower), slaves.join(lower))
                .unwrap();
        }
        assert_eq!(life(sysfs.path(), 2), WriteLife::Bounded(Duration::from_secs(16)));
    }

    #[test]
    fn an_image_that_no_other_host_can_write_has_no_late_writes() {
        assert_eq!(Medium::LocalImage.write_life(None), WriteLife::Bounded(Duration::ZERO));
        assert_eq!(Medium::SharedImage.write_life(None), WriteLife::Unbounded);
    }
}
