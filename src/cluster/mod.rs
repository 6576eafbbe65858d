//! One node's place in the matrix: slot, lease, membership and connections, put together.
//!
//! The way in has three steps: [`claim`] takes a slot, which tells the node its number; [`Claimed::join`] starts the
//! threads with the daemon's hooks; [`Cluster::admitted`] waits until this node is a member with a lease and says which
//! journal is its own. Nothing of the filesystem may be written before, replays aside.
//!
//! Threads: the renewal (nothing else may delay it), the driver of the membership core, the interconnect.

mod devices;
mod driver;
mod fencing;
mod inbox;
mod medium;
mod register;
mod renewal;
#[cfg(test)]
mod tests;

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender, bounded};
use membership::frame::Channel;
use membership::{Applicant, Input, MAX_NAME, Membership, View};
use parking_lot::{Mutex, RwLock};
use storage_control::fence::UnderWay;
use storage_control::lease::LeaseTimes;
use storage_control::process::ProcessIdentity;
use storage_control::slots::{ClaimError, Claimant, SlotArea, SlotKeeper, SlotLocks, Watch};
use storage_control::{
    BoxFuture, Clock, DeviceName, Gate, Generation, Incarnation, Instant, Label, LamportClock, NodeId,
    Register, Runtime, WriteLife,
};

pub(crate) use driver::{Progress, Shown};
pub(crate) use fencing::FenceChoice;

use crate::interconnect::{Interconnect, NodeKey, Setup, Stats, Who};
use devices::Opened;
use driver::{Driver, Event, MAX_EVENTS};
use fencing::Fencing;
use inbox::Inbox;
use medium::NonceBlocks;
use renewal::{Publication, Renewal};

/// What the cluster asks of the daemon. All but the futures are called from the cluster's own threads and must return
/// soon; none may call [`Cluster::leave`] or wait for anything that needs another hook.
pub(crate) trait ClusterHooks: Send + Sync + 'static {
    /// A view with this node in it: to the lock manager, before this returns. Views come in rising generations.
    fn install_view(&self, view: Arc<View>);
    /// That incarnation can write nothing more.
    fn fenced(&self, node: NodeId, incarnation: Incarnation);
    /// And its journal is replayed: its locks are free. Comes after `fenced` of the same incarnation.
    fn recovered(&self, node: NodeId, incarnation: Incarnation);
    /// Replays a dead node's journal and makes the result stable. May come before this node has mounted (it forms the
    /// matrix), again after a failure, and twice for one journal in the life of a matrix.
    fn replay(&self, journal: u16) -> BoxFuture<Result<(), String>>;
    /// Makes a journal; one that exists already is a success. Comes only to a member; waits for its mount by itself.
    fn make_journal(&self, index: u16) -> BoxFuture<Result<(), String>>;
    /// A lock message, in the interconnect's thread. `Err`: no correct member sends it, the connection is closed.
    fn dlm_frame(&self, from: NodeId, payload: &[u8]) -> Result<(), String>;
    /// Nothing in this node's journal is older; published with every renewal.
    fn journal_tail(&self) -> Clock;
    /// True: the lease ran out, and may come back. Until then nothing that locks protect may be shown to programs.
    fn suspended(&self, suspended: bool);
    /// This node's part is over: the gate is shut for good. Locks are void, programs get errors.
    fn closed(&self, reason: &str);
}

/// The device as a node of a cluster needs it.
pub(crate) struct Storage {
    /// In front of the device.
    pub(crate) gate: Gate,
    /// As it was read from the device.
    pub(crate) label: Label,
    /// The file device itself: locks lie on its descriptor.
    pub(crate) locks: Arc<dyn SlotLocks>,
    /// Of the device, with the label's bound.
    pub(crate) write_life: WriteLife,
}

/// What the operator chose.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The node's name, unique in the matrix; at most 64 bytes.
    pub(crate) name: String,
    /// Where to listen; port 0 takes any.
    pub(crate) listen: SocketAddr,
    /// What others are told to connect to, where it is not the address listened on.
    pub(crate) advertise: Option<SocketAddr>,
    /// Holds the node's key.
    pub(crate) run_dir: PathBuf,
    /// The name that the device must have in the matrix, where the operator gave one.
    pub(crate) device: Option<DeviceName>,
    /// Which fence methods to use.
    pub(crate) fence: FenceChoice,
}

/// Why a node has no place in the matrix.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterError {
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {error}; choose another with --listen")]
    Listen {
        addr: SocketAddr,
        #[source]
        error: std::io::Error,
    },
    /// No key.
    #[error("the node's key in {directory}: {error}")]
    Key {
        directory: PathBuf,
        #[source]
        error: std::io::Error,
    },
    /// Too long a name.
    #[error("the node name {0:?} is longer than {MAX_NAME} bytes, or empty; choose another with --node")]
    Name(String),
    /// No slot.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// A thread or socket could not be made.
    #[error("starting the cluster's threads: {0}")]
    Io(#[from] std::io::Error),
    /// Refused, excluded, or its slot or disk is lost.
    #[error("{0}")]
    Over(String),
}

