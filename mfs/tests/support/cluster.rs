//! Several nodes with one device: each has a filesystem, locks, a kernel that caches, and a way to the others.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use dlm::{Departed, Epoch, Fault, Message};
use lcl::{Config, Lcl, Wire};
use membership::ShardMap;
use mfs::callouts::KernelCache;
use mfs::ops::{Attr, Handle, Ino, Operations, Result};
use mfs::{Filesystem, Options, Parts, journal};
use parking_lot::Mutex;
use storage_control::{
    BoxFuture, Clock, Device, Generation, Incarnation, LamportClock, NodeId, Runtime, SimRuntime,
};
use tokio::sync::Notify;

use super::Bed;
use super::access::Access;

/// What a kernel does with FUSE's answers: attributes until they are invalidated, pages until they are
/// invalidated or newer attributes show that they are old.
#[derive(Default)]
pub struct Kernel {
    state: Mutex<KernelState>,
    answered: Notify,
}

#[derive(Default)]
struct KernelState {
    attributes: BTreeMap<Ino, Attr>,
    /// Counts invalidations: an answer to an older request is not kept.
    version: u64,
    pages: BTreeMap<Ino, Vec<u8>>,
    /// Size and modification time that the pages belong to.
    pages_of: BTreeMap<Ino, (u64, storage_control::WallTime)>,
    /// READs not answered yet: their pages are locked.
    reading: BTreeMap<Ino, u32>,
}

impl KernelState {
    fn see(&mut self, attr: &Attr) {
        let now = (attr.size, attr.mtime);
        if self.pages_of.insert(attr.ino, now) != Some(now) {
            self.pages.remove(&attr.ino);
        }
    }
}

pub struct KernelOf(pub Arc<Kernel>);

impl KernelCache for KernelOf {
    fn invalidate_attributes(&self, ino: Ino) -> BoxFuture<()> {
        let kernel = self.0.clone();
        Box::pin(async move {
            let mut state = kernel.state.lock();
            state.attributes.remove(&ino);
            state.version += 1;
        })
    }

    fn invalidate_pages(&self, ino: Ino) -> BoxFuture<()> {
        let kernel = self.0.clone();
        Box::pin(async move {
            loop {
                let mut answered = std::pin::pin!(kernel.answered.notified());
                answered.as_mut().enable();
                {
                    let mut state = kernel.state.lock();
                    state.attributes.remove(&ino);
                    state.version += 1;
                    if state.reading.get(&ino).is_none_or(|n| *n == 0) {
                        state.pages.remove(&ino);
                        return;
                    }
                }
                answered.await;
            }
        })
    }
}

/// A node that has the filesystem mounted.
pub struct Node {
    pub id: NodeId,
    pub incarnation: Incarnation,
    pub fs: Arc<Filesystem>,
    pub lcl: Lcl,
    pub kernel: Arc<Kernel>,
    pub access: Access,
    runtime: SimRuntime,
}

impl Node {
    /// `fstat`, from the kernel's cache if it may.
    pub async fn stat(&self, ino: Ino) -> Result<Attr> {
        let version = {
            let state = self.kernel.state.lock();
            if let Some(attr) = state.attributes.get(&ino) {
                return Ok(*attr);
            }
            state.version
        };
        let fresh = self.fs.getattr(ino).await?;
        let mut state = self.kernel.state.lock();
        state.see(&fresh.attr);
        if state.version == version && !fresh.valid_for.is_zero() {
            state.attributes.insert(ino, fresh.attr);
        }
        Ok(fresh.attr)
    }

    /// A change by a program of this node: its kernel forgets the attributes by itself.
    pub async fn change<T>(&self, ino: Ino, change: impl Future<Output = Result<T>>) -> Result<T> {
        let result = change.await;
        let mut state = self.kernel.state.lock();
        state.attributes.remove(&ino);
        state.version += 1;
        result
    }

    /// `read` of the whole file through the page cache.
    pub async fn read(&self, ino: Ino, handle: Handle) -> Result<Vec<u8>> {
        self.stat(ino).await?;
        {
            let mut state = self.kernel.state.lock();
            if let Some(pages) = state.pages.get(&ino) {
                return Ok(pages.clone());
            }
            *state.reading.entry(ino).or_default() += 1;
        }
        let data = self.fs.read(handle, 0, 1 << 20).await.map(|data| data.to_vec());
        // The answer takes its time: the lock may go meanwhile.
        self.runtime.sleep(Duration::from_micros(self.runtime.random() % 300)).await;
        let mut state = self.kernel.state.lock();
        *state.reading.get_mut(&ino).expect("it was counted") -= 1;
        if let Ok(data) = &data {
            state.pages.insert(ino, data.clone());
        }
        drop(state);
        self.kernel.answered.notify_waiters();
        data
    }
}

