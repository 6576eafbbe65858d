//! One life of a whole matrix under one seed: nodes that start, work, die and start again, and what is asked of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use membership::{NamingDatabase, View};
use mfs::format::header::{self, Block, Header};
use mfs::{LockName, fsck};
use parking_lot::Mutex;
use storage_control::lease::LeaseTimes;
use storage_control::mem_device::Image;
use storage_control::mkfs::{self, PrepareOptions};
use storage_control::slots::NoLocks;
use storage_control::{
    BLOCK_SIZE, BlockAddr, Device, Instant, IoSlice, Label, MemDevice, NodeId, Runtime, SimRuntime, WallTime,
    WriteLife,
};
use tokio::sync::oneshot;

use crate::daemon::{self, Daemon};
use crate::disk::{Inspect, Path, Stalls, WRITE_LIFE};
use crate::host::Host;
use crate::net::Net;
use crate::programs::{self, Log, Program};

const BLOCKS: u64 = 16_384;
/// Programs of each node.
const PROGRAMS: u64 = 2;
/// How long after the last fault everybody must be back at work.
const PROGRESS_WITHIN: Duration = Duration::from_secs(180);

/// What a life was like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) operations: u64,
    pub(crate) faults: u64,
    pub(crate) starts: u64,
    pub(crate) generations: u64,
    /// Tells lives apart that should be one.
    pub(crate) fingerprint: u64,
}

#[derive(Clone)]
struct World {
    runtime: SimRuntime,
    disk: MemDevice,
    stalls: Arc<Mutex<Stalls>>,
    net: Net,
    log: Arc<Log>,
    hosts: Arc<Mutex<BTreeMap<u16, Host>>>,
    daemons: Arc<Mutex<BTreeMap<u16, Daemon>>>,
    trace: Arc<Mutex<Vec<String>>>,
    starts: Arc<Mutex<u64>>,
    ending: Arc<AtomicBool>,
}

/// A filesystem that one node made and left.
fn original() -> &'static Image {
    static ORIGINAL: OnceLock<Image> = OnceLock::new();
    ORIGINAL.get_or_init(|| {
        let runtime = SimRuntime::new(1);
        let disk = MemDevice::new(BLOCKS);
        let world = World::new(&runtime, disk.clone());
        let maker = world.clone();
        runtime.run(async move {
            maker.format().await;
            maker.runtime.spawn(Box::pin(maker.net.clone().live()));
            let host = Host::new(&maker.runtime, 0, 0);
            let first = maker.start(0, &host).await.expect("the first node starts");
            let fs = maker.mounted(&first).await.expect("the first node mounts");
            programs::set_up(&fs).await.expect("the registers are made");
            drop(fs);
            first.leave().await.expect("the first node leaves");
            host.kill();
        });
        disk.image()
    })
}

/// Lives one life; panics where something is wrong.
pub(crate) fn live(seed: u64) -> Life {
    let runtime = SimRuntime::new(seed);
    let world = World::new(&runtime, MemDevice::from_image(original()));
    let living = world.clone();
    let life = runtime.run(async move { living.run().await });
    world.log.stop.store(true, Ordering::Relaxed);
    world.hosts.lock().values().for_each(Host::kill);
    // What is left ends by itself, or the world would stay in memory with it.
    runtime.advance(Duration::from_secs(30));
    Life { fingerprint: runtime.random() ^ runtime.now().0, ..life }
}

impl World {
    fn new(runtime: &SimRuntime, disk: MemDevice) -> World {
        World {
            runtime: runtime.clone(),
            disk,
            stalls: Arc::default(),
            net: Net::new(runtime),
            log: Arc::new(Log::new(runtime)),
            hosts: Arc::default(),
            daemons: Arc::default(),
            trace: Arc::default(),
            starts: Arc::default(),
            ending: Arc::default(),
        }
    }

    fn below(&self, n: u64) -> u64 {
        self.runtime.random() % n
    }

    fn note(&self, text: impl Into<String>) {
        let at = self.runtime.now().0 as f64 / 1e9;
        self.trace.lock().push(format!("{at:>10.4} {}", text.into()));
    }

