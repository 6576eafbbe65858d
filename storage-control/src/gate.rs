//! The gate (pseudo storage driver): every access of a daemon to a shared device passes it.
//!
//! - No file system request is submitted after the lease deadline, before the first one was set, or after
//!   the gate was closed. The check is made in the thread that submits, immediately before it does.
//! - No register request is submitted later than a lease after the node last renewed its slot.
//! - A closed gate never opens again. Only the slot's own farewell passes it ([`crate::slots::SlotKeeper::release`]).
//!
//! A thread that is paused between the check and its write is not stopped by this gate: that is what fencing and D are for.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::buf::{AlignedBuf, IoSlice};
use crate::completion::{Completer, completion};
use crate::device::{Device, Durability, IoFuture, Request, SubmitGuard, ready};
use crate::ids::{BLOCK_SIZE, BlockAddr};
use crate::runtime::{Instant, Runtime};

/// Why a gate was closed for good.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CloseReason {
    /// The node leaves, everything is on disk.
    Left,
    /// The lease ran out and was not revived.
    LeaseLost,
    /// The register says that this node is no member, or is to be fenced.
    Excluded,
    /// Another node's nonce is in this node's slot.
    SlotTaken,
    /// The device now carries another file system.
    ForeignFilesystem,
    /// The label is that of another device of the file system: the path leads elsewhere now.
    ForeignDevice,
    /// The node withdrew after an error of its own.
    Withdrawn(String),
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CloseReason::Left => f.write_str("the node left the cluster"),
            CloseReason::LeaseLost => f.write_str("the lease ran out"),
            CloseReason::Excluded => f.write_str("the other nodes have excluded this node"),
            CloseReason::SlotTaken => f.write_str("another node has taken this node's slot"),
            CloseReason::ForeignFilesystem => f.write_str("the device now carries another file system"),
            CloseReason::ForeignDevice => {
                f.write_str("the path now leads to another device of the file system")
            }
            CloseReason::Withdrawn(why) => write!(f, "the node withdrew: {why}"),
        }
    }
}

/// The error inside the [`io::Error`] of a request that the gate refused; see [`refusal`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GateRefused {
    /// The gate is closed for good.
    #[error("the gate is closed: {0}")]
    Closed(CloseReason),
    /// The lease is not valid now; it may be renewed.
    #[error("this node holds no valid lease")]
    NoLease,
}

impl From<GateRefused> for io::Error {
    fn from(refused: GateRefused) -> io::Error {
        io::Error::other(refused)
    }
}

/// The gate's refusal inside an error, if that is what it is.
pub fn refusal(error: &io::Error) -> Option<&GateRefused> {
    error.get_ref()?.downcast_ref()
}

/// What has passed a gate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct GateStats {
    /// Reads submitted.
    pub reads: u64,
    /// Writes submitted.
    pub writes: u64,
    /// Flushes submitted.
    pub flushes: u64,
    /// Bytes of those reads.
    pub bytes_read: u64,
    /// Bytes of those writes.
    pub bytes_written: u64,
    /// Requests refused.
    pub refused: u64,
    /// Requests to the quorum region, of any kind.
    pub quorum: u64,
}

#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    refused: AtomicU64,
    quorum: AtomicU64,
}

type FaultHook = Arc<dyn Fn(Request) -> io::Result<()> + Send + Sync>;

struct Doors {
    clock: Arc<dyn Runtime>,
    /// File system requests are admitted before this time (ns since boot); 0: not yet.
    lease_until: AtomicU64,
    /// Register requests are admitted before this time; at least `lease_until`.
    slot_until: AtomicU64,
    closed: Mutex<Option<CloseReason>>,
    counters: Counters,
    fault: Mutex<Option<FaultHook>>,
    in_flight: Mutex<InFlight>,
}

#[derive(Default)]
struct InFlight {
    requests: u64,
    waiting: Vec<Completer<()>>,
}

/// Which of the gate's deadlines a request is held against.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Door {
    Filesystem,
    Register,
    Slot,
}

struct Guard {
    doors: Arc<Doors>,
    door: Door,
}

impl Doors {
    fn check(&self, door: Door) -> Result<(), GateRefused> {
        let until = match door {
            Door::Filesystem => &self.lease_until,
            Door::Register => &self.slot_until,
            Door::Slot => return Ok(()),
        };
        // The deadline is 0 in a closed gate, so that one load decides in the common case.
        if self.clock.now().0 < until.load(Ordering::Acquire) {
            return Ok(());
        }
        match &*self.closed.lock() {
            Some(reason) => Err(GateRefused::Closed(reason.clone())),
            None => Err(GateRefused::NoLease),
        }
    }

