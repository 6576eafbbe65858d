//! Several nodes share one filesystem: whatever one has done, every other sees, also through its kernel's caches.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use mfs::ops::{Operations, RenameFlags, SetAttr};
use parking_lot::Mutex;
use proptest::prelude::*;
use storage_control::{Incarnation, NodeId, Runtime};
use support::cluster::{Cluster, Node};
use support::model::{Model, Op, op};
use tokio::sync::Semaphore;

use support::{Bed, ME, Short, errno, on_nodes, pattern, run_with_journals, seeds};

fn on_three_nodes<F: Future<Output = ()> + Send + 'static>(
    seed: u64,
    test: impl FnOnce(Bed, Cluster, Vec<Node>) -> F + Send + 'static,
) {
    on_nodes(seed, 3, test);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// One operation after the other, each on a node drawn by lot; now and then that node leaves and comes back.
    #[test]
    fn three_nodes_agree_with_the_model(ops in proptest::collection::vec((op(), 0..3_usize), 1..150), seed in any::<u64>()) {
        on_three_nodes(seed, move |bed, cluster, mut nodes| async move {
            let mut model = Model::new(nodes[0].fs.root());
            for (op, node) in &ops {
                match op {
                    Op::Wait { secs } => bed.sleep((*secs).into()).await,
                    // The node leaves and comes back: what it mastered moves to the others and back.
                    Op::Remount => {
                        let Node { id, incarnation, .. } = nodes[*node];
                        cluster.leave(nodes.remove(*node)).await;
                        nodes.insert(*node, cluster.join(id, Incarnation(incarnation.0 + 1)).await);
                    }
                    _ => model.apply(&nodes[*node].fs, op).await,
                }
            }
            for node in &nodes {
                model.compare(&node.fs).await;
            }
            cluster.stop(nodes).await;
        });
    }
}

#[test]
fn a_read_after_a_write_sees_it_through_every_cache() {
    for seed in seeds(1) {
        reads_see_writes(seed, false);
    }
}

/// Reads that are under way on every node when the lock goes hold nobody up and leave nothing old behind.
#[test]
fn a_read_after_a_write_sees_it_while_others_read() {
    for seed in seeds(4) {
        reads_see_writes(seed, true);
    }
}

fn reads_see_writes(seed: u64, others_read: bool) {
    on_three_nodes(seed, move |bed, cluster, nodes| async move {
        let (file, handle) = nodes[0].fs.file(nodes[0].fs.root(), "f").await;
        let ino = file.ino;
        let mut readers = Vec::new();
        for node in &nodes {
            readers.push(node.fs.open(ino, libc::O_RDONLY).await.unwrap().handle);
        }
        let mut writers = vec![handle];
        for node in &nodes[1..] {
            writers.push(node.fs.open(ino, libc::O_WRONLY).await.unwrap().handle);
        }
        // The one that made it has it open for both: its reads take the lock exclusively.
        nodes[0].fs.release(handle).await.unwrap();
        writers[0] = nodes[0].fs.open(ino, libc::O_WRONLY).await.unwrap().handle;
        let nodes: Vec<Arc<Node>> = nodes.into_iter().map(Arc::new).collect();
        let stop = Arc::new(AtomicBool::new(!others_read));
        let ended = Arc::new(Semaphore::new(0));
        for (node, handle) in nodes.iter().cloned().zip(readers.clone()) {
            let (stop, ended, runtime) = (stop.clone(), ended.clone(), bed.runtime.clone());
            bed.runtime.spawn(Box::pin(async move {
                while !stop.load(SeqCst) {
                    node.read(ino, handle).await.unwrap();
                    runtime.sleep(Duration::from_micros(runtime.random() % 500)).await;
                }
                ended.add_permits(1);
            }));
        }
        let mut content = Vec::new();
        for round in 0..300_usize {
            let (a, b) = (round % 3, (round + 1) % 3);
            let offset = (round * 37) % 9000;
            let data = pattern(round as u64, 1 + (round * 13) % 3000);
            // Everybody has it cached.
            for (node, handle) in nodes.iter().zip(&readers) {
                assert!(node.read(ino, *handle).await.unwrap() == content, "round {round}");
            }
            if round % 10 == 9 {
                content.resize(offset, 0);
                let set = SetAttr { size: Some(offset as u64), ..SetAttr::default() };
                nodes[a].change(ino, nodes[a].fs.setattr(ino, set)).await.unwrap();
            } else {
                nodes[a].change(ino, nodes[a].fs.put(writers[a], offset as u64, &data)).await.unwrap();
                if content.len() < offset + data.len() {
                    content.resize(offset + data.len(), 0);
                }
                content[offset..offset + data.len()].copy_from_slice(&data);
            }
            assert_eq!(nodes[b].stat(ino).await.unwrap().size, content.len() as u64, "round {round}");
            assert!(nodes[b].read(ino, readers[b]).await.unwrap() == content, "round {round}");
            let (one, two) =
                (nodes[a].fs.getattr(ino).await.unwrap(), nodes[b].fs.getattr(ino).await.unwrap());
            assert_eq!((one.attr.mtime, one.attr.ctime), (two.attr.mtime, two.attr.ctime));
        }
        stop.store(true, SeqCst);
        let _all = ended.acquire_many(3).await.unwrap();
        let nodes = nodes.into_iter().map(|n| Arc::try_unwrap(n).ok().expect("the readers ended")).collect();
        cluster.stop(nodes).await;
    });
}

