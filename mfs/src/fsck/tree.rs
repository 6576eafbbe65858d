//! Walks the trees of inodes, checking every node once.

use storage_control::BlockAddr;

use super::Checker;
use crate::format::group::BlockState;
use crate::format::header::{Block, BlockKind};
use crate::index::{Root, decode_entries, generation_of, node_body};
use crate::inode::Dinode;

/// A node that was announced by its parent.
struct Todo {
    addr: BlockAddr,
    level: u8,
    lower: u64,
    upper: Option<u64>,
}

/// A leaf with what its parents say about it.
pub(super) struct Leaf {
    pub(super) addr: BlockAddr,
    pub(super) block: Box<Block>,
    pub(super) lower: u64,
    pub(super) upper: Option<u64>,
}

/// What is left of a walk. Holds at most the siblings of the nodes on the way down.
pub(super) struct Walk {
    what: String,
    leaf: BlockKind,
    index: BlockKind,
    todo: Vec<Todo>,
    /// Blocks of the tree so far.
    pub(super) blocks: u64,
    /// Whether something was found wrong, so that counts cannot be compared.
    pub(super) broken: bool,
}

impl Walk {
    pub(super) fn new(what: String, dinode: &Dinode, root: &Root) -> Self {
        let (leaf, index) = match dinode.is_dir() {
            true => (BlockKind::DirLeaf, BlockKind::DirIndex),
            false => (BlockKind::Extents, BlockKind::Extents),
        };
        let mut walk = Self { what, leaf, index, todo: Vec::new(), blocks: 0, broken: false };
        let entries: Vec<_> = root.entries.iter().map(|entry| (entry.key, entry.child)).collect();
        walk.push(root.depth - 1, 0, None, &entries);
        walk
    }

    /// Queues children so that the first comes off first.
    fn push(&mut self, level: u8, lower: u64, upper: Option<u64>, children: &[(u64, BlockAddr)]) {
        for (slot, &(key, addr)) in children.iter().enumerate().rev() {
            let lower = if slot == 0 { lower } else { key };
            let upper = children.get(slot + 1).map(|next| next.0).or(upper);
            self.todo.push(Todo { addr, level, lower, upper });
        }
    }
}

impl Checker<'_> {
    /// The next leaf of the walk, in order of keys.
    pub(super) async fn next_leaf(&mut self, dinode: &Dinode, walk: &mut Walk) -> Option<Leaf> {
        while let Some(Todo { addr, level, lower, upper }) = walk.todo.pop() {
            walk.blocks += 1;
            if !self.take(&walk.what, addr, 1, BlockState::Metadata) {
                walk.broken = true;
                continue;
            }
            let kind = if level == 0 { walk.leaf } else { walk.index };
            let block = match self.block(addr, kind, dinode.owner()).await {
                Ok(block) => block,
                Err(error) => {
                    self.report.failure(walk.what.as_str(), addr, &error);
                    walk.broken = true;
                    continue;
                }
            };
            if generation_of(&*block) != dinode.generation as u32 {
                self.report.error(
                    walk.what.as_str(),
                    addr,
                    "a block of its tree belongs to an earlier inode",
                );
                walk.broken = true;
            }
            if level == 0 {
                return Some(Leaf { addr, block, lower, upper });
            }
            let entries = node_body(addr, level, &*block).and_then(|body| decode_entries(addr, body.bytes));
            let children: Vec<_> = match entries {
                Ok(entries) => entries.iter().map(|entry| (entry.key, entry.child)).collect(),
                Err(error) => {
                    self.report.failure(walk.what.as_str(), addr, &error);
                    walk.broken = true;
                    continue;
                }
            };
            let inside =
                children.iter().skip(1).all(|&(key, _)| key > lower && upper.is_none_or(|upper| key < upper));
            if !inside {
                self.report.error(walk.what.as_str(), addr, "an index node has keys outside what it covers");
                walk.broken = true;
            }
            walk.push(level - 1, lower, upper, &children);
        }
        None
    }
}