    fn enter(&self) {
        self.in_flight.lock().requests += 1;
    }

    fn leave(&self) {
        let waiting = {
            let mut in_flight = self.in_flight.lock();
            in_flight.requests -= 1;
            if in_flight.requests > 0 {
                return;
            }
            std::mem::take(&mut in_flight.waiting)
        };
        waiting.into_iter().for_each(|done| done.complete(Ok(())));
    }

    fn count(&self, door: Door, request: Request) {
        let counters = &self.counters;
        let add = |counter: &AtomicU64, by: u64| counter.fetch_add(by, Ordering::Relaxed);
        match (door, request) {
            (Door::Register | Door::Slot, _) => add(&counters.quorum, 1),
            (Door::Filesystem, Request::Read(_, blocks)) => {
                add(&counters.bytes_read, (blocks * BLOCK_SIZE) as u64);
                add(&counters.reads, 1)
            }
            (Door::Filesystem, Request::Write(_, blocks, _)) => {
                add(&counters.bytes_written, (blocks * BLOCK_SIZE) as u64);
                add(&counters.writes, 1)
            }
            (Door::Filesystem, Request::Flush) => add(&counters.flushes, 1),
        };
    }
}

impl SubmitGuard for Guard {
    fn admit(&self, request: Request) -> io::Result<()> {
        // Counted before it is checked: who closes the gate and then waits for `drained` misses none.
        self.doors.enter();
        let hook = self.doors.fault.lock().clone();
        let admitted = match self.doors.check(self.door) {
            Ok(()) => hook.map_or(Ok(()), |hook| hook(request)),
            Err(refused) => Err(refused.into()),
        };
        match &admitted {
            Ok(()) => self.doors.count(self.door, request),
            Err(_) => {
                self.doors.counters.refused.fetch_add(1, Ordering::Relaxed);
                self.doors.leave();
            }
        }
        admitted
    }

    fn finished(&self) {
        self.doors.leave();
    }
}

/// The gate; itself the device that the file system gets. Cloning gives another handle.
#[derive(Clone)]
pub struct Gate {
    doors: Arc<Doors>,
    filesystem: Arc<Passage>,
    register: Arc<Passage>,
    slot: Arc<Passage>,
}

impl Gate {
    /// A gate in front of `device`, without a lease yet.
    pub fn new(device: Arc<dyn Device>, clock: Arc<dyn Runtime>) -> Gate {
        let doors = Arc::new(Doors {
            clock,
            lease_until: AtomicU64::new(0),
            slot_until: AtomicU64::new(0),
            closed: Mutex::new(None),
            counters: Counters::default(),
            fault: Mutex::new(None),
            in_flight: Mutex::default(),
        });
        let passage = |door| Arc::new(Passage::new(&device, &doors, door));
        Gate {
            filesystem: passage(Door::Filesystem),
            register: passage(Door::Register),
            slot: passage(Door::Slot),
            doors,
        }
    }

    /// A gate that is open for ever: for fsck, mkfs and tests without a cluster.
    pub fn open_for_ever(device: Arc<dyn Device>, clock: Arc<dyn Runtime>) -> Gate {
        let gate = Gate::new(device, clock);
        gate.extend_slot(Instant(u64::MAX));
        gate.extend_lease(Instant(u64::MAX));
        gate
    }

