//! A lock's way down, as one straight function; one task per lock that is on it.
//!
//! Always: callouts run to the end before the lock goes (LCL-5); after [`Lcl::close`] it no longer goes.

use std::future::poll_fn;
use std::task::Poll;

use dlm::{Mode, Resource};

use crate::PURGE_ROUNDS;
use crate::api::Callouts;
use crate::entry::Phase;
use crate::lcl::Lcl;
use crate::partition::Purged;

/// Takes one lock down: holds it a while, purges, closes the door, flushes, gives it up.
pub(crate) async fn go_down(lcl: Lcl, res: Resource) {
    let Some((held, keep)) = hold(&lcl, res).await else { return };
    let callouts = lcl.callouts(res.kind);
    match &callouts {
        Some(callouts) => purge(&lcl, res, held, keep, &**callouts).await,
        None => lcl.locked(res, |partition, _| partition.close_door(res, keep)),
    }
    if drained(&lcl, res, keep).await == Drained::Closed {
        return;
    }
    let result = match &callouts {
        Some(callouts) => callouts.flush(res, held, keep).await,
        None => Ok(()),
    };
    lcl.locked(res, |partition, step| {
        if !partition.closed {
            partition.end_flush(step, res, keep, result.is_ok());
        }
    });
}

/// Purges until nothing can have been missed, or often enough; the door closes in the same step that finds so.
async fn purge(lcl: &Lcl, res: Resource, held: Mode, keep: Mode, callouts: &dyn Callouts) {
    for round in 1..=PURGE_ROUNDS {
        callouts.purge(res, held, keep).await;
        match lcl.locked(res, |partition, _| partition.end_purge(res, round == PURGE_ROUNDS)) {
            Purged::DoorClosed => return,
            Purged::Again => {}
        }
    }
    unreachable!("the last round closes the door");
}

/// Waits for the end of the minimum hold time; then the mode held and the one to keep.
async fn hold(lcl: &Lcl, res: Resource) -> Option<(Mode, Mode)> {
    loop {
        let left = lcl.locked(res, |partition, step| {
            let closed = partition.closed;
            let entry = partition.entries.peek(&res).expect("a lock on its way down has an entry");
            if closed { None } else { entry.hold_time(step.now, step.config) }
        });
        match left {
            Some(left) => lcl.sleep(left).await,
            None => break,
        }
    }
    lcl.locked(res, |partition, step| if partition.closed { None } else { partition.begin_purge(step, res) })
}

#[derive(PartialEq, Eq)]
enum Drained {
    Yes,
    Closed,
}

/// Waits until only users whom `keep` covers are inside.
async fn drained(lcl: &Lcl, res: Resource, keep: Mode) -> Drained {
    poll_fn(|context| {
        lcl.locked(res, |partition, _| {
            if partition.closed {
                return Poll::Ready(Drained::Closed);
            }
            let entry = partition.entries.peek_mut(&res).expect("a lock on its way down has an entry");
            if entry.is_drained(keep) {
                return Poll::Ready(Drained::Yes);
            }
            entry.watchers.push(context.waker().clone());
            Poll::Pending
        })
    })
    .await
}

/// How a lock stands that is not on its way anywhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Settled {
    /// Held in this mode.
    Held(Mode),
    /// Kept, because its flush failed.
    Failed,
    /// The node is closed.
    Closed,
}

/// Waits until the lock is neither asked for nor on its way down.
pub(crate) async fn settled(lcl: &Lcl, res: Resource) -> Settled {
    poll_fn(|context| {
        lcl.locked(res, |partition, _| {
            if partition.closed {
                return Poll::Ready(Settled::Closed);
            }
            let Some(entry) = partition.entries.peek_mut(&res) else {
                return Poll::Ready(Settled::Held(Mode::NL));
            };
            match entry.phase {
                Phase::Failed => Poll::Ready(Settled::Failed),
                Phase::Open if entry.asking.is_none() && entry.opening.is_none() => {
                    Poll::Ready(Settled::Held(entry.held))
                }
                Phase::Open | Phase::Called { .. } | Phase::Purging { .. } | Phase::Closed { .. } => {
                    entry.watchers.push(context.waker().clone());
                    Poll::Pending
                }
            }
        })
    })
    .await
}
