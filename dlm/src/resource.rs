//! What is locked, and the bytes kept with it.
//!
//! Always: a resource's partition follows from its name alone and is the same on every node.

use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};

use serde::{Deserialize, Serialize};

/// Independent parts of a node's lock manager, each behind its own mutex. Part of the protocol: never changed.
pub const PARTITIONS: usize = 16;

/// The name of something that can be locked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Resource {
    /// Decides the master; below [`membership::SHARDS`].
    pub shard: u16,
    /// The client's type of lock; callouts are registered by it.
    pub kind: u8,
    /// Which one of that type.
    pub number: u64,
    /// A range or leaf of it; 0 for the whole.
    pub part: u64,
}

impl Resource {
    /// The partition of every node's lock manager that deals with this resource.
    pub fn partition(&self) -> usize {
        let mixed = mix(mix(u64::from(self.shard) << 8 | u64::from(self.kind), self.number), self.part);
        (mixed >> 48) as usize % PARTITIONS
    }
}

impl fmt::Debug for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.kind, self.number)?;
        if self.part != 0 {
            write!(f, ".{}", self.part)?;
        }
        write!(f, "@{}", self.shard)
    }
}

fn mix(state: u64, word: u64) -> u64 {
    (state.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Hasher of resource names: quick, and the same in every run. Names come from members, who are trusted not to
/// choose them against us.
#[derive(Clone, Copy, Debug, Default)]
pub struct NameHasher(u64);

impl Hasher for NameHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, n: u8) {
        self.write_u64(u64::from(n));
    }

    fn write_u16(&mut self, n: u16) {
        self.write_u64(u64::from(n));
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = mix(self.0, n);
    }
}

/// Builds [`NameHasher`]s.
pub type NameHash = BuildHasherDefault<NameHasher>;

/// Bytes of a value block.
pub const VALUE_LEN: usize = 64;

/// The bytes kept with a resource (DLM-4).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ValueBlock(pub [u8; VALUE_LEN]);

impl fmt::Debug for ValueBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = VALUE_LEN - self.0.iter().rev().take_while(|byte| **byte == 0).count();
        write!(f, "{:02x?}", &self.0[..used])
    }
}

impl Serialize for ValueBlock {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        <([u8; 32], [u8; 32])>::serialize(&self.halves(), to)
    }
}

impl<'de> Deserialize<'de> for ValueBlock {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<ValueBlock, D::Error> {
        let (low, high) = <([u8; 32], [u8; 32])>::deserialize(from)?;
        let mut bytes = [0; VALUE_LEN];
        bytes[..32].copy_from_slice(&low);
        bytes[32..].copy_from_slice(&high);
        Ok(ValueBlock(bytes))
    }
}

impl ValueBlock {
    fn halves(&self) -> ([u8; 32], [u8; 32]) {
        let (mut low, mut high) = ([0; 32], [0; 32]);
        low.copy_from_slice(&self.0[..32]);
        high.copy_from_slice(&self.0[32..]);
        (low, high)
    }
}

/// A valid value block and how often it had been written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Value {
    /// Counts writes; a larger one is newer.
    pub sequence: u64,
    /// The bytes.
    pub block: ValueBlock,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_spread_over_all_partitions() {
        let mut count = [0; PARTITIONS];
        for number in 0..16_000 {
            count[Resource { shard: (number / 100 % 1024) as u16, kind: 3, number, part: 0 }.partition()] +=
                1;
        }
        assert!(count.iter().all(|n| (500..2000).contains(n)), "{count:?}");
    }

    #[test]
    fn a_partition_is_part_of_the_protocol() {
        let of = |number| Resource { shard: 7, kind: 3, number, part: 0 }.partition();
        assert_eq!([of(1), of(2), of(3), of(4_000_000)], GOLDEN);
    }

    const GOLDEN: [usize; 4] = [1, 13, 9, 10];
}
