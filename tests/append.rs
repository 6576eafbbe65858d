//! Appends from all nodes at once to one file: every record is there once, whole, in the order of its writer.

mod common;

use std::fs::OpenOptions;
use std::io::Write;

use common::Plan;

const NODES: usize = 3;
const RECORDS: usize = 2_000;
/// Not a divisor of a page, so that records cross page boundaries.
const LENGTH: usize = 97;

fn record(node: usize, number: usize) -> Vec<u8> {
    let mut line = format!("node {node} record {number:08} ").into_bytes();
    line.resize(LENGTH - 1, b'a' + node as u8);
    line.push(b'\n');
    line
}

#[test]
fn concurrent_appends_lose_and_tear_nothing() {
    let mut lab = Plan::nodes(NODES).start();
    std::fs::write(lab.path(0, "log"), b"").expect("create");
    std::thread::scope(|scope| {
        for node in 0..NODES {
            let log = lab.path(node, "log");
            scope.spawn(move || {
                let mut log = OpenOptions::new().append(true).open(log).expect("open");
                for number in 0..RECORDS {
                    log.write_all(&record(node, number)).expect("append");
                }
            });
        }
    });
    let all = std::fs::read(lab.path(0, "log")).expect("read");
    assert_eq!(all.len(), NODES * RECORDS * LENGTH);
    let mut next = [0; NODES];
    for line in all.chunks(LENGTH) {
        let node = usize::from(line[LENGTH - 2].wrapping_sub(b'a'));
        assert!(node < NODES, "torn: {:?}", String::from_utf8_lossy(line));
        assert_eq!(line, record(node, next[node]), "torn, lost or out of order");
        next[node] += 1;
    }
    for node in 1..NODES {
        assert!(
            std::fs::read(lab.path(node, "log")).expect("read") == all,
            "node {node} reads something else"
        );
    }
    lab.assert_clean();
}
