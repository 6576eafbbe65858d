//! Replay of a journal by any node: read records from the tail on, write each block's newest image over an older
//! version, then void the journal by raising its epoch.
//!
//! Barriers, in this order: flush, read, write in place, flush, new epoch (stable). A crash between any two leaves a
//! journal that replays to the same result. Who replays several journals does so one after the other: where the device
//! lost what was not flushed, two of them may hold the same block newer than the disk has it. A bad checksum is read again after a pause before it is believed: a
//! live node may be writing the block.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use storage_control::{
    AlignedBuf, BLOCK_SIZE, BlockAddr, Clock, Device, Durability, IoSlice, Runtime, ids::MAX_CLOCK,
};

use super::{
    head::{Head, Place},
    record::{ImageRef, RecordHead, check_understood, parse_descriptor, parse_images},
};
use crate::{
    FsError, LockName,
    format::{
        header::{self, Block, Header},
        superblock::Superblock,
    },
    store::{block_of, wait::join_all},
};

/// The pause before a bad checksum is read again, longer than a write takes to go through a device.
const REREAD_AFTER_MS: u64 = 50;
/// How often a block that keeps changing under the reader is read.
const REREADS: usize = 20;
/// Blocks read at once when the ring is searched for later records.
const SEARCH_BLOCKS: u64 = 256;
/// Reads or writes under way at once.
const WAVE: usize = 32;
/// The longest write in place, in blocks.
const MAX_WRITE_BLOCKS: usize = 256;

/// What a journal holds, without changing anything.
#[derive(Clone, Debug)]
pub struct Scan {
    /// The journal needs no replay: it is clean, or no record is in it.
    pub empty: bool,
    /// Records that replay would apply.
    pub records: u64,
    /// Every lock that covers a block in them: what must be held back until replay is done.
    pub owners: BTreeSet<LockName>,
    /// The largest clock in header and records.
    pub clock: Clock,
}

/// What a replay did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReplayReport {
    /// Records found.
    pub records: u64,
    /// Images in them.
    pub images: u64,
    /// Blocks written in place.
    pub written: u64,
    /// Blocks that were newer on disk.
    pub skipped: u64,
    /// Every lock that covers a block in the records.
    pub owners: BTreeSet<LockName>,
    /// The largest clock in header and records; the caller's clock must receive it.
    pub clock: Clock,
}

/// An image to apply: part of a record's buffer.
struct Newest {
    buf: Arc<AlignedBuf>,
    block: usize,
    version: Clock,
}

impl Newest {
    fn slice(&self) -> IoSlice {
        IoSlice { buf: Arc::clone(&self.buf), offset: self.block * BLOCK_SIZE, len: BLOCK_SIZE }
    }
}

/// Everything in a journal from its tail on.
#[derive(Default)]
struct Contents {
    records: u64,
    images: u64,
    newest: BTreeMap<BlockAddr, Newest>,
    owners: BTreeSet<LockName>,
    clock: Clock,
}

/// Replays a journal. The node that wrote it is fenced or gone. Doing it again changes nothing.
pub async fn replay(
    device: &Arc<dyn Device>,
    superblock: &Superblock,
    journal: u16,
    runtime: &Arc<dyn Runtime>,
) -> Result<ReplayReport, FsError> {
    let place = Place::of(superblock, journal)?;
    device.flush().await?;
    let head = Head::read(&**device, &place).await?;
    if head.clean {
        return Ok(ReplayReport { clock: head.clock, ..ReplayReport::default() });
    }
    let contents = read_contents(&**device, &place, &head, runtime).await?;
    check_addresses(superblock, &contents)?;
    let total = contents.newest.len() as u64;
    let stale = choose_stale(&**device, &place, contents.newest, runtime).await?;
    let written = stale.len() as u64;
    write_in_place(&**device, stale).await?;
    device.flush().await?;
    head.next_epoch(true, contents.clock).write_both(&**device, &place).await?;
    Ok(ReplayReport {
        records: contents.records,
        images: contents.images,
        written,
        skipped: total - written,
        owners: contents.owners,
        clock: contents.clock,
    })
}