/// A claimed slot, not yet used.
pub(crate) struct Claimed {
    storage: Storage,
    config: Config,
    listener: TcpListener,
    addr: SocketAddr,
    key: NodeKey,
    keeper: SlotKeeper,
    clock: Arc<LamportClock>,
    runtime: Arc<dyn Runtime>,
}

/// Takes a slot. May wait: where no lock proves that its last holder is gone, time must.
pub(crate) async fn claim(
    storage: Storage,
    config: Config,
    clock: Arc<LamportClock>,
    runtime: Arc<dyn Runtime>,
) -> Result<Claimed, ClusterError> {
    if config.name.is_empty() || config.name.len() > MAX_NAME {
        return Err(ClusterError::Name(config.name));
    }
    let key = NodeKey::load_or_create(&config.run_dir)
        .map_err(|error| ClusterError::Key { directory: config.run_dir.clone(), error })?;
    let listen_error = |error| ClusterError::Listen { addr: config.listen, error };
    let listener = TcpListener::bind(config.listen).map_err(listen_error)?;
    let port = listener.local_addr().map_err(listen_error)?.port();
    let mut addr = config.advertise.unwrap_or(config.listen);
    if addr.port() == 0 {
        addr.set_port(port);
    }
    let claimant = Claimant {
        node_name: config.name.clone(),
        host_name: storage_control::process::host_name()?,
        process: ProcessIdentity::current()?,
        address: addr,
        fingerprint: key.fingerprint(),
    };
    let area = SlotArea::new(&storage.gate, storage.label.clone(), Arc::clone(&runtime));
    let times = LeaseTimes { write_life: storage.write_life };
    let claimed =
        storage_control::slots::claim(&area, &storage.gate, &storage.locks, claimant, times).await?;
    clock.receive(claimed.clock).map_err(|error| ClusterError::Over(error.to_string()))?;
    Ok(Claimed { storage, config, listener, addr, key, keeper: claimed.keeper, clock, runtime })
}

impl Claimed {
    /// The node's number.
    pub(crate) fn node(&self) -> NodeId {
        self.keeper.node()
    }

    /// This start of its daemon.
    pub(crate) fn incarnation(&self) -> Incarnation {
        self.keeper.incarnation()
    }

    /// Starts the threads; from here on hooks are called.
    pub(crate) fn join(self, hooks: Arc<dyn ClusterHooks>) -> Result<Cluster, ClusterError> {
        let me: Who = (self.node(), self.incarnation());
        let area = self.keeper.area().clone();
        let times = LeaseTimes { write_life: self.storage.write_life };
        let watch: Arc<Mutex<Watch>> = Arc::default();
        let fencing = Arc::new(Fencing::new(
            self.config.fence,
            me.0,
            &area,
            &self.storage.locks,
            times,
            Arc::clone(&watch),
            &self.runtime,
        )?);
        let (events, inbox) = bounded(MAX_EVENTS);
        let (poke, poked) = bounded(1);
        let installed: Arc<RwLock<Option<Arc<View>>>> = Arc::default();
        let applicant = Applicant {
            node: me.0,
            incarnation: me.1,
            name: self.config.name.clone(),
            addr: self.addr,
            fingerprint: self.key.fingerprint(),
        };
        let handler = Inbox {
            events: events.clone(),
            hooks: Arc::clone(&hooks),
            installed: Arc::clone(&installed),
            looked: Mutex::default(),
        };
        let net = Arc::new(Interconnect::start(Setup {
            me,
            matrix: area.fs(),
            key: self.key,
            listener: self.listener,
            clock: Arc::clone(&self.clock),
            medium: Arc::new(NonceBlocks::new(me.0, area.clone())),
            handler: Arc::new(handler),
        })?);
        let publication: Arc<Mutex<Publication>> = Arc::default();
        let shown: Arc<Mutex<Shown>> = Arc::default();
        let (progress, watched) = tokio::sync::watch::channel(Progress::Joining(None));
        let register = Register::on_device(
            me.0,
            self.storage.gate.register_device(),
            &self.storage.label,
            Arc::clone(&self.runtime),
            random_seed(),
        );
        let renewal = Renewal {
            keeper: self.keeper.clone(),
            clock: self.clock,
            runtime: Arc::clone(&self.runtime),
            hooks: Arc::clone(&hooks),
            watch,
            publication: Arc::clone(&publication),
            events: events.clone(),
        };
        let opened = Opened {
            label: self.storage.label.clone(),
            device: self.storage.gate.register_device(),
            expected: self.config.device,
        };
        let driver = Driver {
            me,
            core: Membership::new(applicant, self.storage.label.quorum.slots, self.runtime.now()),
            keeper: self.keeper,
            gate: self.storage.gate.clone(),
            register,
            opened,
            runtime: self.runtime,
            hooks,
            net: Arc::clone(&net),
            fencing: Arc::clone(&fencing),
            installed,
            publication,
            shown: Arc::clone(&shown),
            progress,
            events: events.clone(),
            poke,
            state: driver::State::default(),
        };
        start_thread("matrix-renew", move || renewal.run(&poked))?;
        start_thread("matrix-cluster", move || drive(driver, inbox))?;
        Ok(Cluster { me, gate: self.storage.gate, net, fencing, shown, progress: watched, events })
    }
}

