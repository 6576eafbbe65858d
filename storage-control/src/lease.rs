//! The arithmetic of leases, written once.
//!
//! The holder counts from a time *before* it issued the renewal; others count from the last *change they saw*,
//! and wait longer: by the drift of two clocks, and by the life of I/O that the device had already accepted.
//! So the holder has stopped, and nothing of it can still land, before anyone acts on its absence.

use std::time::Duration;

use crate::medium::WriteLife;
use crate::runtime::Instant;

/// A node renews its slot so often.
pub const RENEW_EVERY_MS: u64 = 1_000;
/// L: a lease lasts so long from before the renewal was issued.
pub const LEASE_MS: u64 = 4_000;
/// W: how much longer a watchdog may let a node live. There is none.
pub const WATCHDOG_MS: u64 = 0;
/// How much faster one node's clock may run than another's.
pub const DRIFT_PERCENT: u64 = 1;
/// An observer looks at the slots so often.
pub const POLL_EVERY_MS: u64 = 1_000;
/// An observer whose own I/O took longer than this, or that did not look for twice as long, starts its windows anew.
pub const STALL_MS: u64 = 2_500;

const _: () = assert!(3 * RENEW_EVERY_MS < LEASE_MS, "two renewals may fail before the lease is lost");
const _: () = assert!(POLL_EVERY_MS < STALL_MS, "an observer on schedule is not a stalled one");
const _: () = assert!(STALL_MS < LEASE_MS, "a stall of everybody is noticed before anybody is fenced");

/// The times that follow from the constants and the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseTimes {
    /// D: the longest life of a write that the device has accepted.
    pub write_life: WriteLife,
}

impl LeaseTimes {
    /// L.
    pub const LEASE: Duration = Duration::from_millis(LEASE_MS);
    /// Time between renewals.
    pub const RENEW_EVERY: Duration = Duration::from_millis(RENEW_EVERY_MS);
    /// Time between looks at the slots.
    pub const POLL_EVERY: Duration = Duration::from_millis(POLL_EVERY_MS);

    /// Until when the holder may submit, if it issued the renewal after `before_issue`.
    pub fn holder_deadline(before_issue: Instant) -> Instant {
        before_issue + Self::LEASE
    }

    /// How long a slot must be unchanged before its holder is surely dead: (L + W)(1 + drift) + D.
    /// `None` where nothing bounds D: lease expiry is then no fencing method.
    pub fn full_wait(self) -> Option<Duration> {
        match self.write_life {
            WriteLife::Bounded(life) => Some(Self::stopped_after().saturating_add(life)),
            WriteLife::Unbounded => None,
        }
    }

    /// How long a slot must be unchanged before its holder has surely stopped submitting: (L + W)(1 + drift).
    pub fn stopped_after() -> Duration {
        const MS: u64 = (LEASE_MS + WATCHDOG_MS) * (100 + DRIFT_PERCENT);
        Duration::from_millis(MS.div_ceil(100))
    }

    /// How long a claimant waits between writing its nonce and reading it back: longer than the write of a
    /// competitor can be under way, which was submitted at most [`STALL_MS`] after it read the slot.
    pub fn settle_wait(self) -> Option<Duration> {
        match self.write_life {
            WriteLife::Bounded(life) => Some(Duration::from_millis(STALL_MS).saturating_add(life)),
            WriteLife::Unbounded => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_wait_longer_than_the_holder_and_its_late_writes_live() {
        let times = LeaseTimes { write_life: WriteLife::Bounded(Duration::from_secs(5)) };
        assert_eq!(times.full_wait(), Some(Duration::from_millis(4040 + 5000)));
        assert_eq!(LeaseTimes::holder_deadline(Instant(7)), Instant(4_000_000_007));
    }

    #[test]
    fn without_a_bound_on_writes_there_is_no_wait_that_is_long_enough() {
        assert_eq!(LeaseTimes { write_life: WriteLife::Unbounded }.full_wait(), None);
    }
}
