//! Whether what a recovered filesystem shows is what may be there.
//!
//! - Names and attributes are those after one of the operations from the last stable one to the last that had begun.
//! - Every sector of a file is that of one of its versions since the last stable one, and its size one of theirs;
//!   what a truncation cut off before that size is zeros and never comes back.
//! - A size that a file had after an operation means that all names and attributes from before it are there too.
//! - Times that an `fsync` made stable are exact while nothing else changes the inode.

use std::collections::BTreeMap;
use std::sync::Arc;

use mfs::Filesystem;
use mfs::ops::{Attr, Ino, Operations};

use crate::history::{History, Id, Kind, Node, Promise, Tree, Version};
use crate::image::SECTOR;
use crate::replay::Window;
use crate::user::{BALLAST, Wrong, times_of};

/// What a filesystem shows.
pub struct Seen {
    pub tree: Tree,
    pub contents: BTreeMap<Id, Vec<u8>>,
    attrs: BTreeMap<Id, Attr>,
}

impl Seen {
    /// Walks the whole tree and reads everything.
    pub async fn look(fs: &Filesystem) -> Result<Seen, Wrong> {
        let failed = |what: &'static str| move |error: mfs::FsError| format!("{what} fails: {error}");
        let root = fs.getattr(fs.root()).await.map_err(failed("stat of the root"))?.attr;
        let root_id = (root.ino.0, root.generation);
        let tree = Tree { root: root_id, nodes: BTreeMap::new() };
        let mut seen = Seen { tree, contents: BTreeMap::new(), attrs: BTreeMap::new() };
        let mut rest = vec![root];
        let mut ballast = None;
        while let Some(attr) = rest.pop() {
            let id = (attr.ino.0, attr.generation);
            if seen.attrs.insert(id, attr).is_some() {
                continue;
            }
            let kind = match attr.file_type() {
                libc::S_IFDIR => {
                    let (names, attrs) = list(fs, attr.ino).await.map_err(failed("readdir"))?;
                    if id == root_id {
                        ballast = names.get(BALLAST).copied();
                    }
                    rest.extend(attrs);
                    Kind::Dir(names)
                }
                libc::S_IFREG if ballast == Some(id) => Kind::File,
                libc::S_IFREG => {
                    let content = content(fs, &attr).await.map_err(failed("read"))?;
                    seen.contents.insert(id, content);
                    Kind::File
                }
                libc::S_IFLNK => Kind::Symlink(fs.readlink(attr.ino).await.map_err(failed("readlink"))?),
                other => return Err(format!("inode {id:?} is of type {other:o}, which nobody made")),
            };
            let xattrs = xattrs(fs, attr.ino).await.map_err(failed("getxattr"))?;
            let node = Node { kind, perm: attr.mode & 0o7777, nlink: attr.nlink, xattrs };
            seen.tree.nodes.insert(id, Arc::new(node));
        }
        Ok(seen)
    }
}

/// The names in a directory, and the attributes of what they stand for.
async fn list(fs: &Filesystem, dir: Ino) -> mfs::ops::Result<(BTreeMap<String, Id>, Vec<Attr>)> {
    let handle = fs.opendir(dir).await?;
    let (mut names, mut attrs, mut from) = (BTreeMap::new(), Vec::new(), 0);
    loop {
        let part = fs.readdirplus(handle, from, 64).await?;
        let Some((last, _)) = part.last() else { break };
        from = last.next;
        for (entry, attr) in part.into_iter().filter(|(entry, _)| entry.name != b"." && entry.name != b"..") {
            fs.forget(attr.ino, 1);
            names.insert(String::from_utf8_lossy(&entry.name).into_owned(), (attr.ino.0, attr.generation));
            attrs.push(attr);
        }
    }
    fs.releasedir(handle).await?;
    Ok((names, attrs))
}

async fn content(fs: &Filesystem, attr: &Attr) -> mfs::ops::Result<Vec<u8>> {
    let handle = fs.open(attr.ino, libc::O_RDONLY).await?.handle;
    let mut bytes = Vec::with_capacity(attr.size as usize);
    loop {
        let part = fs.read(handle, bytes.len() as u64, 1 << 17).await?;
        if part.is_empty() {
            break;
        }
        bytes.extend_from_slice(&part);
    }
    fs.release(handle).await?;
    Ok(bytes)
}

async fn xattrs(fs: &Filesystem, ino: Ino) -> mfs::ops::Result<BTreeMap<String, Arc<Vec<u8>>>> {
    let mut all = BTreeMap::new();
    let names = fs.listxattr(ino).await?;
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let value = fs.getxattr(ino, name).await?;
        all.insert(String::from_utf8_lossy(name).into_owned(), Arc::new(value));
    }
    Ok(all)
}

