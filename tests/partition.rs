//! The network between one node and the others is cut while all still reach the disk: exactly one side goes on, the
//! other stops by itself, and can join again when the cut is healed. With each fencing method.

mod common;

use std::fs;
use std::time::Duration;

use common::load::{Load, assert_kept};
use common::{Plan, wait_until};

/// Lease, life of an accepted write, poll and replay, with room for a slow machine.
const DECIDED_WITHIN: Duration = Duration::from_secs(40);

fn cut_and_heal(options: &'static str) {
    let mut lab = Plan::nodes(3).options(options).with_namespaces().start();
    let loads: Vec<Load> = (0..3).map(|n| Load::start(lab.path(n, &format!("n{n}")))).collect();
    loads.iter().for_each(|load| load.advance(30));
    let cut = lab.pid(2);
    lab.namespaces().cut(2);

    wait_until("the cut node stops", DECIDED_WITHIN, || !common::alive(cut));
    wait_until("the others form a view of two", DECIDED_WITHIN, || {
        lab.status(0)["members"].as_array().is_some_and(|m| m.len() == 2)
    });
    loads[0].advance(30);
    loads[1].advance(30);
    let mut loads = loads.into_iter();
    let reports: Vec<_> = loads.by_ref().map(Load::finish).collect();
    assert!(reports[0].error.is_none() && reports[1].error.is_none(), "the larger side goes on: {reports:?}");
    assert!(reports[2].error.is_some(), "programs of the cut node get errors");
    for (n, report) in reports.iter().enumerate() {
        assert_kept(&lab.path(0, &format!("n{n}")), &report.kept);
    }

    lab.clear(2);
    lab.namespaces().heal(2);
    lab.mount(2);
    fs::write(lab.path(2, "after"), b"healed").expect("write");
    assert_eq!(fs::read(lab.path(0, "after")).expect("read"), b"healed");
    lab.assert_clean();
}

#[test]
fn one_side_of_a_cut_network_goes_on_with_the_same_host_proof() {
    cut_and_heal("");
}

#[test]
fn one_side_of_a_cut_network_goes_on_with_leases_only() {
    cut_and_heal("fence=lease,io_timeout=2");
}
