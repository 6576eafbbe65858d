//! A new view: who departed, which shards came and went, and the reports that tell the masters everything.
//!
//! Always:
//! - a shard that came grants nothing until every member of the view has reported, and nothing that a dead node
//!   may hold until every recovery that was open when it came is done;
//! - a shard that stays keeps granting, except beside what a departed node held: shared modes until its fence is
//!   confirmed, modes that write until its journal is replayed;
//! - a report is complete: a member's records are exactly its last report plus what happened since; before its
//!   report a member is granted nothing, so that the report cannot be older than a grant;
//! - a view that comes before the last one's reports are in starts all this anew for the shards concerned.
//!
//! Why a shard that came waits for *all* open recoveries: its former master may have died, or have kept locks of
//! nodes that died earlier; nobody left knows which. A node that missed a view in which its shard belonged to
//! another need not care: that other one granted nothing, for want of this node's report.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use membership::{SHARDS, ShardSet};
use storage_control::{Incarnation, Instant, NodeId};

use crate::core::{Dead, Dlm};
use crate::epoch::{Departed, Epoch};
use crate::message::{Body, Entry, EntryAsk, Fault, Message, Output, REPORT_ENTRIES, Refusal, check_name};
use crate::queues::Open;
use crate::{PARTITIONS, Resource};

/// Most messages kept per member for a view that is not here yet: a report of a million locks, and requests.
const EARLY_MAX: usize = 16 * 1024;

impl Dlm {
    /// A new view is in force, or (same generation) fences and recoveries have made progress. Older ones are
    /// ignored. Must be called for every view in which this incarnation is a member, before any message of it
    /// can have an effect.
    pub fn install_view(&mut self, now: Instant, epoch: Arc<Epoch>) {
        match self.generation() {
            Some(current) if epoch.generation < current => {}
            Some(current) if epoch.generation == current => self.progress(now, &epoch),
            Some(_) | None => self.install(now, epoch),
        }
    }

    fn install(&mut self, now: Instant, epoch: Arc<Epoch>) {
        let before = self.epoch.replace(epoch.clone());
        let fresh = self.take_and_leave_shards(before.as_deref(), &epoch);
        self.depart(before.as_deref(), &epoch);

        let open: BTreeSet<Dead> =
            epoch.recoveries.iter().map(|dead| (dead.node, dead.incarnation)).collect();
        self.held_back.retain(|_, waits_for| {
            waits_for.retain(|dead| open.contains(dead));
            !waits_for.is_empty()
        });
        if !open.is_empty() {
            self.held_back.extend(fresh.iter().map(|shard| (shard, open.clone())));
        }
        self.incomplete = fresh;
        self.unreported = epoch.members.keys().copied().collect();

        if epoch.members.get(&self.me) != Some(&self.incarnation) {
            return; // excluded: we master nothing and nobody listens
        }
        self.settle_own_calls();
        self.send_reports(now, &epoch);
        self.advance(now);
        self.deliver_early(now);
    }

    /// Drops the records of shards that went; returns the shards that came, or came with the last view and were
    /// not complete: of these nothing is known.
    fn take_and_leave_shards(&mut self, before: Option<&Epoch>, epoch: &Epoch) -> ShardSet {
        let me = self.me;
        let had = |shard: u16| {
            before.is_some_and(|before| before.master(shard) == Some(me)) && !self.incomplete.contains(shard)
        };
        let mine: ShardSet = (0..SHARDS as u16).filter(|shard| epoch.master(*shard) == Some(me)).collect();
        let fresh: ShardSet = mine.iter().filter(|shard| !had(*shard)).collect();
        self.queues.retain(|res, _| mine.contains(res.shard) && !fresh.contains(res.shard));
        self.held_back.retain(|shard, _| mine.contains(*shard) && !fresh.contains(*shard));
        fresh
    }

