//! A device in memory, for tests: what is written and what would survive a power cut are kept apart.
//!
//! A read sees every completed write. After [`MemDevice::crash`] only stable writes are there, and of the
//! unflushed ones exactly the blocks the caller chose; a block is never torn (4 KiB are atomic).

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::buf::{AlignedBuf, IoSlice};
use crate::completion::completion;
use crate::device::{Device, Durability, IoFuture, Request, SubmitGuard, check_read, check_write, ready};
use crate::ids::{BLOCK_SIZE, BlockAddr};

type Block = Arc<[u8; BLOCK_SIZE]>;
type Blocks = HashMap<u64, Block>;

/// What the fault injector decides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Carry the request out.
    None,
    /// Do nothing and fail with this errno.
    Errno(i32),
    /// Write only the first so many blocks, then fail with EIO.
    Torn(usize),
    /// Keep the request back until [`MemDevice::release_held`]: a slow device, or a write that lands late.
    Hold,
}

/// A change of the device, in the order it happened.
#[derive(Clone, Debug)]
pub enum Recorded {
    /// Blocks written from `at` on.
    Write {
        /// First block.
        at: BlockAddr,
        /// The blocks' contents.
        blocks: Vec<Block>,
        /// Whether it was stable at once.
        durability: Durability,
    },
    /// Everything before is stable.
    Flush,
}

/// One block that was written and would not surely survive a power cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unflushed {
    /// Number of the write that the block belongs to, counted from 0 over the device's life.
    pub write: u64,
    /// The block.
    pub at: BlockAddr,
}

/// Contents of a device at one time.
#[derive(Clone, Debug)]
pub struct Image {
    blocks: u64,
    contents: Blocks,
}

type HeldWork = Box<dyn FnOnce(&Shared) + Send>;
/// Writes only the first so many blocks.
type Tear = Box<dyn FnOnce(&Shared, usize)>;
type Injector = Arc<dyn Fn(Request) -> Fault + Send + Sync>;

#[derive(Default)]
struct State {
    visible: Blocks,
    durable: Blocks,
    unflushed: Vec<(Unflushed, Block)>,
    writes: u64,
    recording: Option<Vec<Recorded>>,
}

struct Shared {
    blocks: u64,
    state: Mutex<State>,
    injector: Mutex<Option<Injector>>,
    held: Mutex<Vec<HeldWork>>,
    reads: AtomicU64,
}

/// The device. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct MemDevice {
    shared: Arc<Shared>,
    guard: Option<Arc<dyn SubmitGuard>>,
}

impl MemDevice {
    /// A device of zeros. Memory is used only for blocks that were written.
    pub fn new(blocks: u64) -> MemDevice {
        MemDevice::from_image(&Image { blocks, contents: Blocks::new() })
    }

    /// A device with these contents, all of them stable.
    pub fn from_image(image: &Image) -> MemDevice {
        let state =
            State { visible: image.contents.clone(), durable: image.contents.clone(), ..State::default() };
        MemDevice {
            shared: Arc::new(Shared {
                blocks: image.blocks,
                state: Mutex::new(state),
                injector: Mutex::new(None),
                held: Mutex::new(Vec::new()),
                reads: AtomicU64::new(0),
            }),
            guard: None,
        }
    }

    /// What a reader sees now.
    pub fn image(&self) -> Image {
        Image { blocks: self.shared.blocks, contents: self.shared.state.lock().visible.clone() }
    }

    /// What would surely survive a power cut now.
    pub fn durable_image(&self) -> Image {
        Image { blocks: self.shared.blocks, contents: self.shared.state.lock().durable.clone() }
    }

    /// Blocks that were written but not flushed, oldest first.
    pub fn unflushed(&self) -> Vec<Unflushed> {
        self.shared.state.lock().unflushed.iter().map(|(which, _)| *which).collect()
    }

    /// Cuts the power: of the unflushed blocks those survive that `keep` chooses (asked oldest first, so a
    /// later kept one wins).
    pub fn crash(&self, mut keep: impl FnMut(Unflushed) -> bool) {
        let mut state = self.shared.state.lock();
        for (which, block) in std::mem::take(&mut state.unflushed) {
            if keep(which) {
                state.durable.insert(which.at.0, block);
            }
        }
        state.visible = state.durable.clone();
    }

    /// Asks `injector` about every later request.
    pub fn inject(&self, injector: impl Fn(Request) -> Fault + Send + Sync + 'static) {
        *self.shared.injector.lock() = Some(Arc::new(injector));
    }

    /// Ends the injection of faults. Held requests stay held.
    pub fn inject_nothing(&self) {
        *self.shared.injector.lock() = None;
    }

    /// How many requests are kept back by [`Fault::Hold`].
    pub fn held(&self) -> usize {
        self.shared.held.lock().len()
    }

    /// Carries out all requests that were kept back.
    pub fn release_held(&self) {
        let held = std::mem::take(&mut *self.shared.held.lock());
        held.into_iter().for_each(|work| work(&self.shared));
    }

