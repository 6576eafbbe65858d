//! Several nodes work on one filesystem, and one of them dies at any of its requests to the disk.
//!
//! Operations go to nodes at random, one after another, so that their journals interleave and locks with all that
//! they protect change hands. The victim's requests under way land or not; a survivor recovers it while the others
//! go on. Afterwards everything is there but the last operations of the victim, as many as nobody built on: what
//! another node has touched since, or an `fsync` made stable, must be there.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use parking_lot::Mutex;
use storage_control::Runtime;
use storage_control::mem_device::Fault;
use tokio::sync::Notify;

use crate::history::{History, Id};
use crate::image::seed_of;
use crate::oracle::{Seen, judge_content, promised_version};
use crate::random::Random;
use crate::support::cluster::{Cluster, Node};
use crate::support::{Bed, run_with_journals};
use crate::user::{User, Wrong};
use crate::workload::{NAMES, Operation, Slot, life_step};
use crate::world::{BLOCKS, fill};

const NODES: u16 = 3;
/// Operations while all live, if nobody dies before.
const TOGETHER: usize = 60;
/// Operations after the death.
const AFTERWARDS: usize = 15;
/// The victim dies at one of so many of its requests.
const REQUESTS: u64 = 150;

/// What became of a life.
#[derive(Clone, Copy, Debug, Default)]
pub struct Life {
    /// Operations of the victim that are gone.
    pub lost: u64,
    /// An operation was under way at the death.
    pub interrupted: bool,
}

/// One cluster's life with the death of one node, all of it from the seed.
pub fn live(seed: u64) -> Result<Life, Wrong> {
    let result = Arc::new(Mutex::new(Err("the life did not end".to_owned())));
    let slot = result.clone();
    let whole = catch_unwind(AssertUnwindSafe(|| {
        run_with_journals(seed_of("life", seed), BLOCKS, NODES, move |bed| async move {
            let life = life(&bed, seed).await;
            *slot.lock() = life;
        });
    }));
    match whole {
        Ok(()) => Arc::into_inner(result).expect("the life is over").into_inner(),
        Err(panic) => Err(format!("panic: {}", panic.downcast_ref::<String>().map_or("", |text| text))),
    }
}

/// The victim's death, at the request that was drawn.
struct Death {
    happened: AtomicBool,
    recovered: AtomicBool,
    wake: Notify,
}

impl Death {
    async fn recovered(&self) {
        loop {
            let mut wake = std::pin::pin!(self.wake.notified());
            wake.as_mut().enable();
            if self.recovered.load(SeqCst) {
                return;
            }
            wake.await;
        }
    }
}

async fn life(bed: &Bed, seed: u64) -> Result<Life, Wrong> {
    let mut random = Random::new(seed_of("life", seed ^ 1));
    let (cluster, nodes) = Cluster::start(bed, NODES).await;
    let nodes: Vec<Arc<Node>> = nodes.into_iter().map(Arc::new).collect();
    let mut user = fill(nodes[0].fs.clone(), &bed.runtime).await?;
    user.sync().await?;
    user.history = user.history.begin_here();
    let victim = random.below(NODES.into()) as u16;
    let death = schedule_death(bed, &cluster, &nodes, victim, &mut random);

    let mut life = Life::default();
    let mut left = TOGETHER;
    while left > 0 && !death.happened.load(SeqCst) {
        left -= 1;
        let node = random.below(NODES.into()) as u16;
        let step = life_step(&mut random);
        let (before, promises) = (user.history.last(), user.history.promises.len());
        act_on(&mut user, &nodes, node);
        let result = user.step(&step).await;
        if !death.happened.load(SeqCst) {
            result?;
            continue;
        }
        // It ended before the death, and what came after it was cut off; or nobody knows.
        let ended = node == victim && user.history.last() > before;
        if !ended {
            user.history.promises.truncate(promises);
        }
        life.interrupted = !ended;
        death.recovered().await;
        let open = if ended { Open::default() } else { user.open_in(step.operation, before) };
        life.lost = judge_death(&mut user, &nodes, victim, before + usize::from(ended), &open).await?;
    }
    if !death.happened.load(SeqCst) {
        die(bed.clone(), cluster.clone(), nodes.clone(), victim, death.clone()).await;
        let last = user.history.last();
        life.lost = judge_death(&mut user, &nodes, victim, last, &Open::default()).await?;
    }
    let survivors: Vec<u16> = (0..NODES).filter(|node| *node != victim).collect();
    for _ in 0..AFTERWARDS {
        act_on(&mut user, &nodes, *random.pick(&survivors));
        user.step(&life_step(&mut random)).await?;
    }
    for node in &survivors {
        let seen = Seen::look(&nodes[usize::from(*node)].fs).await?;
        let same =
            seen.contents.iter().all(|(id, bytes)| user.history.content(*id).is_some_and(|b| *b == *bytes));
        if seen.tree != *user.history.now() || !same {
            return Err(format!("node {node} shows something else at the end"));
        }
    }
    drop(user);
    for node in nodes {
        let node = Arc::into_inner(node).expect("nobody else has the node");
        if node.id.0 != victim {
            cluster.leave(node).await;
        }
    }
    bed.fsck().await;
    Ok(life)
}

fn act_on(user: &mut User, nodes: &[Arc<Node>], node: u16) {
    user.fs = nodes[usize::from(node)].fs.clone();
    user.history.node = node;
}

