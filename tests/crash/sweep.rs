//! Which workloads are run, where they are cut, and the figures.
//!
//! All single operations, then pairs and long runs in turn until there are as many states as were asked for. What a
//! workload does and where it is cut follows from its name and the seed alone, whatever runs beside it.

use std::collections::HashSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;

use crate::check::{Depth, State, check, cut_mount, cut_recovery};
use crate::image::seed_of;
use crate::late::{arrive_late, outlive};
use crate::lives::live;
use crate::random::Random;
use crate::replay::Cut;
use crate::workload::{Workload, churn, long, pair, singles};
use crate::world::{Base, Room, record};

/// Workloads carried out between two looks at the figures.
const BATCH: u64 = 32;
/// For so many states one life of a cluster.
const STATES_PER_LIFE: u64 = 100;
/// And for so many, one lease that ends, and one workload whose last writes come late.
const STATES_PER_LATE_WRITE: u64 = 500;
/// Violations that are printed.
const PRINTED: usize = 20;
/// One in so many states is looked at thoroughly, or has its recovery cut.
const THOROUGH_EVERY: u64 = 8;

/// From the environment; see `tests/README.md`.
pub struct Settings {
    pub states: u64,
    pub seed: u64,
    pub threads: Option<usize>,
    /// A workload by name, with `@position.choice` one of its states.
    pub case: Option<String>,
}

/// How densely a workload is cut.
#[derive(Clone, Copy)]
struct Density {
    /// Moments.
    cuts: u64,
    /// Choices drawn at each, beside the extreme ones.
    drawn: usize,
}

const SHORT: Density = Density { cuts: 200, drawn: 4 };
const LONG: Density = Density { cuts: 40, drawn: 6 };

#[derive(Default)]
struct Figures {
    workloads: u64,
    lives: u64,
    requests: u64,
    states: u64,
    /// Of those, cuts of a recovery.
    in_recovery: u64,
    /// Recoveries that wrote something, and orphans they found.
    replays: u64,
    orphans: u64,
    violations: Vec<String>,
}

impl Figures {
    fn add(&mut self, other: Figures) {
        self.workloads += other.workloads;
        self.requests += other.requests;
        self.states += other.states;
        self.in_recovery += other.in_recovery;
        self.replays += other.replays;
        self.orphans += other.orphans;
        self.violations.extend(other.violations);
    }
}

pub struct Sweep {
    settings: Settings,
    roomy: Base,
    crowded: Base,
    figures: Mutex<Figures>,
}

impl Sweep {
    pub fn new(settings: Settings) -> Sweep {
        let (roomy, crowded) = (Base::make(Room::Much), Base::make(Room::Little));
        Sweep { settings, roomy, crowded, figures: Mutex::default() }
    }

    pub fn run(&self) {
        let seed = self.settings.seed;
        if let Some(case) = self.settings.case.clone() {
            return self.run_case(&case);
        }
        self.workloads("single operations", &self.roomy, singles(seed), SHORT);
        self.lives();
        self.late_writes();
        let mut next = 0;
        let enough =
            |figures: &Figures| figures.states >= self.settings.states || !figures.violations.is_empty();
        while !enough(&self.figures.lock()) {
            let numbers = next..next + BATCH;
            next += BATCH;
            let pairs = numbers.clone().map(|n| pair(seed, n)).collect();
            self.workloads("pairs", &self.roomy, pairs, SHORT);
            let some = || numbers.clone().step_by(8);
            self.workloads("long runs", &self.roomy, some().map(|n| long("long", seed, n)).collect(), LONG);
            let crowded = some().map(|n| long("crowded", seed, n)).collect();
            self.workloads("long runs with little room", &self.crowded, crowded, LONG);
            let churns = some().map(|n| churn(seed, n)).collect();
            self.workloads("churn with little room", &self.crowded, churns, LONG);
        }
    }

