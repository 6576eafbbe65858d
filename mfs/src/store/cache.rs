//! The block cache: each metadata block as this node sees it now.
//!
//! An image is never changed while somebody else holds it (copy on write). A block that is part of a transaction and
//! not yet in place is never evicted: the disk does not have it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use lru::LruCache;
use parking_lot::Mutex;
use storage_control::{AlignedBuf, BLOCK_SIZE, BlockAddr, Clock};

use super::{Image, TxnSeq};
use crate::{
    FsError, LockName,
    format::{
        group::{BitmapImage, STAMP_AT_COMMIT},
        header::{self, Block, BlockKind, Defect, Header, Secret},
    },
};

const SHARDS: usize = 16;

/// How many dirty blocks an insertion passes over in search of one to evict.
const EVICTION_TRIES: usize = 8;

struct Entry {
    image: Image,
    kind: BlockKind,
    owner: LockName,
    /// The last transaction that changed it, until that one's image is in place.
    dirty: Option<TxnSeq>,
}

impl Entry {
    fn check(&self, addr: BlockAddr, kind: BlockKind, owner: LockName) -> Result<(), FsError> {
        if self.kind != kind {
            Err(FsError::corrupt(kind.name(), addr, Defect::Kind.why()))
        } else if self.owner != owner {
            Err(FsError::corrupt(kind.name(), addr, Defect::Owner.why()))
        } else {
            Ok(())
        }
    }
}

/// What a commit needs of a block.
pub(crate) struct Frozen {
    pub(crate) addr: BlockAddr,
    pub(crate) image: Image,
    pub(crate) owner: LockName,
}

/// The outcome of an edit.
pub(crate) enum Edited<R> {
    /// Done; true if the block is new to the transaction.
    Done(R, bool),
    /// The block must be read first.
    Missing,
}

type Owned = HashMap<LockName, HashSet<BlockAddr>>;

pub(crate) struct Cache {
    secret: Secret,
    shard_blocks: usize,
    shards: Vec<Mutex<LruCache<BlockAddr, Entry>>>,
    /// Which blocks of a lock are cached. Locked after a shard, never before.
    owned: Vec<Mutex<Owned>>,
}

