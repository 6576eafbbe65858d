//! What clients give and get.

use std::time::Duration;

use dlm::{Fault, Message, Mode, Resource};
use storage_control::{BoxFuture, NodeId};

/// Whom a use excludes (LCL-3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Other nodes, and users of process scope on this node in conflicting modes.
    Process,
    /// Other nodes only.
    Server,
}

/// Why a lock cannot be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LockError {
    /// The node gave up its place in the matrix: [`crate::Lcl::close`].
    #[error("this node has no locks any more: it was closed")]
    Closed,
}

/// Why a client could not make its data stable or forget them. The node must withdraw.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a lock cannot be given up: {0}")]
pub struct CalloutError(pub String);

/// How [`crate::Lcl::release_all`] failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReleaseError {
    /// The node was closed meanwhile.
    #[error("closed before every lock was given up")]
    Closed,
    /// A callout failed for this lock; it is kept.
    #[error("lock {0} is kept: its data could not be made stable")]
    Kept(Resource),
}

/// What a client does when a lock of its kind comes or goes (LCL-4).
///
/// Going down has two phases. [`Callouts::purge`] runs while the lock is held as before: what the kernel does in
/// answer (write back, read, look up) is admitted and answered. If uses that the kept mode does not cover were
/// inside meanwhile, they may have filled a cache behind its back, and it is called again, up to
/// [`crate::PURGE_ROUNDS`] times. Then the door closes: only what `keep` covers gets in. When the others have left,
/// [`Callouts::flush`] runs, always, and makes stable what was changed; after that the lock goes down.
pub trait Callouts: Send + Sync {
    /// Phase 1: make others forget what `keep` does not protect. The lock is still held.
    fn purge(&self, res: Resource, held: Mode, keep: Mode) -> BoxFuture<()>;

    /// Phase 2: make stable what was written and forget what `keep` does not protect. Nobody whom `keep` does
    /// not cover is inside, nor gets in. After `Ok` the lock goes down; after `Err` it is kept for good.
    fn flush(&self, res: Resource, held: Mode, keep: Mode) -> BoxFuture<Result<(), CalloutError>>;

    /// The node now holds `mode`; nobody uses it yet. Must not wait, nor acquire this resource.
    fn acquired(&self, res: Resource, mode: Mode) {
        let _ = (res, mode);
    }
}

/// The way to other nodes.
pub trait Wire: Send + Sync {
    /// Queues a message for a member: in order per member, and without loss while both keep the view. It is
    /// called under a mutex, so it must not wait and not call back.
    fn send(&self, to: NodeId, message: Message);

    /// A member sent what no correct member sends; the connection should end.
    fn fault(&self, from: NodeId, fault: Fault) {
        let _ = (from, fault);
    }
}

/// Tunables; the defaults are meant to be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// A contended lock stays at least this long after its grant while it is being used.
    pub min_hold: Duration,
    /// A lock not used for this long is not being used.
    pub idle_hold: Duration,
    /// More cached locks than this are given back, least recently used first.
    pub max_cached: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            min_hold: Duration::from_millis(5),
            idle_hold: Duration::from_micros(300),
            max_cached: 256 * 1024,
        }
    }
}
