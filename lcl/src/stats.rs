//! Counters and what can be seen from outside (DLM-7).

use std::ops::AddAssign;
use std::time::Duration;

use dlm::{Mode, Resource};

use crate::api::Scope;
pub use crate::entry::{Phase, Waits};

/// Counts since the start.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Lock messages to other nodes.
    pub messages_sent: u64,
    /// Lock messages from other nodes.
    pub messages_received: u64,
    /// Grants by this node as master, without a message.
    pub grants_local: u64,
    /// Grants by other nodes.
    pub grants_remote: u64,
    /// Uses that found the lock cached.
    pub cached_hits: u64,
    /// Uses that had to wait.
    pub waits: u64,
    /// Waits given up.
    pub cancelled: u64,
    /// Times others wanted a lock held here.
    pub callbacks: u64,
    /// Locks given up, wholly or partly.
    pub demotions: u64,
    /// Purge callouts that had to be repeated.
    pub repeated_purges: u64,
    /// Conversions that would have waited for each other.
    pub deadlocks: u64,
    /// Locks kept because a flush failed.
    pub failed_flushes: u64,
    /// Messages that no correct member sends.
    pub faults: u64,
    /// Locks cached now.
    pub cached: u64,
}

impl AddAssign for Stats {
    fn add_assign(&mut self, other: Stats) {
        let Stats {
            messages_sent,
            messages_received,
            grants_local,
            grants_remote,
            cached_hits,
            waits,
            cancelled,
            callbacks,
            demotions,
            repeated_purges,
            deadlocks,
            failed_flushes,
            faults,
            cached,
        } = other;
        self.messages_sent += messages_sent;
        self.messages_received += messages_received;
        self.grants_local += grants_local;
        self.grants_remote += grants_remote;
        self.cached_hits += cached_hits;
        self.waits += waits;
        self.cancelled += cancelled;
        self.callbacks += callbacks;
        self.demotions += demotions;
        self.repeated_purges += repeated_purges;
        self.deadlocks += deadlocks;
        self.failed_flushes += failed_flushes;
        self.faults += faults;
        self.cached += cached;
    }
}

/// A lock as this node has it.
#[derive(Clone, PartialEq, Debug)]
pub struct CachedLock {
    /// Its name.
    pub res: Resource,
    /// The mode held.
    pub held: Mode,
    /// The mode asked for.
    pub asking: Option<Mode>,
    /// Since its grant.
    pub age: Duration,
    /// Since its last use.
    pub idle: Duration,
    /// Uses now, by mode.
    pub users: Vec<(Scope, Mode, u32)>,
    /// Requests on this node that wait, in order, and for how long.
    pub waiters: Vec<(Scope, Mode, Duration)>,
    /// Its way down.
    pub phase: Phase,
    /// How long requests have waited for it.
    pub waits: Waits,
}

/// What `matrix locks` shows of one node.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Snapshot {
    /// The resources mastered here, with holders, waiters and the wait-for edges.
    pub mastered: Vec<dlm::ResourceInfo>,
    /// The locks cached here.
    pub cached: Vec<CachedLock>,
}
