//! Directories: names to inodes.
//!
//! Entries are sorted by cookie, everywhere. A cookie follows from the name's hash and is unique in the
//! directory; it does not change while the name exists, whatever leaf the entry lies in, so a listing that
//! goes on after a cookie neither repeats nor misses a name that was there all the time. Names of one hash
//! have adjacent cookies. `.` and `..` are not stored.

mod hash;
mod packed;
#[cfg(test)]
mod tests;

use storage_control::BlockAddr;

pub(crate) use hash::{cookie_range, name_hash};
pub(crate) use packed::{Entry, entries, size as entry_size};

use crate::alloc::{FreeGuard, Reservation};
use crate::error::FsError;
use crate::format::dinode::AREA_SIZE;
use crate::format::dirent::NAME_MAX;
use crate::format::header::BlockKind;
use crate::index::{Growth, Path, Tree, needs_insert};
use crate::inode::{Content, Dinode, FREE_STEP_CREDITS, FileType, FreeStep, Needs, Piece};
use crate::store::{Store, Txn};

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirent {
    /// Place in the order of the listing: a listing goes on behind it. Above 2 (`.` is 1, `..` is 2), below
    /// 2^63.
    pub cookie: u64,
    /// Inode number.
    pub ino: u64,
    /// The inode's generation.
    pub generation: u64,
    /// The inode's type.
    pub kind: FileType,
    /// 1 to 255 bytes without `/` and NUL.
    pub name: Vec<u8>,
}

/// What a name points at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Inode number.
    pub ino: u64,
    /// The inode's generation.
    pub generation: u64,
    /// The inode's type.
    pub kind: FileType,
}

impl Target {
    /// The inode as a target.
    pub fn of(dinode: &Dinode) -> Self {
        Self { ino: dinode.ino, generation: dinode.generation, kind: dinode.kind }
    }
}

/// What taking a name out will do, known before the transaction opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    /// The entry.
    pub dirent: Dirent,
    /// A leaf that is empty afterwards. Given the lock of its group, [`remove`] frees it; without it the
    /// leaf stays for later names.
    pub frees: Option<BlockAddr>,
}

/// Credits of [`remove`], freeing a leaf included, beside bitmaps and the dinode.
pub const REMOVE_CREDITS: u32 = 1 + FREE_STEP_CREDITS;
/// Credits of [`replace`] beside the dinode.
pub const REPLACE_CREDITS: u32 = 1;

fn tree<'a>(store: &'a Store, dinode: &Dinode) -> Tree<'a> {
    Tree {
        store,
        owner: dinode.owner(),
        leaf: BlockKind::DirLeaf,
        index: BlockKind::DirIndex,
        generation: dinode.generation as u32,
    }
}

/// Refuses what cannot be the name of an entry.
pub fn check_name(name: &[u8]) -> Result<(), FsError> {
    if name.len() > NAME_MAX {
        return Err(FsError::NameTooLong);
    }
    if !packed::is_name(name) {
        return Err(FsError::Invalid);
    }
    Ok(())
}

fn owned(entry: &Entry<'_>) -> Dirent {
    Dirent {
        cookie: entry.cookie,
        ino: entry.ino,
        generation: entry.generation,
        kind: entry.kind,
        name: entry.name.to_vec(),
    }
}

/// Whether it has no entries.
pub fn is_empty(dinode: &Dinode) -> bool {
    dinode.entries == 0
}

