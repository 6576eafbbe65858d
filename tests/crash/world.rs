//! A small filesystem to start from, mounts of it, and the recording of a workload.

use std::future::Future;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use lcl::Lcl;
use mfs::callouts::NoKernelCache;
use mfs::format::superblock::Superblock;
use mfs::ops::Operations;
use mfs::{Filesystem, FsError, Options, Parts, journal, mkfs};
use storage_control::{BlockAddr, Clock, Device, LamportClock, Runtime, SimRuntime, WallTime};

use crate::history::{History, Id};
use crate::image::{Image, seed_of};
use crate::record::Disk;
use crate::replay::Log;
use crate::user::{User, Wrong, pattern};
use crate::workload::Workload;

/// 64 MiB.
pub const BLOCKS: u64 = 16_384;
pub const FS_START: BlockAddr = BlockAddr(1040);
/// One for each node that may be there.
pub const JOURNALS: u16 = 4;
/// Names in the second directory that nobody touches: they make a tree of it.
const FILLERS: usize = 24;
/// Blocks that users can still have where there is little room.
const LITTLE_ROOM: u64 = 40;
/// Longer than anything that a filesystem which is gone still waits for.
const LONGEST_TIMER: Duration = Duration::from_secs(3);

/// Runs a future in a world of its own, and what it leaves behind. A panic is wrong too.
pub fn run<T, F>(seed: u64, work: impl FnOnce(SimRuntime) -> F) -> Result<T, Wrong>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Wrong>> + Send + 'static,
{
    let world = SimRuntime::new(seed);
    let work = work(world.clone());
    let result = catch_unwind(AssertUnwindSafe(|| {
        let result = world.run(work);
        world.advance(LONGEST_TIMER);
        result
    }));
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panic: {}", text.unwrap_or("of unknown reason")))
    })
}

/// Replays these journals, whoever's they were; the clock of whoever mounts next.
pub async fn replay(
    device: &Arc<dyn Device>,
    world: &SimRuntime,
    journals: &[u16],
) -> Result<Arc<LamportClock>, FsError> {
    let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
    let (superblock, _) = Superblock::read(&**device, FS_START).await?;
    let clock = Arc::new(LamportClock::new(Clock(1)));
    for journal in journals {
        let report = journal::replay(device, &superblock, *journal, &runtime).await?;
        clock.receive(report.clock).map_err(|error| std::io::Error::other(error.to_string()))?;
    }
    Ok(clock)
}

/// Mounts as the only node; no journal is in use.
pub async fn mount(disk: &Disk, world: &SimRuntime, journal: u16) -> Result<Arc<Filesystem>, FsError> {
    mount_through(disk.device(), world, journal).await
}

/// The same through what stands before the disk.
pub async fn mount_through(
    device: Arc<dyn Device>,
    world: &SimRuntime,
    journal: u16,
) -> Result<Arc<Filesystem>, FsError> {
    let all: Vec<u16> = (0..JOURNALS).collect();
    let clock = replay(&device, world, &all).await?;
    let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
    let (superblock, _) = Superblock::read(&*device, FS_START).await?;
    let parts = Parts {
        device,
        superblock,
        journal,
        lcl: Lcl::solo(runtime.clone()),
        clock,
        runtime,
        kernel: Arc::new(NoKernelCache),
        lease: Arc::new(|| Duration::from_secs(1)),
    };
    let fs = Filesystem::mount(parts, Options::default()).await?;
    fs.store().set_peer_tail(Clock(u64::MAX >> 2));
    Ok(fs)
}

/// How much room a base has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Room {
    Much,
    Little,
}

/// A filesystem with something of everything, unmounted, and the history that begins with it.
#[derive(Clone)]
pub struct Base {
    pub image: Image,
    pub history: History,
    pub dirs: [Id; 2],
    /// The blocks of each journal.
    pub journals: Vec<Range<u64>>,
}

