//! Recognises what a device already carries, so that mkfs does not destroy it unasked.
//!
//! Only looks: a positive answer names what was found, a negative one says that nothing known was found.

use std::fmt;
use std::io;

use crate::device::Device;
use crate::ids::{BLOCK_SIZE, BlockAddr};
use crate::label::LABEL_MAGIC;

/// Something that a device carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "each is a name")]
pub enum Signature {
    Matrix,
    Ext,
    Xfs,
    Btrfs,
    Gfs2,
    Ocfs2,
    F2fs,
    Bcachefs,
    Zfs,
    Squashfs,
    Iso9660,
    Ntfs,
    Exfat,
    Vfat,
    Lvm,
    Luks,
    Swap,
    MdRaid,
    GptTable,
    MbrTable,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Signature::Matrix => "a Matrix file system",
            Signature::Ext => "an ext2, ext3 or ext4 file system",
            Signature::Xfs => "an xfs file system",
            Signature::Btrfs => "a btrfs file system",
            Signature::Gfs2 => "a GFS2 file system",
            Signature::Ocfs2 => "an OCFS2 file system",
            Signature::F2fs => "an f2fs file system",
            Signature::Bcachefs => "a bcachefs file system",
            Signature::Zfs => "a member of a ZFS pool",
            Signature::Squashfs => "a squashfs file system",
            Signature::Iso9660 => "an ISO 9660 file system",
            Signature::Ntfs => "an NTFS file system",
            Signature::Exfat => "an exFAT file system",
            Signature::Vfat => "a FAT file system",
            Signature::Lvm => "an LVM physical volume",
            Signature::Luks => "a LUKS encrypted volume",
            Signature::Swap => "swap space",
            Signature::MdRaid => "a member of a Linux RAID array",
            Signature::GptTable => "a GPT partition table",
            Signature::MbrTable => "an MBR partition table",
        })
    }
}

/// Bytes at a fixed place.
struct Magic {
    offset: usize,
    bytes: &'static [u8],
    means: Signature,
}

const fn magic(offset: usize, bytes: &'static [u8], means: Signature) -> Magic {
    Magic { offset, bytes, means }
}

const KIB: usize = 1024;

/// More specific ones first: several file systems leave bytes that look like a partition table.
const AT_START: &[Magic] = &[
    magic(0, &LABEL_MAGIC, Signature::Matrix),
    magic(KIB + 0x38, &[0x53, 0xEF], Signature::Ext),
    magic(0, b"XFSB", Signature::Xfs),
    magic(64 * KIB + 0x40, b"_BHRfS_M", Signature::Btrfs),
    // The GFS2 superblock: magic, then type 1.
    magic(64 * KIB, &[0x01, 0x16, 0x19, 0x70, 0, 0, 0, 1], Signature::Gfs2),
    magic(KIB, b"OCFSV2", Signature::Ocfs2),
    magic(2 * KIB, b"OCFSV2", Signature::Ocfs2),
    magic(4 * KIB, b"OCFSV2", Signature::Ocfs2),
    magic(8 * KIB, b"OCFSV2", Signature::Ocfs2),
    magic(KIB, &[0x10, 0x20, 0xF5, 0xF2], Signature::F2fs),
    magic(
        4 * KIB + 24,
        &[0xC6, 0x85, 0x73, 0xF6, 0x66, 0xCE, 0x90, 0xA9, 0xD9, 0x6A, 0x60, 0xCF, 0x80, 0x3D, 0xF7, 0xEF],
        Signature::Bcachefs,
    ),
    // An uberblock of the first ZFS label.
    magic(128 * KIB, &[0x0C, 0xB1, 0xBA, 0, 0, 0, 0, 0], Signature::Zfs),
    magic(0, b"hsqs", Signature::Squashfs),
    magic(32 * KIB + 1, b"CD001", Signature::Iso9660),
    magic(0, b"LUKS\xBA\xBE", Signature::Luks),
    magic(0, b"LABELONE", Signature::Lvm),
    magic(512, b"LABELONE", Signature::Lvm),
    magic(1024, b"LABELONE", Signature::Lvm),
    magic(1536, b"LABELONE", Signature::Lvm),
    magic(4 * KIB - 10, b"SWAPSPACE2", Signature::Swap),
    magic(4 * KIB - 10, b"SWAP-SPACE", Signature::Swap),
    magic(64 * KIB - 10, b"SWAPSPACE2", Signature::Swap),
    // Version 1.1 lies at the start, 1.2 at 4 KiB.
    magic(0, &MD_MAGIC, Signature::MdRaid),
    magic(4 * KIB, &MD_MAGIC, Signature::MdRaid),
    magic(3, b"NTFS    ", Signature::Ntfs),
    magic(3, b"EXFAT   ", Signature::Exfat),
    magic(0x36, b"FAT", Signature::Vfat),
    magic(0x52, b"FAT32", Signature::Vfat),
    magic(512, b"EFI PART", Signature::GptTable),
    magic(4 * KIB, b"EFI PART", Signature::GptTable),
    magic(510, &[0x55, 0xAA], Signature::MbrTable),
];

