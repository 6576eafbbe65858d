//! What a disk holds.
//!
//! Blocks are shared between all images that have them, so an image of a 64 MiB disk costs what differs from the
//! last one. A block of zeros is a block that is not there; images of equal content have equal digests.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use storage_control::BLOCK_SIZE;

use crate::random::Random;

/// Bytes that a disk writes whole or not at all.
pub const SECTOR: usize = 512;
/// Sectors of a block.
pub const SECTORS: u32 = (BLOCK_SIZE / SECTOR) as u32;

/// The bytes of one block.
pub type Bytes = [u8; BLOCK_SIZE];

static ZEROS: LazyLock<Block> = LazyLock::new(|| Block::new([0; BLOCK_SIZE]));

/// One block's content, shared.
#[derive(Clone, Debug)]
pub struct Block(Arc<Content>);

#[derive(Debug)]
struct Content {
    bytes: Bytes,
    digest: u64,
}

impl Block {
    pub fn new(bytes: Bytes) -> Block {
        let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
        let digest = words.fold(0xcbf2_9ce4_8422_2325_u64, |digest, word| {
            (digest ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29)
        });
        Block(Arc::new(Content { bytes, digest }))
    }

    pub fn bytes(&self) -> &Bytes {
        &self.0.bytes
    }

    /// This block where `sectors` has a bit set, `old` elsewhere: what a write leaves that was cut short.
    pub fn torn(&self, old: &Block, sectors: u8) -> Block {
        let mut bytes = *old.bytes();
        for sector in (0..SECTORS as usize).filter(|sector| sectors >> sector & 1 == 1) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            bytes[range.clone()].copy_from_slice(&self.bytes()[range]);
        }
        Block::new(bytes)
    }
}

impl PartialEq for Block {
    fn eq(&self, other: &Block) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || (self.0.digest == other.0.digest && self.0.bytes == other.0.bytes)
    }
}

/// The contents of a disk.
#[derive(Clone, Debug, Default)]
pub struct Image {
    blocks: HashMap<u64, Block>,
    digest: u64,
}

impl Image {
    pub fn get(&self, at: u64) -> &Block {
        self.blocks.get(&at).unwrap_or(&ZEROS)
    }

    pub fn put(&mut self, at: u64, block: Block) {
        self.digest ^= place(at, self.get(at)) ^ place(at, &block);
        if block == *ZEROS {
            self.blocks.remove(&at);
        } else {
            self.blocks.insert(at, block);
        }
    }

    /// Tells images apart.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Blocks in which two images differ.
    pub fn differences(&self, other: &Image) -> Vec<u64> {
        let all = self.blocks.keys().chain(other.blocks.keys().filter(|at| !self.blocks.contains_key(at)));
        let mut differ: Vec<u64> = all.copied().filter(|at| self.get(*at) != other.get(*at)).collect();
        differ.sort_unstable();
        differ
    }
}

/// A block's part in an image's digest.
fn place(at: u64, block: &Block) -> u64 {
    if Arc::ptr_eq(&block.0, &ZEROS.0) || block.0.digest == ZEROS.0.digest {
        return 0;
    }
    mix(block.0.digest ^ mix(at))
}

/// A number that depends on every bit of another.
pub fn mix(n: u64) -> u64 {
    Random::new(n).next()
}

/// A seed that depends on a name too.
pub fn seed_of(name: &str, seed: u64) -> u64 {
    name.bytes().fold(seed, |seed, byte| mix(seed ^ u64::from(byte)))
}
