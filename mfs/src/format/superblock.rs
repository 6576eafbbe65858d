//! The superblock: in the first block after the quorum region, its copy in the last block of the device.
//!
//! Owned by the `Journals` lock, because the only thing that changes after mkfs is the table of journals. Copy and
//! original change in one transaction.

use std::fmt;

use storage_control::{BLOCK_SIZE, BlockAddr, Clock, Device};
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{I64, U32, U64},
};

use super::header::{self, Block, BlockKind, Defect, HEADER_LEN, Header, Secret};
use crate::{FsError, LockName};

/// The format this code writes and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Places for journals, and so the most nodes at a time.
pub const JOURNAL_SLOTS: usize = 256;

/// Features an older reader can ignore.
pub const KNOWN_COMPAT: u64 = 0;
/// Features an older reader may read but not write.
pub const KNOWN_RO_COMPAT: u64 = 0;
/// Features an older reader must refuse.
pub const KNOWN_INCOMPAT: u64 = 0;

/// Blocks between the superblock and the first group (the superblock included), room for later.
pub const SUPERBLOCK_AREA: u64 = 16;

/// On disk: a device of the filesystem.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DeviceEntry {
    /// The device's own uuid.
    pub uuid: [u8; 16],
    /// Its size.
    pub blocks: U64,
    /// Zero.
    pub reserved: [u8; 8],
}

/// On disk: the superblock.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SuperblockImage {
    /// Kind 1, owner `Journals`.
    pub header: Header,
    /// `FORMAT_VERSION`.
    pub format_version: U32,
    /// 4096.
    pub block_size: U32,
    /// Features an older reader can ignore.
    pub compat: U64,
    /// Features an older reader may read but not write.
    pub ro_compat: U64,
    /// Features an older reader must refuse.
    pub incompat: U64,
    /// Public uuid.
    pub uuid: [u8; 16],
    /// UTF-8, padded with zeros.
    pub label: [u8; 64],
    /// Blocks of the device that the filesystem uses, from block 0 on.
    pub blocks: U64,
    /// Address of the superblock.
    pub fs_start: U64,
    /// Address of the first group.
    pub groups_start: U64,
    /// Blocks of a group, a power of two; the last group may be smaller.
    pub group_blocks: U32,
    /// How many groups.
    pub groups: U32,
    /// Address of the root directory's dinode.
    pub root: U64,
    /// Blocks of each journal.
    pub journal_blocks: U32,
    /// `JOURNAL_SLOTS`.
    pub journal_slots: U32,
    /// When mkfs ran, seconds since 1970.
    pub created_secs: I64,
    /// And nanoseconds.
    pub created_nanos: U32,
    /// How many entries of the device table are used: 1.
    pub device_count: U32,
    /// Dinode of the quota file, or 0.
    pub quota_root: U64,
    /// Dinode of the per-node deltas, or 0.
    pub deltas_root: U64,
    /// Dinode of the orphan directory, or 0.
    pub orphans_root: U64,
    /// Zero.
    pub reserved: [u8; 32],
    /// Devices; the first is this one.
    pub devices: [DeviceEntry; 8],
    /// Zero.
    pub reserved2: [u8; 1496],
    /// First block of each journal, or 0.
    pub journals: [U64; JOURNAL_SLOTS],
}

const _: () = assert!(size_of::<SuperblockImage>() == BLOCK_SIZE);

/// Where blocks and groups are. Small and copied around.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Blocks of the device that the filesystem uses.
    pub blocks: u64,
    /// Address of the superblock.
    pub fs_start: BlockAddr,
    /// Address of the first group.
    pub groups_start: BlockAddr,
    /// Blocks of a group (the last may be smaller).
    pub group_blocks: u32,
    /// How many groups.
    pub groups: u32,
}

impl Geometry {
    /// Address of the copy of the superblock.
    pub fn superblock_copy(&self) -> BlockAddr {
        BlockAddr(self.blocks - 1)
    }

