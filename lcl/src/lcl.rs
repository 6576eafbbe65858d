//! The handle that clients and the daemon hold.
//!
//! Always: no waker, callout or task is called or started while a partition's mutex is held; messages are
//! queued while it is held, so that they leave in the order in which they were decided.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use dlm::{Dlm, Epoch, Fault, Message, Mode, PARTITIONS, Resource};
use membership::View;
use parking_lot::{Mutex, RwLock};
use storage_control::{Incarnation, Instant, NodeId, Runtime};

use crate::api::{Callouts, Config, LockError, ReleaseError, Scope, Wire};
use crate::demote::{self, Settled};
use crate::entry::{Phase, Waiter};
use crate::guard::{Guard, Wait};
use crate::hooks::Hooks;
use crate::partition::{Effects, Partition, Step, limit};
use crate::stats::{CachedLock, Snapshot, Stats};
use crate::wait::{Cell, Outcome};

/// Locks taken down at once by a trim or a release of all.
const BATCH: usize = 64;

/// The cluster locks of this node; clones are handles to the same.
#[derive(Clone)]
pub struct Lcl(Arc<Inner>);

struct Inner {
    me: NodeId,
    runtime: Arc<dyn Runtime>,
    wire: Arc<dyn Wire>,
    config: Config,
    hooks: Hooks,
    epoch: RwLock<Option<Arc<Epoch>>>,
    closed: OnceLock<String>,
    partitions: Vec<Mutex<Partition>>,
}

/// A wire for a node that has no peers.
struct NoWire;

impl Wire for NoWire {
    fn send(&self, to: NodeId, message: Message) {
        unreachable!("a node alone has nobody to send {message:?} to, least of all {to}");
    }
}

impl Lcl {
    /// Without a view: requests wait until [`Lcl::install_view`].
    pub fn new(
        me: NodeId,
        incarnation: Incarnation,
        runtime: Arc<dyn Runtime>,
        wire: Arc<dyn Wire>,
        config: Config,
    ) -> Lcl {
        let partitions =
            (0..PARTITIONS).map(|at| Mutex::new(Partition::new(Dlm::new(me, incarnation, at)))).collect();
        Lcl(Arc::new(Inner {
            me,
            runtime,
            wire,
            config,
            hooks: Hooks::default(),
            epoch: RwLock::new(None),
            closed: OnceLock::new(),
            partitions,
        }))
    }

    /// A node alone, which masters everything: every lock is granted here.
    pub fn solo(runtime: Arc<dyn Runtime>) -> Lcl {
        let (me, incarnation) = (NodeId(0), Incarnation(1));
        let lcl = Lcl::new(me, incarnation, runtime, Arc::new(NoWire), Config::default());
        lcl.install_epoch(&Arc::new(Epoch::solo(me, incarnation)));
        lcl
    }

    /// Registers what to do when locks of a kind come and go. Before the first lock of the kind.
    pub fn set_callouts(&self, kind: u8, callouts: Arc<dyn Callouts>) {
        self.0.hooks.set(kind, callouts);
    }

    /// Begins a use; waits for other nodes and, in process scope, for local users in conflicting modes. Dropping
    /// the future gives the wait up. Who holds a guard must not wait here for a stronger mode of the same
    /// resource: the lock may have to be given up in between.
    pub async fn acquire(&self, res: Resource, mode: Mode, scope: Scope) -> Result<Guard, LockError> {
        if let Some(guard) = self.try_cached(res, mode, scope) {
            return Ok(guard);
        }
        let guard = self.wait(res, mode, scope, false)?.await?;
        Ok(guard.expect("only a no-queue request is refused"))
    }

    /// Begins a use if nobody is in the way, here or on another node; may take a message to the master and back.
    /// Who is in the way is told, so that a later try can succeed.
    pub async fn try_acquire(
        &self,
        res: Resource,
        mode: Mode,
        scope: Scope,
    ) -> Result<Option<Guard>, LockError> {
        if let Some(guard) = self.try_cached(res, mode, scope) {
            return Ok(Some(guard));
        }
        self.wait(res, mode, scope, true)?.await
    }

    /// Begins a use if that needs neither a message nor a wait.
    pub fn try_cached(&self, res: Resource, mode: Mode, scope: Scope) -> Option<Guard> {
        let mut partition = self.partition(res).lock();
        if partition.closed {
            return None;
        }
        if let Some(entry) = partition.entries.get_mut(&res) {
            if entry.enter_at_once(mode, scope) {
                partition.stats.cached_hits += 1;
                drop(partition);
                return Some(self.guard(res, mode, scope));
            }
            let may_ask = entry.asking.is_none() && entry.opening.is_none() && entry.phase == Phase::Open;
            if !may_ask || entry.held.covers(mode) || !entry.queue.is_empty() {
                return None;
            }
        }
        let free = partition.dlm.is_free_here(&res, mode);
        drop(partition);
        (free && self.enter_by_local_grant(res, mode, scope)).then(|| self.guard(res, mode, scope))
    }