    /// Members of the last view whose incarnation is not in the new one.
    fn depart(&mut self, before: Option<&Epoch>, epoch: &Epoch) {
        let gone: Vec<Dead> = before
            .iter()
            .flat_map(|before| &before.members)
            .filter(|(node, incarnation)| epoch.members.get(node) != Some(incarnation))
            .map(|(node, incarnation)| (*node, *incarnation))
            .collect();
        for (node, incarnation) in &gone {
            let recovery = epoch.recoveries.iter().find(|d| (d.node, d.incarnation) == (*node, *incarnation));
            for queues in self.queues.values_mut() {
                queues.depart(*node, *incarnation, recovery.map(|dead| dead.fenced));
            }
            self.last_seen.remove(node);
        }
        for queues in self.queues.values_mut() {
            queues.settle_ghosts(epoch);
            queues.forget_requests();
        }
    }

    /// Requests that never wait, and cancelled ones, end here: their answers may be lost with the old view.
    fn settle_own_calls(&mut self) {
        let mut over: Vec<_> = self
            .own
            .iter()
            .filter_map(|(res, own)| {
                own.ask.filter(|ask| ask.no_queue || ask.cancelled).map(|ask| (*res, ask))
            })
            .collect();
        over.sort_by_key(|(_, ask)| ask.op);
        for (res, ask) in over {
            let why = if ask.cancelled { Refusal::Cancelled } else { Refusal::Busy };
            self.refused(res, ask.op, why);
        }
    }

    /// To every master, surviving ones too and ourselves: all that we hold and ask in its shards.
    fn send_reports(&mut self, now: Instant, epoch: &Epoch) {
        let mut reports: BTreeMap<NodeId, Vec<Entry>> =
            epoch.members.keys().map(|node| (*node, Vec::new())).collect();
        for (res, own) in &self.own {
            let Some(entries) = epoch.master(res.shard).and_then(|master| reports.get_mut(&master)) else {
                continue;
            };
            let ask = own.ask.map(|ask| EntryAsk {
                op: ask.op,
                want: ask.want,
                waited_ms: now.since(ask.since).as_millis() as u64,
            });
            entries.push(Entry { res: *res, held: own.held, value: own.value.as_deref().copied(), ask });
        }
        for (master, mut entries) in reports {
            entries.sort_by_key(|entry| entry.res);
            if master == self.me {
                self.report(now, master, entries, true).expect("we know what we hold");
                continue;
            }
            let parts = entries.chunks(REPORT_ENTRIES).map(<[Entry]>::to_vec);
            let mut parts: Vec<Vec<Entry>> = parts.collect();
            let end = parts.pop().unwrap_or_default();
            let partition = self.partition as u16;
            for entries in parts {
                self.send(master, Body::Report { partition, entries, last: false });
            }
            self.send(master, Body::Report { partition, entries: end, last: true });
        }
    }

    /// A part of a member's report.
    pub(crate) fn report(
        &mut self,
        now: Instant,
        from: NodeId,
        entries: Vec<Entry>,
        last: bool,
    ) -> Result<(), Fault> {
        if entries.len() > REPORT_ENTRIES && from != self.me {
            return Err(Fault::TooLong(entries.len()));
        }
        if !self.unreported.contains(&from) {
            return Ok(()); // a duplicate
        }
        for entry in entries {
            check_name(&entry.res, self.partition)?;
            if !self.masters(entry.res.shard) {
                return Err(Fault::NotMaster(entry.res.shard));
            }
            let step = self.step(now, entry.res.shard);
            let fresh = step.open == Open::Reporting;
            let Entry { res, held, value, ask } = entry;
            if let Some(ask) = ask {
                let seen = self.last_seen.entry(from).or_default();
                *seen = ask.op.max(*seen);
            }
            let queues = self.queues.entry(res).or_default();
            if !queues.report(step, from, held, value, ask, fresh) {
                if queues.is_empty() {
                    self.queues.remove(&res);
                }
                return Err(Fault::Contradiction(res));
            }
        }
        if last {
            self.end_report(now, from);
        }
        Ok(())
    }