impl Cache {
    pub(crate) fn new(secret: Secret, blocks: usize) -> Cache {
        Cache {
            secret,
            shard_blocks: blocks.div_ceil(SHARDS),
            shards: (0..SHARDS).map(|_| Mutex::new(LruCache::unbounded())).collect(),
            owned: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }

    fn shard(&self, addr: BlockAddr) -> &Mutex<LruCache<BlockAddr, Entry>> {
        &self.shards[spread(addr.0)]
    }

    fn owned(&self, owner: LockName) -> &Mutex<Owned> {
        &self.owned[spread(owner.number())]
    }

    fn own(&self, owner: LockName, addr: BlockAddr) {
        self.owned(owner).lock().entry(owner).or_default().insert(addr);
    }

    fn disown(&self, owner: LockName, addr: BlockAddr) {
        let mut owned = self.owned(owner).lock();
        if let Some(blocks) = owned.get_mut(&owner) {
            blocks.remove(&addr);
            if blocks.is_empty() {
                owned.remove(&owner);
            }
        }
    }

    /// The cached image, if it is what is wanted.
    pub(crate) fn get(
        &self,
        addr: BlockAddr,
        kind: BlockKind,
        owner: LockName,
    ) -> Result<Option<Image>, FsError> {
        match self.shard(addr).lock().get(&addr) {
            None => Ok(None),
            Some(entry) => entry.check(addr, kind, owner).map(|()| Some(Arc::clone(&entry.image))),
        }
    }

    /// The cached image, whatever it is.
    pub(crate) fn peek(&self, addr: BlockAddr) -> Option<Image> {
        self.shard(addr).lock().get(&addr).map(|entry| Arc::clone(&entry.image))
    }

    /// Keeps an image that was read and verified, unless the block is cached already; gives the cached one.
    pub(crate) fn insert_read(
        &self,
        addr: BlockAddr,
        kind: BlockKind,
        owner: LockName,
        image: Image,
    ) -> Result<Image, FsError> {
        let mut shard = self.shard(addr).lock();
        if let Some(entry) = shard.get(&addr) {
            return entry.check(addr, kind, owner).map(|()| Arc::clone(&entry.image));
        }
        self.make_room(&mut shard);
        shard.put(addr, Entry { image: Arc::clone(&image), kind, owner, dirty: None });
        self.own(owner, addr);
        Ok(image)
    }

    /// Changes a cached block in a transaction. `change` is taken only if it was run.
    pub(crate) fn edit<R, F: FnOnce(&mut Block) -> R>(
        &self,
        addr: BlockAddr,
        kind: BlockKind,
        owner: LockName,
        seq: TxnSeq,
        change: &mut Option<F>,
    ) -> Result<Edited<R>, FsError> {
        let mut shard = self.shard(addr).lock();
        let Some(entry) = shard.get_mut(&addr) else { return Ok(Edited::Missing) };
        entry.check(addr, kind, owner)?;
        let change = change.take().expect("an edit runs once");
        let first = entry.dirty != Some(seq);
        entry.dirty = Some(seq);
        let result = change(block_mut(Arc::make_mut(&mut entry.image)));
        Ok(Edited::Done(result, first))
    }

    /// Puts a fresh block in the place of whatever was there. True if the block is new to the transaction.
    pub(crate) fn create<R>(
        &self,
        addr: BlockAddr,
        kind: BlockKind,
        owner: LockName,
        seq: TxnSeq,
        change: impl FnOnce(&mut Block) -> R,
    ) -> (R, bool) {
        let mut buf = AlignedBuf::zeroed_blocks(1);
        header::identify(block_mut(&mut buf), kind, addr, self.secret, owner);
        let result = change(block_mut(&mut buf));
        let image = Arc::new(buf);
        let mut shard = self.shard(addr).lock();
        let (before, first) = match shard.get_mut(&addr) {
            Some(entry) => {
                let before = entry.owner;
                let first = entry.dirty != Some(seq);
                *entry = Entry { image, kind, owner, dirty: Some(seq) };
                (Some(before), first)
            }
            None => {
                self.make_room(&mut shard);
                shard.put(addr, Entry { image, kind, owner, dirty: Some(seq) });
                (None, true)
            }
        };
        if before != Some(owner) {
            if let Some(before) = before {
                self.disown(before, addr);
            }
            self.own(owner, addr);
        }
        (result, first)
    }

    /// Stamps the version into the cached image and gives it to the commit. No handle of the transaction is open.
    pub(crate) fn freeze(&self, addr: BlockAddr, version: Clock) -> Frozen {
        let mut shard = self.shard(addr).lock();
        let entry = shard.peek_mut(&addr).expect("a block of a transaction stays cached");
        let (kind, owner) = (entry.kind, entry.owner);
        let block = block_mut(Arc::make_mut(&mut entry.image));
        header::identify(block, kind, addr, self.secret, owner);
        Header::of_mut(block).version = version.0.into();
        if kind == BlockKind::Bitmap {
            let map = BitmapImage::of_mut(block);
            if map.last_metadata_free.get() == STAMP_AT_COMMIT {
                map.last_metadata_free = version.0.into();
            }
        }
        Frozen { addr, image: Arc::clone(&entry.image), owner }
    }

    /// Transaction `seq`'s image of the block is in place.
    pub(crate) fn placed(&self, addr: BlockAddr, seq: TxnSeq) {
        if let Some(entry) = self.shard(addr).lock().peek_mut(&addr)
            && entry.dirty == Some(seq)
        {
            entry.dirty = None;
        }
    }

    /// Drops the blocks of a settled lock; the address of one that is not settled, if there is such.
    pub(crate) fn forget(&self, owner: LockName) -> Result<(), BlockAddr> {
        let blocks = self.owned(owner).lock().remove(&owner).unwrap_or_default();
        let mut result = Ok(());
        for addr in blocks {
            let mut shard = self.shard(addr).lock();
            match shard.peek(&addr) {
                Some(entry) if entry.owner == owner && entry.dirty.is_none() => {
                    shard.pop(&addr);
                }
                Some(entry) if entry.owner == owner => {
                    result = Err(addr);
                    self.own(owner, addr);
                }
                Some(_) | None => {}
            }
        }
        result
    }

    /// Evicts the least recently used clean block if the shard is full.
    fn make_room(&self, shard: &mut LruCache<BlockAddr, Entry>) {
        if shard.len() < self.shard_blocks {
            return;
        }
        for _ in 0..EVICTION_TRIES {
            match shard.peek_lru() {
                Some((&addr, entry)) if entry.dirty.is_some() => {
                    shard.promote(&addr);
                }
                Some((&addr, entry)) => {
                    let owner = entry.owner;
                    shard.pop(&addr);
                    self.disown(owner, addr);
                    return;
                }
                None => return,
            }
        }
    }

    /// Runs `work` while the block can be neither looked at nor marked.
    #[cfg(test)]
    pub(super) fn while_held<R>(&self, addr: BlockAddr, work: impl FnOnce() -> R) -> R {
        let _shard = self.shard(addr).lock();
        work()
    }

    /// How many blocks are cached.
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }
}

fn spread(n: u64) -> usize {
    (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 60) as usize % SHARDS
}

/// A one-block buffer as a block.
pub(crate) fn block_mut(buf: &mut AlignedBuf) -> &mut Block {
    (&mut buf[..]).try_into().expect("a cached image is one block")
}

/// A one-block buffer as a block.
pub fn block_of(image: &AlignedBuf) -> &Block {
    image[..BLOCK_SIZE].try_into().expect("a cached image is one block")
}
