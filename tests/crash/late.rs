//! Writes of a node that others take for dead, and that is not quite.
//!
//! - The gate refuses what is submitted after the lease. What the disk had accepted before may land for as long as a
//!   write can live (D). Nobody recovers before both are over, counted by the slower of two clocks:
//!   (L + W)(1 + drift) + D after the last renewal, [`LeaseTimes::full_wait`]. [`outlive`] holds that.
//! - Nothing else protects: a write in place that arrived after that would do damage. [`arrive_late`] shows it,
//!   so the bound is needed, and a disk on which nothing bounds D needs a fence that the disk itself keeps.
//! - Writes to the journal could arrive at any time; `check` holds that for every state.

use std::sync::Arc;
use std::time::Duration;

use storage_control::lease::LeaseTimes;
use storage_control::{
    BoxFuture, Device, Gate, Instant, Runtime, SimRuntime, WallTime, WriteLife, lease::DRIFT_PERCENT,
};
use tokio::sync::oneshot;

use crate::check::{Depth, State, check, fsck_finds_nothing};
use crate::history::History;
use crate::image::{Block, Image, seed_of};
use crate::oracle::Seen;
use crate::random::Random;
use crate::record::Disk;
use crate::replay::{Choice, Log};
use crate::user::{User, Wrong};
use crate::workload::{life_step, long};
use crate::world::{BLOCKS, Base, mount, mount_through, record, run};

/// D of the disk.
const WRITE_LIFE: Duration = Duration::from_secs(5);
/// The victim goes on for so long after it was recovered.
const GOES_ON: Duration = Duration::from_secs(20);

/// A clock that runs as much slower than the world's as two clocks may differ.
struct Slow(SimRuntime);

impl Runtime for Slow {
    fn spawn(&self, task: BoxFuture<()>) {
        self.0.spawn(task);
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        self.0.sleep(duration)
    }
    fn now(&self) -> Instant {
        Instant(self.0.now().0 * 100 / (100 + DRIFT_PERCENT))
    }
    fn wall(&self) -> WallTime {
        self.0.wall()
    }
}

/// What became of a node that outlived its lease.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outlived {
    /// Requests the gate refused.
    pub refused: u64,
    /// Requests under way when the lease was surely over, but not the life of its writes.
    pub under_way: u64,
}

/// A node loses its lease in the midst of its work, with requests that take almost for ever. It is recovered as soon as
/// the arithmetic allows, and goes on trying.
pub fn outlive(base: &Base, seed: u64) -> Result<Outlived, Wrong> {
    let base = base.clone();
    run(seed_of("outlive", seed), move |world| async move {
        let mut random = Random::new(seed_of("outlive", seed ^ 1));
        let disk = Disk::slow(base.image.clone(), BLOCKS, &world);
        let clock: Arc<dyn Runtime> = Arc::new(Slow(world.clone()));
        let gate = Gate::new(disk.device(), clock.clone());
        let times = LeaseTimes { write_life: WriteLife::Bounded(WRITE_LIFE) };
        let renew = || gate.extend_lease(LeaseTimes::holder_deadline(clock.now()));
        renew();
        let before_gate: Arc<dyn Device> = Arc::new(gate.clone());
        let fs = mount_through(before_gate, &world, 0).await.map_err(|error| error.to_string())?;
        let marks = disk.clone();
        let user =
            User::new(fs.clone(), base.history.clone(), base.dirs, &world, move |mark| marks.mark(mark));
        let history = work_until_it_fails(user, &world, random.next());
        for _ in 0..random.below(3) {
            world.sleep(LeaseTimes::RENEW_EVERY).await;
            renew();
        }
        disk.stall(WRITE_LIFE);
        let wait = times.full_wait().expect("a write's life is bounded");
        world.sleep(LeaseTimes::stopped_after()).await;
        let (under_way, written) = (disk.under_way(), gate.stats().writes);
        world.sleep(wait - LeaseTimes::stopped_after()).await;
        if disk.under_way() > 0 || gate.stats().writes != written {
            return Err("requests are under way when recovery begins".into());
        }
        let log = Log { base: base.image.clone(), events: disk.take_log() };
        let mut window = log.cuts().last().expect("a mount writes").window;
        let image = disk.image();
        world.sleep(GOES_ON).await;
        if disk.image().digest() != image.digest() {
            return Err("a node wrote after its recovery had begun".into());
        }
        fs.withdraw("the test is over");
        let history = history.await.map_err(|_| "the user is gone")?;
        // What failed is not in the history.
        window.started = window.started.min(history.last());
        let state = State { image, window, dead: 1, again: Vec::new() };
        check(&state, &Arc::new(history), Depth::Thorough)?;
        Ok(Outlived { refused: gate.stats().refused, under_way })
    })
}