    /// One workload, or one of its states, again.
    fn run_case(&self, case: &str) {
        let seed = self.settings.seed;
        let (name, state) = match case.split_once('@') {
            Some((name, state)) => (name, Some(state)),
            None => (case, None),
        };
        let (kind, number) = name.split_once('/').expect("a case is KIND/NUMBER");
        let number: u64 = number.parse().expect("a case has a number");
        let one = seed ^ number << 32;
        let alone = match kind {
            "life" => Some(live(one).map(|life| println!("{life:?}"))),
            "outlive" => Some(outlive(&self.roomy, one).map(|outlived| println!("{outlived:?}"))),
            "late" => Some(arrive_late(&self.crowded, one).map(|late| println!("{late:?}"))),
            _ => None,
        };
        if let Some(result) = alone {
            return result.unwrap_or_else(|error| self.is_wrong(kind, number, error));
        }
        let (workload, density) = match kind {
            "single" => (singles(seed).swap_remove(number as usize), SHORT),
            "pair" => (pair(seed, number), SHORT),
            "churn" => (churn(seed, number), LONG),
            "long" | "crowded" => (long(kind, seed, number), LONG),
            other => panic!("there is no kind of workload {other}"),
        };
        for step in &workload.steps {
            println!("{step:?}");
        }
        let base = if matches!(kind, "crowded" | "churn") { &self.crowded } else { &self.roomy };
        let done = cut_workload(base, seed, &workload, density, state);
        self.figures.lock().add(done);
    }

    /// Deaths of one node among several.
    fn lives(&self) {
        let lives = self.settings.states / STATES_PER_LIFE;
        let (mut lost, mut interrupted) = (0, 0);
        for n in 0..lives {
            match live(self.settings.seed ^ n << 32) {
                Ok(life) => {
                    lost += life.lost;
                    interrupted += u64::from(life.interrupted);
                }
                Err(error) => self.is_wrong("life", n, error),
            }
        }
        self.figures.lock().lives += lives;
        println!(
            "lives of three nodes of which one dies: {lives}, {interrupted} in an operation, {lost} operations lost"
        );
    }

    /// Writes of nodes that are not quite dead.
    fn late_writes(&self) {
        let times = self.settings.states / STATES_PER_LATE_WRITE;
        let (mut refused, mut under_way, mut tried, mut damaged) = (0, 0, 0, 0);
        for n in 0..times {
            match outlive(&self.roomy, self.settings.seed ^ n << 32) {
                Ok(outlived) => {
                    refused += outlived.refused;
                    under_way += outlived.under_way;
                }
                Err(error) => self.is_wrong("outlive", n, error),
            }
            match arrive_late(&self.crowded, self.settings.seed ^ n << 32) {
                Ok((writes, hits)) => {
                    tried += writes;
                    damaged += hits;
                }
                Err(error) => self.is_wrong("late", n, error),
            }
        }
        println!(
            "leases that ended: {times}, {refused} requests refused, {under_way} under way at the end and done before recovery"
        );
        println!("late writes that nothing refused: {tried}, {damaged} of them did damage");
        if damaged == 0 && tried > 100 {
            self.is_wrong("late", 0, "no late write does damage: the test is blind".into());
        }
    }

    fn is_wrong(&self, kind: &str, n: u64, error: String) {
        let seed = self.settings.seed;
        let again = format!("SEED={seed} MATRIX_CRASH_CASE={kind}/{n} cargo test --release --test crash");
        self.figures.lock().violations.push(format!("{kind}/{n}: {error}\n  {again}"));
    }

    /// Carries these out on all threads.
    fn workloads(&self, what: &str, base: &Base, workloads: Vec<Workload>, density: Density) {
        let threads = self
            .settings
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
        let (next, figures, seed) = (AtomicUsize::new(0), Mutex::new(Figures::default()), self.settings.seed);
        std::thread::scope(|scope| {
            for _ in 0..threads.max(1) {
                scope.spawn(|| {
                    while let Some(workload) = workloads.get(next.fetch_add(1, Relaxed)) {
                        let done = cut_workload(base, seed, workload, density, None);
                        figures.lock().add(done);
                    }
                });
            }
        });
        let figures = figures.into_inner();
        println!("{what}: {} workloads, {} states", figures.workloads, figures.states);
        self.figures.lock().add(figures);
    }

