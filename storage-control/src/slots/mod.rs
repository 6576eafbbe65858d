//! Slots: where each node shows that it lives, and finds the others.

pub mod area;
pub mod claim;
pub mod keeper;
pub mod record;
pub mod watch;

pub use area::{Head, Look, SlotArea};
pub use claim::{ClaimError, Claimant, Claimed, NoLocks, SlotLocks, claim, live_nodes};
pub use keeper::{Beat, RenewError, Renewed, SlotKeeper};
pub use record::{NAME_BYTES, NO_ADDRESS, Nonce, PeerSet, SlotContents, SlotRecord, SlotState};
pub use watch::Watch;

#[cfg(test)]
pub(crate) mod tests;
