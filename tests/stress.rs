//! Random operations of several programs on every node in a few shared directories: whatever they do to each other,
//! no operation hangs or fails for a reason that is not theirs, all nodes see the same tree afterwards, no file holds
//! what was not written to it, and fsck finds no fault.
//!
//! The seed fixes what each program does, not how the programs interleave: run a seed several times.
//! `SEED=n` and `MATRIX_STRESS_OPS=n` (operations of each program) choose another run.

mod common;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::random::Random;
use common::{Lab, Plan, check, number, path};

const NODES: usize = 3;
const PROGRAMS: usize = 2;
const DIRS: [&str; 6] = ["a", "b", "c", "a/d", "b/e", "c/f"];
/// An operation that takes longer hangs: no lock is waited for that long.
const HANGS_AFTER: Duration = Duration::from_secs(60);
/// What a well-behaved filesystem may answer to programs that work against each other. ESTALE is the kernel's: a
/// path whose directory was moved while it was walked, and again while it was walked once more (mfs/SEMANTICS.md).
const EXPECTED: [i32; 9] = [
    libc::ENOENT,
    libc::EEXIST,
    libc::ENOTDIR,
    libc::EISDIR,
    libc::ENOTEMPTY,
    libc::EINVAL,
    libc::ENODATA,
    libc::ELOOP,
    libc::ESTALE,
];

/// Contents are words that name the file they were written to: a word of another file is a foreign or stale block.
/// Every write and every size is a multiple of 8, so a word is whole or a zero of a hole.
const MARK: u64 = 0xa5 << 56;

fn words(ino: u64, len: usize) -> Vec<u8> {
    (MARK | ino).to_le_bytes().repeat(len / 8)
}

fn foreign_word(ino: u64, content: &[u8]) -> Option<u64> {
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    content.chunks_exact(8).map(word).find(|w| *w != 0 && *w != MARK | ino)
}

/// One program: a node's view of the shared directories and a source of random choices.
struct Program {
    root: PathBuf,
    random: Random,
    open: Vec<File>,
}

impl Program {
    fn dir(&mut self) -> PathBuf {
        self.root.join(self.random.pick(&DIRS))
    }

    fn path(&mut self) -> PathBuf {
        let name = format!("x{}", self.random.below(12));
        self.dir().join(name)
    }

    fn moved(&mut self) -> PathBuf {
        let name = format!("m{}", self.random.below(3));
        self.dir().join(name)
    }

    fn put(&mut self, file: &File, at: u64, len: usize) -> io::Result<()> {
        file.write_all_at(&words(file.metadata()?.ino(), len), at)
    }

    fn step(&mut self) -> io::Result<()> {
        match self.random.below(100) {
            0..20 => {
                let file = File::create(self.path())?;
                let len = *self.random.pick(&[0, 16, 3000, 5000, 70_000, 300_000]);
                self.put(&file, 0, len)
            }
            20..30 => {
                let file = OpenOptions::new().write(true).open(self.path())?;
                let (at, len) = (self.random.below(12_500) * 8, *self.random.pick(&[8, 4096, 10_000]));
                self.put(&file, at, len)
            }
            30..33 => {
                let file = OpenOptions::new().append(true).open(self.path())?;
                self.put(&file, 0, 800)
            }
            33..46 => fs::rename(self.path(), self.path()),
            46..56 => fs::remove_file(self.path()),
            56..63 => match fs::hard_link(self.path(), self.path()) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(()), // of a directory
                result => result,
            },
            63..68 => fs::create_dir(self.path()),
            68..73 => fs::remove_dir(self.path()),
            73..77 => {
                let size = *self.random.pick(&[0, 8, 4104, 100_000, 1_000_000]);
                OpenOptions::new().write(true).open(self.path())?.set_len(size)
            }
            77..80 => symlink("nowhere", self.path()),
            80..83 => fs::read_dir(self.dir())?.try_for_each(|entry| entry.map(drop)),
            83..86 => fs::rename(self.dir(), self.moved()),
            86..88 => fs::rename(self.moved(), self.dir()),
            88..91 => {
                let value = vec![7; *self.random.pick(&[5, 500, 4000])];
                set_xattr(&self.path(), &value)
            }
            91..94 => self.hold(),
            _ => {
                let file = File::open(self.path())?;
                let meta = file.metadata()?;
                if meta.is_file() {
                    let mut content = vec![0; meta.len() as usize];
                    let got = file.read_at(&mut content, 0)?;
                    let foreign = foreign_word(meta.ino(), &content[..got / 8 * 8]);
                    assert_eq!(foreign, None, "inode {} holds what was not written to it", meta.ino());
                }
                if self.random.chance(30) { file.sync_all() } else { Ok(()) }
            }
        }
    }

    /// Keeps some files open, so that they are written and read after they lost their names.
    fn hold(&mut self) -> io::Result<()> {
        if self.open.len() < 4 {
            let path = self.path();
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            self.open.push(file);
            return Ok(());
        }
        let file = self.open.remove(0);
        let at = self.random.below(1000) * 8;
        self.put(&file, at, 4096)?;
        let mut got = vec![0; 4096];
        file.read_at(&mut got, at).map(drop)
    }
}