/// Calls `visit` with the entries from cookie `from` on, in order, until it returns false. With them comes
/// the path of their leaf (none: inline).
async fn visit(
    store: &Store,
    dinode: &Dinode,
    from: u64,
    mut visit: impl FnMut(&Entry<'_>, Option<&Path>) -> bool,
) -> Result<(), FsError> {
    let root = match &dinode.content {
        Content::Dirents(bytes) => {
            for entry in entries(dinode.addr(), bytes) {
                let entry = entry?;
                if entry.cookie >= from && !visit(&entry, None) {
                    break;
                }
            }
            return Ok(());
        }
        Content::DirentTree(root) => root,
        Content::None | Content::Data(_) | Content::Extents(_) | Content::ExtentTree(_) => {
            return Err(FsError::NotDir);
        }
    };
    let mut key = from;
    loop {
        let path = tree(store, dinode).descend(root, key).await?;
        for entry in packed::leaf(&path)? {
            let entry = entry?;
            if entry.cookie >= from && !visit(&entry, Some(&path)) {
                return Ok(());
            }
        }
        match path.upper {
            Some(upper) => key = upper,
            None => return Ok(()),
        }
    }
}

/// Calls `visit` with the entries whose names have the hash of `name`, until it returns false.
async fn visit_hash(
    store: &Store,
    dinode: &Dinode,
    name: &[u8],
    mut found: impl FnMut(&Entry<'_>, Option<&Path>) -> bool,
) -> Result<(), FsError> {
    let range = cookie_range(name_hash(store.superblock(), name));
    // Without a tree the scan is short; with one, the leaf that covers the range is the only one as a rule.
    let mut key = range.start;
    let Content::DirentTree(root) = &dinode.content else {
        return visit(store, dinode, range.start, |entry, path| {
            entry.cookie < range.end && found(entry, path)
        })
        .await;
    };
    while key < range.end {
        let path = tree(store, dinode).descend(root, key).await?;
        for entry in packed::leaf(&path)? {
            let entry = entry?;
            if range.contains(&entry.cookie) && !found(&entry, Some(&path)) {
                return Ok(());
            }
        }
        key = path.upper.unwrap_or(range.end);
    }
    Ok(())
}

/// The entry with this name.
pub async fn lookup(store: &Store, dinode: &Dinode, name: &[u8]) -> Result<Option<Dirent>, FsError> {
    let mut found = None;
    visit_hash(store, dinode, name, |entry, _| {
        if entry.name == name {
            found = Some(owned(entry));
        }
        found.is_none()
    })
    .await?;
    Ok(found)
}

/// Up to `max` entries whose cookies are above `after`, in order of cookies. Start with 0.
pub async fn list(store: &Store, dinode: &Dinode, after: u64, max: usize) -> Result<Vec<Dirent>, FsError> {
    let mut list = Vec::new();
    if max == 0 || after == u64::MAX {
        return Ok(list);
    }
    visit(store, dinode, after + 1, |entry, _| {
        list.push(owned(entry));
        list.len() < max
    })
    .await?;
    Ok(list)
}

/// What [`insert`] may need.
pub fn insert_needs(dinode: &Dinode) -> Needs {
    match &dinode.content {
        Content::DirentTree(root) => needs_insert(root.depth),
        _ => needs_insert(0),
    }
}

/// Adds a name; [`FsError::Exists`] if it is there. Returns its cookie. The caller writes the dinode.
pub async fn insert(
    store: &Store,
    txn: &mut Txn,
    res: &mut Reservation,
    dinode: &mut Dinode,
    name: &[u8],
    target: Target,
) -> Result<u64, FsError> {
    check_name(name)?;
    let cookie = free_cookie(store, dinode, name).await?;
    let entry = Entry { cookie, ino: target.ino, generation: target.generation, kind: target.kind, name };
    let tree = tree(store, dinode);
    let inline = dinode.inline_room();
    let root_room = (AREA_SIZE - dinode.xattrs.inline.len()) / 16;
    let mut growth = Growth { txn, res: Some(res), blocks: &mut dinode.blocks };
    match &mut dinode.content {
        Content::Dirents(bytes) => {
            let grown = packed::with(dinode.ino, bytes, &entry)?;
            if grown.bytes.len() <= inline {
                *bytes = grown.bytes;
            } else {
                let split = packed::split(grown);
                let root = tree.plant(&mut growth, split).await?;
                dinode.content = Content::DirentTree(root);
            }
        }
        Content::DirentTree(root) => {
            let path = tree.descend(root, cookie).await?;
            let grown = packed::with(path.end_addr().0, path.leaf()?.bytes, &entry)?;
            let split = packed::split(grown);
            tree.put_leaf(&mut growth, root, root_room, &path, split).await?;
        }
        Content::None | Content::Data(_) | Content::Extents(_) | Content::ExtentTree(_) => {
            return Err(FsError::NotDir);
        }
    }
    dinode.entries += 1;
    dinode.size += packed::size(name) as u64;
    Ok(cookie)
}

/// The lowest cookie of the name's hash that is free.
async fn free_cookie(store: &Store, dinode: &Dinode, name: &[u8]) -> Result<u64, FsError> {
    let range = cookie_range(name_hash(store.superblock(), name));
    let (mut next, mut exists) = (range.start, false);
    visit_hash(store, dinode, name, |entry, _| {
        exists |= entry.name == name;
        if entry.cookie == next {
            next += 1;
        }
        !exists
    })
    .await?;
    if exists {
        return Err(FsError::Exists);
    }
    if next == range.end {
        return Err(FsError::NoSpace);
    }
    Ok(next)
}

/// Finds the entry to remove, and the leaf that will be empty then.
pub async fn plan_remove(store: &Store, dinode: &Dinode, name: &[u8]) -> Result<Option<Removal>, FsError> {
    let mut found = None;
    let mut failed = None;
    visit_hash(store, dinode, name, |entry, path| {
        if entry.name != name {
            return true;
        }
        let frees = match path.map(Path::leaf) {
            Some(Ok(leaf)) if leaf.count == 1 => path.map(Path::end_addr),
            Some(Err(error)) => {
                failed = Some(error);
                None
            }
            Some(Ok(_)) | None => None,
        };
        found = Some(Removal { dirent: owned(entry), frees });
        false
    })
    .await?;
    failed.map_or(Ok(found), Err)
}

/// Takes out the entry that [`plan_remove`] found; the directory has been locked since. With the lock of the
/// group of `removal.frees` the empty leaf is freed. The caller writes the dinode.
pub async fn remove(
    store: &Store,
    txn: &mut Txn,
    guard: Option<&FreeGuard>,
    dinode: &mut Dinode,
    removal: &Removal,
) -> Result<(), FsError> {
    let cookie = removal.dirent.cookie;
    let tree = tree(store, dinode);
    let mut size = dinode.size.saturating_sub(packed::size(&removal.dirent.name) as u64);
    match &mut dinode.content {
        Content::Dirents(bytes) => {
            *bytes = packed::without(dinode.ino, bytes, cookie)?.bytes;
            size = bytes.len() as u64;
        }
        Content::DirentTree(root) => {
            let path = tree.descend(root, cookie).await?;
            let shrunk = packed::without(path.end_addr().0, path.leaf()?.bytes, cookie)?;
            match guard {
                Some(guard) if shrunk.count == 0 && removal.frees == Some(path.end_addr()) => {
                    if tree.take_out(txn, guard, &mut dinode.blocks, root, &path).await? {
                        dinode.content = Content::Dirents(Vec::new());
                        size = 0;
                    }
                }
                _ => tree.put_whole(txn, &path, shrunk).await?,
            }
        }
        Content::None | Content::Data(_) | Content::Extents(_) | Content::ExtentTree(_) => {
            return Err(FsError::NotDir);
        }
    }
    dinode.entries = dinode.entries.saturating_sub(1);
    dinode.size = size;
    Ok(())
}

/// Points an existing name at another inode and returns what it was. The caller writes the dinode.
pub async fn replace(
    store: &Store,
    txn: &mut Txn,
    dinode: &mut Dinode,
    name: &[u8],
    target: Target,
) -> Result<Dirent, FsError> {
    let old = lookup(store, dinode, name).await?.ok_or(FsError::NotFound)?;
    let tree = tree(store, dinode);
    match &mut dinode.content {
        Content::Dirents(bytes) => *bytes = packed::retarget(dinode.ino, bytes, old.cookie, target)?.bytes,
        Content::DirentTree(root) => {
            let path = tree.descend(root, old.cookie).await?;
            let changed = packed::retarget(path.end_addr().0, path.leaf()?.bytes, old.cookie, target)?;
            tree.put_whole(txn, &path, changed).await?;
        }
        Content::None | Content::Data(_) | Content::Extents(_) | Content::ExtentTree(_) => {
            return Err(FsError::NotDir);
        }
    }
    Ok(old)
}

/// The next node to free of a directory without entries that is to go; `None` when no tree is left.
pub async fn next_to_free(store: &Store, dinode: &Dinode) -> Result<Option<FreeStep>, FsError> {
    let Content::DirentTree(root) = &dinode.content else { return Ok(None) };
    let key = u64::MAX;
    let path = tree(store, dinode).descend(root, key).await?;
    if !path.end_is_empty()? {
        return Err(FsError::corrupt("directory", dinode.addr(), "it has entries and says that it has none"));
    }
    Ok(Some(FreeStep { addr: path.end_addr(), piece: Piece::Node { key } }))
}

/// Carries out a step of [`next_to_free`]. The caller writes the dinode.
pub async fn free_step(
    store: &Store,
    txn: &mut Txn,
    guard: &FreeGuard,
    dinode: &mut Dinode,
    step: FreeStep,
) -> Result<(), FsError> {
    let Piece::Node { key } = step.piece else { panic!("a step of a directory frees a node") };
    let tree = tree(store, dinode);
    let Content::DirentTree(root) = &mut dinode.content else { panic!("a step of a directory has a tree") };
    let path = tree.descend(root, key).await?;
    if tree.take_out(txn, guard, &mut dinode.blocks, root, &path).await? {
        dinode.content = Content::Dirents(Vec::new());
        dinode.size = 0;
    }
    Ok(())
}
