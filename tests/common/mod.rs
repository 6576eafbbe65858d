//! The test lab: real `matrix` processes on one image, mounted side by side, and what can be done to them.
//!
//! Whatever happens, a lab leaves no process, mount or file behind: `Drop` kills the daemons it started by pid and
//! detaches the mounts it made, also when the test panics. One lab exists at a time.
#![allow(dead_code, unreachable_pub, missing_docs)] // each test binary uses its part

pub mod load;
mod namespaces;
pub mod random;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub use namespaces::Namespaces;

pub const MATRIX: &str = env!("CARGO_BIN_EXE_matrix");

/// Mounting tests run one after the other: they measure pauses, and two cores carry only one cluster.
static ONE_LAB: Mutex<()> = Mutex::new(());

/// How long a condition may take to come true before the test fails.
pub const SOON: Duration = Duration::from_secs(30);

pub struct Lab {
    pub dir: PathBuf,
    nodes: Vec<Node>,
    namespaces: Option<Namespaces>,
    _alone: MutexGuard<'static, ()>,
}

struct Node {
    /// The path at which it finds the device.
    device: PathBuf,
    options: String,
    /// The daemon as last mounted; set while it is ours to end.
    pid: Option<i32>,
}

/// What a new lab is made of.
pub struct Plan {
    nodes: usize,
    size: &'static str,
    options: &'static str,
    namespaces: bool,
}

impl Plan {
    pub fn nodes(nodes: usize) -> Plan {
        Plan { nodes, size: "512M", options: "", namespaces: false }
    }

    pub fn size(self, size: &'static str) -> Plan {
        Plan { size, ..self }
    }

    /// `-o` options of every mount.
    pub fn options(self, options: &'static str) -> Plan {
        Plan { options, ..self }
    }

    /// Each node in a network namespace of its own, joined by a bridge.
    pub fn with_namespaces(self) -> Plan {
        Plan { namespaces: true, ..self }
    }

    /// Makes the filesystem; nothing is mounted.
    pub fn make(self) -> Lab {
        let alone = ONE_LAB.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let root = std::env::var_os("MATRIX_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = root.join(format!("matrix-lab-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).expect("lab directory");
        let mut lab = Lab { dir, nodes: Vec::new(), namespaces: None, _alone: alone };
        lab.namespaces = self.namespaces.then(|| Namespaces::make(self.nodes));
        for n in 0..self.nodes {
            fs::create_dir_all(lab.at(n)).expect("mount point");
            fs::create_dir_all(lab.run_dir(n)).expect("run directory");
            lab.nodes.push(Node { device: lab.image(), options: self.options.to_string(), pid: None });
        }
        let image = lab.image();
        succeed(lab.matrix(&["mkfs", path(&image), "--size", self.size]));
        lab
    }

    /// Makes the filesystem and mounts it on every node.
    pub fn start(self) -> Lab {
        let mut lab = self.make();
        for n in 0..lab.nodes.len() {
            lab.mount(n);
        }
        lab
    }
}