impl Base {
    /// With much room, or with little: then what was freed is soon used again, as something else.
    pub fn make(room: Room) -> Base {
        let made = run(1, move |world| async move {
            let disk = Disk::quick(Image::default(), BLOCKS);
            let options = mkfs::Options {
                blocks: BLOCKS,
                fs_start: FS_START,
                label: "crash".into(),
                uuid: [1; 16],
                secret: [7; 16],
                now: WallTime { secs: 1_700_000_000, nanos: 0 },
                journals: Some(JOURNALS),
                group_blocks: None,
            };
            let made = mkfs::mkfs(&disk.device(), &options, |_, _| {}).await;
            let superblock = made.map_err(|error| error.to_string())?;
            let blocks = u64::from(superblock.journal_blocks);
            let journals = superblock.journals.iter().flatten();
            let journals = journals.map(|start| start.0..start.0 + blocks).collect();
            let fs = mount(&disk, &world, 0).await.map_err(|error| error.to_string())?;
            let mut user = fill(fs, &world).await?;
            if room == Room::Little {
                let failed = |error: FsError| error.to_string();
                while user.fs.statfs().await.map_err(failed)?.available > LITTLE_ROOM {
                    let free = user.fs.statfs().await.map_err(failed)?.available - LITTLE_ROOM;
                    user.add_ballast(free.min(4096)).await?;
                }
            }
            user.unmount().await?;
            Ok(Base { image: disk.image(), history: user.history.begin_here(), dirs: user.dirs, journals })
        });
        made.expect("a filesystem is made and filled")
    }
}

/// Gives the eight names something to stand for: small and large files, one with two names, one with holes, an
/// empty directory and one that is not, extended attributes inside and outside of the dinode.
pub async fn fill(fs: Arc<Filesystem>, world: &SimRuntime) -> Result<User, Wrong> {
    let root = fs.getattr(fs.root()).await.map_err(|error| error.to_string())?.attr;
    let root = (root.ino.0, root.generation);
    let mut user = User::new(fs, History::new(root), [root; 2], world, |_| ());
    for (n, name) in ["a", "b"].into_iter().enumerate() {
        user.dirs[n] = user.mkdir(root, name).await?.expect("the name is new");
    }
    let [a, b] = user.dirs;
    let small = user.create(a, "n0").await?.expect("the name is new");
    user.write(small, 0, &pattern(1, 900), false, false).await?;
    user.set_xattr(small, pattern(2, 50)).await?;
    let large = user.create(a, "n1").await?.expect("the name is new");
    user.write(large, 0, &pattern(3, 14_000), false, false).await?;
    user.set_xattr(large, pattern(4, 5000)).await?;
    user.mkdir(a, "n2").await?;
    user.link(large, b, "n0").await?;
    let sparse = user.create(b, "n1").await?.expect("the name is new");
    user.write(sparse, 0, &pattern(5, 8192), false, false).await?;
    user.write(sparse, 40_000, &pattern(6, 5000), false, false).await?;
    let full = user.mkdir(b, "n2").await?.expect("the name is new");
    user.create(full, "inside").await?;
    for n in 0..FILLERS {
        user.link(small, b, &format!("{n:0>180}")).await?;
    }
    Ok(user)
}

/// What a workload did to a disk.
pub struct Recording {
    pub log: Log,
    pub history: History,
}

/// Carries a workload out on a disk whose requests overlap.
pub fn record(base: &Base, workload: &Workload, seed: u64) -> Result<Recording, Wrong> {
    let (from, workload) = (base.clone(), workload.clone());
    run(seed_of(&workload.name, seed), |world| async move {
        let disk = Disk::slow(from.image.clone(), BLOCKS, &world);
        let fs = mount(&disk, &world, 0).await.map_err(|error| error.to_string())?;
        let marks = disk.clone();
        let mut user = User::new(fs, from.history, from.dirs, &world, move |mark| marks.mark(mark));
        for step in &workload.steps {
            user.step(step).await?;
        }
        world.sleep(Duration::from_secs(workload.wait.into())).await;
        user.unmount().await?;
        let log = Log { base: from.image, events: disk.take_log() };
        log.in_order().map_err(|at| format!("two writes of block {at} were under way at once"))?;
        Ok(Recording { log, history: user.history })
    })
}
