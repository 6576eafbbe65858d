//! A simulated host: a clock of its own, and tasks that stop when it is paused and vanish when it dies.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use storage_control::{BoxFuture, Instant, Runtime, SimRuntime, WallTime};

type Task = Arc<Mutex<Option<BoxFuture<()>>>>;

#[derive(Default)]
struct State {
    paused: bool,
    dead: bool,
    /// Tasks that were woken while the host was paused.
    waiting: Vec<Waker>,
    tasks: Vec<Task>,
}

/// The host. Cloning gives another handle; the runtime of everything that runs on it.
#[derive(Clone)]
pub(crate) struct Host {
    world: SimRuntime,
    state: Arc<Mutex<State>>,
    /// Its clock runs so many millionths faster than the world's, and shows another time of day.
    drift_ppm: i64,
    wall_offset: i64,
}

impl Host {
    pub(crate) fn new(world: &SimRuntime, drift_ppm: i64, wall_offset: i64) -> Host {
        Host { world: world.clone(), state: Arc::default(), drift_ppm, wall_offset }
    }

    /// Stops every task where it is.
    pub(crate) fn pause(&self) {
        self.state.lock().paused = true;
    }

    pub(crate) fn resume(&self) {
        let waiting = {
            let mut state = self.state.lock();
            state.paused = false;
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Ends every task. Not to be called from one of them.
    pub(crate) fn kill(&self) {
        let tasks = {
            let mut state = self.state.lock();
            state.dead = true;
            std::mem::take(&mut state.tasks)
        };
        for task in tasks {
            let ended = task.lock().take();
            drop(ended);
        }
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.state.lock().dead
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.state.lock().paused
    }

    fn scaled(&self, nanos: u64, ppm: i64) -> u64 {
        nanos.saturating_add_signed(((i128::from(nanos) * i128::from(ppm)) / 1_000_000) as i64)
    }
}

impl Runtime for Host {
    fn spawn(&self, task: BoxFuture<()>) {
        let task: Task = Arc::new(Mutex::new(Some(task)));
        {
            let mut state = self.state.lock();
            if state.dead {
                return;
            }
            // Now and then those that have ended are forgotten.
            if state.tasks.len().is_power_of_two() && state.tasks.len() >= 64 {
                state.tasks.retain(|task| task.try_lock().is_none_or(|inner| inner.is_some()));
            }
            state.tasks.push(Arc::clone(&task));
        }
        self.world.spawn(Box::pin(OnHost { state: Arc::clone(&self.state), task }));
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        let nanos = self.scaled(duration.as_nanos() as u64, -self.drift_ppm);
        self.world.sleep(Duration::from_nanos(nanos))
    }

    fn now(&self) -> Instant {
        Instant(self.scaled(self.world.now().0, self.drift_ppm))
    }

    fn wall(&self) -> WallTime {
        let wall = self.world.wall();
        WallTime { secs: wall.secs + self.wall_offset, ..wall }
    }
}

/// A task of a host.
struct OnHost {
    state: Arc<Mutex<State>>,
    task: Task,
}

impl Future for OnHost {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        {
            let mut state = self.state.lock();
            if state.dead {
                return Poll::Ready(());
            }
            if state.paused {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
        }
        let mut task = self.task.lock();
        let Some(running) = task.as_mut() else { return Poll::Ready(()) };
        let polled = running.as_mut().poll(context);
        if polled.is_ready() {
            *task = None;
        }
        polled
    }
}
