//! A user of the filesystem who keeps a history: carries steps out, and expects of each what POSIX says.

use std::sync::Arc;
use std::time::Duration;

use mfs::ops::{Attr, Caller, Handle, Ino, Operations, RenameFlags, SetAttr, Write, XattrSet};
use mfs::{Filesystem, FsError};
use storage_control::{Runtime, SimRuntime, WallTime};

use crate::history::{History, Id, Kind, Node, Tree};
use crate::random::Random;
use crate::record::Mark;
use crate::workload::{After, NAMES, Operation, Size, Slot, Step, Where};

pub const ME: Caller = Caller { uid: 1000, gid: 100 };
pub const XATTR: &str = "user.x";
/// A file in the root that takes up space; nobody looks at its content.
pub const BALLAST: &str = "ballast";
const FILE_PERM: u32 = 0o640;
const DIR_PERM: u32 = 0o750;
const BLOCK: usize = 4096;

/// A step that did not do what it should.
pub type Wrong = String;

/// See the module.
pub struct User {
    pub fs: Arc<Filesystem>,
    pub history: History,
    /// The two directories that everything happens in.
    pub dirs: [Id; 2],
    world: SimRuntime,
    mark: Box<dyn Fn(Mark) + Send + Sync>,
    held: Vec<Handle>,
}

fn id_of(attr: &Attr) -> Id {
    (attr.ino.0, attr.generation)
}

/// Modification and change time.
pub fn times_of(attr: &Attr) -> [WallTime; 2] {
    [attr.mtime, attr.ctime]
}

/// Bytes that no other write has.
pub fn pattern(draw: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(draw);
    let words = std::iter::repeat_with(|| random.next().to_le_bytes());
    words.take(len.div_ceil(8)).flatten().take(len).collect()
}

/// What an operation gave where it did what was expected; a full filesystem may refuse what would work.
fn agree<T>(what: &str, expected: bool, got: mfs::ops::Result<T>) -> Result<Option<T>, Wrong> {
    match (expected, got) {
        (true, Err(FsError::NoSpace)) => Ok(None),
        (true, Ok(value)) => Ok(Some(value)),
        (false, Err(_)) => Ok(None),
        (true, Err(error)) => Err(format!("{what} failed: {error}")),
        (false, Ok(_)) => Err(format!("{what} worked")),
    }
}

impl User {
    /// `mark` is told where operations begin and what became stable.
    pub fn new(
        fs: Arc<Filesystem>,
        history: History,
        dirs: [Id; 2],
        world: &SimRuntime,
        mark: impl Fn(Mark) + Send + Sync + 'static,
    ) -> User {
        User { fs, history, dirs, world: world.clone(), mark: Box::new(mark), held: Vec::new() }
    }

    fn at(&self, slot: Slot) -> (Id, &'static str) {
        (self.dirs[usize::from(slot.dir)], NAMES[usize::from(slot.name)])
    }

    fn found(&self, slot: Slot) -> Option<Id> {
        let (dir, name) = self.at(slot);
        self.history.now().find(dir, name)
    }

    fn found_file(&self, slot: Slot) -> Option<Id> {
        self.found(slot).filter(|id| self.history.now().node(*id).kind == Kind::File)
    }

    /// Starts an operation: its number, and the tree it changes.
    fn begin(&self) -> (usize, Tree) {
        let number = self.history.last() + 1;
        (self.mark)(Mark::Starts(number));
        (number, self.history.now().clone())
    }

    /// Carries a step out, with what comes after it.
    pub async fn step(&mut self, step: &Step) -> Result<(), Wrong> {
        let sync = self.carry_out(step).await.map_err(|wrong| format!("{step:?}: {wrong}"))?;
        match step.after {
            After::Nothing | After::OSync => {}
            After::Fsync | After::Fdatasync => {
                for id in sync {
                    self.fsync(id, step.after == After::Fdatasync).await?;
                }
            }
            After::Sync => self.sync().await?,
        }
        Ok(())
    }

