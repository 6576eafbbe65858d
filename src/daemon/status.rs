//! What `status` and `locks` tell of a node, gathered from its parts.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;

use dlm::{Mode, Resource};
use membership::{FenceState, Phase, Role, Standing, View};
use mfs::LockName;
use storage_control::lease::LEASE_MS;
use storage_control::{BLOCK_SIZE, Medium, NodeId, WriteLife};

use super::node::Node;
use crate::cluster;
use crate::control::report::{
    Device, DeviceHere, Fencing, Filesystem, Holder, Journal, Lease, Locks, Member, Node as NodeReport,
    Quorum, Recovery, Status, Waiter,
};

/// Names of nodes for people: from the view, or the number.
struct Names<'a>(Option<&'a View>);

impl Names<'_> {
    fn of(&self, node: NodeId) -> String {
        self.0.and_then(|view| view.member(node)).map_or_else(|| format!("node {node}"), |m| m.name.clone())
    }
}

/// Everything about the mount of `node`.
pub(super) fn status(node: &Node) -> Status {
    let seen = node.cluster.status();
    let (sequence, view) = match &seen.shown.register {
        Some((sequence, view)) => (*sequence, Some(&**view)),
        None => (0, None),
    };
    let names = Names(view);
    let (request, label) = (&node.request, &node.label);
    let own = seen.shown.slots.get(&seen.me.0);
    Status {
        filesystem: Filesystem {
            device: request.device.clone(),
            dir: request.dir.clone(),
            uuid: label.fs.to_string(),
            label: label.text.clone(),
            bytes: label.device_blocks * BLOCK_SIZE as u64,
            read_only: request.options.read_only,
        },
        node: NodeReport {
            id: seen.me.0.0,
            name: request.node.clone(),
            incarnation: seen.me.1.0,
            pid: std::process::id(),
            address: own.map_or_else(String::new, |slot| slot.address.to_string()),
            run_dir: request.run_dir.clone(),
        },
        phase: phase(seen.shown.phase.as_ref()).to_string(),
        generation: view.map_or(0, |v| v.generation.0),
        adm: view.filter(|v| !v.members.is_empty()).map(|v| names.of(v.adm)),
        coordinator: seen.shown.coordinator.map(|node| names.of(node)),
        members: view.map_or_else(Vec::new, |view| members(view, &seen)),
        devices: view.map_or_else(Vec::new, |view| devices(view, node)),
        quorum: Quorum { acceptors: 1, sequence, slots: label.quorum.slots },
        lease: Lease {
            length_ms: LEASE_MS,
            remaining_ms: seen
                .lease_until
                .map_or(0, |until| until.since(node.runtime.now()).as_millis() as u64),
            closed: node.gate.closed().map(|why| why.to_string()),
        },
        fencing: fencing(node, &seen),
        journals: view.map_or_else(Vec::new, |view| journals(view, &names)),
        recoveries: view.map_or_else(Vec::new, |view| recoveries(view, &names)),
        counters: counters(node),
    }
}

fn phase(phase: Option<&Phase>) -> &'static str {
    match phase {
        None | Some(Phase::Starting) => "starting",
        Some(Phase::Outside) => "outside",
        Some(Phase::Member) => "member",
        Some(Phase::Leaving) => "leaving",
        Some(Phase::Over) => "over",
    }
}

fn members(view: &View, seen: &cluster::Status) -> Vec<Member> {
    let state = |node: NodeId| {
        if node == seen.me.0 {
            return "this node";
        }
        match seen.shown.standings.iter().find(|(n, _)| *n == node) {
            Some((_, Standing::Well)) => "connected",
            Some((_, Standing::Unheard)) => "silent on the network",
            Some((_, Standing::Stalled)) => "silent on the disk",
            Some((_, Standing::Dead)) => "dead",
            None => "unknown",
        }
    };
    let all = view.members.values().map(|m| Member {
        id: m.node.0,
        name: m.name.clone(),
        incarnation: m.incarnation.0,
        address: m.addr.to_string(),
        journal: m.journal,
        shards: view.shards.of(m.node).len() as u32,
        state: state(m.node).to_string(),
        knows_devices: seen.shown.knowing.contains(&m.node),
    });
    all.collect()
}

