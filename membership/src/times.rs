//! Every duration of membership, with its unit and its relation to the others.

use std::time::Duration;

/// A node's lease on its slot: the gate closes this long after the last renewal began.
pub const LEASE_MS: u64 = 4_000;
/// Slots are renewed this often.
pub const RENEW_MS: u64 = 1_000;
/// Heartbeats are sent, and slots and the register looked at, this often.
pub const HEARTBEAT_MS: u64 = 500;
/// News of the register are waited for this long before a member reads it for itself.
pub const TELL_MS: u64 = 150;
/// A peer counts as heard this long after its last message.
pub const HEARD_MS: u64 = 2_000;
/// A pair that does not hear each other for this long is broken.
pub const BROKEN_MS: u64 = 3_000;
/// Silence on network and disk for this long is death.
pub const SILENCE_MS: u64 = 5_000;
/// Silence on the disk alone for this long is death too: the lease has long run out.
pub const DISK_SILENCE_MS: u64 = 10_000;
/// A candidate has this long to become the ADM.
pub const ELECTION_MS: u64 = 2_000;
/// A failed candidate is passed over for this long.
pub const CANDIDATE_REST_MS: u64 = 30_000;
/// A fence that failed, or a journal that could not be made, is tried again after this long.
pub const RETRY_MS: u64 = 2_000;
/// A gap this long in our own work or reads says nothing about others.
pub const STALL_MS: u64 = 1_500;

const _: () = assert!(LEASE_MS < SILENCE_MS, "a node stops by itself before it is excluded for silence");
const _: () = assert!(RENEW_MS * 3 < LEASE_MS, "two renewals may fail");
const _: () = assert!(HEARD_MS + BROKEN_MS <= SILENCE_MS, "a partition is settled as fast as a death");
const _: () =
    assert!(2 * RENEW_MS <= HEARD_MS && RENEW_MS < BROKEN_MS, "others' sets of peers are seen in time");
const _: () = assert!(HEARTBEAT_MS * 3 < HEARD_MS, "two heartbeats may be lost");
const _: () = assert!(TELL_MS + RENEW_MS < LEASE_MS, "who waits for news does not lose its lease over it");
const _: () = assert!(SILENCE_MS < DISK_SILENCE_MS && 2 * HEARTBEAT_MS < STALL_MS && STALL_MS < HEARD_MS);

pub(crate) const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
