//! Another process, held by a descriptor so that a reused pid is never mistaken for it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// A process that was alive when it was opened.
pub(crate) struct Process {
    fd: OwnedFd,
}

impl Process {
    /// Opens the process `pid`; close-on-exec, as the kernel makes every pidfd.
    pub(crate) fn open(pid: i32) -> io::Result<Process> {
        // SAFETY: pidfd_open takes two integers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel gave this descriptor to us alone.
        Ok(Process { fd: unsafe { OwnedFd::from_raw_fd(fd as i32) } })
    }

    /// Kills it; no error when it is already gone.
    pub(crate) fn kill(&self) -> io::Result<()> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a valid descriptor, and null is allowed for the signal's information.
        let done = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), libc::SIGKILL, no_info, 0)
        };
        match done {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                e => Err(e),
            },
        }
    }

    /// Waits until it has ended; false when it lives on after `limit`.
    pub(crate) fn wait(&self, limit: Duration) -> io::Result<bool> {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let millis = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        loop {
            // SAFETY: `poll` is one valid entry over the call.
            match unsafe { libc::poll(&raw mut poll, 1, millis) } {
                0 => return Ok(false),
                1.. => return Ok(true),
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_waited_for_and_killed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let process = Process::open(child.id() as i32).expect("pidfd");
        assert!(!process.wait(Duration::from_millis(1)).expect("poll"));
        process.kill().expect("kill");
        assert!(process.wait(Duration::from_secs(10)).expect("poll"));
        child.wait().expect("reap");
        process.kill().expect("killing the dead is no error");
    }
}