impl Lab {
    pub fn image(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Where node `n` has the filesystem mounted.
    pub fn at(&self, n: usize) -> PathBuf {
        self.dir.join(format!("n{n}"))
    }

    /// `name` as node `n` sees it.
    pub fn path(&self, n: usize, name: &str) -> PathBuf {
        self.at(n).join(name)
    }

    pub fn run_dir(&self, n: usize) -> PathBuf {
        self.dir.join("run").join(n.to_string())
    }

    pub fn log(&self, n: usize) -> String {
        fs::read_to_string(self.run_dir(n).join("matrix.log")).unwrap_or_default()
    }

    pub fn pid(&self, n: usize) -> i32 {
        self.nodes[n].pid.expect("the node is mounted")
    }

    pub fn namespaces(&self) -> &Namespaces {
        self.namespaces.as_ref().expect("the lab was planned with namespaces")
    }

    pub fn set_options(&mut self, n: usize, options: &str) {
        self.nodes[n].options = options.to_string();
    }

    pub fn set_device(&mut self, n: usize, device: PathBuf) {
        self.nodes[n].device = device;
    }

    /// Runs `matrix` with `args` on this host.
    pub fn matrix(&self, args: &[&str]) -> Output {
        Command::new(MATRIX).args(args).output().expect("run matrix")
    }

    pub fn mount(&mut self, n: usize) {
        if let Err(text) = self.try_mount(n) {
            panic!("node {n} cannot mount: {text}\n{}", self.log(n));
        }
    }

    /// Mounts node `n`; the error is what the command said.
    pub fn try_mount(&mut self, n: usize) -> Result<(), String> {
        let (dir, run_dir, device) = (self.at(n), self.run_dir(n), self.nodes[n].device.clone());
        let name = format!("n{n}");
        let listen =
            self.namespaces.as_ref().map_or("127.0.0.1:0".to_string(), |ns| format!("{}:0", ns.address(n)));
        let mut args = vec!["mount", path(&device), path(&dir), "--node", &name, "--run-dir", path(&run_dir)];
        args.extend(["--listen", &listen]);
        if !self.nodes[n].options.is_empty() {
            args.extend(["-o", &self.nodes[n].options]);
        }
        let output = match &self.namespaces {
            Some(ns) => ns.command(n, MATRIX).args(&args).output().expect("run matrix in its namespace"),
            None => self.matrix(&args),
        };
        if !output.status.success() {
            return Err(text(&output));
        }
        let pid = fs::read_to_string(run_dir.join("matrix.pid")).expect("a mounted node has a pid file");
        self.nodes[n].pid = Some(pid.trim().parse().expect("a pid"));
        Ok(())
    }

    pub fn umount(&mut self, n: usize) {
        let dir = self.at(n);
        let output = self.matrix(&["umount", path(&dir)]);
        assert!(output.status.success(), "umount of node {n}: {}\n{}", text(&output), self.log(n));
        self.nodes[n].pid = None;
    }

    pub fn umount_all(&mut self) {
        for n in 0..self.nodes.len() {
            if self.nodes[n].pid.is_some() {
                self.umount(n);
            }
        }
    }

    /// kill -9 of node `n`'s daemon; returns when the process is gone and its dead mount cleared away.
    pub fn kill9(&mut self, n: usize) {
        let pid = self.pid(n);
        signal(pid, libc::SIGKILL);
        wait_until("the killed daemon is gone", SOON, || !alive(pid));
        self.clear(n);
    }

    /// Detaches what a dead daemon left mounted.
    pub fn clear(&mut self, n: usize) {
        self.nodes[n].pid = None;
        let dir = self.at(n);
        let output = self.matrix(&["umount", "--force", path(&dir)]);
        assert!(
            output.status.success() || output.status.code() == Some(3),
            "clear node {n}: {}",
            text(&output)
        );
    }

    pub fn stop(&self, n: usize) {
        signal(self.pid(n), libc::SIGSTOP);
    }

    pub fn resume(&self, n: usize) {
        signal(self.pid(n), libc::SIGCONT);
    }

    pub fn is_alive(&self, n: usize) -> bool {
        self.nodes[n].pid.is_some_and(alive)
    }

    pub fn status(&self, n: usize) -> serde_json::Value {
        let dir = self.at(n);
        let output = self.matrix(&["status", path(&dir), "--json"]);
        assert!(output.status.success(), "status of node {n}: {}", text(&output));
        serde_json::from_slice(&output.stdout).expect("status is JSON")
    }

    /// fsck's exit code and what it printed.
    pub fn fsck(&self) -> (i32, String) {
        let image = self.image();
        let output = self.matrix(&["fsck", path(&image)]);
        (output.status.code().unwrap_or(-1), text(&output))
    }

    /// Unmounts what is mounted; the filesystem must then be without a fault.
    #[track_caller]
    pub fn assert_clean(&mut self) {
        self.umount_all();
        let (code, text) = self.fsck();
        assert_eq!(code, 0, "fsck: {text}");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for n in 0..self.nodes.len() {
                eprintln!("--- log of node {n} (its end)\n{}", tail(&self.log(n), 40));
            }
        }
        for (n, node) in self.nodes.iter().enumerate() {
            if let Some(pid) = node.pid.filter(|pid| is_matrix(*pid)) {
                signal(pid, libc::SIGKILL);
                let end = Instant::now() + SOON;
                while alive(pid) && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            let dir = self.at(n);
            let _ = self.matrix(&["umount", "--force", path(&dir)]);
            while detach(&dir) {}
        }
        if std::env::var_os("MATRIX_TEST_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Polls until `condition` holds; the test fails when it does not within `limit`.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
pub fn succeed(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

/// A number from the environment, by which a run is made longer or repeated.
pub fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

/// Everything a command printed.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

pub fn path(path: &Path) -> &str {
    path.to_str().expect("lab paths are plain text")
}

pub fn signal(pid: i32, signal: i32) {
    // SAFETY: kill takes two integers; the pid is one that the lab started.
    unsafe { libc::kill(pid, signal) };
}

/// Whether the process is there and no zombie (nobody may have reaped it yet).
pub fn alive(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with(['Z', 'X']))
}

fn is_matrix(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.to_string_lossy().contains("matrix"))
}

fn detach(dir: &Path) -> bool {
    let Ok(dir) = std::ffi::CString::new(path(dir)) else { return false };
    // SAFETY: a zero-terminated path that lives over the call.
    unsafe { libc::umount2(dir.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) == 0 }
}

pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Calls of libc, -1 turned into the error it left.
pub fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
