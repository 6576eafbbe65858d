//! A lock for tasks: waiting costs no thread, turns are given in the order in which they were asked for.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::completion::{Completer, completion};

#[derive(Default)]
struct Queue {
    taken: bool,
    waiting: VecDeque<Completer<Turn>>,
}

/// Gives turns.
#[derive(Clone, Default)]
pub(crate) struct Turns(Arc<Mutex<Queue>>);

/// The right to go on; dropping it gives it to the next.
pub(crate) struct Turn(Turns);

impl Turns {
    pub(crate) async fn take(&self) -> Turn {
        let wait = {
            let mut queue = self.0.lock();
            if !queue.taken {
                queue.taken = true;
                return Turn(self.clone());
            }
            let (give, wait) = completion();
            queue.waiting.push_back(give);
            wait
        };
        // A turn given to a future that was dropped is dropped with it, and so passed on.
        wait.await.expect("the queue completes everybody who waits in it")
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let next = {
            let mut queue = self.0.0.lock();
            let next = queue.waiting.pop_front();
            queue.taken = next.is_some();
            next
        };
        if let Some(next) = next {
            next.complete(Ok(Turn(self.0.clone())));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::runtime::{Runtime, SimRuntime};

    #[test]
    fn only_one_task_has_the_turn_and_a_dropped_wait_passes_it_on() {
        let world = SimRuntime::new(3);
        let turns = Turns::default();
        let inside = Arc::new(Mutex::new((0_u32, 0_u32)));
        for _ in 0..10 {
            let (turns, inside, runtime) = (turns.clone(), Arc::clone(&inside), world.clone());
            world.spawn(Box::pin(async move {
                let turn = turns.take().await;
                inside.lock().0 += 1;
                assert_eq!(inside.lock().0, 1);
                runtime.sleep(Duration::from_millis(1)).await;
                let mut counts = inside.lock();
                counts.0 -= 1;
                counts.1 += 1;
                drop(turn);
            }));
        }
        let first = crate::runtime::block_on(turns.take());
        let mut dropped = Box::pin(turns.take());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(dropped.as_mut().poll(&mut context).is_pending());
        drop(first);
        drop(dropped);
        world.advance(Duration::from_secs(1));
        assert_eq!(*inside.lock(), (0, 10));
    }
}
