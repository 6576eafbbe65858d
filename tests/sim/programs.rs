//! What programs on the nodes do, and what they saw.
//!
//! Registers are files with a value that is overwritten, and names that are renamed over. A write counts when it was
//! reported stable; who reads makes stable what he read, so that no crash takes it back afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use mfs::ops::{Caller, Handle, Ino, Operations, RenameFlags, SetAttr, Write, XattrSet};
use mfs::{Filesystem, FsError};
use parking_lot::Mutex;
use storage_control::{NodeId, Runtime, SimRuntime};

use crate::history::{History, Op};
use crate::host::Host;

pub(crate) const ME: Caller = Caller { uid: 0, gid: 0 };
/// Files that are registers, each with its value at another offset.
const FILES: [(&str, u64); 3] = [("f0", 0), ("f1", 5_000), ("f2", 70_000)];
const NAMES: [&str; 2] = ["n0", "n1"];

/// What all programs of one life have seen.
pub(crate) struct Log {
    world: SimRuntime,
    registers: Mutex<BTreeMap<&'static str, History>>,
    next: AtomicU64,
    pub(crate) stop: AtomicBool,
    /// Operations that succeeded, by node.
    pub(crate) done: Mutex<BTreeMap<NodeId, u64>>,
    /// Errors that no fault explains.
    pub(crate) wrong: Mutex<Vec<String>>,
}

impl Log {
    pub(crate) fn new(world: &SimRuntime) -> Log {
        Log {
            world: world.clone(),
            registers: Mutex::default(),
            next: AtomicU64::new(1),
            stop: AtomicBool::new(false),
            done: Mutex::default(),
            wrong: Mutex::default(),
        }
    }

    fn begin_write(&self, register: &'static str) -> u64 {
        let value = self.next.fetch_add(1, Ordering::Relaxed);
        let op = Op { value, is_write: true, start: self.world.now().0, end: u64::MAX };
        self.registers.lock().entry(register).or_default().0.push(op);
        value
    }

    fn end_write(&self, register: &'static str, value: u64) {
        let now = self.world.now().0;
        let mut registers = self.registers.lock();
        let ops = &mut registers.entry(register).or_default().0;
        let op = ops.iter_mut().rev().find(|op| op.is_write && op.value == value);
        op.expect("the write was begun").end = now;
    }

    fn read(&self, register: &'static str, value: u64, start: u64) {
        let op = Op { value, is_write: false, start, end: self.world.now().0 };
        self.registers.lock().entry(register).or_default().0.push(op);
    }

    /// What no order of the operations explains.
    pub(crate) fn defect(&self) -> Option<String> {
        let registers = self.registers.lock();
        registers.iter().find_map(|(name, history)| history.defect().map(|why| format!("{name}: {why}")))
    }

    pub(crate) fn operations(&self) -> u64 {
        self.done.lock().values().sum()
    }

    fn count(&self, node: NodeId) {
        *self.done.lock().entry(node).or_default() += 1;
    }
}

/// Makes the registers on an empty filesystem.
pub(crate) async fn set_up(fs: &Filesystem) -> Result<(), FsError> {
    for (name, _) in FILES {
        let (_, opened) = fs.create(ME, fs.root(), name.as_bytes(), 0o644, libc::O_RDWR).await?;
        fs.release(opened.handle).await?;
    }
    for dir in ["names", "noise"] {
        fs.mkdir(ME, fs.root(), dir.as_bytes(), 0o755).await?;
    }
    Ok(())
}

/// A program on one node.
pub(crate) struct Program {
    pub(crate) fs: Arc<Filesystem>,
    pub(crate) host: Host,
    pub(crate) node: NodeId,
    pub(crate) world: SimRuntime,
    pub(crate) log: Arc<Log>,
}

impl Program {
    fn below(&self, n: u64) -> u64 {
        self.world.random() % n
    }

