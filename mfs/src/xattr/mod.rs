//! Extended attributes.
//!
//! All attributes of an inode are one list, sorted by name. It lies in the dinode while it fits there, else in
//! a chain of blocks that is rewritten in place as a whole; blocks a shorter list leaves behind stay in the
//! chain, hold nothing, and are freed one by one.

mod list;
#[cfg(test)]
mod tests;

use storage_control::BlockAddr;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

pub(crate) use list::decode_list;

use crate::alloc::{FreeGuard, Reservation};
use crate::error::FsError;
use crate::format::dinode::{AREA_SIZE, XATTR_INLINE_MAX};
use crate::format::header::{Block, BlockKind, Header};
use crate::format::xattr::{
    BYTES_AT, BYTES_MAX, CHAIN_MAX, ENTRY_HEAD, HEAD_AT, LIST_MAX, NAME_MAX, VALUE_MAX, XattrHead,
};
use crate::inode::{Content, Dinode, FreeStep, Needs, Piece};
use crate::store::{Store, Txn};

/// One attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// Full name, namespace included.
    pub name: Vec<u8>,
    /// Value.
    pub value: Vec<u8>,
}

/// What [`set`] does where the name exists or not (`setxattr(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetMode {
    /// Create or replace.
    Any,
    /// Only create: [`FsError::Exists`] otherwise.
    Create,
    /// Only replace: [`FsError::NoData`] otherwise.
    Replace,
}

/// A list that was prepared before the transaction, and how it gets into the inode.
#[derive(Debug)]
pub struct Change {
    bytes: Vec<u8>,
    /// Blocks of the chain the inode has.
    chain: Vec<BlockAddr>,
    /// Whether the list goes into the dinode.
    inline: bool,
}

impl Change {
    /// What [`apply`] may need.
    pub fn needs(&self) -> Needs {
        let have = self.chain.len();
        let want = if self.inline { 0 } else { self.bytes.len().div_ceil(BYTES_MAX) };
        Needs { meta: want.saturating_sub(have) as u32, credits: want.max(have) as u32 }
    }
}

/// Reads the inode's attributes, in order of names.
pub async fn list(store: &Store, dinode: &Dinode) -> Result<Vec<Xattr>, FsError> {
    if !dinode.xattrs.inline.is_empty() {
        return decode_list(dinode.addr(), &dinode.xattrs.inline);
    }
    let (_, bytes) = read_chain(store, dinode).await?;
    decode_list(dinode.xattrs.root.unwrap_or(dinode.addr()), &bytes)
}

/// The value of one attribute.
pub async fn get(store: &Store, dinode: &Dinode, name: &[u8]) -> Result<Option<Vec<u8>>, FsError> {
    let found = list(store, dinode).await?.into_iter().find(|xattr| xattr.name == name);
    Ok(found.map(|xattr| xattr.value))
}

/// Prepares setting an attribute.
pub async fn set(
    store: &Store,
    dinode: &Dinode,
    name: &[u8],
    value: &[u8],
    mode: SetMode,
) -> Result<Change, FsError> {
    if name.is_empty() || name.contains(&0) {
        return Err(FsError::Invalid);
    }
    if name.len() > NAME_MAX {
        return Err(FsError::Range);
    }
    if value.len() > VALUE_MAX {
        return Err(FsError::Range);
    }
    let mut all = list(store, dinode).await?;
    let new = Xattr { name: name.to_vec(), value: value.to_vec() };
    match (all.binary_search_by(|xattr| xattr.name.as_slice().cmp(name)), mode) {
        (Ok(_), SetMode::Create) => return Err(FsError::Exists),
        (Err(_), SetMode::Replace) => return Err(FsError::NoData),
        (Ok(at), SetMode::Any | SetMode::Replace) => all[at] = new,
        (Err(at), SetMode::Any | SetMode::Create) => all.insert(at, new),
    }
    prepare(store, dinode, &all).await
}

/// Prepares removing an attribute; [`FsError::NoData`] if there is none of the name.
pub async fn remove(store: &Store, dinode: &Dinode, name: &[u8]) -> Result<Change, FsError> {
    let mut all = list(store, dinode).await?;
    let at = all.iter().position(|xattr| xattr.name == name).ok_or(FsError::NoData)?;
    all.remove(at);
    prepare(store, dinode, &all).await
}

async fn prepare(store: &Store, dinode: &Dinode, all: &[Xattr]) -> Result<Change, FsError> {
    let bytes = list::encode_list(all);
    if bytes.len() > LIST_MAX {
        return Err(FsError::NoSpace);
    }
    let content = match &dinode.content {
        Content::None => 0,
        Content::Data(bytes) | Content::Dirents(bytes) => bytes.len(),
        Content::Extents(list) => list.len() * size_of::<crate::format::extent::RawExtent>(),
        Content::ExtentTree(root) | Content::DirentTree(root) => {
            root.entries.len() * size_of::<crate::format::index::RawIndexEntry>()
        }
    };
    let inline = bytes.len() <= XATTR_INLINE_MAX && bytes.len() + content <= AREA_SIZE;
    let (chain, _) = read_chain(store, dinode).await?;
    Ok(Change { bytes, chain: chain.into_iter().map(|(addr, _)| addr).collect(), inline })
}

