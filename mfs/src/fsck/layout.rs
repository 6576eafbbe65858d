//! Superblock, journals and orphan tables.

use std::sync::Arc;

use storage_control::{BlockAddr, Device};

use super::overlay::Overlay;
use super::report::{Report, Severity};
use super::{Checker, Options};
use crate::LockName;
use crate::error::FsError;
use crate::format::group::BlockState;
use crate::format::header::{Block, BlockKind, verify};
use crate::format::journal::{HEADER_A, HEADER_B, JournalImage, ORPHANS_AT};
use crate::format::orphan::CHAIN_MAX;
use crate::format::superblock::{Source, Superblock};
use crate::orphan::{OrphanKind, read_block};

async fn read_one(device: &dyn Device, addr: BlockAddr) -> Result<Box<Block>, FsError> {
    let image = device.read(addr, 1).await?;
    Ok(Box::new(image[..].try_into().expect("one block was read")))
}

/// Reads the superblock and compares it with its copy.
pub(super) async fn superblock(
    device: &dyn Device,
    fs_start: BlockAddr,
    report: &mut Report,
) -> Result<Superblock, FsError> {
    let (superblock, source) = Superblock::read(device, fs_start).await?;
    if source == Source::Copy {
        report.error("superblock", fs_start, "it is damaged; its copy is used");
        return Ok(superblock);
    }
    let addr = superblock.geometry.superblock_copy();
    match Superblock::parse(&*read_one(device, addr).await?, addr) {
        Ok(copy) if copy == superblock => {}
        Ok(_) => report.error("copy of the superblock", addr, "it differs from the superblock"),
        Err(error) => report.error("copy of the superblock", addr, error.to_string()),
    }
    Ok(superblock)
}

/// The newer valid header of a journal.
async fn journal_header(
    device: &dyn Device,
    superblock: &Superblock,
    journal: u16,
    start: BlockAddr,
    report: &mut Report,
) -> Option<JournalImage> {
    let mut newest: Option<JournalImage> = None;
    for (copy, offset) in [("first", HEADER_A), ("second", HEADER_B)] {
        let addr = BlockAddr(start.0 + offset);
        let what = format!("{copy} header of journal {journal}");
        let owner = LockName::Orphans(journal);
        let block = match read_one(device, addr).await {
            Ok(block) => block,
            Err(error) => {
                report.failure(what, addr, &error);
                continue;
            }
        };
        if let Err(error) = verify(&block, BlockKind::Journal, addr, &superblock.secret, owner) {
            report.failure(what, addr, &error);
            continue;
        }
        let header = *JournalImage::of(&block);
        if header.journal.get() != journal || header.reserved.iter().any(|&byte| byte != 0) {
            report.error(what, addr, "it names another journal or its reserved bytes are not zero");
            continue;
        }
        let age = |header: &JournalImage| (header.epoch.get(), header.writes.get());
        if newest.as_ref().is_none_or(|newest| age(newest) < age(&header)) {
            newest = Some(header);
        }
    }
    if newest.is_none() {
        report.error(format!("journal {journal}"), start, "neither of its headers can be used");
    }
    newest
}

/// The journals that exist, with their first blocks.
fn journals(superblock: &Superblock) -> Vec<(u16, BlockAddr)> {
    let starts = superblock.journals.iter().enumerate();
    starts.filter_map(|(journal, start)| Some((journal as u16, (*start)?))).collect()
}

/// Checks the journals' headers. With dirty ones among them the check goes on over an overlay in which they
/// are replayed, or the report says that findings may come from them.
pub(super) async fn replay(
    device: Arc<dyn Device>,
    superblock: &Superblock,
    options: &Options,
    report: &mut Report,
) -> Result<Arc<dyn Device>, FsError> {
    let mut dirty = Vec::new();
    for (journal, start) in journals(superblock) {
        report.stats.journals += 1;
        let header = journal_header(&*device, superblock, journal, start, report).await;
        if header.is_some_and(|header| header.clean.get() != 1) {
            dirty.push((journal, start));
        }
    }
    report.stats.dirty_journals = dirty.len() as u64;
    let why = match options.replay {
        true => "it was not emptied: the state after its replay is checked",
        false => "it was not emptied: findings may come from what it holds; mount the filesystem or check with replay",
    };
    for &(journal, start) in &dirty {
        report.add(Severity::Note, format!("journal {journal}"), start, why);
    }
    if dirty.is_empty() || !options.replay {
        return Ok(device);
    }
    let overlay: Arc<dyn Device> = Arc::new(Overlay::new(device));
    for &(journal, start) in &dirty {
        if let Err(error) = crate::journal::replay(Arc::clone(&overlay), superblock, journal).await {
            report.failure(format!("journal {journal}"), start, &error);
        }
    }
    Ok(overlay)
}

impl Checker<'_> {
    /// Takes the journals into use and reads their orphan tables.
    pub(super) async fn check_journals(&mut self) {
        for (journal, start) in journals(&self.superblock) {
            let blocks = u64::from(self.superblock.journal_blocks);
            if self.take(&format!("journal {journal}"), start, blocks, BlockState::Metadata) {
                self.read_orphans(journal, BlockAddr(start.0 + ORPHANS_AT)).await;
            }
        }
    }

    async fn read_orphans(&mut self, journal: u16, root: BlockAddr) {
        let what = format!("orphan table of journal {journal}");
        let mut next = Some(root);
        let mut blocks = 0;
        while let Some(addr) = next {
            if addr != root && !self.take(&what, addr, 1, BlockState::Metadata) {
                return;
            }
            blocks += 1;
            if blocks > CHAIN_MAX {
                return self.report.error(what, addr, "its chain is too long");
            }
            let block = self.block(addr, BlockKind::Orphans, LockName::Orphans(journal)).await;
            let body = match block.and_then(|block| read_block(addr, &*block)) {
                Ok(body) => body,
                Err(error) => return self.report.failure(what, addr, &error),
            };
            for (_, orphan) in body.used {
                let twice = match orphan.kind {
                    OrphanKind::Free => self.orphans.insert(orphan.ino, (journal, orphan.generation)).is_some(),
                    OrphanKind::Truncate => !self.truncating.insert(orphan.ino),
                };
                if twice {
                    self.report.error(what.as_str(), addr, format!("inode {} is in the tables twice", orphan.ino));
                }
            }
            next = body.next;
        }
    }
}
