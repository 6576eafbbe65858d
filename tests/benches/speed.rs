//! Speed as ratios to ext4 on a loop device over the same disk, in one interleaved run: `cargo bench --bench speed`.
//!
//! Absolute times of these machines mean little; what is compared runs by turns, and the median of the rounds counts.

#[path = "../common/mod.rs"]
mod common;

use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use common::{Lab, Plan, path, succeed};

const ROUNDS: usize = 5;
const CALLS: u64 = 100_000;
const SEQUENTIAL_MIB: usize = 512;
const CREATES: usize = 3_000;

fn main() {
    // `cargo test --benches` calls every bench with --test: there is nothing to test here.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    let lab = Plan::nodes(3).size("3G").start();
    let ext4 = Ext4::mount(&lab.dir);
    let own = lab.at(0);

    println!("| what | ext4 | Matrix | ratio | wanted |");
    println!("| --- | --- | --- | --- | --- |");
    let each_ns = |f: fn(&Path) -> f64| by_turns(&ext4.dir, &own, f);
    row("fstat of an open file, ns", each_ns(fstat), "at most 1.2");
    row("stat by path, ns", each_ns(stat), "stated");
    row("read of 4 KiB that are cached, ns", each_ns(read_cached), "at most 1.2");
    row("1 MiB sequential write and fsync, MiB/s", each_ns(write_sequential), "at least 0.5");
    row("1 MiB sequential read, cold, MiB/s", each_ns(read_sequential), "at least 0.5");
    row("create and close an empty file, 1/s", each_ns(create_many), "stated");

    println!("\n| creating files in own directories | files/s | lock messages per file |");
    println!("| --- | --- | --- |");
    for nodes in [1, 3] {
        let (rate, messages) = create_everywhere(&lab, nodes);
        println!("| {nodes} node{} at once | {rate:.0} | {messages:.3} |", if nodes == 1 { "" } else { "s" });
    }
}

fn row(what: &str, (ext4, matrix): (f64, f64), wanted: &str) {
    println!("| {what} | {ext4:.0} | {matrix:.0} | {:.2} | {wanted} |", matrix / ext4);
}

/// The medians of both, measured in turns.
fn by_turns(ext4: &Path, matrix: &Path, measure: fn(&Path) -> f64) -> (f64, f64) {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        a.push(measure(ext4));
        b.push(measure(matrix));
    }
    (median(a), median(b))
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn ns_per_call(mut call: impl FnMut()) -> f64 {
    (0..100).for_each(|_| call());
    let start = Instant::now();
    (0..CALLS).for_each(|_| call());
    start.elapsed().as_nanos() as f64 / CALLS as f64
}

fn small_file(dir: &Path) -> PathBuf {
    let file = dir.join("small");
    fs::write(&file, [1; 4096]).expect("write");
    file
}

fn fstat(dir: &Path) -> f64 {
    let file = File::open(small_file(dir)).expect("open");
    ns_per_call(|| {
        black_box(file.metadata().expect("fstat"));
    })
}

fn stat(dir: &Path) -> f64 {
    let file = small_file(dir);
    ns_per_call(|| {
        black_box(fs::metadata(&file).expect("stat"));
    })
}

fn read_cached(dir: &Path) -> f64 {
    let file = File::open(small_file(dir)).expect("open");
    let mut buf = [0; 4096];
    ns_per_call(|| file.read_exact_at(&mut buf, 0).expect("read"))
}

fn write_sequential(dir: &Path) -> f64 {
    let (name, chunk) = (dir.join("large"), vec![7u8; 1 << 20]);
    let _ = fs::remove_file(&name);
    let file = OpenOptions::new().create(true).truncate(true).write(true).open(name).expect("open");
    let start = Instant::now();
    for n in 0..SEQUENTIAL_MIB {
        file.write_all_at(&chunk, (n << 20) as u64).expect("write");
    }
    file.sync_all().expect("fsync");
    SEQUENTIAL_MIB as f64 / start.elapsed().as_secs_f64()
}

fn read_sequential(dir: &Path) -> f64 {
    fs::write("/proc/sys/vm/drop_caches", "3").expect("drop caches");
    let file = File::open(dir.join("large")).expect("open");
    let mut chunk = vec![0u8; 1 << 20];
    let start = Instant::now();
    for n in 0..SEQUENTIAL_MIB {
        file.read_exact_at(&mut chunk, (n << 20) as u64).expect("read");
    }
    SEQUENTIAL_MIB as f64 / start.elapsed().as_secs_f64()
}

fn create_many(dir: &Path) -> f64 {
    let dir = dir.join("many");
    fs::create_dir(&dir).expect("mkdir");
    let start = Instant::now();
    create_in(&dir);
    let rate = CREATES as f64 / start.elapsed().as_secs_f64();
    fs::remove_dir_all(&dir).expect("remove");
    rate
}

fn create_in(dir: &Path) {
    for n in 0..CREATES {
        File::create_new(dir.join(format!("f{n}"))).expect("create");
    }
}

/// Files per second in sum, and lock messages sent per file.
fn create_everywhere(lab: &Lab, nodes: usize) -> (f64, f64) {
    let dirs: Vec<PathBuf> = (0..nodes).map(|n| lab.path(n, &format!("own-{nodes}-{n}"))).collect();
    dirs.iter().for_each(|dir| fs::create_dir(dir).expect("mkdir"));
    let before = messages(lab);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for dir in &dirs {
            scope.spawn(move || create_in(dir));
        }
    });
    let files = (nodes * CREATES) as f64;
    (files / start.elapsed().as_secs_f64(), (messages(lab) - before) as f64 / files)
}

fn messages(lab: &Lab) -> u64 {
    (0..lab.nodes()).map(|n| lab.status(n)["counters"]["lock messages sent"].as_u64().expect("counter")).sum()
}

/// An ext4 on a loop device over an image beside the lab's.
struct Ext4 {
    dir: PathBuf,
}

impl Ext4 {
    fn mount(lab: &Path) -> Ext4 {
        let (image, dir) = (lab.join("ext4.img"), lab.join("ext4"));
        File::create(&image).and_then(|f| f.set_len(3 << 30)).expect("image");
        fs::create_dir(&dir).expect("mkdir");
        succeed(Command::new("mkfs.ext4").args(["-q", "-F", path(&image)]).output().expect("e2fsprogs"));
        succeed(
            Command::new("mount").args(["-o", "loop", path(&image), path(&dir)]).output().expect("mount"),
        );
        Ext4 { dir }
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.dir).output();
    }
}