    /// The device for the quorum register.
    pub fn register_device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.register) as Arc<dyn Device>
    }

    /// The device for label and slots.
    pub(crate) fn slot_device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.slot) as Arc<dyn Device>
    }

    /// Admits file system requests until `deadline`, unless the gate is closed. Never shortens.
    pub fn extend_lease(&self, deadline: Instant) {
        self.extend(&self.doors.lease_until, deadline);
    }

    /// Admits register requests until `deadline`, unless the gate is closed. Never shortens.
    pub fn extend_slot(&self, deadline: Instant) {
        self.extend(&self.doors.slot_until, deadline);
    }

    fn extend(&self, until: &AtomicU64, deadline: Instant) {
        // Under the lock: an extension never undoes a close.
        let closed = self.doors.closed.lock();
        if closed.is_none() {
            until.fetch_max(deadline.0, Ordering::AcqRel);
        }
    }

    /// When the lease runs out; `None` without one.
    pub fn lease_until(&self) -> Option<Instant> {
        Some(Instant(self.doors.lease_until.load(Ordering::Acquire))).filter(|until| until.0 > 0)
    }

    /// Closes for good. The first reason stays.
    pub fn close(&self, reason: CloseReason) {
        let mut closed = self.doors.closed.lock();
        if closed.is_none() {
            tracing::warn!(%reason, "gate closed");
            *closed = Some(reason);
        }
        self.doors.lease_until.store(0, Ordering::Release);
        self.doors.slot_until.store(0, Ordering::Release);
    }

    /// Why it was closed, if it was.
    pub fn closed(&self) -> Option<CloseReason> {
        self.doors.closed.lock().clone()
    }

    /// Whether a file system request would pass now.
    pub fn check(&self) -> Result<(), GateRefused> {
        self.doors.check(Door::Filesystem)
    }

    /// Whether a register request would pass now.
    pub fn check_register(&self) -> Result<(), GateRefused> {
        self.doors.check(Door::Register)
    }

    /// Completes when no request is under way.
    pub async fn drained(&self) {
        let wait = {
            let mut in_flight = self.doors.in_flight.lock();
            if in_flight.requests == 0 {
                return;
            }
            let (done, wait) = completion();
            in_flight.waiting.push(done);
            wait
        };
        // The completer lives in the gate and is always completed.
        let _ = wait.await;
    }

    /// What has passed so far.
    pub fn stats(&self) -> GateStats {
        let counters = &self.doors.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        GateStats {
            reads: get(&counters.reads),
            writes: get(&counters.writes),
            flushes: get(&counters.flushes),
            bytes_read: get(&counters.bytes_read),
            bytes_written: get(&counters.bytes_written),
            refused: get(&counters.refused),
            quorum: get(&counters.quorum),
        }
    }

    /// For tests: `hook` may fail any request that the gate would admit.
    pub fn inject(&self, hook: impl Fn(Request) -> io::Result<()> + Send + Sync + 'static) {
        *self.doors.fault.lock() = Some(Arc::new(hook));
    }

    /// Ends [`Gate::inject`].
    pub fn inject_nothing(&self) {
        *self.doors.fault.lock() = None;
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gate({:?}, {:?})", self.check(), self.stats())
    }
}

impl Device for Gate {
    fn blocks(&self) -> u64 {
        self.filesystem.blocks()
    }

    fn read(&self, at: BlockAddr, blocks: usize) -> IoFuture<AlignedBuf> {
        self.filesystem.read(at, blocks)
    }

    fn write(&self, at: BlockAddr, data: Vec<IoSlice>, durability: Durability) -> IoFuture<()> {
        self.filesystem.write(at, data, durability)
    }

    fn flush(&self) -> IoFuture<()> {
        self.filesystem.flush()
    }
}

/// The device behind one of the gate's doors.
struct Passage {
    device: Arc<dyn Device>,
    guard: Arc<dyn SubmitGuard>,
    /// The device asks the guard itself, later than we could.
    asks: bool,
}

impl Passage {
    fn new(device: &Arc<dyn Device>, doors: &Arc<Doors>, door: Door) -> Passage {
        let guard: Arc<dyn SubmitGuard> = Arc::new(Guard { doors: Arc::clone(doors), door });
        let guarded = device.guarded(&guard);
        let asks = guarded.is_some();
        let device = guarded.unwrap_or_else(|| Arc::clone(device));
        Passage { device, guard, asks }
    }

    fn pass<T: Send + 'static>(
        &self,
        request: Request,
        submit: impl FnOnce(&dyn Device) -> IoFuture<T>,
    ) -> IoFuture<T> {
        if self.asks {
            return submit(&*self.device);
        }
        if let Err(error) = self.guard.admit(request) {
            return ready(Err(error));
        }
        let work = submit(&*self.device);
        let finished = Finished(Arc::clone(&self.guard));
        Box::pin(async move {
            let result = work.await;
            drop(finished);
            result
        })
    }
}

/// Tells the guard that an admitted request is over.
struct Finished(Arc<dyn SubmitGuard>);

impl Drop for Finished {
    fn drop(&mut self) {
        self.0.finished();
    }
}

impl Device for Passage {
    fn blocks(&self) -> u64 {
        self.device.blocks()
    }

    fn read(&self, at: BlockAddr, blocks: usize) -> IoFuture<AlignedBuf> {
        self.pass(Request::Read(at, blocks), |device| device.read(at, blocks))
    }

