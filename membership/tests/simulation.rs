//! Thousands of short lives of a matrix, each under its own seed.
//!
//! `SEEDS=10000 cargo test -p membership --release --test simulation` runs more; `SEED=7` runs one.

mod sim;

use sim::{Scenario, World};

fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    match (number("SEED"), number("SEEDS")) {
        (Some(one), _) => one..one + 1,
        (None, Some(count)) => 0..count,
        (None, None) => 0..25,
    }
}

fn live(nodes: u16, proofs: bool, slow_fences: bool) {
    for seed in seeds() {
        World::new(Scenario { seed, nodes, proofs, slow_fences, trouble_secs: 60 }).run();
    }
}

/// All is quiet, and then the two that are not the ADM lose their connection for a moment.
#[test]
fn a_connection_without_the_adm_that_broke_brings_a_new_view() {
    for seed in seeds() {
        World::new(Scenario { seed, nodes: 3, proofs: true, slow_fences: false, trouble_secs: 0 }).run();
    }
}

#[test]
fn three_nodes_on_one_host_survive_any_trouble() {
    live(3, true, false);
}

#[test]
fn three_nodes_with_leases_alone_survive_any_trouble() {
    live(3, false, false);
}

#[test]
fn five_nodes_with_slow_and_failing_fences_survive_any_trouble() {
    live(5, false, true);
}

#[test]
fn two_nodes_survive_any_trouble() {
    live(2, false, false);
}
