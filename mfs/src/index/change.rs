//! Changes of a tree: put a leaf back (whole or split), plant a root, take an empty node out.

use storage_control::BlockAddr;

use super::{End, IndexEntry, Path, Root, Tree, encode_entries, write_node};
use crate::alloc::{FreeGuard, Reservation};
use crate::error::FsError;
use crate::format::header::{Block, Header};
use crate::format::index::{INDEX_MAX, MAX_DEPTH};
use crate::inode::Needs;
use crate::store::Txn;

/// The new entries of a leaf.
pub(crate) struct LeafBytes {
    /// How many.
    pub(crate) count: usize,
    /// Packed.
    pub(crate) bytes: Vec<u8>,
}

/// A leaf's new content: one leaf, or two and the lowest key of the second.
pub(crate) enum Split {
    /// It fits.
    Whole(LeafBytes),
    /// It takes a second leaf.
    Two(LeafBytes, u64, LeafBytes),
}

/// What putting one leaf back may need in a tree of `depth`: every node on the way may split, the root may
/// move down; and below an empty node a branch may be missing, which is never more.
pub(crate) fn needs_insert(depth: u8) -> Needs {
    let depth = u32::from(depth);
    let meta = depth + 2;
    Needs { meta, credits: depth + meta }
}

/// What a change that may grow a tree works with.
pub(crate) struct Growth<'a> {
    pub(crate) txn: &'a mut Txn,
    /// Where fresh blocks come from; a change that only shrinks needs none.
    pub(crate) res: Option<&'a mut Reservation>,
    /// The inode's count of blocks.
    pub(crate) blocks: &'a mut u64,
}

impl Growth<'_> {
    /// Takes a fresh block, logs it in its group's bitmap and counts it.
    async fn fresh(&mut self) -> Result<BlockAddr, FsError> {
        let res = self.res.as_mut().expect("a change that grows a tree comes with a reservation");
        let addr = res.meta();
        res.log_meta(self.txn, addr).await?;
        *self.blocks += 1;
        Ok(addr)
    }
}

/// Where to cut a full node: in the middle, but after a new last entry (keys that only rise fill nodes).
pub(crate) fn cut(len: usize, inserted_at: usize) -> usize {
    if inserted_at + 1 == len { len - 1 } else { len / 2 }
}

/// Takes a child out; what it covered goes to the one before it, or to a new first one.
fn remove_child(entries: &mut Vec<IndexEntry>, slot: usize) {
    entries.remove(slot);
    if let Some(first) = entries.first_mut() {
        first.key = 0;
    }
}

