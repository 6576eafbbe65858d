//! The numbers that cross crates, each with a type of its own so that none can stand in for another.
//!
//! [`LamportClock`] never goes back: a value returned by `tick` is larger than every value that was
//! returned or received before it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Size of a block in bytes: the unit of every address and every transfer.
pub const BLOCK_SIZE: usize = 4096;

/// The most slots (nodes) the format has room for.
pub const MAX_NODES: usize = 256;

/// Largest clock value that is believed; anything above is corruption (2^62 ticks take 146 years at one per ns).
pub const MAX_CLOCK: u64 = 1 << 62;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A node: the number of its slot in the quorum region.
    NodeId(u16)
}
number! {
    /// Counts the starts of a node's daemon.
    Incarnation(u64)
}
number! {
    /// Number of a view; every view is a new generation.
    Generation(u64)
}
number! {
    /// A value of the Lamport clock.
    Clock(u64)
}
number! {
    /// Address of a block of [`BLOCK_SIZE`] bytes on the device.
    BlockAddr(u64)
}

impl BlockAddr {
    /// The byte offset of the block, or `None` where it is beyond what a file offset can say.
    pub fn byte_offset(self) -> Option<u64> {
        self.0.checked_mul(BLOCK_SIZE as u64).filter(|&bytes| i64::try_from(bytes).is_ok())
    }
}

/// A clock value was larger than [`MAX_CLOCK`]: its source is corrupt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("clock value {0} is beyond 2^62: its source is corrupt")]
pub struct ClockError(pub u64);

/// The node's Lamport clock. Thread-safe.
#[derive(Debug, Default)]
pub struct LamportClock(AtomicU64);

impl LamportClock {
    /// A clock that has seen everything up to `seen`.
    pub fn new(seen: Clock) -> LamportClock {
        LamportClock(AtomicU64::new(seen.0))
    }

    /// The largest value seen so far.
    pub fn now(&self) -> Clock {
        Clock(self.0.load(Ordering::Acquire))
    }

    /// A new value, strictly larger than all seen.
    pub fn tick(&self) -> Clock {
        Clock(self.0.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Takes note of a value from another node or from the disk.
    pub fn receive(&self, seen: Clock) -> Result<(), ClockError> {
        if seen.0 > MAX_CLOCK {
            return Err(ClockError(seen.0));
        }
        self.0.fetch_max(seen.0, Ordering::AcqRel);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_is_larger_than_everything_received() {
        let clock = LamportClock::default();
        clock.receive(Clock(41)).unwrap();
        assert_eq!(clock.tick(), Clock(42));
        clock.receive(Clock(7)).unwrap();
        assert_eq!(clock.now(), Clock(42));
    }

    #[test]
    fn a_clock_beyond_two_to_the_62_is_refused_and_changes_nothing() {
        let clock = LamportClock::new(Clock(3));
        assert_eq!(clock.receive(Clock(MAX_CLOCK + 1)), Err(ClockError(MAX_CLOCK + 1)));
        assert_eq!(clock.now(), Clock(3));
    }

    #[test]
    fn a_block_address_beyond_a_file_offset_has_no_byte_offset() {
        assert_eq!(BlockAddr(2).byte_offset(), Some(8192));
        assert_eq!(BlockAddr(1 << 52).byte_offset(), None);
    }
}