/// A user who works until the first error, and then tells what he had done.
fn work_until_it_fails(mut user: User, world: &SimRuntime, seed: u64) -> oneshot::Receiver<History> {
    let (done, history) = oneshot::channel();
    let (world, mut random) = (world.clone(), Random::new(seed));
    world.clone().spawn(Box::pin(async move {
        while user.step(&life_step(&mut random)).await.is_ok() {
            world.sleep(Duration::from_millis(random.below(40))).await;
        }
        let _ = done.send(user.history);
    }));
    history
}

/// A workload whose last write in place arrives when another node has recovered and worked on, at several moments.
/// Returns how many such writes there were, and how many did damage.
pub fn arrive_late(base: &Base, seed: u64) -> Result<(u64, u64), Wrong> {
    let recording = record(base, &long("late", seed, 0), seed)?;
    let mut random = Random::new(seed_of("arrive late", seed));
    let (mut tried, mut damaged) = (0, 0);
    for cut in recording.log.cuts() {
        let in_place = |at: &u64| !base.journals[0].contains(at);
        let Some(first) = cut.last_write.first().map(|(at, _)| *at).filter(in_place) else { continue };
        if !cut.is_under_way() || random.below(8) > 0 {
            continue;
        }
        let (image, late) = (cut.image(Choice::ButLast), cut.last_write.clone());
        let (after, done) = work_on(image, base, random.next())?;
        let mut hit = after.clone();
        late.into_iter().for_each(|(at, block): (u64, Block)| hit.put(at, block));
        look(after, done.clone())
            .map_err(|wrong| format!("without the late write of block {first}: {wrong}"))?;
        tried += 1;
        damaged += u64::from(look(hit, done).is_err());
    }
    Ok((tried, damaged))
}

/// Another node recovers a disk and works on it: what the disk holds then, and what it should show.
fn work_on(image: Image, base: &Base, seed: u64) -> Result<(Image, History), Wrong> {
    let dirs = base.dirs;
    run(seed, move |world| async move {
        let failed = |error: mfs::FsError| error.to_string();
        let disk = Disk::quick(image, BLOCKS);
        let fs = mount(&disk, &world, 1).await.map_err(failed)?;
        fs.adopt(0).await.map_err(failed)?;
        let seen = Seen::look(&fs).await?;
        let contents = seen.contents.into_iter().map(|(id, bytes)| (id, Arc::new(bytes)));
        let mut user = User::new(fs, History::starting(seen.tree, contents), dirs, &world, |_| ());
        let mut random = Random::new(seed);
        for _ in 0..10 {
            user.step(&life_step(&mut random)).await?;
        }
        user.unmount().await?;
        Ok((disk.image(), user.history))
    })
}

/// Whether a disk that was unmounted shows exactly what it should.
fn look(image: Image, history: History) -> Result<(), Wrong> {
    run(1, move |world| async move {
        let disk = Disk::quick(image, BLOCKS);
        fsck_finds_nothing(&disk, &world, "at the end").await?;
        let fs = mount(&disk, &world, 2).await.map_err(|error| error.to_string())?;
        let seen = Seen::look(&fs).await?;
        fs.unmount().await.map_err(|error| error.to_string())?;
        let content =
            |(id, bytes): (&_, &Vec<u8>)| history.content(*id).is_some_and(|should| *should == *bytes);
        match seen.tree == *history.now() && seen.contents.iter().all(content) {
            true => Ok(()),
            false => Err("it shows something else".into()),
        }
    })
}
