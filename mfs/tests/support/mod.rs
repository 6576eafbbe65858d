//! A filesystem on a device in memory, in a simulated world: one thread, one seed.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

pub mod access;
pub mod cluster;
pub mod model;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use cluster::{Cluster, Node};
use lcl::Lcl;
use mfs::callouts::NoKernelCache;
use mfs::format::superblock::Superblock;
use mfs::fsck;
use mfs::ops::{Attr, Caller, Handle, Ino, Operations, Result, SetAttr, Write};
use mfs::{Filesystem, FsError, Options, Parts, journal, mkfs};
use storage_control::{
    BlockAddr, BoxFuture, Clock, Device, LamportClock, MemDevice, Runtime, SimRuntime, WallTime,
};
use tokio::sync::oneshot;

/// The user of all tests.
pub const ME: Caller = Caller { uid: 1000, gid: 100 };
const FS_START: BlockAddr = BlockAddr(1040);

/// A device with a filesystem, and the world it lives in.
#[derive(Clone)]
pub struct Bed {
    pub device: MemDevice,
    pub runtime: SimRuntime,
    pub clock: Arc<LamportClock>,
}

/// Which seeds a test tries: `SEED=n` that one, `MFS_SEEDS=n` the first n instead of a few.
pub fn seeds(few: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|n| n.parse().ok());
    match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("MFS_SEEDS").unwrap_or(few),
    }
}

/// Runs a test in a world of its own.
pub fn run<F: Future<Output = ()> + Send + 'static>(seed: u64, blocks: u64, test: impl FnOnce(Bed) -> F) {
    run_with_journals(seed, blocks, 1, test);
}

/// The same with that many journals, for as many nodes.
pub fn run_with_journals<F: Future<Output = ()> + Send + 'static>(
    seed: u64,
    blocks: u64,
    journals: u16,
    test: impl FnOnce(Bed) -> F,
) {
    let runtime = SimRuntime::new(seed);
    let bed = Bed {
        device: MemDevice::new(blocks),
        runtime: runtime.clone(),
        clock: Arc::new(LamportClock::new(Clock(1))),
    };
    let test = test(bed.clone());
    runtime.run(async move {
        bed.mkfs(blocks, journals).await;
        test.await;
    });
}

/// The same with that many nodes, all mounted, on 128 MiB.
pub fn on_nodes<F: Future<Output = ()> + Send + 'static>(
    seed: u64,
    count: u16,
    test: impl FnOnce(Bed, Cluster, Vec<Node>) -> F + Send + 'static,
) {
    run_with_journals(seed, 2 * 16_384, count, move |bed| async move {
        let (cluster, nodes) = Cluster::start(&bed, count).await;
        test(bed, cluster, nodes).await;
    });
}

impl Bed {
    /// Runs something beside the caller, who may wait for it later.
    pub fn join<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> BoxFuture<T> {
        let (done, result) = oneshot::channel();
        self.runtime.spawn(Box::pin(async move {
            let _ = done.send(task.await);
        }));
        Box::pin(async move { result.await.expect("a task ends") })
    }

    pub fn shared(&self) -> Arc<dyn Device> {
        Arc::new(self.device.clone())
    }

    fn shared_runtime(&self) -> Arc<dyn Runtime> {
        Arc::new(self.runtime.clone())
    }

    async fn mkfs(&self, blocks: u64, journals: u16) {
        let options = mkfs::Options {
            blocks,
            fs_start: FS_START,
            label: "test".into(),
            uuid: [1; 16],
            secret: [7; 16],
            now: WallTime { secs: 1_700_000_000, nanos: 0 },
            journals: Some(journals),
            group_blocks: None,
        };
        mkfs::mkfs(&self.shared(), &options, |_, _| {}).await.unwrap();
    }

    pub async fn superblock(&self) -> Superblock {
        Superblock::read(&*self.shared(), FS_START).await.unwrap().0
    }

    /// Replays the journal and mounts.
    pub async fn mount(&self) -> Arc<Filesystem> {
        self.mount_with(Options::default()).await
    }

