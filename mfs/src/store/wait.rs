//! Waiting without a runtime.
//!
//! A condition is checked after its waker is registered, so no wake-up is lost; wakers only enqueue their task.

use std::{
    future::{Future, poll_fn},
    task::{Poll, Waker},
};

use parking_lot::Mutex;

/// Tasks that wait for a change of something guarded elsewhere.
#[derive(Default)]
pub(crate) struct WaitQueue {
    wakers: Mutex<Vec<Waker>>,
}

impl WaitQueue {
    /// Wakes every waiting task; each checks its condition again.
    pub(crate) fn wake_all(&self) {
        let wakers = std::mem::take(&mut *self.wakers.lock());
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Waits until `check` gives a value. It is called again after every `wake_all`.
    pub(crate) async fn until<T>(&self, mut check: impl FnMut() -> Option<T>) -> T {
        poll_fn(|context| {
            if let Some(value) = check() {
                return Poll::Ready(value);
            }
            {
                let mut wakers = self.wakers.lock();
                if !wakers.iter().any(|waker| waker.will_wake(context.waker())) {
                    wakers.push(context.waker().clone());
                }
            }
            match check() {
                Some(value) => Poll::Ready(value),
                None => Poll::Pending,
            }
        })
        .await
    }
}

/// Waits for all futures; they make progress together.
pub(crate) async fn join_all<F: Future + Unpin>(futures: Vec<F>) -> Vec<F::Output> {
    let mut results: Vec<Option<F::Output>> = futures.iter().map(|_| None).collect();
    let mut futures: Vec<Option<F>> = futures.into_iter().map(Some).collect();
    poll_fn(|context| {
        let mut waiting = false;
        for (slot, result) in futures.iter_mut().zip(&mut results) {
            if let Some(future) = slot {
                match std::pin::Pin::new(future).poll(context) {
                    Poll::Ready(value) => {
                        *result = Some(value);
                        *slot = None;
                    }
                    Poll::Pending => waiting = true,
                }
            }
        }
        if waiting { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    results.into_iter().map(|result| result.expect("every future is done")).collect()
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use storage_control::{Runtime, SimRuntime};

    use super::*;

    #[test]
    fn a_waiter_sees_the_change_that_woke_it() {
        let world = SimRuntime::new(1);
        let shared = Arc::new((Mutex::new(0), WaitQueue::default()));
        let theirs = Arc::clone(&shared);
        let sleeper = world.clone();
        world.spawn(Box::pin(async move {
            sleeper.sleep(Duration::from_secs(1)).await;
            *theirs.0.lock() = 7;
            theirs.1.wake_all();
        }));
        let seen =
            world.run(async move { shared.1.until(|| Some(*shared.0.lock()).filter(|&n| n != 0)).await });
        assert_eq!(seen, 7);
    }
}
