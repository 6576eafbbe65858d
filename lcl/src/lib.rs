//! The lock-caching layer: the only client of the DLM on a node (LCL-1).
//!
//! A lock stays cached after its last user has gone; using it again costs one look-up under a short mutex. It
//! goes down when another node wants it, when there are too many, or when the node leaves; the clients' callouts
//! have then made stable and forgotten what it protected, before it goes.

mod api;
mod demote;
mod entry;
mod guard;
mod hooks;
mod lcl;
mod partition;
mod stats;
mod wait;

pub use api::{CalloutError, Callouts, Config, LockError, ReleaseError, Scope, Wire};
pub use dlm::{Message, Mode, Resource, ValueBlock};
pub use guard::Guard;
pub use lcl::Lcl;
pub use stats::{CachedLock, Phase, Snapshot, Stats, Waits};

/// How often at most the purge callout is called for one way down.
pub const PURGE_ROUNDS: u32 = 3;
