//! Walks the entries of directories.

use std::collections::BTreeMap;
use std::ops::Range;

use storage_control::{AlignedBuf, BlockAddr};

use super::Checker;
use super::tree::Walk;
use super::walk::Via;
use crate::dir::{Entry, cookie_range, entries, entry_size, name_hash};
use crate::error::FsError;
use crate::format::dinode::flags;
use crate::format::group::BlockState;
use crate::format::header::BlockKind;
use crate::format::xattr::CHAIN_MAX;
use crate::index::node_body;
use crate::inode::{Content, Dinode, FileType};
use crate::store::wait::join_all;
use crate::xattr;

/// A name as it is shown.
pub(super) fn shown(name: &[u8]) -> String {
    format!("\"{}\"", name.escape_ascii())
}

/// What walking a directory's entries finds out.
#[derive(Default)]
struct Tally {
    names: u64,
    bytes: u64,
    subdirectories: u64,
    /// Names that have the same hash as the last entry, that one included.
    same_hash: Vec<Vec<u8>>,
    hash: u64,
}

impl Checker<'_> {
    /// Checks all entries of a directory and the inodes they name.
    pub(super) async fn directory(&mut self, dinode: &Dinode, pending: &mut Vec<u64>) {
        self.report.stats.directories += 1;
        let what = format!("directory {}", dinode.ino);
        let mut tally = Tally::default();
        let mut whole = true;
        match &dinode.content {
            Content::Dirents(bytes) => {
                let list = entries(dinode.addr(), bytes);
                whole = self.names(dinode, &what, list, 0..u64::MAX, &mut tally, pending).await;
            }
            Content::DirentTree(root) => {
                let mut walk = Walk::new(what.clone(), dinode, root);
                while let Some(leaf) = self.next_leaf(dinode, &mut walk).await {
                    let body = match node_body(leaf.addr, 0, &*leaf.block) {
                        Ok(body) => body,
                        Err(error) => {
                            self.report.failure(what.as_str(), leaf.addr, &error);
                            whole = false;
                            continue;
                        }
                    };
                    let before = tally.names;
                    let covered = leaf.lower..leaf.upper.unwrap_or(u64::MAX);
                    let list = entries(leaf.addr, body.bytes);
                    whole &= self.names(dinode, &what, list, covered, &mut tally, pending).await;
                    if whole && tally.names - before != body.count as u64 {
                        self.report.error(what.as_str(), leaf.addr, "a leaf has a wrong count of entries");
                    }
                }
                whole &= !walk.broken;
                let chain = self.chain_blocks(dinode).await;
                if whole && walk.blocks + chain != dinode.blocks {
                    let why = format!("it has {} blocks and counts {}", walk.blocks + chain, dinode.blocks);
                    self.report.error(what.as_str(), dinode.addr(), why);
                }
            }
            Content::None | Content::Data(_) | Content::Extents(_) | Content::ExtentTree(_) => return,
        }
        self.report.stats.names += tally.names;
        if !whole {
            return;
        }
        if tally.names != dinode.entries {
            let why = format!("it has {} entries and counts {}", tally.names, dinode.entries);
            self.report.error(what.as_str(), dinode.addr(), why);
        }
        if tally.bytes != dinode.size {
            let why = format!("its entries take {} bytes and its size is {}", tally.bytes, dinode.size);
            self.report.error(what.as_str(), dinode.addr(), why);
        }
        let links = if dinode.has(flags::ORPHAN) { 0 } else { 2 + tally.subdirectories };
        if links != u64::from(dinode.nlink) {
            let why = format!(
                "it has {} subdirectories and a link count of {}",
                tally.subdirectories, dinode.nlink
            );
            self.report.error(what, dinode.addr(), why);
        }
    }

    /// Blocks of a chain of extended attributes that was checked before.
    async fn chain_blocks(&mut self, dinode: &Dinode) -> u64 {
        let mut blocks = 0;
        let mut next = dinode.xattrs.root;
        while let Some(addr) = next
            && blocks < CHAIN_MAX as u64
        {
            blocks += 1;
            next = match self.block(addr, BlockKind::Xattr, dinode.owner()).await {
                Ok(block) => xattr::read_block(addr, &*block).ok().and_then(|(next, _)| next),
                Err(_) => None,
            };
        }
        blocks
    }

    /// Checks the entries of one leaf and the inodes they name. Returns whether all could be read.
    async fn names<'e>(
        &mut self,
        dinode: &Dinode,
        what: &str,
        list: impl Iterator<Item = Result<Entry<'e>, FsError>>,
        covered: Range<u64>,
        tally: &mut Tally,
        pending: &mut Vec<u64>,
    ) -> bool {
        let mut whole = true;
        let mut batch = Vec::new();
        for entry in list {
            match entry {
                Ok(entry) => batch.push(entry),
                Err(error) => {
                    self.report.failure(what, dinode.addr(), &error);
                    whole = false;
                }
            }
        }
        for part in batch.chunks(self.options.reads_in_flight.max(1)) {
            let mut images = self.prefetch(part).await;
            for entry in part {
                self.name(dinode, what, entry, &covered, tally);
                let via = Via::Name { dir: dinode.ino, entry };
                let image = images.remove(&entry.ino);
                if entry.kind == FileType::Directory {
                    tally.subdirectories += 1;
                }
                if let Some(found) = Box::pin(self.inode(entry.ino, via, image)).await
                    && found.is_dir()
                {
                    pending.push(found.ino);
                }
            }
        }
        whole
    }

    /// Checks one entry against its place.
    fn name(
        &mut self,
        dinode: &Dinode,
        what: &str,
        entry: &Entry<'_>,
        covered: &Range<u64>,
        tally: &mut Tally,
    ) {
        let name = shown(entry.name);
        let mut say = |why: String| self.report.error(what, dinode.addr(), why);
        if !covered.contains(&entry.cookie) {
            say(format!("name {name} lies outside what its leaf covers"));
        }
        let hash = name_hash(&self.superblock, entry.name);
        if !cookie_range(hash).contains(&entry.cookie) {
            say(format!("name {name} has a cookie that does not follow from its hash"));
        }
        if hash != tally.hash {
            tally.hash = hash;
            tally.same_hash.clear();
        }
        if tally.same_hash.iter().any(|other| other == entry.name) {
            say(format!("name {name} is there twice"));
        }
        tally.same_hash.push(entry.name.to_vec());
        tally.names += 1;
        tally.bytes += entry_size(entry.name) as u64;
    }

    /// Reads the dinodes of entries at the same time. Those that fail are read again one by one.
    async fn prefetch(&self, part: &[Entry<'_>]) -> BTreeMap<u64, AlignedBuf> {
        let blocks = self.device.blocks();
        let wanted: Vec<u64> = part
            .iter()
            .map(|entry| entry.ino)
            .filter(|&ino| ino < blocks && self.uses.get(BlockAddr(ino)) == BlockState::Free)
            .collect();
        let reads = wanted.iter().map(|&ino| self.device.read(BlockAddr(ino), 1)).collect();
        let images = join_all(reads).await;
        wanted.into_iter().zip(images).filter_map(|(ino, image)| Some((ino, image.ok()?))).collect()
    }
}
