//! One start of a daemon in the simulation: the real slot keeper, register, fences, membership core, locks and
//! filesystem, put together as src/cluster and src/daemon do it, with events in the place of threads and sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use dlm::Fault;
use lcl::{Lcl, Wire};
use membership::times::HEARTBEAT_MS;
use membership::{Applicant, CasOutcome, Input, Membership, NodeSet, Output, Phase, SlotSeen, View, codec};
use mfs::callouts::NoKernelCache;
use mfs::format::superblock::Superblock;
use mfs::{Filesystem, Options, Parts};
use parking_lot::Mutex;
use storage_control::fence::{Fencer, LeaseExpiry};
use storage_control::lease::LeaseTimes;
use storage_control::process::ProcessIdentity;
use storage_control::slots::{
    Beat, Claimant, Look, NO_ADDRESS, NoLocks, Nonce, PeerSet, RenewError, Renewed, SlotArea, SlotKeeper,
    SlotLocks, SlotRecord, SlotState, Watch, claim,
};
use storage_control::{
    Clock, CloseReason, Device, Gate, GateRefused, Incarnation, Instant, Label, LamportClock, NodeId,
    Outcome, Register, Runtime, WriteLife,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, watch};

use crate::disk::{Path, WRITE_LIFE};
use crate::host::Host;
use crate::net::{Frame, Net, Who};
use crate::patient::PatientDevice;

/// What reaches a daemon.
pub(crate) enum Event {
    Input(Input),
    Frame(Who, Frame),
    Looked(Box<Look>),
    Renewal(Renewal),
    Read(Instant, Option<(u64, Arc<View>)>),
    Tick,
}

pub(crate) enum Renewal {
    Renewed(bool),
    Behind,
    Expired,
    Closed(String),
}

/// How far a daemon has come.
#[derive(Clone)]
pub(crate) enum Progress {
    Joining,
    Mounted(Arc<Filesystem>),
    /// It has left in order.
    Left,
    /// It was refused or thrown out.
    Over(String),
}

/// What the world sees of a daemon.
#[derive(Clone)]
pub(crate) struct Daemon {
    pub(crate) who: Who,
    pub(crate) lcl: Lcl,
    pub(crate) gate: Gate,
    pub(crate) progress: watch::Receiver<Progress>,
    events: UnboundedSender<Event>,
    /// The view installed last.
    pub(crate) installed: Arc<Mutex<Option<Arc<View>>>>,
    /// Journals that this daemon replays, whose blocks it writes without locks.
    pub(crate) replaying: Arc<Mutex<BTreeSet<u16>>>,
}

impl Daemon {
    pub(crate) fn filesystem(&self) -> Option<Arc<Filesystem>> {
        match &*self.progress.borrow() {
            Progress::Mounted(fs) => Some(Arc::clone(fs)),
            Progress::Joining | Progress::Left | Progress::Over(_) => None,
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        matches!(*self.progress.borrow(), Progress::Over(_) | Progress::Left)
    }

    /// Unmounts and leaves; why not, if that failed.
    pub(crate) async fn leave(&self) -> Result<(), String> {
        let fs = self.filesystem().ok_or("it is not mounted")?;
        fs.unmount().await.map_err(|error| error.to_string())?;
        let _ = self.events.send(Event::Input(Input::Leave));
        let mut progress = self.progress.clone();
        let end = progress.wait_for(|now| matches!(now, Progress::Left | Progress::Over(_))).await;
        match end.as_deref() {
            Ok(Progress::Over(why)) => Err(why.clone()),
            _ => Ok(()),
        }
    }
}

/// Lock messages to the net.
struct SimWire {
    net: Net,
    me: Who,
}

impl Wire for SimWire {
    fn send(&self, to: NodeId, message: dlm::Message) {
        self.net.send(self.me, to, Frame::Lock(message.generation, message));
    }

