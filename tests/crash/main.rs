//! Crash replay: nothing that was stable is ever lost, and nothing comes out that nobody put in.
//!
//! Workloads run on a disk that records every request. The power is cut at every moment of the record, in every
//! way that a disk may take it; each state is recovered by another node, checked and compared with what the user had
//! done. `tests/README.md` says how to run it and what it showed.

#![allow(unreachable_pub, reason = "the modules are this program's only")]

mod check;
mod history;
mod image;
mod late;
mod lives;
mod oracle;
#[path = "../common/random.rs"]
#[allow(dead_code, missing_docs, reason = "other tests use the rest")]
mod random;
mod record;
mod replay;
#[path = "../../mfs/tests/support/mod.rs"]
#[allow(missing_docs, reason = "it is a module of tests")]
mod support;
mod sweep;
mod user;
mod workload;
mod world;

use std::process::ExitCode;
use std::time::Instant;

use sweep::{Settings, Sweep};

/// States in a debug build, which is slow.
const STATES_DEBUG: u64 = 2000;
const STATES: u64 = 40_000;

fn main() -> ExitCode {
    // As the test of a workspace it is given filters that are others'.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    if std::env::args().any(|argument| argument == "--list") || !arguments.all(|a| "crash".contains(&*a)) {
        return ExitCode::SUCCESS;
    }
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let states = if cfg!(debug_assertions) { STATES_DEBUG } else { STATES };
    let settings = Settings {
        states: number("MATRIX_CRASH_STATES").unwrap_or(states),
        seed: number("SEED").unwrap_or(1),
        threads: number("MATRIX_CRASH_THREADS").map(|n| n as usize),
        case: std::env::var("MATRIX_CRASH_CASE").ok(),
    };
    let began = Instant::now();
    let sweep = Sweep::new(settings);
    sweep.run();
    sweep.report(began.elapsed())
}
