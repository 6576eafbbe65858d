//! A register block, and its bytes.

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::core::{Accepted, Ballot, Block, BodyHash, OpId, RECENT_OPS, Value};
use crate::format::{checksum_of, checksum_ok};
use crate::ids::{BLOCK_SIZE, NodeId};
use crate::layout::{BodyBuffer, MAX_BODY_BYTES};

/// First bytes of a register block.
pub(crate) const REGISTER_MAGIC: [u8; 8] = *b"MTXREG\0\0";
/// Version of the register block.
pub(crate) const REGISTER_VERSION: u16 = 1;

/// A register block as it lies on the device. See FORMAT.md.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C)]
pub(crate) struct RawRegister {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U16,
    pub(crate) node: U16,
    pub(crate) has_accepted: u8,
    pub(crate) body_buffer: u8,
    pub(crate) recent_count: U16,
    pub(crate) fs_uuid: [u8; 16],
    pub(crate) acceptor_uuid: [u8; 16],
    pub(crate) acceptor_config: U64,
    pub(crate) promised: U64,
    pub(crate) accepted: U64,
    pub(crate) sequence: U64,
    pub(crate) body_hash: U64,
    pub(crate) body_len: U32,
    pub(crate) reserved_a: [u8; 4],
    pub(crate) recent: [[u8; 16]; RECENT_OPS],
    pub(crate) reserved_b: [u8; 1948],
    pub(crate) checksum: U32,
}

const _: () = assert!(size_of::<RawRegister>() == BLOCK_SIZE);

/// Why a register block is not believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("register block of slot {node}: {why}")]
pub struct BadBlock {
    /// The slot.
    pub node: NodeId,
    /// What is wrong.
    pub why: &'static str,
}

/// Which acceptor a block must belong to: file system, acceptor and its configuration number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AcceptorId {
    /// The file system.
    pub fs: Uuid,
    /// The acceptor; of a matrix of one device its file system's id.
    pub acceptor: Uuid,
    /// Number of the acceptors' configuration.
    pub config: u64,
}

impl AcceptorId {
    /// The one acceptor of a matrix of one device.
    pub fn single(fs: Uuid) -> AcceptorId {
        AcceptorId { fs, acceptor: fs, config: 1 }
    }
}

/// The bytes of a block.
pub(crate) fn encode(block: &Block, id: AcceptorId, node: NodeId) -> RawRegister {
    let mut raw = RawRegister {
        magic: REGISTER_MAGIC,
        version: U16::new(REGISTER_VERSION),
        node: U16::new(node.0),
        has_accepted: u8::from(block.accepted.is_some()),
        body_buffer: 0,
        recent_count: U16::ZERO,
        fs_uuid: id.fs.into_bytes(),
        acceptor_uuid: id.acceptor.into_bytes(),
        acceptor_config: U64::new(id.config),
        promised: U64::new(block.promised.0),
        accepted: U64::ZERO,
        sequence: U64::ZERO,
        body_hash: U64::ZERO,
        body_len: U32::ZERO,
        reserved_a: [0; 4],
        recent: [[0; 16]; RECENT_OPS],
        reserved_b: [0; 1948],
        checksum: U32::ZERO,
    };
    if let Some(Accepted { ballot, value, buffer }) = &block.accepted {
        raw.body_buffer = *buffer as u8;
        raw.recent_count = U16::new(value.recent.len() as u16);
        raw.accepted = U64::new(ballot.0);
        raw.sequence = U64::new(value.sequence);
        raw.body_hash = U64::new(value.hash.0);
        raw.body_len = U32::new(value.len);
        for (bytes, op) in raw.recent.iter_mut().zip(&value.recent) {
            *bytes = op.0.to_le_bytes();
        }
    }
    raw.checksum = U32::new(checksum_of(raw.as_bytes()));
    raw
}

/// Checks the bytes of a block. `None`: zeros, never written since mkfs.
pub(crate) fn decode(bytes: &[u8], id: AcceptorId, node: NodeId) -> Result<Option<Block>, BadBlock> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    decode_record(bytes, id, node).map(Some).map_err(|why| BadBlock { node, why })
}