    fn fail(&self, why: &str) -> ! {
        let trace = self.trace.lock();
        let from = trace.len().saturating_sub(60);
        panic!("{why}\n{}", trace[from..].join("\n"));
    }

    async fn format(&self) {
        let device: Arc<dyn Device> = Arc::new(self.disk.clone());
        let runtime: Arc<dyn Runtime> = Arc::new(self.runtime.clone());
        let times = LeaseTimes { write_life: WriteLife::Bounded(WRITE_LIFE) };
        let prepare = PrepareOptions { text: "sim".into(), force: true, ..PrepareOptions::default() };
        let nobody = |label: &Label| {
            let names =
                NamingDatabase::of_one("disk1".parse().expect("a name"), label.device, label.device_blocks);
            membership::codec::encode_view(&View::empty(2, names))
        };
        let label = mkfs::prepare(&device, &NoLocks, times, &runtime, &prepare, &nobody).await;
        let label = label.expect("an empty device is taken");
        let options = mfs::mkfs::Options {
            blocks: label.device_blocks,
            fs_start: label.fs_start,
            label: label.text.clone(),
            uuid: label.fs.into_bytes(),
            secret: [9; 16],
            now: WallTime { secs: 1_700_000_000, nanos: 0 },
            journals: Some(2),
            group_blocks: None,
        };
        mfs::mkfs::mkfs(&device, &options, |_, _| ()).await.expect("mkfs");
        mkfs::finish(&*device, &NoLocks, times, &*runtime, &label).await.expect("the label is written");
    }

    /// A daemon of node number `n` on `host`, as far as it has claimed its slot.
    async fn start(&self, n: u16, host: &Host) -> Result<Daemon, String> {
        let inspect = Arc::new(Mutex::new(None));
        let path = Path {
            disk: self.disk.clone(),
            world: self.runtime.clone(),
            stalls: Arc::clone(&self.stalls),
            id: NodeId(n),
            host: host.clone(),
            inspect: Arc::clone(&inspect),
        };
        let (tell, told) = oneshot::channel();
        let (net, on) = (self.net.clone(), host.clone());
        host.spawn(Box::pin(async move {
            let _ = tell.send(daemon::start(on, path, net, format!("n{n}")).await);
        }));
        let daemon = told.await.unwrap_or_else(|_| Err(String::from("its host died")))?;
        *inspect.lock() = Some(self.inspector(n, daemon.clone()));
        *self.starts.lock() += 1;
        self.note(format!("n{n} is node {} incarnation {}", daemon.who.0, daemon.who.1));
        Ok(daemon)
    }

    async fn mounted(&self, daemon: &Daemon) -> Option<Arc<mfs::Filesystem>> {
        let mut progress = daemon.progress.clone();
        let reached = progress.wait_for(|now| !matches!(now, daemon::Progress::Joining)).await;
        drop(reached);
        daemon.filesystem()
    }

    /// Sentence 2: metadata are written by who holds their lock exclusively, or replays; and then nobody else who may
    /// still write holds it at all.
    fn inspector(&self, n: u16, me: Daemon) -> Inspect {
        let world = self.clone();
        let geometry = Arc::new(OnceLock::new());
        Arc::new(move |at: BlockAddr, data: &[IoSlice]| {
            if !me.replaying.lock().is_empty() {
                return;
            }
            let blocks = data.iter().flat_map(|piece| piece.bytes().chunks_exact(BLOCK_SIZE));
            for (addr, bytes) in (at.0..).zip(blocks) {
                let Ok(block) = <&Block>::try_from(bytes) else { continue };
                let head = Header::of(block);
                if head.magic != header::MAGIC || head.addr != addr {
                    continue;
                }
                let Some(owner) = head.owner().filter(|owner| !matches!(owner, LockName::Orphans(_))) else {
                    continue;
                };
                let Some(fs) = me.filesystem() else { continue };
                let geometry = geometry.get_or_init(|| fs.store().superblock().geometry);
                let resource = owner.resource(geometry);
                if me.lcl.held(resource) != lcl::Mode::EX {
                    world.fail(&format!("n{n} writes block {addr} without holding {owner:?} exclusively"));
                }
                let daemons = world.daemons.lock().clone();
                for (other, daemon) in daemons.into_iter().filter(|(other, _)| *other != n) {
                    let dead = world.hosts.lock().get(&other).is_none_or(Host::is_dead);
                    let held = daemon.lcl.held(resource);
                    if !dead && daemon.gate.check().is_ok() && held != lcl::Mode::NL {
                        world.fail(&format!(
                            "n{n} writes block {addr} while n{other} holds {owner:?} {held:?}"
                        ));
                    }
                }
            }
        })
    }

