//! What happens before a lock goes.
//!
//! When an inode lock goes down, everything changed under it is on the device first: file data written and
//! flushed, the journal record stable, the blocks in place. What this node and its kernel remember under the
//! lock is forgotten before a peer can change it. Attributes are forgotten last, when nobody is inside, so that
//! every later read asks for them and drops pages that are older.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Weak};

use dlm::{Mode, Resource};
use lcl::{CalloutError, Callouts};
use storage_control::BoxFuture;

use crate::alloc::Consumer;
use crate::error::FsError;
use crate::filesystem::Filesystem;
use crate::format::header::Header;
use crate::inode_table::Inode;
use crate::lock_name::LockName;
use crate::ops::Ino;
use crate::store::block_of;

/// The caches of whoever the filesystem is mounted for. Both calls return at once; the future tells when the
/// cache has forgotten.
pub trait KernelCache: Send + Sync {
    /// Attributes, and access rights that follow from them.
    fn invalidate_attributes(&self, ino: Ino) -> BoxFuture<()>;

    /// Attributes and pages, mapped ones too. Waits for every read of the inode that is being answered.
    fn invalidate_pages(&self, ino: Ino) -> BoxFuture<()>;
}

/// For a filesystem without kernel mount.
pub struct NoKernelCache;

impl KernelCache for NoKernelCache {
    fn invalidate_attributes(&self, _ino: Ino) -> BoxFuture<()> {
        Box::pin(std::future::ready(()))
    }

    fn invalidate_pages(&self, _ino: Ino) -> BoxFuture<()> {
        Box::pin(std::future::ready(()))
    }
}

/// Callouts of inode locks.
pub(crate) struct InodeCallouts(pub(crate) Weak<Filesystem>);

/// Callouts of locks under which only metadata are cached.
pub(crate) struct MetadataCallouts(pub(crate) Weak<Filesystem>);

/// Whether pages and attributes in the kernel must go when the lock goes from `held` to `keep`. Under a shared
/// lock nobody changes anything, except through a writable mapping of this node, which makes no request: its
/// pages go, so that the next access asks for the exclusive lock.
fn kernel_must_forget(inode: &Inode, held: Mode, keep: Mode) -> bool {
    keep < Mode::PR || (held > Mode::PR && inode.may_be_stored_to())
}

fn name(res: &Resource) -> Option<LockName> {
    LockName::from_resource(res)
}

/// A lock that cannot be given up is kept for good: this node withdraws, so that the others get it by recovery.
fn refused(fs: &Filesystem, error: FsError) -> CalloutError {
    fs.withdraw(&format!("what a lock protects could not be made stable: {error}"));
    CalloutError(error.to_string())
}

impl Callouts for InodeCallouts {
    fn purge(&self, res: Resource, held: Mode, keep: Mode) -> BoxFuture<()> {
        let fs = self.0.clone();
        Box::pin(async move {
            let (Some(fs), Some(LockName::Inode(number))) = (fs.upgrade(), name(&res)) else { return };
            let Some(inode) = fs.table.get(Ino(number)) else { return };
            if !kernel_must_forget(&inode, held, keep) {
                return;
            }
            // A read that waits for this lock to come back fills no page before it has it; if no page was
            // filled since the last time, waiting for that read here would be waiting for ourselves.
            let fills = inode.fills.load(SeqCst);
            if fills != inode.purged.load(SeqCst) {
                fs.kernel.invalidate_pages(inode.ino).await;
                inode.purged.store(fills, SeqCst);
            } else if inode.attributes_given.load(SeqCst) {
                fs.kernel.invalidate_attributes(inode.ino).await;
            }
        })
    }

    fn flush(&self, res: Resource, held: Mode, keep: Mode) -> BoxFuture<Result<(), CalloutError>> {
        let fs = self.0.clone();
        Box::pin(async move {
            let (Some(fs), Some(owner @ LockName::Inode(number))) = (fs.upgrade(), name(&res)) else {
                return Ok(());
            };
            let inode = fs.table.get(Ino(number));
            if held > Mode::PR {
                if let Some(inode) = &inode {
                    fs.write_back_for_release(inode).await.map_err(|e| refused(&fs, e))?;
                }
                fs.store.settle(owner).await.map_err(|e| refused(&fs, e))?;
                settle_new_owner(&fs, Ino(number)).await.map_err(|e| refused(&fs, e))?;
            }
            if let Some(inode) = &inode {
                if kernel_must_forget(inode, held, keep) {
                    forget_in_kernel(&fs, inode).await;
                }
                if keep < Mode::PR {
                    inode.data.lock().chunks.drop_all_clean();
                }
            }
            if keep < Mode::PR {
                fs.store.forget(owner);
            }
            Ok(())
        })
    }
}

/// The block of an inode that was freed here belongs to another lock. Whoever still knows the inode's number must
/// find it gone on the disk, not as it was.
async fn settle_new_owner(fs: &Filesystem, ino: Ino) -> Result<(), FsError> {
    let owner = fs.store.cached(ino.block()).and_then(|image| Header::of(block_of(&image)).owner());
    match owner {
        Some(owner) if owner != LockName::Inode(ino.0) => fs.store.settle(owner).await,
        Some(_) | None => Ok(()),
    }
}

/// The second time, with nobody inside. Pages filled since the first time are dropped without waiting: reads
/// that wait for the lock hold pages. Until then the new attributes betray them.
async fn forget_in_kernel(fs: &Arc<Filesystem>, inode: &Arc<Inode>) {
    let fills = inode.fills.load(SeqCst);
    if inode.purged.swap(fills, SeqCst) != fills {
        let pages = fs.kernel.invalidate_pages(inode.ino);
        fs.background.spawn(&*fs.runtime, pages);
    }
    if inode.attributes_given.swap(false, SeqCst) {
        fs.kernel.invalidate_attributes(inode.ino).await;
    }
}

impl Callouts for MetadataCallouts {
    fn purge(&self, res: Resource, _held: Mode, _keep: Mode) -> BoxFuture<()> {
        if let (Some(fs), Some(LockName::Orphans(journal))) = (self.0.upgrade(), name(&res)) {
            fs.give_back_orphans(journal);
        }
        Box::pin(std::future::ready(()))
    }

    fn flush(&self, res: Resource, held: Mode, keep: Mode) -> BoxFuture<Result<(), CalloutError>> {
        let fs = self.0.clone();
        Box::pin(async move {
            let (Some(fs), Some(owner)) = (fs.upgrade(), name(&res)) else { return Ok(()) };
            if held > Mode::PR {
                fs.store.settle(owner).await.map_err(|e| refused(&fs, e))?;
            }
            if keep < Mode::PR {
                fs.store.forget(owner);
            }
            Ok(())
        })
    }
}

/// Write-back for promises that lose their group.
pub(crate) struct PromiseConsumer(pub(crate) Weak<Filesystem>);

impl Consumer for PromiseConsumer {
    fn consume_promises(&self, _group: u32) -> BoxFuture<()> {
        let fs = self.0.clone();
        Box::pin(async move {
            if let Some(fs) = fs.upgrade() {
                fs.write_back_promised().await;
            }
        })
    }

    fn gather_tails(&self) -> BoxFuture<()> {
        let gather = self.0.upgrade().and_then(|fs| fs.gather_tails());
        gather.unwrap_or_else(|| Box::pin(std::future::ready(())))
    }
}
