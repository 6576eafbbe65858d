//! `matrix locks`: who holds what, who waits for whom.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::query::{self, print};
use super::table;
use crate::control::Request;
use crate::control::report::{Locks, Resource};
use crate::failure::{Context, Failure};

#[derive(Args)]
pub(super) struct LocksArgs {
    /// Directory the filesystem is mounted on [default: all mounts of this host]
    dir: Option<PathBuf>,
    /// Only the locks of this file or directory
    #[arg(long)]
    path: Option<PathBuf>,
    /// Only locks that somebody waits for
    #[arg(long)]
    waiting: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: LocksArgs) -> Result<ExitCode, Failure> {
    for entry in query::mounts(args.dir.as_deref())? {
        let inode = args.path.as_deref().map(|path| inode_of(path, &entry.dir)).transpose()?;
        let mut locks: Locks = query::ask(&entry, &Request::Locks { inode, waiting: args.waiting })?;
        for resource in locks.resources.iter_mut().filter(|_| inode.is_some()) {
            resource.path.clone_from(&args.path);
        }
        if args.json {
            print(&serde_json::to_string_pretty(&locks).context("locks")?);
        } else {
            show(&locks.resources).iter().for_each(|line| print(line));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The inode number of `path`: an absolute path inside the mount, or one below it.
fn inode_of(path: &Path, dir: &Path) -> Result<u64, Failure> {
    use std::os::unix::fs::MetadataExt;
    let path = if path.starts_with(dir) {
        path.to_path_buf()
    } else {
        dir.join(path.strip_prefix("/").unwrap_or(path))
    };
    Ok(std::fs::symlink_metadata(&path).context(path.display())?.ino())
}

/// The lines for people: a resource, its holders and its waiters.
fn show(resources: &[Resource]) -> Vec<String> {
    let mut rows = Vec::new();
    for resource in resources {
        let mut name = match &resource.path {
            Some(path) => format!("{} {}", resource.name, path.display()),
            None => resource.name.clone(),
        };
        let master = resource.master.clone().unwrap_or_else(|| "-".into());
        if resource.held_back {
            name.push_str(" (held back for a recovery)");
        }
        let age =
            |ms: Option<u64>| ms.map_or_else(|| "-".to_string(), |ms| format!("{:.1} s", ms as f64 / 1000.0));
        for holder in &resource.holders {
            let state = if holder.departed { "held by a dead node" } else { "held" };
            rows.push([
                std::mem::take(&mut name),
                master.clone(),
                holder.node.clone(),
                holder.mode.clone(),
                state.to_string(),
                age(holder.age_ms),
            ]);
        }
        for waiter in &resource.waiters {
            rows.push([
                std::mem::take(&mut name),
                master.clone(),
                waiter.node.clone(),
                format!("{} > {}", waiter.held, waiter.want),
                format!("waits for {}", waiter.waits_for.join(", ")),
                age(waiter.age_ms),
            ]);
        }
    }
    if rows.is_empty() {
        return vec!["no locks".to_string()];
    }
    table::lines(["RESOURCE", "MASTER", "NODE", "MODE", "STATE", "AGE"], &rows)
}