    /// Returns what an `fsync` after it would be of.
    async fn carry_out(&mut self, step: &Step) -> Result<Vec<Id>, Wrong> {
        match step.operation {
            Operation::Create(slot) => {
                let (dir, name) = self.at(slot);
                Ok(self.create(dir, name).await?.into_iter().collect())
            }
            Operation::Mkdir(slot) => {
                let (dir, name) = self.at(slot);
                Ok(self.mkdir(dir, name).await?.into_iter().collect())
            }
            Operation::Symlink(slot) => self.symlink(slot, step.draw).await,
            Operation::Link(from, to) => {
                let (dir, name) = self.at(to);
                match self.found(from) {
                    Some(id) => self.link(id, dir, name).await,
                    None => Ok(Vec::new()),
                }
            }
            Operation::Unlink(slot) => self.remove(slot, false).await,
            Operation::Rmdir(slot) => self.remove(slot, true).await,
            Operation::Rename(from, to) => self.rename(from, to).await,
            Operation::Write(slot, place) => match self.found_file(slot) {
                Some(file) => self.write_somewhere(file, place, step).await,
                None => Ok(Vec::new()),
            },
            Operation::Shrink(slot) | Operation::Extend(slot) => match self.found_file(slot) {
                Some(file) => self.resize(file, step).await,
                None => Ok(Vec::new()),
            },
            Operation::SetXattr(slot, size) => match self.found(slot) {
                Some(id) => {
                    let len = if size == Size::Large { 5000 + step.draw % 20_000 } else { step.draw % 100 };
                    self.set_xattr(id, pattern(step.draw, len as usize)).await
                }
                None => Ok(Vec::new()),
            },
            Operation::RemoveXattr(slot) => match self.found(slot) {
                Some(id) => self.remove_xattr(id).await,
                None => Ok(Vec::new()),
            },
            Operation::Hold(slot) => {
                if let Some(file) = self.found_file(slot) {
                    let held = self.open(file).await?;
                    self.held.push(held);
                }
                Ok(Vec::new())
            }
            Operation::LetGo => {
                if !self.held.is_empty() {
                    let held = self.held.remove(0);
                    self.close(held).await?;
                }
                Ok(Vec::new())
            }
            Operation::Wait(secs) => {
                self.world.sleep(Duration::from_secs(secs.into())).await;
                Ok(Vec::new())
            }
        }
    }

    pub async fn create(&mut self, dir: Id, name: &str) -> Result<Option<Id>, Wrong> {
        let (number, mut tree) = self.begin();
        let free = tree.find(dir, name).is_none();
        let flags = libc::O_RDWR | libc::O_EXCL;
        let got = self.fs.create(ME, Ino(dir.0), name.as_bytes(), FILE_PERM, flags).await;
        let made = agree("create", free, got)?;
        if let Some((attr, opened)) = &made {
            self.close(opened.handle).await?;
            self.fs.forget(attr.ino, 1);
            tree.make(dir, name, id_of(attr), Node::new(Kind::File, FILE_PERM));
            self.history.new_content(id_of(attr), number, Vec::new(), false);
            self.history.touch(number, &[dir, id_of(attr)], false);
        }
        self.history.done(tree);
        Ok(made.map(|(attr, _)| id_of(&attr)))
    }

    pub async fn mkdir(&mut self, dir: Id, name: &str) -> Result<Option<Id>, Wrong> {
        let (number, mut tree) = self.begin();
        let free = tree.find(dir, name).is_none();
        let made = agree("mkdir", free, self.fs.mkdir(ME, Ino(dir.0), name.as_bytes(), DIR_PERM).await)?;
        if let Some(attr) = &made {
            self.fs.forget(attr.ino, 1);
            tree.make(dir, name, id_of(attr), Node::new(Kind::Dir(Default::default()), DIR_PERM));
            self.history.touch(number, &[dir, id_of(attr)], false);
        }
        self.history.done(tree);
        Ok(made.map(|attr| id_of(&attr)))
    }

    async fn symlink(&mut self, slot: Slot, draw: u64) -> Result<Vec<Id>, Wrong> {
        let ((dir, name), (number, mut tree)) = (self.at(slot), self.begin());
        let free = tree.find(dir, name).is_none();
        let target: Vec<u8> = pattern(draw, 1 + draw as usize % 200).iter().map(|b| b'a' + b % 26).collect();
        let got = self.fs.symlink(ME, Ino(dir.0), name.as_bytes(), &target).await;
        if let Some(attr) = agree("symlink", free, got)? {
            self.fs.forget(attr.ino, 1);
            tree.make(dir, name, id_of(&attr), Node::new(Kind::Symlink(target), 0o777));
            self.history.touch(number, &[dir, id_of(&attr)], false);
        }
        self.history.done(tree);
        Ok(vec![dir])
    }

    pub async fn link(&mut self, id: Id, dir: Id, name: &str) -> Result<Vec<Id>, Wrong> {
        let (number, mut tree) = self.begin();
        let may = tree.find(dir, name).is_none() && !tree.node(id).is_dir();
        if agree("link", may, self.fs.link(Ino(id.0), Ino(dir.0), name.as_bytes()).await)?.is_some() {
            self.fs.forget(Ino(id.0), 1);
            tree.link(dir, name, id);
            self.history.touch(number, &[dir, id], false);
        }
        self.history.done(tree);
        Ok(vec![if may { id } else { dir }])
    }

