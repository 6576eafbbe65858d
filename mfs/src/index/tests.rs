//! What the tests of inodes share: a filesystem in memory with one inode at a time.

use std::sync::Arc;

use lcl::Lcl;
use storage_control::{Device, LamportClock, MemDevice, Runtime, TestRuntime, WallTime};

use super::*;
use crate::alloc::{Alloc, Reservation, Want};
use crate::dir;
use crate::format::superblock::Superblock;
use crate::fsck;
use crate::inode::{self, Dinode, FileType, Needs};
use crate::mkfs::{Options, mkfs};
use crate::store::Txn;

/// A filesystem in memory.
pub(crate) struct Rig {
    pub(crate) device: Arc<MemDevice>,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) store: Store,
    pub(crate) alloc: Alloc,
}

impl Rig {
    pub(crate) async fn new() -> Rig {
        Rig::with_blocks(100_000).await
    }

    /// One of that many blocks.
    pub(crate) async fn with_blocks(blocks: u64) -> Rig {
        let device = Arc::new(MemDevice::new(blocks));
        let options = Options {
            blocks,
            fs_start: BlockAddr(1040),
            label: String::new(),
            uuid: [1; 16],
            secret: [7; 16],
            now: WallTime::default(),
            journals: Some(1),
            group_blocks: None,
        };
        let below: Arc<dyn Device> = device.clone();
        mkfs(&below, &options, |_, _| ()).await.unwrap();
        Rig::open(device).await
    }

    /// Opens what is on a device.
    pub(crate) async fn open(device: Arc<MemDevice>) -> Rig {
        Rig::try_open(device).await.unwrap()
    }

    /// Opens what may be on a device.
    pub(crate) async fn try_open(device: Arc<MemDevice>) -> Result<Rig, FsError> {
        let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
        let below: Arc<dyn Device> = device.clone();
        let (superblock, _) = Superblock::read(&*below, BlockAddr(1040)).await?;
        let clock = Arc::new(LamportClock::default());
        let store = Store::open(below, superblock, 0, clock, Arc::clone(&runtime)).await?;
        let alloc = Alloc::new(store.clone(), Lcl::solo(Arc::clone(&runtime)));
        Ok(Rig { device, runtime, store, alloc })
    }

    /// A new inode in a transaction of its own.
    pub(crate) async fn inode(&self, kind: FileType) -> Dinode {
        let mut res = self.alloc.reserve(Want { meta: 1, ..Want::default() }).await.unwrap();
        let mut txn = self.store.begin(40).await.unwrap();
        let addr = res.meta();
        res.log_meta(&mut txn, addr).await.unwrap();
        let dinode = Dinode::new(addr.0, self.store.clock().tick().0, kind, 0o644, WallTime::default());
        inode::create(&mut txn, &dinode);
        dinode
    }

    /// Changes the inode in a transaction that may use what `needs` says.
    pub(crate) async fn change<R>(
        &self,
        dinode: &mut Dinode,
        needs: Needs,
        change: impl AsyncFnOnce(&mut Txn, &mut Reservation, &mut Dinode) -> Result<R, FsError>,
    ) -> Result<R, FsError> {
        let mut res = self.alloc.reserve(Want { meta: needs.meta, ..Want::default() }).await?;
        let mut txn = self.store.begin(needs.credits + 1 + res.credits() + BITMAP_CREDITS).await?;
        let result = change(&mut txn, &mut res, dinode).await?;
        inode::write(&mut txn, dinode).await?;
        Ok(result)
    }

    /// The inode as its block says, which is as the one in memory.
    pub(crate) async fn assert_written(&self, dinode: &Dinode) {
        assert_eq!(&inode::read(&self.store, dinode.ino).await.unwrap(), dinode);
    }

    /// Changes the inode in a transaction that enters it in `parent` under `name`.
    pub(crate) async fn link(&self, parent: &mut Dinode, name: &[u8], dinode: &mut Dinode) {
        let needs = dir::insert_needs(parent);
        let target = dir::Target::of(dinode);
        self.change(parent, needs, async |txn, res, parent| {
            if dinode.is_dir() {
                dinode.parent = parent.ino;
                parent.nlink += 1;
            }
            inode::write(txn, dinode).await?;
            dir::insert(&self.store, txn, res, parent, name, target).await
        })
        .await
        .unwrap();
    }

    /// The root directory.
    pub(crate) async fn root(&self) -> Dinode {
        inode::read(&self.store, self.store.superblock().root.0).await.unwrap()
    }

    /// The outcome of a check of what is on the device, which is everything after a checkpoint.
    pub(crate) async fn check(&self) -> fsck::Report {
        self.store.checkpoint().await.unwrap();
        fsck::check_at(self.device.clone(), BlockAddr(1040), fsck::Options::default()).await
    }

    /// Gives the inode a name and checks the filesystem.
    pub(crate) async fn assert_sound(&self, dinode: &mut Dinode) {
        self.link(&mut self.root().await, b"under test", dinode).await;
        let report = self.check().await;
        assert!(report.is_clean(), "{report:#?}");
    }

    /// Frees all that an inode has besides its dinode.
    pub(crate) async fn empty(&self, dinode: &mut Dinode) {
        while let Some(step) = inode::next_to_free(&self.store, dinode).await.unwrap() {
            let guard = self.alloc.lock_groups_for_free(&[step.addr]).await.unwrap();
            let mut txn = self.store.begin(inode::FREE_STEP_CREDITS + BITMAP_CREDITS).await.unwrap();
            inode::free_step(&self.store, &mut txn, &guard, dinode, step).await.unwrap();
            inode::write(&mut txn, dinode).await.unwrap();
        }
        assert_eq!(dinode.blocks, 0);
    }
}

/// The dinode, and what one step can touch of a group.
pub(crate) const BITMAP_CREDITS: u32 = 40;

#[test]
fn the_slot_of_a_key_is_that_of_the_last_lower_one() {
    let keys = [10, 20, 30];
    let slot = |key| slot_of(keys.len(), key, |slot| keys[slot]);
    assert_eq!([0, 9, 10, 19, 20, 30, u64::MAX].map(slot), [0, 0, 0, 0, 1, 2, 2]);
}

#[test]
fn hostile_nodes_are_refused() {
    let mut good = [0; BLOCK_SIZE];
    let entries = [IndexEntry { key: 0, child: BlockAddr(7) }, IndexEntry { key: 5, child: BlockAddr(8) }];
    write_node(&mut good, 2, 2, &encode_entries(&entries));
    let read = |block: &[u8]| decode_entries(BlockAddr(9), node_body(BlockAddr(9), 2, block)?.bytes);
    assert_eq!(read(&good).unwrap(), entries);
    for (at, value) in
        [(0, 1), (1, 1), (2, 3), (3, 255), (4, 31), (5, 255), (6, 1), (15, 1), (16, 1), (32, 0)]
    {
        let mut bad = good;
        bad[HEAD_AT + at] = value;
        assert!(read(&bad).is_err(), "{value} at {at}");
    }
    assert!(node_body(BlockAddr(9), 1, &good).is_err());
    assert!(Root::decode(BlockAddr(9), 0, &encode_entries(&entries)).is_err());
    assert!(Root::decode(BlockAddr(9), 7, &encode_entries(&entries)).is_err());
    assert!(Root::decode(BlockAddr(9), 1, &[]).is_err());
}
