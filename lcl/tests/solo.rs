//! One node alone: users, scopes, callouts.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lcl::{
    CalloutError, Callouts, Config, Guard, Lcl, LockError, Mode, ReleaseError, Resource, Scope, ValueBlock,
};
use storage_control::{BoxFuture, Runtime, SimRuntime, TestRuntime, block_on};

const KIND: u8 = 3;

fn res(number: u64) -> Resource {
    Resource { shard: (number % 1024) as u16, kind: KIND, number, part: 0 }
}

fn solo() -> (SimRuntime, Lcl) {
    let runtime = SimRuntime::new(1);
    let lcl = Lcl::solo(Arc::new(runtime.clone()));
    (runtime, lcl)
}

#[derive(Default)]
struct Counting {
    acquired: AtomicU32,
    purged: AtomicU32,
    flushed: AtomicU32,
    fails: bool,
    lcl: OnceLock<Lcl>,
}

impl Callouts for Counting {
    fn purge(&self, _: Resource, _: Mode, _: Mode) -> BoxFuture<()> {
        self.purged.fetch_add(1, SeqCst);
        Box::pin(async {})
    }

    fn flush(&self, _: Resource, _: Mode, _: Mode) -> BoxFuture<Result<(), CalloutError>> {
        self.flushed.fetch_add(1, SeqCst);
        let result = if self.fails { Err(CalloutError("the disk is gone".into())) } else { Ok(()) };
        Box::pin(async move { result })
    }

    fn acquired(&self, res: Resource, mode: Mode) {
        let lcl = self.lcl.get().expect("the test sets it");
        assert!(
            lcl.try_cached(res, mode, Scope::Server).is_none(),
            "nobody is in before the client has heard"
        );
        self.acquired.fetch_add(1, SeqCst);
    }
}

#[test]
fn a_lock_stays_cached_after_its_last_user() {
    let (_, lcl) = solo();
    let guard = lcl.try_cached(res(1), Mode::EX, Scope::Server).expect("granted here at once");
    drop(guard);
    assert_eq!(lcl.held(res(1)), Mode::EX);
    let guard = block_on(lcl.acquire(res(1), Mode::PR, Scope::Server)).unwrap();
    assert_eq!((guard.mode(), lcl.held(res(1))), (Mode::PR, Mode::EX));
    let stats = lcl.stats();
    assert_eq!((stats.grants_local, stats.cached_hits, stats.messages_sent), (1, 1, 0));
    lcl.assert_consistent();
}

#[test]
fn process_scope_excludes_local_users_and_server_scope_does_not() {
    let (_, lcl) = solo();
    let _writer = lcl.try_cached(res(1), Mode::EX, Scope::Process).unwrap();
    assert!(lcl.try_cached(res(1), Mode::PR, Scope::Process).is_none());
    assert!(block_on(lcl.try_acquire(res(1), Mode::PR, Scope::Process)).unwrap().is_none());
    assert!(lcl.try_cached(res(1), Mode::EX, Scope::Server).is_some());
    lcl.assert_consistent();
}

#[test]
fn a_waiting_writer_keeps_later_readers_out() {
    let (runtime, lcl) = solo();
    let reader = lcl.try_cached(res(1), Mode::PR, Scope::Process).unwrap();
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let spawn = |mode: Mode| {
        let (lcl, order) = (lcl.clone(), order.clone());
        runtime.spawn(Box::pin(async move {
            let guard: Guard = lcl.acquire(res(1), mode, Scope::Process).await.unwrap();
            order.lock().push(guard.mode());
        }));
        runtime.advance(Duration::from_millis(1));
    };
    spawn(Mode::EX);
    spawn(Mode::PR);
    assert!(order.lock().is_empty());
    drop(reader);
    runtime.advance(Duration::from_millis(1));
    assert_eq!(*order.lock(), [Mode::EX, Mode::PR]);
    lcl.assert_consistent();
}

#[test]
fn a_dropped_wait_leaves_no_trace() {
    let (runtime, lcl) = solo();
    let writer = lcl.try_cached(res(1), Mode::EX, Scope::Process).unwrap();
    {
        let mut wait = Box::pin(lcl.acquire(res(1), Mode::EX, Scope::Process));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(wait.as_mut().poll(&mut context).is_pending());
        assert_eq!(lcl.snapshot().cached[0].waiters.len(), 1);
    }
    assert!(lcl.snapshot().cached[0].waiters.is_empty());
    drop(writer);
    // Admitted, but dropped before it was polled again: the use has ended.
    {
        let writer = lcl.try_cached(res(1), Mode::EX, Scope::Process).unwrap();
        let mut wait = Box::pin(lcl.acquire(res(1), Mode::EX, Scope::Process));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(wait.as_mut().poll(&mut context).is_pending());
        drop(writer);
    }
    assert!(lcl.try_cached(res(1), Mode::EX, Scope::Process).is_some());
    runtime.advance(Duration::from_millis(1));
    lcl.assert_consistent();
}

#[test]
fn release_all_runs_every_callout_once() {
    let (runtime, lcl) = solo();
    let calls = Arc::new(Counting { lcl: lcl.clone().into(), ..Counting::default() });
    lcl.set_callouts(KIND, calls.clone());
    for number in 0..300 {
        drop(lcl.try_cached(res(number), Mode::EX, Scope::Server).unwrap());
    }
    let handle = lcl.clone();
    assert_eq!(runtime.run(async move { handle.release_all().await }), Ok(()));
    let count = |n: &AtomicU32| n.load(SeqCst);
    assert_eq!((count(&calls.acquired), count(&calls.purged), count(&calls.flushed)), (300, 300, 300));
    assert_eq!(lcl.stats().cached, 0);
    assert!(lcl.snapshot().mastered.is_empty());
    lcl.assert_consistent();
}