#[test]
fn no_appended_record_is_lost_or_torn() {
    for seed in seeds(2) {
        append_records(seed);
    }
}

fn append_records(seed: u64) {
    const RECORDS: usize = 200;
    on_three_nodes(seed, |bed, cluster, nodes| async move {
        let (file, handle) = nodes[0].fs.file(nodes[0].fs.root(), "log").await;
        let done = Arc::new(Semaphore::new(0));
        for node in &nodes {
            let handle = match node.id {
                NodeId(0) => handle,
                _ => node.fs.open(file.ino, libc::O_WRONLY | libc::O_APPEND).await.unwrap().handle,
            };
            let (fs, id, done) = (node.fs.clone(), node.id.0 as u8, done.clone());
            bed.runtime.spawn(Box::pin(async move {
                for i in 0..RECORDS {
                    let mut record = vec![id; 100];
                    record[1..9].copy_from_slice(&i.to_le_bytes());
                    assert_eq!(fs.append(handle, &record).await.unwrap(), 100);
                }
                done.add_permits(1);
            }));
        }
        let _all = done.acquire_many(3).await.unwrap();
        let log = nodes[1].fs.whole(file.ino).await;
        assert_eq!(log.len(), 3 * RECORDS * 100);
        let mut next = [0_usize; 3];
        for record in log.chunks(100) {
            let id = record[0] as usize;
            assert_eq!(record[1..9], next[id].to_le_bytes());
            assert!(record[9..].iter().all(|b| *b == id as u8));
            next[id] += 1;
        }
        cluster.stop(nodes).await;
    });
}

#[test]
fn of_all_who_make_a_name_at_once_one_succeeds() {
    on_three_nodes(3, |bed, cluster, nodes| async move {
        let root = nodes[0].fs.root();
        let source = nodes[0].fs.file(root, "source").await.0.ino;
        for round in 0..60 {
            let name = format!("x{round}").into_bytes();
            let won = Arc::new(AtomicUsize::new(0));
            let done = Arc::new(Semaphore::new(0));
            for node in &nodes {
                let (fs, won, done, name) = (node.fs.clone(), won.clone(), done.clone(), name.clone());
                bed.runtime.spawn(Box::pin(async move {
                    let made = match round % 3 {
                        0 => fs.create(ME, root, &name, 0o644, libc::O_RDWR | libc::O_EXCL).await.map(drop),
                        1 => fs.mkdir(ME, root, &name, 0o755).await.map(drop),
                        _ => fs.link(source, root, &name).await.map(drop),
                    };
                    match made {
                        Ok(()) => {
                            won.fetch_add(1, SeqCst);
                        }
                        Err(error) => assert_eq!(error.errno(), libc::EEXIST),
                    }
                    done.add_permits(1);
                }));
            }
            let _all = done.acquire_many(3).await.unwrap();
            assert_eq!(won.load(SeqCst), 1, "round {round}");
        }
        cluster.stop(nodes).await;
    });
}

#[test]
fn a_file_removed_elsewhere_lives_until_it_is_closed_here() {
    on_three_nodes(4, |bed, cluster, nodes| async move {
        let root = nodes[0].fs.root();
        let (file, handle) = nodes[0].fs.file(root, "f").await;
        nodes[0].fs.put(handle, 0, &pattern(1, 50_000)).await.unwrap();
        let seen = nodes[1].fs.lookup(root, b"f").await.unwrap();
        nodes[1].fs.unlink(root, b"f").await.unwrap();
        assert_eq!(errno(nodes[2].fs.lookup(root, b"f").await), libc::ENOENT);
        bed.sleep(30).await;
        assert_eq!(nodes[0].fs.get(handle, 0, 100_000).await, pattern(1, 50_000));
        nodes[0].fs.put(handle, 50_000, &pattern(2, 50_000)).await.unwrap();
        nodes[0].fs.fsync(handle, false).await.unwrap();
        assert_eq!(nodes[0].fs.get(handle, 50_000, 100_000).await, pattern(2, 50_000));
        nodes[0].fs.release(handle).await.unwrap();
        bed.sleep(1).await;
        assert_eq!(errno(nodes[1].fs.getattr(seen.ino).await), libc::ESTALE);
        assert_eq!(errno(nodes[2].fs.open(file.ino, libc::O_RDONLY).await), libc::ESTALE);
        cluster.stop(nodes).await;
    });
}