/// Reads a journal without changing anything.
pub async fn scan(
    device: &Arc<dyn Device>,
    superblock: &Superblock,
    journal: u16,
    runtime: &Arc<dyn Runtime>,
) -> Result<Scan, FsError> {
    let place = Place::of(superblock, journal)?;
    let head = Head::read(&**device, &place).await?;
    if head.clean {
        return Ok(Scan { empty: true, records: 0, owners: BTreeSet::new(), clock: head.clock });
    }
    let contents = read_contents(&**device, &place, &head, runtime).await?;
    Ok(Scan {
        empty: contents.records == 0,
        records: contents.records,
        owners: contents.owners,
        clock: contents.clock,
    })
}

/// Whether a journal that is not clean holds a record that needs replay.
pub(crate) async fn has_records(device: &dyn Device, place: &Place, head: &Head) -> Result<bool, FsError> {
    Ok(find_record(device, place, head, head.tail_seq, head.tail_at).await?.is_some())
}

async fn read_contents(
    device: &dyn Device,
    place: &Place,
    head: &Head,
    runtime: &Arc<dyn Runtime>,
) -> Result<Contents, FsError> {
    let mut contents = Contents { clock: head.clock.max(head.tail_clock), ..Contents::default() };
    let (mut seq, mut at) = (head.tail_seq, head.tail_at);
    let mut paused = false;
    loop {
        let found = find_record(device, place, head, seq, at).await?;
        let Some(record) = found else {
            // The end, unless the record is whole when it is read again.
            if !paused {
                paused = true;
                runtime.sleep(Duration::from_millis(REREAD_AFTER_MS)).await;
                continue;
            }
            break;
        };
        contents.clock = contents.clock.max(record.head.version);
        contents.records += 1;
        if check_understood(&record.head, place.ring(record.at))? {
            contents.images += record.images.len() as u64;
            for image in &record.images {
                contents.owners.insert(image.owner);
                let newest =
                    Newest { buf: Arc::clone(&record.buf), block: image.block, version: record.head.version };
                contents.newest.insert(image.addr, newest);
            }
        }
        seq += 1;
        at = record.at + record.head.blocks() as u64;
    }
    if let Some(later) = find_later(device, place, head.epoch, seq).await? {
        tracing::error!(journal = place.journal, expected = seq, later, "a stable record is damaged");
        return Err(FsError::corrupt("journal", place.ring(at), "a stable record is damaged"));
    }
    Ok(contents)
}

struct FoundRecord {
    at: u64,
    head: RecordHead,
    buf: Arc<AlignedBuf>,
    images: Vec<ImageRef>,
}

/// The record with this number, behind the one before or at the start of the ring.
async fn find_record(
    device: &dyn Device,
    place: &Place,
    head: &Head,
    seq: u64,
    at: u64,
) -> Result<Option<FoundRecord>, FsError> {
    let starts = if at == 0 { vec![0] } else { vec![at, 0] };
    for at in starts.into_iter().filter(|&at| at < place.ring_blocks) {
        let first = device.read(place.ring(at), 1).await?;
        let Some((record, 0)) = parse_descriptor(block_of(&first), place, at) else { continue };
        if record.epoch != head.epoch || record.seq != seq || record.version.0 > MAX_CLOCK {
            continue;
        }
        let buf = device.read(place.ring(at), record.blocks()).await?;
        if let Some(images) = parse_images(&buf, place, at, &record) {
            return Ok(Some(FoundRecord { at, head: record, buf: Arc::new(buf), images }));
        }
    }
    Ok(None)
}

/// A descriptor that proves that record `expected` was stable: a record is written only after the one before.
async fn find_later(
    device: &dyn Device,
    place: &Place,
    epoch: u64,
    expected: u64,
) -> Result<Option<u64>, FsError> {
    let mut at = 0;
    while at < place.ring_blocks {
        let blocks = SEARCH_BLOCKS.min(place.ring_blocks - at);
        let buf = device.read(place.ring(at), blocks as usize).await?;
        for (n, bytes) in buf.chunks_exact(BLOCK_SIZE).enumerate() {
            let block: &Block = bytes.try_into().expect("a chunk is one block");
            if let Some((record, _)) = parse_descriptor(block, place, at + n as u64)
                && record.epoch == epoch
                && record.stable_seq >= expected
            {
                return Ok(Some(record.seq));
            }
        }
        at += blocks;
    }
    Ok(None)
}

