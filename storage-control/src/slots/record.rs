//! What a slot block says, and its bytes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::file_device::FileIdentity;
use crate::format::{checksum_of, checksum_ok};
use crate::ids::{BLOCK_SIZE, Clock, Incarnation, MAX_CLOCK, NodeId};
use crate::process::ProcessIdentity;

/// First bytes of a slot block.
pub(crate) const SLOT_MAGIC: [u8; 8] = *b"MTXSLOT\0";
/// Version of the slot block.
pub(crate) const SLOT_VERSION: u16 = 1;
/// Bytes of a name in a slot.
pub const NAME_BYTES: usize = 64;

/// A slot block as it lies on the device. See FORMAT.md.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C)]
pub(crate) struct RawSlot {
    pub(crate) magic: [u8; 8],
    pub(crate) version: U16,
    pub(crate) node: U16,
    pub(crate) state: u8,
    pub(crate) address_family: u8,
    pub(crate) port: U16,
    pub(crate) fs_uuid: [u8; 16],
    pub(crate) nonce: [u8; 16],
    pub(crate) incarnation: U64,
    pub(crate) sequence: U64,
    pub(crate) clock: U64,
    pub(crate) journal_tail: U64,
    pub(crate) boot_id: [u8; 16],
    pub(crate) pid_start: U64,
    pub(crate) pid: U32,
    pub(crate) health: U32,
    pub(crate) file_dev: U64,
    pub(crate) file_ino: U64,
    pub(crate) address: [u8; 16],
    pub(crate) fingerprint: [u8; 32],
    pub(crate) heard: [u8; 32],
    pub(crate) node_name: [u8; NAME_BYTES],
    pub(crate) host_name: [u8; NAME_BYTES],
    pub(crate) reserved: [u8; 3756],
    pub(crate) checksum: U32,
}

const _: () = assert!(size_of::<RawSlot>() == BLOCK_SIZE);

/// Drawn anew for every claim; who finds another one in its slot has lost it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Nonce(pub [u8; 16]);

impl Nonce {
    /// A fresh random one.
    pub fn random() -> Nonce {
        Nonce(Uuid::new_v4().into_bytes())
    }
}

/// What the holder of a slot says about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotState {
    /// It waits to see whether the slot is its own.
    Claiming,
    /// It holds the slot.
    Held,
    /// It has closed its gate, nothing of it is under way, and it will write nothing more.
    Stopped,
}

/// A set of nodes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PeerSet(pub [u8; 32]);

impl PeerSet {
    /// Adds a node; numbers beyond the format are ignored.
    pub fn insert(&mut self, node: NodeId) {
        if let Some(byte) = self.0.get_mut(usize::from(node.0 / 8)) {
            *byte |= 1 << (node.0 % 8);
        }
    }

    /// Whether the node is in the set.
    pub fn contains(&self, node: NodeId) -> bool {
        self.0.get(usize::from(node.0 / 8)).is_some_and(|byte| byte >> (node.0 % 8) & 1 == 1)
    }

    /// The nodes, ascending.
    pub fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        (0..256).map(NodeId).filter(|&node| self.contains(node))
    }
}

impl FromIterator<NodeId> for PeerSet {
    fn from_iter<I: IntoIterator<Item = NodeId>>(nodes: I) -> PeerSet {
        let mut set = PeerSet::default();
        nodes.into_iter().for_each(|node| set.insert(node));
        set
    }
}

impl fmt::Debug for PeerSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|node| node.0)).finish()
    }
}

/// What a slot block says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotRecord {
    /// The slot.
    pub node: NodeId,
    /// What its holder does.
    pub state: SlotState,
    /// Of this claim.
    pub nonce: Nonce,
    /// One more with every claim of the slot.
    pub incarnation: Incarnation,
    /// One more with every renewal.
    pub sequence: u64,
    /// The holder's Lamport clock.
    pub clock: Clock,
    /// Nothing in the holder's journal is older.
    pub journal_tail: Clock,
    /// The process that holds the slot.
    pub process: ProcessIdentity,
    /// The file on which that process holds the slot's lock.
    pub file: FileIdentity,
    /// 0: healthy; else the holder asks to be passed over.
    pub health: u32,
    /// Where the holder listens.
    pub address: SocketAddr,
    /// Of the holder's key.
    pub fingerprint: [u8; 32],
    /// Peers the holder hears.
    pub heard: PeerSet,
    /// The node's name; at most 64 bytes.
    pub node_name: String,
    /// The host's name; at most 64 bytes.
    pub host_name: String,
}