fn drive(driver: Driver, inbox: Receiver<Event>) {
    driver.run(&inbox);
}

fn start_thread(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
}

/// Operations on the register are named from it.
fn random_seed() -> u64 {
    let bytes = uuid::Uuid::new_v4().into_bytes();
    u64::from_le_bytes(std::array::from_fn(|i| bytes[i] ^ bytes[i + 8]))
}

/// A running node. Dropping it does not leave: the threads go on until [`Cluster::leave`] or the process ends.
pub(crate) struct Cluster {
    me: Who,
    gate: Gate,
    net: Arc<Interconnect>,
    fencing: Arc<Fencing>,
    shown: Arc<Mutex<Shown>>,
    progress: tokio::sync::watch::Receiver<Progress>,
    events: Sender<Event>,
}

/// For `matrix status`.
pub(crate) struct Status {
    /// Number and incarnation of this node.
    pub(crate) me: Who,
    /// What the driver shows: view, slots, standings, notices.
    pub(crate) shown: Shown,
    /// When the lease runs out.
    pub(crate) lease_until: Option<Instant>,
    /// Fences that are waited for, and for what.
    pub(crate) fences: Vec<UnderWay>,
    /// What protects from a node that does not stop, by method.
    pub(crate) protection: Vec<(&'static str, String)>,
}

impl Cluster {
    /// Waits until this node is a member with a lease; its journal.
    pub(crate) async fn admitted(&self) -> Result<u16, ClusterError> {
        let mut progress = self.progress.clone();
        let reached = progress.wait_for(|now| !matches!(now, Progress::Joining(_))).await;
        match reached.as_deref() {
            Ok(Progress::Member(journal)) => Ok(*journal),
            Ok(Progress::Failed(why)) => Err(ClusterError::Over(why.clone())),
            Ok(Progress::Left | Progress::Joining(_)) => {
                Err(ClusterError::Over(String::from("the node has left")))
            }
            Err(_) => Err(ClusterError::Over(String::from("the cluster's driver has ended"))),
        }
    }

    /// How far the node is, as it changes: what a slow mount waits for, and the end.
    pub(crate) fn progress(&self) -> tokio::sync::watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Leaves in order: all locks are given up, the journal is empty, everything is stable. Nobody is fenced. Returns when
    /// the others know, and the slot says that this node has stopped.
    pub(crate) async fn leave(&self) -> Result<(), ClusterError> {
        let _ = self.events.send(Event::Input(Input::Leave));
        let mut progress = self.progress.clone();
        let reached = progress.wait_for(|now| matches!(now, Progress::Left | Progress::Failed(_))).await;
        match reached.as_deref() {
            Ok(Progress::Failed(why)) => Err(ClusterError::Over(why.clone())),
            Ok(Progress::Left | Progress::Joining(_) | Progress::Member(_)) => Ok(()),
            Err(_) => Err(ClusterError::Over(String::from("the cluster's driver has ended"))),
        }
    }

    /// Ends as a killed process does: nothing is said, nothing given back.
    #[cfg(test)]
    fn abandon(&self) {
        let _ = self.events.send(Event::Stop);
        self.net.stop();
    }

    /// Queues a lock message made under this generation. In order per member; what is lost is followed by a new view.
    pub(crate) fn send_dlm(&self, to: NodeId, generation: Generation, payload: &[u8]) {
        self.net.send(to, Channel::Dlm, generation, payload);
    }

    /// Cuts off a member that sent what no correct member sends; it may connect again, and a new view follows.
    pub(crate) fn disconnect(&self, node: NodeId, why: &str) {
        self.net.disconnect(node, why);
    }

    /// The least clock that may be in any journal, for the reuse of freed metadata. Zero while one is not known.
    pub(crate) fn least_journal_tail(&self) -> Clock {
        driver::least_tail(&self.shown.lock())
    }

    /// Frames sent and received.
    pub(crate) fn traffic(&self) -> &Stats {
        self.net.stats()
    }

    /// For people.
    pub(crate) fn status(&self) -> Status {
        Status {
            me: self.me,
            shown: self.shown.lock().clone(),
            lease_until: self.gate.lease_until(),
            fences: self.fencing.fencer.under_way(),
            protection: self.fencing.fencer.protection(),
        }
    }
}
