//! Which process this is, in words that another process of the same host can check.

use std::fs;
use std::io;

use uuid::Uuid;

/// A process of one boot of one kernel. A pid may be reused; a pid with its start time is not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ProcessIdentity {
    /// The kernel's random boot id.
    pub boot_id: [u8; 16],
    /// Process id, in its own pid namespace.
    pub pid: u32,
    /// Clock ticks from boot to its start (field 22 of /proc/PID/stat).
    pub start_time: u64,
}

impl ProcessIdentity {
    /// The calling process.
    pub fn current() -> io::Result<ProcessIdentity> {
        let pid = std::process::id();
        let start_time = start_time(pid)?
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "/proc does not show this process"))?;
        Ok(ProcessIdentity { boot_id: boot_id()?, pid, start_time })
    }
}

/// The boot id of the running kernel.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let id =
        Uuid::try_parse(text.trim()).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(id.into_bytes())
}

/// The host's name, as the kernel has it.
pub fn host_name() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned())
}

/// When a process of this pid started; `None` if there is none.
pub(crate) fn start_time(pid: u32) -> io::Result<Option<u64>> {
    let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // The name of the program stands in parentheses and may contain anything.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
    let started = fields.and_then(|mut fields| fields.nth(19)?.parse().ok());
    started.map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat is strange"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_with_its_start_time() {
        let me = ProcessIdentity::current().unwrap();
        assert_eq!(start_time(me.pid).unwrap(), Some(me.start_time));
        assert_eq!(ProcessIdentity::current().unwrap(), me);
    }

    #[test]
    fn a_pid_that_cannot_exist_has_no_process() {
        assert_eq!(start_time(u32::MAX).unwrap(), None);
    }
}