    fn fault(&self, from: NodeId, fault: Fault) {
        panic!("{:?} finds a fault of {from}: {fault}", self.me);
    }
}

struct Driver {
    me: Who,
    core: Membership,
    keeper: SlotKeeper,
    gate: Gate,
    register: Register,
    runtime: Arc<dyn Runtime>,
    lcl: Lcl,
    net: Net,
    fencer: Arc<Fencer>,
    clock: Arc<LamportClock>,
    device: Arc<dyn Device>,
    label: Label,
    events: UnboundedSender<Event>,
    poke: Arc<Notify>,
    publication: Arc<Mutex<(PeerSet, bool)>>,
    installed: Arc<Mutex<Option<Arc<View>>>>,
    replaying: Arc<Mutex<BTreeSet<u16>>>,
    progress: watch::Sender<Progress>,
    mounted: watch::Receiver<Option<Arc<Filesystem>>>,
    member: watch::Sender<Option<u16>>,
    slots: BTreeMap<NodeId, SlotRecord>,
    claims: BTreeMap<Who, SlotRecord>,
    acknowledged: u64,
    admitted: bool,
    behind: bool,
    read_began: Instant,
    adopted: BTreeSet<u16>,
    over: bool,
}

/// Claims a slot and starts everything; the filesystem is mounted when the node is a member.
pub(crate) async fn start(host: Host, path: Path, net: Net, name: String) -> Result<Daemon, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let runtime: Arc<dyn Runtime> = Arc::new(host.clone());
    let label = Label::read(&path).await.map_err(|e| text(&e))?;
    let gate = Gate::new(Arc::new(path), Arc::clone(&runtime));
    let area = SlotArea::new(&gate, label.clone(), Arc::clone(&runtime));
    let times = LeaseTimes { write_life: WriteLife::Bounded(WRITE_LIFE) };
    let locks: Arc<dyn SlotLocks> = Arc::new(NoLocks);
    let claimant = Claimant {
        node_name: name.clone(),
        host_name: name.clone(),
        process: ProcessIdentity { boot_id: Nonce::random().0, pid: 1, start_time: 1 },
        address: NO_ADDRESS,
        fingerprint: [7; 32],
    };
    let claimed = claim(&area, &gate, &locks, claimant, times).await.map_err(|e| text(&e))?;
    let clock = Arc::new(LamportClock::default());
    clock.receive(claimed.clock).map_err(|e| text(&e))?;
    let keeper = claimed.keeper;
    let me: Who = (keeper.node(), keeper.incarnation());
    let wire = Arc::new(SimWire { net: net.clone(), me });
    let lcl = Lcl::new(me.0, me.1, Arc::clone(&runtime), wire, lcl::Config::default());
    let (events, inbox) = unbounded_channel();
    net.enter(me, host, events.clone(), Arc::clone(&clock));
    let seen: Arc<Mutex<Watch>> = Arc::default();
    let expiry = LeaseExpiry::new(area.clone(), Arc::clone(&seen), times, Arc::clone(&runtime));
    let (progress, watched) = watch::channel(Progress::Joining);
    let (fs_there, mounted) = watch::channel(None);
    let (member, admitted) = watch::channel(None);
    let applicant = Applicant { node: me.0, incarnation: me.1, name, addr: NO_ADDRESS, fingerprint: [7; 32] };
    let device: Arc<dyn Device> = Arc::new(PatientDevice::new(gate.clone(), Arc::clone(&runtime)));
    let driver = Driver {
        me,
        core: Membership::new(applicant, label.quorum.slots, runtime.now()),
        register: Register::on_device(
            me.0,
            gate.register_device(),
            &label,
            Arc::clone(&runtime),
            u64::from(me.0.0) << 32 | me.1.0,
        ),
        keeper: keeper.clone(),
        gate: gate.clone(),
        runtime: Arc::clone(&runtime),
        lcl: lcl.clone(),
        net,
        fencer: Arc::new(Fencer::new(vec![Box::new(expiry)], Arc::clone(&runtime))),
        clock: Arc::clone(&clock),
        device: Arc::clone(&device),
        label: label.clone(),
        events: events.clone(),
        poke: Arc::default(),
        publication: Arc::default(),
        installed: Arc::default(),
        replaying: Arc::default(),
        progress,
        mounted: mounted.clone(),
        member,
        slots: BTreeMap::new(),
        claims: BTreeMap::new(),
        acknowledged: 0,
        admitted: false,
        behind: false,
        read_began: runtime.now(),
        adopted: BTreeSet::new(),
        over: false,
    };
    let daemon = Daemon {
        who: me,
        lcl: lcl.clone(),
        gate: gate.clone(),
        progress: watched,
        events: events.clone(),
        installed: Arc::clone(&driver.installed),
        replaying: Arc::clone(&driver.replaying),
    };
    let poke = Arc::clone(&driver.poke);
    let renewals = Renewals {
        keeper,
        clock: Arc::clone(&clock),
        runtime: Arc::clone(&runtime),
        watch: seen,
        publication: Arc::clone(&driver.publication),
        events: events.clone(),
        mounted: mounted.clone(),
    };
    runtime.spawn(Box::pin(renewals.run(poke)));
    let ticking = (Arc::clone(&runtime), events);
    runtime.spawn(Box::pin(async move {
        let (runtime, events) = ticking;
        while events.send(Event::Tick).is_ok() {
            runtime.sleep(Duration::from_millis(100)).await;
        }
    }));
    let tell = driver.progress.clone();
    let mount =
        Mount { device, label, gate, lcl, clock, runtime: Arc::clone(&runtime), admitted, fs_there, tell };
    runtime.spawn(Box::pin(driver.run(inbox)));
    runtime.spawn(Box::pin(mount.run()));
    Ok(daemon)
}

