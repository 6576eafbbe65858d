//! The register's I/O: carries out what the core wants, until an operation has an outcome.
//!
//! - One run at a time; a run that was started is carried to its end even if nobody waits for it any more.
//! - A body is stable before the block that refers to it is written.
//! - A node that finds other bytes in its own block than it wrote has lost its slot, and stops.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use parking_lot::Mutex;
use zerocopy::IntoBytes;

use super::core::{Accepted, Ballot, Block, BodyHash, BodyPlace, Core, Op, OpId, Output, Value, Verdict};
use super::format::{AcceptorId, BadBlock, decode, encode};
use crate::buf::AlignedBuf;
use crate::completion::completion;
use crate::device::{Device, Durability};
use crate::ids::{BLOCK_SIZE, BlockAddr, NodeId};
use crate::layout::{BodyBuffer, MAX_BODY_BYTES, QuorumLayout};
use crate::runtime::{BoxFuture, Runtime, draw};
use crate::turn::Turns;

/// A run that meets larger ballots is repeated so often.
const MAX_RUNS: u32 = 40;
/// Back-off doubles from here ...
const BACK_OFF_FIRST_MS: u64 = 2;
/// ... so many times.
const BACK_OFF_DOUBLINGS: u32 = 7;
/// Nodes that collide start again in the order of their slots, so far apart.
const START_STEP_MS: u64 = 1;

/// One acceptor: the quorum region of a device.
#[derive(Clone)]
pub struct Acceptor {
    /// The device; of a running node its gate's [`crate::Gate::register_device`].
    pub device: Arc<dyn Device>,
    /// Where its blocks lie.
    pub layout: QuorumLayout,
    /// Which acceptor it must be.
    pub id: AcceptorId,
}

/// Why the register gives no answer.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// Too few acceptors could be read and written.
    #[error("no majority of the quorum devices answers: {0}")]
    NoMajority(#[source] AcceptorError),
    /// No acceptor has a value.
    #[error("the quorum register is blank: mkfs did not run to its end")]
    Uninitialised,
    /// Other nodes kept it busy for all tries.
    #[error("other nodes kept the quorum register busy")]
    Contended,
    /// The body is longer than the format has room for.
    #[error("a register body of {0} bytes is longer than {MAX_BODY_BYTES}")]
    TooLong(usize),
    /// The runtime dropped the task.
    #[error("the operation was dropped: the node stops")]
    Dropped,
}

/// Why an acceptor is not counted.
#[derive(Debug, thiserror::Error)]
pub enum AcceptorError {
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A block that is not to be believed.
    #[error("{0}")]
    BadBlock(#[from] BadBlock),
    /// Somebody else has written this node's block.
    #[error("another node has written the register block of slot {0}")]
    SlotTaken(NodeId),
}

/// The register's value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Its place in the chain of values; the first is 1.
    pub sequence: u64,
    /// What the nodes agree on.
    pub body: Arc<[u8]>,
}

/// What became of a compare-and-set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is in effect, and made this sequence.
    Committed {
        /// The new value's sequence.
        sequence: u64,
    },
    /// It is not in effect and never will be; the value is another than expected.
    Conflict(Snapshot),
    /// It may be in effect or not. [`Register::settle`] finds out.
    Unknown {
        /// Names it.
        op: OpId,
        /// The sequence it expected.
        expected: u64,
        /// Why it is not known.
        why: Unsettled,
    },
}

/// Why the outcome of a compare-and-set is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unsettled {
    /// Too few acceptors answered.
    NoMajority,
    /// Other nodes kept the register busy.
    Contended,
    /// So much was committed since that nobody remembers.
    Forgotten,
}

struct State {
    core: Option<Core>,
    bodies: Vec<(BodyHash, Arc<[u8]>)>,
    back_off: u64,
    /// Accesses under way, also of runs that ended before them.
    outstanding: Vec<(usize, BoxFuture<Access>)>,
    /// Accesses of a core that was given up. Nothing is written to these acceptors until they are over.
    stale: Vec<(usize, BoxFuture<Access>)>,
    last_error: Option<AcceptorError>,
}

