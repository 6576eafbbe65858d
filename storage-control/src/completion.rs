//! A result handed from the thread that carries out a request to the future that waits for it.
//!
//! Dropping the [`Completer`] without a result completes the future with an error: nobody waits for ever.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

enum State<T> {
    Waiting(Option<Waker>),
    Done(io::Result<T>),
    Taken,
}

/// Gives the result.
pub(crate) struct Completer<T>(Arc<Mutex<State<T>>>);

/// Waits for the result.
pub(crate) struct Completion<T>(Arc<Mutex<State<T>>>);

/// A connected pair.
pub(crate) fn completion<T>() -> (Completer<T>, Completion<T>) {
    let state = Arc::new(Mutex::new(State::Waiting(None)));
    (Completer(Arc::clone(&state)), Completion(state))
}

impl<T> Completer<T> {
    pub(crate) fn complete(self, result: io::Result<T>) {
        self.settle(result);
    }

    fn settle(&self, result: io::Result<T>) {
        let mut state = self.0.lock();
        let waker = match &mut *state {
            State::Waiting(waker) => waker.take(),
            State::Done(_) | State::Taken => return,
        };
        *state = State::Done(result);
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Completer<T> {
    fn drop(&mut self) {
        self.settle(Err(io::Error::other("the request was dropped before it was carried out")));
    }
}

impl<T> Future for Completion<T> {
    type Output = io::Result<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        let mut state = self.0.lock();
        match std::mem::replace(&mut *state, State::Taken) {
            State::Done(result) => Poll::Ready(result),
            State::Waiting(_) => {
                *state = State::Waiting(Some(context.waker().clone()));
                Poll::Pending
            }
            State::Taken => panic!("a completion is not polled after it is done"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::block_on;

    #[test]
    fn a_result_from_another_thread_arrives() {
        let (completer, completion) = completion();
        let thread = std::thread::spawn(move || completer.complete(Ok(5)));
        assert_eq!(block_on(completion).unwrap(), 5);
        thread.join().unwrap();
    }

    #[test]
    fn a_dropped_completer_is_an_error_not_a_hang() {
        let (completer, completion) = completion::<()>();
        drop(completer);
        assert!(block_on(completion).is_err());
    }
}
