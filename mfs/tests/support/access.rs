//! A node's way to the shared device: every request takes its time, fails as the test wants, and none arrives after
//! the node's death.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use parking_lot::Mutex;
use storage_control::mem_device::Fault;
use storage_control::{
    AlignedBuf, BlockAddr, Device, Durability, IoFuture, IoSlice, MemDevice, Request, Runtime, SimRuntime,
};
use tokio::sync::{oneshot, watch};

type Injector = Box<dyn Fn(Request) -> Fault + Send>;

/// Half of what a request takes at most.
const HALF_US: u64 = 100;

struct Shared {
    device: MemDevice,
    runtime: SimRuntime,
    dead: AtomicBool,
    injector: Mutex<Option<Injector>>,
    /// Whether requests held back may go on.
    open: watch::Sender<bool>,
    writes: AtomicU64,
}

/// The access. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct Access(Arc<Shared>);

impl Access {
    pub fn new(device: MemDevice, runtime: SimRuntime) -> Self {
        Self(Arc::new(Shared {
            device,
            runtime,
            dead: AtomicBool::new(false),
            injector: Mutex::new(None),
            open: watch::Sender::new(true),
            writes: AtomicU64::new(0),
        }))
    }

    /// The node is dead: nothing reaches the device any more.
    pub fn cut(&self) {
        self.0.dead.store(true, SeqCst);
    }

    /// Asks `injector` about every later request of this node. `Fault::Hold` keeps it back until `release`.
    pub fn inject(&self, injector: impl Fn(Request) -> Fault + Send + 'static) {
        self.0.open.send_replace(false);
        *self.0.injector.lock() = Some(Box::new(injector));
    }

    /// Ends the injection of faults and lets go what was held back.
    pub fn release(&self) {
        *self.0.injector.lock() = None;
        self.0.open.send_replace(true);
    }

    /// Writes that were begun.
    pub fn writes(&self) -> u64 {
        self.0.writes.load(SeqCst)
    }

    /// Carries a request out in a task of its own: one that was begun goes on whoever still waits.
    fn request<T: Send + 'static>(
        &self,
        request: Request,
        work: impl FnOnce(&MemDevice) -> IoFuture<T> + Send + 'static,
    ) -> IoFuture<T> {
        let fault = self.0.injector.lock().as_ref().map_or(Fault::None, |injector| injector(request));
        if let Request::Write(..) = request {
            self.0.writes.fetch_add(1, SeqCst);
        }
        let (done, result) = oneshot::channel();
        let shared = self.0.clone();
        self.0.runtime.spawn(Box::pin(async move {
            let _ = done.send(shared.carry_out(fault, work).await);
        }));
        Box::pin(async move { result.await.expect("a request ends") })
    }
}

impl Shared {
    async fn carry_out<T>(
        &self,
        fault: Fault,
        work: impl FnOnce(&MemDevice) -> IoFuture<T>,
    ) -> io::Result<T> {
        self.half().await;
        match fault {
            Fault::None => {}
            Fault::Errno(errno) => return Err(io::Error::from_raw_os_error(errno)),
            Fault::Hold => drop(self.open.subscribe().wait_for(|open| *open).await),
            Fault::Torn(_) => unreachable!("no test of several nodes tears writes"),
        }
        if self.dead.load(SeqCst) {
            return Err(io::Error::other("the node is dead"));
        }
        let result = work(&self.device).await;
        self.half().await;
        result
    }

    fn half(&self) -> impl Future<Output = ()> + use<> {
        self.runtime.sleep(Duration::from_micros(self.runtime.random() % HALF_US))
    }
}

impl Device for Access {
    fn blocks(&self) -> u64 {
        self.0.device.blocks()
    }

    fn read(&self, at: BlockAddr, blocks: usize) -> IoFuture<AlignedBuf> {
        self.request(Request::Read(at, blocks), move |device| device.read(at, blocks))
    }

    fn write(&self, at: BlockAddr, data: Vec<IoSlice>, durability: Durability) -> IoFuture<()> {
        let blocks = data.iter().map(|piece| piece.len).sum::<usize>() / storage_control::BLOCK_SIZE;
        self.request(Request::Write(at, blocks, durability), move |device| device.write(at, data, durability))
    }

    fn flush(&self) -> IoFuture<()> {
        self.request(Request::Flush, MemDevice::flush)
    }
}
