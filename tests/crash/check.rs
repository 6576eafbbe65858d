//! What happens to every state: recovery by another node, the check, the oracle, and recovery once more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mfs::format::superblock::Superblock;
use mfs::fsck;
use storage_control::{Device, Runtime, SimRuntime};

use crate::history::History;
use crate::image::{Block, Image};
use crate::oracle::{Seen, judge};
use crate::random::Random;
use crate::record::{Disk, Event};
use crate::replay::{Choice, Log, Window};
use crate::user::Wrong;
use crate::world::{BLOCKS, FS_START, mount, replay, run};

/// A disk after a power cut.
#[derive(Clone)]
pub struct State {
    pub image: Image,
    /// How far its user had come.
    pub window: Window,
    /// Journals of nodes that are gone; the next one's is the recovering node's.
    pub dead: u16,
    /// A write to a dead node's journal that arrives a second time, after recovery.
    pub again: Vec<(u64, Block)>,
}

/// What recovery did to a state.
pub struct Recovered {
    /// After the journals were replayed.
    pub image: Image,
    /// What the replay did to the disk.
    pub replay: Vec<Event>,
    /// After the new node freed orphans and unmounted.
    pub mount: Vec<Event>,
    /// Orphans that it found.
    pub orphans: u64,
}

impl Recovered {
    /// Whether there was anything to replay.
    pub fn replayed(&self) -> bool {
        self.replay.iter().any(|event| matches!(event, Event::Write { .. }))
    }
}

/// How much is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    Usual,
    /// Also what follows from the rest most of the time: the check before recovery, and after the unmount.
    Thorough,
}

/// Recovers a state and judges it.
pub fn check(state: &State, history: &Arc<History>, depth: Depth) -> Result<Recovered, Wrong> {
    let (state, history) = (state.clone(), history.clone());
    run(1, |world| async move {
        let thorough = depth == Depth::Thorough;
        if thorough {
            let disk = Disk::quick(state.image.clone(), BLOCKS);
            fsck_finds_nothing(&disk, &world, "before recovery").await?;
            if disk.writes() > 0 {
                return Err("fsck wrote to the disk".into());
            }
        }
        let (disk, log) = replay_all(&state, &world).await?;
        if !state.again.is_empty() {
            let mut image = disk.image();
            state.again.iter().for_each(|(at, block)| image.put(*at, block.clone()));
            let late = State { image, ..state.clone() };
            let (again, _) = replay_all(&late, &world).await?;
            let differ = differences(&disk.image(), &again.image(), state.dead).await?;
            let late = |at: &u64| state.again.iter().any(|(late, _)| late == at);
            if !differ.iter().all(late) {
                return Err(format!("a journal write that arrived twice has changed blocks {differ:?}"));
            }
        }
        let image = disk.image();
        let stats = fsck_finds_nothing(&disk, &world, "after recovery").await?;
        let failed = |error: mfs::FsError| format!("the next mount fails: {error}");
        let fs = mount(&disk, &world, state.dead).await.map_err(failed)?;
        let mut orphans = 0;
        for journal in 0..state.dead {
            orphans += fs.adopt(journal).await.map_err(failed)? as u64;
        }
        let seen = Seen::look(&fs).await?;
        judge(&history, state.window, &seen)?;
        if orphans > 0 {
            world.sleep(Duration::from_secs(1)).await;
        }
        fs.unmount().await.map_err(failed)?;
        if orphans > 0 || stats.orphans > 0 || thorough {
            let stats = fsck_finds_nothing(&disk, &world, "after the unmount").await?;
            if stats.orphans > 0 {
                return Err(format!("{} orphans are left", stats.orphans));
            }
        }
        Ok(Recovered { image, replay: log, mount: disk.take_log(), orphans })
    })
}

