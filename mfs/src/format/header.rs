//! The header of every metadata block.
//!
//! A block is ours only if magic, own address, secret and checksum agree: a random secret made by mkfs and never
//! shown keeps user data from imitating metadata. The version is the Lamport clock of the transaction that
//! changed the block last; replay writes an image only over an older version.

use storage_control::{BLOCK_SIZE, BlockAddr, Clock, ids::MAX_CLOCK};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use crate::{FsError, LockName};

/// One block's bytes.
pub type Block = [u8; BLOCK_SIZE];

/// First bytes of every metadata block: "MFSB".
pub const MAGIC: u32 = u32::from_le_bytes(*b"MFSB");

/// Bytes of the header; the body starts here.
pub const HEADER_LEN: usize = 64;

/// What a metadata block is. Numbers are never reused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
#[repr(u16)]
pub enum BlockKind {
    /// The superblock or its copy.
    Superblock = 1,
    /// First block of an allocation group.
    Group = 2,
    /// Two bits for each block of a group.
    Bitmap = 3,
    /// One of the two header copies of a journal.
    Journal = 4,
    /// Head of a journal record.
    Record = 5,
    /// Freed metadata; owned by its group.
    Free = 6,
    /// Orphan table of a journal.
    Orphans = 7,
    /// An inode.
    Dinode = 8,
    /// Node of an extent tree.
    Extents = 9,
    /// Hashed leaf of a directory.
    DirLeaf = 10,
    /// Index node of a directory.
    DirIndex = 11,
    /// Extended attributes outside the dinode.
    Xattr = 12,
}

impl BlockKind {
    /// The kind with this number.
    pub fn from_number(n: u16) -> Option<BlockKind> {
        Some(match n {
            1 => BlockKind::Superblock,
            2 => BlockKind::Group,
            3 => BlockKind::Bitmap,
            4 => BlockKind::Journal,
            5 => BlockKind::Record,
            6 => BlockKind::Free,
            7 => BlockKind::Orphans,
            8 => BlockKind::Dinode,
            9 => BlockKind::Extents,
            10 => BlockKind::DirLeaf,
            11 => BlockKind::DirIndex,
            12 => BlockKind::Xattr,
            _ => return None,
        })
    }

    /// The word for it in messages.
    pub const fn name(self) -> &'static str {
        match self {
            BlockKind::Superblock => "superblock",
            BlockKind::Group => "group header",
            BlockKind::Bitmap => "bitmap",
            BlockKind::Journal => "journal header",
            BlockKind::Record => "journal record",
            BlockKind::Free => "freed block",
            BlockKind::Orphans => "orphan table",
            BlockKind::Dinode => "dinode",
            BlockKind::Extents => "extent node",
            BlockKind::DirLeaf => "directory leaf",
            BlockKind::DirIndex => "directory index",
            BlockKind::Xattr => "extended attributes",
        }
    }
}

/// The filesystem's secret: random, made by mkfs, in every block header, never shown.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Secret(pub [u8; 16]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// On disk: the first 64 bytes of every metadata block.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// `MAGIC`.
    pub magic: U32,
    /// `BlockKind`.
    pub kind: U16,
    /// Of the kind; the editor's to set.
    pub flags: U16,
    /// The block's own address.
    pub addr: U64,
    /// The filesystem's secret.
    pub secret: Secret,
    /// Lamport clock of the transaction that changed it last.
    pub version: U64,
    /// Number of the lock that covers the block.
    pub owner_number: U64,
    /// Kind of the lock that covers the block.
    pub owner_kind: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Low half of the owner's generation; the editor's to set.
    pub owner_generation: U32,
    /// CRC32C of the whole block with this field zero.
    pub checksum: U32,
    /// Zero.
    pub reserved2: [u8; 4],
}

const _: () = assert!(size_of::<Header>() == HEADER_LEN);
const CHECKSUM_AT: usize = std::mem::offset_of!(Header, checksum);

impl Header {
    /// The header of a block.
    pub fn of(block: &Block) -> &Header {
        Header::ref_from_bytes(&block[..HEADER_LEN]).expect("a block is longer than its header")
    }

    /// The header of a block, to change.
    pub fn of_mut(block: &mut Block) -> &mut Header {
        Header::mut_from_bytes(&mut block[..HEADER_LEN]).expect("a block is longer than its header")
    }

    /// The lock that covers the block.
    pub fn owner(&self) -> Option<LockName> {
        LockName::from_parts(self.owner_kind, self.owner_number.get())
    }

    /// The version as a clock.
    pub fn clock(&self) -> Clock {
        Clock(self.version.get())
    }
}

/// Zeroes the block and gives it a header without version and checksum.
pub fn init(block: &mut Block, kind: BlockKind, addr: BlockAddr, secret: Secret, owner: LockName) {
    block.fill(0);
    identify(block, kind, addr, secret, owner);
}

