//! Connections between nodes are reset again and again under load: nobody is declared dead, no lock message is lost
//! for good, no program waits for ever, and what the nodes agreed on stays agreed (SMS-3, SMS-7).
//!
//! `SEED=n` and `MATRIX_TEST_RESETS=n` choose another run.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::load::{Load, assert_kept};
use common::random::Random;
use common::{Lab, Plan, number, text, wait_until};

const NODES: usize = 3;

/// Established connections of node `n`'s daemon, as `ss` names their two ends.
fn connections(lab: &Lab, n: usize) -> Vec<(String, String)> {
    let output = Command::new("ss").args(["-tnpHO", "state", "established"]).output().expect("ss (iproute2)");
    let owner = format!("pid={},", lab.pid(n));
    let found = text(&output);
    let ends = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words[2].to_string(), words[3].to_string())
    };
    found.lines().filter(|line| line.contains(&owner)).map(ends).collect()
}

fn reset((src, dst): &(String, String)) {
    common::succeed(
        Command::new("ss").args(["-KtnH", "src", src, "dst", dst]).output().expect("ss (iproute2)"),
    );
}

#[test]
fn reset_connections_lose_no_lock_and_no_member() {
    let (seed, resets) = (number("SEED", 1), number("MATRIX_TEST_RESETS", 12));
    let mut random = Random::new(seed);
    let mut lab = Plan::nodes(NODES).start();
    let before = lab.status(0)["generation"].as_u64().expect("a generation");
    // Each node in its own directory, and all in one that they take from each other.
    let mut loads: BTreeMap<String, Load> = BTreeMap::new();
    for n in 0..NODES {
        loads.insert(format!("own{n}"), Load::start(lab.path(n, &format!("own{n}"))));
    }
    fs::create_dir(lab.path(0, "shared")).expect("setup");
    let shared: Vec<_> = (0..NODES).map(|n| Appends::start(&lab, n)).collect();

    for round in 0..resets {
        let n = random.below(NODES as u64) as usize;
        let open = connections(&lab, n);
        assert!(!open.is_empty(), "round {round}: node {n} is connected");
        reset(random.pick(&open));
        std::thread::sleep(Duration::from_millis(5 + random.below(300)));
    }
    loads.values().for_each(|load| load.advance(50));
    wait_until("all are members and connected", common::SOON, || {
        (0..NODES).all(|n| {
            lab.status(n)["members"].as_array().map_or(0, Vec::len) == NODES
                && connections(&lab, n).len() >= NODES - 1
        })
    });
    let written: u64 = shared.into_iter().map(Appends::finish).sum();
    for (dir, load) in loads {
        let report = load.finish();
        assert!(report.error.is_none(), "{dir}: {:?}", report.error);
        println!("{dir}: longest operation {:?}", report.longest);
        for n in 0..NODES {
            assert_kept(&lab.path(n, &dir), &report.kept);
        }
    }
    // Every record of every node is in the one file that they took from each other.
    for n in 0..NODES {
        let lines = fs::read(lab.path(n, "shared/log")).expect("read");
        assert_eq!(lines.len() as u64, written * 8, "seed {seed}: node {n}");
    }
    let after = lab.status(0)["generation"].as_u64().expect("a generation");
    println!("{resets} resets, {} views, {written} shared writes", after - before);
    assert!(after > before, "a lost connection is a new view");
    lab.assert_clean();
}

/// Appends to a file that all nodes append to.
struct Appends {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Appends {
    fn start(lab: &Lab, n: usize) -> Appends {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, path) = (stop.clone(), lab.path(n, "shared/log"));
        let thread = std::thread::spawn(move || {
            let open = fs::OpenOptions::new().create(true).append(true).open(path);
            let mut log = open.expect("open the shared log");
            let mut written = 0;
            while !stopped.load(Ordering::Relaxed) {
                log.write_all(&[b'a' + n as u8; 8]).expect("append to the shared log");
                written += 1;
            }
            written
        });
        Appends { stop, thread }
    }

    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the shared log is written")
    }
}