    /// Starts node number `n` again and again.
    async fn keep_running(self, n: u16) {
        while !self.ending.load(Ordering::Relaxed) {
            let drift = self.below(8_000) as i64 - 4_000;
            let host = Host::new(&self.runtime, drift, self.below(100) as i64);
            self.hosts.lock().insert(n, host.clone());
            let started = self.start(n, &host).await;
            match started {
                Ok(daemon) => {
                    self.daemons.lock().insert(n, daemon.clone());
                    self.work(n, &host, &daemon).await;
                    self.daemons.lock().remove(&n);
                    self.net.leave(daemon.who);
                }
                Err(why) => self.note(format!("n{n} does not start: {why}")),
            }
            host.kill();
            let pause = Duration::from_millis(self.below(4_000));
            self.runtime.sleep(pause).await;
        }
    }

    /// Until the daemon is over or its host dead.
    async fn work(&self, n: u16, host: &Host, daemon: &Daemon) {
        let mut working = false;
        while !host.is_dead() && !daemon.is_over() {
            if let (false, Some(fs)) = (working, daemon.filesystem()) {
                working = true;
                self.note(format!("n{n} has mounted"));
                for _ in 0..PROGRAMS {
                    let program = self.program(n, host, Arc::clone(&fs));
                    host.spawn(Box::pin(program.run()));
                }
            }
            self.runtime.sleep(Duration::from_millis(50)).await;
        }
        let why = match &*daemon.progress.borrow() {
            daemon::Progress::Over(why) => why.clone(),
            daemon::Progress::Left => String::from("it has left"),
            daemon::Progress::Joining | daemon::Progress::Mounted(_) => String::from("its host died"),
        };
        self.note(format!("n{n} is over: {why}"));
    }

    fn program(&self, n: u16, host: &Host, fs: Arc<mfs::Filesystem>) -> Program {
        Program {
            fs,
            host: host.clone(),
            node: NodeId(n),
            world: self.runtime.clone(),
            log: Arc::clone(&self.log),
        }
    }

    async fn run(self) -> Life {
        self.runtime.spawn(Box::pin(self.net.clone().live()));
        let nodes = 2 + self.below(2) as u16;
        for n in 0..nodes {
            self.runtime.spawn(Box::pin(self.clone().keep_running(n)));
        }
        self.runtime.sleep(Duration::from_secs(12)).await;
        let end = self.runtime.now() + Duration::from_secs(10 + self.below(30));
        let mut faults = 0;
        while self.runtime.now() < end {
            self.trouble(nodes).await;
            faults += 1;
            self.runtime.sleep(Duration::from_millis(50 + self.below(4_000))).await;
        }
        self.heal();
        self.await_progress(nodes).await;
        self.finish(nodes).await;
        let register = self.generation();
        Life {
            operations: self.log.operations(),
            faults,
            starts: *self.starts.lock(),
            generations: register,
            fingerprint: 0,
        }
    }

    fn generation(&self) -> u64 {
        let daemons = self.daemons.lock();
        let views = daemons.values().filter_map(|daemon| daemon.installed.lock().clone());
        views.map(|view| view.generation.0).max().unwrap_or_default()
    }

