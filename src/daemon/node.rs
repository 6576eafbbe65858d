//! One node's mount: its parts, put together in the order in which they may begin and taken apart in the reverse.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lcl::Lcl;
use mfs::filesystem::{Filesystem, GatherTails, Options, Parts};
use mfs::format::superblock::Superblock;
use mfs::fuse::{self, FuseCache, Mounted};
use mfs::ops::Ino;
use storage_control::gate::CloseReason;
use storage_control::slots::SlotLocks;
use storage_control::{Device, DeviceInfo, FileDevice, Gate, Label, LamportClock, OpenAs, Runtime, block_on};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use super::hooks::Hooks;
use super::options::FenceMethod;
use super::patient::PatientDevice;
use super::wire::ClusterWire;
use super::{MountRequest, status};
use crate::cluster::{self, Cluster, ClusterHooks, Config, FenceChoice, Progress, Storage};
use crate::control::report::{Locks, Status};
use crate::failure::{Context, Failure};
use crate::runtime::RealRuntime;

/// How often the least journal tail of all nodes is looked at, for the reuse of freed metadata.
const TAILS_EVERY: Duration = Duration::from_secs(1);
/// How long a nearly full filesystem waits for the others' journals, how often it looks, and how long it then does
/// without.
const GATHER_WITHIN: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(50);
const GATHER_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// How long a node whose mount failed tries to leave in order.
const LEAVE_WITHIN: Duration = Duration::from_secs(10);

/// What the main loop must know.
pub(crate) enum News {
    /// The kernel mount is gone
    Unmounted,
    /// This node may no longer write
    MustStop(String),
}

/// The label of the filesystem on `device`.
pub(crate) fn read_label(device: &Path) -> Result<Label, Failure> {
    let how = OpenAs { write: false, threads: 1, ..OpenAs::default() };
    let opened = FileDevice::open(device, how).map_err(Failure::new)?;
    block_on(Label::read(&opened)).context(device.display())
}

/// A running mount.
pub(crate) struct Node {
    pub(super) request: MountRequest,
    pub(super) label: Label,
    pub(super) gate: Gate,
    pub(super) write_life: storage_control::WriteLife,
    /// Of the device, as it was opened.
    pub(super) info: DeviceInfo,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) lcl: Lcl,
    pub(super) cluster: Arc<Cluster>,
    pub(super) root: Ino,
    fs: Arc<Filesystem>,
    mounted: Arc<Mounted>,
}

/// A node that is a member and has not mounted yet.
struct Member {
    device: Arc<dyn Device>,
    clock: Arc<LamportClock>,
    lcl: Lcl,
    hooks: Arc<Hooks>,
    cluster: Arc<Cluster>,
    journal: u16,
}

impl Node {
    /// Mounts what `request` names; `tell` hears what happens to it later.
    pub(crate) async fn start(
        request: &MountRequest,
        runtime: Arc<RealRuntime>,
        tell: UnboundedSender<News>,
    ) -> Result<Node, Failure> {
        let name = request.device.display();
        let runtime: Arc<dyn Runtime> = runtime;
        let how = OpenAs { write: true, exclusive: true, ..OpenAs::default() };
        let file = FileDevice::open(&request.device, how).map_err(Failure::new)?;
        let label = Label::read(&file).await.context(&name)?;
        file.set_urgent_below(label.quorum.end());
        let write_life = file.medium().write_life(request.options.io_timeout.or(label.io_timeout));
        let info = DeviceInfo::of(&file);
        let gate = Gate::new(Arc::new(file.clone()), Arc::clone(&runtime));
        let storage = Storage {
            gate: gate.clone(),
            label: label.clone(),
            locks: Arc::new(file) as Arc<dyn SlotLocks>,
            write_life,
        };
        let member = join(request, storage, &runtime, tell.clone()).await.context(&name)?;
        let (lcl, cluster) = (member.lcl.clone(), Arc::clone(&member.cluster));
        let (hooks, journal) = (Arc::clone(&member.hooks), member.journal);
        match serve(request, &label, &gate, &runtime, member, tell).await {
            Ok((fs, mounted, root)) => Ok(Node {
                request: request.clone(),
                label,
                gate,
                write_life,
                info,
                runtime,
                lcl,
                cluster,
                root,
                fs,
                mounted,
            }),
            Err(failure) => {
                // The journal may have been taken into use: it is emptied, or the others recover it.
                match hooks.replay(journal).await {
                    Ok(()) => drop(tokio::time::timeout(LEAVE_WITHIN, cluster.leave()).await),
                    Err(why) => gate.close(CloseReason::Withdrawn(why)),
                }
                Err(failure)
            }
        }
    }

    /// Takes the kernel mount away; fails with EBUSY while programs use it, unless `busy_too`.
    pub(crate) async fn unmount(&self, busy_too: bool) -> io::Result<()> {
        let mounted = Arc::clone(&self.mounted);
        let work = move || if busy_too { mounted.unmount_by_force() } else { mounted.unmount() };
        tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
    }