#[test]
fn a_lock_whose_flush_fails_is_kept() {
    let (runtime, lcl) = solo();
    lcl.set_callouts(
        KIND,
        Arc::new(Counting { fails: true, lcl: lcl.clone().into(), ..Counting::default() }),
    );
    drop(lcl.try_cached(res(1), Mode::EX, Scope::Server).unwrap());
    let handle = lcl.clone();
    assert_eq!(runtime.run(async move { handle.release_all().await }), Err(ReleaseError::Kept(res(1))));
    assert_eq!(lcl.held(res(1)), Mode::EX);
    assert!(lcl.try_cached(res(1), Mode::EX, Scope::Server).is_some());
}

#[test]
fn trim_gives_back_the_least_recently_used() {
    let (runtime, lcl) = solo();
    let kept = lcl.try_cached(res(0), Mode::PR, Scope::Server).unwrap();
    for number in 1..1000 {
        drop(lcl.try_cached(res(number), Mode::PR, Scope::Server).unwrap());
    }
    let handle = lcl.clone();
    runtime.run(async move { handle.trim(160).await });
    let left = lcl.stats().cached;
    assert!((100..=200).contains(&left), "{left} left");
    assert_eq!(lcl.held(res(0)), Mode::PR, "what is in use stays");
    assert_eq!(lcl.held(res(999)), Mode::PR, "the last used stays");
    drop(kept);
    lcl.assert_consistent();
}

#[test]
fn a_cache_past_its_limit_trims_itself() {
    let runtime = SimRuntime::new(7);
    let config = Config { max_cached: 320, ..Config::default() };
    let epoch = Arc::new(dlm::Epoch::solo(storage_control::NodeId(4), storage_control::Incarnation(9)));
    struct Nobody;
    impl lcl::Wire for Nobody {
        fn send(&self, _: storage_control::NodeId, _: lcl::Message) {
            unreachable!("nobody is there");
        }
    }
    let lcl = Lcl::new(
        storage_control::NodeId(4),
        storage_control::Incarnation(9),
        Arc::new(runtime.clone()),
        Arc::new(Nobody),
        config,
    );
    lcl.install_epoch(&epoch);
    for number in 0..5000 {
        drop(lcl.try_cached(res(number), Mode::PR, Scope::Server).unwrap());
        if number % 50 == 0 {
            runtime.advance(Duration::from_millis(1));
        }
    }
    runtime.advance(Duration::from_millis(1));
    assert!(lcl.stats().cached <= 400, "{}", lcl.stats().cached);
    lcl.assert_consistent();
}

#[test]
fn close_ends_every_wait() {
    let (runtime, lcl) = solo();
    let writer = lcl.try_cached(res(1), Mode::EX, Scope::Process).unwrap();
    let handle = lcl.clone();
    let closer = lcl.clone();
    runtime.spawn(Box::pin(async move { closer.close("lease lost") }));
    let ended =
        runtime.run(async move { handle.acquire(res(1), Mode::EX, Scope::Process).await.map(|_| ()) });
    assert_eq!(ended, Err(LockError::Closed));
    assert!(lcl.try_cached(res(2), Mode::EX, Scope::Process).is_none());
    assert_eq!(lcl.closed(), Some("lease lost"));
    drop(writer);
    lcl.assert_consistent();
}

#[test]
fn a_written_value_is_seen_by_later_users() {
    let (_, lcl) = solo();
    let guard = lcl.try_cached(res(1), Mode::EX, Scope::Server).unwrap();
    assert_eq!(guard.value(), None);
    guard.set_value(ValueBlock([7; 64]));
    drop(guard);
    let guard = lcl.try_cached(res(1), Mode::PR, Scope::Server).unwrap();
    assert_eq!(guard.value(), Some(ValueBlock([7; 64])));
}

#[test]
fn threads_exclude_each_other_in_process_scope() {
    let lcl = Lcl::solo(Arc::new(TestRuntime::new()));
    let inside = Arc::new(AtomicU32::new(0));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (lcl, inside) = (lcl.clone(), inside.clone());
            std::thread::spawn(move || {
                for turn in 0..2000 {
                    let guard = block_on(lcl.acquire(res(turn % 3), Mode::EX, Scope::Process)).unwrap();
                    if turn % 3 == 0 {
                        assert_eq!(inside.fetch_add(1, SeqCst), 0);
                        inside.fetch_sub(1, SeqCst);
                    }
                    drop(guard);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    lcl.assert_consistent();
}

/// `cargo test --release -p lcl --test solo -- --ignored --nocapture fast_path`
#[test]
#[ignore = "a measurement"]
fn fast_path() {
    let lcl = Lcl::solo(Arc::new(TestRuntime::new()));
    let time = |what: &str, turns: u32, f: &dyn Fn(u64)| {
        let start = std::time::Instant::now();
        (0..u64::from(turns)).for_each(f);
        println!("{what}: {:?} each", start.elapsed() / turns);
    };
    let runtime = TestRuntime::new();
    time("the clock", 1_000_000, &|_| {
        std::hint::black_box(runtime.now());
    });
    time("cached lock and unlock", 1_000_000, &|_| drop(lcl.try_cached(res(1), Mode::PR, Scope::Process)));
    time("first local grant, small", 10_000, &|n| {
        drop(lcl.try_cached(res(n + 1_000_000), Mode::EX, Scope::Server))
    });
    time("first local grant", 200_000, &|n| drop(lcl.try_cached(res(n + 10), Mode::EX, Scope::Server)));
    time("one of many cached", 200_000, &|n| drop(lcl.try_cached(res(n + 10), Mode::EX, Scope::Server)));
}
