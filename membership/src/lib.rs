//! Views: who is a member, under which generation.
//!
//! A core without clock, socket or thread: it is told what was seen, and says what to do. It never sends a
//! block to a device, never reads a clock and never draws a random number.

mod change;
pub mod codec;
mod core;
mod devices;
pub mod frame;
mod message;
mod shards;
pub mod times;
mod view;

pub use self::core::{
    CasOutcome, CloseReason, Input, Membership, Notice, Output, Phase, SlotSeen, Snapshot, Standing,
};
pub use devices::{Device, MAX_DEVICES, NamingDatabase, Role};
pub use message::{Applicant, Message, NodeSet, Refusal};
pub use shards::{SHARDS, ShardMap, ShardSet};
pub use view::{
    BadView, Candidate, FenceState, Fingerprint, MAX_JOURNALS, MAX_MEMBERS, MAX_NAME, Member, Recovery, View,
};