/// What lies in a slot block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SlotContents {
    /// Zeros: never used since mkfs.
    Blank,
    /// A record of this file system.
    Record(Box<SlotRecord>),
    /// Something else. It may be alive: only time shows.
    Unreadable(&'static str),
}

impl SlotContents {
    /// The record, if there is one.
    pub fn record(&self) -> Option<&SlotRecord> {
        match self {
            SlotContents::Record(record) => Some(record),
            SlotContents::Blank | SlotContents::Unreadable(_) => None,
        }
    }

    /// Checks the bytes of a slot block.
    pub fn decode(block: &[u8], fs: Uuid, node: NodeId) -> SlotContents {
        if block.iter().all(|&byte| byte == 0) {
            return SlotContents::Blank;
        }
        match decode(block, fs, node) {
            Ok(record) => SlotContents::Record(Box::new(record)),
            Err(why) => SlotContents::Unreadable(why),
        }
    }
}

fn name_bytes(name: &str) -> [u8; NAME_BYTES] {
    let mut bytes = [0; NAME_BYTES];
    // A name that is too long is cut at a character.
    let mut length = name.len().min(NAME_BYTES);
    while !name.is_char_boundary(length) {
        length -= 1;
    }
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}

/// A name as it comes back from a slot, where 64 bytes are kept of it.
pub fn stored_name(name: &str) -> String {
    name_of(&name_bytes(name)).expect("a name that was cut at a character is UTF-8")
}

fn name_of(bytes: &[u8]) -> Result<String, &'static str> {
    let length = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..length]).map(str::to_owned).map_err(|_| "a name is not UTF-8")
}

impl SlotRecord {
    pub(crate) fn encode(&self, fs: Uuid) -> RawSlot {
        let (address_family, address) = match self.address.ip() {
            IpAddr::V4(ip) => (4, ip.to_ipv6_mapped().octets()),
            IpAddr::V6(ip) => (6, ip.octets()),
        };
        let mut raw = RawSlot {
            magic: SLOT_MAGIC,
            version: U16::new(SLOT_VERSION),
            node: U16::new(self.node.0),
            state: match self.state {
                SlotState::Claiming => 1,
                SlotState::Held => 2,
                SlotState::Stopped => 3,
            },
            address_family,
            port: U16::new(self.address.port()),
            fs_uuid: fs.into_bytes(),
            nonce: self.nonce.0,
            incarnation: U64::new(self.incarnation.0),
            sequence: U64::new(self.sequence),
            clock: U64::new(self.clock.0),
            journal_tail: U64::new(self.journal_tail.0),
            boot_id: self.process.boot_id,
            pid_start: U64::new(self.process.start_time),
            pid: U32::new(self.process.pid),
            health: U32::new(self.health),
            file_dev: U64::new(self.file.dev),
            file_ino: U64::new(self.file.ino),
            address,
            fingerprint: self.fingerprint,
            heard: self.heard.0,
            node_name: name_bytes(&self.node_name),
            host_name: name_bytes(&self.host_name),
            reserved: [0; 3756],
            checksum: U32::ZERO,
        };
        raw.checksum = U32::new(checksum_of(raw.as_bytes()));
        raw
    }
}

fn decode(block: &[u8], fs: Uuid, node: NodeId) -> Result<SlotRecord, &'static str> {
    let raw = RawSlot::read_from_bytes(block).map_err(|_| "a slot is one block")?;
    if raw.magic != SLOT_MAGIC {
        return Err("not a slot block");
    }
    if !checksum_ok(block) {
        return Err("the checksum is wrong");
    }
    if raw.fs_uuid != fs.into_bytes() {
        return Err("it belongs to another file system");
    }
    if raw.version.get() != SLOT_VERSION {
        return Err("its version is unknown");
    }
    if raw.node.get() != node.0 {
        return Err("it belongs to another slot");
    }
    if raw.reserved.iter().any(|&byte| byte != 0) {
        return Err("its reserved bytes are not zero");
    }
    if raw.clock.get() > MAX_CLOCK || raw.journal_tail.get() > MAX_CLOCK {
        return Err("its clock is impossible");
    }
    let ip = match raw.address_family {
        4 => match Ipv6Addr::from(raw.address).to_ipv4_mapped() {
            Some(ip) => IpAddr::V4(ip),
            None => return Err("its address is impossible"),
        },
        6 => IpAddr::V6(Ipv6Addr::from(raw.address)),
        _ => return Err("its kind of address is unknown"),
    };
    Ok(SlotRecord {
        node,
        state: match raw.state {
            1 => SlotState::Claiming,
            2 => SlotState::Held,
            3 => SlotState::Stopped,
            _ => return Err("its state is unknown"),
        },
        nonce: Nonce(raw.nonce),
        incarnation: Incarnation(raw.incarnation.get()),
        sequence: raw.sequence.get(),
        clock: Clock(raw.clock.get()),
        journal_tail: Clock(raw.journal_tail.get()),
        process: ProcessIdentity {
            boot_id: raw.boot_id,
            pid: raw.pid.get(),
            start_time: raw.pid_start.get(),
        },
        file: FileIdentity { dev: raw.file_dev.get(), ino: raw.file_ino.get() },
        health: raw.health.get(),
        address: SocketAddr::new(ip, raw.port.get()),
        fingerprint: raw.fingerprint,
        heard: PeerSet(raw.heard),
        node_name: name_of(&raw.node_name)?,
        host_name: name_of(&raw.host_name)?,
    })
}