fn set_xattr(path: &Path, value: &[u8]) -> io::Result<()> {
    let file = File::open(path)?;
    let name = CString::new("user.a").expect("no zero inside");
    // SAFETY: name and value outlive the call, and the length is the value's.
    let result =
        unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    check(result).map(drop)
}

/// All there is to see of one entry. A directory's size is the filesystem's own affair.
#[derive(Debug, PartialEq)]
struct Entry {
    mode: u32,
    nlink: u64,
    size: u64,
    mtime: (i64, i64),
    ino: u64,
    content: Vec<u8>,
}

fn tree(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).expect("readdir") {
            let at = entry.expect("entry").path();
            let meta = fs::symlink_metadata(&at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
            let content = if meta.is_dir() {
                dirs.push(at.clone());
                Vec::new()
            } else if meta.is_symlink() {
                fs::read_link(&at).expect("readlink").into_os_string().into_encoded_bytes()
            } else {
                let content = fs::read(&at).expect("read");
                assert_eq!(foreign_word(meta.ino(), &content), None, "{}", at.display());
                content
            };
            let size = if meta.is_dir() { 0 } else { meta.len() };
            let name = at.strip_prefix(root).expect("below the root").to_path_buf();
            let (mode, nlink, ino) = (meta.mode(), meta.nlink(), meta.ino());
            let mtime = (meta.mtime(), meta.mtime_nsec());
            found.insert(name, Entry { mode, nlink, size, mtime, ino, content });
        }
    }
    found
}

/// Runs the programs to their end; none may hang.
fn run(lab: &Lab, seed: u64, operations: u64) {
    let done: Vec<AtomicU64> = (0..NODES * PROGRAMS).map(|_| AtomicU64::new(0)).collect();
    let failed = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..NODES * PROGRAMS)
            .map(|n| {
                let random = Random::new(seed * 100 + n as u64);
                let mut program = Program { root: lab.path(n % NODES, "shared"), random, open: Vec::new() };
                let done = &done[n];
                scope.spawn(move || -> Result<(), String> {
                    for number in 0..operations {
                        if let Err(e) = program.step()
                            && !e.raw_os_error().is_some_and(|code| EXPECTED.contains(&code))
                        {
                            return Err(format!("operation {number}: {e}"));
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let (mut seen, mut since) = (0, Instant::now());
        while !threads.iter().all(|t| t.is_finished()) {
            std::thread::sleep(Duration::from_millis(20));
            let now = done.iter().map(|d| d.load(Ordering::Relaxed)).sum();
            if now != seen {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() > HANGS_AFTER {
                for n in 0..NODES {
                    let locks = lab.matrix(&["locks", path(&lab.at(n)), "--waiting"]);
                    eprintln!("--- who waits on node {n}\n{}", common::text(&locks));
                }
                // Nobody would end the programs otherwise.
                (0..NODES).for_each(|n| common::signal(lab.pid(n), libc::SIGKILL));
                since = Instant::now();
            }
        }
        let results = threads.into_iter().map(|t| t.join().expect("a program does not panic"));
        results.enumerate().filter_map(|(n, r)| r.err().map(|e| format!("node {}: {e}", n % NODES))).collect()
    });
    let failed: Vec<String> = failed;
    assert!(failed.is_empty(), "seed {seed}: {failed:#?}, operations done {done:?}");
}

fn stress(seed: u64, plan: Plan) {
    let operations = number("MATRIX_STRESS_OPS", 1500);
    println!("SEED={seed} MATRIX_STRESS_OPS={operations} cargo test --release --test stress");
    let mut lab = plan.start();
    for dir in DIRS {
        fs::create_dir_all(lab.path(0, "shared").join(dir)).expect("setup");
    }
    run(&lab, seed, operations);
    let trees: Vec<_> = (0..NODES).map(|n| tree(&lab.path(n, "shared"))).collect();
    assert!(trees[0].len() > 2, "the programs left something to compare");
    for (n, other) in trees.iter().enumerate().skip(1) {
        for (name, entry) in &trees[0] {
            assert_eq!(other.get(name), Some(entry), "seed {seed}: {} on node {n}", name.display());
        }
        assert_eq!(other.len(), trees[0].len(), "seed {seed}: node {n} sees more entries");
    }
    lab.assert_clean();
    // And the same from the disk alone.
    lab.mount(1);
    assert!(tree(&lab.path(1, "shared")) == trees[0], "seed {seed}: another tree after a remount");
    lab.assert_clean();
}

/// What `SEED` asks for, else these.
fn seeds(otherwise: &[u64]) -> Vec<u64> {
    match number("SEED", u64::MAX) {
        u64::MAX => otherwise.to_vec(),
        seed => vec![seed],
    }
}

#[test]
fn random_operations_of_all_nodes_leave_one_tree_and_no_fault() {
    for seed in seeds(&[1, 2]) {
        stress(seed, Plan::nodes(NODES));
    }
}