    /// Works until it is told to stop.
    pub(crate) async fn run(self) {
        while !self.log.stop.load(Ordering::Relaxed) {
            let result = match self.below(10) {
                0..2 => self.write_file().await,
                2..4 => self.read_file().await,
                4 => self.write_name().await,
                5..7 => self.read_name().await,
                _ => self.noise().await,
            };
            match result {
                Ok(()) => self.log.count(self.node),
                Err(error) => {
                    // Names come and go under the noise. The device fails, the lease runs out, the node is excluded.
                    const EXPLAINED: [i32; 10] = [
                        libc::ENOENT,
                        libc::EEXIST,
                        libc::ENOTDIR,
                        libc::EISDIR,
                        libc::ENOTEMPTY,
                        libc::ESTALE,
                        libc::EIO,
                        libc::EINVAL,
                        libc::EBADF,
                        libc::EPERM,
                    ];
                    if !EXPLAINED.contains(&error.errno()) {
                        self.log.wrong.lock().push(format!("{}: {error}", self.node));
                    }
                }
            }
            self.host.sleep(Duration::from_millis(20 + self.below(300))).await;
        }
    }

    /// Reads every register once more, so that the end is in the histories.
    pub(crate) async fn look(&self) -> Result<(), FsError> {
        for (name, offset) in FILES {
            self.read_file_of(name, offset).await?;
        }
        for name in NAMES {
            match self.read_name_of(name).await {
                Err(error) if error.errno() == libc::ENOENT => {}
                other => other?,
            }
        }
        Ok(())
    }

    async fn write_file(&self) -> Result<(), FsError> {
        let (name, offset) = FILES[self.below(3) as usize];
        let ino = self.fs.lookup(self.fs.root(), name.as_bytes()).await?.ino;
        let opened = self.fs.open(ino, libc::O_RDWR).await?;
        let value = self.log.begin_write(name);
        let result = self.put(opened.handle, offset, value).await;
        let stable = match result {
            Ok(()) => self.fs.fsync(opened.handle, self.below(2) == 0).await,
            Err(error) => Err(error),
        };
        if stable.is_ok() {
            self.log.end_write(name, value);
        }
        let _ = self.fs.release(opened.handle).await;
        stable
    }

    async fn put(&self, handle: Handle, offset: u64, value: u64) -> Result<(), FsError> {
        let data = value.to_le_bytes().to_vec();
        self.fs
            .write(handle, Write { offset, data, append: false, kill_suid: false, sync: false })
            .await
            .map(drop)
    }

    async fn get(&self, handle: Handle, offset: u64) -> Result<u64, FsError> {
        let got = self.fs.read(handle, offset, 8).await?.to_vec();
        Ok(<[u8; 8]>::try_from(&got[..]).map_or(0, u64::from_le_bytes))
    }

    async fn read_file(&self) -> Result<(), FsError> {
        let (name, offset) = FILES[self.below(3) as usize];
        self.read_file_of(name, offset).await
    }

    async fn read_file_of(&self, name: &'static str, offset: u64) -> Result<(), FsError> {
        let ino = self.fs.lookup(self.fs.root(), name.as_bytes()).await?.ino;
        let opened = self.fs.open(ino, libc::O_RDONLY).await?;
        let start = self.world.now().0;
        let value = self.get(opened.handle, offset).await;
        let stable = self.fs.fsync(opened.handle, false).await;
        if let (Ok(value), Ok(())) = (&value, &stable) {
            self.log.read(name, *value, start);
        }
        let _ = self.fs.release(opened.handle).await;
        value?;
        stable
    }

    async fn names_dir(&self) -> Result<Ino, FsError> {
        Ok(self.fs.lookup(self.fs.root(), b"names").await?.ino)
    }

    async fn write_name(&self) -> Result<(), FsError> {
        let (dir, name) = (self.names_dir().await?, NAMES[self.below(2) as usize]);
        let value = self.log.begin_write(name);
        let temporary = format!("t{value}");
        let (_, opened) = self.fs.create(ME, dir, temporary.as_bytes(), 0o644, libc::O_RDWR).await?;
        let written = self.put(opened.handle, 0, value).await;
        let stable = match written {
            Ok(()) => self.fs.fsync(opened.handle, false).await,
            Err(error) => Err(error),
        };
        let _ = self.fs.release(opened.handle).await;
        stable?;
        self.fs.rename(dir, temporary.as_bytes(), dir, name.as_bytes(), RenameFlags::default()).await?;
        self.sync_dir(dir).await?;
        self.log.end_write(name, value);
        Ok(())
    }

