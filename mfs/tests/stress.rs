//! Random operations of several programs on every node in a few shared directories: no operation hangs or fails for
//! a reason that is not the others', no file holds what was not written to it, all nodes see one tree afterwards,
//! fsck finds no fault, and the disk alone brings the same tree back.
//!
//! The seed decides everything, interleaving included: `SEED=n` replays one, `MFS_SEEDS=n` tries so many.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use mfs::Filesystem;
use mfs::ops::{Attr, Handle, Ino, Operations, RenameFlags, Result, SetAttr, XattrSet};
use storage_control::{Runtime, SimRuntime, WallTime};
use support::cluster::Node;
use support::{Bed, ME, Short, on_nodes, seeds};

const PROGRAMS: usize = 2;
const OPERATIONS: usize = 300;
static DIRS: [&[&str]; 6] = [&["a"], &["b"], &["c"], &["a", "d"], &["b", "e"], &["c", "f"]];
/// No operation waits for a lock that long, of simulated time.
const HANGS_AFTER_SECS: u64 = 120;
/// What a program may be answered because of the others.
const EXPECTED: [i32; 9] = [
    libc::ENOENT,
    libc::EEXIST,
    libc::ENOTDIR,
    libc::EISDIR,
    libc::ENOTEMPTY,
    libc::EINVAL,
    libc::ENODATA,
    libc::EPERM,
    libc::ESTALE,
];

/// Contents are words that name the file they were written to: a word of another file is a foreign or stale block.
/// Every write and every size is a multiple of 8, so a word is whole or a zero of a hole.
fn word(file: &Attr) -> u64 {
    0xa5 << 56 | (file.generation & 0xffff) << 40 | file.ino.0
}

fn words(file: &Attr, len: usize) -> Vec<u8> {
    word(file).to_le_bytes().repeat(len / 8)
}

#[track_caller]
fn check(file: &Attr, content: &[u8]) {
    let found = content.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
    let foreign: Vec<u64> = found.filter(|found| *found != 0 && *found != word(file)).collect();
    assert!(foreign.is_empty(), "{} holds {:x?}, which was not written to it", file.ino, &foreign[..1]);
}

/// One program on a node.
struct Program {
    fs: Arc<Filesystem>,
    runtime: SimRuntime,
    dirs: &'static [&'static [&'static str]],
    names: u64,
    open: Vec<(Attr, Handle)>,
}

impl Program {
    fn below(&self, n: u64) -> u64 {
        self.runtime.random() % n
    }