/// Carries out a change prepared for this inode, which has been locked since. The caller writes the dinode.
pub async fn apply(
    txn: &mut Txn,
    res: &mut Reservation,
    dinode: &mut Dinode,
    change: Change,
) -> Result<(), FsError> {
    let Change { bytes, mut chain, inline } = change;
    let have = chain.len();
    let outside: &[u8] = if inline { &[] } else { &bytes };
    while chain.len() < outside.len().div_ceil(BYTES_MAX) {
        let addr = res.meta();
        res.log_meta(txn, addr).await?;
        dinode.blocks += 1;
        chain.push(addr);
    }
    let mut pieces = outside.chunks(BYTES_MAX);
    for (at, &addr) in chain.iter().enumerate() {
        let piece = pieces.next().unwrap_or(&[]);
        let next = chain.get(at + 1).copied();
        let fill = |block: &mut Block| write_block(block, next, piece);
        if at < have {
            txn.edit(addr, BlockKind::Xattr, dinode.owner(), fill).await?;
        } else {
            let generation = dinode.generation as u32;
            txn.create(addr, BlockKind::Xattr, dinode.owner(), |block| {
                Header::of_mut(block).owner_generation = generation.into();
                fill(block);
            });
        }
    }
    dinode.xattrs.root = chain.first().copied();
    dinode.xattrs.inline = if inline { bytes } else { Vec::new() };
    Ok(())
}

fn write_block(block: &mut Block, next: Option<BlockAddr>, piece: &[u8]) {
    let mut head = XattrHead::new_zeroed();
    head.next = next.map_or(0, |addr| addr.0).into();
    head.used = (piece.len() as u32).into();
    block[HEAD_AT..BYTES_AT].copy_from_slice(head.as_bytes());
    let (bytes, rest) = block[BYTES_AT..].split_at_mut(piece.len());
    bytes.copy_from_slice(piece);
    rest.fill(0);
}

/// Checks the body of a chain's block and returns the next block and the bytes.
pub(crate) fn read_block(addr: BlockAddr, block: &[u8]) -> Result<(Option<BlockAddr>, &[u8]), FsError> {
    let head = XattrHead::read_from_bytes(&block[HEAD_AT..BYTES_AT]).expect("a head has its size");
    let used = head.used.get() as usize;
    if used > BYTES_MAX || head.reserved.get() != 0 {
        return Err(FsError::corrupt("extended attributes", addr, "the head of the block makes no sense"));
    }
    let next = head.next.get();
    Ok(((next != 0).then_some(BlockAddr(next)), &block[BYTES_AT..BYTES_AT + used]))
}

/// The blocks of the chain with the bytes that each uses, and all bytes.
async fn read_chain(store: &Store, dinode: &Dinode) -> Result<(Vec<(BlockAddr, usize)>, Vec<u8>), FsError> {
    let (mut chain, mut bytes) = (Vec::new(), Vec::new());
    let mut next = dinode.xattrs.root;
    while let Some(addr) = next {
        let bad = |why| FsError::corrupt("extended attributes", addr, why);
        if chain.len() == CHAIN_MAX {
            return Err(bad("the chain is too long"));
        }
        let image = store.read(addr, BlockKind::Xattr, dinode.owner()).await?;
        if crate::index::generation_of(&image) != dinode.generation as u32 {
            return Err(bad("it belongs to an earlier inode"));
        }
        let (after, piece) = read_block(addr, &image)?;
        chain.push((addr, piece.len()));
        bytes.extend_from_slice(piece);
        next = after;
    }
    Ok((chain, bytes))
}

/// The next block of the chain to free: one that holds nothing, or with `all` (the inode is to go) any.
pub async fn next_to_free(store: &Store, dinode: &Dinode, all: bool) -> Result<Option<FreeStep>, FsError> {
    let (chain, _) = read_chain(store, dinode).await?;
    let before = chain.len().checked_sub(2).map(|at| chain[at].0);
    let last = chain.last().filter(|(_, used)| all || *used == 0);
    Ok(last.map(|&(addr, _)| FreeStep { addr, piece: Piece::Xattr { before } }))
}

/// Carries out a step of [`next_to_free`]. The caller writes the dinode.
pub async fn free_step(
    txn: &mut Txn,
    guard: &FreeGuard,
    dinode: &mut Dinode,
    step: FreeStep,
) -> Result<(), FsError> {
    let Piece::Xattr { before } = step.piece else {
        panic!("a step of extended attributes frees their block")
    };
    match before {
        Some(before) => {
            txn.edit(before, BlockKind::Xattr, dinode.owner(), |block| {
                block[HEAD_AT..HEAD_AT + 8].fill(0);
            })
            .await?;
        }
        None => dinode.xattrs.root = None,
    }
    guard.free_meta(txn, step.addr).await?;
    dinode.blocks = dinode.blocks.saturating_sub(1);
    Ok(())
}

const _: () = assert!(ENTRY_HEAD + NAME_MAX + VALUE_MAX <= LIST_MAX);