/// The nodes and the net between them.
#[derive(Clone)]
pub struct Cluster {
    pub bed: Bed,
    net: Arc<Mutex<Net>>,
}

struct Net {
    lcls: BTreeMap<NodeId, Lcl>,
    links: BTreeMap<(NodeId, NodeId), VecDeque<Message>>,
    epoch: Epoch,
    stores: BTreeMap<NodeId, mfs::store::Store>,
}

struct Link {
    cluster: Cluster,
    from: NodeId,
}

impl Wire for Link {
    fn send(&self, to: NodeId, message: Message) {
        let (cluster, pair) = (self.cluster.clone(), (self.from, to));
        cluster.net.lock().links.entry(pair).or_default().push_back(message);
        let delay = Duration::from_micros(20 + cluster.bed.runtime.random() % 200);
        let runtime: SimRuntime = cluster.bed.runtime.clone();
        runtime.clone().spawn(Box::pin(async move {
            runtime.sleep(delay).await;
            let (message, lcl) = {
                let mut net = cluster.net.lock();
                let message = net.links.get_mut(&pair).and_then(VecDeque::pop_front);
                (message, net.lcls.get(&pair.1).cloned())
            };
            if let (Some(message), Some(lcl)) = (message, lcl) {
                lcl.message(pair.0, message).expect("members are correct");
            }
        }));
    }

    fn fault(&self, from: NodeId, fault: Fault) {
        panic!("{:?} got from {from}: {fault}", self.from);
    }
}

impl Cluster {
    /// `count` nodes, all mounted.
    pub async fn start(bed: &Bed, count: u16) -> (Cluster, Vec<Node>) {
        let epoch = Epoch {
            generation: Generation(0),
            members: BTreeMap::new(),
            shards: ShardMap::all_to(NodeId(0)),
            recoveries: Vec::new(),
        };
        let net = Net { lcls: BTreeMap::new(), links: BTreeMap::new(), epoch, stores: BTreeMap::new() };
        let cluster = Cluster { bed: bed.clone(), net: Arc::new(Mutex::new(net)) };
        let mut nodes = Vec::new();
        for id in 0..count {
            nodes.push(cluster.join(NodeId(id), Incarnation(1)).await);
        }
        cluster.share_tails();
        (cluster, nodes)
    }

    /// A node becomes a member and mounts; its journal is empty.
    pub async fn join(&self, id: NodeId, incarnation: Incarnation) -> Node {
        let runtime: Arc<dyn Runtime> = Arc::new(self.bed.runtime.clone());
        let wire = Arc::new(Link { cluster: self.clone(), from: id });
        let lcl = Lcl::new(id, incarnation, runtime.clone(), wire, Config::default());
        self.net.lock().lcls.insert(id, lcl.clone());
        self.change(|epoch| {
            epoch.members.insert(id, incarnation);
        });
        let access = Access::new(self.bed.device.clone(), self.bed.runtime.clone());
        let device: Arc<dyn Device> = Arc::new(access.clone());
        let superblock = self.bed.superblock().await;
        let clock = Arc::new(LamportClock::new(Clock(1)));
        let report = journal::replay(&device, &superblock, id.0, &runtime).await.unwrap();
        clock.receive(report.clock).unwrap();
        let kernel = Arc::new(Kernel::default());
        let parts = Parts {
            device,
            superblock,
            journal: id.0,
            lcl: lcl.clone(),
            clock,
            runtime,
            kernel: Arc::new(KernelOf(kernel.clone())),
            lease: Arc::new(|| Duration::from_secs(1)),
        };
        let fs = Filesystem::mount(parts, Options::default()).await.unwrap();
        self.net.lock().stores.insert(id, fs.store().clone());
        Node { id, incarnation, fs, lcl, kernel, access, runtime: self.bed.runtime.clone() }
    }