    async fn trouble(&self, nodes: u16) {
        let n = self.below(u64::from(nodes)) as u16;
        let host = self.hosts.lock().get(&n).cloned();
        match self.below(13) {
            0 | 1 => {
                self.note(format!("n{n} is killed"));
                host.inspect(Host::kill);
            }
            2 | 3 => {
                let pause = Duration::from_millis(50 + self.below(12_000));
                self.note(format!("n{n} stands still for {pause:?}"));
                if let Some(host) = host {
                    host.pause();
                    let world = self.clone();
                    self.runtime.spawn(Box::pin(async move {
                        world.runtime.sleep(pause).await;
                        world.note(format!("n{n} goes on"));
                        host.resume();
                    }));
                }
            }
            4 | 5 => {
                if let Some((a, b)) = self.net.some_link(self.runtime.random()) {
                    self.note(format!("the connection of {a} and {b} is reset"));
                    self.net.disconnect(a, b);
                }
            }
            6 => {
                let (from, to) = (NodeId(self.below(4) as u16), NodeId(self.below(4) as u16));
                self.note(format!("nothing goes from {from} to {to}"));
                self.net.cut(from, to);
            }
            7 => {
                let node = self.daemons.lock().get(&n).map(|daemon| daemon.who.0);
                if let Some(node) = node {
                    self.note(format!("node {node} is cut off"));
                    for other in (0..4).map(NodeId).filter(|other| *other != node) {
                        self.net.cut(node, other);
                        self.net.cut(other, node);
                    }
                }
            }
            8 => {
                self.note("the network is healed");
                self.net.heal();
            }
            9 => {
                let time = self.a_while();
                self.note(format!("the disk is away from n{n} for {time:?}"));
                self.stalls.lock().hosts.insert(NodeId(n));
                let world = self.clone();
                self.runtime.spawn(Box::pin(async move {
                    world.runtime.sleep(time).await;
                    world.stalls.lock().hosts.remove(&NodeId(n));
                }));
            }
            10 => {
                let time = self.a_while();
                self.note(format!("the disk is away for {time:?}"));
                self.stalls.lock().everybody = true;
                let world = self.clone();
                self.runtime.spawn(Box::pin(async move {
                    world.runtime.sleep(time).await;
                    world.stalls.lock().everybody = false;
                }));
            }
            11 if self.below(3) == 0 => self.power_cut(),
            _ => {
                let daemon = self.daemons.lock().get(&n).cloned();
                if let Some(daemon) = daemon {
                    self.note(format!("n{n} is unmounted"));
                    let world = self.clone();
                    let host = host.expect("a daemon has a host");
                    host.clone().spawn(Box::pin(async move {
                        if let Err(why) = daemon.leave().await {
                            world.note(format!("n{n} does not leave in order: {why}"));
                        }
                    }));
                }
            }
        }
    }

    /// Mostly shorter than what the disk may take for a request.
    fn a_while(&self) -> Duration {
        let most = if self.below(3) == 0 { 7_000 } else { 1_900 };
        Duration::from_millis(50 + self.below(most))
    }

    /// Everything stops, and the disk loses what it had not been told to keep.
    fn power_cut(&self) {
        self.note("the power is cut");
        self.hosts.lock().values().for_each(Host::kill);
        self.stalls.lock().power_cuts += 1;
        let survives = self.below(4);
        self.disk.crash(|_| self.below(4) < survives);
    }

    fn heal(&self) {
        self.note("everything is well again");
        self.net.heal();
        let mut stalls = self.stalls.lock();
        stalls.everybody = false;
        stalls.hosts.clear();
        drop(stalls);
        self.hosts.lock().values().for_each(Host::resume);
    }

    /// Every node works again.
    async fn await_progress(&self, nodes: u16) {
        let before = self.log.done.lock().clone();
        let end = self.runtime.now() + PROGRESS_WITHIN;
        loop {
            let done = self.log.done.lock().clone();
            let gone_on = |n: u16| {
                let count = |of: &BTreeMap<NodeId, u64>| of.get(&NodeId(n)).copied().unwrap_or_default();
                count(&done) >= count(&before) + 4
            };
            if (0..nodes).all(gone_on) {
                return;
            }
            if self.runtime.now() > end {
                self.fail(&format!("no progress after the faults: {before:?}, then {done:?}"));
            }
            self.heal_quietly();
            self.runtime.sleep(Duration::from_millis(200)).await;
        }
    }

    /// Ends pauses and stalls that began before the end of the trouble.
    fn heal_quietly(&self) {
        self.hosts.lock().values().filter(|host| host.is_paused()).for_each(Host::resume);
    }

