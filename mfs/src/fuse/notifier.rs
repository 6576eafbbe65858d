//! Invalidation of the kernel's caches, from threads that answer no request.
//!
//! Invalidating pages waits for every READ of the inode that is not answered yet. Nothing that answers reads
//! waits for these threads, except callouts of the same inode while its lock still lets reads in.

use std::sync::{Arc, OnceLock};

use crossbeam::channel::{self, Receiver, Sender};
use fuser::Notifier;
use parking_lot::Mutex;
use storage_control::BoxFuture;
use tokio::sync::oneshot;

use super::convert::Numbers;
use crate::callouts::KernelCache;
use crate::ops::Ino;

/// Threads at most; one more is started whenever all are waiting in the kernel.
const MAX_THREADS: usize = 64;

/// Tells the kernel what it may no longer keep. Before the mount is there, the kernel keeps nothing.
pub struct FuseCache {
    numbers: Numbers,
    notifier: Arc<OnceLock<Notifier>>,
    jobs: Sender<Job>,
    queue: Receiver<Job>,
    pool: Arc<Mutex<Pool>>,
}

struct Job {
    ino: Ino,
    what: What,
    done: oneshot::Sender<()>,
}

#[derive(Clone, Copy)]
enum What {
    Attributes,
    Pages,
}

#[derive(Default)]
struct Pool {
    threads: usize,
    idle: usize,
}

impl FuseCache {
    /// A cache interface whose kernel side is named later, when it is mounted.
    pub fn new(root: Ino) -> Self {
        let (jobs, queue) = channel::unbounded();
        Self { numbers: Numbers { root }, notifier: Arc::default(), jobs, queue, pool: Arc::default() }
    }

    pub(super) fn connect(&self, notifier: Notifier) {
        // A second mount of one filesystem would have caches that nobody invalidates.
        assert!(self.notifier.set(notifier).is_ok(), "one kernel mount per mounted filesystem");
    }

    fn enqueue(&self, ino: Ino, what: What) -> BoxFuture<()> {
        let (done, wait) = oneshot::channel();
        if self.notifier.get().is_none() {
            return Box::pin(async {});
        }
        // The pool's threads end when `jobs` goes, so the queue is there.
        let _ = self.jobs.send(Job { ino, what, done });
        let mut pool = self.pool.lock();
        if pool.idle < self.jobs.len() && pool.threads < MAX_THREADS {
            self.start_thread(&mut pool);
        }
        Box::pin(async move {
            let _ = wait.await;
        })
    }

    fn start_thread(&self, pool: &mut Pool) {
        let (queue, notifier, numbers) = (self.queue.clone(), self.notifier.clone(), self.numbers);
        let shared = self.pool.clone();
        let spawned = std::thread::Builder::new().name("mfs-notify".into()).spawn(move || {
            while let Ok(job) = queue.recv() {
                shared.lock().idle -= 1;
                if let Some(notifier) = notifier.get() {
                    let ino = numbers.theirs(job.ino);
                    let result = match job.what {
                        What::Attributes => notifier.inval_inode(ino, -1, 0),
                        What::Pages => notifier.inval_inode(ino, 0, 0),
                    };
                    // The kernel refuses only when the mount is going: its caches go with it.
                    if let Err(error) = result {
                        tracing::debug!(%error, ino = job.ino.0, "invalidation refused");
                    }
                }
                let _ = job.done.send(());
                shared.lock().idle += 1;
            }
        });
        match spawned {
            Ok(_) => {
                pool.threads += 1;
                pool.idle += 1;
            }
            Err(error) if pool.threads == 0 => panic!("no thread for invalidations: {error}"),
            Err(error) => tracing::warn!(%error, "no further thread for invalidations"),
        }
    }
}

impl KernelCache for FuseCache {
    fn invalidate_attributes(&self, ino: Ino) -> BoxFuture<()> {
        self.enqueue(ino, What::Attributes)
    }

    fn invalidate_pages(&self, ino: Ino) -> BoxFuture<()> {
        self.enqueue(ino, What::Pages)
    }
}