const MD_MAGIC: [u8; 4] = 0xA92B_4EFC_u32.to_le_bytes();

/// Bytes looked at from the start of the device.
const START_BLOCKS: usize = 64;
/// Bytes looked at at its end.
const END_BLOCKS: usize = 32;

const _: () = {
    let mut index = 0;
    while index < AT_START.len() {
        assert!(AT_START[index].offset + AT_START[index].bytes.len() <= START_BLOCKS * BLOCK_SIZE);
        index += 1;
    }
};

/// What the device carries, the most specific thing first.
pub async fn detect(device: &dyn Device) -> io::Result<Option<Signature>> {
    let blocks = device.blocks();
    let start = device.read(BlockAddr(0), blocks.min(START_BLOCKS as u64) as usize).await?;
    if let Some(found) = detect_in_start(&start) {
        return Ok(Some(found));
    }
    let length = blocks.min(END_BLOCKS as u64);
    let end = device.read(BlockAddr(blocks - length), length as usize).await?;
    Ok(detect_in_end(&end))
}

fn detect_in_start(start: &[u8]) -> Option<Signature> {
    let found = |magic: &&Magic| start.get(magic.offset..).is_some_and(|rest| rest.starts_with(magic.bytes));
    AT_START.iter().find(found).map(|magic| magic.means)
}

/// RAID superblocks of version 0.90 and 1.0 and a backup partition table lie in the last 128 KiB.
fn detect_in_end(end: &[u8]) -> Option<Signature> {
    let sector = |back: usize| end.len().checked_sub(back).map(|at| &end[at..]);
    if sector(512).is_some_and(|bytes| bytes.starts_with(b"EFI PART")) {
        return Some(Signature::GptTable);
    }
    let md = (BLOCK_SIZE..=end.len()).step_by(BLOCK_SIZE).filter_map(sector);
    let mut md = md.filter(|bytes| bytes.starts_with(&MD_MAGIC));
    md.next().map(|_| Signature::MdRaid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem_device::MemDevice;
    use crate::runtime::block_on;

    fn device_with(offset: usize, bytes: &[u8]) -> MemDevice {
        let device = MemDevice::new(4096);
        for (index, byte) in bytes.iter().enumerate() {
            let at = offset + index;
            device.poke(BlockAddr((at / BLOCK_SIZE) as u64), |block| block[at % BLOCK_SIZE] = *byte);
        }
        device
    }

    #[test]
    fn every_known_signature_is_found_and_named() {
        for magic in AT_START {
            let device = device_with(magic.offset, magic.bytes);
            assert_eq!(block_on(detect(&device)).unwrap(), Some(magic.means), "{}", magic.means);
        }
    }

    #[test]
    fn signatures_at_the_end_are_found() {
        let device = device_with(4096 * BLOCK_SIZE - 512, b"EFI PART");
        assert_eq!(block_on(detect(&device)).unwrap(), Some(Signature::GptTable));
        let device = device_with((4096 - 16) * BLOCK_SIZE, &MD_MAGIC);
        assert_eq!(block_on(detect(&device)).unwrap(), Some(Signature::MdRaid));
    }

    #[test]
    fn a_blank_device_carries_nothing() {
        assert_eq!(block_on(detect(&MemDevice::new(4096))).unwrap(), None);
    }
}