    pub async fn mount_with(&self, options: Options) -> Arc<Filesystem> {
        let superblock = self.superblock().await;
        let report = journal::replay(&self.shared(), &superblock, 0, &self.shared_runtime()).await.unwrap();
        self.clock.receive(report.clock).unwrap();
        let parts = Parts {
            device: self.shared(),
            superblock,
            journal: 0,
            lcl: Lcl::solo(self.shared_runtime()),
            clock: self.clock.clone(),
            runtime: self.shared_runtime(),
            kernel: Arc::new(NoKernelCache),
            lease: Arc::new(|| Duration::from_secs(1)),
        };
        let fs = Filesystem::mount(parts, options).await.unwrap();
        // There are no other journals.
        fs.store().set_peer_tail(Clock(u64::MAX >> 2));
        fs
    }

    /// The check after every test: nothing is found.
    pub async fn fsck(&self) {
        let options = fsck::Options { replay: Some(self.shared_runtime()), ..fsck::Options::default() };
        let report = fsck::check_at(self.shared(), FS_START, options).await;
        assert!(report.is_clean(), "{report:#?}");
    }

    pub async fn unmount_and_check(&self, fs: Arc<Filesystem>) {
        fs.unmount().await.unwrap();
        drop(fs);
        self.fsck().await;
    }

    pub async fn sleep(&self, secs: u64) {
        self.runtime.sleep(Duration::from_secs(secs)).await;
    }
}

/// The errno of a failure.
#[track_caller]
pub fn errno<T: std::fmt::Debug>(result: Result<T>) -> i32 {
    match result {
        Err(error) => error.errno(),
        Ok(value) => panic!("it worked: {value:?}"),
    }
}

/// Shorter forms for tests.
pub trait Short: Operations {
    fn file(&self, dir: Ino, name: &str) -> impl Future<Output = (Attr, Handle)> + Send {
        async move {
            let (attr, opened) =
                self.create(ME, dir, name.as_bytes(), 0o644, libc::O_RDWR | libc::O_EXCL).await.unwrap();
            (attr, opened.handle)
        }
    }

    fn put(&self, handle: Handle, offset: u64, data: &[u8]) -> impl Future<Output = Result<usize>> + Send {
        let data = data.to_vec();
        self.write(handle, Write { offset, data, append: false, kill_suid: false, sync: false })
    }

    fn append(&self, handle: Handle, data: &[u8]) -> impl Future<Output = Result<usize>> + Send {
        let data = data.to_vec();
        self.write(handle, Write { offset: 0, data, append: true, kill_suid: false, sync: false })
    }

    fn get(&self, handle: Handle, offset: u64, len: usize) -> impl Future<Output = Vec<u8>> + Send {
        async move { self.read(handle, offset, len).await.unwrap().to_vec() }
    }

    fn whole(&self, ino: Ino) -> impl Future<Output = Vec<u8>> + Send {
        async move {
            let handle = self.open(ino, libc::O_RDONLY).await.unwrap().handle;
            let size = self.getattr(ino).await.unwrap().attr.size;
            let mut all = Vec::new();
            while (all.len() as u64) < size {
                let part = self.get(handle, all.len() as u64, 100_000).await;
                assert!(!part.is_empty(), "the file ends at {} of {size} bytes", all.len());
                all.extend_from_slice(&part);
            }
            self.release(handle).await.unwrap();
            all
        }
    }

    fn resize(&self, ino: Ino, size: u64) -> impl Future<Output = Result<()>> + Send {
        async move {
            self.setattr(ino, SetAttr { size: Some(size), ..SetAttr::default() }).await.map(|fresh| {
                assert_eq!(fresh.attr.size, size);
            })
        }
    }

    fn dir(&self, parent: Ino, name: &str) -> impl Future<Output = Ino> + Send {
        async move { self.mkdir(ME, parent, name.as_bytes(), 0o755).await.unwrap().ino }
    }

    fn names(&self, dir: Ino) -> impl Future<Output = Vec<String>> + Send {
        async move {
            let handle = self.opendir(dir).await.unwrap();
            let (mut names, mut from) = (Vec::new(), 0);
            loop {
                let part = self.readdir(handle, from, 7).await.unwrap();
                let Some(last) = part.last() else { break };
                from = last.next;
                names.extend(part.into_iter().map(|e| String::from_utf8(e.name).unwrap()));
            }
            self.releasedir(handle).await.unwrap();
            names.sort();
            names
        }
    }
}

impl<O: Operations> Short for O {}

/// Bytes that tell where they belong.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (i.wrapping_mul(31).wrapping_add(i >> 8).wrapping_add(seed * 7) % 251) as u8)
        .collect()
}

/// Errors by name, for what tests compare.
pub fn is_no_space(error: &FsError) -> bool {
    matches!(error, FsError::NoSpace)
}