    /// Has this node as master grant the lock, if it is still free, and begins a use.
    fn enter_by_local_grant(&self, res: Resource, mode: Mode, scope: Scope) -> bool {
        let entered = self.locked(res, |partition, step| {
            let unasked =
                partition.entries.peek(&res).is_none_or(|e| e.asking.is_none() && e.phase == Phase::Open);
            if partition.closed || !unasked || !partition.dlm.is_free_here(&res, mode) {
                return false;
            }
            partition.ask(step, res, mode, true);
            partition.pump(step);
            partition.enter_at_once(res, mode, scope)
        });
        // Where the client had to hear of the grant first, only now it may be used.
        entered
            || self.locked(res, |partition, _| !partition.closed && partition.enter_at_once(res, mode, scope))
    }

    fn wait(&self, res: Resource, mode: Mode, scope: Scope, no_queue: bool) -> Result<Wait, LockError> {
        let cell = Arc::new(Cell::new());
        self.locked(res, |partition, step| {
            if partition.closed {
                return Err(LockError::Closed);
            }
            partition.stats.waits += 1;
            let entry = partition.entry(step, res);
            if entry.enter_at_once(mode, scope) {
                let _ = cell.finish(Outcome::Admitted);
            } else {
                let waiter = Waiter { mode, scope, no_queue, since: step.now, cell: cell.clone() };
                partition.wait(step, res, waiter);
            }
            Ok(())
        })?;
        Ok(Wait::new(self.clone(), res, mode, scope, cell))
    }

    fn guard(&self, res: Resource, mode: Mode, scope: Scope) -> Guard {
        Guard::new(self.clone(), res, mode, scope)
    }

    /// A message from a member. An error says that no correct member sends it: end the connection.
    pub fn message(&self, from: NodeId, message: Message) -> Result<(), Fault> {
        let at = message.partition();
        self.locked_at(at, |partition, step| {
            if partition.closed {
                return Ok(());
            }
            partition.stats.messages_received += 1;
            let result = partition.dlm.message(step.now, from, message);
            if let Err(fault) = result {
                partition.fault(step, from, fault);
            }
            result
        })
    }

    /// A new view, or the same with fences and recoveries further on.
    pub fn install_view(&self, view: Arc<View>) {
        self.install_epoch(&Arc::new(Epoch::from(&*view)));
    }

    /// The same, given what locks need of the view.
    pub fn install_epoch(&self, epoch: &Arc<Epoch>) {
        {
            let mut current = self.0.epoch.write();
            if current.as_ref().is_none_or(|current| current.generation <= epoch.generation) {
                *current = Some(epoch.clone());
            }
        }
        self.everywhere(|partition, step| partition.dlm.install_view(step.now, epoch.clone()));
    }

    /// An excluded incarnation is fenced: it reads and writes no more.
    pub fn fenced(&self, node: NodeId, incarnation: Incarnation) {
        self.everywhere(|partition, step| partition.dlm.fenced(step.now, node, incarnation));
    }

    /// An excluded incarnation is fenced and its journal replayed.
    pub fn recovered(&self, node: NodeId, incarnation: Incarnation) {
        self.everywhere(|partition, step| partition.dlm.recovered(step.now, node, incarnation));
    }

    /// The mode this node holds.
    pub fn held(&self, res: Resource) -> Mode {
        self.partition(res).lock().entries.peek(&res).map_or(Mode::NL, |entry| entry.held)
    }

    /// Whether this node masters the shard: its free locks cost no message.
    pub fn masters(&self, shard: u16) -> bool {
        self.0.epoch.read().as_ref().and_then(|epoch| epoch.master(shard)) == Some(self.0.me)
    }

    /// Gives back idle locks, least recently used first, until about `target` are cached.
    pub async fn trim(&self, target: usize) {
        for at in 0..PARTITIONS {
            self.trim_partition(at, target / PARTITIONS).await;
        }
    }

    async fn trim_partition(&self, at: usize, target: usize) {
        loop {
            let victims = self.locked_at(at, |partition, step| {
                if partition.closed { Vec::new() } else { partition.trim(step, target, BATCH) }
            });
            if victims.is_empty() {
                return;
            }
            for res in victims {
                demote::settled(self, res).await;
            }
        }
    }

    /// Gives back every lock, running all callouts: before leaving, when clients are quiet. Waits for guards.
    /// What callouts acquire meanwhile is given back too.
    pub async fn release_all(&self) -> Result<(), ReleaseError> {
        loop {
            let mut any = false;
            for at in 0..PARTITIONS {
                any |= self.release_partition(at).await?;
            }
            if !any {
                return Ok(());
            }
        }
    }

    /// True if there was something to release.
    async fn release_partition(&self, at: usize) -> Result<bool, ReleaseError> {
        let mut any = false;
        loop {
            let held = self.locked_at(at, |partition, step| {
                if partition.closed {
                    return Err(ReleaseError::Closed);
                }
                let held: Vec<Resource> =
                    partition.entries.iter().rev().map(|(res, _)| *res).take(BATCH).collect();
                partition.give_up(step, &held);
                Ok(held)
            })?;
            if held.is_empty() {
                return Ok(any);
            }
            any = true;
            for res in held {
                match demote::settled(self, res).await {
                    Settled::Held(_) => {}
                    Settled::Failed => return Err(ReleaseError::Kept(res)),
                    Settled::Closed => return Err(ReleaseError::Closed),
                }
            }
        }
    }

