//! Walks all inodes: from the root directory through every name, then the orphans.

use std::ops::Range;

use storage_control::{AlignedBuf, BLOCK_SIZE, BlockAddr};

use super::Checker;
use super::names::shown;
use super::report::Severity;
use super::tree::Walk;
use crate::LockName;
use crate::dir::Entry;
use crate::extent::{Extent, decode_list};
use crate::format::dinode::flags;
use crate::format::group::BlockState;
use crate::format::header::BlockKind;
use crate::format::xattr::CHAIN_MAX;
use crate::index::{generation_of, node_body};
use crate::inode::{Content, Dinode, FileType};
use crate::xattr;

/// Progress is reported every so many inodes.
const PROGRESS_INODES: u64 = 1024;

/// An inode with more than one name.
pub(super) struct Linked {
    generation: u64,
    kind: FileType,
    nlink: u32,
    found: u32,
}

/// How an inode was reached.
#[derive(Clone, Copy)]
pub(super) enum Via<'a> {
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

    /// Truncations in orphan tables that no inode knows of: whoever adopts the table drops them.
    pub(super) fn note_finished_truncations(&mut self) {
        for ino in std::mem::take(&mut self.truncating) {
            let why = "an orphan table names it for a truncation that is over";
            self.report.add(Severity::Note, format!("inode {ino}"), BlockAddr(ino), why);
        }
    }

    /// Reads and checks one inode with all it holds, names aside. `None` where there is nothing to go on with.
    pub(super) async fn inode(
        &mut self,
        ino: u64,
        via: Via<'_>,
        image: Option<AlignedBuf>,
    ) -> Option<Box<Dinode>> {
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
        if self.report.stats.inodes.is_multiple_of(PROGRESS_INODES) {
            self.progress("inodes", self.report.stats.inodes, 0);
        }
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
        let listed = truncating && self.truncating.remove(&dinode.ino);
        if truncating && !orphan && !listed {
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
}
