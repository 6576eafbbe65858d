//! The checksum that ends every block of this crate.

use crate::ids::BLOCK_SIZE;

/// Where the checksum lies in a block; it covers everything before.
const CHECKSUM_AT: usize = BLOCK_SIZE - 4;

/// CRC-32C of a block without its last four bytes.
///
/// # Panics
/// Where `block` is shorter than a block.
pub(crate) fn checksum_of(block: &[u8]) -> u32 {
    crc32c::crc32c(&block[..CHECKSUM_AT])
}

/// Whether `block` is one block that ends with its checksum.
pub(crate) fn checksum_ok(block: &[u8]) -> bool {
    block.len() == BLOCK_SIZE && block[CHECKSUM_AT..] == checksum_of(block).to_le_bytes()
}