impl Tree<'_> {
    fn stamp(&self, block: &mut Block) {
        Header::of_mut(block).owner_generation = self.generation.into();
    }

    fn create_leaf(&self, txn: &mut Txn, addr: BlockAddr, leaf: &LeafBytes) {
        txn.create(addr, self.leaf, self.owner, |block| {
            self.stamp(block);
            write_node(block, 0, leaf.count, &leaf.bytes);
        });
    }

    fn create_node(&self, txn: &mut Txn, addr: BlockAddr, level: u8, entries: &[IndexEntry]) {
        let bytes = encode_entries(entries);
        txn.create(addr, self.index, self.owner, |block| {
            self.stamp(block);
            write_node(block, level, entries.len(), &bytes);
        });
    }

    async fn edit_leaf(&self, txn: &mut Txn, addr: BlockAddr, leaf: &LeafBytes) -> Result<(), FsError> {
        txn.edit(addr, self.leaf, self.owner, |block| write_node(block, 0, leaf.count, &leaf.bytes)).await
    }

    /// Writes a node whose first key the caller has made 0.
    async fn edit_node(
        &self,
        txn: &mut Txn,
        addr: BlockAddr,
        level: u8,
        entries: &[IndexEntry],
    ) -> Result<(), FsError> {
        let bytes = encode_entries(entries);
        txn.edit(addr, self.index, self.owner, |block| write_node(block, level, entries.len(), &bytes)).await
    }

    /// Makes a tree of what no longer fits the dinode.
    pub(crate) async fn plant(&self, growth: &mut Growth<'_>, split: Split) -> Result<Root, FsError> {
        let (left, right) = match split {
            Split::Whole(left) => (left, None),
            Split::Two(left, key, right) => (left, Some((key, right))),
        };
        let addr = growth.fresh().await?;
        self.create_leaf(growth.txn, addr, &left);
        let mut entries = vec![IndexEntry { key: 0, child: addr }];
        if let Some((key, right)) = right {
            let addr = growth.fresh().await?;
            self.create_leaf(growth.txn, addr, &right);
            entries.push(IndexEntry { key, child: addr });
        }
        Ok(Root { depth: 1, entries })
    }

    /// Puts back a leaf that did not grow.
    pub(crate) async fn put_whole(&self, txn: &mut Txn, path: &Path, leaf: LeafBytes) -> Result<(), FsError> {
        match path.end {
            End::Leaf { addr, .. } => self.edit_leaf(txn, addr, &leaf).await,
            End::EmptyNode => Ok(()),
        }
    }

    /// Puts the leaf at the end of `path` back. `room` is the number of entries the root may have.
    pub(crate) async fn put_leaf(
        &self,
        growth: &mut Growth<'_>,
        root: &mut Root,
        room: usize,
        path: &Path,
        split: Split,
    ) -> Result<(), FsError> {
        if let Split::Two(..) = &split
            && root.depth == MAX_DEPTH
            && root.entries.len() >= room
        {
            return Err(FsError::NoSpace);
        }
        let (left, right) = match split {
            Split::Whole(left) => (left, None),
            Split::Two(left, key, right) => (left, Some((key, right))),
        };
        match &path.end {
            End::Leaf { addr, .. } => self.edit_leaf(growth.txn, *addr, &left).await?,
            End::EmptyNode => self.grow_branch(growth, path, &left).await?,
        }
        let Some((key, right)) = right else { return Ok(()) };
        let addr = growth.fresh().await?;
        self.create_leaf(growth.txn, addr, &right);
        self.insert_child(growth, root, room, path, IndexEntry { key, child: addr }).await
    }

    /// Hangs a branch with one leaf below the empty node at the end of `path`.
    async fn grow_branch(
        &self,
        growth: &mut Growth<'_>,
        path: &Path,
        leaf: &LeafBytes,
    ) -> Result<(), FsError> {
        let node = path.nodes.last().expect("an empty node is on the path");
        let mut child = growth.fresh().await?;
        self.create_leaf(growth.txn, child, leaf);
        for level in 1..node.level {
            let addr = growth.fresh().await?;
            self.create_node(growth.txn, addr, level, &[IndexEntry { key: 0, child }]);
            child = addr;
        }
        self.edit_node(growth.txn, node.addr, node.level, &[IndexEntry { key: 0, child }]).await
    }

    /// Inserts a child behind the end of `path`, splitting upwards.
    async fn insert_child(
        &self,
        growth: &mut Growth<'_>,
        root: &mut Root,
        room: usize,
        path: &Path,
        mut entry: IndexEntry,
    ) -> Result<(), FsError> {
        for node in path.nodes.iter().rev() {
            let mut entries = node.entries()?;
            entries.insert(node.slot + 1, entry);
            if entries.len() <= INDEX_MAX {
                return self.edit_node(growth.txn, node.addr, node.level, &entries).await;
            }
            let mut right = entries.split_off(cut(entries.len(), node.slot + 1));
            let key = std::mem::take(&mut right[0].key);
            let addr = growth.fresh().await?;
            self.create_node(growth.txn, addr, node.level, &right);
            self.edit_node(growth.txn, node.addr, node.level, &entries).await?;
            entry = IndexEntry { key, child: addr };
        }
        root.entries.insert(path.root_slot + 1, entry);
        if root.entries.len() > room {
            let addr = growth.fresh().await?;
            self.create_node(growth.txn, addr, root.depth, &root.entries);
            root.depth += 1;
            root.entries = vec![IndexEntry { key: 0, child: addr }];
        }
        Ok(())
    }

    /// Takes the empty leaf or node at the end of `path` out of the tree and frees its block. True when the
    /// root has no child left: the caller makes the content empty.
    pub(crate) async fn take_out(
        &self,
        txn: &mut Txn,
        guard: &FreeGuard,
        blocks: &mut u64,
        root: &mut Root,
        path: &Path,
    ) -> Result<bool, FsError> {
        let above = match path.end {
            End::Leaf { .. } => path.nodes.last(),
            End::EmptyNode => path.nodes.iter().rev().nth(1),
        };
        let left = match above {
            Some(node) => {
                let mut entries = node.entries()?;
                remove_child(&mut entries, node.slot);
                Some((node, entries))
            }
            None => None,
        };
        guard.free_meta(txn, path.end_addr()).await?;
        *blocks = blocks.saturating_sub(1);
        match left {
            Some((node, entries)) => self.edit_node(txn, node.addr, node.level, &entries).await?,
            None => remove_child(&mut root.entries, path.root_slot),
        }
        Ok(root.entries.is_empty())
    }
}

const _: () = assert!(crate::format::dinode::AREA_SIZE / 16 < INDEX_MAX, "a root and one more fit a node");