/// An address that means: none yet.
pub const NO_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const FS: Uuid = Uuid::from_bytes([0x11; 16]);

    pub(crate) fn sample() -> SlotRecord {
        SlotRecord {
            node: NodeId(3),
            state: SlotState::Held,
            nonce: Nonce([0x22; 16]),
            incarnation: Incarnation(5),
            sequence: 6,
            clock: Clock(7),
            journal_tail: Clock(4),
            process: ProcessIdentity { boot_id: [0x33; 16], pid: 77, start_time: 88 },
            file: FileIdentity { dev: 9, ino: 10 },
            health: 0,
            address: "10.1.2.3:7000".parse().unwrap(),
            fingerprint: [0x44; 32],
            heard: PeerSet::from_iter([NodeId(1), NodeId(9)]),
            node_name: "anna".into(),
            host_name: "host".into(),
        }
    }

    #[test]
    fn a_record_is_read_back_as_it_was_written() {
        for address in ["10.1.2.3:7000", "[fe80::1]:9"] {
            let record = SlotRecord { address: address.parse().unwrap(), ..sample() };
            let raw = record.encode(FS);
            let contents = SlotContents::decode(raw.as_bytes(), FS, NodeId(3));
            assert_eq!(contents, SlotContents::Record(Box::new(record)));
        }
    }

    #[test]
    fn the_bytes_of_a_slot_block_do_not_change() {
        let raw = sample().encode(FS);
        let bytes = raw.as_bytes();
        let golden = [
            &b"MTXSLOT\0\x01\0\x03\0\x02\x04\x58\x1B"[..],
            &[0x11; 16],
            &[0x22; 16],
            b"\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0",
            &[0x33; 16],
            b"\x58\0\0\0\0\0\0\0\x4D\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\x0A\0\0\0\0\0\0\0",
            b"\0\0\0\0\0\0\0\0\0\0\xFF\xFF\x0A\x01\x02\x03",
            &[0x44; 32],
            b"\x02\x02",
            &[0; 30],
            b"anna",
            &[0; 60],
            b"host\0",
        ]
        .concat();
        assert_eq!(&bytes[..golden.len()], golden);
        assert!(bytes[golden.len()..BLOCK_SIZE - 4].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn any_flipped_bit_makes_a_slot_unreadable() {
        let raw = sample().encode(FS);
        for bit in (0..BLOCK_SIZE * 8).step_by(7) {
            let mut block = raw.as_bytes().to_vec();
            block[bit / 8] ^= 1 << (bit % 8);
            let contents = SlotContents::decode(&block, FS, NodeId(3));
            assert!(matches!(contents, SlotContents::Unreadable(_)), "bit {bit}");
        }
    }

    #[test]
    fn a_record_of_another_slot_or_file_system_is_unreadable() {
        let raw = sample().encode(FS);
        for (fs, node) in [(FS, NodeId(4)), (Uuid::nil(), NodeId(3))] {
            let contents = SlotContents::decode(raw.as_bytes(), fs, node);
            assert!(matches!(contents, SlotContents::Unreadable(_)));
        }
        assert_eq!(SlotContents::decode(&[0; BLOCK_SIZE], FS, NodeId(3)), SlotContents::Blank);
    }

    #[test]
    fn a_name_that_is_too_long_is_cut_at_a_character() {
        let long = "ä".repeat(40);
        assert_eq!(stored_name(&long), "ä".repeat(32));
        assert_eq!(stored_name(&format!("x{long}")), format!("x{}", "ä".repeat(31)));
    }
}
