//! The meeting point of a waiting request and whoever answers it.
//!
//! Always: a cell is finished once, by the holder of its partition's mutex; its own mutex is taken last.

use std::task::Waker;

use parking_lot::Mutex;

/// How a wait ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// The use has begun: who takes the outcome must end it.
    Admitted,
    /// A no-queue request found somebody in the way.
    Refused,
    /// The node was closed.
    Closed,
}

#[derive(Debug)]
enum State {
    Waiting(Option<Waker>),
    Finished(Outcome),
    Taken,
}

#[derive(Debug)]
pub(crate) struct Cell(Mutex<State>);

impl Cell {
    pub(crate) fn new() -> Cell {
        Cell(Mutex::new(State::Waiting(None)))
    }

    /// Answers the wait; returns whom to wake once no mutex is held.
    pub(crate) fn finish(&self, outcome: Outcome) -> Option<Waker> {
        match std::mem::replace(&mut *self.0.lock(), State::Finished(outcome)) {
            State::Waiting(waker) => waker,
            State::Finished(_) | State::Taken => unreachable!("a wait is answered once"),
        }
    }

    /// Takes the answer, or leaves a waker (anew at each poll).
    pub(crate) fn poll(&self, waker: &Waker) -> Option<Outcome> {
        let mut state = self.0.lock();
        match &mut *state {
            State::Waiting(slot) => {
                *slot = Some(waker.clone());
                None
            }
            State::Finished(outcome) => {
                let outcome = *outcome;
                *state = State::Taken;
                Some(outcome)
            }
            State::Taken => unreachable!("a finished wait is not polled again"),
        }
    }

    /// The answer, if there is one that nobody has taken.
    pub(crate) fn untaken(&self) -> Option<Outcome> {
        match &*self.0.lock() {
            State::Finished(outcome) => Some(*outcome),
            State::Waiting(_) | State::Taken => None,
        }
    }
}