    /// The node has lost its lease or withdraws: every wait and every later request fails, nothing is given up or
    /// granted any more. Guards stay until dropped.
    pub fn close(&self, why: &str) {
        let _ = self.0.closed.set(why.to_owned());
        self.everywhere(|partition, step| partition.close(&mut step.effects));
    }

    /// Why the node was closed, if it was.
    pub fn closed(&self) -> Option<&str> {
        self.0.closed.get().map(String::as_str)
    }

    /// What this node masters and caches.
    pub fn snapshot(&self) -> Snapshot {
        let now = self.0.runtime.now();
        let mut snapshot = Snapshot::default();
        for partition in &self.0.partitions {
            let partition = partition.lock();
            snapshot.mastered.extend(partition.dlm.snapshot(now));
            snapshot.cached.extend(partition.entries.iter().map(|(res, entry)| {
                CachedLock {
                    res: *res,
                    held: entry.held,
                    asking: entry.asking.map(|(mode, _)| mode),
                    age: now.since(entry.granted_at),
                    idle: now.since(entry.last_use),
                    users: [(Scope::Process, &entry.process), (Scope::Server, &entry.server)]
                        .into_iter()
                        .flat_map(|(scope, users)| {
                            users.modes().map(move |(mode, count)| (scope, mode, count))
                        })
                        .collect(),
                    waiters: entry.queue.iter().map(|w| (w.scope, w.mode, now.since(w.since))).collect(),
                    phase: entry.phase,
                    waits: entry.waits,
                }
            }));
        }
        snapshot.mastered.sort_by_key(|info| info.res);
        snapshot.cached.sort_by_key(|lock| lock.res);
        snapshot
    }

    /// Counts since the start, and the number of cached locks.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        for partition in &self.0.partitions {
            let partition = partition.lock();
            stats += partition.stats;
            stats.cached += partition.entries.len() as u64;
        }
        stats
    }

    /// The invariants of the module headers; for tests.
    pub fn assert_consistent(&self) {
        self.0.partitions.iter().for_each(|partition| partition.lock().assert_consistent());
    }

    pub(crate) fn callouts(&self, kind: u8) -> Option<Arc<dyn Callouts>> {
        self.0.hooks.get(kind)
    }

    pub(crate) fn now(&self) -> Instant {
        self.0.runtime.now()
    }

    pub(crate) async fn sleep(&self, duration: Duration) {
        self.0.runtime.sleep(duration).await;
    }

    pub(crate) fn partition(&self, res: Resource) -> &Mutex<Partition> {
        &self.0.partitions[res.partition()]
    }

    fn everywhere(&self, mut f: impl FnMut(&mut Partition, &mut Step<'_>)) {
        for at in 0..PARTITIONS {
            self.locked_at(at, &mut f);
        }
    }

    pub(crate) fn locked<R>(&self, res: Resource, f: impl FnOnce(&mut Partition, &mut Step<'_>) -> R) -> R {
        self.locked_at(res.partition(), f)
    }

    /// One step under a partition's mutex, then what it leads to.
    fn locked_at<R>(&self, at: usize, f: impl FnOnce(&mut Partition, &mut Step<'_>) -> R) -> R {
        let (result, mut effects) = self.one_step(at, f);
        loop {
            effects.wakers.drain(..).for_each(std::task::Waker::wake);
            for res in effects.demote.drain(..) {
                self.0.runtime.spawn(Box::pin(demote::go_down(self.clone(), res)));
            }
            if effects.trim {
                self.0.runtime.spawn(Box::pin(self.clone().trim_back(at)));
            }
            let acquired = std::mem::take(&mut effects.acquired);
            if acquired.is_empty() {
                return result;
            }
            for (res, mode) in &acquired {
                if let Some(callouts) = self.callouts(res.kind) {
                    callouts.acquired(*res, *mode);
                }
            }
            effects = self
                .one_step(at, |partition, step| {
                    for (res, _) in acquired {
                        partition.opened(step, res);
                    }
                })
                .1;
        }
    }

    fn one_step<R>(&self, at: usize, f: impl FnOnce(&mut Partition, &mut Step<'_>) -> R) -> (R, Effects) {
        let mut step = Step {
            now: self.0.runtime.now(),
            wire: &*self.0.wire,
            hooks: &self.0.hooks,
            config: &self.0.config,
            effects: Effects::default(),
        };
        let mut partition = self.0.partitions[at].lock();
        let result = f(&mut partition, &mut step);
        partition.pump(&mut step);
        drop(partition);
        (result, step.effects)
    }

    /// Brings a partition that grew past its limit well below it.
    async fn trim_back(self, at: usize) {
        self.trim_partition(at, limit(&self.0.config) / 8 * 7).await;
        self.locked_at(at, |partition, _| partition.trimming = false);
    }
}

impl fmt::Debug for Lcl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lcl").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