    /// Looks at everything from every node, and then at the disk.
    async fn finish(&self, nodes: u16) {
        self.log.stop.store(true, Ordering::Relaxed);
        self.runtime.sleep(Duration::from_secs(3)).await;
        self.note("the programs have stopped");
        let mut trees = Vec::new();
        for n in 0..nodes {
            let (host, fs) = self.running(n).await;
            let (tell, told) = oneshot::channel();
            let program = self.program(n, &host, Arc::clone(&fs));
            host.spawn(Box::pin(async move {
                let looked = program.look().await;
                let tree = programs::tree(&program.fs).await;
                let _ = tell.send(looked.and(tree));
            }));
            match self.in_time(&format!("n{n} reads everything"), told).await {
                Ok(Ok(tree)) => trees.push(tree),
                Ok(Err(error)) => self.fail(&format!("n{n} cannot read: {error}")),
                Err(_) => self.fail(&format!("n{n} died while everything was well")),
            }
        }
        for (n, tree) in trees.iter().enumerate().skip(1) {
            let first = &trees[0];
            let differ = first
                .iter()
                .filter(|line| !tree.contains(line))
                .chain(tree.iter().filter(|l| !first.contains(l)));
            let differ: Vec<_> = differ.take(10).collect();
            if !differ.is_empty() {
                self.fail(&format!("n0 and n{n} see different trees: {differ:#?}"));
            }
        }
        self.ending.store(true, Ordering::Relaxed);
        for n in 0..nodes {
            let daemon = self.daemons.lock().get(&n).cloned();
            let Some(daemon) = daemon else { self.fail(&format!("n{n} is not there")) };
            let host = self.hosts.lock().get(&n).cloned().expect("a daemon has a host");
            let (tell, told) = oneshot::channel();
            host.spawn(Box::pin(async move {
                let _ = tell.send(daemon.leave().await);
            }));
            if let Ok(Err(why)) = self.in_time(&format!("n{n} leaves"), told).await {
                self.fail(&format!("n{n} cannot leave: {why}"));
            }
        }
        self.check_disk().await;
        if let Some(wrong) = self.log.wrong.lock().first() {
            self.fail(&format!("an error without a reason: {wrong}"));
        }
        if let Some(defect) = self.log.defect() {
            self.fail(&format!("not linearizable: {defect}"));
        }
    }

    async fn running(&self, n: u16) -> (Host, Arc<mfs::Filesystem>) {
        let end = self.runtime.now() + PROGRESS_WITHIN;
        loop {
            let daemon = self.daemons.lock().get(&n).cloned();
            let host = self.hosts.lock().get(&n).cloned();
            if let (Some(daemon), Some(host)) = (daemon, host)
                && let Some(fs) = daemon.filesystem()
            {
                return (host, fs);
            }
            if self.runtime.now() > end {
                self.fail(&format!("n{n} does not come back"));
            }
            self.runtime.sleep(Duration::from_millis(100)).await;
        }
    }

    /// What must come to an end when everything is well.
    async fn in_time<T>(&self, what: &str, work: impl Future<Output = T>) -> T {
        tokio::select! {
            biased;
            done = work => done,
            () = self.runtime.sleep(PROGRESS_WITHIN) => {
                self.note_locks();
                self.fail(&format!("it never ends: {what}"))
            }
        }
    }

    /// Locks in use, on their way or waited for.
    fn note_locks(&self) {
        for (n, daemon) in self.daemons.lock().iter() {
            for lock in daemon.lcl.snapshot().cached {
                let quiet = lock.users.is_empty() && lock.waiters.is_empty() && lock.asking.is_none();
                if !quiet || lock.phase != lcl::Phase::Open {
                    self.note(format!("n{n} {:?} {lock:?}", LockName::from_resource(&lock.res)));
                }
            }
        }
    }

    async fn check_disk(&self) {
        let device: Arc<dyn Device> = Arc::new(self.disk.clone());
        let label = Label::read(&*device).await.expect("the label is there");
        let report = fsck::check_at(device, label.fs_start, fsck::Options::default()).await;
        if !report.is_clean() {
            self.fail(&format!("fsck: {report:#?}"));
        }
        let _: Instant = self.runtime.now();
    }
}
