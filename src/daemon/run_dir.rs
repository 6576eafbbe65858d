//! A daemon's run directory: its pid, log, control socket, private key, and the lock that makes it the only one.
//!
//! At most one live daemon holds `lock`; the kernel drops it with the process, so a dead daemon never blocks the
//! next one. `matrix.pid` names the holder while it lives and is removed at a clean end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where run directories and the registry of mounts live unless told otherwise.
pub(crate) const RUN_ROOT: &str = "/run/matrix";

/// Longest path of a Unix socket, with its terminating zero (unix(7)).
const SOCKET_PATH_MAX: usize = 108;

/// The paths inside one run directory.
#[derive(Clone, Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
}

/// The daemon's claim on its run directory; falls with the process.
pub(crate) struct RunLock {
    _file: File,
    pid_file: PathBuf,
}

impl RunDir {
    pub(crate) fn new(path: impl Into<PathBuf>) -> RunDir {
        RunDir { path: path.into() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.path.join("matrix.pid")
    }

    pub(crate) fn log_file(&self) -> PathBuf {
        self.path.join("matrix.log")
    }

    pub(crate) fn control_socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// Makes the directory, readable by its owner only (the node's private key lives there).
    pub(crate) fn create(&self) -> io::Result<()> {
        if self.control_socket().as_os_str().len() >= SOCKET_PATH_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the path is too long for a control socket: choose a shorter --run-dir",
            ));
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path)
    }

    /// Claims the directory for this process and writes its pid; `Ok(None)` while another daemon lives in it.
    pub(crate) fn claim(&self) -> io::Result<Option<RunLock>> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.path.join("lock"))?;
        if !try_flock(&file)? {
            return Ok(None);
        }
        let pid_file = self.pid_file();
        let mut pid =
            OpenOptions::new().create(true).truncate(true).write(true).mode(0o644).open(&pid_file)?;
        writeln!(pid, "{}", std::process::id())?;
        Ok(Some(RunLock { _file: file, pid_file }))
    }

    /// The pid of the daemon that lives here, if one does.
    pub(crate) fn live_pid(&self) -> Option<i32> {
        let file = File::open(self.path.join("lock")).ok()?;
        match try_flock(&file) {
            Ok(false) => fs::read_to_string(self.pid_file()).ok()?.trim().parse().ok(),
            Ok(true) | Err(_) => None,
        }
    }

    /// The last lines of the log, for a failure's text.
    pub(crate) fn log_tail(&self, lines: usize) -> String {
        let text = fs::read_to_string(self.log_file()).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl RunLock {
    /// Removes the pid file at a clean end; the lock itself falls with the process.
    pub(crate) fn release(self) {
        let _ = fs::remove_file(&self.pid_file);
    }
}

/// Takes the exclusive lock of `file` without waiting; false when another open file holds it.
fn try_flock(file: &File) -> io::Result<bool> {
    // SAFETY: flock takes a valid descriptor and no memory.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        e => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_directory_has_one_daemon_at_a_time() {
        let path = std::env::temp_dir().join(format!("matrix-run-dir-{}", std::process::id()));
        let dir = RunDir::new(&path);
        dir.create().expect("create");
        let lock = dir.claim().expect("claim").expect("free");
        assert!(dir.claim().expect("claim again").is_none());
        assert_eq!(dir.live_pid(), Some(std::process::id() as i32));
        lock.release();
        assert_eq!(dir.live_pid(), None);
        assert!(dir.claim().expect("claim once more").is_some());
        fs::remove_dir_all(&path).expect("remove");
    }

    #[test]
    fn a_path_too_long_for_the_socket_is_refused() {
        assert!(RunDir::new("/tmp/".to_string() + &"x".repeat(120)).create().is_err());
    }
}
