//! Several nodes fill the filesystem at once: what `write` accepted is on the device in the end, to the last byte.
//!
//! Found by a program on three real mounts (seeds 11 to 13 of its own): a group with promised blocks went to another
//! node while the data were on their way, and whole files became zeros although every `write`, `close` and `umount`
//! had succeeded. On the code before, the first seed of this test makes the nodes wait for each other's groups for ever.
//! `SEED=n` repeats one run.

mod support;

use std::sync::Arc;
use std::time::Duration;

use mfs::ops::Operations;
use parking_lot::Mutex;
use storage_control::Runtime;
use support::cluster::{Cluster, Node};
use support::{Bed, ME, is_no_space, pattern, run_with_journals};

const BLOCKS: u64 = 16_384;

/// Name and length of what was accepted.
type Accepted = Arc<Mutex<Vec<(String, usize)>>>;

/// Writes files until there is no space; each is synced and closed a little later.
async fn fill(seed: u64, bed: Bed, fs: Arc<mfs::Filesystem>, writer: String, accepted: Accepted) {
    let mut refused = 0;
    for n in 0.. {
        let name = format!("{writer}-{n}");
        let Ok((attr, opened)) =
            fs.create(ME, fs.root(), name.as_bytes(), 0o644, libc::O_RDWR).await.inspect_err(|error| {
                assert!(is_no_space(error), "{error}");
            })
        else {
            break;
        };
        let data = pattern(attr.ino.0, 300_000 + (bed.runtime.random() % 5) as usize * 100_000);
        let mut done = 0;
        for part in data.chunks(128 << 10) {
            let write = mfs::ops::Write {
                offset: done as u64,
                data: part.to_vec(),
                append: false,
                kill_suid: false,
                sync: false,
            };
            match fs.write(opened.handle, write).await {
                Ok(len) => done += len,
                Err(error) => {
                    assert!(is_no_space(&error), "{error}");
                    refused += 1;
                    break;
                }
            }
        }
        // Written back while the next is written, and while groups go.
        let (background, closing) = (bed.runtime.clone(), fs.clone());
        let delay = Duration::from_micros(bed.runtime.random() % 20_000);
        bed.runtime.spawn(Box::pin(async move {
            background.sleep(delay).await;
            closing.fsync(opened.handle, false).await.unwrap_or_else(|e| panic!("SEED={seed}: {e}"));
            closing.flush(opened.handle).await.expect("no loss is told at close");
            closing.release(opened.handle).await.unwrap();
        }));
        accepted.lock().push((name, done));
        if refused > 3 {
            break;
        }
    }
}

fn fill_from_all_nodes(seed: u64) {
    run_with_journals(seed, BLOCKS, 3, move |bed| async move {
        let (cluster, nodes) = Cluster::start(&bed, 3).await;
        let accepted = Accepted::default();
        let left = Arc::new(Mutex::new(12));
        for (n, node) in nodes.iter().enumerate() {
            for writer in 0..4 {
                let work =
                    fill(seed, bed.clone(), node.fs.clone(), format!("{n}-{writer}"), accepted.clone());
                let left = left.clone();
                bed.runtime.spawn(Box::pin(async move {
                    work.await;
                    *left.lock() -= 1;
                }));
            }
        }
        while *left.lock() > 0 {
            bed.sleep(1).await;
        }
        bed.sleep(1).await;
        // From another node than the writer, before anybody leaves.
        compare(seed, &nodes[1], &accepted).await;
        cluster.stop(nodes).await;
        let (cluster, nodes) = Cluster::start(&bed, 1).await;
        compare(seed, &nodes[0], &accepted).await;
        cluster.stop(nodes).await;
    });
}

async fn compare(seed: u64, node: &Node, accepted: &Accepted) {
    let accepted = accepted.lock().clone();
    assert!(accepted.iter().map(|(_, len)| len).sum::<usize>() > 30 << 20, "it was full");
    for (name, len) in accepted {
        let attr = node.fs.lookup(node.fs.root(), name.as_bytes()).await.unwrap();
        let opened = node.fs.open(attr.ino, libc::O_RDONLY).await.unwrap();
        let got = node.fs.read(opened.handle, 0, 1 << 20).await.unwrap().to_vec();
        node.fs.release(opened.handle).await.unwrap();
        assert_eq!(got.len(), len, "SEED={seed}: {name} was shortened");
        assert!(got == pattern(attr.ino.0, len), "SEED={seed}: {name} lost what was accepted");
    }
}

/// How many seeds; more by hand (`MFS_SEEDS=n`).
fn count() -> u64 {
    std::env::var("MFS_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(6)
}

#[test]
fn what_was_accepted_on_a_full_filesystem_is_not_lost() {
    match std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => fill_from_all_nodes(seed),
        None => (1..1 + count()).for_each(fill_from_all_nodes),
    }
}