fn decode_record(bytes: &[u8], id: AcceptorId, node: NodeId) -> Result<Block, &'static str> {
    let raw = RawRegister::read_from_bytes(bytes).map_err(|_| "it is not one block")?;
    if raw.magic != REGISTER_MAGIC {
        return Err("it is not a register block");
    }
    if !checksum_ok(bytes) {
        return Err("its checksum is wrong");
    }
    if raw.fs_uuid != id.fs.into_bytes() {
        return Err("it belongs to another file system");
    }
    if raw.acceptor_uuid != id.acceptor.into_bytes() || raw.acceptor_config.get() != id.config {
        return Err("it belongs to another acceptor or configuration");
    }
    if raw.version.get() != REGISTER_VERSION {
        return Err("its version is unknown");
    }
    if raw.node.get() != node.0 {
        return Err("it belongs to another slot");
    }
    if raw.reserved_a != [0; 4] || raw.reserved_b.iter().any(|&byte| byte != 0) {
        return Err("its reserved bytes are not zero");
    }
    let promised = Ballot(raw.promised.get());
    let accepted = match raw.has_accepted {
        0 => None,
        1 => Some(decode_accepted(&raw, promised)?),
        _ => return Err("it neither has nor has not accepted a value"),
    };
    Ok(Block { promised, accepted })
}

fn decode_accepted(raw: &RawRegister, promised: Ballot) -> Result<Accepted, &'static str> {
    let ballot = Ballot(raw.accepted.get());
    let count = usize::from(raw.recent_count.get());
    if ballot > promised {
        return Err("it has accepted more than it promised");
    }
    if raw.body_len.get() as usize > MAX_BODY_BYTES {
        return Err("its body is too long");
    }
    if count == 0 || count > RECENT_OPS || raw.sequence.get() < count as u64 {
        return Err("its list of operations is impossible");
    }
    Ok(Accepted {
        ballot,
        buffer: match raw.body_buffer {
            0 => BodyBuffer::A,
            1 => BodyBuffer::B,
            _ => return Err("its body buffer does not exist"),
        },
        value: Value {
            sequence: raw.sequence.get(),
            hash: BodyHash(raw.body_hash.get()),
            len: raw.body_len.get(),
            recent: raw.recent[..count].iter().map(|op| OpId(u128::from_le_bytes(*op))).collect(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: AcceptorId =
        AcceptorId { fs: Uuid::from_bytes([0x11; 16]), acceptor: Uuid::from_bytes([0x12; 16]), config: 3 };

    fn sample() -> Block {
        let value =
            Value { sequence: 9, hash: BodyHash(0x0102), len: 5, recent: vec![OpId(0xAA), OpId(0xBB)] };
        let accepted = Accepted { ballot: Ballot::new(2, NodeId(4)), value, buffer: BodyBuffer::B };
        Block { promised: Ballot::new(7, NodeId(5)), accepted: Some(accepted) }
    }

    #[test]
    fn a_block_is_read_back_as_it_was_written() {
        for block in [sample(), Block { accepted: None, ..sample() }] {
            let raw = encode(&block, ID, NodeId(5));
            assert_eq!(decode(raw.as_bytes(), ID, NodeId(5)), Ok(Some(block)));
        }
    }

    #[test]
    fn the_bytes_of_a_register_block_do_not_change() {
        let raw = encode(&sample(), ID, NodeId(5));
        let golden = [
            &b"MTXREG\0\0\x01\0\x05\0\x01\x01\x02\0"[..],
            &[0x11; 16],
            &[0x12; 16],
            b"\x03\0\0\0\0\0\0\0\x05\0\x07\0\0\0\0\0\x04\0\x02\0\0\0\0\0\x09\0\0\0\0\0\0\0",
            b"\x02\x01\0\0\0\0\0\0\x05\0\0\0\0\0\0\0",
            b"\xAA\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xBB\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        ]
        .concat();
        assert_eq!(&raw.as_bytes()[..golden.len()], golden);
        assert!(raw.as_bytes()[golden.len()..BLOCK_SIZE - 4].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn any_flipped_bit_is_noticed_and_zeros_are_a_block_never_written() {
        let raw = encode(&sample(), ID, NodeId(5));
        for bit in (0..BLOCK_SIZE * 8).step_by(7) {
            let mut bytes = raw.as_bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes, ID, NodeId(5)).is_err(), "bit {bit}");
        }
        assert_eq!(decode(&[0; BLOCK_SIZE], ID, NodeId(5)), Ok(None));
    }

    #[test]
    fn a_block_of_another_acceptor_configuration_or_slot_is_refused() {
        let raw = encode(&sample(), ID, NodeId(5));
        let others = [AcceptorId { acceptor: Uuid::nil(), ..ID }, AcceptorId { config: 4, ..ID }];
        assert!(others.iter().all(|&id| decode(raw.as_bytes(), id, NodeId(5)).is_err()));
        assert!(decode(raw.as_bytes(), ID, NodeId(6)).is_err());
    }
}