    /// Forgets all requests that were kept back: they fail, and never land.
    pub fn drop_held(&self) {
        self.shared.held.lock().clear();
    }

    /// Starts recording changes.
    pub fn record(&self) {
        self.shared.state.lock().recording = Some(Vec::new());
    }

    /// The changes since [`MemDevice::record`] or the last call; recording goes on.
    pub fn take_recorded(&self) -> Vec<Recorded> {
        self.shared.state.lock().recording.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Applies a recorded change.
    pub fn apply(&self, change: &Recorded) {
        match change {
            Recorded::Write { at, blocks, durability } => self.shared.write(*at, blocks.clone(), *durability),
            Recorded::Flush => self.shared.flush(),
        }
    }

    /// How many reads were carried out.
    pub fn reads(&self) -> u64 {
        self.shared.reads.load(Ordering::Relaxed)
    }

    /// How many writes were carried out.
    pub fn writes(&self) -> u64 {
        self.shared.state.lock().writes
    }

    /// Reads at once, past the fault injector.
    ///
    /// # Panics
    /// Where the blocks are not inside the device.
    pub fn peek(&self, at: BlockAddr, blocks: usize) -> AlignedBuf {
        check_read(self.shared.blocks, at, blocks).expect("a test peeks inside the device");
        self.shared.read(at, blocks)
    }

    /// Changes bytes at once and for good, as a fault of the medium would.
    ///
    /// # Panics
    /// Where the block is not inside the device.
    pub fn poke(&self, at: BlockAddr, change: impl FnOnce(&mut [u8; BLOCK_SIZE])) {
        check_read(self.shared.blocks, at, 1).expect("a test pokes inside the device");
        let mut state = self.shared.state.lock();
        let mut block = state.visible.get(&at.0).map_or([0; BLOCK_SIZE], |block| **block);
        change(&mut block);
        let block = Arc::new(block);
        state.visible.insert(at.0, Arc::clone(&block));
        state.durable.insert(at.0, block);
        state.unflushed.retain(|(which, _)| which.at != at);
    }

    fn fault(&self, request: Request) -> Fault {
        let injector = self.shared.injector.lock().clone();
        injector.map_or(Fault::None, |injector| injector(request))
    }

    /// Carries a request out, fails it or keeps it back, as the guard and the fault injector say. A held
    /// request was admitted already: it stands for a write that the device has accepted.
    fn request<T: Send + 'static>(
        &self,
        request: Request,
        tear: Option<Tear>,
        work: impl FnOnce(&Shared) -> T + Send + 'static,
    ) -> IoFuture<T> {
        if let Some(guard) = &self.guard
            && let Err(error) = guard.admit(request)
        {
            return ready(Err(error));
        }
        let finished = Finished(self.guard.clone());
        match self.fault(request) {
            Fault::None => ready(Ok(work(&self.shared))),
            Fault::Errno(errno) => ready(Err(io::Error::from_raw_os_error(errno))),
            Fault::Torn(landed) => {
                if let Some(tear) = tear {
                    tear(&self.shared, landed);
                }
                ready(Err(io::Error::from_raw_os_error(libc::EIO)))
            }
            Fault::Hold => {
                let (completer, completion) = completion();
                let work = move |shared: &Shared| {
                    let result = work(shared);
                    drop(finished);
                    completer.complete(Ok(result));
                };
                self.shared.held.lock().push(Box::new(work));
                Box::pin(completion)
            }
        }
    }
}

/// Tells the guard that an admitted request is over.
struct Finished(Option<Arc<dyn SubmitGuard>>);

impl Drop for Finished {
    fn drop(&mut self) {
        if let Some(guard) = &self.0 {
            guard.finished();
        }
    }
}

impl Shared {
    fn read(&self, at: BlockAddr, blocks: usize) -> AlignedBuf {
        let mut buf = AlignedBuf::zeroed_blocks(blocks);
        let state = self.state.lock();
        for (number, bytes) in (at.0..).zip(buf.chunks_exact_mut(BLOCK_SIZE)) {
            if let Some(block) = state.visible.get(&number) {
                bytes.copy_from_slice(&**block);
            }
        }
        drop(state);
        self.reads.fetch_add(1, Ordering::Relaxed);
        buf
    }

    fn write(&self, at: BlockAddr, blocks: Vec<Block>, durability: Durability) {
        let mut state = self.state.lock();
        let write = state.writes;
        state.writes += 1;
        for (number, block) in (at.0..).zip(&blocks) {
            state.visible.insert(number, Arc::clone(block));
            match durability {
                Durability::Cached => {
                    let which = Unflushed { write, at: BlockAddr(number) };
                    state.unflushed.push((which, Arc::clone(block)));
                }
                Durability::Stable => {
                    state.unflushed.retain(|(which, _)| which.at.0 != number);
                    state.durable.insert(number, Arc::clone(block));
                }
            }
        }
        if let Some(recording) = &mut state.recording {
            recording.push(Recorded::Write { at, blocks, durability });
        }
    }