/// Mounts when the node is a member with a lease.
struct Mount {
    device: Arc<dyn Device>,
    label: Label,
    gate: Gate,
    lcl: Lcl,
    clock: Arc<LamportClock>,
    runtime: Arc<dyn Runtime>,
    admitted: watch::Receiver<Option<u16>>,
    fs_there: watch::Sender<Option<Arc<Filesystem>>>,
    tell: watch::Sender<Progress>,
}

impl Mount {
    async fn run(mut self) {
        let journal = match self.admitted.wait_for(Option::is_some).await {
            Ok(journal) => journal.expect("waited for"),
            Err(_) => return,
        };
        match self.mount(journal).await {
            Ok(fs) => {
                self.fs_there.send_replace(Some(Arc::clone(&fs)));
                let withdrawing = Arc::clone(&fs);
                self.tell.send_if_modified(|now| {
                    let joining = matches!(now, Progress::Joining);
                    if joining {
                        *now = Progress::Mounted(fs);
                    }
                    joining
                });
                // As the daemon does: a filesystem that withdrew is the end of the node.
                let why = withdrawing.withdrawn().await;
                self.gate.close(CloseReason::Withdrawn(why.clone()));
                self.tell.send_if_modified(|now| {
                    let over = matches!(now, Progress::Left | Progress::Over(_));
                    if !over {
                        *now = Progress::Over(why);
                    }
                    !over
                });
            }
            Err(error) => {
                self.gate.close(CloseReason::Withdrawn(error.to_string()));
                self.tell.send_replace(Progress::Over(format!("not mounted: {error}")));
            }
        }
    }

    async fn mount(&self, journal: u16) -> Result<Arc<Filesystem>, mfs::FsError> {
        let (superblock, _) = Superblock::read(&*self.device, self.label.fs_start).await?;
        let (gate, clock) = (self.gate.clone(), Arc::clone(&self.runtime));
        let lease = move || match gate.check() {
            Ok(()) => gate.lease_until().unwrap_or_default().since(clock.now()),
            Err(_) => Duration::ZERO,
        };
        let parts = Parts {
            device: Arc::clone(&self.device),
            superblock,
            journal,
            lcl: self.lcl.clone(),
            clock: Arc::clone(&self.clock),
            runtime: Arc::clone(&self.runtime),
            kernel: Arc::new(NoKernelCache),
            lease: Arc::new(lease),
        };
        Filesystem::mount(parts, Options::default()).await
    }
}

/// Renews the slot every second and looks at all slots twice a second.
struct Renewals {
    keeper: SlotKeeper,
    clock: Arc<LamportClock>,
    runtime: Arc<dyn Runtime>,
    watch: Arc<Mutex<Watch>>,
    publication: Arc<Mutex<(PeerSet, bool)>>,
    events: UnboundedSender<Event>,
    mounted: watch::Receiver<Option<Arc<Filesystem>>>,
}

impl Renewals {
    async fn run(self, poke: Arc<Notify>) {
        let mut due = self.runtime.now();
        loop {
            let now = self.runtime.now();
            if now >= due {
                due = now + LeaseTimes::RENEW_EVERY;
                if !self.renew().await {
                    return;
                }
            } else {
                match self.keeper.area().look().await {
                    Ok(look) => self.seen(look),
                    Err(_) => self.watch.lock().stalled(),
                }
            }
            let wait = due.since(self.runtime.now()).min(Duration::from_millis(HEARTBEAT_MS));
            tokio::select! {
                biased;
                () = poke.notified() => due = self.runtime.now(),
                () = self.runtime.sleep(wait) => {}
            }
        }
    }

    fn seen(&self, look: Look) {
        self.watch.lock().observe(&look);
        let _ = self.events.send(Event::Looked(Box::new(look)));
    }