    fn change(&self, change: impl FnOnce(&mut Epoch)) {
        let (epoch, lcls) = {
            let mut net = self.net.lock();
            change(&mut net.epoch);
            net.epoch.generation.0 += 1;
            let members: BTreeSet<NodeId> = net.epoch.members.keys().copied().collect();
            if members.is_empty() {
                return;
            }
            net.epoch.shards = net.epoch.shards.deal(&members);
            let lcls: Vec<Lcl> =
                net.lcls.iter().filter(|(id, _)| members.contains(id)).map(|(_, lcl)| lcl.clone()).collect();
            (Arc::new(net.epoch.clone()), lcls)
        };
        for lcl in lcls {
            lcl.install_epoch(&epoch);
        }
    }

    /// Every node hears of the tails of the others' journals, as from the slots on the device.
    fn share_tails(&self) {
        let net = Arc::downgrade(&self.net);
        let runtime = self.bed.runtime.clone();
        self.bed.runtime.spawn(Box::pin(async move {
            while let Some(net) = net.upgrade() {
                let stores: Vec<_> = net.lock().stores.iter().map(|(id, s)| (*id, s.clone())).collect();
                drop(net);
                for (id, store) in &stores {
                    let others = stores.iter().filter(|(other, _)| other != id);
                    let least = others.map(|(_, s)| s.tail_clock()).min();
                    store.set_peer_tail(least.unwrap_or(Clock(u64::MAX >> 2)));
                }
                drop(stores);
                runtime.sleep(Duration::from_millis(100)).await;
            }
        }));
    }

    /// A node leaves in order.
    pub async fn leave(&self, node: Node) {
        node.fs.unmount().await.unwrap();
        self.net.lock().stores.remove(&node.id);
        self.change(|epoch| {
            epoch.members.remove(&node.id);
        });
        self.net.lock().lcls.remove(&node.id);
    }

    /// A node dies: its memory is gone, and what it had not flushed too, as `keep` says.
    pub fn kill(&self, node: &Node) {
        node.access.cut();
        node.fs.withdraw("killed");
        {
            let mut net = self.net.lock();
            net.lcls.remove(&node.id);
            // Its tail holds freed blocks back until its journal is replayed.
            net.links.retain(|(from, to), _| *from != node.id && *to != node.id);
        }
        let (id, incarnation) = (node.id, node.incarnation);
        self.change(|epoch| {
            epoch.members.remove(&id);
            epoch.recoveries.push(Departed { node: id, incarnation, fenced: false });
        });
    }

    /// A survivor replays the dead node's journal and takes over its orphans.
    pub async fn recover(&self, dead: &Node, by: &Node) {
        let runtime: Arc<dyn Runtime> = Arc::new(self.bed.runtime.clone());
        let lcls: Vec<Lcl> = self.net.lock().lcls.values().cloned().collect();
        for lcl in &lcls {
            lcl.fenced(dead.id, dead.incarnation);
        }
        let device = self.bed.shared();
        let superblock = self.bed.superblock().await;
        journal::replay(&device, &superblock, dead.id.0, &runtime).await.unwrap();
        {
            let mut net = self.net.lock();
            net.epoch.recoveries.retain(|d| d.node != dead.id);
            net.stores.remove(&dead.id);
        }
        for lcl in &lcls {
            lcl.recovered(dead.id, dead.incarnation);
        }
        by.fs.adopt(dead.id.0).await.unwrap();
    }

    /// The power of everything is cut: of what was not flushed the seed chooses what survives. All journals are
    /// replayed, and as many nodes mount again.
    pub async fn power_cut(&self, nodes: Vec<Node>) -> (Cluster, Vec<Node>) {
        let count = nodes.len() as u16;
        nodes.iter().for_each(|node| self.kill(node));
        drop(nodes);
        let survives = self.bed.runtime.random() % 4;
        self.bed.device.crash(|_| self.bed.runtime.random() % 4 < survives);
        self.bed.fsck().await;
        let (device, superblock) = (self.bed.shared(), self.bed.superblock().await);
        let runtime: Arc<dyn Runtime> = Arc::new(self.bed.runtime.clone());
        for journal in 0..count {
            journal::replay(&device, &superblock, journal, &runtime).await.unwrap();
        }
        Cluster::start(&self.bed, count).await
    }

    /// All leave, and the check finds nothing.
    pub async fn stop(&self, nodes: Vec<Node>) {
        for node in nodes {
            self.leave(node).await;
        }
        self.bed.fsck().await;
    }
}
