//! Making a filesystem on a device, and journals in a mounted one.
//!
//! Old superblocks go first and new ones come last, each behind a flush: a device whose making was cut short holds
//! no filesystem. The label before the superblock is the caller's, and is written after all this.

use std::sync::Arc;

use lcl::{Lcl, Mode, Scope};
use storage_control::{
    AlignedBuf, BLOCK_SIZE, BlockAddr, Clock, Device, Durability, IoFuture, IoSlice, WallTime,
};

use crate::{
    FsError, LockName,
    alloc::{Alloc, Run},
    format::{
        group::{
            BLOCKS_PER_BITMAP, BitmapImage, BlockState, GroupImage, MAX_GROUP_BLOCKS, MIN_GROUP_BLOCKS,
            MIN_LAST_GROUP_BLOCKS, bitmap_blocks,
        },
        header::{self, Block, BlockKind, Secret},
        journal::{self, ORPHANS_AT},
        superblock::{Geometry, JOURNAL_SLOTS, SUPERBLOCK_AREA, Superblock},
    },
    inode::{Dinode, FileType},
    journal::{Head, Place},
    store::{Store, block_mut, block_of, wait::join_all},
};

/// Smallest device: 64 MiB.
pub const MIN_BLOCKS: u64 = 16_384;
/// Largest device: 64 TiB.
pub const MAX_BLOCKS: u64 = 1 << 34;
/// Journals made at once if the device is large enough.
pub const DEFAULT_JOURNALS: u16 = 4;
/// A filesystem has at least this many groups where its size allows.
const MIN_GROUPS: u64 = 16;
/// A journal is this part of the device.
const JOURNAL_FRACTION: u64 = 64;
/// All first journals together are at most this part of the device.
const JOURNALS_FRACTION: u64 = 16;
/// Writes under way at once.
const WAVE: usize = 64;
/// The version of everything mkfs writes.
const FIRST_CLOCK: Clock = Clock(1);

/// What to make.
#[derive(Clone, Debug)]
pub struct Options {
    /// Blocks of the device to use, from block 0 on.
    pub blocks: u64,
    /// First block after the quorum region.
    pub fs_start: BlockAddr,
    /// At most 64 bytes.
    pub label: String,
    /// Public uuid, the label's too.
    pub uuid: [u8; 16],
    /// Random bytes that nobody ever sees.
    pub secret: [u8; 16],
    /// The time.
    pub now: WallTime,
    /// Journals to make; by size if not given.
    pub journals: Option<u16>,
    /// Blocks of a group, a power of two; by size if not given.
    pub group_blocks: Option<u32>,
}

/// Why a filesystem cannot be made.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MkfsError {
    /// Below 64 MiB.
    #[error("the device has {0} blocks of 4 KiB; a filesystem needs at least 16384 (64 MiB)")]
    TooSmall(u64),
    /// Above 64 TiB, or above what the device has.
    #[error("{0} blocks are too many: a filesystem has at most 64 TiB and at most what the device has")]
    TooLarge(u64),
    /// Above 64 bytes.
    #[error("the label is longer than 64 bytes")]
    LabelTooLong,
    /// No power of two from 8 MiB to 1 GiB, or larger than the device.
    #[error("a group of {0} blocks is impossible: a power of two from 2048 to 262144 that fits is needed")]
    GroupSize(u32),
    /// They do not fit, or there are none.
    #[error("{0} journals do not fit; ask for fewer, others are made when nodes mount")]
    Journals(u16),
    /// Writing failed.
    #[error(transparent)]
    Fs(#[from] FsError),
}

/// Blocks of each group that mkfs uses, behind header and bitmaps.
struct Plan {
    superblock: Superblock,
    used: Vec<u32>,
}