    async fn renew(&self) -> bool {
        let (heard, healthy) = *self.publication.lock();
        let journal_tail = self.mounted.borrow().as_ref().map_or(Clock(0), |fs| fs.store().tail_clock());
        let beat = Beat { clock: self.clock.now(), journal_tail, heard, health: u32::from(!healthy) };
        let news = match self.keeper.renew(beat).await {
            Ok(Renewed::Renewed { look, until }) => {
                self.seen(look);
                Renewal::Renewed(until.is_some())
            }
            Ok(Renewed::Behind { look }) => {
                self.seen(look);
                Renewal::Behind
            }
            Ok(Renewed::Expired { look }) => {
                self.seen(look);
                Renewal::Expired
            }
            Err(RenewError::Closed(reason)) => {
                let _ = self.events.send(Event::Renewal(Renewal::Closed(reason.to_string())));
                return false;
            }
            Err(RenewError::Io(_) | RenewError::Label(_) | RenewError::Delayed) => {
                self.watch.lock().stalled();
                return true;
            }
        };
        self.events.send(Event::Renewal(news)).is_ok()
    }
}

impl Driver {
    async fn run(mut self, mut inbox: UnboundedReceiver<Event>) {
        while let Some(event) = inbox.recv().await {
            self.happened(event);
            if self.over {
                return;
            }
        }
    }

    fn happened(&mut self, event: Event) {
        match event {
            Event::Input(input) => self.give(input),
            Event::Tick => {
                self.give(Input::Tick);
                if let Some(fs) = self.mounted.borrow().as_ref() {
                    fs.store().set_peer_tail(self.least_tail());
                    if self.gate.closed().is_some() {
                        fs.withdraw("the gate is closed");
                    }
                }
            }
            Event::Frame(from, Frame::Membership(message)) => {
                let bytes = codec::encode_message(&message);
                let message = codec::decode_message(&bytes).expect("what is sent can be read");
                self.give(Input::Received { node: from.0, incarnation: from.1, message });
            }
            Event::Frame(from, Frame::Lock(generation, message)) => {
                let passes = self
                    .installed
                    .lock()
                    .as_ref()
                    .is_none_or(|view| view.is_member(from.0, from.1) || generation > view.generation);
                if passes {
                    self.lcl.message(from.0, message).expect("members are correct");
                }
            }
            Event::Looked(look) => self.looked(&look),
            Event::Read(began, content) => {
                self.read_began = began;
                self.give(Input::RegisterRead(content));
            }
            Event::Renewal(Renewal::Renewed(leased)) => {
                let member = self.core.register().and_then(|(_, view)| view.member(self.me.0).cloned());
                let member = member.filter(|member| member.incarnation == self.me.1);
                if let (true, Some(member), Phase::Member) = (leased, member, self.core.phase()) {
                    self.member.send_if_modified(|now| now.replace(member.journal).is_none());
                }
            }
            Event::Renewal(Renewal::Behind) => {
                self.behind = true;
                self.give(Input::RegisterMoved);
            }
            Event::Renewal(Renewal::Expired) => self.give(Input::LeaseLapsed),
            Event::Renewal(Renewal::Closed(why)) => self.finish(Progress::Over(why)),
        }
    }

    fn give(&mut self, input: Input) {
        self.core.handle(self.runtime.now(), input);
        while let Some(output) = self.core.poll() {
            self.carry_out(output);
        }
        if !self.over {
            self.follow_up();
        }
    }

    fn follow_up(&mut self) {
        let (heard, healthy) = self.core.publication();
        *self.publication.lock() = (heard.iter().collect(), healthy);
        let Some((sequence, view)) = self.core.register().cloned() else { return };
        let forming =
            view.members.is_empty() && view.candidate.is_some_and(|c| (c.node, c.incarnation) == self.me);
        if !self.admitted && (forming || view.is_member(self.me.0, self.me.1)) {
            self.admitted = true;
            self.keeper.admit();
            self.poke.notify_one();
        }
        if sequence > self.acknowledged {
            self.acknowledged = sequence;
            self.keeper.acknowledge(sequence);
            if std::mem::take(&mut self.behind) {
                self.poke.notify_one();
            }
        }
        self.meet();
        let members = view.members.values().map(|m| (m.node, m.incarnation));
        let live = self.slots.values().filter(|record| record.state != SlotState::Stopped);
        let mut trusted: BTreeMap<NodeId, Incarnation> = members.collect();
        for record in live {
            let known = trusted.entry(record.node).or_insert(record.incarnation);
            *known = (*known).max(record.incarnation);
        }
        trusted.remove(&self.me.0);
        self.net.set_trust(self.me, trusted.into_iter().collect());
    }

