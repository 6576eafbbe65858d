//! Hostile input: damaged images, messages and requests. See README.md in `tests` for sizes, seeds and figures.

mod images;
mod messages;
#[path = "../common/random.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)]
mod random;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use images::{Original, Outcome};

/// One case that takes longer hangs.
const HANGS_AFTER: Duration = Duration::from_secs(30);
/// What all cases together may use: an image is 64 MiB.
const MEMORY: u64 = 1 << 30;

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

/// Most memory that this process ever had, in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the peak is told");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") << 10
}

/// Runs `cases` from `seed` on; a case that panics or hangs is told by its seed.
fn each_case(test: &str, cases: u64, mut case: impl FnMut(u64)) {
    let first = number("SEED", 1);
    let cases = if std::env::var_os("SEED").is_some() { 1 } else { cases };
    // The case that runs and since when; nothing when all are done.
    let running = Arc::new(Mutex::new(Some((first, Instant::now()))));
    let (watched, name) = (Arc::clone(&running), test.to_string());
    std::thread::spawn(move || {
        loop {
            let case = *watched.lock().expect("no panic under the lock");
            let Some((seed, since)) = case else { break };
            if since.elapsed() > HANGS_AFTER {
                eprintln!("hangs: SEED={seed} cargo test --release --test fuzz {name}");
                std::process::abort();
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    for seed in first..first + cases {
        *running.lock().expect("no panic under the lock") = Some((seed, Instant::now()));
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| case(seed))) {
            *running.lock().expect("no panic under the lock") = None;
            eprintln!("fails: SEED={seed} cargo test --release --test fuzz {test}");
            resume_unwind(panic);
        }
        assert!(peak_memory() < MEMORY, "SEED={seed}: {} MiB used", peak_memory() >> 20);
    }
    *running.lock().expect("no panic under the lock") = None;
}

fn damaged_images(test: &str, crashed: bool) {
    let original = Original::make(crashed);
    assert_eq!(original.run_undamaged(), Outcome::Sound);
    let mut outcomes = BTreeMap::new();
    each_case(test, number("MATRIX_FUZZ_IMAGES", 2_500), |seed| {
        *outcomes.entry(original.run(seed)).or_insert(0_u64) += 1;
    });
    let images: u64 = outcomes.values().sum();
    println!("{images} images, {} kinds of metadata: {outcomes:?}, 0 violations", original.kinds());
}

#[test]
fn damaged_images_of_a_node_that_left_cause_errors_only() {
    damaged_images("damaged_images_of_a_node_that_left_cause_errors_only", false);
}

#[test]
fn damaged_images_of_a_node_that_died_cause_errors_only() {
    damaged_images("damaged_images_of_a_node_that_died_cause_errors_only", true);
}

fn hostile_messages(test: &str, what: &str, mut case: impl FnMut(u64) -> u64) {
    let messages = number("MATRIX_FUZZ_MESSAGES", 100_000);
    let (mut sent, mut refused) = (0, 0);
    each_case(test, messages.div_ceil(messages::MESSAGES), |seed| {
        refused += case(seed);
        sent += messages::MESSAGES;
    });
    println!("{sent} {what}, {refused} refused, 0 violations");
}

#[test]
fn hostile_lock_messages_cause_errors_only() {
    let test = "hostile_lock_messages_cause_errors_only";
    hostile_messages(test, "lock messages", messages::lock_messages);
}

#[test]
fn hostile_membership_messages_cause_errors_only() {
    let test = "hostile_membership_messages_cause_errors_only";
    hostile_messages(test, "membership messages", messages::membership_messages);
}

#[test]
fn hostile_bodies_and_headers_cause_errors_only() {
    let (test, body) = ("hostile_bodies_and_headers_cause_errors_only", messages::a_body());
    hostile_messages(test, "register bodies and headers", |seed| messages::bodies(seed, &body));
}
