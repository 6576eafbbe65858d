//! The portable FUSE transport: the operations behind a kernel mount, through the `fuser` crate.
//!
//! Threads that read requests never block and never notify; the kernel's caches are invalidated from a pool of
//! their own. This process never touches its own mount.

mod adapter;
mod convert;
mod notifier;

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use parking_lot::Mutex;
use storage_control::Runtime;

use crate::ops::Operations;
use adapter::Adapter;
use convert::Numbers;

pub use notifier::FuseCache;

/// Threads that read requests, each with its own clone of the descriptor.
const THREADS: usize = 3;
/// What the kernel reads ahead of a sequential reader.
const READ_AHEAD_KIB: u32 = 1024;

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Where.
    pub mountpoint: PathBuf,
    /// What `mount` and `df` show as the source.
    pub source: String,
    /// Mount options as in `-o`, one each: `ro`, `noatime`, `nosuid`, `nodev`, `noexec`, `sync`, `dirsync` and
    /// their opposites.
    pub options: Vec<String>,
}

/// A kernel mount. Dropping it unmounts.
pub struct Mounted {
    mountpoint: PathBuf,
    /// Number of the FUSE connection, where the kernel shows it.
    connection: Option<u32>,
    session: Mutex<Option<BackgroundSession>>,
}

/// Mounts. `cache` is the one that was given to the filesystem behind `operations`.
pub fn mount<O: Operations>(
    operations: Arc<O>,
    cache: &FuseCache,
    runtime: Arc<dyn Runtime>,
    options: &MountOptions,
) -> io::Result<Mounted> {
    let mountpoint = options.mountpoint.canonicalize()?;
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    config.mount_options = vec![
        MountOption::FSName(options.source.clone()),
        MountOption::Subtype("matrix".into()),
        MountOption::DefaultPermissions,
    ];
    for option in &options.options {
        config.mount_options.push(mount_option(option)?);
    }
    let numbers = Numbers { root: operations.root() };
    let session = Session::new(Adapter { operations, runtime, numbers }, &mountpoint, &config)?;
    cache.connect(session.notifier());
    let session = session.spawn()?;
    let connection = connection_of(&mountpoint);
    if let Some(number) = connection {
        // Only a matter of speed; without the right the kernel's own value stays.
        let _ =
            std::fs::write(format!("/sys/class/bdi/0:{number}/read_ahead_kb"), READ_AHEAD_KIB.to_string());
    }
    Ok(Mounted { mountpoint, connection, session: Mutex::new(Some(session)) })
}

fn mount_option(option: &str) -> io::Result<MountOption> {
    Ok(match option {
        "ro" => MountOption::RO,
        "rw" => MountOption::RW,
        "suid" => MountOption::Suid,
        "nosuid" => MountOption::NoSuid,
        "dev" => MountOption::Dev,
        "nodev" => MountOption::NoDev,
        "exec" => MountOption::Exec,
        "noexec" => MountOption::NoExec,
        "atime" | "relatime" => MountOption::Atime,
        "noatime" => MountOption::NoAtime,
        "sync" => MountOption::Sync,
        "async" => MountOption::Async,
        "dirsync" => MountOption::DirSync,
        other => {
            let kind = io::ErrorKind::InvalidInput;
            return Err(io::Error::new(kind, format!("unknown mount option '{other}'")));
        }
    })
}

/// The minor device number of the mount, read from the mount table and not from the mount.
fn connection_of(mountpoint: &Path) -> Option<u32> {
    let table = std::fs::read("/proc/self/mountinfo").ok()?;
    let wanted = escape(mountpoint);
    let lines = table.split(|b| *b == b'\n');
    let line = lines.rev().find(|l| l.split(|b| *b == b' ').nth(4) == Some(&wanted))?;
    let device = line.split(|b| *b == b' ').nth(2)?;
    let (_, minor) = std::str::from_utf8(device).ok()?.split_once(':')?;
    minor.parse().ok()
}

/// A path as the mount table writes it.
fn escape(path: &Path) -> Vec<u8> {
    let mut out = Vec::new();
    for b in path.as_os_str().as_bytes() {
        match b {
            b' ' | b'\t' | b'\n' | b'\\' => out.extend_from_slice(format!("\\{b:03o}").as_bytes()),
            other => out.push(*other),
        }
    }
    out
}

impl Mounted {
    /// Where the filesystem is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Unmounts and waits until the last request is answered. `EBUSY` while files are open: the mount goes on.
    /// Blocks the calling thread.
    pub fn unmount(&self) -> io::Result<()> {
        self.umount(0)?;
        self.wait()
    }

    /// Takes the mount out of the tree whatever uses it; whoever has files open gets errors.
    pub fn unmount_by_force(&self) -> io::Result<()> {
        self.umount(libc::MNT_FORCE | libc::MNT_DETACH)?;
        self.abort();
        self.wait()
    }

    fn umount(&self, flags: i32) -> io::Result<()> {
        let path = CString::new(self.mountpoint.as_os_str().as_bytes())?;
        // SAFETY: `path` is a string that ends with a zero byte and outlives the call.
        if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // Somebody else was faster.
            error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            error => Err(error),
        }
    }

    /// Cuts the connection to the kernel: every open request and every later one fails, cached data serve
    /// nobody any more. For the end of the lease.
    pub fn abort(&self) {
        if let Some(number) = self.connection {
            let file = format!("/sys/fs/fuse/connections/{number}/abort");
            if std::fs::write(file, "1").is_ok() {
                return;
            }
        }
        let _ = self.umount(libc::MNT_FORCE);
    }

    /// Waits until the mount is gone, by whomever. Blocks the calling thread.
    pub fn wait(&self) -> io::Result<()> {
        // Taken out first: two waiters must not hold a mutex over the join.
        let session = self.session.lock().take();
        match session {
            Some(session) => session.join(),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_options_are_refused_by_name() {
        let error = mount_option("frobnicate").unwrap_err();
        assert!(error.to_string().contains("frobnicate"));
    }

    #[test]
    fn paths_are_escaped_as_in_the_mount_table() {
        assert_eq!(escape(Path::new("/mnt/a b\\c")), b"/mnt/a\\040b\\134c");
    }
}