    fn end_report(&mut self, now: Instant, from: NodeId) {
        self.unreported.remove(&from);
        let generation = self.generation().expect("reports belong to a view");
        for queues in self.queues.values_mut() {
            queues.end_report(generation, from);
        }
        if self.unreported.is_empty() {
            self.incomplete = ShardSet::EMPTY;
        }
        self.advance(now);
    }

    /// The incarnation is fenced: what it held shared may be granted again.
    pub fn fenced(&mut self, now: Instant, node: NodeId, incarnation: Incarnation) {
        self.release(now, node, incarnation, false);
    }

    /// The incarnation is fenced and its journal replayed: nothing waits for it any longer.
    pub fn recovered(&mut self, now: Instant, node: NodeId, incarnation: Incarnation) {
        self.held_back.retain(|_, waits_for| {
            waits_for.remove(&(node, incarnation));
            !waits_for.is_empty()
        });
        self.release(now, node, incarnation, true);
    }

    fn release(&mut self, now: Instant, node: NodeId, incarnation: Incarnation, recovered: bool) {
        for queues in self.queues.values_mut() {
            queues.release_ghosts(node, incarnation, recovered);
        }
        self.advance(now);
    }

    /// The same view with fences or recoveries further on.
    fn progress(&mut self, now: Instant, newer: &Epoch) {
        let Some(current) = self.epoch.clone() else { return };
        let mut recoveries = Vec::new();
        for dead in &current.recoveries {
            match newer.recoveries.iter().find(|d| (d.node, d.incarnation) == (dead.node, dead.incarnation)) {
                None => self.recovered(now, dead.node, dead.incarnation),
                Some(found) => {
                    if found.fenced && !dead.fenced {
                        self.fenced(now, dead.node, dead.incarnation);
                    }
                    recoveries.push(Departed { fenced: found.fenced || dead.fenced, ..*dead });
                }
            }
        }
        self.epoch = Some(Arc::new(Epoch { recoveries, ..(*current).clone() }));
    }

    /// Lets every resource grant what it can, in the order of the names.
    fn advance(&mut self, now: Instant) {
        let mut all: Vec<Resource> = self
            .queues
            .iter()
            .filter(|(_, queues)| queues.is_waited_for() || queues.is_empty())
            .map(|(res, _)| *res)
            .collect();
        all.sort();
        for res in all {
            let step = self.step(now, res.shard);
            let mut effects = Vec::new();
            self.queues.get_mut(&res).expect("just listed").advance(step, &mut effects);
            self.carry_out(res, effects);
        }
    }

    /// Keeps a message of a later view, in the order of views: a node's next incarnation may be heard before the
    /// last words of the one before, in a view that this node may still install in between.
    pub(crate) fn keep_early(&mut self, from: NodeId, message: Message) -> Result<(), Fault> {
        let kept = self.early.entry(from).or_default();
        if kept.len() >= EARLY_MAX {
            return Err(Fault::TooEarly);
        }
        let at = kept.partition_point(|other| other.generation <= message.generation);
        kept.insert(at, message);
        Ok(())
    }

    fn deliver_early(&mut self, now: Instant) {
        let generation = self.generation().expect("just installed");
        for (from, messages) in std::mem::take(&mut self.early) {
            for message in messages {
                if let Err(fault) = self.message(now, from, message) {
                    self.out.push_back(Output::Fault { from, fault });
                }
            }
        }
        debug_assert!(self.early.values().flatten().all(|message| message.generation > generation));
    }
}

const _: () = assert!(REPORT_ENTRIES * EARLY_MAX >= 1 << 20, "a million locks' report fits");
const _: () = assert!(PARTITIONS <= u16::MAX as usize, "a partition's number fits its message");