    /// The group a block lies in; `None` outside of all groups.
    pub fn group_of(&self, addr: BlockAddr) -> Option<u32> {
        let offset = addr.0.checked_sub(self.groups_start.0)?;
        let group = u32::try_from(offset / self.group_blocks as u64).ok()?;
        (group < self.groups && addr.0 < self.group_end(group).0).then_some(group)
    }

    /// The group number of an inode; 0 for numbers that cannot be one (their lock must still have a place).
    pub(crate) fn group_index_or_zero(&self, inode: u64) -> u64 {
        self.group_of(BlockAddr(inode)).unwrap_or(0) as u64
    }

    /// First block of a group: its header.
    pub fn group_start(&self, group: u32) -> BlockAddr {
        BlockAddr(self.groups_start.0 + group as u64 * self.group_blocks as u64)
    }

    /// One past the last block of a group.
    pub fn group_end(&self, group: u32) -> BlockAddr {
        let end = self.group_start(group).0 + self.group_blocks as u64;
        BlockAddr(end.min(self.blocks - 1))
    }

    /// Blocks in this group.
    pub fn blocks_in(&self, group: u32) -> u32 {
        (self.group_end(group).0 - self.group_start(group).0) as u32
    }
}

/// A superblock in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// The secret of every block header.
    pub secret: Secret,
    /// Public uuid.
    pub uuid: [u8; 16],
    /// The name mkfs was given.
    pub label: String,
    /// Where blocks and groups are.
    pub geometry: Geometry,
    /// The root directory's dinode.
    pub root: BlockAddr,
    /// Blocks of each journal.
    pub journal_blocks: u32,
    /// First block of each journal that exists, by slot.
    pub journals: Vec<Option<BlockAddr>>,
    /// When mkfs ran: seconds and nanoseconds since 1970.
    pub created: (i64, u32),
    /// Clock of its last change.
    pub version: Clock,
}

/// Why a superblock cannot be used, with the remedy.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SuperblockError {
    /// Nothing of ours is there.
    #[error(
        "no MFS superblock at block {addr}: make a filesystem with `matrix mkfs`, or name the right device"
    )]
    WrongMagic {
        /// Where it was looked for.
        addr: BlockAddr,
    },
    /// Neither the superblock nor its copy is whole.
    #[error("superblock at block {addr} is damaged ({why}) and so is its copy: run `matrix fsck`")]
    Damaged {
        /// Where.
        addr: BlockAddr,
        /// What is wrong.
        why: &'static str,
    },
    /// Written by a newer program.
    #[error("the filesystem has format version {0}, this program reads version 1: use a newer matrix")]
    NewerFormat(u32),
    /// Uses features this program does not know.
    #[error(
        "the filesystem uses features this program does not know (incompatible flags {0:#x}): use a newer matrix"
    )]
    UnknownFeatures(u64),
    /// Uses features this program can only read.
    #[error(
        "the filesystem uses features this program cannot write (flags {0:#x}): use a newer matrix or mount read-only"
    )]
    ReadOnlyFeatures(u64),
    /// The device is smaller than the filesystem.
    #[error(
        "the device has {device} blocks but the filesystem needs {needed}: the image is truncated, restore its full size"
    )]
    Truncated {
        /// What is there.
        device: u64,
        /// What should be.
        needed: u64,
    },
}

impl SuperblockError {
    /// errno for programs.
    pub fn errno(&self) -> i32 {
        match self {
            SuperblockError::WrongMagic { .. } => libc::EINVAL,
            SuperblockError::Damaged { .. } | SuperblockError::Truncated { .. } => libc::EUCLEAN,
            SuperblockError::NewerFormat(_)
            | SuperblockError::UnknownFeatures(_)
            | SuperblockError::ReadOnlyFeatures(_) => libc::EOPNOTSUPP,
        }
    }
}

/// Where a superblock was read from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// The first one.
    Original,
    /// The copy, because the original is damaged.
    Copy,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Original => "superblock",
            Source::Copy => "copy of the superblock",
        })
    }
}

