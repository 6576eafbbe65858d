//! Daemons killed with -9 under load: what was fsynced is there, the others go on, the dead come back.

mod common;

use std::time::{Duration, Instant};

use common::load::{Load, assert_kept};
use common::{Lab, Plan};

/// Rounds of killing one of three; the same with fifty rounds is run by hand (MATRIX_TEST_KILLS).
fn kills() -> usize {
    common::number("MATRIX_TEST_KILLS", 4) as usize
}

#[test]
fn survivors_go_on_when_one_node_is_killed() {
    let mut lab = Plan::nodes(3).start();
    let (mut longest, mut longest_wait) = (Duration::ZERO, Duration::ZERO);
    let (mut untouched, mut mounting) = (Duration::ZERO, Duration::ZERO);
    for round in 0..kills() {
        // The same load when nobody is killed, for comparison.
        let loads: Vec<Load> = (0..3).map(|n| Load::start(lab.path(n, &format!("b{round}n{n}")))).collect();
        loads.iter().for_each(|load| load.advance(100));
        untouched = loads.into_iter().map(|load| load.finish().longest).fold(untouched, Duration::max);

        let victim = round % 3;
        let loads: Vec<Load> = (0..3).map(|n| Load::start(lab.path(n, &format!("r{round}n{n}")))).collect();
        loads.iter().for_each(|load| load.advance(50));
        lab.kill9(victim);
        let survivors = (0..3).filter(|n| *n != victim);
        survivors.clone().for_each(|n| loads[n].advance(50));

        // What the dead node had locked is free again for whoever asks.
        let asked = Instant::now();
        let other = (victim + 1) % 3;
        std::fs::write(lab.path(other, &format!("r{round}n{victim}/after")), b"x")
            .expect("write in its directory");
        let waited = asked.elapsed();
        longest_wait = longest_wait.max(waited);
        assert!(
            waited < Duration::from_secs(3),
            "round {round}: waited {waited:?} for the dead node's locks"
        );

        for (n, load) in loads.into_iter().enumerate() {
            let report = load.finish();
            if n != victim {
                assert!(report.error.is_none(), "round {round}: survivor {n}: {:?}", report.error);
                longest = longest.max(report.longest);
                assert!(
                    report.longest < Duration::from_secs(3),
                    "round {round}: {n} paused {:?}",
                    report.longest
                );
            }
            assert_kept(&lab.path(other, &format!("r{round}n{n}")), &report.kept);
        }
        let mount = Instant::now();
        lab.mount(victim);
        mounting = mounting.max(mount.elapsed());
        assert_eq!(members(&lab, victim), 3, "round {round}");
    }
    println!("longest operation without a kill {untouched:?}, of a survivor {longest:?}");
    println!("longest wait for a dead node's lock {longest_wait:?}, longest mount after it {mounting:?}");
    lab.assert_clean();
}

#[test]
fn all_nodes_killed_at_once_lose_nothing_that_was_fsynced() {
    let mut lab = Plan::nodes(3).start();
    let loads: Vec<Load> = (0..3).map(|n| Load::start(lab.path(n, &format!("n{n}")))).collect();
    loads.iter().for_each(|load| load.advance(60));
    for n in 0..3 {
        common::signal(lab.pid(n), libc::SIGKILL);
    }
    for n in 0..3 {
        lab.kill9(n);
    }
    let reports: Vec<_> = loads.into_iter().map(Load::finish).collect();
    lab.mount(1);
    for (n, report) in reports.iter().enumerate() {
        assert!(!report.kept.is_empty());
        assert_kept(&lab.path(1, &format!("n{n}")), &report.kept);
    }
    lab.mount(0);
    lab.mount(2);
    assert_eq!(members(&lab, 0), 3);
    lab.assert_clean();
}

#[test]
fn a_dead_nodes_files_are_replayed_while_a_survivor_reads_them() {
    let mut lab = Plan::nodes(2).start();
    let load = Load::start(lab.path(0, "d"));
    load.advance(40);
    let report_dir = lab.path(1, "d");
    lab.kill9(0);
    let report = load.finish();
    assert_kept(&report_dir, &report.kept);
    lab.assert_clean();
}

#[test]
fn an_orphan_of_a_dead_node_gives_its_space_back() {
    let mut lab = Plan::nodes(2).size("64M").start();
    let most_of_the_space = vec![1u8; 36 << 20];
    let orphan = std::fs::File::create(lab.path(0, "o")).expect("create");
    std::io::Write::write_all(&mut &orphan, &most_of_the_space).expect("write");
    orphan.sync_all().expect("fsync");
    std::fs::remove_file(lab.path(0, "o")).expect("unlink while open");
    std::fs::File::open(lab.at(0)).and_then(|d| d.sync_all()).expect("fsync");
    lab.kill9(0);
    drop(orphan);
    common::wait_until("the orphan's space is free again", common::SOON, || {
        std::fs::write(lab.path(1, "new"), &most_of_the_space).is_ok()
    });
    lab.assert_clean();
}

fn members(lab: &Lab, n: usize) -> usize {
    lab.status(n)["members"].as_array().map_or(0, Vec::len)
}
