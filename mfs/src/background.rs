//! Tasks of a mounted filesystem that no request waits for.
//!
//! After `stop` no task that asked to be stoppable goes on, and `stop` returns when all have ended.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::task::Poll;

use storage_control::Runtime;
use tokio::sync::Notify;

/// Counts and stops tasks.
#[derive(Clone, Default)]
pub(crate) struct Background(Arc<Shared>);

#[derive(Default)]
struct Shared {
    stopping: AtomicBool,
    stop: Notify,
    running: AtomicUsize,
    ended: Notify,
}

/// Counts a task for as long as it lives, however it ends.
struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, SeqCst) == 1 {
            self.0.ended.notify_waiters();
        }
    }
}

impl Background {
    pub(crate) fn spawn(&self, runtime: &dyn Runtime, task: impl Future<Output = ()> + Send + 'static) {
        self.0.running.fetch_add(1, SeqCst);
        let running = Running(self.0.clone());
        runtime.spawn(Box::pin(async move {
            task.await;
            drop(running);
        }));
    }

    /// What the future gives, or `None` if `stop` comes first.
    pub(crate) async fn unless_stopped<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut stop = pin!(self.0.stop.notified());
        stop.as_mut().enable();
        if self.is_stopping() {
            return None;
        }
        let mut future = pin!(future);
        poll_fn(|cx| match stop.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(None),
            Poll::Pending => future.as_mut().poll(cx).map(Some),
        })
        .await
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.0.stopping.load(SeqCst)
    }

    /// Stops what can be stopped; does not wait.
    pub(crate) fn begin_stop(&self) {
        self.0.stopping.store(true, SeqCst);
        self.0.stop.notify_waiters();
    }

    /// Stops what can be stopped and waits for the rest.
    pub(crate) async fn stop(&self) {
        self.begin_stop();
        loop {
            let mut ended = pin!(self.0.ended.notified());
            ended.as_mut().enable();
            if self.0.running.load(SeqCst) == 0 {
                return;
            }
            ended.await;
        }
    }
}
