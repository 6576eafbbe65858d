//! The label: block 0, which says that a device carries a Matrix file system, and which one, and which of its devices
//! this is.
//!
//! It is written last by mkfs and never changed by a running cluster. Nothing else on the device is believed before the label was.

use std::io;
use std::time::Duration;

use uuid::Uuid;
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::buf::AlignedBuf;
use crate::device::{Device, Durability};
use crate::format::{checksum_of, checksum_ok};
use crate::ids::{BLOCK_SIZE, BlockAddr, MAX_NODES};
use crate::layout::{BLOCKS_PER_SLOT, LABEL_BLOCK, QUORUM_START, QuorumLayout};
use crate::naming::DeviceId;
use crate::runtime::WallTime;
use crate::signature::{self, Signature};

/// First bytes of the device.
pub const LABEL_MAGIC: [u8; 8] = *b"MATRIXFS";
/// The newest format this program knows, and the one it writes.
pub const LABEL_VERSION: u32 = 2;
/// The oldest format this program knows: version 1 had no id of the device.
pub const OLDEST_LABEL_VERSION: u32 = 2;
/// Bytes of a label text.
pub const LABEL_TEXT_BYTES: usize = 64;

/// Block 0 as it lies on the device. See FORMAT.md.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C)]
pub(crate) struct RawLabel {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U32,
    pub(crate) block_size: U32,
    pub(crate) fs_uuid: [u8; 16],
    pub(crate) nonce: [u8; 16],
    pub(crate) device_blocks: U64,
    pub(crate) quorum_start: U64,
    pub(crate) quorum_blocks: U64,
    pub(crate) fs_start: U64,
    pub(crate) slots: U16,
    pub(crate) reserved_a: [u8; 2],
    pub(crate) io_timeout_ms: U32,
    pub(crate) created_secs: I64,
    pub(crate) created_nanos: U32,
    pub(crate) reserved_b: [u8; 4],
    pub(crate) text: [u8; LABEL_TEXT_BYTES],
    pub(crate) device_uuid: [u8; 16],
    pub(crate) reserved_c: [u8; 3908],
    pub(crate) checksum: U32,
}

const _: () = assert!(size_of::<RawLabel>() == BLOCK_SIZE);

/// The label of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Label {
    /// Identity of the file system; public.
    pub fs: Uuid,
    /// Which of the matrix's devices this is, whatever its local path (SCL-1).
    pub device: DeviceId,
    /// Drawn by the mkfs that wrote the label, to see that no other mkfs came after it.
    pub nonce: [u8; 16],
    /// Size of the device.
    pub device_blocks: u64,
    /// The quorum region.
    pub quorum: QuorumLayout,
    /// Superblock of MFS.
    pub fs_start: BlockAddr,
    /// Bound on the life of a write, from `--io-timeout` of mkfs.
    pub io_timeout: Option<Duration>,
    /// When mkfs ran.
    pub created: WallTime,
    /// What the user called it; at most 64 bytes.
    pub text: String,
}

