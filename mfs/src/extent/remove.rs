//! Taking ranges out of a file, one allocation group at a time.

use std::ops::Range;

use super::{Extent, Shape, leaf, put_back, shape, tree};
use crate::alloc::{FreeGuard, Reservation, Run};
use crate::error::FsError;
use crate::index::{Path, Tree, needs_insert};
use crate::inode::{Content, Dinode, FREE_STEP_CREDITS, FreeStep, Needs, Piece};
use crate::store::{Store, Txn};
use storage_control::BlockAddr;

/// What one [`remove_step`] of the range may need: cutting a hole into an extent makes two of it.
pub fn remove_needs(dinode: &Dinode, range: &Range<u64>) -> Needs {
    let shrink = Needs { meta: 0, credits: FREE_STEP_CREDITS };
    match shape(dinode) {
        _ if range.end == u64::MAX => shrink,
        Shape::Other => Needs::default(),
        Shape::Inline(_) => needs_insert(0),
        Shape::Tree(root) => needs_insert(root.depth) + shrink,
    }
}

/// The next piece to free of what maps `range` (to truncate: `new_blocks..u64::MAX`); `None` when nothing
/// maps it and no empty node is left in it.
pub async fn next_to_free(
    store: &Store,
    dinode: &Dinode,
    range: Range<u64>,
) -> Result<Option<FreeStep>, FsError> {
    if range.is_empty() {
        return Ok(None);
    }
    let root = match shape(dinode) {
        Shape::Other => return Ok(None),
        Shape::Inline(list) => return Ok(last_of(list, &range)),
        Shape::Tree(root) => root,
    };
    let mut key = range.end - 1;
    loop {
        let path = tree(store, dinode).descend(root, key).await?;
        let list = leaf::decode(&path)?;
        if list.is_empty() {
            return Ok(Some(FreeStep { addr: path.end_addr(), piece: Piece::Node { key } }));
        }
        let found = last_of(&list, &range);
        if found.is_some() || path.lower <= range.start {
            return Ok(found);
        }
        key = path.lower - 1;
    }
}

/// The step that frees the end of what maps the range within a list.
fn last_of(list: &[Extent], range: &Range<u64>) -> Option<FreeStep> {
    let last = leaf::touching(list, range).last()?.clip(range);
    Some(FreeStep {
        addr: BlockAddr(last.physical.0 + u64::from(last.len) - 1),
        piece: Piece::Data { last: last.end() - 1 },
    })
}

/// Carries out a step of [`next_to_free`] for the same range and returns the runs of data it freed, all in
/// the group of `step.addr`. `res` as [`remove_needs`] says. The caller writes the dinode.
pub async fn remove_step(
    store: &Store,
    txn: &mut Txn,
    guard: &FreeGuard,
    res: Option<&mut Reservation>,
    dinode: &mut Dinode,
    range: Range<u64>,
    step: FreeStep,
) -> Result<Vec<Run>, FsError> {
    let key = match step.piece {
        Piece::Data { last } => last,
        Piece::Node { key } => key,
        Piece::Xattr { .. } => panic!("a step of extents is carried out here"),
    };
    let tree = tree(store, dinode);
    let path = match shape(dinode) {
        Shape::Other => panic!("a step of extents belongs to a file of extents"),
        Shape::Inline(_) => None,
        Shape::Tree(root) => Some(tree.descend(root, key).await?),
    };
    match step.piece {
        Piece::Data { last } => {
            remove_data(store, txn, guard, res, dinode, range.start..last + 1, path).await
        }
        Piece::Node { .. } | Piece::Xattr { .. } => {
            let path = path.expect("an empty node is part of a tree");
            remove_node(&tree, txn, guard, dinode, &path).await?;
            Ok(Vec::new())
        }
    }
}

/// Frees the data of one leaf in the range, from its end, as far as it lies in one group.
async fn remove_data(
    store: &Store,
    txn: &mut Txn,
    guard: &FreeGuard,
    res: Option<&mut Reservation>,
    dinode: &mut Dinode,
    range: Range<u64>,
    path: Option<Path>,
) -> Result<Vec<Run>, FsError> {
    let mut list = match (&path, shape(dinode)) {
        (Some(path), _) => leaf::decode(path)?,
        (None, Shape::Inline(list)) => list.to_vec(),
        (None, _) => unreachable!("without a path the extents are inline"),
    };
    let geometry = store.geometry();
    let mut runs: Vec<Run> = Vec::new();
    let mut at = list.partition_point(|extent| extent.logical < range.end);
    while at > 0 && list[at - 1].touches(&range) {
        let extent = list[at - 1];
        let part = extent.clip(&range);
        let group = geometry.group_of(part.physical);
        if group.is_none() || group != geometry.group_of(BlockAddr(part.physical.0 + u64::from(part.len) - 1))
        {
            return Err(FsError::corrupt(
                "extents of inode",
                dinode.addr(),
                "one crosses its allocation group",
            ));
        }
        if runs.first().is_some_and(|first| geometry.group_of(first.addr) != group) {
            break;
        }
        at -= 1;
        list.remove(at);
        if extent.end() > part.end() {
            list.insert(at, extent.clip(&(part.end()..extent.end())));
        }
        if extent.logical < part.logical {
            list.insert(at, extent.clip(&(extent.logical..part.logical)));
        }
        runs.push(Run { addr: part.physical, len: part.len });
        if extent.logical < part.logical {
            break;
        }
    }
    // First what can still refuse: a bitmap that says otherwise.
    for run in &runs {
        guard.free_run(txn, *run).await?;
        dinode.blocks = dinode.blocks.saturating_sub(u64::from(run.len));
    }
    put_back(store, txn, res, dinode, path.as_ref(), list, at).await?;
    Ok(runs)
}

async fn remove_node(
    tree: &Tree<'_>,
    txn: &mut Txn,
    guard: &FreeGuard,
    dinode: &mut Dinode,
    path: &Path,
) -> Result<(), FsError> {
    let Content::ExtentTree(root) = &mut dinode.content else { unreachable!("the path is a tree's") };
    if tree.take_out(txn, guard, &mut dinode.blocks, root, path).await? {
        dinode.content = Content::Extents(Vec::new());
    }
    Ok(())
}
