//! The frame around every message between nodes: forty bytes, little-endian, then the payload.
//!
//! A header that is not exactly of this form closes the connection it came on: nothing is skipped or guessed.
//! The table of its fields is in PROTOCOL.md, and a test reads it.

use storage_control::{Clock, Generation, Incarnation, NodeId};

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"MTXF";
/// Version of frames and messages.
pub const PROTOCOL_VERSION: u16 = 2;
/// Size of a header in bytes.
pub const HEADER_BYTES: usize = 40;
/// Largest payload in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Channel {
    /// `membership::Message`.
    Membership,
    /// Lock messages.
    Dlm,
    /// The filesystem's own.
    FileSystem,
    /// Who is there, and whether it is on the same disk: the first frame of each side.
    Handshake,
}

impl Channel {
    fn number(self) -> u8 {
        match self {
            Channel::Membership => 1,
            Channel::Dlm => 2,
            Channel::FileSystem => 3,
            Channel::Handshake => 4,
        }
    }

    fn from_number(number: u8) -> Option<Channel> {
        match number {
            1 => Some(Channel::Membership),
            2 => Some(Channel::Dlm),
            3 => Some(Channel::FileSystem),
            4 => Some(Channel::Handshake),
            _ => None,
        }
    }
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the payload is.
    pub channel: Channel,
    /// Bytes of payload that follow.
    pub length: u32,
    /// The sending node.
    pub sender: NodeId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// The generation under which the message was made.
    pub generation: Generation,
    /// The sender's Lamport clock.
    pub clock: Clock,
}

/// Why a header was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not a frame of ours at all.
    #[error("not a Matrix frame")]
    Magic,
    /// A later (or no) version.
    #[error("protocol version {0} is not known here (this is version {PROTOCOL_VERSION})")]
    Version(u16),
    /// A channel without meaning.
    #[error("channel {0} does not exist")]
    Channel(u8),
    /// More than a frame may hold.
    #[error("a frame of {0} bytes, at most {MAX_PAYLOAD_BYTES} may be")]
    Length(u32),
    /// Reserved bytes that are not zero.
    #[error("reserved bytes are in use")]
    Reserved,
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        bytes[6] = self.channel.number();
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.sender.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.incarnation.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.generation.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.clock.0.to_le_bytes());
        bytes
    }

    /// The header in these bytes.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if bytes[0..4] != MAGIC {
            return Err(FrameError::Magic);
        }
        if u16_at(4) != PROTOCOL_VERSION {
            return Err(FrameError::Version(u16_at(4)));
        }
        let channel = Channel::from_number(bytes[6]).ok_or(FrameError::Channel(bytes[6]))?;
        let length = u32::from_le_bytes(std::array::from_fn(|i| bytes[8 + i]));
        if length as usize > MAX_PAYLOAD_BYTES {
            return Err(FrameError::Length(length));
        }
        if bytes[7] != 0 || u16_at(14) != 0 {
            return Err(FrameError::Reserved);
        }
        Ok(Header {
            channel,
            length,
            sender: NodeId(u16_at(12)),
            incarnation: Incarnation(u64_at(16)),
            generation: Generation(u64_at(24)),
            clock: Clock(u64_at(32)),
        })
    }
}
