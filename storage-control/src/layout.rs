//! Where everything of this crate lies on a device, in blocks of 4 KiB.
//!
//! ```text
//! block 0                label
//! block 1                reserved, zero
//! block 2..16            reserved, zero
//! QUORUM_START           quorum region of 16 blocks for each slot:
//!     + 0                slot blocks,       1 for each slot
//!     + slots            register blocks,   1 for each slot
//!     + 2 slots          register bodies,  12 for each slot: two buffers of 6
//!     + 14 slots         scratch blocks,    1 for each slot (probe of stable writes)
//!     + 15 slots         nonce blocks,      1 for each slot (proof of the same medium)
//! fs_start               superblock of MFS, then its allocation groups
//! last block             copy of the superblock of MFS
//! ```
//! Slot and register blocks lie together so that one read shows a node everything that may have changed.

use crate::ids::{BLOCK_SIZE, BlockAddr, MAX_NODES, NodeId};

/// The label.
pub const LABEL_BLOCK: BlockAddr = BlockAddr(0);
/// First block of the quorum region.
pub const QUORUM_START: BlockAddr = BlockAddr(16);
/// Blocks of the quorum region for each slot.
pub const BLOCKS_PER_SLOT: u64 = 16;
/// Blocks of one body buffer of the register.
pub const BODY_BLOCKS: usize = 6;
/// The largest body of the register, in bytes.
pub const MAX_BODY_BYTES: usize = BODY_BLOCKS * BLOCK_SIZE;
/// Devices of at least so many blocks (1 GiB) get [`LARGE_SLOTS`] slots.
pub const LARGE_DEVICE_BLOCKS: u64 = (1 << 30) / BLOCK_SIZE as u64;
/// Slots of a device below 1 GiB: a quorum region of 4 MiB.
pub const SMALL_SLOTS: u16 = 64;
/// Slots of a larger device: a quorum region of 16 MiB.
pub const LARGE_SLOTS: u16 = 256;

const _: () = assert!(1 + 1 + 2 * BODY_BLOCKS as u64 + 1 + 1 == BLOCKS_PER_SLOT);
const _: () = assert!(SMALL_SLOTS as u64 * BLOCKS_PER_SLOT * BLOCK_SIZE as u64 == 4 << 20);
const _: () = assert!(LARGE_SLOTS as u64 * BLOCKS_PER_SLOT * BLOCK_SIZE as u64 == 16 << 20);
const _: () = assert!(LARGE_SLOTS as usize <= MAX_NODES);

/// The quorum region of one device.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct QuorumLayout {
    /// First block.
    pub start: BlockAddr,
    /// Number of slots.
    pub slots: u16,
}

impl QuorumLayout {
    /// The layout mkfs gives a device of so many blocks.
    pub fn for_device(blocks: u64) -> QuorumLayout {
        let slots = if blocks < LARGE_DEVICE_BLOCKS { SMALL_SLOTS } else { LARGE_SLOTS };
        QuorumLayout { start: QUORUM_START, slots }
    }

    /// Length in blocks.
    pub fn blocks(self) -> u64 {
        u64::from(self.slots) * BLOCKS_PER_SLOT
    }

    /// First block after the region: where MFS starts.
    pub fn end(self) -> BlockAddr {
        BlockAddr(self.start.0 + self.blocks())
    }

    /// Whether the node has a slot here.
    pub fn contains(self, node: NodeId) -> bool {
        node.0 < self.slots
    }

    /// All slots.
    pub fn nodes(self) -> impl Iterator<Item = NodeId> {
        (0..self.slots).map(NodeId)
    }

    /// The node's slot block. The lock of a slot lies on its first byte.
    pub fn slot_block(self, node: NodeId) -> BlockAddr {
        self.part(0, 1, node)
    }

    /// The node's register block.
    pub fn register_block(self, node: NodeId) -> BlockAddr {
        self.part(1, 1, node)
    }

    /// First block of one of the node's two body buffers.
    pub fn body(self, node: NodeId, buffer: BodyBuffer) -> BlockAddr {
        let first = self.part(2, 2 * BODY_BLOCKS as u64, node);
        BlockAddr(first.0 + buffer as u64 * BODY_BLOCKS as u64)
    }

    /// A block the node may overwrite at any time.
    pub fn scratch_block(self, node: NodeId) -> BlockAddr {
        self.part(14, 1, node)
    }

    /// Where the node shows nonces, as proof that two nodes see the same medium.
    pub fn nonce_block(self, node: NodeId) -> BlockAddr {
        self.part(15, 1, node)
    }

    fn part(self, before: u64, each: u64, node: NodeId) -> BlockAddr {
        assert!(self.contains(node), "slot {node} is one of {} slots", self.slots);
        BlockAddr(self.start.0 + before * u64::from(self.slots) + each * u64::from(node.0))
    }
}

/// One of the two body buffers of a register block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum BodyBuffer {
    /// The first.
    A = 0,
    /// The second.
    B = 1,
}

impl BodyBuffer {
    /// The one that is not this.
    pub fn other(self) -> BodyBuffer {
        match self {
            BodyBuffer::A => BodyBuffer::B,
            BodyBuffer::B => BodyBuffer::A,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_block_of_the_quorum_region_belongs_to_one_slot_and_one_use() {
        for slots in [SMALL_SLOTS, LARGE_SLOTS] {
            let layout = QuorumLayout { start: QUORUM_START, slots };
            let mut seen = HashSet::new();
            for node in layout.nodes() {
                let body = |buffer| (0..BODY_BLOCKS as u64).map(move |at| layout.body(node, buffer).0 + at);
                let single =
                    [layout.slot_block(node), layout.register_block(node), layout.scratch_block(node)];
                let all = single.into_iter().chain([layout.nonce_block(node)]).map(|block| block.0);
                for block in all.chain(body(BodyBuffer::A)).chain(body(BodyBuffer::B)) {
                    assert!(seen.insert(block), "block {block} is used once");
                    assert!((layout.start.0..layout.end().0).contains(&block));
                }
            }
            assert_eq!(seen.len() as u64, layout.blocks());
        }
    }

    #[test]
    fn the_region_is_4_mib_below_1_gib_and_16_mib_from_there_on() {
        assert_eq!(QuorumLayout::for_device(LARGE_DEVICE_BLOCKS - 1).blocks(), 1024);
        assert_eq!(QuorumLayout::for_device(LARGE_DEVICE_BLOCKS).blocks(), 4096);
    }
}