    fn flush(&self) {
        let mut state = self.state.lock();
        for (which, block) in std::mem::take(&mut state.unflushed) {
            state.durable.insert(which.at.0, block);
        }
        if let Some(recording) = &mut state.recording {
            recording.push(Recorded::Flush);
        }
    }
}

fn gather(data: &[IoSlice]) -> Vec<Block> {
    let bytes: Vec<u8> = data.iter().flat_map(|piece| piece.bytes()).copied().collect();
    let blocks = bytes.chunks_exact(BLOCK_SIZE);
    blocks.map(|bytes| Arc::new(bytes.try_into().expect("a chunk is one block"))).collect()
}

impl Device for MemDevice {
    fn blocks(&self) -> u64 {
        self.shared.blocks
    }

    fn read(&self, at: BlockAddr, blocks: usize) -> IoFuture<AlignedBuf> {
        if let Err(error) = check_read(self.shared.blocks, at, blocks) {
            return ready(Err(error));
        }
        self.request(Request::Read(at, blocks), None, move |shared| shared.read(at, blocks))
    }

    fn write(&self, at: BlockAddr, data: Vec<IoSlice>, durability: Durability) -> IoFuture<()> {
        let blocks = match check_write(self.shared.blocks, at, &data) {
            Ok(blocks) => blocks,
            Err(error) => return ready(Err(error)),
        };
        let contents = gather(&data);
        let torn = contents.clone();
        let tear = move |shared: &Shared, landed| {
            shared.write(at, torn.into_iter().take(landed).collect(), durability);
        };
        self.request(Request::Write(at, blocks, durability), Some(Box::new(tear)), move |shared| {
            shared.write(at, contents, durability);
        })
    }

    fn flush(&self) -> IoFuture<()> {
        self.request(Request::Flush, None, Shared::flush)
    }

    fn guarded(&self, guard: &Arc<dyn SubmitGuard>) -> Option<Arc<dyn Device>> {
        Some(Arc::new(MemDevice { guard: Some(Arc::clone(guard)), ..self.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::block_on;

    fn filled(byte: u8) -> Vec<IoSlice> {
        vec![AlignedBuf::copy_of(&[byte; BLOCK_SIZE]).into()]
    }

    fn write(device: &MemDevice, at: u64, byte: u8, durability: Durability) {
        block_on(device.write(BlockAddr(at), filled(byte), durability)).unwrap();
    }

    #[test]
    fn a_crash_loses_what_was_neither_stable_nor_kept() {
        let device = MemDevice::new(8);
        write(&device, 1, 1, Durability::Stable);
        write(&device, 2, 2, Durability::Cached);
        write(&device, 3, 3, Durability::Cached);
        assert_eq!(device.unflushed().len(), 2);
        device.crash(|block| block.at == BlockAddr(3));
        let first = |at| device.peek(BlockAddr(at), 1)[0];
        assert_eq!([first(1), first(2), first(3)], [1, 0, 3]);
    }

    #[test]
    fn a_flush_makes_earlier_writes_survive() {
        let device = MemDevice::new(8);
        write(&device, 2, 2, Durability::Cached);
        block_on(device.flush()).unwrap();
        device.crash(|_| false);
        assert_eq!(device.peek(BlockAddr(2), 1)[0], 2);
    }

    #[test]
    fn a_stable_write_supersedes_an_unflushed_one_of_the_same_block() {
        let device = MemDevice::new(8);
        write(&device, 2, 1, Durability::Cached);
        write(&device, 2, 2, Durability::Stable);
        device.crash(|_| true);
        assert_eq!(device.peek(BlockAddr(2), 1)[0], 2);
    }

    #[test]
    fn a_held_write_lands_when_it_is_released() {
        let device = MemDevice::new(8);
        device
            .inject(|request| if matches!(request, Request::Write(..)) { Fault::Hold } else { Fault::None });
        let late = device.write(BlockAddr(1), filled(9), Durability::Stable);
        assert_eq!((device.held(), device.peek(BlockAddr(1), 1)[0]), (1, 0));
        device.release_held();
        block_on(late).unwrap();
        assert_eq!(device.peek(BlockAddr(1), 1)[0], 9);
    }

    #[test]
    fn a_torn_write_leaves_its_first_blocks_and_fails() {
        let device = MemDevice::new(8);
        device.inject(|_| Fault::Torn(1));
        let two = vec![AlignedBuf::copy_of(&[5; 2 * BLOCK_SIZE]).into()];
        let error = block_on(device.write(BlockAddr(1), two, Durability::Stable)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert_eq!((device.peek(BlockAddr(1), 1)[0], device.peek(BlockAddr(2), 1)[0]), (5, 0));
    }

    #[test]
    fn recorded_changes_rebuild_the_device() {
        let device = MemDevice::new(8);
        device.record();
        write(&device, 1, 1, Durability::Cached);
        block_on(device.flush()).unwrap();
        let copy = MemDevice::new(8);
        device.take_recorded().iter().for_each(|change| copy.apply(change));
        assert_eq!(copy.peek(BlockAddr(0), 8), device.peek(BlockAddr(0), 8));
        assert!(copy.unflushed().is_empty());
    }
}