/// Renames of directories into each other from several nodes never make a loop.
#[test]
fn concurrent_renames_of_directories_keep_a_tree() {
    for seed in seeds(4) {
        rename_directories(seed);
    }
}

fn rename_directories(seed: u64) {
    on_three_nodes(seed, |bed, cluster, nodes| async move {
        let root = nodes[0].fs.root();
        let mut dirs = vec![root];
        for i in 0..6 {
            dirs.push(nodes[0].fs.dir(root, &format!("d{i}")).await);
        }
        let done = Arc::new(Semaphore::new(0));
        for node in &nodes {
            let (fs, dirs, done, runtime) =
                (node.fs.clone(), dirs.clone(), done.clone(), bed.runtime.clone());
            bed.runtime.spawn(Box::pin(async move {
                for _ in 0..100 {
                    let draw = || runtime.random() as usize;
                    let (from, to) = (dirs[draw() % 7], dirs[draw() % 7]);
                    let (name, new_name) = (format!("d{}", draw() % 6), format!("d{}", draw() % 6));
                    let flags = RenameFlags { no_replace: false, exchange: draw() % 4 == 0 };
                    // Most are refused for one reason or another.
                    let _ = fs.rename(from, name.as_bytes(), to, new_name.as_bytes(), flags).await;
                }
                done.add_permits(1);
            }));
        }
        let _all = done.acquire_many(3).await.unwrap();
        cluster.stop(nodes).await;
    });
}

#[test]
fn a_dead_nodes_files_are_taken_over_by_the_survivors() {
    for seed in 10..18 {
        on_three_nodes(seed, move |bed, cluster, mut nodes| async move {
            let root = nodes[0].fs.root();
            let (synced, handle) = nodes[2].fs.file(root, "synced").await;
            nodes[2].fs.put(handle, 0, &pattern(1, 100_000)).await.unwrap();
            nodes[2].fs.fsync(handle, false).await.unwrap();
            nodes[2].fs.put(handle, 100_000, &pattern(2, 1000)).await.unwrap();
            let (gone, held) = nodes[2].fs.file(root, "gone").await;
            nodes[2].fs.put(held, 0, &pattern(3, 30_000)).await.unwrap();
            nodes[2].fs.fsync(held, false).await.unwrap();
            nodes[2].fs.unlink(root, b"gone").await.unwrap();
            nodes[2].fs.store().commit().await.unwrap();
            let own = nodes[0].fs.dir(root, "own").await;
            let dead = nodes.remove(2);
            cluster.kill(&dead);
            // Where the dead node had nothing, life goes on.
            nodes[0].fs.file(own, "meanwhile").await;
            let waiting = Arc::new(Semaphore::new(0));
            let (fs, signal) = (nodes[1].fs.clone(), waiting.clone());
            bed.runtime.spawn(Box::pin(async move {
                let content = fs.whole(synced.ino).await;
                assert_eq!(content[..100_000], pattern(1, 100_000));
                signal.add_permits(1);
            }));
            bed.sleep(3).await;
            assert_eq!(waiting.available_permits(), 0, "its locks wait for its recovery");
            cluster.recover(&dead, &nodes[0]).await;
            let _read = waiting.acquire().await.unwrap();
            bed.sleep(10).await;
            assert_eq!(errno(nodes[1].fs.getattr(gone.ino).await), libc::ESTALE);
            // It comes back.
            nodes.push(cluster.join(NodeId(2), Incarnation(2)).await);
            assert_eq!(nodes[2].fs.whole(synced.ino).await[..100_000], pattern(1, 100_000));
            drop(dead);
            cluster.stop(nodes).await;
        });
    }
}

const MIB: usize = 1 << 20;
/// Files that each node keeps beside the one it writes.
const KEPT: usize = 15;

#[test]
fn nodes_that_fill_the_filesystem_never_wait_for_each_other_forever() {
    for seed in seeds(3) {
        fill_and_empty(seed);
    }
}

