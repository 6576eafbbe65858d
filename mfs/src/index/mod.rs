//! Trees of blocks under a root in the dinode, shared by directories and extents.
//!
//! Keys of a node start with 0 and rise strictly; every child covers the keys from its own (the first: from
//! where its node starts) up to the next child's, and everything below it lies in that range. A root has at least one child and at most [`MAX_DEPTH`] levels hang
//! from it, each one level below its parent, so that no descent can run in a circle. Index nodes and leaves
//! may be empty: a crash between two steps of freeing leaves them so, and inserting fills them again.
//! A change reads everything it needs before it edits the first block.

mod change;
#[cfg(test)]
pub(crate) mod tests;

use storage_control::{BLOCK_SIZE, BlockAddr};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

pub(crate) use change::{Growth, LeafBytes, Split, cut, needs_insert};

use crate::error::FsError;
use crate::format::header::{BlockKind, Header};
use crate::format::index::{
    ENTRIES_AT, ENTRIES_SIZE, HEAD_AT, INDEX_MAX, MAX_DEPTH, NodeHead, RawIndexEntry,
};
use crate::lock_name::LockName;
use crate::store::{Image, Store};

const ENTRY: usize = size_of::<RawIndexEntry>();

/// A child and the lowest key below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Lowest key; 0 in the first entry of a node, which covers from where the node starts.
    pub key: u64,
    /// Block of the child.
    pub child: BlockAddr,
}

/// The root of a tree, kept in the dinode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// Levels of index nodes, this one included: 1 means that the children are leaves.
    pub depth: u8,
    /// At least one child.
    pub entries: Vec<IndexEntry>,
}

impl Root {
    /// Checks and reads a root of `depth` levels in the dinode at `addr`.
    pub(crate) fn decode(addr: BlockAddr, depth: u8, bytes: &[u8]) -> Result<Self, FsError> {
        if !(1..=MAX_DEPTH).contains(&depth) {
            return Err(FsError::corrupt("dinode", addr, "its tree has an impossible depth"));
        }
        if bytes.is_empty() || !bytes.len().is_multiple_of(ENTRY) {
            return Err(FsError::corrupt("dinode", addr, "its tree has no root"));
        }
        Ok(Self { depth, entries: decode_entries(addr, bytes)? })
    }

    /// The bytes for the dinode.
    pub(crate) fn encode(&self) -> Vec<u8> {
        encode_entries(&self.entries)
    }
}

fn raw_entry(bytes: &[u8], slot: usize) -> RawIndexEntry {
    RawIndexEntry::read_from_bytes(&bytes[slot * ENTRY..(slot + 1) * ENTRY]).expect("an entry has its size")
}

/// Reads entries whose keys rise from 0.
pub(crate) fn decode_entries(addr: BlockAddr, bytes: &[u8]) -> Result<Vec<IndexEntry>, FsError> {
    let entries: Vec<IndexEntry> = (0..bytes.len() / ENTRY)
        .map(|slot| raw_entry(bytes, slot))
        .map(|raw| IndexEntry { key: raw.key.get(), child: BlockAddr(raw.child.get()) })
        .collect();
    let starts = entries.first().is_none_or(|first| first.key == 0);
    if !starts || entries.windows(2).any(|pair| pair[0].key >= pair[1].key) {
        return Err(FsError::corrupt("index node", addr, "its keys are out of order"));
    }
    Ok(entries)
}

fn encode_entries(entries: &[IndexEntry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.len() * ENTRY);
    for entry in entries {
        let raw = RawIndexEntry { key: entry.key.into(), child: entry.child.0.into() };
        bytes.extend_from_slice(raw.as_bytes());
    }
    bytes
}

/// The entries of a node or leaf, after its head has been checked against what its parent says it is.
#[derive(Clone, Copy)]
pub(crate) struct NodeBody<'a> {
    /// Number of entries.
    pub(crate) count: usize,
    /// Their bytes.
    pub(crate) bytes: &'a [u8],
}

/// Checks the head of a node at `addr`.
pub(crate) fn node_body(addr: BlockAddr, level: u8, block: &[u8]) -> Result<NodeBody<'_>, FsError> {
    let what = if level == 0 { "leaf" } else { "index node" };
    let bad = |why| FsError::corrupt(what, addr, why);
    let head = NodeHead::read_from_bytes(&block[HEAD_AT..ENTRIES_AT]).expect("a head has its size");
    if head.level.get() != u16::from(level) {
        return Err(bad("it is not at the level where its parent has it"));
    }
    if head.reserved_a.get() != 0 || head.reserved_b.get() != 0 {
        return Err(bad("reserved bytes are not zero"));
    }
    let (count, used) = (usize::from(head.count.get()), usize::from(head.used.get()));
    if used > ENTRIES_SIZE || (level > 0 && used != count * ENTRY) || (count == 0) != (used == 0) {
        return Err(bad("its entries do not fit it"));
    }
    Ok(NodeBody { count, bytes: &block[ENTRIES_AT..ENTRIES_AT + used] })
}

/// Fills the body of a node or leaf.
fn write_node(block: &mut [u8; BLOCK_SIZE], level: u8, count: usize, bytes: &[u8]) {
    assert!(bytes.len() <= ENTRIES_SIZE, "a node's entries fit its block");
    let mut head = NodeHead::new_zeroed();
    head.level = u16::from(level).into();
    head.count = (count as u16).into();
    head.used = (bytes.len() as u16).into();
    block[HEAD_AT..ENTRIES_AT].copy_from_slice(head.as_bytes());
    let (entries, rest) = block[ENTRIES_AT..].split_at_mut(bytes.len());
    entries.copy_from_slice(bytes);
    rest.fill(0);
}

