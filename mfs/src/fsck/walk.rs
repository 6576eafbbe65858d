//! Walks all inodes: from the root directory through every name, then the orphans.

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::Poll;

use storage_control::{AlignedBuf, BLOCK_SIZE, BlockAddr};

use super::Checker;
use super::tree::Walk;
use crate::LockName;
use crate::dir::{Entry, cookie_range, entries, name_hash};
use crate::error::FsError;
use crate::extent::{Extent, decode_list};
use crate::format::dinode::flags;
use crate::format::group::BlockState;
use crate::format::header::{Block, BlockKind};
use crate::format::xattr::CHAIN_MAX;
use crate::index::{generation_of, node_body};
use crate::inode::{Content, Dinode, FileType};
use crate::xattr;

/// An inode with more than one name.
pub(super) struct Linked {
    generation: u64,
    kind: FileType,
    nlink: u32,
    found: u32,
}

/// How an inode was reached.
#[derive(Clone, Copy)]
enum Via<'a> {
    Root,
    /// By a name in this directory.
    Name {
        dir: u64,
        entry: &'a Entry<'a>,
    },
    /// By the table of a journal.
    Orphan {
        journal: u16,
        generation: u64,
    },
}

fn shown(name: &[u8]) -> String {
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
    /// Checks every inode that can be reached from the root directory.
    pub(super) async fn walk_names(&mut self) {
        let root = self.superblock.root.0;
        let mut pending = Vec::new();
        if let Some(dinode) = self.inode(root, Via::Root, None).await {
            match dinode.is_dir() {
                true => pending.push(root),
                false => self.report.error("root inode", BlockAddr(root), "it is not a directory"),
            }
        }
        // Only numbers are kept: a directory of a million directories costs 8 MB.
        while let Some(ino) = pending.pop() {
            let block = self.block(BlockAddr(ino), BlockKind::Dinode, LockName::Inode(ino)).await;
            match block.and_then(|block| Dinode::decode(ino, &*block)) {
                Ok(dinode) => self.directory(&dinode, &mut pending).await,
                Err(error) => self.report.failure(format!("directory {ino}"), BlockAddr(ino), &error),
            }
            self.progress("inodes", self.report.stats.inodes, 0);
        }
        for (ino, linked) in std::mem::take(&mut self.linked) {
            if linked.nlink != linked.found {
                let why = format!("it has {} names and a link count of {}", linked.found, linked.nlink);
                self.report.error(format!("inode {ino}"), BlockAddr(ino), why);
            }
        }
    }

    /// Checks every inode that only an orphan table knows.
    pub(super) async fn walk_orphans(&mut self) {
        for (ino, (journal, generation)) in std::mem::take(&mut self.orphans) {
            self.report.stats.orphans += 1;
            if let Some(dinode) = self.inode(ino, Via::Orphan { journal, generation }, None).await
                && dinode.is_dir()
            {
                let mut below = Vec::new();
                self.directory(&dinode, &mut below).await;
                if dinode.entries != 0 {
                    self.report.error(
                        format!("orphan {ino}"),
                        BlockAddr(ino),
                        "it is a directory with entries",
                    );
                }
            }
        }
    }

    /// Reads and checks one inode with all it holds, names aside. `None` where there is nothing to go on with.
    async fn inode(&mut self, ino: u64, via: Via<'_>, image: Option<AlignedBuf>) -> Option<Box<Dinode>> {
        let addr = BlockAddr(ino);
        let what = match via {
            Via::Root => "root directory".to_string(),
            Via::Name { dir, entry } => {
                format!("inode {ino}, named {} in directory {dir}", shown(entry.name))
            }
            Via::Orphan { journal, .. } => format!("inode {ino}, orphan of journal {journal}"),
        };
        if self.uses.get(addr) == BlockState::Metadata
            && let Via::Name { entry, .. } = via
        {
            self.again(ino, entry, &what).await;
            return None;
        }
        if !self.take(&what, addr, 1, BlockState::Metadata) {
            return None;
        }
        let verified = match image {
            Some(image) => self.verify(&image, addr, BlockKind::Dinode, LockName::Inode(ino)),
            None => self.block(addr, BlockKind::Dinode, LockName::Inode(ino)).await,
        };
        let dinode = match verified.and_then(|block| Dinode::decode(ino, &*block)) {
            Ok(dinode) => Box::new(dinode),
            Err(error) => {
                self.report.failure(what, addr, &error);
                return None;
            }
        };
        self.report.stats.inodes += 1;
        self.identity(&dinode, via, &what);
        let (tree, whole) = self.content(&dinode, &what).await;
        if let (Some(tree), Some(chain)) = (tree, self.xattrs(&dinode, &what).await)
            && whole
            && tree + chain != dinode.blocks
        {
            let why = format!("it has {} blocks and counts {}", tree + chain, dinode.blocks);
            self.report.error(what, addr, why);
        }
        Some(dinode)
    }

    /// A further name of an inode that was checked.
    async fn again(&mut self, ino: u64, entry: &Entry<'_>, what: &str) {
        let addr = BlockAddr(ino);
        let why = match self.linked.get_mut(&ino) {
            Some(linked) => {
                linked.found = linked.found.saturating_add(1);
                match (linked.generation == entry.generation, linked.kind == entry.kind) {
                    (true, true) => return,
                    (false, _) => "the name is of an earlier inode",
                    (true, false) => "the name says another file type",
                }
            }
            None => match self.block(addr, BlockKind::Dinode, LockName::Inode(ino)).await {
                Ok(block) => match Dinode::decode(ino, &*block) {
                    Ok(dinode) if dinode.is_dir() => "the directory has another name",
                    Ok(_) => "it has another name and a link count of 1",
                    Err(_) => "it is damaged and has another name",
                },
                Err(_) => "the block is used for something else",
            },
        };
        self.report.error(what, addr, why);
    }

    /// Checks that an inode is what led to it says it is.
    fn identity(&mut self, dinode: &Dinode, via: Via<'_>, what: &str) {
        let orphan = dinode.has(flags::ORPHAN);
        let mut say = |why: &str| self.report.error(what, dinode.addr(), why);
        match via {
            Via::Root => {
                if dinode.parent != dinode.ino {
                    say("its parent is not itself");
                }
            }
            Via::Name { dir, entry } => {
                if dinode.generation != entry.generation {
                    say("the name is of an earlier inode");
                }
                if dinode.kind != entry.kind {
                    say("the name says another file type");
                }
                if dinode.is_dir() && dinode.parent != dir {
                    say("it names another directory as its parent");
                }
                if !dinode.is_dir() && dinode.nlink == 0 {
                    say("it has a name and a link count of 0");
                }
                if orphan {
                    say("it has a name and the mark of an orphan");
                }
                if !dinode.is_dir() && dinode.nlink > 1 {
                    let (generation, kind, nlink) = (dinode.generation, dinode.kind, dinode.nlink);
                    self.linked.insert(dinode.ino, Linked { generation, kind, nlink, found: 1 });
                }
            }
            Via::Orphan { generation, .. } => {
                if dinode.generation != generation {
                    say("the table means an earlier inode");
                }
                if dinode.nlink != 0 || !orphan {
                    say("it has no name, but a link count or no mark of an orphan");
                }
            }
        }
        let truncating = dinode.has(flags::TRUNCATING);
        if truncating && !orphan && !self.truncating.contains(&dinode.ino) {
            self.report.error(
                what,
                dinode.addr(),
                "it has the mark of a truncation and is in no orphan table",
            );
        }
    }

    /// Checks what an inode holds, entries of directories aside. Returns the blocks it has there, unless that
    /// is counted later, and whether nothing was wrong.
    async fn content(&mut self, dinode: &Dinode, what: &str) -> (Option<u64>, bool) {
        match &dinode.content {
            Content::None | Content::Data(_) | Content::Dirents(_) => (Some(0), true),
            Content::DirentTree(_) => (None, true),
            Content::Extents(list) => {
                let whole = self.extents(dinode, what, list, 0..u64::MAX);
                (Some(list.iter().map(|extent| u64::from(extent.len)).sum()), whole)
            }
            Content::ExtentTree(root) => {
                let mut walk = Walk::new(what.to_string(), dinode, root);
                let mut blocks = 0;
                let mut whole = true;
                while let Some(leaf) = self.next_leaf(dinode, &mut walk).await {
                    let body = node_body(leaf.addr, 0, &*leaf.block);
                    let list = body.and_then(|body| Ok((body.count, decode_list(leaf.addr, body.bytes)?)));
                    match list {
                        Ok((count, list)) => {
                            if count != list.len() {
                                self.report.error(what, leaf.addr, "a leaf has a wrong count of extents");
                            }
                            blocks += list.iter().map(|extent| u64::from(extent.len)).sum::<u64>();
                            whole &=
                                self.extents(dinode, what, &list, leaf.lower..leaf.upper.unwrap_or(u64::MAX));
                        }
                        Err(error) => {
                            self.report.failure(what, leaf.addr, &error);
                            whole = false;
                        }
                    }
                }
                (Some(blocks + walk.blocks), whole && !walk.broken)
            }
        }
    }

    /// Checks the extents of one leaf.
    fn extents(&mut self, dinode: &Dinode, what: &str, list: &[Extent], covered: Range<u64>) -> bool {
        let mut whole = true;
        let blocks_of_size = dinode.size.div_ceil(BLOCK_SIZE as u64);
        let may_exceed = flags::TRUNCATING | flags::ORPHAN;
        for extent in list {
            let name = format!("{what}, blocks {} to {}", extent.logical, extent.end() - 1);
            if extent.logical < covered.start || extent.end() > covered.end {
                self.report.error(name.as_str(), dinode.addr(), "they lie outside what their leaf covers");
                whole = false;
            }
            if extent.device != 0 {
                self.report.error(name.as_str(), dinode.addr(), "they lie on a device that does not exist");
                whole = false;
                continue;
            }
            if extent.end() > blocks_of_size && !extent.is_unwritten() && dinode.flags & may_exceed == 0 {
                self.report.error(name.as_str(), dinode.addr(), "they lie past the end of the file");
            }
            whole &= self.take(&name, extent.physical, u64::from(extent.len), BlockState::Data);
        }
        whole
    }

    /// Checks the extended attributes and returns the blocks of their chain, unless something was wrong.
    async fn xattrs(&mut self, dinode: &Dinode, what: &str) -> Option<u64> {
        let mut bytes = Vec::new();
        let mut blocks = 0;
        let mut next = dinode.xattrs.root;
        while let Some(addr) = next {
            if !self.take(what, addr, 1, BlockState::Metadata) {
                return None;
            }
            let block = match self.block(addr, BlockKind::Xattr, dinode.owner()).await {
                Ok(block) => block,
                Err(error) => {
                    self.report.failure(what, addr, &error);
                    return None;
                }
            };
            if generation_of(&*block) != dinode.generation as u32 || blocks == CHAIN_MAX as u64 {
                self.report.error(what, addr, "its chain of extended attributes is not its own or too long");
                return None;
            }
            match xattr::read_block(addr, &*block) {
                Ok((after, piece)) => {
                    bytes.extend_from_slice(piece);
                    next = after;
                }
                Err(error) => {
                    self.report.failure(what, addr, &error);
                    return None;
                }
            }
            blocks += 1;
        }
        let inline = &dinode.xattrs.inline;
        if !inline.is_empty() && !bytes.is_empty() {
            self.report.error(what, dinode.addr(), "it has extended attributes inside and outside");
        }
        // An orphan's chain is freed from its end: its list may be cut off.
        if !dinode.has(flags::ORPHAN)
            && let Err(error) =
                xattr::decode_list(dinode.addr(), if inline.is_empty() { &bytes } else { inline })
        {
            self.report.failure(what, dinode.addr(), &error);
        }
        Some(blocks)
    }

    /// Checks all entries of a directory and the inodes they name.
    async fn directory(&mut self, dinode: &Dinode, pending: &mut Vec<u64>) {
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
        tally.bytes += crate::dir::entry_size(entry.name) as u64;
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

    /// Checks a block that was read.
    fn verify(
        &self,
        image: &AlignedBuf,
        addr: BlockAddr,
        kind: BlockKind,
        owner: LockName,
    ) -> Result<Box<Block>, FsError> {
        let block: Box<Block> = Box::new(image[..].try_into().expect("one block was read"));
        crate::format::header::verify(&block, kind, addr, &self.superblock.secret, owner)?;
        Ok(block)
    }

    /// Reads and checks a block.
    pub(super) async fn block(
        &self,
        addr: BlockAddr,
        kind: BlockKind,
        owner: LockName,
    ) -> Result<Box<Block>, FsError> {
        if addr.0 >= self.device.blocks() {
            return Err(FsError::corrupt(kind.name(), addr, "it lies outside the device"));
        }
        let image = self.device.read(addr, 1).await?;
        self.verify(&image, addr, kind, owner)
    }
}

/// Polls all futures until each has its result.
async fn join_all<T>(futures: Vec<Pin<Box<dyn Future<Output = T> + Send>>>) -> Vec<T> {
    let mut futures: Vec<_> = futures.into_iter().map(Some).collect();
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(move |context| {
        let mut waiting = false;
        for (future, result) in futures.iter_mut().zip(&mut results) {
            let Some(running) = future else { continue };
            match running.as_mut().poll(context) {
                Poll::Ready(value) => {
                    *result = Some(value);
                    *future = None;
                }
                Poll::Pending => waiting = true,
            }
        }
        if waiting {
            Poll::Pending
        } else {
            Poll::Ready(results.iter_mut().filter_map(Option::take).collect())
        }
    })
    .await
}