/// Replays the dead nodes' journals, then once more, which changes nothing.
async fn replay_all(state: &State, world: &SimRuntime) -> Result<(Disk, Vec<Event>), Wrong> {
    let failed = |error: mfs::FsError| format!("recovery fails: {error}");
    let disk = Disk::quick(state.image.clone(), BLOCKS);
    let device = disk.device();
    let dead: Vec<u16> = (0..state.dead).collect();
    replay(&device, world, &dead).await.map_err(failed)?;
    let log = disk.take_log();
    let writes = disk.writes();
    replay(&device, world, &dead).await.map_err(failed)?;
    if disk.writes() != writes {
        return Err("a second recovery wrote to the disk".into());
    }
    disk.take_log();
    Ok((disk, log))
}

pub async fn fsck_finds_nothing(disk: &Disk, world: &SimRuntime, when: &str) -> Result<fsck::Stats, Wrong> {
    let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
    let options = fsck::Options { replay: Some(runtime), ..fsck::Options::default() };
    let report = fsck::check_at(disk.device(), FS_START, options).await;
    if !report.is_clean() {
        let findings: Vec<String> = report.findings.iter().map(|finding| finding.to_string()).collect();
        return Err(format!("fsck {when}: {} {:?}", findings.join("; "), report.failed));
    }
    Ok(report.stats)
}

/// Where two recoveries differ, but for the counters in the dead nodes' journals' headers.
async fn differences(one: &Image, other: &Image, dead: u16) -> Result<Vec<u64>, Wrong> {
    let device: Arc<dyn Device> = Disk::quick(one.clone(), BLOCKS).device();
    let superblock = Superblock::read(&*device, FS_START).await.map_err(|error| error.to_string())?.0;
    let starts = (0..dead).filter_map(|journal| superblock.journal(journal));
    let headers: Vec<u64> = starts.flat_map(|start| [start.0, start.0 + 1]).collect();
    Ok(one.differences(other).into_iter().filter(|at| !headers.contains(at)).collect())
}

/// Cuts the power while a state is being recovered, at every request, and recovers again: the same must come
/// out. Returns how many states that were.
pub fn cut_recovery(
    state: &State,
    recovered: &Recovered,
    drawn: usize,
    random: &mut Random,
) -> Result<u64, Wrong> {
    let log = Log { base: state.image.clone(), events: recovered.replay.clone() };
    let mut seen = BTreeMap::from([(state.image.digest(), ())]);
    for cut in log.cuts() {
        for choice in cut.choices(drawn, random) {
            let image = cut.image(choice);
            if seen.insert(image.digest(), ()).is_some() {
                continue;
            }
            let state = State { image, again: Vec::new(), ..state.clone() };
            let wanted = recovered.image.clone();
            let result = run(1, |world| async move {
                let (disk, _) = replay_all(&state, &world).await?;
                match differences(&wanted, &disk.image(), state.dead).await?[..] {
                    [] => Ok(()),
                    ref differ => Err(format!("recovery again gives other blocks {differ:?}")),
                }
            });
            result.map_err(|wrong| during("recovery", cut.position, choice, wrong))?;
        }
    }
    Ok(seen.len() as u64 - 1)
}

/// Cuts the power while the recovering node frees orphans and unmounts; a third node recovers both.
pub fn cut_mount(
    state: &State,
    recovered: &Recovered,
    history: &Arc<History>,
    cuts: usize,
    random: &mut Random,
) -> Result<u64, Wrong> {
    let log = Log { base: recovered.image.clone(), events: recovered.mount.clone() };
    let mut states = 0;
    for cut in log.cuts() {
        if random.below(recovered.mount.len() as u64) >= cuts as u64 {
            continue;
        }
        let choices = cut.choices(4, random);
        let choice = *random.pick(&choices);
        let state =
            State { image: cut.image(choice), dead: state.dead + 1, again: Vec::new(), ..state.clone() };
        check(&state, history, Depth::Usual)
            .map_err(|wrong| during("the mount after recovery", cut.position, choice, wrong))?;
        states += 1;
    }
    Ok(states)
}

fn during(what: &str, position: usize, choice: Choice, wrong: Wrong) -> Wrong {
    format!("power cut at event {position} of {what} ({choice:?}): {wrong}")
}
