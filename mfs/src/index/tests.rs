//! What the tests of inodes share: a filesystem in memory with one inode at a time.

use std::sync::Arc;

use storage_control::{LamportClock, MemDevice, Runtime, TestRuntime, WallTime};

use super::*;
use crate::alloc::{Alloc, Reservation, Want};
use crate::inode::{self, Dinode, FileType, Needs};
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
        let (device, superblock) = tests_stub::format().await;
        let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
        let clock = Arc::new(LamportClock::default());
        let below: Arc<dyn storage_control::Device> = device.clone();
        let store = Store::open(below, superblock, 0, clock, Arc::clone(&runtime)).await.unwrap();
        let alloc = Alloc::new(store.clone());
        Rig { device, runtime, store, alloc }
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
        let mut txn = self.store.begin(needs.credits + BITMAP_CREDITS).await?;
        let result = change(&mut txn, &mut res, dinode).await?;
        inode::write(&mut txn, dinode).await?;
        Ok(result)
    }

    /// The inode as its block says, which is as the one in memory.
    pub(crate) async fn assert_written(&self, dinode: &Dinode) {
        assert_eq!(&inode::read(&self.store, dinode.ino).await.unwrap(), dinode);
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

mod tests_stub {
    use super::*;
    use crate::format::superblock::{Geometry, Superblock};
    use crate::journal::{Head, Place};
    use storage_control::{BlockAddr, Clock};
    pub(super) async fn format() -> (Arc<MemDevice>, Superblock) {
        let device = Arc::new(MemDevice::new(100_000));
        let geometry = Geometry { blocks: 100_000, fs_start: BlockAddr(1040), groups_start: BlockAddr(1056), group_blocks: 2048, groups: 48 };
        let mut journals = vec![None; 256];
        journals[0] = Some(BlockAddr(1060));
        let superblock = Superblock { secret: crate::format::header::Secret([7; 16]), uuid: [1; 16], label: "x".into(), geometry, root: BlockAddr(5000), journal_blocks: 1024, journals, created: (0, 0), version: Clock(1) };
        let place = Place::of(&superblock, 0).unwrap();
        Head::new(&place, Clock(1)).write_both(&*device, &place).await.unwrap();
        let at = BlockAddr(1062);
        device.poke(at, |block| { crate::format::header::init(block, crate::format::header::BlockKind::Orphans, at, superblock.secret, LockName::Orphans(0)); crate::format::header::seal(block, Clock(1)); });
        (device, superblock)
    }
}

#[test]
fn the_slot_of_a_key_is_that_of_the_last_lower_one() {
    let keys = [10, 20, 30];
    let slot = |key| slot_of(keys.len(), key, |slot| keys[slot]);
    assert_eq!([0, 9, 10, 19, 20, 30, u64::MAX].map(slot), [0, 0, 0, 0, 1, 2, 2]);
}

#[test]
fn hostile_nodes_are_refused() {
    let mut good = [0; BLOCK_SIZE];
    let entries = [IndexEntry { key: 1, child: BlockAddr(7) }, IndexEntry { key: 5, child: BlockAddr(8) }];
    write_node(&mut good, 2, 2, &encode_entries(&entries));
    let read = |block: &[u8]| decode_entries(BlockAddr(9), node_body(BlockAddr(9), 2, block)?.bytes);
    assert_eq!(read(&good).unwrap(), entries);
    for (at, value) in [(0, 1), (1, 1), (2, 3), (3, 255), (4, 31), (5, 255), (6, 1), (15, 1), (16, 5), (23, 1)] {
        let mut bad = good;
        bad[HEAD_AT + at] = value;
        assert!(read(&bad).is_err(), "{value} at {at}");
    }
    assert!(node_body(BlockAddr(9), 1, &good).is_err());
    assert!(Root::decode(BlockAddr(9), 0, &encode_entries(&entries)).is_err());
    assert!(Root::decode(BlockAddr(9), 7, &encode_entries(&entries)).is_err());
    assert!(Root::decode(BlockAddr(9), 1, &[]).is_err());
}
