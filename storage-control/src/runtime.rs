//! Time and tasks, as the layers above get them.
//!
//! Nothing else in the crates below `src/` reads a clock or starts a thread (the I/O threads of
//! [`crate::FileDevice`] aside). [`Instant`] counts CLOCK_BOOTTIME: it does not stop while a machine is suspended,
//! and one node's instants mean nothing to another.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::ops::{Add, Sub};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// A task or a wait, owned.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + 'static>>;

/// Nanoseconds of CLOCK_BOOTTIME.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Instant(pub u64);

impl Instant {
    /// The machine's time since boot.
    pub fn boottime() -> Instant {
        let time = read_clock(libc::CLOCK_BOOTTIME);
        Instant(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
    }

    /// Time from `earlier` to `self`; zero where `earlier` is later.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    fn add(self, by: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;

    /// Saturates at zero, like [`Instant::since`].
    fn sub(self, earlier: Instant) -> Duration {
        self.since(earlier)
    }
}

/// Time of day, since 1970. Only for what users see (timestamps of files), never for a decision.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct WallTime {
    /// Seconds since 1970-01-01, negative before.
    pub secs: i64,
    /// Nanoseconds within the second.
    pub nanos: u32,
}

impl WallTime {
    /// The machine's time of day.
    pub fn system() -> WallTime {
        let time = read_clock(libc::CLOCK_REALTIME);
        WallTime { secs: time.tv_sec, nanos: time.tv_nsec as u32 }
    }
}

fn read_clock(clock: libc::clockid_t) -> libc::timespec {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec for the call to fill in.
    let done = unsafe { libc::clock_gettime(clock, &mut time) };
    assert_eq!(done, 0, "the kernel has the clocks this program was built for");
    time
}

/// Gives time and tasks to cores and operations.
pub trait Runtime: Send + Sync {
    /// Runs `task` in the background until it ends.
    fn spawn(&self, task: BoxFuture<()>);
    /// Completes `duration` from now.
    fn sleep(&self, duration: Duration) -> BoxFuture<()>;
    /// Now, on CLOCK_BOOTTIME (or the simulated one).
    fn now(&self) -> Instant;
    /// The time of day.
    fn wall(&self) -> WallTime;
}

struct Unpark {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Runs a future in the calling thread, which sleeps while there is nothing to do.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let unpark = Arc::new(Unpark { thread: thread::current(), woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&unpark));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        while !unpark.woken.swap(false, Ordering::AcqRel) {
            thread::park();
        }
    }
}

/// One wait for a time: shared by its future and the timer queue.
#[derive(Default)]
struct TimerState {
    fired: bool,
    waker: Option<Waker>,
}

#[derive(Clone, Default)]
struct Timer(Arc<Mutex<TimerState>>);