fn check_addresses(superblock: &Superblock, contents: &Contents) -> Result<(), FsError> {
    let geometry = &superblock.geometry;
    for &addr in contents.newest.keys() {
        let known = addr == geometry.fs_start
            || addr == geometry.superblock_copy()
            || geometry.group_of(addr).is_some();
        if !known {
            return Err(FsError::corrupt(
                "journal",
                addr,
                "a record names a block outside of the filesystem",
            ));
        }
    }
    Ok(())
}

/// What the disk has at an image's place.
enum OnDisk {
    /// This version of a block of ours.
    Version(Clock),
    /// Something else, or a block being written.
    Bad(AlignedBuf),
}

/// The images that are newer than the disk.
async fn choose_stale(
    device: &dyn Device,
    place: &Place,
    newest: BTreeMap<BlockAddr, Newest>,
    runtime: &Arc<dyn Runtime>,
) -> Result<Vec<(BlockAddr, Newest)>, FsError> {
    let look = |buf: AlignedBuf, addr| {
        let block = block_of(&buf);
        match header::is_ours(block, addr, &place.secret) {
            Ok(()) => OnDisk::Version(Header::of(block).clock()),
            Err(_) => OnDisk::Bad(buf),
        }
    };
    let mut stale = Vec::new();
    let mut doubtful: Vec<(BlockAddr, Newest, AlignedBuf)> = Vec::new();
    let mut images = newest.into_iter();
    loop {
        let wave: Vec<_> = images.by_ref().take(WAVE).collect();
        if wave.is_empty() {
            break;
        }
        let reads = join_all(wave.iter().map(|(addr, _)| device.read(*addr, 1)).collect()).await;
        for ((addr, image), buf) in wave.into_iter().zip(reads) {
            match look(buf?, addr) {
                OnDisk::Version(version) if version >= image.version => {}
                OnDisk::Version(_) => stale.push((addr, image)),
                OnDisk::Bad(buf) => doubtful.push((addr, image, buf)),
            }
        }
    }
    // What is no block of ours may be one that a live node writes just now: believed when it does not change.
    for _ in 0..REREADS {
        if doubtful.is_empty() {
            break;
        }
        runtime.sleep(Duration::from_millis(REREAD_AFTER_MS)).await;
        for (addr, image, before) in std::mem::take(&mut doubtful) {
            match look(device.read(addr, 1).await?, addr) {
                OnDisk::Version(version) if version >= image.version => {}
                OnDisk::Version(_) => stale.push((addr, image)),
                OnDisk::Bad(now) if now == before => stale.push((addr, image)),
                OnDisk::Bad(now) => doubtful.push((addr, image, now)),
            }
        }
    }
    if let Some((addr, ..)) = doubtful.first() {
        return Err(FsError::corrupt("block", *addr, "it keeps changing while a journal is replayed"));
    }
    stale.sort_unstable_by_key(|(addr, _)| *addr);
    Ok(stale)
}

/// Writes in the order of addresses, contiguous blocks at once.
async fn write_in_place(device: &dyn Device, stale: Vec<(BlockAddr, Newest)>) -> Result<(), FsError> {
    let mut runs: Vec<(BlockAddr, Vec<IoSlice>)> = Vec::new();
    for (addr, image) in stale {
        match runs.last_mut() {
            Some((at, slices)) if at.0 + slices.len() as u64 == addr.0 && slices.len() < MAX_WRITE_BLOCKS => {
                slices.push(image.slice());
            }
            _ => runs.push((addr, vec![image.slice()])),
        }
    }
    for wave in runs.chunks(WAVE) {
        let write =
            |(at, slices): &(BlockAddr, Vec<IoSlice>)| device.write(*at, slices.clone(), Durability::Cached);
        for result in join_all(wave.iter().map(write).collect()).await {
            result?;
        }
    }
    Ok(())
}
