//! Maps from a file's blocks to the device's.
//!
//! Extents of a file are sorted and apart. Every extent lies within the range of keys its leaf covers, so that
//! one descent finds what maps a block. A range is freed from its end, in steps that touch one allocation
//! group each and can stop anywhere.

mod leaf;
mod remove;
#[cfg(test)]
mod tests;

use std::ops::Range;

use storage_control::BlockAddr;

pub(crate) use leaf::{decode_list, encode_list};
pub use remove::{next_to_free, remove_needs, remove_step};

use crate::alloc::Reservation;
use crate::error::FsError;
use crate::format::dinode::AREA_SIZE;
use crate::format::extent::{LOGICAL_END, flags};
use crate::format::header::BlockKind;
use crate::index::{Growth, Path, Root, Tree, needs_insert};
use crate::inode::{Content, Dinode, Needs};
use crate::store::{Store, Txn};

/// A run of a file's blocks on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First block in the file.
    pub logical: u64,
    /// First block on the device.
    pub physical: BlockAddr,
    /// Index in the superblock's device table.
    pub device: u16,
    /// Blocks, at least 1.
    pub len: u32,
    /// Bits of [`crate::format::extent::flags`].
    pub flags: u32,
}

impl Extent {
    /// Written blocks on the first device.
    pub fn new(logical: u64, physical: BlockAddr, len: u32) -> Self {
        Self { logical, physical, device: 0, len, flags: 0 }
    }

    /// One past the last block in the file.
    pub fn end(&self) -> u64 {
        self.logical + u64::from(self.len)
    }

    /// Whether it reads as zeros.
    pub fn is_unwritten(&self) -> bool {
        self.flags & flags::UNWRITTEN != 0
    }

    /// The part within `range`, which it must touch.
    fn clip(&self, range: &Range<u64>) -> Self {
        let start = self.logical.max(range.start);
        let end = self.end().min(range.end);
        debug_assert!(start < end);
        Self {
            logical: start,
            physical: BlockAddr(self.physical.0 + (start - self.logical)),
            len: (end - start) as u32,
            ..*self
        }
    }

    fn touches(&self, range: &Range<u64>) -> bool {
        self.logical < range.end && self.end() > range.start
    }
}

/// A piece of a mapped range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// No blocks.
    Hole {
        /// First block in the file.
        logical: u64,
        /// Blocks.
        len: u64,
    },
    /// Blocks on a device.
    Data(Extent),
}

/// The tree of a file.
fn tree<'a>(store: &'a Store, dinode: &Dinode) -> Tree<'a> {
    Tree {
        store,
        owner: dinode.owner(),
        leaf: BlockKind::Extents,
        index: BlockKind::Extents,
        generation: dinode.generation as u32,
    }
}

/// Entries that the root of a tree may have in this dinode.
fn root_room(dinode: &Dinode) -> usize {
    (AREA_SIZE - dinode.xattrs.inline.len()) / 16
}

/// Extents that this dinode may have inline.
fn inline_room(dinode: &Dinode) -> usize {
    (AREA_SIZE - dinode.xattrs.inline.len()) / 24
}

/// What of the file's content is extents.
enum Shape<'a> {
    /// None: inline data, or another type of file.
    Other,
    Inline(&'a [Extent]),
    Tree(&'a Root),
}

fn shape(dinode: &Dinode) -> Shape<'_> {
    match &dinode.content {
        Content::Extents(list) => Shape::Inline(list),
        Content::ExtentTree(root) => Shape::Tree(root),
        Content::None | Content::Data(_) | Content::Dirents(_) | Content::DirentTree(_) => Shape::Other,
    }
}

/// Calls `visit` with the file's extents that touch `range`, in order, until it returns false.
async fn visit(
    store: &Store,
    dinode: &Dinode,
    range: &Range<u64>,
    mut visit: impl FnMut(Extent) -> bool,
) -> Result<(), FsError> {
    let root = match shape(dinode) {
        Shape::Other => return Ok(()),
        Shape::Inline(list) => {
            for extent in leaf::touching(list, range) {
                if !visit(*extent) {
                    break;
                }
            }
            return Ok(());
        }
        Shape::Tree(root) => root,
    };
    let mut key = range.start;
    while key < range.end {
        let path = tree(store, dinode).descend(root, key).await?;
        for extent in leaf::touching(&leaf::decode(&path)?, range) {
            if !visit(*extent) {
                return Ok(());
            }
        }
        match path.upper {
            Some(upper) => key = upper,
            None => break,
        }
    }
    Ok(())
}

