//! Mount options (`-o`): parsed here once, refused when unknown, carried to the daemon as values.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use storage_control::DeviceName;

/// Which methods may prove that another node no longer writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FenceMethod {
    /// The same host's proof of death where it applies, else the lease's expiry
    #[default]
    Auto,
    /// Only the lease's expiry, as if every node ran on a host of its own
    Lease,
}

/// The `-o` options of one mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountOptions {
    pub(crate) read_only: bool,
    pub(crate) no_atime: bool,
    /// What the kernel enforces by itself, as it calls it.
    pub(crate) kernel: Vec<String>,
    pub(crate) fence: FenceMethod,
    /// Longest life of a write the device accepted, where it cannot be found out.
    pub(crate) io_timeout: Option<Duration>,
    /// The name that the device must have in its matrix.
    pub(crate) device: Option<DeviceName>,
}

/// Options of mount(8) and fstab that mean nothing to the filesystem.
const IGNORED: [&str; 8] = ["defaults", "auto", "noauto", "user", "users", "nouser", "nofail", "_netdev"];

/// Options that the kernel enforces for any filesystem.
const KERNEL: [&str; 10] =
    ["exec", "noexec", "suid", "nosuid", "dev", "nodev", "sync", "async", "dirsync", "atime"];

/// Options that `mount.mfs` takes out of `-o` because they are arguments of `matrix mount`.
pub(crate) const AS_ARGUMENTS: [(&str, &str); 3] =
    [("node", "--node"), ("run-dir", "--run-dir"), ("listen", "--listen")];

impl MountOptions {
    /// Reads comma-separated options; a later one wins.
    pub(crate) fn parse<S: AsRef<str>>(lists: &[S]) -> Result<MountOptions, String> {
        let mut options = MountOptions::default();
        for option in lists.iter().flat_map(|list| list.as_ref().split(',')).filter(|o| !o.is_empty()) {
            options.apply(option)?;
        }
        Ok(options)
    }

    fn apply(&mut self, option: &str) -> Result<(), String> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        match (name, value) {
            ("ro", None) => self.read_only = true,
            ("rw", None) => self.read_only = false,
            ("noatime", None) => self.no_atime = true,
            ("relatime", None) => self.no_atime = false,
            ("fence", Some("auto")) => self.fence = FenceMethod::Auto,
            ("fence", Some("lease")) => self.fence = FenceMethod::Lease,
            ("fence", _) => return Err("option fence: write fence=auto or fence=lease".into()),
            ("io_timeout", Some(value)) => self.io_timeout = Some(seconds(value)?),
            ("device", Some(name)) => {
                self.device = Some(name.parse().map_err(|e| format!("option device: {e}"))?);
            }
            (name, None) if KERNEL.contains(&name) => self.kernel.push(name.to_string()),
            (name, None) if IGNORED.contains(&name) || name.starts_with("x-") => {}
            (name, Some(_)) if name.starts_with("x-") => {}
            _ => {
                return Err(format!(
                    "unknown mount option '{option}': known are ro, rw, noatime, relatime, nosuid, nodev, noexec, sync, dirsync, fence=auto|lease, io_timeout=SECONDS, device=NAME"
                ));
            }
        }
        Ok(())
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.trim_end_matches('s').parse::<f64>() {
        Ok(s) if s > 0.0 && s <= 3600.0 => Ok(Duration::from_secs_f64(s)),
        _ => Err(format!("option io_timeout={text}: write seconds between 0 and 3600, such as io_timeout=5")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_later_ones_win() {
        let options = MountOptions::parse(&[
            "ro,noatime,_netdev",
            "fence=lease,rw,nodev,io_timeout=5,device=disk1,x-systemd.automount",
        ]);
        let options = options.expect("all known");
        assert!(!options.read_only && options.no_atime);
        assert_eq!(options.kernel, ["nodev"]);
        assert_eq!(options.fence, FenceMethod::Lease);
        assert_eq!(options.io_timeout, Some(Duration::from_secs(5)));
        assert_eq!(options.device.as_ref().map(DeviceName::as_str), Some("disk1"));
    }

    #[test]
    fn unknown_options_are_refused_by_name() {
        let error = MountOptions::parse(&["bogus=1"]).expect_err("unknown");
        assert!(error.contains("bogus=1"), "{error}");
        for bad in ["fence=none", "io_timeout=0", "io_timeout=x", "ro=1", "device", "device=/dev/sdb"] {
            assert!(MountOptions::parse(&[bad]).is_err(), "{bad}");
        }
    }
}
