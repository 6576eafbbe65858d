//! `matrix status`: how a mount and its matrix are.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::query::{self, print};
use super::{size, table};
use crate::control::Request;
use crate::control::report::{Device, Status};
use crate::failure::{Context, Failure};

#[derive(Args)]
pub(super) struct StatusArgs {
    /// Directory the filesystem is mounted on [default: all mounts of this host]
    dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: StatusArgs) -> Result<ExitCode, Failure> {
    let mut worst = None;
    for entry in query::mounts(args.dir.as_deref())? {
        match query::ask::<Status>(&entry, &Request::Status {}) {
            Ok(status) if args.json => print(&serde_json::to_string_pretty(&status).context("status")?),
            Ok(status) => show(&status).iter().for_each(|line| print(line)),
            // One dead daemon must not hide the others.
            Err(failure) if args.dir.is_none() => {
                eprintln!("matrix: {}", failure.message);
                worst = Some(ExitCode::from(failure.code));
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(worst.unwrap_or(ExitCode::SUCCESS))
}

/// The lines for people.
fn show(s: &Status) -> Vec<String> {
    let fs = &s.filesystem;
    let mut out = vec![
        format!(
            "{}  {}{}  {}  on {}{}",
            fs.uuid,
            fs.label,
            if fs.label.is_empty() { "(no label)" } else { "" },
            size::show(fs.bytes),
            fs.device.display(),
            if fs.read_only { "  read-only" } else { "" },
        ),
        format!(
            "mounted at {} by node {} ({}), daemon {}",
            fs.dir.display(),
            s.node.name,
            s.phase,
            s.node.pid
        ),
        format!(
            "generation {}, ADM {}, coordinator {}",
            s.generation,
            s.adm.as_deref().unwrap_or("none"),
            s.coordinator.as_deref().unwrap_or("none"),
        ),
        format!(
            "quorum: {} of {} copies decide, register sequence {}, {} of {} slots in use",
            s.quorum.acceptors / 2 + 1,
            s.quorum.acceptors,
            s.quorum.sequence,
            s.members.len(),
            s.quorum.slots,
        ),
        match &s.lease.closed {
            None => format!("lease: {} ms of {} ms left", s.lease.remaining_ms, s.lease.length_ms),
            Some(why) => format!("lease: the gate is closed: {why}"),
        },
        format!(
            "fencing: {}{}",
            s.fencing.methods.join(", "),
            s.fencing.io_life_ms.map_or_else(
                || "; the life of an accepted write is unknown".to_string(),
                |ms| format!("; an accepted write lives {ms} ms at most"),
            ),
        ),
    ];
    out.extend(s.fencing.remarks.iter().map(|remark| format!("  {remark}")));
    out.push(String::new());
    let members: Vec<_> = s
        .members
        .iter()
        .map(|m| {
            [
                m.id.to_string(),
                m.name.clone(),
                m.state.clone(),
                m.incarnation.to_string(),
                m.address.clone(),
                m.journal.to_string(),
                m.shards.to_string(),
            ]
        })
        .collect();
    out.extend(table::lines(
        ["SLOT", "MEMBER", "STATE", "INCARNATION", "ADDRESS", "JOURNAL", "SHARDS"],
        &members,
    ));
    let devices: Vec<_> = s.devices.iter().map(device).collect();
    out.push(String::new());
    out.extend(table::lines(
        ["DEVICE", "ID", "PATH HERE", "SIZE", "HOLDS", "KIND", "SECTOR", "I/O"],
        &devices,
    ));
    let unknowing: Vec<&str> =
        s.members.iter().filter(|m| !m.knows_devices).map(|m| m.name.as_str()).collect();
    if !unknowing.is_empty() {
        out.push(format!(
            "not known to have found all devices, so cannot become ADM: {}",
            unknowing.join(", ")
        ));
    }
    let recoveries: Vec<_> = s
        .recoveries
        .iter()
        .map(|r| {
            [
                format!("{}.{}", r.id, r.incarnation),
                r.journal.map_or_else(|| "-".to_string(), |j| j.to_string()),
                r.state.clone(),
                r.replayer.clone().unwrap_or_else(|| "-".into()),
                r.shards.to_string(),
            ]
        })
        .collect();
    if !recoveries.is_empty() {
        out.push(String::new());
        out.extend(table::lines(["RECOVERING", "JOURNAL", "STATE", "REPLAYER", "SHARDS"], &recoveries));
    }
    let journals: Vec<_> = s
        .journals
        .iter()
        .map(|j| [j.index.to_string(), j.state.clone(), j.node.clone().unwrap_or_else(|| "-".into())])
        .collect();
    out.push(String::new());
    out.extend(table::lines(["JOURNAL", "STATE", "NODE"], &journals));
    let counters: Vec<_> = s.counters.iter().map(|(name, n)| [name.clone(), n.to_string()]).collect();
    out.push(String::new());
    out.extend(table::lines(["COUNTER", "SINCE MOUNT"], &counters));
    out
}

fn device(device: &Device) -> [String; 8] {
    let none = || "-".to_string();
    let here = device.here.as_ref();
    let kind = here.map(|here| match &here.model {
        Some(model) => format!("{}, {model}", here.kind),
        None => here.kind.clone(),
    });
    [
        device.name.clone(),
        device.uuid.clone(),
        here.map_or_else(none, |here| here.path.display().to_string()),
        size::show(device.bytes),
        device.role.clone(),
        kind.unwrap_or_else(none),
        here.and_then(|here| here.sector_bytes).map_or_else(none, |bytes| bytes.to_string()),
        here.map_or_else(none, |here| if here.direct_io { "direct" } else { "page cache" }.to_string()),
    ]
}