fn plan(options: &Options) -> Result<Plan, MkfsError> {
    let Options { blocks, fs_start, .. } = *options;
    if blocks < MIN_BLOCKS || fs_start.0 + SUPERBLOCK_AREA + u64::from(MIN_GROUP_BLOCKS) >= blocks {
        return Err(MkfsError::TooSmall(blocks));
    }
    if blocks > MAX_BLOCKS {
        return Err(MkfsError::TooLarge(blocks));
    }
    if options.label.len() > 64 {
        return Err(MkfsError::LabelTooLong);
    }
    let groups_start = fs_start.0 + SUPERBLOCK_AREA;
    let room = blocks - 1 - groups_start;
    let by_size = largest_power_of_two(blocks / MIN_GROUPS)
        .clamp(u64::from(MIN_GROUP_BLOCKS), u64::from(MAX_GROUP_BLOCKS)) as u32;
    let group_blocks = options.group_blocks.unwrap_or(by_size);
    let possible = group_blocks.is_power_of_two()
        && (MIN_GROUP_BLOCKS..=MAX_GROUP_BLOCKS).contains(&group_blocks)
        && u64::from(group_blocks) <= room;
    if !possible {
        return Err(MkfsError::GroupSize(group_blocks));
    }
    let rest = room % u64::from(group_blocks);
    let groups = room / u64::from(group_blocks) + u64::from(rest >= MIN_LAST_GROUP_BLOCKS);
    let journal_blocks = journal_blocks(blocks);
    let journals = options.journals.unwrap_or_else(|| journals_for(blocks));
    let geometry = Geometry {
        blocks,
        fs_start,
        groups_start: BlockAddr(groups_start),
        group_blocks,
        groups: groups as u32,
    };
    let mut superblock = Superblock {
        secret: Secret(options.secret),
        uuid: options.uuid,
        label: options.label.clone(),
        geometry,
        root: BlockAddr(0),
        journal_blocks,
        journals: vec![None; JOURNAL_SLOTS],
        created: (options.now.secs, options.now.nanos),
        version: FIRST_CLOCK,
    };
    let used = place_journals_and_root(&mut superblock, journals)?;
    Ok(Plan { superblock, used })
}

fn journal_blocks(blocks: u64) -> u32 {
    (blocks / JOURNAL_FRACTION).clamp(u64::from(journal::MIN_BLOCKS), u64::from(journal::MAX_BLOCKS)) as u32
}

/// Journals that a device of so many blocks gets if [`Options::journals`] does not say.
pub fn journals_for(blocks: u64) -> u16 {
    let affordable = blocks / JOURNALS_FRACTION / u64::from(journal_blocks(blocks));
    affordable.clamp(1, u64::from(DEFAULT_JOURNALS)) as u16
}

/// Spreads the journals over the groups and puts the root directory into the first.
fn place_journals_and_root(sb: &mut Superblock, journals: u16) -> Result<Vec<u32>, MkfsError> {
    let impossible = MkfsError::Journals(journals);
    if journals == 0 || usize::from(journals) > JOURNAL_SLOTS {
        return Err(impossible);
    }
    let geometry = sb.geometry;
    let mut used = vec![0_u32; geometry.groups as usize];
    let mut take = |group: u32, blocks: u32| {
        let first = 1 + bitmap_blocks(geometry.blocks_in(group)) + used[group as usize];
        let fits = first + blocks <= geometry.blocks_in(group);
        fits.then(|| {
            used[group as usize] += blocks;
            BlockAddr(geometry.group_start(group).0 + u64::from(first))
        })
    };
    sb.root = take(0, 1).ok_or(impossible.clone())?;
    for journal in 0..journals {
        let ideal = (u64::from(journal) * u64::from(geometry.groups) / u64::from(journals)) as u32;
        let mut turn = (0..geometry.groups).map(|n| (ideal + n) % geometry.groups);
        let place = turn.find_map(|group| take(group, sb.journal_blocks));
        sb.journals[usize::from(journal)] = Some(place.ok_or(impossible.clone())?);
    }
    Ok(used)
}

fn largest_power_of_two(n: u64) -> u64 {
    if n == 0 { 0 } else { 1 << n.ilog2() }
}

/// Writes that are collected and carried out many at a time.
struct Writer<'a> {
    device: &'a dyn Device,
    under_way: Vec<IoFuture<()>>,
}