    async fn remove(&mut self, slot: Slot, is_rmdir: bool) -> Result<Vec<Id>, Wrong> {
        let ((dir, name), (number, mut tree)) = (self.at(slot), self.begin());
        let found = tree.find(dir, name);
        let may = found.is_some_and(|id| match &tree.node(id).kind {
            Kind::Dir(names) => is_rmdir && names.is_empty(),
            Kind::File | Kind::Symlink(_) => !is_rmdir,
        });
        let got = match is_rmdir {
            true => self.fs.rmdir(Ino(dir.0), name.as_bytes()).await,
            false => self.fs.unlink(Ino(dir.0), name.as_bytes()).await,
        };
        if agree("removing a name", may, got)?.is_some() {
            tree.unlink(dir, name);
            self.history.touch(number, &[dir, found.expect("what was removed was there")], false);
        }
        self.history.done(tree);
        Ok(vec![dir])
    }

    async fn rename(&mut self, from: Slot, to: Slot) -> Result<Vec<Id>, Wrong> {
        let ((dir, name), (new_dir, new_name), (number, mut tree)) =
            (self.at(from), self.at(to), self.begin());
        let (source, target) = (tree.find(dir, name), tree.find(new_dir, new_name));
        let may = source.is_some_and(|source| match target.map(|target| &tree.node(target).kind) {
            None => true,
            _ if target == Some(source) => true,
            Some(Kind::Dir(names)) => tree.node(source).is_dir() && names.is_empty(),
            Some(Kind::File | Kind::Symlink(_)) => !tree.node(source).is_dir(),
        });
        let flags = RenameFlags::default();
        let (a, b) = (Ino(dir.0), Ino(new_dir.0));
        let got = self.fs.rename(a, name.as_bytes(), b, new_name.as_bytes(), flags).await;
        if agree("rename", may, got)?.is_some() && target != source {
            tree.rename(dir, name, new_dir, new_name);
            let ids: Vec<Id> = [Some(dir), Some(new_dir), source, target].into_iter().flatten().collect();
            self.history.touch(number, &ids, false);
        }
        self.history.done(tree);
        Ok(if dir == new_dir { vec![dir] } else { vec![dir, new_dir] })
    }

    async fn write_somewhere(&mut self, file: Id, place: Where, step: &Step) -> Result<Vec<Id>, Wrong> {
        let size = self.history.content(file).expect("a file has content").len();
        let mut random = Random::new(step.draw);
        let most = if step.size == Size::Large { 100_000 } else { 6000 };
        let len = 1 + random.below(most) as usize;
        let (offset, len) = match place {
            Where::Append => (size, len),
            Where::Overwrite if size < BLOCK => (0, size.max(1)),
            Where::Overwrite => {
                let blocks = size / BLOCK;
                let first = random.below(blocks as u64) as usize;
                (first * BLOCK, BLOCK * len.div_ceil(BLOCK).min(blocks - first))
            }
            Where::Unaligned => (random.below(size as u64 + 3000) as usize, len),
        };
        let append = place == Where::Append;
        self.write(file, offset, &pattern(step.draw, len), append, step.after == After::OSync).await?;
        Ok(vec![file])
    }

    pub async fn write(
        &mut self,
        file: Id,
        offset: usize,
        data: &[u8],
        append: bool,
        sync: bool,
    ) -> Result<(), Wrong> {
        let handle = self.open(file).await?;
        let (number, tree) = self.begin();
        let mut bytes = self.history.content(file).expect("a file has content").to_vec();
        let in_place = offset + data.len() <= bytes.len();
        bytes.resize(bytes.len().max(offset + data.len()), 0);
        bytes[offset..offset + data.len()].copy_from_slice(data);
        let write = Write { offset: offset as u64, data: data.to_vec(), append, kill_suid: false, sync };
        let written = agree("write", true, self.fs.write(handle, write).await);
        // One that failed on its way to the disk may have come there.
        if written != Ok(None) {
            self.history.new_content(file, number, bytes, in_place);
            self.history.touch(number, &[file], true);
        }
        self.history.done(tree);
        let written = written?;
        if written.is_some_and(|written| written != data.len()) {
            return Err(format!("{written:?} of {} bytes were written", data.len()));
        }
        if sync && written.is_some() {
            (self.mark)(Mark::Stable(self.history.promises.len()));
            self.history.synced(file, false, None);
        }
        self.close(handle).await
    }

    async fn resize(&mut self, file: Id, step: &Step) -> Result<Vec<Id>, Wrong> {
        let (number, tree) = self.begin();
        let mut bytes = self.history.content(file).expect("a file has content").to_vec();
        let size = bytes.len() as u64;
        let mut random = Random::new(step.draw);
        let new = match step.operation {
            Operation::Shrink(_) => match random.below(4) {
                0 => 0,
                1 => size.saturating_sub(1),
                2 => random.below(size + 1) / BLOCK as u64 * BLOCK as u64,
                _ => random.below(size + 1),
            },
            _ => size + 1 + random.below(if step.size == Size::Large { 300_000 } else { 9000 }),
        };
        let set = SetAttr { size: Some(new), ..SetAttr::default() };
        if agree("truncate", true, self.fs.setattr(Ino(file.0), set).await)?.is_some() {
            bytes.resize(new as usize, 0);
            self.history.new_content(file, number, bytes, false);
            self.history.touch(number, &[file], true);
        }
        self.history.done(tree);
        Ok(vec![file])
    }

