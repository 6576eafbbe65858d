//! The renewal thread: renews the slot every second and looks at all slots twice a second.
//!
//! A plain thread that does nothing else, so that no amount of work elsewhere costs the node its lease. What it sees
//! goes to the driver; it decides nothing. It ends when the gate is closed.

use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};
use membership::times::HEARTBEAT_MS;
use parking_lot::Mutex;
use storage_control::lease::LeaseTimes;
use storage_control::slots::{Beat, Look, PeerSet, RenewError, Renewed, SlotKeeper, Watch};
use storage_control::{CloseReason, Instant, LamportClock, Runtime, block_on};

use super::ClusterHooks;
use super::driver::Event;

/// Between two looks at the slots.
const LOOK_EVERY: Duration = Duration::from_millis(HEARTBEAT_MS);

/// What the driver publishes with the next renewal.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Publication {
    pub(super) heard: PeerSet,
    pub(super) healthy: bool,
}

/// How a renewal went, for the driver.
#[derive(Clone, Debug)]
pub(super) enum News {
    /// The lease holds until then; `None` before admission.
    Renewed(Option<Instant>),
    /// The register must be read before the slot may be renewed.
    Behind,
    /// Renewed, but the lease has run out.
    Expired,
    /// It failed; tried again.
    Failed(String),
    /// The gate is closed: the thread has ended.
    Closed(CloseReason),
}

pub(super) struct Renewal {
    pub(super) keeper: SlotKeeper,
    pub(super) clock: Arc<LamportClock>,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) hooks: Arc<dyn ClusterHooks>,
    /// Shared with the fence methods, so that a victim's window is running before it is fenced.
    pub(super) watch: Arc<Mutex<Watch>>,
    pub(super) publication: Arc<Mutex<Publication>>,
    pub(super) events: Sender<Event>,
}

impl Renewal {
    /// Runs until the gate is closed or `poke` is dropped. A poke renews at once.
    pub(super) fn run(self, poke: &Receiver<()>) {
        let mut due = self.runtime.now();
        loop {
            let now = self.runtime.now();
            let going_on = if now >= due {
                due = now + LeaseTimes::RENEW_EVERY;
                self.renew()
            } else {
                self.look()
            };
            if !going_on {
                return;
            }
            let wait = due.since(self.runtime.now()).min(LOOK_EVERY);
            match poke.recv_timeout(wait) {
                Ok(()) => due = self.runtime.now(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// False when there is nobody to tell any more, or nothing to renew.
    fn renew(&self) -> bool {
        let publication = *self.publication.lock();
        let beat = Beat {
            clock: self.clock.now(),
            journal_tail: self.hooks.journal_tail(),
            heard: publication.heard,
            health: u32::from(!publication.healthy),
        };
        let news = match block_on(self.keeper.renew(beat)) {
            Ok(Renewed::Renewed { look, until }) => self.seen(look, News::Renewed(until)),
            Ok(Renewed::Behind { look }) => self.seen(look, News::Behind),
            Ok(Renewed::Expired { look }) => self.seen(look, News::Expired),
            Err(RenewError::Closed(reason)) => {
                let _ = self.events.send(Event::Renewal(News::Closed(reason)));
                return false;
            }
            Err(error @ (RenewError::Io(_) | RenewError::Label(_) | RenewError::Delayed)) => {
                self.watch.lock().stalled();
                News::Failed(error.to_string())
            }
        };
        self.events.send(Event::Renewal(news)).is_ok()
    }

    fn look(&self) -> bool {
        match block_on(self.keeper.area().look()) {
            Ok(look) => {
                self.watch.lock().observe(&look);
                self.events.send(Event::Looked(Box::new(look))).is_ok()
            }
            // The next renewal finds out what is wrong, and acts on it.
            Err(_) => {
                self.watch.lock().stalled();
                true
            }
        }
    }

    fn seen(&self, look: Look, news: News) -> News {
        self.watch.lock().observe(&look);
        let _ = self.events.send(Event::Looked(Box::new(look)));
        news
    }
}