impl Writer<'_> {
    async fn write(&mut self, addr: BlockAddr, image: AlignedBuf) -> Result<(), FsError> {
        let data = vec![IoSlice::whole(Arc::new(image))];
        self.under_way.push(self.device.write(addr, data, Durability::Cached));
        if self.under_way.len() >= WAVE { self.finish().await } else { Ok(()) }
    }

    async fn finish(&mut self) -> Result<(), FsError> {
        for result in join_all(std::mem::take(&mut self.under_way)).await {
            result?;
        }
        Ok(())
    }
}

/// Makes a filesystem: old superblocks wiped, groups, journals and root directory, then the copy of the superblock and
/// the superblock. `progress` is told how many of how many groups are done.
pub async fn mkfs(
    device: &Arc<dyn Device>,
    options: &Options,
    progress: impl Fn(u64, u64),
) -> Result<Superblock, MkfsError> {
    if options.blocks > device.blocks() {
        return Err(MkfsError::TooLarge(options.blocks));
    }
    let Plan { superblock, used } = plan(options)?;
    let sb = &superblock;
    let geometry = &sb.geometry;
    let mut writer = Writer { device: &**device, under_way: Vec::new() };
    writer.write(geometry.fs_start, AlignedBuf::zeroed_blocks(1)).await?;
    writer.write(geometry.superblock_copy(), AlignedBuf::zeroed_blocks(1)).await?;
    writer.finish().await?;
    device.flush().await.map_err(FsError::from)?;
    for (group, &used) in (0..).zip(&used) {
        write_group(&mut writer, sb, group, used).await?;
        if group % 64 == 0 {
            progress(u64::from(group), u64::from(geometry.groups));
        }
    }
    for journal in (0..).zip(&sb.journals).filter(|(_, place)| place.is_some()).map(|(journal, _)| journal) {
        let place = Place::of(sb, journal)?;
        let addr = BlockAddr(place.start.0 + ORPHANS_AT);
        writer.write(addr, sealed(sb, BlockKind::Orphans, addr, place.owner(), |_| ())).await?;
        Head::new(&place, FIRST_CLOCK).write_both(&**device, &place).await?;
    }
    let root = root_directory(sb, options.now);
    let image = sealed(sb, BlockKind::Dinode, sb.root, root.owner(), |block| root.encode(block));
    writer.write(sb.root, image).await?;
    writer.finish().await?;
    device.flush().await.map_err(FsError::from)?;
    for addr in [geometry.superblock_copy(), geometry.fs_start] {
        let image = sealed(sb, BlockKind::Superblock, addr, LockName::Journals, |block| sb.fill(block));
        writer.write(addr, image).await?;
        writer.finish().await?;
        device.flush().await.map_err(FsError::from)?;
    }
    progress(u64::from(geometry.groups), u64::from(geometry.groups));
    Ok(superblock)
}

/// The root directory: empty, its own parent.
fn root_directory(sb: &Superblock, now: WallTime) -> Dinode {
    let mut root = Dinode::new(sb.root.0, FIRST_CLOCK.0, FileType::Directory, 0o755, now);
    root.parent = root.ino;
    root
}

fn sealed(
    sb: &Superblock,
    kind: BlockKind,
    addr: BlockAddr,
    owner: LockName,
    fill: impl FnOnce(&mut Block),
) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed_blocks(1);
    let block = block_mut(&mut buf);
    header::identify(block, kind, addr, sb.secret, owner);
    fill(block);
    header::seal(block, FIRST_CLOCK);
    buf
}