/// The victim is dead a moment after a request that was drawn; a survivor recovers it a while later.
fn schedule_death(
    bed: &Bed,
    cluster: &Cluster,
    nodes: &[Arc<Node>],
    victim: u16,
    random: &mut Random,
) -> Arc<Death> {
    let death = Arc::new(Death {
        happened: AtomicBool::new(false),
        recovered: AtomicBool::new(false),
        wake: Notify::new(),
    });
    let (at, requests) = (random.below(REQUESTS), AtomicU64::new(0));
    let moment = Duration::from_micros(random.below(250));
    let (bed, cluster, shared) = (bed.clone(), cluster.clone(), nodes.to_vec());
    let told = death.clone();
    let access = nodes[usize::from(victim)].access.clone();
    access.inject(move |_| {
        if requests.fetch_add(1, SeqCst) == at {
            let (bed, cluster, nodes, death) = (bed.clone(), cluster.clone(), shared.clone(), told.clone());
            let runtime = bed.runtime.clone();
            runtime.clone().spawn(Box::pin(async move {
                runtime.sleep(moment).await;
                if !death.happened.load(SeqCst) {
                    die(bed, cluster, nodes, victim, death).await;
                }
            }));
        }
        Fault::None
    });
    death
}

async fn die(bed: Bed, cluster: Cluster, nodes: Vec<Arc<Node>>, victim: u16, death: Arc<Death>) {
    death.happened.store(true, SeqCst);
    let dead = &nodes[usize::from(victim)];
    cluster.kill(dead);
    // The others notice, and fence it.
    bed.runtime.sleep(Duration::from_micros(bed.runtime.random() % 20_000)).await;
    cluster.recover(dead, &nodes[usize::from((victim + 1) % NODES)]).await;
    // Nobody asks the dead one's disk again.
    dead.access.release();
    drop(nodes);
    death.recovered.store(true, SeqCst);
    death.wake.notify_waiters();
}

/// Compares what a survivor sees with what may be left of the history up to an operation; goes on with what is there.
/// Returns how many operations are gone.
async fn judge_death(
    user: &mut User,
    nodes: &[Arc<Node>],
    victim: u16,
    last: usize,
    open: &Open,
) -> Result<u64, Wrong> {
    let survivor = &nodes[usize::from((victim + 1) % NODES)];
    let seen = Seen::look(&survivor.fs).await?;
    let history = &mut user.history;
    history.forget_after(last);
    let floor = floor_of(history, victim);
    let mut dropped: Vec<usize> = Vec::new();
    let mut loseable = (floor + 1..=last).rev().filter(|n| history.by[*n] == victim);
    let kept = loop {
        if history.without(&dropped).is_but_for(&seen.tree, &open.names, &open.ids) {
            break dropped.last().map_or(last, |lost| lost - 1);
        }
        match loseable.next() {
            Some(lost) => dropped.push(lost),
            None => {
                return Err(format!(
                    "node {victim} died: what is there is not what {last} operations left, whatever of it was lost after {floor}\n{}",
                    history.now().difference(&seen.tree)
                ));
            }
        }
    };
    let here = |(dir, name): &(Id, &str)| seen.tree.find(*dir, name);
    let hidden: Vec<Id> = open.names.iter().filter_map(here).chain(open.ids.iter().copied()).collect();
    for (id, bytes) in seen.contents.iter().filter(|(id, _)| !hidden.contains(id)) {
        let first = first_version(history, victim, *id);
        let oldest = judge_content(history, first, last, *id, bytes)
            .map_err(|wrong| format!("node {victim} died: {wrong}"))?;
        if history.by[oldest] == victim && oldest > kept {
            return Err(format!(
                "file {id:?} is as after operation {oldest}, node {victim}'s names as after {kept}"
            ));
        }
    }
    let contents = seen.contents.into_iter().map(|(id, bytes)| (id, Arc::new(bytes)));
    user.history = History::starting(seen.tree, contents);
    Ok(dropped.len() as u64)
}

/// The last operation of the victim that cannot be lost.
fn floor_of(history: &History, victim: u16) -> usize {
    let promised =
        history.promises.iter().filter(|promise| promise.node == victim).map(|promise| promise.names);
    let built_on =
        (1..=history.last()).filter(|n| history.by[*n] == victim && history.is_followed_by_another(*n));
    promised.chain(built_on).max().unwrap_or(0)
}

/// The first version of a file that may be there: what survivors wrote is in their memory, or was given on.
fn first_version(history: &History, victim: u16, id: Id) -> usize {
    let promised = promised_version(&history.promises, id);
    let versions = &history.contents[&id];
    let of_others = versions.iter().rposition(|version| history.by[version.operation] != victim).unwrap_or(0);
    promised.max(of_others)
}

/// What an operation that was under way may have changed.
#[derive(Default)]
struct Open {
    names: Vec<(Id, &'static str)>,
    /// What the names stood for.
    ids: Vec<Id>,
}

impl User {
    /// What an operation may have changed that began after `before`.
    fn open_in(&self, operation: Operation, before: usize) -> Open {
        let at = |slot: Slot| (self.dirs[usize::from(slot.dir)], NAMES[usize::from(slot.name)]);
        let names = match operation {
            Operation::Link(one, other) | Operation::Rename(one, other) => vec![at(one), at(other)],
            Operation::Create(slot)
            | Operation::Mkdir(slot)
            | Operation::Symlink(slot)
            | Operation::Unlink(slot)
            | Operation::Rmdir(slot)
            | Operation::Write(slot, _)
            | Operation::Shrink(slot)
            | Operation::Extend(slot)
            | Operation::SetXattr(slot, _)
            | Operation::RemoveXattr(slot)
            | Operation::Hold(slot) => vec![at(slot)],
            Operation::LetGo | Operation::Wait(_) => Vec::new(),
        };
        let tree = &self.history.trees[before];
        let ids = names.iter().filter_map(|(dir, name)| tree.find(*dir, name)).collect();
        Open { names, ids }
    }
}