/// Judges what is seen after a crash in this window.
pub fn judge(history: &History, window: Window, seen: &Seen) -> Result<(), Wrong> {
    let promises = &history.promises[..window.stable];
    let stable = promises.iter().map(|promise| promise.names).max().unwrap_or(0);
    let possible = stable..=window.started;
    let Some(names_after) = possible.clone().rev().find(|n| history.trees[*n] == seen.tree) else {
        let nearest = history.trees[stable].difference(&seen.tree);
        return Err(format!(
            "names and attributes are not those after any of operations {possible:?}; after {stable} they differ in\n{nearest}"
        ));
    };
    for (id, bytes) in &seen.contents {
        let first = promised_version(promises, *id);
        let oldest = judge_content(history, first, window.started, *id, bytes)?;
        let attr = &seen.attrs[id];
        if attr.size != bytes.len() as u64 {
            return Err(format!("file {id:?} has {} bytes and says {}", bytes.len(), attr.size));
        }
        if oldest > names_after {
            return Err(format!(
                "file {id:?} is as after operation {oldest}, names and attributes as after {names_after}"
            ));
        }
    }
    judge_times(history, promises, window, seen)
}

/// The oldest version of a file that may be there.
pub fn promised_version(promises: &[Promise], id: Id) -> usize {
    let promised = promises.iter().flat_map(|promise| &promise.contents).filter(|(of, _)| *of == id);
    promised.map(|(_, version)| *version).max().unwrap_or(0)
}

/// Judges content of which the first possible version is known; returns the first operation that may have given the
/// file this size: bytes in place go to the disk past the journal.
pub fn judge_content(
    history: &History,
    first: usize,
    started: usize,
    id: Id,
    bytes: &[u8],
) -> Result<usize, Wrong> {
    let versions = history.contents.get(&id).ok_or_else(|| format!("file {id:?} was never made"))?;
    let begun = versions.iter().take_while(|version| version.operation <= started).count();
    if begun <= first {
        return Err(format!("file {id:?} is there before it was made"));
    }
    let may_be = &versions[first..begun];
    let with_size: Vec<usize> = (0..may_be.len()).filter(|&n| may_be[n].bytes.len() == bytes.len()).collect();
    if with_size.is_empty() {
        let sizes: Vec<usize> = may_be.iter().map(|version| version.bytes.len()).collect();
        return Err(format!("file {id:?} has {} bytes, and may have {sizes:?}", bytes.len()));
    }
    let mut wrong = 0;
    for n in with_size {
        let mut sectors = bytes.chunks(SECTOR).enumerate();
        match sectors.find(|(sector, bytes)| !fits(may_be, n, *sector, bytes)) {
            // It may have been like this before.
            None => {
                let same = versions[..begun].iter().filter(|version| *version.bytes == bytes);
                return Ok(same.map(|version| version.sized).min().unwrap_or(may_be[n].sized));
            }
            Some((sector, _)) => wrong = wrong.max(sector),
        }
    }
    let (from, to) = (may_be[0].operation, may_be[may_be.len() - 1].operation);
    Err(format!(
        "sector {wrong} of file {id:?} ({} bytes) is of none of its versions after operations {from} to {to}",
        bytes.len()
    ))
}

/// Whether a sector is that of a version, given that the file's size is the n-th version's.
fn fits(versions: &[Version], n: usize, sector: usize, bytes: &[u8]) -> bool {
    let start = sector * SECTOR;
    (0..versions.len()).rev().any(|of| {
        // What was cut off between the sector's version and the size's is zeros.
        let kept = versions[of..=n.max(of)].iter().map(|version| version.bytes.len());
        let cut = if of < n { kept.min().unwrap_or(0) } else { versions[of].bytes.len() };
        let there = &versions[of].bytes[start.min(cut)..(start + bytes.len()).min(cut)];
        bytes.starts_with(there) && bytes[there.len()..].iter().all(|byte| *byte == 0)
    })
}

fn judge_times(history: &History, promises: &[Promise], window: Window, seen: &Seen) -> Result<(), Wrong> {
    for (id, operation, times) in promises.iter().filter_map(|promise| promise.times) {
        let Some(attr) = seen.attrs.get(&id) else { continue };
        if !history.is_touched(id, operation, window.started) && times_of(attr) != times {
            return Err(format!(
                "inode {id:?} has times {:?}, and had {times:?} at its fsync",
                times_of(attr)
            ));
        }
    }
    Ok(())
}
