//! Asking the daemon of a mount.

use std::path::Path;

use serde::de::DeserializeOwned;

use super::{EXIT_DEAD, EXIT_NOT_MOUNTED};
use crate::control::{Client, ClientError, Request};
use crate::daemon::registry::{self, Entry};
use crate::daemon::{PATIENCE, mount_point};
use crate::failure::{Context, Failure};

/// The mounts meant by an optional DIR: that one, or all of this host.
pub(super) fn mounts(dir: Option<&Path>) -> Result<Vec<Entry>, Failure> {
    let Some(dir) = dir else {
        let mut all = registry::all();
        all.retain(|entry| {
            // Of a daemon that died and a mount that was cleared away by other means nothing is left to tell.
            let there = entry.run_dir().live_pid().is_some()
                || mount_point::find(&entry.dir).is_ok_and(|mount| mount.is_some());
            if !there {
                registry::remove(&entry.dir, &entry.run_dir);
            }
            there
        });
        if all.is_empty() {
            return Err(Failure::with_code(EXIT_NOT_MOUNTED, "nothing of matrix is mounted on this host"));
        }
        return Ok(all);
    };
    let dir = mount_point::absolute(dir).context(dir.display())?;
    match registry::find(&dir) {
        Some(entry) => Ok(vec![entry]),
        None => Err(Failure::with_code(
            EXIT_NOT_MOUNTED,
            format!("{}: nothing of matrix is mounted there", dir.display()),
        )),
    }
}

/// Asks the daemon that serves `entry`.
pub(super) fn ask<T: DeserializeOwned>(entry: &Entry, request: &Request) -> Result<T, Failure> {
    let run_dir = entry.run_dir();
    let dir = entry.dir.display();
    let answer = Client::connect(&run_dir.control_socket(), Some(PATIENCE)).and_then(|mut c| c.ask(request));
    answer.map_err(|e| match (e, run_dir.live_pid()) {
        (ClientError::Refused(why), _) => Failure::new(format!("{dir}: {why}")),
        (_, None) => Failure::with_code(
            EXIT_DEAD,
            format!("{dir}: its daemon is dead: 'matrix umount --force {dir}' clears the mount away"),
        ),
        (e, Some(pid)) => {
            Failure::new(format!("{dir}: {e} (daemon {pid}, log {})", run_dir.log_file().display()))
        }
    })
}

/// Prints a line; a closed pipe ends the program quietly, as head(1) wants it.
pub(super) fn print(text: &str) {
    use std::io::Write;
    if let Err(e) = writeln!(std::io::stdout(), "{text}")
        && e.kind() == std::io::ErrorKind::BrokenPipe
    {
        std::process::exit(0);
    }
}
