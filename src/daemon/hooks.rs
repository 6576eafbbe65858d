//! What the cluster asks of this daemon: views, fences and lock messages go to the lock layer, journals to the
//! filesystem.

use std::collections::BTreeSet;
use std::sync::Arc;

use lcl::Lcl;
use membership::View;
use mfs::filesystem::Filesystem;
use mfs::format::superblock::Superblock;
use parking_lot::Mutex;
use storage_control::{BlockAddr, BoxFuture, Clock, Device, Incarnation, LamportClock, NodeId, Runtime};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use super::node::News;
use super::wire::decode;
use crate::cluster::ClusterHooks;

/// The parts that the cluster's threads reach.
pub(super) struct Hooks {
    pub(super) me: NodeId,
    pub(super) lcl: Lcl,
    pub(super) device: Arc<dyn Device>,
    pub(super) fs_start: BlockAddr,
    pub(super) clock: Arc<LamportClock>,
    pub(super) runtime: Arc<dyn Runtime>,
    /// The filesystem, from when it is mounted.
    pub(super) fs: watch::Sender<Option<Arc<Filesystem>>>,
    pub(super) tell: UnboundedSender<News>,
    /// What was installed last.
    pub(super) view: Mutex<Option<Arc<View>>>,
    /// Journals whose orphans this node has looked after since they were last in use.
    pub(super) adopted: Mutex<BTreeSet<u16>>,
}

impl Hooks {
    /// The filesystem, as soon as it is mounted.
    fn mounted(&self) -> impl Future<Output = Result<Arc<Filesystem>, String>> + Send + 'static {
        let mut fs = self.fs.subscribe();
        async move {
            let there =
                fs.wait_for(Option::is_some).await.map_err(|_| "the node is not mounted".to_string())?;
            there.clone().ok_or_else(|| "the node is not mounted".to_string())
        }
    }

    /// The ADM looks after the orphans of nodes that have gone: those of every journal that nobody uses, once.
    fn adopt_orphans(&self, view: &View, clean: BTreeSet<u16>) {
        if view.adm != self.me {
            return;
        }
        for journal in clean {
            if !self.adopted.lock().insert(journal) {
                continue;
            }
            let mounted = self.mounted();
            self.runtime.spawn(Box::pin(async move {
                let Ok(fs) = mounted.await else { return };
                match fs.adopt(journal).await {
                    Ok(0) => {}
                    Ok(orphans) => tracing::info!(journal, orphans, "adopted orphans"),
                    Err(error) => tracing::warn!(journal, %error, "orphans not adopted"),
                }
            }));
        }
    }
}

impl ClusterHooks for Hooks {
    fn install_view(&self, view: Arc<View>) {
        let members: Vec<&str> = view.members.values().map(|m| m.name.as_str()).collect();
        tracing::info!(generation = view.generation.0, members = members.join(" "), "view");
        let clean: BTreeSet<u16> = view.clean_journals().collect();
        self.adopted.lock().retain(|journal| clean.contains(journal));
        self.adopt_orphans(&view, clean);
        *self.view.lock() = Some(Arc::clone(&view));
        self.lcl.install_view(view);
    }

    fn fenced(&self, node: NodeId, incarnation: Incarnation) {
        tracing::info!(%node, %incarnation, "fenced");
        self.lcl.fenced(node, incarnation);
    }

    fn recovered(&self, node: NodeId, incarnation: Incarnation) {
        tracing::info!(%node, %incarnation, "recovered");
        self.lcl.recovered(node, incarnation);
        // A recovery that ends makes no new view, but its journal clean.
        let view = self.view.lock().clone();
        if let Some(view) = view {
            let journal = view.recovery(node, incarnation).and_then(|recovery| recovery.journal);
            self.adopt_orphans(&view, journal.into_iter().collect());
        }
    }

    fn replay(&self, journal: u16) -> BoxFuture<Result<(), String>> {
        let (device, runtime, clock) =
            (Arc::clone(&self.device), Arc::clone(&self.runtime), Arc::clone(&self.clock));
        let fs_start = self.fs_start;
        Box::pin(async move {
            // Read anew: the journal may have been made after this node mounted.
            let (superblock, _) = Superblock::read(&*device, fs_start).await.map_err(|e| e.to_string())?;
            let done = mfs::journal::replay(&device, &superblock, journal, &runtime).await;
            let done = done.map_err(|e| e.to_string())?;
            clock.receive(done.clock).map_err(|e| e.to_string())?;
            let (records, written) = (done.records, done.written);
            tracing::info!(journal, records, written, "journal replayed");
            Ok(())
        })
    }

    fn make_journal(&self, index: u16) -> BoxFuture<Result<(), String>> {
        let (mounted, lcl) = (self.mounted(), self.lcl.clone());
        Box::pin(async move {
            let fs = mounted.await?;
            mfs::mkfs::make_journal(fs.alloc(), &lcl, index).await.map(drop).map_err(|e| e.to_string())
        })
    }

    fn dlm_frame(&self, from: NodeId, payload: &[u8]) -> Result<(), String> {
        let message = decode(payload)?;
        tracing::trace!(%from, ?message, "lock message in");
        self.lcl.message(from, message).map_err(|fault| fault.to_string())
    }

    fn journal_tail(&self) -> Clock {
        self.fs.borrow().as_ref().map_or(Clock(0), |fs| fs.store().tail_clock())
    }

    fn suspended(&self, suspended: bool) {
        // The gate and the filesystem look at the lease themselves, at each request; here it is only told.
        match suspended {
            true => tracing::warn!("the lease ran out: nothing is served until it is back"),
            false => tracing::info!("the lease is back"),
        }
    }

    fn closed(&self, reason: &str) {
        self.lcl.close(reason);
        if let Some(fs) = &*self.fs.borrow() {
            fs.withdraw(reason);
        }
        let _ = self.tell.send(News::MustStop(reason.to_string()));
    }
}