impl Superblock {
    /// The block as it is written at `addr`, without version and checksum.
    pub fn image(&self, addr: BlockAddr) -> Box<Block> {
        let mut block = Box::new([0; BLOCK_SIZE]);
        header::init(&mut block, BlockKind::Superblock, addr, self.secret, LockName::Journals);
        self.fill(&mut block);
        block
    }

    /// Writes the body into a block whose header is set.
    pub fn fill(&self, block: &mut Block) {
        let header = *Header::of(block);
        let g = &self.geometry;
        let mut sb = SuperblockImage::new_zeroed();
        sb.header = header;
        sb.format_version = FORMAT_VERSION.into();
        sb.block_size = (BLOCK_SIZE as u32).into();
        sb.uuid = self.uuid;
        let label = self.label.as_bytes();
        let len = label.len().min(sb.label.len());
        sb.label[..len].copy_from_slice(&label[..len]);
        sb.blocks = g.blocks.into();
        sb.fs_start = g.fs_start.0.into();
        sb.groups_start = g.groups_start.0.into();
        sb.group_blocks = g.group_blocks.into();
        sb.groups = g.groups.into();
        sb.root = self.root.0.into();
        sb.journal_blocks = self.journal_blocks.into();
        sb.journal_slots = (JOURNAL_SLOTS as u32).into();
        sb.created_secs = self.created.0.into();
        sb.created_nanos = self.created.1.into();
        sb.device_count = 1.into();
        sb.devices[0] = DeviceEntry { uuid: self.uuid, blocks: g.blocks.into(), reserved: [0; 8] };
        for (place, journal) in sb.journals.iter_mut().zip(&self.journals) {
            *place = journal.map_or(0, |addr| addr.0).into();
        }
        block.copy_from_slice(sb.as_bytes());
    }

    /// Reads a superblock from foreign bytes found at `addr`.
    pub fn parse(block: &Block, addr: BlockAddr) -> Result<Superblock, SuperblockError> {
        let header = Header::of(block);
        let damaged = |why| SuperblockError::Damaged { addr, why };
        if header.magic.get() != header::MAGIC || header.kind.get() != BlockKind::Superblock as u16 {
            return Err(SuperblockError::WrongMagic { addr });
        }
        header::is_ours(block, addr, &header.secret).map_err(|defect| damaged(defect.why()))?;
        if header.owner() != Some(LockName::Journals) {
            return Err(damaged(Defect::Owner.why()));
        }
        Self::parse_body(block, addr)
    }