/// Sets the fields that say what and where the block is; flags, generation and body stay.
pub fn identify(block: &mut Block, kind: BlockKind, addr: BlockAddr, secret: Secret, owner: LockName) {
    let h = Header::of_mut(block);
    h.magic = MAGIC.into();
    h.kind = (kind as u16).into();
    h.addr = addr.0.into();
    h.secret = secret;
    h.owner_kind = owner.kind();
    h.owner_number = owner.number().into();
    h.reserved = [0; 3];
    h.reserved2 = [0; 4];
}

/// CRC32C of the block with its checksum field zero.
pub fn checksum(block: &Block) -> u32 {
    let crc = crc32c::crc32c(&block[..CHECKSUM_AT]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &block[CHECKSUM_AT + 4..])
}

/// Stamps version and checksum: the block is ready for the disk. Returns the checksum.
pub fn seal(block: &mut Block, version: Clock) -> u32 {
    debug_assert!(version.0 <= MAX_CLOCK);
    Header::of_mut(block).version = version.0.into();
    let crc = checksum(block);
    Header::of_mut(block).checksum = crc.into();
    crc
}

/// Why bytes are not a metadata block of this filesystem at this place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Defect {
    /// No metadata block at all.
    Magic,
    /// Written for another place.
    Address,
    /// Of another filesystem.
    Secret,
    /// Torn or damaged.
    Checksum,
    /// A clock nobody can have reached.
    Version,
    /// Another kind than wanted.
    Kind,
    /// Belongs to another lock than wanted.
    Owner,
    /// Bytes that must be zero are not.
    Reserved,
}

impl Defect {
    /// For messages.
    pub const fn why(self) -> &'static str {
        match self {
            Defect::Magic => "no metadata block is there",
            Defect::Address => "it carries another block's address",
            Defect::Secret => "it belongs to another filesystem",
            Defect::Checksum => "checksum mismatch",
            Defect::Version => "its version is beyond any possible clock",
            Defect::Kind => "it is a block of another kind",
            Defect::Owner => "it belongs to another lock",
            Defect::Reserved => "reserved bytes are not zero",
        }
    }
}

/// Checks that the bytes are a metadata block of this filesystem written for `addr`: what replay compares
/// versions with.
pub fn is_ours(block: &Block, addr: BlockAddr, secret: &Secret) -> Result<(), Defect> {
    let h = Header::of(block);
    if h.magic.get() != MAGIC {
        return Err(Defect::Magic);
    }
    if h.secret != *secret {
        return Err(Defect::Secret);
    }
    if h.addr.get() != addr.0 {
        return Err(Defect::Address);
    }
    if h.checksum.get() != checksum(block) {
        return Err(Defect::Checksum);
    }
    if h.version.get() > MAX_CLOCK {
        return Err(Defect::Version);
    }
    Ok(())
}

/// Checks everything a header promises.
pub fn verify(
    block: &Block,
    kind: BlockKind,
    addr: BlockAddr,
    secret: &Secret,
    owner: LockName,
) -> Result<(), FsError> {
    let defect = match is_ours(block, addr, secret) {
        Err(defect) => Some(defect),
        Ok(()) => {
            let h = Header::of(block);
            if h.kind.get() != kind as u16 {
                Some(Defect::Kind)
            } else if h.owner() != Some(owner) {
                Some(Defect::Owner)
            } else if h.reserved != [0; 3] || h.reserved2 != [0; 4] {
                Some(Defect::Reserved)
            } else {
                None
            }
        }
    };
    match defect {
        None => Ok(()),
        Some(defect) => Err(FsError::corrupt(kind.name(), addr, defect.why())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> Block {
        let mut b = [0; BLOCK_SIZE];
        init(&mut b, BlockKind::Dinode, BlockAddr(77), Secret([5; 16]), LockName::Inode(77));
        b[4095] = 9;
        seal(&mut b, Clock(3));
        b
    }

    #[test]
    fn a_sealed_block_verifies_and_every_flipped_bit_is_found() {
        let good = block();
        let check =
            |b: &Block| verify(b, BlockKind::Dinode, BlockAddr(77), &Secret([5; 16]), LockName::Inode(77));
        check(&good).unwrap();
        for bit in (0..BLOCK_SIZE * 8).step_by(7).chain(0..HEADER_LEN * 8) {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn kinds_and_numbers_agree() {
        for n in 0..100 {
            if let Some(kind) = BlockKind::from_number(n) {
                assert_eq!(kind as u16, n);
            }
        }
    }

    #[test]
    fn golden_bytes() {
        let b = block();
        assert_eq!(
            b[..HEADER_LEN],
            [
                0x4d, 0x46, 0x53, 0x42, 8, 0, 0, 0, 77, 0, 0, 0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5,
                5, 5, 5, 5, 5, 3, 0, 0, 0, 0, 0, 0, 0, 77, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0,
                b[56], b[57], b[58], b[59], 0, 0, 0, 0
            ]
        );
    }
}
