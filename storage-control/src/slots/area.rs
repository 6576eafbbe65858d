//! The quorum region as one node sees it: one read shows the label, all slots and the head of the register.
//!
//! A look is believed only if the label still names this file system.

use std::io;
use std::sync::Arc;

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::record::{SlotContents, SlotRecord};
use crate::buf::AlignedBuf;
use crate::device::{Device, Durability};
use crate::format::{checksum_of, checksum_ok};
use crate::gate::Gate;
use crate::ids::{BLOCK_SIZE, BlockAddr, Clock, NodeId};
use crate::label::{Label, LabelError};
use crate::register::{AcceptorId, Ballot, decode};
use crate::runtime::{Instant, Runtime};

const NONCE_MAGIC: [u8; 8] = *b"MTXNONCE";

/// A nonce block as it lies on the device. See FORMAT.md.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone)]
#[repr(C)]
pub(crate) struct RawNonce {
    pub(crate) magic: [u8; 8],
    pub(crate) node: U16,
    pub(crate) reserved_a: [u8; 6],
    pub(crate) fs_uuid: [u8; 16],
    pub(crate) nonce: [u8; 32],
    pub(crate) reserved_b: [u8; 4028],
    pub(crate) checksum: U32,
}

const _: () = assert!(size_of::<RawNonce>() == BLOCK_SIZE);

/// The newest value of the register that a look found accepted. Only a hint: a value is committed when a
/// ballot says so ([`crate::Register::read`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Head {
    /// Under which ballot it was accepted.
    pub ballot: Ballot,
    /// Its sequence.
    pub sequence: u64,
}

/// What one read of the quorum region showed.
#[derive(Clone, Debug)]
pub struct Look {
    /// Before the read was issued.
    pub issued: Instant,
    /// After it completed.
    pub completed: Instant,
    /// All slots, by number.
    pub slots: Vec<SlotContents>,
    /// The newest accepted value of the register.
    pub head: Head,
    /// The bytes of the slot blocks.
    pub(crate) bytes: Arc<AlignedBuf>,
    pub(crate) first_byte: usize,
}

impl Look {
    /// The bytes of a slot block.
    pub(crate) fn slot_bytes(&self, node: NodeId) -> &[u8] {
        let start = self.first_byte + usize::from(node.0) * BLOCK_SIZE;
        &self.bytes[start..start + BLOCK_SIZE]
    }

    /// The record in a node's slot.
    pub fn record(&self, node: NodeId) -> Option<&SlotRecord> {
        self.slots.get(usize::from(node.0))?.record()
    }

    /// All records.
    pub fn records(&self) -> impl Iterator<Item = &SlotRecord> {
        self.slots.iter().filter_map(SlotContents::record)
    }

    /// The largest Lamport clock in any slot.
    pub fn clock(&self) -> Clock {
        self.records().map(|record| record.clock).max().unwrap_or_default()
    }
}

/// A device's quorum region, for label and slots.
#[derive(Clone)]
pub struct SlotArea {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) label: Arc<Label>,
    pub(crate) runtime: Arc<dyn Runtime>,
}

impl SlotArea {
    /// The region behind a node's gate.
    pub fn new(gate: &Gate, label: Label, runtime: Arc<dyn Runtime>) -> SlotArea {
        SlotArea { device: gate.slot_device(), label: Arc::new(label), runtime }
    }

    /// The region of a device without a gate: for mkfs and fsck.
    pub fn without_gate(device: Arc<dyn Device>, label: Label, runtime: Arc<dyn Runtime>) -> SlotArea {
        SlotArea { device, label: Arc::new(label), runtime }
    }

    /// The label it was opened with.
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// Identity of the file system.
    pub fn fs(&self) -> Uuid {
        self.label.fs
    }

    /// Reads everything, and checks that the label still names this file system and this device.
    pub async fn look(&self) -> Result<Look, LabelError> {
        let layout = self.label.quorum;
        let slots = usize::from(layout.slots);
        let first_byte = layout.start.0 as usize * BLOCK_SIZE;
        let issued = self.runtime.now();
        let bytes = self.device.read(BlockAddr(0), layout.start.0 as usize + 2 * slots).await?;
        let completed = self.runtime.now();
        let label = Label::decode(&bytes[..BLOCK_SIZE])?;
        self.label.is_still(&label)?;
        let blocks = |first: usize| {
            let start = first_byte + first * BLOCK_SIZE;
            layout.nodes().zip(bytes[start..start + slots * BLOCK_SIZE].chunks_exact(BLOCK_SIZE))
        };
        let contents =
            blocks(0).map(|(node, bytes)| SlotContents::decode(bytes, self.label.fs, node)).collect();
        let id = AcceptorId::single(self.label.fs);
        let accepted = blocks(slots).filter_map(|(node, bytes)| decode(bytes, id, node).ok()??.accepted);
        let heads =
            accepted.map(|accepted| Head { ballot: accepted.ballot, sequence: accepted.value.sequence });
        let head = heads.max().unwrap_or_default();
        Ok(Look { issued, completed, slots: contents, head, bytes: Arc::new(bytes), first_byte })
    }

    pub(crate) async fn write(&self, record: &SlotRecord) -> io::Result<()> {
        let block = AlignedBuf::copy_of(record.encode(self.label.fs).as_bytes());
        let at = self.label.quorum.slot_block(record.node);
        self.device.write(at, vec![block.into()], Durability::Stable).await
    }

    /// Shows a nonce to the other nodes, in this node's own block: who reads the same one from its own device
    /// sees the same medium. An identical file system id alone may be a clone or a snapshot.
    pub async fn show_nonce(&self, me: NodeId, nonce: [u8; 32]) -> io::Result<()> {
        let mut raw = RawNonce {
            magic: NONCE_MAGIC,
            node: U16::new(me.0),
            reserved_a: [0; 6],
            fs_uuid: self.label.fs.into_bytes(),
            nonce,
            reserved_b: [0; 4028],
            checksum: U32::ZERO,
        };
        raw.checksum = U32::new(checksum_of(raw.as_bytes()));
        let block = AlignedBuf::copy_of(raw.as_bytes());
        self.device.write(self.label.quorum.nonce_block(me), vec![block.into()], Durability::Stable).await
    }

    /// The nonce that a node shows; `None` if it shows none.
    pub async fn shown_nonce(&self, node: NodeId) -> io::Result<Option<[u8; 32]>> {
        if !self.label.quorum.contains(node) {
            return Ok(None);
        }
        let block = self.device.read(self.label.quorum.nonce_block(node), 1).await?;
        let Ok(raw) = RawNonce::read_from_bytes(&block) else { return Ok(None) };
        let whole = raw.magic == NONCE_MAGIC
            && raw.node.get() == node.0
            && raw.fs_uuid == self.label.fs.into_bytes()
            && checksum_ok(&block);
        Ok(whole.then_some(raw.nonce))
    }
}

impl std::fmt::Debug for SlotArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SlotArea({})", self.label.fs)
    }
}
