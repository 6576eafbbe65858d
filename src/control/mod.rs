//! The control socket: how the command line talks to a running daemon.
//!
//! A request and its reply are each one frame: a little-endian u32 length, then JSON. Whatever arrives is bounded
//! and answered: a frame that is too long, no JSON, or no known request gets an error reply and the connection ends.
//! Only root and the daemon's own user are served.

mod client;
pub(crate) mod report;
mod server;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use client::{Client, ClientError};
pub(crate) use server::{Handler, serve};

/// Longest request the daemon reads, bytes.
const MAX_REQUEST: u32 = 64 << 10;
/// Longest reply a client reads, bytes (a million locks fit).
const MAX_REPLY: u32 = 256 << 20;

/// What a client may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// What this daemon serves, without asking the cluster
    Hello {},
    /// Members, quorum, leases, fencing, journals, recoveries, counters
    Status {},
    /// Locks this node holds, waits for or masters; of one inode, or only contended ones
    Locks { inode: Option<u64>, waiting: bool },
    /// Unmount and leave; answered when the device is released. `busy_too`: detach even while programs use it
    Unmount { busy_too: bool },
}

/// The daemon's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// What was asked for
    Done(serde_json::Value),
    /// Why not: one sentence with the remedy
    Refused(String),
}

/// The answer to [`Request::Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) pid: u32,
    pub(crate) device: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) node: String,
}