/// Writes the header of a group, and the bitmap blocks that have a bit set for what mkfs puts there.
async fn write_group(writer: &mut Writer<'_>, sb: &Superblock, group: u32, used: u32) -> Result<(), FsError> {
    let geometry = &sb.geometry;
    let (start, owner) = (geometry.group_start(group), LockName::Group(group));
    let first = 1 + bitmap_blocks(geometry.blocks_in(group));
    let mut written = 0_u32;
    if used > 0 {
        for index in 0..=(first + used - 1) / BLOCKS_PER_BITMAP {
            let addr = BlockAddr(start.0 + 1 + u64::from(index));
            let range = index * BLOCKS_PER_BITMAP..(index + 1) * BLOCKS_PER_BITMAP;
            let image = sealed(sb, BlockKind::Bitmap, addr, owner, |block| {
                let map = BitmapImage::of_mut(block);
                map.format(geometry, group, index);
                for n in first.max(range.start)..(first + used).min(range.end) {
                    map.set(n - range.start, BlockState::Metadata);
                }
            });
            written |= 1 << index;
            writer.write(addr, image).await?;
        }
    }
    let image = sealed(sb, BlockKind::Group, start, owner, |block| {
        let head = GroupImage::of_mut(block);
        head.format(geometry, group);
        head.count(BlockState::Free, BlockState::Metadata, used);
        head.bitmaps_written = written.into();
    });
    writer.write(start, image).await
}

/// Makes journal `index` in a mounted filesystem unless it exists; returns its place, which is on disk then. No
/// transaction handle may be open.
pub async fn make_journal(alloc: &Alloc, lcl: &Lcl, index: u16) -> Result<BlockAddr, FsError> {
    if usize::from(index) >= JOURNAL_SLOTS {
        return Err(FsError::TableFull);
    }
    let store = alloc.store();
    let geometry = *store.geometry();
    let res = LockName::Journals.resource(&geometry);
    let closed = |_| FsError::Closed("its locks are gone");
    let _guard = lcl.acquire(res, Mode::EX, Scope::Process).await.map_err(closed)?;
    let mut sb = read_in_use(store, geometry.fs_start).await?;
    if let Some(place) = sb.journal(index) {
        return Ok(place);
    }
    // Copy and original are never written at the same time: one of them is always whole. The copy comes first;
    // an entry that only the copy has was cut short.
    let copied = match read_in_use(store, geometry.superblock_copy()).await {
        Ok(copy) => copy.journal(index),
        Err(FsError::Corrupt { .. } | FsError::Superblock(_)) => None,
        Err(error) => return Err(error),
    };
    let start = match copied {
        Some(start) => start,
        None => add_journal(alloc, &sb, index).await?,
    };
    sb.journals[usize::from(index)] = Some(start);
    let mut txn = store.begin(1).await?;
    txn.create(geometry.fs_start, BlockKind::Superblock, LockName::Journals, |block| sb.fill(block));
    drop(txn);
    store.settle(LockName::Journals).await?;
    Ok(start)
}

async fn read_in_use(store: &Store, addr: BlockAddr) -> Result<Superblock, FsError> {
    let image = store.read(addr, BlockKind::Superblock, LockName::Journals).await?;
    Ok(Superblock::parse_body(block_of(&image), addr)?)
}

/// Allocates and writes a journal, and enters it in the copy of the superblock.
async fn add_journal(alloc: &Alloc, sb: &Superblock, index: u16) -> Result<BlockAddr, FsError> {
    let store = alloc.store();
    let res = alloc.reserve_contiguous(sb.journal_blocks).await?;
    let run: Run = *res.runs().first().ok_or(FsError::NoSpace)?;
    let mut with = sb.clone();
    with.journals[usize::from(index)] = Some(run.addr);
    let place = Place::of(&with, index)?;
    Head::new(&place, store.clock().now()).write_both(&**store.device(), &place).await?;
    let mut txn = store.begin(2 + res.credits()).await?;
    res.log_run_as_metadata(&mut txn, run).await?;
    let orphans = BlockAddr(run.addr.0 + ORPHANS_AT);
    txn.create(orphans, BlockKind::Orphans, place.owner(), |_| ());
    let copy = sb.geometry.superblock_copy();
    txn.create(copy, BlockKind::Superblock, LockName::Journals, |block| with.fill(block));
    drop(txn);
    store.settle(place.owner()).await?;
    store.forget(place.owner());
    store.checkpoint().await?;
    Ok(run.addr)
}

const _: () = assert!(BLOCK_SIZE == 4096);

#[cfg(test)]
mod tests;