/// What maps `[logical, logical + len)`: pieces in order that cover it exactly.
pub async fn map(store: &Store, dinode: &Dinode, logical: u64, len: u64) -> Result<Vec<Mapping>, FsError> {
    let range = logical..logical.saturating_add(len);
    let mut pieces = Vec::new();
    let mut at = range.start;
    visit(store, dinode, &range, |extent| {
        let part = extent.clip(&range);
        if part.logical > at {
            pieces.push(Mapping::Hole { logical: at, len: part.logical - at });
        }
        pieces.push(Mapping::Data(part));
        at = part.end();
        true
    })
    .await?;
    if at < range.end {
        pieces.push(Mapping::Hole { logical: at, len: range.end - at });
    }
    Ok(pieces)
}

/// The first extent that ends after block `from` (for `SEEK_DATA` and `SEEK_HOLE`).
pub async fn next_data(store: &Store, dinode: &Dinode, from: u64) -> Result<Option<Extent>, FsError> {
    let mut found = None;
    visit(store, dinode, &(from..u64::MAX), |extent| {
        found = Some(extent);
        false
    })
    .await?;
    Ok(found)
}

/// What [`insert`] of blocks `[logical, logical + len)` may need. Reads all that it will read and checks that
/// the blocks are a hole, so that a damaged tree is found before the transaction opens.
pub async fn insert_needs(store: &Store, dinode: &Dinode, logical: u64, len: u64) -> Result<Needs, FsError> {
    let range = logical..logical.saturating_add(len.max(1));
    let root = match shape(dinode) {
        Shape::Other => return Ok(needs_insert(0)),
        Shape::Inline(list) => {
            check_hole(dinode, list, &range)?;
            return Ok(needs_insert(0));
        }
        Shape::Tree(root) => root,
    };
    let mut needs = Needs::default();
    let mut key = range.start;
    while key < range.end {
        let path = tree(store, dinode).descend(root, key).await?;
        check_hole(dinode, &leaf::decode(&path)?, &range)?;
        // The first piece may add a level to the tree.
        needs = needs + needs_insert(root.depth + u8::from(key != logical));
        key = path.upper.unwrap_or(u64::MAX);
    }
    Ok(needs)
}

fn check_hole(dinode: &Dinode, list: &[Extent], range: &Range<u64>) -> Result<(), FsError> {
    match leaf::touching(list, range) {
        [] => Ok(()),
        _ => Err(FsError::corrupt("extents of inode", dinode.addr(), leaf::MAPPED)),
    }
}

/// Maps the blocks of `new`, which must be a hole, joining them with neighbours that continue on the device.
/// An inline file must have been turned into `Content::Extents` by the caller. Call [`insert_needs`] first.
pub async fn insert(
    store: &Store,
    txn: &mut Txn,
    res: &mut Reservation,
    dinode: &mut Dinode,
    new: Extent,
) -> Result<(), FsError> {
    assert!(new.len > 0 && new.end() <= LOGICAL_END, "an extent has blocks within the largest file");
    let mut rest = Some(new);
    while let Some(extent) = rest.take() {
        let path = match shape(dinode) {
            Shape::Other => panic!("extents go into a file of extents"),
            Shape::Inline(_) => None,
            Shape::Tree(root) => Some(tree(store, dinode).descend(root, extent.logical).await?),
        };
        let part = match path.as_ref().and_then(|path| path.upper) {
            Some(upper) if upper < extent.end() => {
                rest = Some(extent.clip(&(upper..extent.end())));
                extent.clip(&(extent.logical..upper))
            }
            _ => extent,
        };
        let mut list = match (&path, shape(dinode)) {
            (Some(path), _) => leaf::decode(path)?,
            (None, Shape::Inline(list)) => list.to_vec(),
            (None, _) => unreachable!("without a path the extents are inline"),
        };
        let at = leaf::insert(&mut list, part)
            .map_err(|why| FsError::corrupt("extents of inode", dinode.addr(), why))?;
        put_back(store, txn, Some(&mut *res), dinode, path.as_ref(), list, at).await?;
        dinode.blocks += u64::from(part.len);
    }
    Ok(())
}

/// Puts the changed extents of one leaf (or of the dinode) back; `at` is where one was inserted.
async fn put_back(
    store: &Store,
    txn: &mut Txn,
    res: Option<&mut Reservation>,
    dinode: &mut Dinode,
    path: Option<&Path>,
    list: Vec<Extent>,
    at: usize,
) -> Result<(), FsError> {
    let tree = tree(store, dinode);
    let (inline, room) = (inline_room(dinode), root_room(dinode));
    let mut growth = Growth { txn, res, blocks: &mut dinode.blocks };
    match (&mut dinode.content, path) {
        (Content::ExtentTree(root), Some(path)) => {
            let split = leaf::split(list, at);
            tree.put_leaf(&mut growth, root, room, path, split).await
        }
        (content, _) => {
            *content = if list.len() <= inline {
                Content::Extents(list)
            } else {
                let split = leaf::split(list, at);
                Content::ExtentTree(tree.plant(&mut growth, split).await?)
            };
            Ok(())
        }
    }
}