    fn meet(&self) {
        let peers = self.core.peers().into_iter().map(|member| (member.node, member.incarnation));
        self.net.set_peers(self.me, peers.collect());
    }

    fn looked(&mut self, look: &Look) {
        self.slots = look.records().map(|record| (record.node, record.clone())).collect();
        for record in look.records() {
            self.claims.insert((record.node, record.incarnation), record.clone());
        }
        let seen = self.slots.values().filter(|record| record.node != self.me.0);
        let seen = seen.map(|record| SlotSeen {
            node: record.node,
            incarnation: record.incarnation,
            sequence: record.sequence,
            heard: record.heard.iter().collect::<NodeSet>(),
            healthy: record.health == 0,
            stopped: record.state == SlotState::Stopped,
            unfenceable: None,
            name: record.node_name.clone(),
            addr: record.address,
            fingerprint: record.fingerprint,
        });
        let seen = seen.collect();
        let moved = self.core.register().is_some_and(|(sequence, _)| look.head.sequence > *sequence);
        self.give(Input::Slots(seen));
        if moved && !self.over {
            self.give(Input::RegisterMoved);
        }
    }

    fn spawn(&self, task: impl Future<Output = Event> + Send + 'static) {
        let events = self.events.clone();
        self.runtime.spawn(Box::pin(async move {
            let _ = events.send(task.await);
        }));
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::ReadRegister => {
                let (register, runtime) = (self.register.clone(), Arc::clone(&self.runtime));
                self.spawn(async move {
                    let began = runtime.now();
                    match register.read().await {
                        Ok(content) => {
                            let view = codec::decode_view(&content.body).expect("the register holds views");
                            Event::Read(began, Some((content.sequence, Arc::new(view))))
                        }
                        Err(_) => {
                            runtime.sleep(Duration::from_millis(200)).await;
                            Event::Read(began, None)
                        }
                    }
                });
            }
            Output::Cas { expected, view } => {
                let register = self.register.clone();
                self.spawn(async move {
                    let outcome = match register.cas(expected, codec::encode_view(&view)).await {
                        Ok(Outcome::Committed { sequence }) => CasOutcome::Committed(sequence),
                        Ok(Outcome::Conflict(content)) => {
                            let view = codec::decode_view(&content.body).expect("the register holds views");
                            CasOutcome::Conflict(content.sequence, Arc::new(view))
                        }
                        Ok(Outcome::Unknown { .. }) | Err(_) => CasOutcome::Unknown,
                    };
                    Event::Input(Input::CasDone(outcome))
                });
            }
            Output::InstallView(view) => {
                self.meet();
                let clean: BTreeSet<u16> = view.clean_journals().collect();
                self.adopted.retain(|journal| clean.contains(journal));
                self.adopt(&view, clean);
                self.lcl.install_view(Arc::clone(&view));
                *self.installed.lock() = Some(view);
            }
            Output::Fenced { node, incarnation } => self.lcl.fenced(node, incarnation),
            Output::Recovered { node, incarnation } => {
                self.lcl.recovered(node, incarnation);
                let view = self.installed.lock().clone();
                if let Some(view) = view {
                    let journal = view.recovery(node, incarnation).and_then(|recovery| recovery.journal);
                    self.adopt(&view, journal.into_iter().collect());
                }
            }
            Output::Send { to, message } => self.net.send(self.me, to, Frame::Membership(message)),
            // Without proofs there is nothing to look for.
            Output::Probe { .. } => {}
            Output::Fence { node, incarnation } => self.fence(node, incarnation),
            Output::Replay { node, incarnation, journal } => self.replay(node, incarnation, journal),
            Output::MakeJournal { index } => {
                let (mut mounted, lcl) = (self.mounted.clone(), self.lcl.clone());
                self.spawn(async move {
                    let result = match mounted.wait_for(Option::is_some).await.ok().and_then(|fs| fs.clone())
                    {
                        Some(fs) => mfs::mkfs::make_journal(fs.alloc(), &lcl, index)
                            .await
                            .map(drop)
                            .map_err(|error| error.to_string()),
                        None => Err(String::from("not mounted")),
                    };
                    Event::Input(Input::JournalMade { index, result })
                });
            }
            // There is one device, and it is here.
            Output::FindDevices(view) => {
                let input = Input::DevicesFound { version: view.names.version, result: Ok(()) };
                self.spawn(async move { Event::Input(input) });
            }
            Output::ReviveLease => {
                self.keeper.revive(self.read_began);
                self.poke.notify_one();
            }
            Output::CloseGate(reason) => {
                self.gate.close(CloseReason::Excluded);
                self.finish(Progress::Over(reason.to_string()));
            }
            Output::Left => self.finish(Progress::Left),
            Output::Refused(refusal) => self.finish(Progress::Over(refusal.to_string())),
            Output::Notice(_) => {}
        }
    }

    fn adopt(&mut self, view: &View, clean: BTreeSet<u16>) {
        if view.adm != self.me.0 {
            return;
        }
        for journal in clean.into_iter().filter(|journal| self.adopted.insert(*journal)) {
            let mut mounted = self.mounted.clone();
            self.runtime.spawn(Box::pin(async move {
                let fs = mounted.wait_for(Option::is_some).await.ok().and_then(|fs| fs.clone());
                if let Some(fs) = fs {
                    let _ = fs.adopt(journal).await;
                }
            }));
        }
    }

    fn fence(&self, node: NodeId, incarnation: Incarnation) {
        let record = self.claims.get(&(node, incarnation)).cloned().unwrap_or_else(|| SlotRecord {
            node,
            state: SlotState::Held,
            nonce: Nonce([0; 16]),
            incarnation,
            sequence: 0,
            clock: Clock(0),
            journal_tail: Clock(0),
            process: Default::default(),
            file: Default::default(),
            health: 0,
            address: NO_ADDRESS,
            fingerprint: [0; 32],
            heard: PeerSet::default(),
            node_name: String::new(),
            host_name: String::new(),
        });
        let fencer = Arc::clone(&self.fencer);
        self.spawn(async move {
            let result = fencer.fence(&record).await.map(drop).map_err(|error| error.to_string());
            Event::Input(Input::FenceDone { node, incarnation, result })
        });
    }

    fn replay(&self, node: NodeId, incarnation: Incarnation, journal: u16) {
        let (gate, runtime, device) =
            (self.gate.clone(), Arc::clone(&self.runtime), Arc::clone(&self.device));
        let (clock, start, replaying) =
            (Arc::clone(&self.clock), self.label.fs_start, Arc::clone(&self.replaying));
        self.spawn(async move {
            let result = async {
                while let Err(refused) = gate.check() {
                    match refused {
                        GateRefused::NoLease => runtime.sleep(Duration::from_millis(5)).await,
                        closed @ GateRefused::Closed(_) => return Err(closed.to_string()),
                    }
                }
                let (superblock, _) = Superblock::read(&*device, start).await.map_err(|e| e.to_string())?;
                replaying.lock().insert(journal);
                let done = mfs::journal::replay(&device, &superblock, journal, &runtime).await;
                replaying.lock().remove(&journal);
                let done = done.map_err(|e| e.to_string())?;
                clock.receive(done.clock).map_err(|e| e.to_string())
            };
            let result = result.await.map(drop);
            Event::Input(Input::ReplayDone { node, incarnation, result })
        });
    }

    /// The least clock that may be in any journal; zero while one is not known.
    fn least_tail(&self) -> Clock {
        let Some((_, view)) = self.core.register() else { return Clock(0) };
        let writers = view.members.values().map(|member| (member.node, member.incarnation));
        let open = view.recoveries.iter().filter(|r| r.journal.is_some()).map(|r| (r.node, r.incarnation));
        let tail = |(node, incarnation): Who| {
            let record = self.slots.get(&node).filter(|record| record.incarnation == incarnation);
            record.map_or(Clock(0), |record| record.journal_tail)
        };
        writers.chain(open).map(tail).min().unwrap_or_default()
    }

    fn finish(&mut self, end: Progress) {
        self.over = true;
        if let Progress::Over(why) = &end {
            self.gate.close(CloseReason::Withdrawn(why.clone()));
            self.lcl.close(why);
            if let Some(fs) = &*self.mounted.borrow() {
                fs.withdraw(why);
            }
        }
        let (keeper, net, me, progress) =
            (self.keeper.clone(), self.net.clone(), self.me, self.progress.clone());
        let left = matches!(end, Progress::Left);
        if !left {
            net.leave(me);
            progress.send_replace(end.clone());
        }
        self.runtime.spawn(Box::pin(async move {
            let _ = keeper.release().await;
            if left {
                net.leave(me);
                progress.send_replace(end);
            }
        }));
    }
}