impl Timer {
    fn fire(&self) {
        let waker = {
            let mut state = self.0.lock();
            state.fired = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Future for Timer {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.0.lock();
        if state.fired {
            return Poll::Ready(());
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

/// Timers by due time, then by the order in which they were set.
#[derive(Default)]
struct TimerQueue {
    next: u64,
    due: BTreeMap<(Instant, u64), Timer>,
}

impl TimerQueue {
    fn set(&mut self, at: Instant) -> Timer {
        let timer = Timer::default();
        self.due.insert((at, self.next), timer.clone());
        self.next += 1;
        timer
    }

    fn first(&self) -> Option<Instant> {
        self.due.first_key_value().map(|((at, _), _)| *at)
    }

    fn take_due(&mut self, now: Instant) -> Vec<Timer> {
        let later = self.due.split_off(&(now, u64::MAX));
        std::mem::replace(&mut self.due, later).into_values().collect()
    }
}

#[derive(Default)]
struct Alarm {
    queue: Mutex<TimerQueue>,
    changed: Condvar,
}

/// Real time and a thread per task: for unit tests that want real concurrency.
#[derive(Clone)]
pub struct TestRuntime {
    alarm: Arc<Alarm>,
}

impl TestRuntime {
    /// A runtime with a timer thread that ends with the last clone.
    #[allow(clippy::new_without_default, reason = "it starts a thread")]
    pub fn new() -> TestRuntime {
        let alarm = Arc::new(Alarm::default());
        let weak = Arc::downgrade(&alarm);
        thread::Builder::new()
            .name("test-timers".into())
            .spawn(move || Self::run_timers(&weak))
            .expect("a test can start a thread");
        TestRuntime { alarm }
    }

    fn run_timers(alarm: &Weak<Alarm>) {
        // The thread holds the alarm only for short turns, so that it can see that nobody else does.
        const TURN: Duration = Duration::from_millis(100);
        while let Some(alarm) = alarm.upgrade() {
            let due = {
                let mut queue = alarm.queue.lock();
                let wait = queue.first().map_or(TURN, |at| at.since(Instant::boottime()).min(TURN));
                if !wait.is_zero() {
                    alarm.changed.wait_for(&mut queue, wait);
                }
                queue.take_due(Instant::boottime())
            };
            due.iter().for_each(Timer::fire);
        }
    }
}

impl Runtime for TestRuntime {
    fn spawn(&self, task: BoxFuture<()>) {
        thread::Builder::new()
            .name("test-task".into())
            .spawn(move || block_on(task))
            .expect("a test can start a thread");
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        let timer = self.alarm.queue.lock().set(Instant::boottime() + duration);
        self.alarm.changed.notify_one();
        // The alarm must live as long as someone waits for it.
        let alarm = Arc::clone(&self.alarm);
        Box::pin(async move {
            timer.await;
            drop(alarm);
        })
    }

    fn now(&self) -> Instant {
        Instant::boottime()
    }

    fn wall(&self) -> WallTime {
        WallTime::system()
    }
}

/// A task of [`SimRuntime`].
struct SimTask {
    future: Mutex<Option<BoxFuture<()>>>,
    queued: AtomicBool,
    world: Weak<SimWorld>,
}

impl Wake for SimTask {
    fn wake(self: Arc<Self>) {
        let Some(world) = self.world.upgrade() else { return };
        if !self.queued.swap(true, Ordering::AcqRel) {
            world.state.lock().runnable.push_back(self);
        }
    }
}

/// So many polls in one moment are tasks that wake each other for ever.
const MOST_POLLS_AT_A_TIME: u64 = 1_000_000;

struct SimState {
    now: Instant,
    /// Polls since time went on.
    polls: u64,
    random: u64,
    runnable: VecDeque<Arc<SimTask>>,
    timers: TimerQueue,
}

struct SimWorld {
    state: Mutex<SimState>,
}

/// Simulated time and one thread: the next task to run is drawn from a seed, and time jumps to the next timer
/// when no task can run. The same seed gives the same run.
#[derive(Clone)]
pub struct SimRuntime {
    world: Arc<SimWorld>,
}

impl SimRuntime {
    /// A world at time 1 s.
    pub fn new(seed: u64) -> SimRuntime {
        SimRuntime {
            world: Arc::new(SimWorld {
                state: Mutex::new(SimState {
                    now: Instant(1_000_000_000),
                    polls: 0,
                    random: seed,
                    runnable: VecDeque::new(),
                    timers: TimerQueue::default(),
                }),
            }),
        }
    }

    /// Runs all tasks until `future` is done.
    ///
    /// # Panics
    /// Where nothing can run, no timer is set and `future` still waits: a lost wake-up. Where tasks run on and on
    /// and no time passes: they wait for each other without waiting.
    pub fn run<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let result = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&result);
        self.spawn(Box::pin(async move {
            let value = future.await;
            *slot.lock() = Some(value);
        }));
        loop {
            if let Some(value) = result.lock().take() {
                return value;
            }
            assert!(self.step(), "nothing can run and no timer is set, but the future is not done");
        }
    }

    /// Runs all tasks until simulated time has gone on by `duration`.
    pub fn advance(&self, duration: Duration) {
        self.run(self.sleep(duration));
    }

    /// A number drawn from the world's seed.
    pub fn random(&self) -> u64 {
        draw(&mut self.world.state.lock().random)
    }

    /// Polls one task, or jumps to the next timer. False if there is neither.
    fn step(&self) -> bool {
        let mut state = self.world.state.lock();
        if state.runnable.is_empty() {
            let Some(at) = state.timers.first() else { return false };
            state.now = state.now.max(at);
            state.polls = 0;
            let due = state.timers.take_due(at);
            drop(state);
            due.iter().for_each(Timer::fire);
            return true;
        }
        state.polls += 1;
        assert!(state.polls < MOST_POLLS_AT_A_TIME, "tasks wake each other for ever, and no time passes");
        let chosen = (draw(&mut state.random) % state.runnable.len() as u64) as usize;
        let task = state.runnable.remove(chosen).expect("the chosen index is inside the queue");
        drop(state);
        task.queued.store(false, Ordering::Release);
        let mut future = task.future.lock();
        let waker = Waker::from(Arc::clone(&task));
        let finished = match future.as_mut() {
            Some(running) => running.as_mut().poll(&mut Context::from_waker(&waker)).is_ready(),
            None => false,
        };
        if finished {
            *future = None;
        }
        true
    }
}

/// The next number of a splitmix64 sequence.
pub(crate) fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Runtime for SimRuntime {
    fn spawn(&self, task: BoxFuture<()>) {
        let task = Arc::new(SimTask {
            future: Mutex::new(Some(task)),
            queued: AtomicBool::new(false),
            world: Arc::downgrade(&self.world),
        });
        task.wake();
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        let mut state = self.world.state.lock();
        let at = state.now + duration;
        Box::pin(state.timers.set(at))
    }

    fn now(&self) -> Instant {
        self.world.state.lock().now
    }

    fn wall(&self) -> WallTime {
        let now = self.now().0;
        WallTime { secs: (now / 1_000_000_000) as i64, nanos: (now % 1_000_000_000) as u32 }
    }
}

impl fmt::Debug for SimRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimRuntime(now {} ns)", self.now().0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_on_waits_for_another_thread() {
        let runtime = TestRuntime::new();
        let timer = Timer::default();
        let fire = timer.clone();
        runtime.spawn(Box::pin(async move { fire.fire() }));
        block_on(timer);
    }

    #[test]
    fn simulated_time_jumps_to_the_next_timer() {
        let world = SimRuntime::new(1);
        let start = world.now();
        let inner = world.clone();
        world.run(async move {
            inner.sleep(Duration::from_secs(3600)).await;
        });
        assert_eq!(world.now().since(start), Duration::from_secs(3600));
    }

    #[test]
    fn timers_fire_in_the_order_of_their_times() {
        let world = SimRuntime::new(7);
        let order = Arc::new(Mutex::new(Vec::new()));
        for secs in [3, 1, 2] {
            let (order, wait) = (Arc::clone(&order), world.sleep(Duration::from_secs(secs)));
            world.spawn(Box::pin(async move {
                wait.await;
                order.lock().push(secs);
            }));
        }
        world.advance(Duration::from_secs(5));
        assert_eq!(*order.lock(), [1, 2, 3]);
    }

    #[test]
    #[should_panic(expected = "no time passes")]
    fn tasks_that_wake_each_other_for_ever_are_found() {
        let world = SimRuntime::new(1);
        world.run(std::future::poll_fn(|context| {
            context.waker().wake_by_ref();
            Poll::<()>::Pending
        }));
    }

    #[test]
    fn the_same_seed_gives_the_same_order() {
        let order_of = |seed| {
            let world = SimRuntime::new(seed);
            let order = Arc::new(Mutex::new(Vec::new()));
            for task in 0..10 {
                let order = Arc::clone(&order);
                world.spawn(Box::pin(async move { order.lock().push(task) }));
            }
            world.advance(Duration::from_secs(1));
            std::mem::take(&mut *order.lock())
        };
        assert_eq!(order_of(5), order_of(5));
        assert!((0..20).any(|seed| order_of(seed) != order_of(seed + 1)));
    }
}