    fn write(&self, at: BlockAddr, data: Vec<IoSlice>, durability: Durability) -> IoFuture<()> {
        let blocks = data.iter().map(|piece| piece.len).sum::<usize>() / BLOCK_SIZE;
        self.pass(Request::Write(at, blocks, durability), |device| device.write(at, data, durability))
    }

    fn flush(&self) -> IoFuture<()> {
        self.pass(Request::Flush, |device| device.flush())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::mem_device::{Fault, MemDevice};
    use crate::runtime::{SimRuntime, block_on};

    fn gate() -> (MemDevice, SimRuntime, Gate) {
        let (device, world) = (MemDevice::new(8), SimRuntime::new(1));
        let gate = Gate::new(Arc::new(device.clone()), Arc::new(world.clone()));
        (device, world, gate)
    }

    fn write(gate: &Gate) -> io::Result<()> {
        let data = vec![AlignedBuf::copy_of(&[1; BLOCK_SIZE]).into()];
        block_on(gate.write(BlockAddr(1), data, Durability::Cached))
    }

    fn refused(result: io::Result<()>) -> GateRefused {
        refusal(&result.unwrap_err()).expect("the gate refused").clone()
    }

    #[test]
    fn a_gate_without_a_lease_lets_nothing_through() {
        let (device, _, gate) = gate();
        assert_eq!(refused(write(&gate)), GateRefused::NoLease);
        assert!(block_on(gate.read(BlockAddr(0), 1)).is_err());
        assert_eq!((device.writes(), gate.stats().refused), (0, 2));
    }

    #[test]
    fn a_node_without_lease_stops_writing_at_the_deadline_and_a_renewal_revives_it() {
        let (_, world, gate) = gate();
        gate.extend_lease(world.now() + Duration::from_secs(4));
        write(&gate).unwrap();
        world.advance(Duration::from_secs(4));
        assert_eq!(refused(write(&gate)), GateRefused::NoLease);
        gate.extend_lease(world.now() + Duration::from_secs(4));
        write(&gate).unwrap();
        assert_eq!((gate.stats().writes, gate.stats().bytes_written), (2, 8192));
    }

    #[test]
    fn a_closed_gate_never_opens_again_and_keeps_its_first_reason() {
        let (_, world, gate) = gate();
        gate.extend_lease(world.now() + Duration::from_secs(4));
        gate.close(CloseReason::Excluded);
        gate.close(CloseReason::Left);
        gate.extend_lease(world.now() + Duration::from_secs(8));
        assert_eq!(refused(write(&gate)), GateRefused::Closed(CloseReason::Excluded));
    }

    #[test]
    fn the_register_has_a_deadline_of_its_own() {
        let (_, world, gate) = gate();
        let read = || block_on(gate.register_device().read(BlockAddr(0), 1));
        assert!(read().is_err());
        gate.extend_slot(world.now() + Duration::from_secs(4));
        read().unwrap();
        assert!(write(&gate).is_err());
        assert_eq!(gate.stats().quorum, 1);
    }

    #[test]
    fn a_gate_is_drained_when_the_writes_of_dropped_futures_are_over_too() {
        let (device, world, gate) = gate();
        gate.extend_lease(world.now() + Duration::from_secs(4));
        device.inject(|_| Fault::Hold);
        let data = vec![AlignedBuf::zeroed(BLOCK_SIZE).into()];
        drop(gate.write(BlockAddr(1), data, Durability::Cached));
        gate.close(CloseReason::Left);
        let drained = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (waiting, seen) = (gate.clone(), Arc::clone(&drained));
        world.spawn(Box::pin(async move {
            waiting.drained().await;
            seen.store(true, Ordering::Release);
        }));
        world.advance(Duration::from_secs(1));
        assert!(!drained.load(Ordering::Acquire));
        device.release_held();
        world.advance(Duration::from_secs(1));
        assert!(drained.load(Ordering::Acquire));
    }

    #[test]
    fn the_fault_hook_fails_what_it_chooses() {
        let (_, world, gate) = gate();
        gate.extend_lease(world.now() + Duration::from_secs(4));
        gate.inject(|request| match request {
            Request::Write(..) => Err(io::Error::from_raw_os_error(libc::EIO)),
            Request::Read(..) | Request::Flush => Ok(()),
        });
        assert_eq!(write(&gate).unwrap_err().raw_os_error(), Some(libc::EIO));
        block_on(gate.flush()).unwrap();
        gate.inject_nothing();
        write(&gate).unwrap();
    }
}