/// Each node writes its own files until there is no space, makes some, goes on; then it removes them all and fills
/// the filesystem again.
fn fill_and_empty(seed: u64) {
    on_three_nodes(seed, move |bed, cluster, nodes| async move {
        let ended = Arc::new(AtomicUsize::new(0));
        let full = Arc::new(AtomicUsize::new(0));
        let kept = Arc::new(Mutex::new(Vec::new()));
        for node in &nodes {
            let fill = Fill {
                fs: node.fs.clone(),
                dir: nodes[0].fs.dir(nodes[0].fs.root(), &format!("own{}", node.id.0)).await,
                runtime: bed.runtime.clone(),
                full: full.clone(),
            };
            let (ended, kept) = (ended.clone(), kept.clone());
            bed.runtime.spawn(Box::pin(async move {
                let files = fill.rounds().await;
                kept.lock().extend(files.into_iter().map(|(name, seed, len)| (fill.dir, name, seed, len)));
                ended.fetch_add(1, SeqCst);
            }));
        }
        for _ in 0..3600 {
            if ended.load(SeqCst) == nodes.len() {
                break;
            }
            bed.sleep(1).await;
        }
        assert_eq!(ended.load(SeqCst), nodes.len(), "seed {seed}: the others hang");
        assert!(full.load(SeqCst) > 0, "the filesystem was never full");
        let kept = std::mem::take(&mut *kept.lock());
        assert!(!kept.is_empty(), "nothing was ever synced");
        for (dir, name, seed, len) in kept {
            for node in &nodes {
                let file = node.fs.lookup(dir, name.as_bytes()).await.unwrap();
                assert!(node.fs.whole(file.ino).await == pattern(seed, len), "file {name}");
            }
        }
        cluster.stop(nodes).await;
    });
}

struct Fill {
    fs: Arc<mfs::Filesystem>,
    dir: mfs::ops::Ino,
    runtime: storage_control::SimRuntime,
    full: Arc<AtomicUsize>,
}

impl Fill {
    /// What is left in the end: names of files that were synced, with the seed of their pattern and their length.
    async fn rounds(&self) -> Vec<(String, u64, usize)> {
        let mut synced = Vec::new();
        for round in 0..2 {
            let mut names = std::collections::VecDeque::new();
            synced.clear();
            for turn in 0..40 {
                let name = format!("{round}-{turn}");
                let len = (1 + self.runtime.random() as usize % 5) * MIB;
                match self.fill(&name, turn, len).await {
                    Ok(true) => synced.push((name.clone(), turn, len)),
                    Ok(false) => {}
                    Err(error) => {
                        assert_eq!(error.errno(), libc::ENOSPC);
                        self.full.fetch_add(1, SeqCst);
                    }
                }
                names.push_back(name);
                while names.len() > KEPT {
                    let old = names.pop_front().unwrap();
                    self.remove(&old).await;
                    synced.retain(|(name, ..)| *name != old);
                }
            }
            if round == 0 {
                for name in names {
                    self.remove(&name).await;
                }
            }
        }
        synced
    }

    /// Writes a file; whether it was synced.
    async fn fill(&self, name: &str, turn: u64, len: usize) -> Result<bool, mfs::FsError> {
        let flags = libc::O_RDWR | libc::O_EXCL;
        let (_, opened) = self.fs.create(ME, self.dir, name.as_bytes(), 0o644, flags).await?;
        let (handle, data) = (opened.handle, pattern(turn, len));
        let mut result = Ok(false);
        for (i, piece) in data.chunks(MIB / 4).enumerate() {
            if let Err(error) = self.fs.put(handle, (i * MIB / 4) as u64, piece).await {
                result = Err(error);
                break;
            }
            self.runtime.sleep(Duration::from_micros(self.runtime.random() % 20_000)).await;
        }
        if result.is_ok() && turn.is_multiple_of(3) {
            result = self.fs.fsync(handle, false).await.map(|()| true);
        }
        self.fs.release(handle).await.unwrap();
        result
    }

    async fn remove(&self, name: &str) {
        match self.fs.unlink(self.dir, name.as_bytes()).await {
            Ok(()) => {}
            // It was not even made.
            Err(error) => assert!([libc::ENOENT, libc::ENOSPC].contains(&error.errno()), "{error}"),
        }
    }
}

/// Found by the simulation (tests/sim, SEED=30): the ADM looked after the orphans of a journal that another node had just
/// taken into use, waited for its table until that node would unmount, and could not unmount itself before.
#[test]
fn who_adopts_orphans_does_not_wait_for_a_table_in_use() {
    run_with_journals(1, 16_384, 2, |bed| async move {
        let (cluster, nodes) = Cluster::start(&bed, 2).await;
        assert_eq!(nodes[0].fs.adopt(1).await.unwrap(), 0);
        let [first, second] = nodes.try_into().ok().expect("two nodes");
        cluster.leave(first).await;
        cluster.stop(vec![second]).await;
    });
}