    /// After the kernel mount is gone: brings everything to disk, gives up the locks, leaves, releases the device.
    pub(crate) async fn stop(&self) -> Result<(), Failure> {
        if let Err(error) = self.fs.unmount().await {
            // The journal has what the disk has not: the others must recover it.
            self.abandon(&format!("unmounting failed: {error}"));
            return Err(Failure::new(format!("not everything could be brought to disk: {error}")));
        }
        // Before the inodes are gone: a loss that no program was told of.
        let lost = self.fs.untold_losses();
        self.cluster.leave().await.context("leaving the matrix")?;
        match lost {
            0 => Ok(()),
            lost => Err(Failure::new(format!(
                "unmounted, but data of {lost} files could not be written back, and no program was told: see the log"
            ))),
        }
    }

    /// Stops at once: nothing is written any more, programs get errors, the mount stays as a dead one.
    pub(crate) fn abandon(&self, why: &str) {
        self.gate.close(CloseReason::Withdrawn(why.to_string()));
        self.fs.withdraw(why);
        self.mounted.abort();
    }

    pub(crate) fn status(&self) -> Status {
        status::status(self)
    }

    pub(crate) fn locks(&self, inode: Option<u64>, waiting: bool) -> Locks {
        status::locks(self, inode, waiting)
    }
}

/// Claims a slot and waits until this node is a member with a lease and a journal of its own.
async fn join(
    request: &MountRequest,
    storage: Storage,
    runtime: &Arc<dyn Runtime>,
    tell: UnboundedSender<News>,
) -> Result<Member, cluster::ClusterError> {
    let (listen, advertise) = addresses(request.listen);
    let config = Config {
        name: request.node.clone(),
        listen,
        advertise,
        run_dir: request.run_dir.clone(),
        device: request.options.device.clone(),
        fence: match request.options.fence {
            FenceMethod::Auto => FenceChoice::All,
            FenceMethod::Lease => FenceChoice::LeaseOnly,
        },
    };
    let clock = Arc::new(LamportClock::default());
    let device: Arc<dyn Device> = Arc::new(PatientDevice::new(storage.gate.clone(), Arc::clone(runtime)));
    let fs_start = storage.label.fs_start;
    let claimed = cluster::claim(storage, config, Arc::clone(&clock), Arc::clone(runtime)).await?;
    let (me, incarnation) = (claimed.node(), claimed.incarnation());
    let wire = Arc::new(ClusterWire::default());
    let lcl = Lcl::new(me, incarnation, Arc::clone(runtime), Arc::clone(&wire) as _, lcl::Config::default());
    let hooks = Arc::new(Hooks {
        me,
        lcl: lcl.clone(),
        device: Arc::clone(&device),
        fs_start,
        clock: Arc::clone(&clock),
        runtime: Arc::clone(runtime),
        fs: watch::Sender::new(None),
        tell,
        view: Default::default(),
        adopted: Default::default(),
    });
    let cluster = Arc::new(claimed.join(Arc::clone(&hooks) as _)?);
    wire.open(Arc::clone(&cluster));
    tokio::spawn(log_progress(cluster.progress()));
    let journal = cluster.admitted().await?;
    Ok(Member { device, clock, lcl, hooks, cluster, journal })
}

/// Mounts the filesystem of a member, and the kernel on it.
async fn serve(
    request: &MountRequest,
    label: &Label,
    gate: &Gate,
    runtime: &Arc<dyn Runtime>,
    member: Member,
    tell: UnboundedSender<News>,
) -> Result<(Arc<Filesystem>, Arc<Mounted>, Ino), Failure> {
    let name = request.device.display();
    let Member { device, clock, lcl, hooks, cluster, journal } = member;
    let (superblock, _) = Superblock::read(&*device, label.fs_start).await.context(&name)?;
    let root = Ino(superblock.root.0);
    let cache = Arc::new(FuseCache::new(root));
    let (lease_gate, lease_clock) = (gate.clone(), Arc::clone(runtime));
    let lease = move || match lease_gate.check() {
        Ok(()) => lease_gate.lease_until().unwrap_or_default().since(lease_clock.now()),
        Err(_) => Duration::ZERO,
    };
    let parts = Parts {
        device,
        superblock,
        journal,
        lcl,
        clock,
        runtime: Arc::clone(runtime),
        kernel: cache.clone(),
        lease: Arc::new(lease),
    };
    let options = Options {
        read_only: request.options.read_only,
        no_atime: request.options.no_atime,
        ..Options::default()
    };
    let fs = Filesystem::mount(parts, options).await.context(&name)?;
    hooks.fs.send_replace(Some(Arc::clone(&fs)));
    fs.set_gather_tails(gather_tails(Arc::downgrade(&fs), Arc::clone(&cluster)));
    tokio::spawn(follow_tails(Arc::downgrade(&fs), cluster));
    let mounted = match mount_kernel(request, &fs, &cache, runtime) {
        Ok(mounted) => Arc::new(mounted),
        Err(failure) => {
            if let Err(error) = fs.unmount().await {
                fs.withdraw(&format!("unmounting after a failed mount: {error}"));
            }
            return Err(failure);
        }
    };
    watch_kernel(&mounted, tell.clone())?;
    let watched = Arc::clone(&fs);
    tokio::spawn(async move {
        let why = watched.withdrawn().await;
        let _ = tell.send(News::MustStop(why));
    });
    Ok((fs, mounted, root))
}