    async fn sync_dir(&self, dir: Ino) -> Result<(), FsError> {
        let handle = self.fs.opendir(dir).await?;
        let stable = self.fs.fsyncdir(handle).await;
        let _ = self.fs.releasedir(handle).await;
        stable
    }

    async fn read_name(&self) -> Result<(), FsError> {
        self.read_name_of(NAMES[self.below(2) as usize]).await
    }

    async fn read_name_of(&self, name: &'static str) -> Result<(), FsError> {
        let dir = self.names_dir().await?;
        let start = self.world.now().0;
        let value = match self.fs.lookup(dir, name.as_bytes()).await {
            Ok(attr) => {
                let opened = self.fs.open(attr.ino, libc::O_RDONLY).await?;
                let value = self.get(opened.handle, 0).await;
                let _ = self.fs.release(opened.handle).await;
                value?
            }
            Err(error) if error.errno() == libc::ENOENT => 0,
            Err(error) => return Err(error),
        };
        self.sync_dir(dir).await?;
        self.log.read(name, value, start);
        Ok(())
    }

    /// Anything else, in a directory that all nodes use.
    async fn noise(&self) -> Result<(), FsError> {
        let dir = self.fs.lookup(self.fs.root(), b"noise").await?.ino;
        let name = format!("x{}", self.below(6)).into_bytes();
        let other = format!("x{}", self.below(6)).into_bytes();
        match self.below(9) {
            0..3 => {
                let (_, opened) = self.fs.create(ME, dir, &name, 0o644, libc::O_RDWR).await?;
                let data = vec![self.below(256) as u8; 1 + self.below(30_000) as usize];
                let offset = self.below(3) * 4_000;
                let write = Write { offset, data, append: false, kill_suid: false, sync: false };
                let result = self.fs.write(opened.handle, write).await;
                let _ = self.fs.release(opened.handle).await;
                result.map(drop)
            }
            3 => self.fs.unlink(dir, &name).await,
            4 => self.fs.mkdir(ME, dir, &name, 0o755).await.map(drop),
            5 => self.fs.rmdir(dir, &name).await,
            6 => self.fs.rename(dir, &name, dir, &other, RenameFlags::default()).await,
            7 => {
                let ino = self.fs.lookup(dir, &name).await?.ino;
                let size = Some(self.below(20_000));
                self.fs.setattr(ino, SetAttr { size, ..SetAttr::default() }).await.map(drop)
            }
            _ => {
                let ino = self.fs.lookup(dir, &name).await?.ino;
                self.fs.setxattr(ino, b"user.a", &vec![1; self.below(3000) as usize], XattrSet::Any).await?;
                self.fs.link(ino, dir, &other).await.map(drop)
            }
        }
    }
}

/// All that one node sees, as text.
pub(crate) async fn tree(fs: &Filesystem) -> Result<Vec<String>, FsError> {
    let mut found = Vec::new();
    let mut dirs = vec![(String::new(), fs.root())];
    while let Some((path, dir)) = dirs.pop() {
        let handle = fs.opendir(dir).await?;
        let mut from = 0;
        loop {
            let part = fs.readdir(handle, from, 50).await?;
            let Some(last) = part.last() else { break };
            from = last.next;
            for entry in part.iter().filter(|entry| entry.name != b"." && entry.name != b"..") {
                let attr = fs.lookup(dir, &entry.name).await?;
                let name = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
                let mut sum = 0_u64;
                if attr.file_type() == libc::S_IFREG {
                    let opened = fs.open(attr.ino, libc::O_RDONLY).await?;
                    let content = fs.read(opened.handle, 0, 1 << 20).await?.to_vec();
                    sum = content.iter().fold(content.len() as u64, |sum, byte| {
                        sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
                    });
                    fs.release(opened.handle).await?;
                } else if attr.file_type() == libc::S_IFDIR {
                    dirs.push((name.clone(), attr.ino));
                }
                let size = if attr.file_type() == libc::S_IFDIR { 0 } else { attr.size };
                let (mode, nlink, mtime) = (attr.mode, attr.nlink, attr.mtime);
                found.push(format!("{name} {mode:o} {nlink} {size} {mtime:?} {sum:x}"));
            }
        }
        fs.releasedir(handle).await?;
    }
    found.sort();
    Ok(found)
}