/// The slot of the child that covers `key` among `count` entries (`count` > 0).
fn slot_of(count: usize, key: u64, key_of: impl Fn(usize) -> u64) -> usize {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = (low + high) / 2;
        if key_of(middle) <= key { low = middle + 1 } else { high = middle }
    }
    low.saturating_sub(1)
}

/// An index block on the way down.
#[derive(Clone)]
pub(crate) struct Visited {
    pub(crate) addr: BlockAddr,
    pub(crate) level: u8,
    /// The child taken; 0 in an empty node.
    pub(crate) slot: usize,
    image: Image,
}

impl Visited {
    fn entries(&self) -> Result<Vec<IndexEntry>, FsError> {
        decode_entries(self.addr, node_body(self.addr, self.level, &self.image)?.bytes)
    }
}

/// Where a descent ended.
#[derive(Clone)]
pub(crate) enum End {
    /// At a leaf.
    Leaf { addr: BlockAddr, image: Image },
    /// At an index node without entries, the last of the path's nodes.
    EmptyNode,
}

/// The way from a root to the leaf that covers a key.
#[derive(Clone)]
pub(crate) struct Path {
    /// The child taken in the root.
    pub(crate) root_slot: usize,
    /// Index blocks, top down.
    pub(crate) nodes: Vec<Visited>,
    pub(crate) end: End,
    /// First key the end covers.
    pub(crate) lower: u64,
    /// The end covers keys below this; `None` is no bound.
    pub(crate) upper: Option<u64>,
}

impl Path {
    /// The leaf's entries, none where there is no leaf.
    pub(crate) fn leaf(&self) -> Result<NodeBody<'_>, FsError> {
        match &self.end {
            End::Leaf { addr, image } => node_body(*addr, 0, image),
            End::EmptyNode => Ok(NodeBody { count: 0, bytes: &[] }),
        }
    }

    /// The block of the leaf or of the empty node.
    pub(crate) fn end_addr(&self) -> BlockAddr {
        match &self.end {
            End::Leaf { addr, .. } => *addr,
            End::EmptyNode => self.nodes.last().expect("an empty node is on the path").addr,
        }
    }

    /// Whether the end holds no entries and can be taken out of the tree.
    pub(crate) fn end_is_empty(&self) -> Result<bool, FsError> {
        Ok(self.leaf()?.count == 0)
    }
}

/// The blocks of one inode's tree.
#[derive(Clone, Copy)]
pub(crate) struct Tree<'a> {
    pub(crate) store: &'a Store,
    pub(crate) owner: LockName,
    pub(crate) leaf: BlockKind,
    pub(crate) index: BlockKind,
    /// Low half of the inode's generation, in every block of the tree.
    pub(crate) generation: u32,
}

impl Tree<'_> {
    async fn read(&self, addr: BlockAddr, kind: BlockKind) -> Result<Image, FsError> {
        let image = self.store.read(addr, kind, self.owner).await?;
        if generation_of(&image) != self.generation {
            return Err(FsError::corrupt(kind.name(), addr, "it belongs to an earlier inode"));
        }
        Ok(image)
    }

    /// Goes down to the leaf that covers `key`.
    pub(crate) async fn descend(&self, root: &Root, key: u64) -> Result<Path, FsError> {
        let root_slot = slot_of(root.entries.len(), key, |slot| root.entries[slot].key);
        let mut path = Path {
            root_slot,
            nodes: Vec::with_capacity(usize::from(root.depth)),
            end: End::EmptyNode,
            lower: if root_slot == 0 { 0 } else { root.entries[root_slot].key },
            upper: root.entries.get(root_slot + 1).map(|next| next.key),
        };
        let mut addr = root.entries[root_slot].child;
        for level in (1..root.depth).rev() {
            let image = self.read(addr, self.index).await?;
            let body = node_body(addr, level, &image)?;
            if body.count == 0 {
                path.nodes.push(Visited { addr, level, slot: 0, image });
                return Ok(path);
            }
            let slot = slot_of(body.count, key, |slot| raw_entry(body.bytes, slot).key.get());
            let taken = raw_entry(body.bytes, slot);
            if slot > 0 {
                path.lower = taken.key.get();
            }
            if slot + 1 < body.count {
                path.upper = Some(raw_entry(body.bytes, slot + 1).key.get());
            }
            if path.lower > key || path.upper.is_some_and(|upper| upper <= key) {
                return Err(FsError::corrupt("index node", addr, "its keys are out of order"));
            }
            let next = BlockAddr(taken.child.get());
            path.nodes.push(Visited { addr, level, slot, image });
            addr = next;
        }
        let image = self.read(addr, self.leaf).await?;
        path.end = End::Leaf { addr, image };
        Ok(path)
    }
}

/// The low half of the generation of the inode that a block says it belongs to.
pub(crate) fn generation_of(block: &[u8]) -> u32 {
    let (header, _) = Header::ref_from_prefix(block).expect("a block is longer than its header");
    header.owner_generation.get()
}

const _: () = assert!(INDEX_MAX * ENTRY <= ENTRIES_SIZE);
