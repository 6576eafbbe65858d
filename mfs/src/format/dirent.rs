//! On-disk directory entries.
//!
//! Entries lie packed and sorted by cookie, in a dinode or in leaves. A cookie is the name's keyed hash
//! (48 bits, never 0) and a collision number (15 bits); it is unique in its directory and never changes while
//! the name exists.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bits of a cookie that count names with the same hash.
pub const COLLISION_BITS: u32 = 15;
/// Bits of the hash in a cookie.
pub const HASH_BITS: u32 = 48;
/// Longest name.
pub const NAME_MAX: usize = 255;
/// The cookie of `.`.
pub const COOKIE_DOT: u64 = 1;
/// The cookie of `..`.
pub const COOKIE_DOTDOT: u64 = 2;

const _: () = assert!(HASH_BITS + COLLISION_BITS == 63);
const _: () = assert!(size_of::<RawDirent>() == 26);

/// An entry without its name, which follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawDirent {
    /// Hash and collision number.
    pub cookie: U64,
    /// Inode number.
    pub ino: U64,
    /// The inode's generation.
    pub generation: U64,
    /// File type as `st_mode >> 12`.
    pub kind: u8,
    /// Bytes of the name, 1 to 255.
    pub name_len: u8,
}