type Access = Result<Vec<(NodeId, Block)>, AcceptorError>;

struct Shared {
    me: NodeId,
    acceptors: Vec<Acceptor>,
    runtime: Arc<dyn Runtime>,
    turns: Turns,
    /// Names of operations are drawn from it.
    names: Mutex<u64>,
    /// Taken out by who has the turn.
    state: Mutex<Option<State>>,
}

/// One node's handle to the register. Cloning gives another handle.
#[derive(Clone)]
pub struct Register {
    shared: Arc<Shared>,
}

/// How a run of the driver ended.
enum Ended {
    Current(Value, Arc<[u8]>),
    Committed(u64),
    Unknown(Unsettled),
    Failed(RegisterError),
}

impl Register {
    /// The register as the owner of slot `me` uses it. `seed` must be random: operations are named from it.
    /// The owner must hold the slot ([`crate::slots::SlotKeeper`]); its blocks are read at the first use.
    pub fn new(me: NodeId, acceptors: Vec<Acceptor>, runtime: Arc<dyn Runtime>, seed: u64) -> Register {
        let state = State {
            core: None,
            bodies: Vec::new(),
            back_off: seed.rotate_left(32),
            outstanding: Vec::new(),
            stale: Vec::new(),
            last_error: None,
        };
        let state = Mutex::new(Some(state));
        let (turns, names) = (Turns::default(), Mutex::new(seed));
        Register { shared: Arc::new(Shared { me, acceptors, runtime, turns, names, state }) }
    }

    /// The register of a matrix of one device.
    pub fn on_device(
        me: NodeId,
        device: Arc<dyn Device>,
        label: &crate::label::Label,
        runtime: Arc<dyn Runtime>,
        seed: u64,
    ) -> Register {
        let acceptor = Acceptor { device, layout: label.quorum, id: AcceptorId::single(label.fs) };
        Register::new(me, vec![acceptor], runtime, seed)
    }

    /// The committed value. Completes a ballot: no older value can be committed afterwards.
    pub async fn read(&self) -> Result<Snapshot, RegisterError> {
        match self.run(None).await? {
            Ended::Current(value, body) => Ok(Snapshot { sequence: value.sequence, body }),
            Ended::Failed(error) => Err(error),
            Ended::Committed(_) => unreachable!("a read commits no operation"),
            Ended::Unknown(_) => Err(RegisterError::Contended),
        }
    }

    /// Puts `body` in the place of the value with sequence `expected`.
    pub async fn cas(&self, expected: u64, body: Vec<u8>) -> Result<Outcome, RegisterError> {
        if body.len() > MAX_BODY_BYTES {
            return Err(RegisterError::TooLong(body.len()));
        }
        let id = self.shared.new_op();
        let op = Op { id, expected, hash: BodyHash::of(&body), len: body.len() as u32 };
        match self.run(Some((op, body.into()))).await? {
            Ended::Committed(sequence) => Ok(Outcome::Committed { sequence }),
            Ended::Current(value, body) => Ok(Outcome::Conflict(Snapshot { sequence: value.sequence, body })),
            Ended::Unknown(why) => Ok(Outcome::Unknown { op: id, expected, why }),
            Ended::Failed(error) => Err(error),
        }
    }

    /// Finds out what became of an operation whose outcome was unknown.
    pub async fn settle(&self, op: OpId, expected: u64) -> Result<Outcome, RegisterError> {
        match self.run(None).await? {
            Ended::Current(value, body) => Ok(match value.sequence_of(op) {
                Some(sequence) => Outcome::Committed { sequence },
                None if value.forgot(expected) => {
                    Outcome::Unknown { op, expected, why: Unsettled::Forgotten }
                }
                None => Outcome::Conflict(Snapshot { sequence: value.sequence, body }),
            }),
            Ended::Unknown(why) => Ok(Outcome::Unknown { op, expected, why }),
            Ended::Failed(error) => Err(error),
            Ended::Committed(_) => unreachable!("a read commits no operation"),
        }
    }

