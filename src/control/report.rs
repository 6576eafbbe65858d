//! What `status` and `locks` tell, as values: the daemon fills them in, the command line shows them, `--json` prints
//! them as they are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Everything `matrix status` tells about one mount.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) filesystem: Filesystem,
    pub(crate) node: Node,
    /// The node's place in the matrix: starting, outside, member, leaving, over
    pub(crate) phase: String,
    pub(crate) generation: u64,
    /// Name of the SAN administrator
    pub(crate) adm: Option<String>,
    pub(crate) coordinator: Option<String>,
    pub(crate) members: Vec<Member>,
    /// The devices of the matrix, by name
    pub(crate) devices: Vec<Device>,
    pub(crate) quorum: Quorum,
    pub(crate) lease: Lease,
    pub(crate) fencing: Fencing,
    pub(crate) journals: Vec<Journal>,
    pub(crate) recoveries: Vec<Recovery>,
    /// Messages, grants, device requests since the mount, by name
    pub(crate) counters: BTreeMap<String, u64>,
}

/// The mounted filesystem.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Filesystem {
    pub(crate) device: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) uuid: String,
    pub(crate) label: String,
    pub(crate) bytes: u64,
    pub(crate) read_only: bool,
}

/// The daemon that answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Node {
    pub(crate) id: u16,
    pub(crate) name: String,
    pub(crate) incarnation: u64,
    pub(crate) pid: u32,
    /// Where its interconnect listens
    pub(crate) address: String,
    pub(crate) run_dir: PathBuf,
}

/// One member of the view.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) id: u16,
    pub(crate) name: String,
    pub(crate) incarnation: u64,
    pub(crate) address: String,
    pub(crate) journal: u16,
    /// Lock shards it masters
    pub(crate) shards: u32,
    /// this node, connected, or what is wrong with it
    pub(crate) state: String,
    /// It knows the names of all devices as they are now, and can become ADM
    pub(crate) knows_devices: bool,
}

/// One device of the matrix: what the naming database says, and what this node sees of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Device {
    /// The same on every node
    pub(crate) name: String,
    /// In its label
    pub(crate) uuid: String,
    /// What lies on it
    pub(crate) role: String,
    /// Size that the matrix uses
    pub(crate) bytes: u64,
    /// Nothing, if this node has not opened it
    pub(crate) here: Option<DeviceHere>,
}

/// A device as this node has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct DeviceHere {
    pub(crate) path: PathBuf,
    /// Size of the device itself
    pub(crate) bytes: u64,
    /// image, loop device, block device and its number
    pub(crate) kind: String,
    pub(crate) model: Option<String>,
    pub(crate) sector_bytes: Option<u32>,
    /// I/O past the page cache
    pub(crate) direct_io: bool,
}

/// The register that holds the view.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Quorum {
    /// Copies of the register; a majority decides
    pub(crate) acceptors: u32,
    pub(crate) sequence: u64,
    /// Nodes that can be mounted at once
    pub(crate) slots: u16,
}

/// This node's right to write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub(crate) length_ms: u64,
    pub(crate) remaining_ms: u64,
    /// Why the gate is closed, if it is
    pub(crate) closed: Option<String>,
}

/// What keeps a dead node from writing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Fencing {
    pub(crate) methods: Vec<String>,
    /// Longest life of a write that the device has accepted
    pub(crate) io_life_ms: Option<u64>,
    pub(crate) remarks: Vec<String>,
}

/// One journal and who writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Journal {
    pub(crate) index: u16,
    /// in use, clean, or waiting for replay
    pub(crate) state: String,
    pub(crate) node: Option<String>,
}

/// An excluded node whose journal is not replayed yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Recovery {
    pub(crate) id: u16,
    pub(crate) incarnation: u64,
    pub(crate) journal: Option<u16>,
    /// What is waited for
    pub(crate) state: String,
    pub(crate) replayer: Option<String>,
    /// Lock shards that wait
    pub(crate) shards: u32,
}

/// Everything `matrix locks` tells: the resources this node masters, and what it holds elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Locks {
    pub(crate) resources: Vec<Resource>,
}

/// One resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Resource {
    /// Kind and number, such as `inode 1234`
    pub(crate) name: String,
    pub(crate) path: Option<PathBuf>,
    pub(crate) shard: u16,
    pub(crate) master: Option<String>,
    pub(crate) holders: Vec<Holder>,
    pub(crate) waiters: Vec<Waiter>,
    /// Nothing is granted before a recovery or the members' reports are in
    pub(crate) held_back: bool,
}

/// A granted lock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Holder {
    pub(crate) node: String,
    pub(crate) mode: String,
    pub(crate) age_ms: Option<u64>,
    /// The holder is dead and not recovered
    pub(crate) departed: bool,
}

/// A request that waits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Waiter {
    pub(crate) node: String,
    pub(crate) held: String,
    pub(crate) want: String,
    pub(crate) age_ms: Option<u64>,
    pub(crate) waits_for: Vec<String>,
}