    fn pick<T: Copy>(&self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// A name for a file, or now and then where a directory was moved to.
    fn name(&self) -> Vec<u8> {
        format!("x{}", self.below(self.names)).into_bytes()
    }

    /// One of the directories as it is found now. The root is the only one that nobody can take away.
    async fn dir(&self) -> Result<Ino> {
        self.walk(self.pick(self.dirs)).await
    }

    async fn walk(&self, path: &[&str]) -> Result<Ino> {
        let mut at = self.fs.root();
        for name in path {
            at = self.look(at, name.as_bytes()).await?.ino;
        }
        Ok(at)
    }

    /// The kernel forgets what it looked up, sooner or later.
    async fn look(&self, dir: Ino, name: &[u8]) -> Result<Attr> {
        let found = self.fs.lookup(dir, name).await?;
        self.fs.forget(found.ino, 1);
        Ok(found)
    }

    /// Opens a file by name. It stays remembered while it is opened: the number stands for this file only.
    async fn open(&self, flags: i32) -> Result<(Attr, Handle)> {
        let found = self.fs.lookup(self.dir().await?, &self.name()).await?;
        let opened = match found.file_type() {
            libc::S_IFREG => self.fs.open(found.ino, flags).await,
            _ => Err(mfs::FsError::IsDir),
        };
        self.fs.forget(found.ino, 1);
        Ok((found, opened?.handle))
    }

    async fn close(&self, handle: Handle, result: Result<()>) -> Result<()> {
        self.fs.release(handle).await?;
        result
    }

    async fn step(&mut self) -> Result<()> {
        match self.below(100) {
            0..12 => self.create().await,
            12..22 => {
                let (file, handle) = self.open(libc::O_WRONLY).await?;
                let (at, len) = (self.below(12_500) * 8, self.pick(&[8, 4096, 10_000]));
                let result = self.fs.put(handle, at, &words(&file, len)).await.map(drop);
                self.close(handle, result).await
            }
            22..25 => {
                let (file, handle) = self.open(libc::O_WRONLY | libc::O_APPEND).await?;
                let result = self.fs.append(handle, &words(&file, 800)).await.map(drop);
                self.close(handle, result).await
            }
            25..35 => {
                let (from, to) = (self.dir().await?, self.dir().await?);
                let flags = RenameFlags { no_replace: false, exchange: self.below(5) == 0 };
                self.fs.rename(from, &self.name(), to, &self.name(), flags).await
            }
            35..43 => self.fs.unlink(self.dir().await?, &self.name()).await,
            43..48 => {
                let (from, to) = (self.dir().await?, self.dir().await?);
                let file = self.fs.lookup(from, &self.name()).await?;
                let result = self.fs.link(file.ino, to, &self.name()).await;
                self.fs.forget(file.ino, if result.is_ok() { 2 } else { 1 });
                result.map(drop)
            }
            48..52 => {
                let made = self.fs.mkdir(ME, self.dir().await?, &self.name(), 0o755).await?;
                self.fs.forget(made.ino, 1);
                Ok(())
            }
            52..56 => self.fs.rmdir(self.dir().await?, &self.name()).await,
            56..60 => {
                let (file, handle) = self.open(libc::O_RDWR).await?;
                let size = Some(self.pick(&[0, 8, 4104, 100_000, 1_000_000]));
                let set = SetAttr { size, ..SetAttr::default() };
                let result = self.fs.setattr(file.ino, set).await.map(drop);
                self.close(handle, result).await
            }
            60..62 => {
                let made = self.fs.symlink(ME, self.dir().await?, &self.name(), b"nowhere").await?;
                self.fs.forget(made.ino, 1);
                Ok(())
            }
            62..65 => self.list().await,
            65..68 => self.move_directory(true).await,
            68..70 => self.move_directory(false).await,
            70..73 => {
                let file = self.look(self.dir().await?, &self.name()).await?;
                let value = vec![7; self.pick(&[5, 500, 4000])];
                self.fs.setxattr(file.ino, b"user.a", &value, XattrSet::Any).await
            }
            73..74 => {
                let file = self.look(self.dir().await?, &self.name()).await?;
                self.fs.removexattr(file.ino, b"user.a").await
            }
            74..77 => self.hold().await,
            _ => {
                let (file, handle) = self.open(libc::O_RDONLY).await?;
                check(&file, &self.fs.get(handle, 0, 400_000).await);
                let result = if self.below(3) == 0 { self.fs.fsync(handle, false).await } else { Ok(()) };
                self.close(handle, result).await
            }
        }
    }

    /// Makes a file, or cuts the one that is there to nothing, and writes it.
    async fn create(&self) -> Result<()> {
        let (dir, name) = (self.dir().await?, self.name());
        let len = self.pick(&[0, 16, 3000, 5000, 70_000, 300_000]);
        let (file, handle) = match self.fs.create(ME, dir, &name, 0o644, libc::O_RDWR).await {
            Ok((file, opened)) => {
                self.fs.forget(file.ino, 1);
                (file, opened.handle)
            }
            Err(error) => return Err(error),
        };
        let cut = self.fs.setattr(file.ino, SetAttr { size: Some(0), ..SetAttr::default() }).await;
        let result = match cut {
            Ok(_) if len > 0 => self.fs.put(handle, 0, &words(&file, len)).await.map(drop),
            result => result.map(drop),
        };
        self.close(handle, result).await
    }

    /// Lists a directory with attributes.
    async fn list(&self) -> Result<()> {
        let handle = self.fs.opendir(self.dir().await?).await?;
        let (mut from, mut result) = (0, Ok(()));
        loop {
            match self.fs.readdirplus(handle, from, 5).await {
                Ok(part) if part.is_empty() => break,
                Ok(part) => {
                    from = part.last().expect("it is not empty").0.next;
                    for (entry, attr) in part.iter().filter(|(e, _)| e.name != b"." && e.name != b"..") {
                        assert_eq!((entry.ino, entry.file_type), (attr.ino, attr.file_type()));
                        self.fs.forget(attr.ino, 1);
                    }
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.fs.releasedir(handle).await?;
        result
    }

    /// Moves one of the shared directories below another name, or one back.
    async fn move_directory(&self, away: bool) -> Result<()> {
        let path = self.pick(self.dirs);
        let (last, above) = path.split_last().expect("no path is empty");
        let (above, other) = (self.walk(above).await?, self.dir().await?);
        let moved = format!("m{}", self.below(3)).into_bytes();
        match away {
            true => self.fs.rename(above, last.as_bytes(), other, &moved, RenameFlags::default()).await,
            false => self.fs.rename(other, &moved, above, last.as_bytes(), RenameFlags::default()).await,
        }
    }

    /// Keeps some files open, so that they are written and read after they lost their names.
    async fn hold(&mut self) -> Result<()> {
        if (self.open.len() as u64) < self.names / 3 {
            self.open.push(self.open(libc::O_RDWR).await?);
            return Ok(());
        }
        if self.open.is_empty() {
            return Ok(());
        }
        let (file, handle) = self.open.remove(0);
        let at = self.below(1000) * 8;
        self.fs.put(handle, at, &words(&file, 4096)).await?;
        let got = self.fs.read(handle, at / 4096 * 4096, 16_384).await?.to_vec();
        check(&file, &got);
        self.close(handle, Ok(())).await
    }

    /// All operations, then everything is closed. Ends early where the node is dead.
    async fn run(mut self, done: Arc<AtomicUsize>) {
        for n in 0..OPERATIONS {
            match self.step().await {
                Ok(()) => {}
                Err(error) if EXPECTED.contains(&error.errno()) => {}
                Err(_) if self.fs.getattr(self.fs.root()).await.is_err() => return,
                Err(error) => panic!("operation {n}: {error}"),
            }
            done.fetch_add(1, SeqCst);
            let pause = self.pick(&[0, 0, 100, 1000, 1000, 20_000]);
            self.runtime.sleep(Duration::from_micros(self.below(pause + 1))).await;
        }
        for (_, handle) in std::mem::take(&mut self.open) {
            let _ = self.fs.release(handle).await;
        }
    }
}

/// All there is to see of one entry, but for what looking changes.
#[derive(Debug, PartialEq)]
struct Entry {
    attr: Attr,
    content: Vec<u8>,
    xattr: Option<Vec<u8>>,
}

async fn tree(fs: &Filesystem) -> BTreeMap<String, Entry> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![(fs.root(), String::new())];
    while let Some((dir, path)) = dirs.pop() {
        for name in fs.names(dir).await {
            if name == "." || name == ".." {
                continue;
            }
            let at = format!("{path}/{name}");
            let ino = fs.lookup(dir, name.as_bytes()).await.unwrap_or_else(|e| panic!("{at}: {e}")).ino;
            let attr = fs.getattr(ino).await.unwrap().attr;
            let content = match attr.file_type() {
                libc::S_IFDIR => {
                    dirs.push((ino, at.clone()));
                    Vec::new()
                }
                libc::S_IFLNK => fs.readlink(ino).await.unwrap(),
                _ => fs.whole(ino).await,
            };
            if attr.file_type() == libc::S_IFREG {
                check(&attr, &content);
            }
            let xattr = fs.getxattr(ino, b"user.a").await.ok();
            fs.forget(ino, 1);
            let never = WallTime { secs: 0, nanos: 0 };
            found.insert(at, Entry { attr: Attr { atime: never, blocks_512: 0, ..attr }, content, xattr });
        }
    }
    found
}

#[track_caller]
fn assert_same(one: &BTreeMap<String, Entry>, other: &BTreeMap<String, Entry>, who: &str) {
    for (path, entry) in one {
        let theirs = other.get(path);
        let shown = |e: &Entry| (e.attr, e.content.len(), e.xattr.as_ref().map(Vec::len));
        assert!(theirs == Some(entry), "{who}: {path}: {:?}, not {:?}", theirs.map(shown), shown(entry));
    }
    assert_eq!(one.len(), other.len(), "{who} has more entries");
}

/// Starts the programs of all nodes, spread over all directories or crowded in one or two; how many operations each has done.
async fn start(bed: &Bed, nodes: &[Node], seed: u64) -> Vec<Vec<Arc<AtomicUsize>>> {
    let (dirs, names) = [(&DIRS[..], 12), (&DIRS[..2], 3), (&DIRS[..1], 2)][seed as usize % 3];
    let root = nodes[0].fs.root();
    for (above, below) in [("a", "d"), ("b", "e"), ("c", "f")] {
        let dir = nodes[0].fs.dir(root, above).await;
        nodes[0].fs.forget(dir, 1);
        let dir = nodes[0].fs.dir(dir, below).await;
        nodes[0].fs.forget(dir, 1);
    }
    let mut all = Vec::new();
    for node in nodes {
        let mut done = Vec::new();
        for _ in 0..PROGRAMS {
            let counter = Arc::new(AtomicUsize::new(0));
            let program =
                Program { fs: node.fs.clone(), runtime: bed.runtime.clone(), dirs, names, open: Vec::new() };
            bed.runtime.spawn(Box::pin(program.run(counter.clone())));
            done.push(counter);
        }
        all.push(done);
    }
    all
}

/// Waits until these have done so many operations each.
async fn wait(bed: &Bed, nodes: &[Node], done: &[Vec<Arc<AtomicUsize>>], operations: usize) {
    let counts = || done.iter().flatten().map(|d| d.load(SeqCst)).collect::<Vec<_>>();
    let (mut seen, mut quiet) = (counts(), 0);
    while counts().iter().any(|n| *n < operations) {
        bed.sleep(1).await;
        quiet = if counts() == seen { quiet + 1 } else { 0 };
        seen = counts();
        if quiet >= HANGS_AFTER_SECS {
            for node in nodes {
                println!("--- {:?}\n{:?}", node.id, node.lcl.snapshot());
            }
            panic!("operations hang: {seen:?} are done");
        }
    }
}

/// All nodes see one tree, and so does who has nothing but the disk.
async fn compare(bed: &Bed, cluster: support::cluster::Cluster, nodes: Vec<Node>) {
    let one = tree(&nodes[0].fs).await;
    assert!(!one.is_empty(), "something is left to compare");
    for node in &nodes[1..] {
        assert_same(&one, &tree(&node.fs).await, &format!("{:?}", node.id));
    }
    for node in &nodes {
        assert!(node.fs.store().failed().is_none());
    }
    cluster.stop(nodes).await;
    let fs = bed.mount().await;
    assert_same(&one, &tree(&fs).await, "the disk");
    bed.unmount_and_check(fs).await;
}

fn header(test: &str, seed: u64) {
    println!("SEED={seed} cargo test --release -p mfs --test stress {test}");
}

#[test]
fn random_operations_of_all_nodes_leave_one_tree_and_no_fault() {
    for seed in seeds(30) {
        header("random_operations", seed);
        on_nodes(seed, 3, move |bed, cluster, nodes| async move {
            let done = start(&bed, &nodes, seed).await;
            wait(&bed, &nodes, &done, OPERATIONS).await;
            bed.sleep(1).await;
            compare(&bed, cluster, nodes).await;
        });
    }
}

/// One node dies somewhere in the middle and is recovered while the others go on.
#[test]
fn a_node_that_dies_among_random_operations_leaves_one_tree_and_no_fault() {
    for seed in seeds(30) {
        header("a_node_that_dies", seed);
        on_nodes(seed, 3, move |bed, cluster, mut nodes| async move {
            let mut done = start(&bed, &nodes, seed).await;
            wait(&bed, &nodes, &done, bed.runtime.random() as usize % (OPERATIONS - 20)).await;
            bed.runtime.sleep(Duration::from_micros(bed.runtime.random() % 1000)).await;
            let dead = nodes.remove(1);
            done.remove(1);
            cluster.kill(&dead);
            bed.runtime.sleep(Duration::from_millis(bed.runtime.random() % 2000)).await;
            cluster.recover(&dead, &nodes[0]).await;
            wait(&bed, &nodes, &done, OPERATIONS).await;
            bed.sleep(1).await;
            compare(&bed, cluster, nodes).await;
        });
    }
}
