//! A use of a lock, and the wait for it.
//!
//! Always: what was begun is ended once, by the guard's drop or by the drop of a wait whose answer nobody took.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use dlm::{Mode, Resource, ValueBlock};

use crate::api::{LockError, Scope};
use crate::lcl::Lcl;
use crate::wait::{Cell, Outcome};

/// A wait for a use to begin; dropped early, it gives up.
pub(crate) struct Wait {
    lcl: Lcl,
    res: Resource,
    mode: Mode,
    scope: Scope,
    cell: Arc<Cell>,
    over: bool,
}

impl Wait {
    pub(crate) fn new(lcl: Lcl, res: Resource, mode: Mode, scope: Scope, cell: Arc<Cell>) -> Wait {
        Wait { lcl, res, mode, scope, cell, over: false }
    }
}

impl Future for Wait {
    type Output = Result<Option<Guard>, LockError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(outcome) = self.cell.poll(context.waker()) else { return Poll::Pending };
        self.over = true;
        Poll::Ready(match outcome {
            Outcome::Admitted => Ok(Some(Guard::new(self.lcl.clone(), self.res, self.mode, self.scope))),
            Outcome::Refused => Ok(None),
            Outcome::Closed => Err(LockError::Closed),
        })
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let Wait { res, mode, scope, .. } = *self;
        self.lcl.locked(res, |partition, step| match self.cell.untaken() {
            Some(Outcome::Admitted) => partition.leave(step, res, mode, scope),
            Some(Outcome::Refused | Outcome::Closed) => {}
            None => partition.abandon(step, res, &self.cell),
        });
    }
}

/// A use of a lock. While it lives the lock covers its mode; when it is dropped the lock stays cached.
pub struct Guard {
    lcl: Lcl,
    res: Resource,
    mode: Mode,
    scope: Scope,
}

impl Guard {
    /// A guard for a use that has begun.
    pub(crate) fn new(lcl: Lcl, res: Resource, mode: Mode, scope: Scope) -> Guard {
        Guard { lcl, res, mode, scope }
    }

    /// The mode this use asked for; the node may hold more.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// What is locked.
    pub fn resource(&self) -> Resource {
        self.res
    }

    /// The value block, where it is valid.
    pub fn value(&self) -> Option<ValueBlock> {
        self.lcl
            .partition(self.res)
            .lock()
            .entries
            .peek(&self.res)
            .and_then(|entry| entry.value.as_deref().copied())
    }

    /// Writes the value block; others see it when the lock goes down. Under PW or EX only.
    pub fn set_value(&self, value: ValueBlock) {
        assert!(self.mode.writes_value(), "the value block is written under PW or EX");
        let mut partition = self.lcl.partition(self.res).lock();
        let entry = partition.entries.peek_mut(&self.res).expect("a used lock has an entry");
        (entry.value, entry.value_written) = (Some(Box::new(value)), true);
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guard({} {} {:?})", self.res, self.mode, self.scope)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Guard { res, mode, scope, .. } = *self;
        let now = self.lcl.now();
        if !self.lcl.partition(res).lock().leave_unnoticed(now, res, mode, scope) {
            self.lcl.locked(res, |partition, step| partition.leave(step, res, mode, scope));
        }
    }
}