fn mount_kernel(
    request: &MountRequest,
    fs: &Arc<Filesystem>,
    cache: &FuseCache,
    runtime: &Arc<dyn Runtime>,
) -> Result<Mounted, Failure> {
    // fuser's defaults are those of an unprivileged mount.
    let mut options = vec!["suid".to_string(), "dev".to_string()];
    options.retain(|usual| !request.options.kernel.contains(&format!("no{usual}")));
    options.extend(request.options.kernel.iter().cloned());
    options.extend(request.options.read_only.then(|| "ro".to_string()));
    options.extend(request.options.no_atime.then(|| "noatime".to_string()));
    let options = fuse::MountOptions {
        mountpoint: request.dir.clone(),
        source: request.device.display().to_string(),
        options,
    };
    fuse::mount(Arc::clone(fs), cache, Arc::clone(runtime), &options).context(request.dir.display())
}

/// Tells when the kernel mount is gone, by whomever.
fn watch_kernel(mounted: &Arc<Mounted>, tell: UnboundedSender<News>) -> Result<(), Failure> {
    let mounted = Arc::clone(mounted);
    let wait = move || {
        if let Err(e) = mounted.wait() {
            tracing::warn!("the kernel connection ended: {e}");
        }
        let _ = tell.send(News::Unmounted);
    };
    std::thread::Builder::new().name("matrix-mount".into()).spawn(wait).context("mount watcher")?;
    Ok(())
}

/// Tells the store how far all journals have moved, as long as it lives.
async fn follow_tails(fs: std::sync::Weak<Filesystem>, cluster: Arc<Cluster>) {
    loop {
        tokio::time::sleep(TAILS_EVERY).await;
        let Some(fs) = fs.upgrade() else { return };
        fs.store().set_peer_tail(cluster.least_journal_tail());
    }
}

/// How a nearly full filesystem waits until the others' journals have moved past what was freed: idle nodes
/// checkpoint and tell by themselves, which takes them about two seconds. Not again right after one wait, since a
/// full filesystem asks at every write.
fn gather_tails(fs: std::sync::Weak<Filesystem>, cluster: Arc<Cluster>) -> GatherTails {
    let last = Arc::new(parking_lot::Mutex::new(None::<std::time::Instant>));
    Arc::new(move || {
        let (fs, cluster, last) = (fs.clone(), Arc::clone(&cluster), Arc::clone(&last));
        Box::pin(async move {
            let Some(fs) = fs.upgrade() else { return };
            if last.lock().is_some_and(|last| last.elapsed() < GATHER_AGAIN_AFTER) {
                return;
            }
            let freed = fs.store().clock().now();
            let end = std::time::Instant::now() + GATHER_WITHIN;
            loop {
                let least = cluster.least_journal_tail();
                fs.store().set_peer_tail(least);
                if least >= freed || std::time::Instant::now() >= end {
                    break;
                }
                fs.store().runtime().sleep(LOOK_EVERY).await;
            }
            *last.lock() = Some(std::time::Instant::now());
        })
    })
}

/// Logs what a mount waits for.
async fn log_progress(mut progress: watch::Receiver<Progress>) {
    loop {
        match &*progress.borrow_and_update() {
            Progress::Joining(None) => {}
            Progress::Joining(Some(what)) => tracing::info!("joining: {what}"),
            Progress::Member(journal) => tracing::info!(journal, "member"),
            Progress::Left | Progress::Failed(_) => return,
        }
        if progress.changed().await.is_err() {
            return;
        }
    }
}

/// Where to listen, and what others are told to connect to. Without `--listen`: any port of all addresses, and this
/// host's first address that is not its own loop.
fn addresses(listen: Option<SocketAddr>) -> (SocketAddr, Option<SocketAddr>) {
    let listen = listen.unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
    if !listen.ip().is_unspecified() {
        return (listen, None);
    }
    (listen, Some(SocketAddr::new(own_address(listen.is_ipv6()), listen.port())))
}

/// The address that traffic to elsewhere would leave from; nothing is sent to find it out.
fn own_address(v6: bool) -> IpAddr {
    let (any, elsewhere, own): (&str, &str, IpAddr) = match v6 {
        true => ("[::]:0", "[2001:db8::1]:9", IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)),
        false => ("0.0.0.0:0", "192.0.2.1:9", IpAddr::V4(std::net::Ipv4Addr::LOCALHOST)),
    };
    let found = std::net::UdpSocket::bind(any).and_then(|socket| {
        socket.connect(elsewhere)?;
        socket.local_addr()
    });
    found.map_or(own, |address| address.ip())
}
