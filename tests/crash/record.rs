//! A disk that remembers everything that was asked of it, in order.
//!
//! Every write and flush is in the log twice, when it was asked for and when it was done: what was under way in
//! between is in nobody's hand. Marks tell what the filesystem's user did meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use storage_control::{
    AlignedBuf, BLOCK_SIZE, BlockAddr, Device, Durability, IoFuture, IoSlice, Runtime, SimRuntime,
};

use crate::image::{Block, Image};

/// What a request usually takes at most, in microseconds.
const QUICK_US: u64 = 200;

/// What happened at the disk; the place in the log is its sequence number.
#[derive(Clone, Debug)]
pub enum Event {
    /// A write was asked for.
    Write { id: u32, at: u64, blocks: Vec<Block>, stable: bool },
    /// A flush was asked for.
    Flush { id: u32 },
    /// The write or flush is done.
    Done { id: u32 },
    /// Something above the disk.
    Mark(Mark),
}

/// What a user of the filesystem did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// The operation with this number begins.
    Starts(usize),
    /// An `fsync`, `sync` or `O_SYNC` write returned: the stable point with this number.
    Stable(usize),
}

#[derive(Default)]
struct State {
    image: Image,
    log: Vec<Event>,
    next: u32,
    writes: u64,
    under_way: u64,
}

struct Shared {
    blocks: u64,
    /// Requests take time in this world, so that they overlap.
    world: Option<SimRuntime>,
    /// One request in eight takes up to so long.
    longest_us: AtomicU64,
    state: Mutex<State>,
}

/// The disk. Cloning gives another handle.
#[derive(Clone)]
pub struct Disk {
    shared: Arc<Shared>,
}

impl Disk {
    /// A disk that does everything at once.
    pub fn quick(image: Image, blocks: u64) -> Disk {
        Disk::new(image, blocks, None)
    }

    /// A disk whose requests take their time, each its own.
    pub fn slow(image: Image, blocks: u64, world: &SimRuntime) -> Disk {
        Disk::new(image, blocks, Some(world.clone()))
    }

    fn new(image: Image, blocks: u64, world: Option<SimRuntime>) -> Disk {
        let state = Mutex::new(State { image, ..State::default() });
        Disk { shared: Arc::new(Shared { blocks, world, longest_us: AtomicU64::new(QUICK_US), state }) }
    }

    pub fn device(&self) -> Arc<dyn Device> {
        Arc::new(self.clone())
    }

    /// From now on one request in eight takes up to so long.
    pub fn stall(&self, longest: Duration) {
        self.shared.longest_us.store(longest.as_micros() as u64, Relaxed);
    }

    /// How many requests are under way.
    pub fn under_way(&self) -> u64 {
        self.shared.state.lock().under_way
    }

    pub fn mark(&self, mark: Mark) {
        self.shared.state.lock().log.push(Event::Mark(mark));
    }

    /// What a reader finds now.
    pub fn image(&self) -> Image {
        self.shared.state.lock().image.clone()
    }

    /// How many writes were asked for.
    pub fn writes(&self) -> u64 {
        self.shared.state.lock().writes
    }

    /// The log since the last call.
    pub fn take_log(&self) -> Vec<Event> {
        std::mem::take(&mut self.shared.state.lock().log)
    }

    /// Carries a request out, now or after a while, and logs both ends.
    fn carry_out(
        &self,
        event: impl FnOnce(u32) -> Event,
        work: impl FnOnce(&mut Image) + Send + 'static,
    ) -> IoFuture<()> {
        let id = {
            let mut state = self.shared.state.lock();
            let id = state.next;
            state.next += 1;
            state.under_way += 1;
            state.log.push(event(id));
            id
        };
        let shared = self.shared.clone();
        let finish = move || {
            let mut state = shared.state.lock();
            work(&mut state.image);
            state.under_way -= 1;
            state.log.push(Event::Done { id });
        };
        let Some(world) = self.shared.world.clone() else {
            finish();
            return Box::pin(std::future::ready(Ok(())));
        };
        // A request goes on even where nobody waits for it.
        let (done, wait) = tokio::sync::oneshot::channel();
        let longest = self.shared.longest_us.load(Relaxed);
        let most = if world.random().is_multiple_of(8) { longest } else { QUICK_US };
        let time = Duration::from_micros(20 + world.random() % most);
        let timer = world.sleep(time);
        world.spawn(Box::pin(async move {
            timer.await;
            finish();
            let _ = done.send(());
        }));
        Box::pin(async move { wait.await.map_err(std::io::Error::other) })
    }
}

/// The bytes of a write, block by block.
fn gather(data: &[IoSlice]) -> Vec<Block> {
    let whole = |piece: &IoSlice| piece.bytes().len().is_multiple_of(BLOCK_SIZE);
    if data.iter().all(whole) {
        let blocks = data.iter().flat_map(|piece| piece.bytes().chunks_exact(BLOCK_SIZE));
        return blocks.map(block).collect();
    }
    let bytes: Vec<u8> = data.iter().flat_map(|piece| piece.bytes()).copied().collect();
    bytes.chunks_exact(BLOCK_SIZE).map(block).collect()
}

fn block(bytes: &[u8]) -> Block {
    Block::new(bytes.try_into().expect("a chunk is one block"))
}

impl Device for Disk {
    fn blocks(&self) -> u64 {
        self.shared.blocks
    }

    fn read(&self, at: BlockAddr, blocks: usize) -> IoFuture<AlignedBuf> {
        let mut buf = AlignedBuf::zeroed_blocks(blocks);
        let state = self.shared.state.lock();
        for (number, bytes) in (at.0..).zip(buf.chunks_exact_mut(BLOCK_SIZE)) {
            bytes.copy_from_slice(state.image.get(number).bytes());
        }
        drop(state);
        Box::pin(std::future::ready(Ok(buf)))
    }

    fn write(&self, at: BlockAddr, data: Vec<IoSlice>, durability: Durability) -> IoFuture<()> {
        let (blocks, stable) = (gather(&data), durability == Durability::Stable);
        assert!(at.0 + blocks.len() as u64 <= self.shared.blocks, "a write past the end of the disk");
        self.shared.state.lock().writes += 1;
        let landing = blocks.clone();
        self.carry_out(
            |id| Event::Write { id, at: at.0, blocks, stable },
            move |image| (at.0..).zip(landing).for_each(|(at, block)| image.put(at, block)),
        )
    }

    fn flush(&self) -> IoFuture<()> {
        self.carry_out(|id| Event::Flush { id }, |_| ())
    }
}
