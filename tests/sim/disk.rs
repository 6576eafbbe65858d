//! The shared disk, and each host's way to it: requests take time, are stalled, fail, and land although their host died.
//!
//! Always: a write that lands does so within [`WRITE_LIFE`] after it was submitted.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use storage_control::{
    AlignedBuf, BlockAddr, Device, Durability, Instant, IoFuture, IoSlice, MemDevice, NodeId, Runtime,
    SimRuntime,
};
use tokio::sync::oneshot;

use crate::host::Host;

/// D: so long a write can be on its way.
pub(crate) const WRITE_LIFE: Duration = Duration::from_secs(2);
/// A stalled request looks so often whether it may go on.
const LOOK_EVERY: Duration = Duration::from_millis(40);

/// Whom the disk does not answer.
#[derive(Default)]
pub(crate) struct Stalls {
    pub(crate) everybody: bool,
    pub(crate) hosts: BTreeSet<NodeId>,
    /// Counts power cuts: what was on its way then is lost.
    pub(crate) power_cuts: u64,
}

/// What a write is checked with when it lands: address and contents. The answer is what is wrong with it.
pub(crate) type Inspect = Arc<dyn Fn(BlockAddr, &[IoSlice]) + Send + Sync>;

/// The way of one host.
#[derive(Clone)]
pub(crate) struct Path {
    pub(crate) disk: MemDevice,
    pub(crate) world: SimRuntime,
    pub(crate) stalls: Arc<Mutex<Stalls>>,
    pub(crate) id: NodeId,
    pub(crate) host: Host,
    pub(crate) inspect: Arc<Mutex<Option<Inspect>>>,
}

impl Path {
    fn pause(&self) -> impl Future<Output = ()> + use<> {
        // Mostly fast; a few take long, so that later ones overtake them.
        let micros = match self.world.random() % 50 {
            0 => self.world.random() % 30_000,
            _ => self.world.random() % 300,
        };
        self.world.sleep(Duration::from_micros(micros))
    }

    fn is_stalled(&self) -> bool {
        let stalls = self.stalls.lock();
        stalls.everybody || stalls.hosts.contains(&self.id)
    }

    /// Waits until the disk answers this host. An error when the request has become too old.
    async fn admitted(&self, since: Instant) -> io::Result<()> {
        self.pause().await;
        loop {
            if self.world.now().since(since) + LOOK_EVERY > WRITE_LIFE {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            if !self.is_stalled() {
                return Ok(());
            }
            self.world.sleep(LOOK_EVERY).await;
        }
    }

    /// Carries a request out in a task of the world: it is on its way, whatever becomes of its host.
    fn request<T: Send + 'static>(
        &self,
        work: impl FnOnce(&MemDevice) -> IoFuture<T> + Send + 'static,
    ) -> IoFuture<T> {
        let (done, result) = oneshot::channel();
        let (path, since, power_cuts) = (self.clone(), self.world.now(), self.stalls.lock().power_cuts);
        self.world.spawn(Box::pin(async move {
            let carried_out = match path.admitted(since).await {
                // A dead host's request may have been lost on its way.
                Ok(()) if path.host.is_dead() && path.world.random().is_multiple_of(2) => {
                    Err(io::Error::from_raw_os_error(libc::EIO))
                }
                Ok(()) if path.stalls.lock().power_cuts != power_cuts => {
                    Err(io::Error::from_raw_os_error(libc::EIO))
                }
                Ok(()) => work(&path.disk).await,
                Err(error) => Err(error),
            };
            path.pause().await;
            let _ = done.send(carried_out);
        }));
        Box::pin(async move { result.await.unwrap_or_else(|_| Err(io::Error::from_raw_os_error(libc::EIO))) })
    }
}

impl Device for Path {
    fn blocks(&self) -> u64 {
        self.disk.blocks()
    }

    fn read(&self, at: BlockAddr, blocks: usize) -> IoFuture<AlignedBuf> {
        self.request(move |disk| disk.read(at, blocks))
    }

    fn write(&self, at: BlockAddr, data: Vec<IoSlice>, durability: Durability) -> IoFuture<()> {
        if let Some(inspect) = self.inspect.lock().clone() {
            inspect(at, &data);
        }
        self.request(move |disk| disk.write(at, data, durability))
    }

    fn flush(&self) -> IoFuture<()> {
        self.request(MemDevice::flush)
    }
}
