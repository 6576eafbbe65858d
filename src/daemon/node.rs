//! One node's mount: its parts, put together in the order in which they may begin and taken apart in the reverse.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lcl::Lcl;
use mfs::filesystem::{Filesystem, Options, Parts};
use mfs::format::superblock::Superblock;
use mfs::fuse::{self, FuseCache, Mounted};
use mfs::ops::Ino;
use storage_control::{
    Device, FileDevice, Gate, Label, LamportClock, OpenAs, Runtime, block_on, gate::CloseReason,
};
use tokio::sync::mpsc::UnboundedSender;

use super::MountRequest;
use crate::control::report::{Locks, Status};
use crate::failure::{Context, Failure};
use crate::runtime::RealRuntime;

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
    gate: Gate,
    fs: Arc<Filesystem>,
    mounted: Arc<Mounted>,
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
        let gate = Gate::open_for_ever(Arc::new(file.clone()), Arc::clone(&runtime));
        let device: Arc<dyn Device> = Arc::new(gate.clone());
        let (superblock, _) = Superblock::read(&*device, label.fs_start).await.context(&name)?;
        let clock = Arc::new(LamportClock::new(Default::default()));
        for journal in 0..superblock.journals.len() as u16 {
            if superblock.journal(journal).is_some() {
                let done =
                    mfs::journal::replay(&device, &superblock, journal, &runtime).await.context(&name)?;
                clock.receive(done.clock).context(&name)?;
            }
        }
        let lcl = Lcl::solo(Arc::clone(&runtime));
        let cache = Arc::new(FuseCache::new(Ino(superblock.root.0)));
        let parts = Parts {
            device,
            superblock,
            journal: 0,
            lcl,
            clock,
            runtime: Arc::clone(&runtime),
            kernel: cache.clone(),
            lease: Arc::new(|| Duration::from_secs(1)),
        };
        let options = Options {
            read_only: request.options.read_only,
            no_atime: request.options.no_atime,
            ..Options::default()
        };
        let fs = Filesystem::mount(parts, options).await.context(&name)?;
        let mounted = Arc::new(Self::mount_kernel(request, &fs, &cache, &runtime)?);
        watch_kernel(&mounted, tell.clone())?;
        let watched = Arc::clone(&fs);
        tokio::spawn(async move {
            let why = watched.withdrawn().await;
            let _ = tell.send(News::MustStop(why));
        });
        Ok(Node { gate, fs, mounted })
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

    /// Takes the kernel mount away; fails with EBUSY while programs use it, unless `busy_too`.
    pub(crate) async fn unmount(&self, busy_too: bool) -> io::Result<()> {
        let mounted = Arc::clone(&self.mounted);
        let work = move || if busy_too { mounted.unmount_by_force() } else { mounted.unmount() };
        tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
    }

    /// After the kernel mount is gone: brings everything to disk and releases the device.
    pub(crate) async fn stop(&self) -> Result<(), Failure> {
        self.fs.unmount().await.context("unmounting")?;
        self.gate.close(CloseReason::Left);
        self.gate.drained().await;
        Ok(())
    }

    /// Stops at once: nothing is written any more, programs get errors, the mount stays as a dead one.
    pub(crate) fn abandon(&self, why: &str) {
        self.gate.close(CloseReason::Withdrawn(why.to_string()));
        self.fs.withdraw(why);
        self.mounted.abort();
    }

    pub(crate) async fn status(&self) -> Status {
        unimplemented!()
    }

    pub(crate) async fn locks(&self, _inode: Option<u64>, _waiting: bool) -> Locks {
        unimplemented!()
    }
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