fn devices(view: &View, node: &Node) -> Vec<Device> {
    let bytes = |blocks: u64| blocks * BLOCK_SIZE as u64;
    let here = || DeviceHere {
        path: node.request.device.clone(),
        bytes: bytes(node.info.blocks),
        kind: match node.info.medium {
            Medium::LocalImage => "image".to_string(),
            Medium::SharedImage => "image in a shared or unknown filesystem".to_string(),
            Medium::LocalLoop => "loop device".to_string(),
            Medium::Block { major, minor } => format!("block device {major}:{minor}"),
        },
        model: node.info.model.clone(),
        sector_bytes: node.info.sector_bytes,
        direct_io: node.info.direct,
    };
    let all = view.names.devices.iter().map(|device| Device {
        name: device.name.to_string(),
        uuid: device.id.to_string(),
        role: match device.role {
            Role::Whole => "quorum and files",
            Role::Quorum => "quorum",
            Role::Data => "files",
        }
        .to_string(),
        bytes: bytes(device.blocks),
        here: (device.id == node.label.device).then(here),
    });
    all.collect()
}

fn fencing(node: &Node, seen: &cluster::Status) -> Fencing {
    let mut remarks: Vec<String> =
        seen.protection.iter().map(|(name, what)| format!("{name}: {what}")).collect();
    for fence in &seen.fences {
        let waits: Vec<String> = fence.waiting.iter().map(|(name, why)| format!("{name}: {why}")).collect();
        let since = node.runtime.now().since(fence.since).as_secs_f64();
        remarks.push(format!("waiting for {since:.1} s to fence node {}: {}", fence.node, waits.join("; ")));
    }
    remarks.extend(seen.shown.lapsed.then(|| "this node's lease has run out and may come back".to_string()));
    remarks.extend(seen.shown.notices.iter().map(|notice| format!("notice: {notice}")));
    Fencing {
        methods: seen.protection.iter().map(|(name, _)| (*name).to_string()).collect(),
        io_life_ms: match node.write_life {
            WriteLife::Bounded(life) => Some(life.as_millis() as u64),
            WriteLife::Unbounded => None,
        },
        remarks,
    }
}

fn journals(view: &View, names: &Names<'_>) -> Vec<Journal> {
    let of = |index: u16| {
        if let Some(member) = view.members.values().find(|m| m.journal == index) {
            return ("in use", Some(member.name.clone()));
        }
        match view.recoveries.iter().find(|r| r.journal == Some(index)) {
            Some(recovery) => ("to be replayed", Some(names.of(recovery.node))),
            None => ("clean", None),
        }
    };
    (0..view.journals)
        .map(|index| (index, of(index)))
        .map(|(index, (state, node))| Journal { index, state: state.to_string(), node })
        .collect()
}

fn recoveries(view: &View, names: &Names<'_>) -> Vec<Recovery> {
    let all = view.recoveries.iter().map(|r| Recovery {
        id: r.node.0,
        incarnation: r.incarnation.0,
        journal: r.journal,
        state: match (r.state, r.failed) {
            (_, true) => "the replay failed: run matrix fsck",
            (FenceState::FencePending, false) => "waits for its fence",
            (FenceState::FencedDirty, false) => "waits for the replay of its journal",
        }
        .to_string(),
        replayer: r.replayer.map(|(node, _)| names.of(node)),
        shards: r.shards.len() as u32,
    });
    all.collect()
}