    pub async fn set_xattr(&mut self, id: Id, value: Vec<u8>) -> Result<Vec<Id>, Wrong> {
        let (number, mut tree) = self.begin();
        let got = self.fs.setxattr(Ino(id.0), XATTR.as_bytes(), &value, XattrSet::Any).await;
        if agree("setxattr", true, got)?.is_some() {
            tree.change(id).xattrs.insert(XATTR.into(), Arc::new(value));
            self.history.touch(number, &[id], false);
        }
        self.history.done(tree);
        Ok(vec![id])
    }

    async fn remove_xattr(&mut self, id: Id) -> Result<Vec<Id>, Wrong> {
        let (number, mut tree) = self.begin();
        let there = tree.node(id).xattrs.contains_key(XATTR);
        let got = self.fs.removexattr(Ino(id.0), XATTR.as_bytes()).await;
        if agree("removexattr", there, got)?.is_some() {
            tree.change(id).xattrs.remove(XATTR);
            self.history.touch(number, &[id], false);
        }
        self.history.done(tree);
        Ok(vec![id])
    }

    /// Makes the file that only takes up space larger by so many blocks of zeros.
    pub async fn add_ballast(&mut self, blocks: u64) -> Result<(), Wrong> {
        let root = self.history.now().root;
        let ballast = match self.history.now().find(root, BALLAST) {
            Some(ballast) => ballast,
            None => self.create(root, BALLAST).await?.ok_or("there is no room for ballast")?,
        };
        let end = self.history.content(ballast).map_or(0, |bytes| bytes.len());
        self.write(ballast, end, &vec![0; blocks as usize * BLOCK], true, true).await
    }

    async fn open(&self, file: Id) -> Result<Handle, Wrong> {
        let opened = self.fs.open(Ino(file.0), libc::O_RDWR).await;
        opened.map(|opened| opened.handle).map_err(|error| format!("open failed: {error}"))
    }

    async fn close(&self, handle: Handle) -> Result<(), Wrong> {
        self.fs.release(handle).await.map_err(|error| format!("close failed: {error}"))
    }

    /// `fsync` or `fdatasync` of a file or directory; of what cannot be opened, nothing.
    pub async fn fsync(&mut self, id: Id, data_only: bool) -> Result<(), Wrong> {
        let failed = |error: FsError| format!("fsync failed: {error}");
        let ino = Ino(id.0);
        let Some(node) = self.history.now().nodes.get(&id).cloned() else { return Ok(()) };
        match node.kind {
            Kind::File => {
                let handle = self.open(id).await?;
                self.fs.fsync(handle, data_only).await.map_err(failed)?;
                (self.mark)(Mark::Stable(self.history.promises.len()));
                self.close(handle).await?;
            }
            Kind::Dir(_) => {
                let handle = self.fs.opendir(ino).await.map_err(failed)?;
                self.fs.fsyncdir(handle).await.map_err(failed)?;
                (self.mark)(Mark::Stable(self.history.promises.len()));
                self.fs.releasedir(handle).await.map_err(failed)?;
            }
            Kind::Symlink(_) => return Ok(()),
        }
        let attr = self.fs.getattr(ino).await.map_err(failed)?.attr;
        self.history.synced(id, data_only, (!data_only).then(|| times_of(&attr)));
        Ok(())
    }

    /// `sync`: FUSE passes it on as an `fsync` of what is dirty; here, of every file and directory.
    pub async fn sync(&mut self) -> Result<(), Wrong> {
        let failed = |error: FsError| format!("sync failed: {error}");
        let tree = self.history.now().clone();
        for (id, _) in tree.nodes.iter().filter(|(_, node)| node.kind == Kind::File) {
            let handle = self.open(*id).await?;
            self.fs.fsync(handle, false).await.map_err(failed)?;
            self.close(handle).await?;
        }
        self.fs.store().commit().await.map_err(failed)?;
        (self.mark)(Mark::Stable(self.history.promises.len()));
        self.history.all_synced();
        Ok(())
    }

    /// A proper unmount: everything is stable.
    pub async fn unmount(&mut self) -> Result<(), Wrong> {
        for handle in std::mem::take(&mut self.held) {
            self.close(handle).await?;
        }
        self.fs.unmount().await.map_err(|error| format!("unmount failed: {error}"))?;
        (self.mark)(Mark::Stable(self.history.promises.len()));
        self.history.all_synced();
        Ok(())
    }
}