    /// Runs in a task of its own, so that a dropped caller leaves nothing half done.
    async fn run(&self, op: Option<(Op, Arc<[u8]>)>) -> Result<Ended, RegisterError> {
        let (done, wait) = completion();
        let shared = Arc::clone(&self.shared);
        self.shared.runtime.spawn(Box::pin(async move {
            let turn = shared.turns.take().await;
            let Some(mut state) = shared.state.lock().take() else {
                // A run before this one was dropped half way: what is under way is not known any more.
                return done.complete(Ok(Ended::Failed(RegisterError::Dropped)));
            };
            let ended = shared.run(&mut state, op).await;
            *shared.state.lock() = Some(state);
            drop(turn);
            done.complete(Ok(ended));
        }));
        wait.await.map_err(|_| RegisterError::Dropped)
    }
}

impl Shared {
    fn new_op(&self) -> OpId {
        let mut names = self.names.lock();
        OpId(u128::from(draw(&mut names)) << 64 | u128::from(draw(&mut names)))
    }

    async fn run(&self, state: &mut State, op: Option<(Op, Arc<[u8]>)>) -> Ended {
        if let Some((op, body)) = &op {
            state.remember(op.hash, Arc::clone(body));
        }
        // Whether any run may have put the operation into effect.
        let mut proposed = false;
        for run in 0..MAX_RUNS {
            if run > 0 {
                self.runtime.sleep(self.back_off(state, run)).await;
            }
            let core = match state.core.take() {
                Some(core) => core,
                None => self.recover(state).await,
            };
            let (core, verdict) = self.run_once(state, core, op.as_ref().map(|(op, _)| op.clone())).await;
            let ended = match verdict {
                Verdict::Current(value) => {
                    let body = state.body(value.hash).expect("a value was proposed with its body in hand");
                    Some(Ended::Current(value, body))
                }
                Verdict::Committed { sequence, .. } => Some(Ended::Committed(sequence)),
                Verdict::Forgotten(_) => Some(Ended::Unknown(Unsettled::Forgotten)),
                Verdict::Uninitialised => Some(Ended::Failed(RegisterError::Uninitialised)),
                Verdict::Preempted => None,
                Verdict::NoMajority => {
                    // The core is dropped: the own blocks are read again before the next run.
                    let error = state.last_error.take().expect("an acceptor that failed said why");
                    proposed |= core.has_proposed();
                    return if proposed {
                        Ended::Unknown(Unsettled::NoMajority)
                    } else {
                        Ended::Failed(RegisterError::NoMajority(error))
                    };
                }
            };
            proposed |= core.has_proposed();
            state.core = Some(core);
            if let Some(ended) = ended {
                return ended;
            }
        }
        if proposed { Ended::Unknown(Unsettled::Contended) } else { Ended::Failed(RegisterError::Contended) }
    }

    /// Start order by slot, and a random part that grows.
    fn back_off(&self, state: &mut State, run: u32) -> Duration {
        let range_ms = BACK_OFF_FIRST_MS << run.min(BACK_OFF_DOUBLINGS);
        let random_us = draw(&mut state.back_off) % (range_ms * 1000);
        Duration::from_millis(START_STEP_MS * u64::from(self.me.0)) + Duration::from_micros(random_us)
    }

