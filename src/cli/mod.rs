//! The command line: what each form means, its exit code, and how failures are told.
//!
//! Exit codes: 0 done, 1 failed or refused (the text says why and what to do), 2 wrong usage, 3 nothing is mounted
//! there, 4 the daemon of that mount is dead. `fsck` uses those of fsck(8): 0 clean, 4 errors found, 8 could not
//! check, 16 wrong usage. `mount.mfs` uses those of mount(8): 1 wrong usage, 32 mount failed.

mod alias;
mod demo;
mod fsck;
mod live;
mod locks;
mod mkfs;
mod mount;
mod progress;
mod query;
mod size;
mod status;
mod table;
mod umount;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::failure::{Context, Failure};

/// Exit code when nothing is mounted at the named directory.
pub(crate) const EXIT_NOT_MOUNTED: u8 = 3;
/// Exit code when the mount is there but its daemon is not.
pub(crate) const EXIT_DEAD: u8 = 4;

/// Matrix: one shared disk, one coherent POSIX filesystem on every node that reaches it.
#[derive(Parser)]
#[command(name = "matrix", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a filesystem on a device or image file
    Mkfs(mkfs::MkfsArgs),
    /// Mount a filesystem: starts this node's daemon, returns when the mount is usable
    Mount(mount::MountArgs),
    /// Unmount: returns when everything is on disk and the device is released
    Umount(umount::UmountArgs),
    /// Show members, quorum, leases, fencing, journals, recoveries and counters
    Status(status::StatusArgs),
    /// Show locks: modes, holders, waiters and who waits for whom
    Locks(locks::LocksArgs),
    /// Check a filesystem without changing it (exit codes as fsck(8))
    Fsck(fsck::FsckArgs),
    /// Try it: one image, several nodes on this host, mounted side by side
    Demo(demo::DemoArgs),
    /// The node's daemon (started by `mount`)
    #[command(hide = true)]
    Daemon(DaemonArgs),
}

/// What `mount` hands to the daemon it starts; the same values as its own.
#[derive(Args)]
struct DaemonArgs {
    /// A `daemon::MountRequest` as JSON
    request: String,
}

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    let args: Vec<std::ffi::OsString> = std::env::args_os().collect();
    let program = args.first().map(PathBuf::from).unwrap_or_default();
    let alias = program.file_name().and_then(|n| n.to_str()).and_then(alias::Alias::of);
    let cli = match alias {
        Some(alias) => match alias.translate(&args[1..]) {
            Ok(Some(args)) => Cli::try_parse_from(args),
            Ok(None) => return ExitCode::SUCCESS,
            Err(message) => {
                eprintln!("{}: {message}", alias.name());
                return ExitCode::from(alias.usage_code());
            }
        },
        None => Cli::try_parse_from(&args),
    };
    let cli = match cli {
        Ok(cli) => cli,
        Err(e) => {
            let usage = if e.use_stderr() { alias.map_or(2, |a| a.usage_code()) } else { 0 };
            let _ = e.print();
            // `matrix fsck` with wrong usage answers as fsck(8) does, whatever name it was called by.
            let usage =
                if usage == 2 && args.get(1).is_some_and(|a| a == "fsck") { fsck::EXIT_USAGE } else { usage };
            return ExitCode::from(usage);
        }
    };
    match run(cli.command) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("matrix: {}", failure.message);
            ExitCode::from(alias.map_or(failure.code, |a| a.failure_code(failure.code)))
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Mkfs(args) => mkfs::run(args),
        Command::Mount(args) => mount::run(args),
        Command::Umount(args) => umount::run(args),
        Command::Status(args) => status::run(args),
        Command::Locks(args) => locks::run(args),
        Command::Fsck(args) => fsck::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Daemon(args) => crate::daemon::main(&args.request),
    }
}