    /// Reads a superblock whose header is verified.
    pub fn parse_body(block: &Block, addr: BlockAddr) -> Result<Superblock, SuperblockError> {
        let sb = SuperblockImage::ref_from_bytes(block).expect("a superblock is one block");
        let secret = sb.header.secret;
        let damaged = |why| SuperblockError::Damaged { addr, why };
        if sb.format_version.get() != FORMAT_VERSION {
            return Err(SuperblockError::NewerFormat(sb.format_version.get()));
        }
        let unknown = sb.incompat.get() & !KNOWN_INCOMPAT;
        if unknown != 0 {
            return Err(SuperblockError::UnknownFeatures(unknown));
        }
        let unknown = sb.ro_compat.get() & !KNOWN_RO_COMPAT;
        if unknown != 0 {
            return Err(SuperblockError::ReadOnlyFeatures(unknown));
        }
        if sb.block_size.get() != BLOCK_SIZE as u32 || sb.journal_slots.get() != JOURNAL_SLOTS as u32 {
            return Err(damaged("impossible block size or number of journals"));
        }
        if sb.reserved.iter().chain(&sb.reserved2).any(|&b| b != 0) {
            return Err(damaged(Defect::Reserved.why()));
        }
        let geometry = Geometry {
            blocks: sb.blocks.get(),
            fs_start: BlockAddr(sb.fs_start.get()),
            groups_start: BlockAddr(sb.groups_start.get()),
            group_blocks: sb.group_blocks.get(),
            groups: sb.groups.get(),
        };
        if !plausible(&geometry) {
            return Err(damaged("impossible geometry"));
        }
        let inside = |at: u64, blocks: u32| {
            let last = at.checked_add(blocks as u64 - 1).map(BlockAddr);
            let group = geometry.group_of(BlockAddr(at));
            group.is_some() && last.and_then(|last| geometry.group_of(last)) == group
        };
        let journal_blocks = sb.journal_blocks.get();
        if !(super::journal::MIN_BLOCKS..=super::journal::MAX_BLOCKS).contains(&journal_blocks) {
            return Err(damaged("impossible journal size"));
        }
        let mut journals = Vec::with_capacity(JOURNAL_SLOTS);
        for place in &sb.journals {
            let at = place.get();
            if at != 0 && !inside(at, journal_blocks) {
                return Err(damaged("a journal lies outside of the groups"));
            }
            journals.push((at != 0).then_some(BlockAddr(at)));
        }
        if !inside(sb.root.get(), 1) {
            return Err(damaged("the root directory lies outside of the groups"));
        }
        let label_len = sb.label.iter().position(|&b| b == 0).unwrap_or(sb.label.len());
        Ok(Superblock {
            secret,
            uuid: sb.uuid,
            label: String::from_utf8_lossy(&sb.label[..label_len]).into_owned(),
            geometry,
            root: BlockAddr(sb.root.get()),
            journal_blocks,
            journals,
            created: (sb.created_secs.get(), sb.created_nanos.get()),
            version: sb.header.clock(),
        })
    }

    /// Reads the superblock at `fs_start`, or its copy in the device's last block where the original is damaged.
    pub async fn read(device: &dyn Device, fs_start: BlockAddr) -> Result<(Superblock, Source), FsError> {
        let at = |addr| async move {
            let buf = device.read(addr, 1).await.map_err(FsError::from)?;
            let block: &Block = (&buf[..]).try_into().expect("one block was read");
            Ok::<_, FsError>(Superblock::parse(block, addr).and_then(|sb| {
                let right = sb.geometry.fs_start == fs_start;
                right.then_some(sb).ok_or(SuperblockError::Damaged { addr, why: "it names another place" })
            }))
        };
        if fs_start.0 >= device.blocks() {
            return Err(SuperblockError::WrongMagic { addr: fs_start }.into());
        }
        let (sb, source) = match at(fs_start).await? {
            Ok(sb) => (sb, Source::Original),
            Err(error @ (SuperblockError::Damaged { .. } | SuperblockError::WrongMagic { .. })) => {
                match at(BlockAddr(device.blocks() - 1)).await? {
                    Ok(sb) => {
                        tracing::warn!(%error, "using the copy of the superblock");
                        (sb, Source::Copy)
                    }
                    Err(_) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        };
        let needed = sb.geometry.blocks;
        if device.blocks() < needed {
            return Err(SuperblockError::Truncated { device: device.blocks(), needed }.into());
        }
        Ok((sb, source))
    }

    /// First block of a journal.
    pub fn journal(&self, index: u16) -> Option<BlockAddr> {
        self.journals.get(index as usize).copied().flatten()
    }
}

fn plausible(g: &Geometry) -> bool {
    let last_start = (g.groups as u64)
        .checked_sub(1)
        .and_then(|last| last.checked_mul(g.group_blocks as u64))
        .and_then(|offset| offset.checked_add(g.groups_start.0));
    g.group_blocks.is_power_of_two()
        && (super::group::MIN_GROUP_BLOCKS..=super::group::MAX_GROUP_BLOCKS).contains(&g.group_blocks)
        && g.blocks <= 1 << 48
        && g.fs_start.0 < g.groups_start.0
        && last_start.is_some_and(|start| start + super::group::MIN_LAST_GROUP_BLOCKS < g.blocks)
}

const _: () = assert!(HEADER_LEN == 64);