    /// Reads the own blocks; those with an access of the former core still under way stay unknown.
    async fn recover(&self, state: &mut State) -> Core {
        state.stale.append(&mut state.outstanding);
        finish_what_is_ready(&mut state.stale).await;
        let mut own = Vec::new();
        for (index, acceptor) in self.acceptors.iter().enumerate() {
            if state.stale.iter().any(|(stale, _)| *stale == index) {
                own.push(None);
                state.last_error = Some(AcceptorError::Io(io::ErrorKind::ResourceBusy.into()));
                continue;
            }
            match acceptor.read_own(self.me).await {
                Ok(block) => own.push(Some(block)),
                Err(error) => {
                    own.push(None);
                    state.last_error = Some(error);
                }
            }
        }
        Core::new(self.me, own)
    }

    async fn run_once(&self, state: &mut State, mut core: Core, op: Option<Op>) -> (Core, Verdict) {
        let mut todo = core.start(op);
        loop {
            for output in std::mem::take(&mut todo) {
                match output {
                    Output::Done(verdict) => return (core, verdict),
                    Output::Access { acceptor, block, body } => {
                        let body = body.map(|buffer| {
                            let value = &block.accepted.as_ref().expect("a body belongs to a value").value;
                            let bytes = state.body(value.hash);
                            (buffer, bytes.expect("a value was proposed with its body in hand"))
                        });
                        let access = self.acceptors[acceptor].clone().access(self.me, block, body);
                        state.outstanding.push((acceptor, Box::pin(access)));
                    }
                    Output::Fetch { value, places } => {
                        let found = self.fetch(state, &value, &places).await;
                        todo.extend(core.fetched(found));
                    }
                }
            }
            if !todo.is_empty() {
                continue;
            }
            let (acceptor, answer) = first_of(&mut state.outstanding).await;
            todo = match answer {
                Ok(others) => core.accessed(acceptor, &others),
                Err(error) => {
                    tracing::warn!(%error, acceptor, "quorum device does not answer");
                    state.last_error = Some(error);
                    core.failed(acceptor)
                }
            };
        }
    }

    async fn fetch(&self, state: &mut State, value: &Value, places: &[BodyPlace]) -> bool {
        if state.body(value.hash).is_some() {
            return true;
        }
        for place in places {
            let read = self.acceptors[place.acceptor].read_body(place.node, place.buffer, value.len).await;
            match read {
                Ok(body) if BodyHash::of(&body) == value.hash => {
                    state.remember(value.hash, body);
                    return true;
                }
                // Overwritten meanwhile by its owner, who has gone on.
                Ok(_) => {}
                Err(error) => state.last_error = Some(error.into()),
            }
        }
        false
    }
}

impl State {
    fn body(&self, hash: BodyHash) -> Option<Arc<[u8]>> {
        self.bodies.iter().find(|(known, _)| *known == hash).map(|(_, body)| Arc::clone(body))
    }

    fn remember(&mut self, hash: BodyHash, body: Arc<[u8]>) {
        // The current body, the one before it, and one that is proposed.
        const KEPT: usize = 3;
        self.bodies.retain(|(known, _)| *known != hash);
        self.bodies.push((hash, body));
        if self.bodies.len() > KEPT {
            self.bodies.remove(0);
        }
    }
}

impl Acceptor {
    async fn read_own(&self, me: NodeId) -> Result<Block, AcceptorError> {
        let bytes = self.device.read(self.layout.register_block(me), 1).await?;
        Ok(decode(&bytes, self.id, me)?.unwrap_or_default())
    }

    /// Writes the own block and reads the others'.
    async fn access(
        self,
        me: NodeId,
        block: Block,
        body: Option<(BodyBuffer, Arc<[u8]>)>,
    ) -> Result<Vec<(NodeId, Block)>, AcceptorError> {
        if let Some((buffer, bytes)) = body {
            self.write_body(me, buffer, &bytes).await?;
        }
        self.write_block(me, &block).await?;
        let slots = usize::from(self.layout.slots);
        let bytes = self.device.read(self.layout.register_block(NodeId(0)), slots).await?;
        let mut others = Vec::new();
        for (node, bytes) in self.layout.nodes().zip(bytes.chunks_exact(BLOCK_SIZE)) {
            match decode(bytes, self.id, node) {
                Ok(Some(found)) if node == me && found == block => {}
                // Whatever lies there, this node did not write it.
                Ok(_) | Err(_) if node == me => return Err(AcceptorError::SlotTaken(me)),
                Ok(Some(found)) => others.push((node, found)),
                Ok(None) => {}
                // It may hide an accepted value.
                Err(bad) => return Err(bad.into()),
            }
        }
        Ok(others)
    }

