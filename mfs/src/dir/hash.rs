//! From names to cookies. Stable for ever: the hash is part of the format.

use std::hash::Hasher;
use std::ops::Range;

use siphasher::sip::SipHasher24;

use crate::format::dirent::{COLLISION_BITS, HASH_BITS};
use crate::format::superblock::Superblock;

/// The hash of a name, 48 bits, never 0: SipHash-2-4 under the filesystem's secret, so that nobody outside can
/// make names collide.
pub(crate) fn name_hash(superblock: &Superblock, name: &[u8]) -> u64 {
    #[cfg(test)]
    if name.starts_with(tests::COLLIDE) {
        return 7 << (HASH_BITS - 4);
    }
    let mut hasher = SipHasher24::new_with_key(&superblock.secret.0);
    hasher.write(name);
    (hasher.finish() >> (64 - HASH_BITS)).max(1)
}

/// The cookies that names of one hash may have.
pub(crate) fn cookie_range(hash: u64) -> Range<u64> {
    hash << COLLISION_BITS..(hash + 1) << COLLISION_BITS
}

#[cfg(test)]
pub(crate) mod tests {
    /// In tests of this crate, all names that begin so have the same hash.
    pub(crate) const COLLIDE: &[u8] = b"same hash ";

    #[test]
    fn cookies_fit_63_bits() {
        let last = super::cookie_range((1 << super::HASH_BITS) - 1);
        assert_eq!(last.end, 1 << 63);
        assert!(super::cookie_range(1).start > crate::format::dirent::COOKIE_DOTDOT);
    }
}
