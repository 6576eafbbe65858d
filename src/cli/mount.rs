//! `matrix mount`: returns when the filesystem is usable, or says why it is not.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::{Context, Failure};
use crate::control::{Client, Hello, Request};
use crate::daemon::{self, MountOptions, MountRequest, PATIENCE, RUN_ROOT, RunDir, mount_point, registry};

#[derive(Args)]
pub(super) struct MountArgs {
    /// Device or image file
    path: PathBuf,
    /// Directory to mount on
    dir: PathBuf,
    /// This node's name [default: the host's name]
    #[arg(long)]
    node: Option<String>,
    /// The daemon's directory: pid, log, control socket, key [default: /run/matrix/ID-OF-THE-FILESYSTEM]
    #[arg(long)]
    run_dir: Option<PathBuf>,
    /// Address other nodes reach this one at; port 0 takes any [default: this host's first address]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Mount options: ro, noatime, nosuid, nodev, noexec, sync, dirsync, fence=auto|lease, io_timeout=SECONDS,
    /// device=NAME (refuse any other device of the matrix)
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Stay in the foreground and log to standard error
    #[arg(long)]
    foreground: bool,
}

/// Longest node name: it is kept in the node's slot on the disk.
const NAME_MAX: usize = 63;

pub(super) fn run(args: MountArgs) -> Result<ExitCode, Failure> {
    let foreground = args.foreground;
    let request = prepare(args)?;
    if foreground {
        return daemon::foreground(&request);
    }
    daemon::launch(&request)?;
    Ok(ExitCode::SUCCESS)
}

/// Checks what can be checked before a daemon starts, and fills in the defaults.
fn prepare(args: MountArgs) -> Result<MountRequest, Failure> {
    let options = MountOptions::parse(&args.options).map_err(|e| Failure::with_code(2, e))?;
    let device = std::fs::canonicalize(&args.path).context(args.path.display())?;
    let dir = mount_point::absolute(&args.dir).context(args.dir.display())?;
    clear_mount_point(&dir)?;
    let run_dir = match &args.run_dir {
        Some(run_dir) => std::path::absolute(run_dir).context(run_dir.display())?,
        None => default_run_dir(&device)?,
    };
    let node = match args.node {
        Some(name) => name,
        None => default_node(args.run_dir.as_deref()),
    };
    check_name(&node)?;
    let there = RunDir::new(&run_dir);
    there.create().context(format_args!("run directory {}", run_dir.display()))?;
    if let Some(pid) = there.live_pid() {
        return Err(occupied(&there, pid));
    }
    Ok(MountRequest { device, dir, node, run_dir, listen: args.listen, options })
}

/// Makes sure that `dir` is a directory without a live mount of ours; what a dead daemon left on it is detached.
fn clear_mount_point(dir: &Path) -> Result<(), Failure> {
    if let Some(entry) = registry::find(dir) {
        if let Some(pid) = entry.run_dir().live_pid() {
            return Err(Failure::new(format!(
                "{dir}: already mounted from {} (daemon {pid}): unmount it first with 'matrix umount {dir}'",
                entry.device.display(),
                dir = dir.display(),
            )));
        }
        if mount_point::find(dir).context(dir.display())?.is_some() {
            mount_point::detach(dir)
                .context(format_args!("{}: cannot clear a dead mount away", dir.display()))?;
        }
        registry::remove(dir, &entry.run_dir);
    }
    match std::fs::metadata(dir) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(Failure::new(format!("{}: not a directory", dir.display()))),
        Err(e) => Err(Failure::new(format!("{}: {e}: make the directory first", dir.display()))),
    }
}

fn default_run_dir(device: &Path) -> Result<PathBuf, Failure> {
    let label = daemon::read_label(device)?;
    Ok(Path::new(RUN_ROOT).join(label.fs.to_string()))
}

/// The host's name; with a run directory of its own, a daemon is one of several of this host and says which.
fn default_node(run_dir: Option<&Path>) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = host.trim();
    let mut name = match run_dir.and_then(Path::file_name) {
        Some(dir) => format!("{host}-{}", OsString::from(dir).to_string_lossy()),
        None => host.to_string(),
    };
    name.retain(|c| !c.is_control() && !c.is_whitespace());
    while name.len() > NAME_MAX {
        name.pop();
    }
    if name.is_empty() { "node".into() } else { name }
}

fn check_name(name: &str) -> Result<(), Failure> {
    let plain = !name.is_empty()
        && name.len() <= NAME_MAX
        && !name.chars().any(|c| c.is_control() || c.is_whitespace());
    if plain {
        return Ok(());
    }
    Err(Failure::with_code(2, format!("--node '{name}': a name has 1 to {NAME_MAX} bytes and no blanks")))
}

fn occupied(run_dir: &RunDir, pid: i32) -> Failure {
    let hello = Client::connect(&run_dir.control_socket(), Some(PATIENCE))
        .and_then(|mut client| client.ask::<Hello>(&Request::Hello {}));
    let serves = match hello {
        Ok(hello) => format!("serves {} at {}", hello.device.display(), hello.dir.display()),
        Err(_) => "is starting or ending".to_string(),
    };
    Failure::new(format!(
        "the daemon {pid} of run directory {} {serves}: a daemon has one mount; unmount that one, or give this mount \
         a --run-dir of its own",
        run_dir.path().display()
    ))
}