fn counters(node: &Node) -> BTreeMap<String, u64> {
    let (locks, device, net) = (node.lcl.stats(), node.gate.stats(), node.cluster.traffic());
    let all = [
        ("lock messages sent", locks.messages_sent),
        ("lock messages received", locks.messages_received),
        ("lock grants here", locks.grants_local),
        ("lock grants by others", locks.grants_remote),
        ("lock uses from the cache", locks.cached_hits),
        ("lock waits", locks.waits),
        ("lock callbacks", locks.callbacks),
        ("locks demoted", locks.demotions),
        ("locks cached", locks.cached),
        ("frames sent", net.frames_sent.load(Relaxed)),
        ("frame batches sent", net.batches_sent.load(Relaxed)),
        ("frames received", net.frames_received.load(Relaxed)),
        ("device reads", device.reads),
        ("device writes", device.writes),
        ("device flushes", device.flushes),
        ("device bytes read", device.bytes_read),
        ("device bytes written", device.bytes_written),
        ("device requests refused", device.refused),
    ];
    all.into_iter().map(|(name, n)| (name.to_string(), n)).collect()
}

/// The resources that this node masters and those it holds elsewhere; of one inode, or only contended ones.
pub(super) fn locks(node: &Node, inode: Option<u64>, waiting: bool) -> Locks {
    let seen = node.cluster.status();
    let view = seen.shown.register.as_ref().map(|(_, view)| &**view);
    let names = Names(view);
    // FUSE calls the root inode 1.
    let inode = inode.map(|number| if number == 1 { node.root.0 } else { number });
    let wanted = |res: &Resource| {
        inode.is_none_or(|n| matches!(name_of(res), Some(LockName::Inode(i) | LockName::Open(i)) if i == n))
    };
    let snapshot = node.lcl.snapshot();
    let mastered = snapshot.mastered.iter().filter(|info| wanted(&info.res)).map(|info| {
        let holders = info.holders.iter().filter(|h| h.mode != Mode::NL).map(|h| Holder {
            node: names.of(h.node),
            mode: h.mode.to_string(),
            age_ms: Some(h.age.as_millis() as u64),
            departed: h.departed.is_some(),
        });
        let waiters = info.waiters.iter().map(|w| Waiter {
            node: names.of(w.node),
            held: w.held.to_string(),
            want: w.want.to_string(),
            age_ms: Some(w.age.as_millis() as u64),
            waits_for: w.waits_for.iter().map(|n| names.of(*n)).collect(),
        });
        resource(node, &names, view, &info.res, holders.collect(), waiters.collect(), info.held_back)
    });
    let elsewhere =
        snapshot.cached.iter().filter(|lock| wanted(&lock.res) && !node.lcl.masters(lock.res.shard));
    let cached = elsewhere.map(|lock| {
        let me = names.of(seen.me.0);
        let holder = (lock.held != Mode::NL).then(|| Holder {
            node: me.clone(),
            mode: lock.held.to_string(),
            age_ms: Some(lock.age.as_millis() as u64),
            departed: false,
        });
        let waiter = lock.asking.map(|want| Waiter {
            node: me.clone(),
            held: lock.held.to_string(),
            want: want.to_string(),
            age_ms: None,
            waits_for: vec!["its master's answer".to_string()],
        });
        let (holders, waiters) = (holder.into_iter().collect(), waiter.into_iter().collect());
        resource(node, &names, view, &lock.res, holders, waiters, false)
    });
    let mut resources: Vec<_> = mastered.chain(cached).collect();
    resources.retain(|r| !waiting || !r.waiters.is_empty());
    Locks { resources }
}

fn resource(
    node: &Node,
    names: &Names<'_>,
    view: Option<&View>,
    res: &Resource,
    holders: Vec<Holder>,
    waiters: Vec<Waiter>,
    held_back: bool,
) -> crate::control::report::Resource {
    let is_root = matches!(name_of(res), Some(LockName::Inode(number)) if number == node.root.0);
    crate::control::report::Resource {
        name: name_of(res)
            .map_or_else(|| format!("kind {} number {}", res.kind, res.number), |n| n.to_string()),
        path: is_root.then(|| PathBuf::from("/")),
        shard: res.shard,
        master: view.and_then(|view| view.master(res.shard)).map(|node| names.of(node)),
        holders,
        waiters,
        held_back,
    }
}

fn name_of(res: &Resource) -> Option<LockName> {
    LockName::from_parts(res.kind, res.number)
}