    async fn write_body(&self, me: NodeId, buffer: BodyBuffer, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut padded = AlignedBuf::zeroed_blocks(bytes.len().div_ceil(BLOCK_SIZE));
        padded[..bytes.len()].copy_from_slice(bytes);
        self.device.write(self.layout.body(me, buffer), vec![padded.into()], Durability::Stable).await
    }

    async fn write_block(&self, me: NodeId, block: &Block) -> io::Result<()> {
        let raw = AlignedBuf::copy_of(encode(block, self.id, me).as_bytes());
        self.device.write(self.layout.register_block(me), vec![raw.into()], Durability::Stable).await
    }

    async fn read_body(&self, node: NodeId, buffer: BodyBuffer, len: u32) -> io::Result<Arc<[u8]>> {
        let len = len as usize;
        if len == 0 {
            return Ok(Arc::new([]));
        }
        let bytes = self.device.read(self.layout.body(node, buffer), len.div_ceil(BLOCK_SIZE)).await?;
        Ok(bytes[..len].into())
    }

    /// For mkfs: blanks the whole quorum region, then writes the first value into the blocks of slot 0.
    /// Nothing of it counts before the label is written.
    pub async fn format(&self, body: &[u8], op: OpId) -> Result<(), RegisterError> {
        if body.len() > MAX_BODY_BYTES {
            return Err(RegisterError::TooLong(body.len()));
        }
        let first = NodeId(0);
        let ballot = Ballot::new(1, first);
        let accepted = Accepted { ballot, value: Value::first(op, body), buffer: BodyBuffer::A };
        let block = Block { promised: ballot, accepted: Some(accepted) };
        let written = async {
            self.blank().await?;
            self.write_body(first, BodyBuffer::A, body).await?;
            self.write_block(first, &block).await
        };
        written.await.map_err(|error| RegisterError::NoMajority(error.into()))
    }

    async fn blank(&self) -> io::Result<()> {
        const CHUNK_BLOCKS: u64 = 256;
        let zeros = Arc::new(AlignedBuf::zeroed_blocks(CHUNK_BLOCKS as usize));
        let end = self.layout.end().0;
        let mut at = self.layout.start.0;
        while at < end {
            let blocks = CHUNK_BLOCKS.min(end - at);
            let piece =
                crate::buf::IoSlice { buf: Arc::clone(&zeros), offset: 0, len: blocks as usize * BLOCK_SIZE };
            self.device.write(BlockAddr(at), vec![piece], Durability::Cached).await?;
            at += blocks;
        }
        self.device.flush().await
    }
}

/// The first of the accesses to end, removed from the list.
///
/// # Panics
/// Where nothing is under way: a run that waits has asked for something.
async fn first_of(outstanding: &mut Vec<(usize, BoxFuture<Access>)>) -> (usize, Access) {
    assert!(!outstanding.is_empty(), "a run that is not over has an access under way");
    poll_fn(|context| {
        for index in 0..outstanding.len() {
            if let Poll::Ready(answer) = outstanding[index].1.as_mut().poll(context) {
                let (acceptor, _) = outstanding.remove(index);
                return Poll::Ready((acceptor, answer));
            }
        }
        Poll::Pending
    })
    .await
}

/// Lets those go on that can, and forgets those that are over.
async fn finish_what_is_ready(accesses: &mut Vec<(usize, BoxFuture<Access>)>) {
    poll_fn(|context| {
        accesses.retain_mut(|(_, access)| access.as_mut().poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