    /// Prints the figures, and how to see each violation again.
    pub fn report(&self, took: Duration) -> ExitCode {
        let Figures { workloads, lives, requests, states, in_recovery, replays, orphans, violations } =
            &*self.figures.lock();
        for violation in violations.iter().take(PRINTED) {
            println!("VIOLATION {violation}");
        }
        println!(
            "seed {}: {workloads} workloads with {requests} requests to the disk, {:.1} s",
            self.settings.seed,
            took.as_secs_f64()
        );
        println!(
            "crash states: {states} ({in_recovery} of them during recovery; {replays} replays wrote, {orphans} orphans freed)"
        );
        println!("lives of a cluster in which one node dies: {lives}");
        println!("violations: {}", violations.len());
        if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Runs a workload, and cuts it.
fn cut_workload(
    base: &Base,
    seed: u64,
    workload: &Workload,
    density: Density,
    only: Option<&str>,
) -> Figures {
    let mut figures = Figures { workloads: 1, ..Figures::default() };
    let name = &workload.name;
    let wrong = |figures: &mut Figures, at: &str, wrong: String| {
        figures.violations.push(format!(
            "{name}{at}: {wrong}\n  SEED={seed} MATRIX_CRASH_CASE={name}{at} cargo test --release --test crash"
        ));
    };
    let recording = match record(base, workload, seed) {
        Ok(recording) => recording,
        Err(error) => {
            wrong(&mut figures, "", format!("the workload itself: {error}"));
            return figures;
        }
    };
    let history = Arc::new(recording.history);
    let events = recording.log.events.len() as u64;
    figures.requests += events / 2;
    let mut random = Random::new(seed_of(name, seed));
    let mut seen = HashSet::new();
    for cut in recording.log.cuts() {
        // Ends of flushes are where much becomes sure at once.
        let weight = if cut.flushed { 3 } else { 1 };
        let mut here = Random::new(random.next());
        if here.below(events) >= density.cuts * weight {
            continue;
        }
        for (n, choice) in cut.choices(density.drawn, &mut here).into_iter().enumerate() {
            let at = format!("@{}.{n}", cut.position);
            let (image, window) = (cut.image(choice), cut.window);
            let mut here = Random::new(here.next());
            if !seen.insert((image.digest(), window)) || only.is_some_and(|only| at[1..] != *only) {
                continue;
            }
            let state = State { image, window, dead: 1, again: late_again(base, &cut) };
            let thorough = only.is_some() || here.below(THOROUGH_EVERY) == 0;
            if let Err(error) = look_at(&state, &history, thorough, &mut here, &mut figures) {
                wrong(&mut figures, &at, format!("{choice:?}: {error}"));
            }
        }
    }
    figures
}

/// The last write before the cut, where it was to the journal and not in place.
fn late_again(base: &Base, cut: &Cut) -> Vec<(u64, crate::image::Block)> {
    let journal = base.journals[0].clone();
    let is_journal = |at: u64| journal.contains(&at) && at != journal.start + 2;
    let last = cut.last_write.clone();
    if last.first().is_some_and(|(at, _)| is_journal(*at)) { last } else { Vec::new() }
}

fn look_at(
    state: &State,
    history: &Arc<crate::history::History>,
    thorough: bool,
    random: &mut Random,
    figures: &mut Figures,
) -> Result<(), String> {
    figures.states += 1;
    let depth = if thorough { Depth::Thorough } else { Depth::Usual };
    let recovered = check(state, history, depth)?;
    figures.orphans += recovered.orphans;
    figures.replays += u64::from(recovered.replayed());
    if thorough {
        let mut states = cut_recovery(state, &recovered, 2, random)?;
        if recovered.orphans > 0 {
            states += cut_mount(state, &recovered, history, 4, random)?;
        }
        figures.states += states;
        figures.in_recovery += states;
    }
    Ok(())
}
