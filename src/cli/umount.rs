//! `matrix umount`: returns when everything is on disk and the device is released.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::{Context, EXIT_DEAD, EXIT_NOT_MOUNTED, Failure};
use crate::control::{Client, ClientError, Request};
use crate::daemon::process::Process;
use crate::daemon::{RunDir, mount_point, registry};

#[derive(Args)]
pub(super) struct UmountArgs {
    /// Directory the filesystem is mounted on
    dir: PathBuf,
    /// Unmount although programs use it, and also when the daemon is dead or hangs
    #[arg(long, short)]
    force: bool,
}

/// How long a forced unmount waits for a daemon before it counts as hung.
const HUNG_AFTER: Duration = Duration::from_secs(20);

pub(super) fn run(args: UmountArgs) -> Result<ExitCode, Failure> {
    let dir = mount_point::absolute(&args.dir).context(args.dir.display())?;
    unmount(&dir, args.force)?;
    Ok(ExitCode::SUCCESS)
}

/// Unmounts `dir`, an absolute path, through its daemon; with `force` by any means.
pub(super) fn unmount(dir: &Path, force: bool) -> Result<(), Failure> {
    let mounted = mount_point::find(dir).context(dir.display())?;
    let Some(entry) = registry::find(dir) else {
        return match mounted {
            None => Err(Failure::with_code(
                EXIT_NOT_MOUNTED,
                format!("{}: nothing of matrix is mounted there", dir.display()),
            )),
            Some(_) if force => mount_point::detach(dir).context(dir.display()),
            Some(_) => Err(dead(dir, "no daemon is registered for it")),
        };
    };
    let run_dir = entry.run_dir();
    match ask(&run_dir, force) {
        Ok(()) => Ok(()),
        Err(ClientError::Refused(why)) => Err(Failure::new(format!("{}: {why}", dir.display()))),
        Err(e) if !force => match run_dir.live_pid() {
            Some(pid) => Err(Failure::new(format!(
                "{}: {e}; the daemon {pid} hangs: see {}, or use --force",
                dir.display(),
                run_dir.log_file().display()
            ))),
            None if mounted.is_none() => {
                registry::remove(dir, &entry.run_dir);
                Err(Failure::with_code(EXIT_NOT_MOUNTED, format!("{}: no longer mounted", dir.display())))
            }
            None => Err(dead(dir, "its daemon is dead")),
        },
        Err(_) => {
            clear_away(dir, &run_dir)?;
            registry::remove(dir, &entry.run_dir);
            Ok(())
        }
    }
}

fn dead(dir: &Path, why: &str) -> Failure {
    Failure::with_code(
        EXIT_DEAD,
        format!("{}: {why}: 'matrix umount --force {}' clears the mount away", dir.display(), dir.display()),
    )
}

/// Asks the daemon to unmount and waits until its process is gone, and with it every descriptor of the device.
fn ask(run_dir: &RunDir, force: bool) -> Result<(), ClientError> {
    let mut client = Client::connect(&run_dir.control_socket(), force.then_some(HUNG_AFTER))?;
    let daemon = Process::open(client.peer_pid()?)?;
    client.ask::<()>(&Request::Unmount { busy_too: force })?;
    if daemon.wait(HUNG_AFTER)? {
        return Ok(());
    }
    Err(ClientError::Broken(std::io::Error::other("it said that it is done but does not end")))
}

/// For a daemon that is dead or hangs: ends its process and its FUSE connection, and detaches the mount.
fn clear_away(dir: &Path, run_dir: &RunDir) -> Result<(), Failure> {
    if let Some(daemon) = run_dir.live_pid().and_then(|pid| Process::open(pid).ok()) {
        daemon.kill().context("cannot kill the hung daemon")?;
        daemon.wait(HUNG_AFTER).context("waiting for the killed daemon")?;
    }
    if let Some(mount) = mount_point::find(dir).context(dir.display())? {
        // A connection whose daemon is gone is aborted already.
        let _ = mount_point::abort(mount.connection);
        mount_point::detach(dir).context(dir.display())?;
    }
    Ok(())
}
