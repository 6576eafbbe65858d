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
use crate::journal::{Head, Place, has_records};
use crate::orphan::{OrphanKind, read_block};

/// Whether the copy differs only in journals that the superblock does not have yet.
fn is_ahead(superblock: &Superblock, copy: &Superblock) -> bool {
    let mut with = superblock.clone();
    with.version = copy.version;
    for (known, new) in with.journals.iter_mut().zip(&copy.journals) {
        *known = known.or(*new);
    }
    with == *copy
}

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
        // They are written one after the other, so their versions differ.
        Ok(copy) if Superblock { version: superblock.version, ..copy.clone() } == superblock => {}
        Ok(copy) if is_ahead(&superblock, &copy) => {
            report.add(Severity::Note, "copy of the superblock", addr, "making a journal was cut short");
        }
        Ok(_) => report.error("copy of the superblock", addr, "it differs from the superblock"),
        Err(error) => report.error("copy of the superblock", addr, error.to_string()),
    }
    Ok(superblock)
}

/// Checks both headers of a journal. A crash can tear one of them; in a journal that was closed both are whole.
async fn check_headers(
    device: &dyn Device,
    superblock: &Superblock,
    place: &Place,
    severity: Severity,
    report: &mut Report,
) {
    let journal = place.journal;
    for (copy, offset) in [("first", HEADER_A), ("second", HEADER_B)] {
        let addr = BlockAddr(place.start.0 + offset);
        let what = format!("{copy} header of journal {journal}");
        let checked = read_one(device, addr).await.and_then(|block| {
            verify(&block, BlockKind::Journal, addr, &superblock.secret, place.owner())?;
            let header = JournalImage::of(&block);
            if header.journal.get() != journal || header.reserved.iter().any(|&byte| byte != 0) {
                return Err(FsError::corrupt(
                    "journal header",
                    addr,
                    "it is another journal's or has stray bytes",
                ));
            }
            Ok(())
        });
        if let Err(error) = checked {
            report.add(severity, what, addr, error.to_string());
        }
    }
}

/// What a journal holds.
enum Held {
    /// Nothing, and it was closed.
    Nothing,
    /// Nothing, but it was not closed: its node is there or crashed.
    Open,
    /// Records that are not replayed.
    Records,
}

async fn held(device: &dyn Device, place: &Place) -> Result<Held, FsError> {
    let head = Head::read(device, place).await?;
    if head.clean {
        return Ok(Held::Nothing);
    }
    Ok(if has_records(device, place, &head).await? { Held::Records } else { Held::Open })
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
        let place = Place::of(superblock, journal)?;
        let what = format!("journal {journal}");
        let held = held(&*device, &place).await;
        let severity = if matches!(held, Ok(Held::Nothing)) { Severity::Error } else { Severity::Note };
        check_headers(&*device, superblock, &place, severity, report).await;
        match held {
            Ok(Held::Nothing) => {}
            Ok(Held::Open) => report.add(Severity::Note, what, start, "its node has it in use or crashed"),
            Ok(Held::Records) => dirty.push((journal, start)),
            Err(error) => report.failure(what, start, &error),
        }
    }
    report.stats.dirty_journals = dirty.len() as u64;
    let why = match options.replay {
        Some(_) => "it holds records: the state after their replay is checked",
        None => {
            "it holds records, and findings may come from them: mount the filesystem, or check with replay"
        }
    };
    for &(journal, start) in &dirty {
        report.add(Severity::Note, format!("journal {journal}"), start, why);
    }
    let Some(runtime) = options.replay.as_ref().filter(|_| !dirty.is_empty()) else { return Ok(device) };
    let overlay: Arc<dyn Device> = Arc::new(Overlay::new(device));
    for &(journal, start) in &dirty {
        if let Err(error) = crate::journal::replay(&overlay, superblock, journal, runtime).await {
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
                    OrphanKind::Free => {
                        self.orphans.insert(orphan.ino, (journal, orphan.generation)).is_some()
                    }
                    OrphanKind::Truncate => !self.truncating.insert(orphan.ino),
                };
                if twice {
                    self.report.error(
                        what.as_str(),
                        addr,
                        format!("inode {} is in the tables twice", orphan.ino),
                    );
                }
            }
            next = body.next;
        }
    }
}
