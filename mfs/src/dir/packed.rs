//! Entries packed one after the other, sorted by cookie, as a leaf or a dinode holds them.

use storage_control::BlockAddr;
use zerocopy::{FromBytes, IntoBytes};

use super::Target;
use crate::error::FsError;
use crate::format::dirent::{COLLISION_BITS, RawDirent};
use crate::format::index::ENTRIES_SIZE;
use crate::index::{LeafBytes, Path, Split};
use crate::inode::FileType;

const HEAD: usize = size_of::<RawDirent>();

/// An entry where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    pub(crate) cookie: u64,
    pub(crate) ino: u64,
    pub(crate) generation: u64,
    pub(crate) kind: FileType,
    pub(crate) name: &'a [u8],
}

impl Entry<'_> {
    fn append_to(&self, bytes: &mut Vec<u8>) {
        let raw = RawDirent {
            cookie: self.cookie.into(),
            ino: self.ino.into(),
            generation: self.generation.into(),
            kind: self.kind as u8,
            name_len: self.name.len() as u8,
        };
        bytes.extend_from_slice(raw.as_bytes());
        bytes.extend_from_slice(self.name);
    }
}

/// Bytes an entry with this name takes.
pub(crate) fn size(name: &[u8]) -> usize {
    HEAD + name.len()
}

/// Whether these bytes can be the name of an entry.
pub(crate) fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !name.contains(&b'/') && !name.contains(&0)
}

/// Checks and walks packed entries of the block at `addr`. The first error ends the walk.
pub(crate) fn entries(addr: BlockAddr, bytes: &[u8]) -> Entries<'_> {
    Entries { addr, rest: bytes, least: 1 << COLLISION_BITS, failed: false }
}

/// See [`entries`].
pub(crate) struct Entries<'a> {
    addr: BlockAddr,
    rest: &'a [u8],
    least: u64,
    failed: bool,
}

impl<'a> Entries<'a> {
    fn parse(&mut self) -> Result<Entry<'a>, &'static str> {
        let (raw, rest) = RawDirent::read_from_prefix(self.rest).map_err(|_| "they end within an entry")?;
        let (name, rest) =
            rest.split_at_checked(usize::from(raw.name_len)).ok_or("they end within a name")?;
        let cookie = raw.cookie.get();
        if cookie < self.least || cookie >> 63 != 0 {
            return Err("their cookies are out of order");
        }
        if raw.ino.get() == 0 {
            return Err("one has no inode");
        }
        if !is_name(name) {
            return Err("one has an impossible name");
        }
        let kind = FileType::from_raw(raw.kind).ok_or("one is of an unknown type")?;
        self.rest = rest;
        self.least = cookie + 1;
        Ok(Entry { cookie, ino: raw.ino.get(), generation: raw.generation.get(), kind, name })
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, FsError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() || self.failed {
            return None;
        }
        Some(self.parse().map_err(|why| {
            self.failed = true;
            FsError::corrupt("directory entries", self.addr, why)
        }))
    }
}

/// The entries of the leaf at the end of a path, which lie within what it covers.
pub(super) fn leaf(path: &Path) -> Result<impl Iterator<Item = Result<Entry<'_>, FsError>>, FsError> {
    let addr = path.end_addr();
    let covered = path.lower..path.upper.unwrap_or(u64::MAX);
    Ok(entries(addr, path.leaf()?.bytes).map(move |entry| {
        let entry = entry?;
        if !covered.contains(&entry.cookie) {
            return Err(FsError::corrupt(
                "directory entries",
                addr,
                "they lie outside what their leaf covers",
            ));
        }
        Ok(entry)
    }))
}

/// Rebuilds the entries, with `change` deciding what stands in the place of each.
fn rebuild<'a>(
    addr: u64,
    bytes: &'a [u8],
    mut change: impl FnMut(Entry<'a>, &mut LeafBytes),
) -> Result<LeafBytes, FsError> {
    let mut out = LeafBytes { count: 0, bytes: Vec::with_capacity(bytes.len() + HEAD) };
    for entry in entries(BlockAddr(addr), bytes) {
        change(entry?, &mut out);
    }
    Ok(out)
}

fn push(out: &mut LeafBytes, entry: &Entry<'_>) {
    entry.append_to(&mut out.bytes);
    out.count += 1;
}

/// The entries and `new` among them.
pub(super) fn with(addr: u64, bytes: &[u8], new: &Entry<'_>) -> Result<LeafBytes, FsError> {
    let mut pending = Some(new);
    let mut out = rebuild(addr, bytes, |entry, out| {
        if let Some(new) = pending.take_if(|new| new.cookie < entry.cookie) {
            push(out, new);
        }
        push(out, &entry);
    })?;
    if let Some(new) = pending {
        push(&mut out, new);
    }
    Ok(out)
}

/// The entries without the one that has this cookie.
pub(super) fn without(addr: u64, bytes: &[u8], cookie: u64) -> Result<LeafBytes, FsError> {
    rebuild(addr, bytes, |entry, out| {
        if entry.cookie != cookie {
            push(out, &entry);
        }
    })
}

/// The entries with the one that has this cookie pointing elsewhere.
pub(super) fn retarget(addr: u64, bytes: &[u8], cookie: u64, target: Target) -> Result<LeafBytes, FsError> {
    rebuild(addr, bytes, |mut entry, out| {
        if entry.cookie == cookie {
            (entry.ino, entry.generation, entry.kind) = (target.ino, target.generation, target.kind);
        }
        push(out, &entry);
    })
}

/// One leaf, or two of about the same size.
pub(super) fn split(all: LeafBytes) -> Split {
    if all.bytes.len() <= ENTRIES_SIZE {
        return Split::Whole(all);
    }
    let (mut at, mut count) = (0, 0);
    let mut cookie = 0;
    for entry in entries(BlockAddr(0), &all.bytes) {
        let entry = entry.expect("entries were checked when they were packed");
        if at >= all.bytes.len() / 2 {
            cookie = entry.cookie;
            break;
        }
        at += size(entry.name);
        count += 1;
    }
    let right = LeafBytes { count: all.count - count, bytes: all.bytes[at..].to_vec() };
    let left = LeafBytes { count, bytes: all.bytes[..at].to_vec() };
    Split::Two(left, cookie, right)
}