/// Why a label is not believed.
#[derive(Debug, thiserror::Error)]
pub enum LabelError {
    /// No label.
    #[error("not a Matrix file system{}", found.map(|found| format!(": the device carries {found}")).unwrap_or_default())]
    NotMatrix {
        /// What the device carries instead.
        found: Option<Signature>,
    },
    /// A label of a later format.
    #[error(
        "format version {found} is newer than version {LABEL_VERSION}, which this program knows; use a newer matrix"
    )]
    NewerVersion {
        /// The label's version.
        found: u32,
    },
    /// A label of a format that is no longer known.
    #[error(
        "format version {found} is older than version {OLDEST_LABEL_VERSION}, the oldest this program knows; make the file system anew with matrix mkfs --force"
    )]
    OlderVersion {
        /// The label's version.
        found: u32,
    },
    /// A label with impossible contents.
    #[error("the label is corrupt: {0}")]
    Corrupt(&'static str),
    /// The device is smaller than the label says.
    #[error("the device has {device} blocks, but its label says {label}: it was cut off")]
    Truncated {
        /// Blocks according to the label.
        label: u64,
        /// Blocks of the device.
        device: u64,
    },
    /// The label of another file system than the expected one.
    #[error("the device carries file system {found}, not {expected}")]
    ForeignFilesystem {
        /// The expected file system.
        expected: Uuid,
        /// The label's file system.
        found: Uuid,
    },
    /// The label of another device of the same file system.
    #[error("the device is {found} of its file system, not {expected}")]
    ForeignDevice {
        /// The expected device.
        expected: DeviceId,
        /// The label's device.
        found: DeviceId,
    },
    /// It could not be read or written.
    #[error("reading or writing the label: {0}")]
    Io(#[from] io::Error),
}

impl Label {
    /// A new label, with fresh identity and nonce, for a device of so many blocks.
    pub fn new(
        device_blocks: u64,
        text: &str,
        io_timeout: Option<Duration>,
        now: WallTime,
    ) -> Result<Label, LabelError> {
        if text.len() > LABEL_TEXT_BYTES || text.contains('\0') {
            return Err(LabelError::Corrupt("a label text has at most 64 bytes and no zero byte"));
        }
        let quorum = QuorumLayout::for_device(device_blocks);
        if quorum.end().0 >= device_blocks {
            return Err(LabelError::Truncated { label: quorum.end().0 + 1, device: device_blocks });
        }
        Ok(Label {
            fs: Uuid::new_v4(),
            device: DeviceId::random(),
            nonce: Uuid::new_v4().into_bytes(),
            device_blocks,
            quorum,
            fs_start: quorum.end(),
            io_timeout,
            created: now,
            text: text.to_owned(),
        })
    }

    /// Reads and checks the label.
    pub async fn read(device: &dyn Device) -> Result<Label, LabelError> {
        let block = device.read(LABEL_BLOCK, 1).await?;
        match Label::decode(&block) {
            Ok(label) if label.device_blocks > device.blocks() => {
                Err(LabelError::Truncated { label: label.device_blocks, device: device.blocks() })
            }
            Ok(label) => Ok(label),
            Err(LabelError::NotMatrix { .. }) => {
                Err(LabelError::NotMatrix { found: signature::detect(device).await? })
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the label and checks that it is this one's file system, and this one's device of it.
    pub async fn verify(&self, device: &dyn Device) -> Result<(), LabelError> {
        self.is_still(&Label::read(device).await?)
    }

    /// Checks that a label read later is this one's file system, and this one's device of it.
    pub(crate) fn is_still(&self, found: &Label) -> Result<(), LabelError> {
        if found.fs != self.fs {
            return Err(LabelError::ForeignFilesystem { expected: self.fs, found: found.fs });
        }
        if found.device != self.device {
            return Err(LabelError::ForeignDevice { expected: self.device, found: found.device });
        }
        Ok(())
    }

    /// Writes the label, stable.
    pub async fn write(&self, device: &dyn Device) -> Result<(), LabelError> {
        let block = AlignedBuf::copy_of(self.encode().as_bytes());
        Ok(device.write(LABEL_BLOCK, vec![block.into()], Durability::Stable).await?)
    }

    /// Overwrites whatever label the device has with zeros, stable: from here until the next
    /// [`Label::write`] the device carries nothing.
    pub async fn wipe(device: &dyn Device) -> Result<(), LabelError> {
        let zeros = AlignedBuf::zeroed_blocks(QUORUM_START.0 as usize);
        Ok(device.write(LABEL_BLOCK, vec![zeros.into()], Durability::Stable).await?)
    }

    pub(crate) fn encode(&self) -> RawLabel {
        let mut text = [0; LABEL_TEXT_BYTES];
        text[..self.text.len()].copy_from_slice(self.text.as_bytes());
        let mut raw = RawLabel {
            magic: LABEL_MAGIC,
            version: U32::new(LABEL_VERSION),
            block_size: U32::new(BLOCK_SIZE as u32),
            fs_uuid: self.fs.into_bytes(),
            nonce: self.nonce,
            device_blocks: U64::new(self.device_blocks),
            quorum_start: U64::new(self.quorum.start.0),
            quorum_blocks: U64::new(self.quorum.blocks()),
            fs_start: U64::new(self.fs_start.0),
            slots: U16::new(self.quorum.slots),
            reserved_a: [0; 2],
            io_timeout_ms: U32::new(
                self.io_timeout.map_or(0, |timeout| u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX)),
            ),
            created_secs: I64::new(self.created.secs),
            created_nanos: U32::new(self.created.nanos),
            reserved_b: [0; 4],
            text,
            device_uuid: self.device.0,
            reserved_c: [0; 3908],
            checksum: U32::ZERO,
        };
        raw.checksum = U32::new(checksum_of(raw.as_bytes()));
        raw
    }

    /// Checks the bytes of block 0 as far as they can be checked without the device.
    pub fn decode(block: &[u8]) -> Result<Label, LabelError> {
        let Ok(raw) = RawLabel::read_from_bytes(block) else {
            return Err(LabelError::Corrupt("a label is one block"));
        };
        if raw.magic != LABEL_MAGIC {
            return Err(LabelError::NotMatrix { found: None });
        }
        if raw.version.get() > LABEL_VERSION {
            return Err(LabelError::NewerVersion { found: raw.version.get() });
        }
        if !checksum_ok(block) {
            return Err(LabelError::Corrupt("the checksum is wrong"));
        }
        if raw.version.get() < OLDEST_LABEL_VERSION {
            return Err(LabelError::OlderVersion { found: raw.version.get() });
        }
        let quorum = QuorumLayout { start: BlockAddr(raw.quorum_start.get()), slots: raw.slots.get() };
        let reserved_zero = raw.reserved_a == [0; 2]
            && raw.reserved_b == [0; 4]
            && raw.reserved_c.iter().all(|&byte| byte == 0);
        let problem = if raw.block_size.get() != BLOCK_SIZE as u32 {
            Some("the block size is not 4096")
        } else if quorum.slots == 0
            || usize::from(quorum.slots) > MAX_NODES
            || raw.quorum_blocks.get() != u64::from(quorum.slots) * BLOCKS_PER_SLOT
        {
            Some("the number of slots does not fit the quorum region")
        } else if quorum.start != QUORUM_START || raw.fs_start.get() != quorum.end().0 {
            Some("the quorum region is not where it belongs")
        } else if raw.device_blocks.get() <= raw.fs_start.get() {
            Some("the device is too small for its quorum region")
        } else if raw.created_nanos.get() >= 1_000_000_000 {
            Some("the time of creation is impossible")
        } else if raw.device_uuid == [0; 16] {
            Some("the device has no id")
        } else if !reserved_zero {
            Some("reserved bytes are not zero")
        } else {
            None
        };
        if let Some(problem) = problem {
            return Err(LabelError::Corrupt(problem));
        }
        let length = raw.text.iter().position(|&byte| byte == 0).unwrap_or(LABEL_TEXT_BYTES);
        let text = std::str::from_utf8(&raw.text[..length])
            .map_err(|_| LabelError::Corrupt("the label text is not UTF-8"))?;
        let io_timeout = Some(raw.io_timeout_ms.get()).filter(|&ms| ms > 0);
        Ok(Label {
            fs: Uuid::from_bytes(raw.fs_uuid),
            device: DeviceId(raw.device_uuid),
            nonce: raw.nonce,
            device_blocks: raw.device_blocks.get(),
            quorum,
            fs_start: BlockAddr(raw.fs_start.get()),
            io_timeout: io_timeout.map(|ms| Duration::from_millis(u64::from(ms))),
            created: WallTime { secs: raw.created_secs.get(), nanos: raw.created_nanos.get() },
            text: text.to_owned(),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::mem_device::MemDevice;
    use crate::runtime::block_on;

    const BLOCKS: u64 = 20_000;

    /// A label with fixed contents.
    pub(crate) fn sample() -> Label {
        Label {
            fs: Uuid::from_bytes([0x11; 16]),
            device: DeviceId([0x33; 16]),
            nonce: [0x22; 16],
            created: WallTime { secs: 1_700_000_000, nanos: 5 },
            ..Label::new(BLOCKS, "films", Some(Duration::from_secs(5)), WallTime::default()).unwrap()
        }
    }

    fn written() -> MemDevice {
        let device = MemDevice::new(BLOCKS);
        block_on(sample().write(&device)).unwrap();
        device
    }

    /// Changes the block and makes its checksum right again.
    fn forge(device: &MemDevice, change: impl FnOnce(&mut [u8; BLOCK_SIZE])) {
        device.poke(LABEL_BLOCK, |block| {
            change(block);
            let sum = checksum_of(block).to_le_bytes();
            block[BLOCK_SIZE - 4..].copy_from_slice(&sum);
        });
    }

    #[test]
    fn a_label_is_read_back_as_it_was_written() {
        assert_eq!(block_on(Label::read(&written())).unwrap(), sample());
    }

    #[test]
    fn the_bytes_of_a_label_do_not_change() {
        let raw = sample().encode();
        let bytes = raw.as_bytes();
        let golden = [
            &b"MATRIXFS\x02\0\0\0\0\x10\0\0"[..],
            &[0x11; 16],
            &[0x22; 16],
            b"\x20\x4E\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x10\x04\0\0\0\0\0\0",
            b"\x40\0\0\0\x88\x13\0\0\0\xF1\x53\x65\0\0\0\0\x05\0\0\0\0\0\0\0films",
            &[0; 59],
            &[0x33; 16],
        ]
        .concat();
        assert_eq!(&bytes[..golden.len()], golden);
        assert!(bytes[golden.len()..BLOCK_SIZE - 4].iter().all(|&byte| byte == 0));
        assert_eq!(raw.checksum.get(), checksum_of(bytes));
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let raw = sample().encode();
        for bit in (0..BLOCK_SIZE * 8).step_by(5) {
            let mut block = raw.as_bytes().to_vec();
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(Label::decode(&block).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_newer_version_is_refused_as_such() {
        let device = written();
        forge(&device, |block| block[8] = 3);
        assert!(matches!(block_on(Label::read(&device)), Err(LabelError::NewerVersion { found: 3 })));
    }

    #[test]
    fn an_older_version_is_refused_as_such() {
        for version in [0, 1] {
            let device = written();
            forge(&device, |block| block[8] = version);
            let error = block_on(Label::read(&device)).unwrap_err();
            assert!(matches!(error, LabelError::OlderVersion { found } if found == u32::from(version)));
            assert!(error.to_string().contains("matrix mkfs"), "{error}");
        }
    }

    #[test]
    fn a_label_without_an_id_of_the_device_is_refused() {
        let device = written();
        forge(&device, |block| block[168..184].fill(0));
        assert!(matches!(block_on(Label::read(&device)), Err(LabelError::Corrupt(_))));
    }

    #[test]
    fn a_device_without_label_is_refused_with_what_it_carries() {
        let device = MemDevice::new(BLOCKS);
        assert!(matches!(block_on(Label::read(&device)), Err(LabelError::NotMatrix { found: None })));
        device.poke(BlockAddr(0), |block| block[..4].copy_from_slice(b"XFSB"));
        let error = block_on(Label::read(&device)).unwrap_err();
        assert_eq!(error.to_string(), "not a Matrix file system: the device carries an xfs file system");
    }

    #[test]
    fn a_truncated_device_is_refused_with_both_sizes() {
        let whole = written();
        let cut = MemDevice::new(BLOCKS - 1);
        cut.poke(LABEL_BLOCK, |block| block.copy_from_slice(&whole.peek(LABEL_BLOCK, 1)));
        let error = block_on(Label::read(&cut)).unwrap_err();
        assert!(matches!(error, LabelError::Truncated { label: BLOCKS, device } if device == BLOCKS - 1));
    }

    #[test]
    fn impossible_contents_with_a_right_checksum_are_refused() {
        for offset in [12, 56, 64, 72, 80, 83, 99, 101, 300] {
            let device = written();
            forge(&device, |block| block[offset] ^= 0x41);
            let result = block_on(Label::read(&device));
            assert!(matches!(result, Err(LabelError::Corrupt(_))), "offset {offset}: {result:?}");
        }
    }

    #[test]
    fn the_label_of_another_file_system_or_device_is_foreign() {
        let device = written();
        let other = Label { fs: Uuid::from_bytes([9; 16]), ..sample() };
        let error = block_on(other.verify(&device)).unwrap_err();
        assert!(matches!(error, LabelError::ForeignFilesystem { .. }));
        let other = Label { device: DeviceId([9; 16]), ..sample() };
        let error = block_on(other.verify(&device)).unwrap_err();
        assert!(matches!(error, LabelError::ForeignDevice { .. }));
        block_on(Label::wipe(&device)).unwrap();
        assert!(matches!(block_on(sample().verify(&device)), Err(LabelError::NotMatrix { found: None })));
    }
}
