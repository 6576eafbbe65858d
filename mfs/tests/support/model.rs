//! A reference filesystem: the plainest thing that behaves as POSIX says. Operations are drawn at random and carried
//! out on both; results and trees are compared.

use std::collections::BTreeMap;

use mfs::Filesystem;
use mfs::ops::{Handle, Ino, Operations, RenameFlags, SetAttr, XattrSet};
use proptest::prelude::*;

use super::{ME, Short, pattern};

/// A directory or file of the model, by its index among all that ever were.
type Id = usize;

#[derive(Clone, Debug, PartialEq)]
enum Body {
    File(Vec<u8>),
    Dir(BTreeMap<String, Id>),
    Link(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq)]
struct Node {
    body: Body,
    nlink: u32,
    mode: u32,
    xattrs: BTreeMap<String, Vec<u8>>,
    parent: Id,
}

/// One operation. Numbers choose among what there is.
#[derive(Clone, Debug)]
pub enum Op {
    Create { dir: usize, name: u8 },
    Mkdir { dir: usize, name: u8 },
    Symlink { dir: usize, name: u8 },
    Link { file: usize, dir: usize, name: u8 },
    Unlink { dir: usize, name: u8 },
    Rmdir { dir: usize, name: u8 },
    Rename { from: usize, name: u8, to: usize, new_name: u8, flags: u8 },
    Write { file: usize, offset: u32, len: u32, seed: u8 },
    Append { file: usize, len: u16, seed: u8 },
    Truncate { file: usize, size: u32 },
    Chmod { node: usize, mode: u16 },
    SetXattr { node: usize, name: u8, len: u16 },
    RemoveXattr { node: usize, name: u8 },
    Check { file: usize },
    Fsync { file: usize },
    Wait { secs: u8 },
    Remount,
}

pub fn op() -> impl Strategy<Value = Op> {
    let n = || 0..64_usize;
    let name = || 0..6_u8;
    let offset = prop_oneof![0..10_000_u32, 0..400_000_u32, Just(4096), Just(3840), Just(65_536)];
    let size = prop_oneof![0..10_000_u32, 0..400_000_u32, Just(0), Just(4096)];
    let len = prop_oneof![1..5000_u32, 1..100_000_u32, Just(4096), Just(65_536)];
    prop_oneof![
        6 => (n(), name()).prop_map(|(dir, name)| Op::Create { dir, name }),
        4 => (n(), name()).prop_map(|(dir, name)| Op::Mkdir { dir, name }),
        1 => (n(), name()).prop_map(|(dir, name)| Op::Symlink { dir, name }),
        2 => (n(), n(), name()).prop_map(|(file, dir, name)| Op::Link { file, dir, name }),
        3 => (n(), name()).prop_map(|(dir, name)| Op::Unlink { dir, name }),
        2 => (n(), name()).prop_map(|(dir, name)| Op::Rmdir { dir, name }),
        6 => (n(), name(), n(), name(), 0..3_u8)
            .prop_map(|(from, name, to, new_name, flags)| Op::Rename { from, name, to, new_name, flags }),
        8 => (n(), offset, len, any::<u8>())
            .prop_map(|(file, offset, len, seed)| Op::Write { file, offset, len, seed }),
        2 => (n(), 1..9000_u16, any::<u8>()).prop_map(|(file, len, seed)| Op::Append { file, len, seed }),
        4 => (n(), size).prop_map(|(file, size)| Op::Truncate { file, size }),
        1 => (n(), 0..0o7777_u16).prop_map(|(node, mode)| Op::Chmod { node, mode }),
        2 => (n(), name(), prop_oneof![0..100_u16, 0..9000_u16])
            .prop_map(|(node, name, len)| Op::SetXattr { node, name, len }),
        1 => (n(), name()).prop_map(|(node, name)| Op::RemoveXattr { node, name }),
        3 => n().prop_map(|file| Op::Check { file }),
        2 => n().prop_map(|file| Op::Fsync { file }),
        2 => (0..9_u8).prop_map(|secs| Op::Wait { secs }),
        1 => Just(Op::Remount),
    ]
}

/// The model and what its nodes are in the filesystem.
#[derive(Clone)]
pub struct Model {
    nodes: Vec<Node>,
    inos: Vec<Ino>,
    /// Files as they were at their `fsync`, unless they changed since.
    synced: BTreeMap<Id, Node>,
}

type Answer = Result<(), i32>;

fn errno<T>(result: mfs::ops::Result<T>) -> Answer {
    result.map(drop).map_err(|error| error.errno())
}

fn name_of(name: u8) -> String {
    // One of them long, so that directories outgrow their dinode.
    if name == 5 { "n".repeat(200) } else { format!("n{name}") }
}

impl Model {
    pub fn new(root: Ino) -> Self {
        let body = Body::Dir(BTreeMap::new());
        let root_node = Node { body, nlink: 2, mode: 0o755, xattrs: BTreeMap::new(), parent: 0 };
        Self { nodes: vec![root_node], inos: vec![root], synced: BTreeMap::new() }
    }

    fn entries(&mut self, dir: Id) -> &mut BTreeMap<String, Id> {
        match &mut self.nodes[dir].body {
            Body::Dir(entries) => entries,
            Body::File(_) | Body::Link(_) => panic!("a directory was chosen"),
        }
    }

    fn is_dir(&self, id: Id) -> bool {
        matches!(self.nodes[id].body, Body::Dir(_))
    }

    /// A living node that fits, chosen by a number.
    fn choose(&self, n: usize, fits: impl Fn(&Node) -> bool) -> Option<Id> {
        let living: Vec<Id> =
            (0..self.nodes.len()).filter(|id| self.nodes[*id].nlink > 0 && fits(&self.nodes[*id])).collect();
        (!living.is_empty()).then(|| living[n % living.len()])
    }

    fn dir(&self, n: usize) -> Id {
        self.choose(n, |node| matches!(node.body, Body::Dir(_))).expect("there is a root")
    }

    fn file(&self, n: usize) -> Option<Id> {
        self.choose(n, |node| matches!(node.body, Body::File(_)))
    }

    fn add(&mut self, dir: Id, name: String, body: Body, mode: u32) -> Result<Id, i32> {
        let id = self.nodes.len();
        if self.entries(dir).contains_key(&name) {
            return Err(libc::EEXIST);
        }
        self.entries(dir).insert(name, id);
        let is_dir = matches!(body, Body::Dir(_));
        self.nodes[dir].nlink += u32::from(is_dir);
        let nlink = if is_dir { 2 } else { 1 };
        self.nodes.push(Node { body, nlink, mode, xattrs: BTreeMap::new(), parent: dir });
        Ok(id)
    }

    fn remove(&mut self, dir: Id, name: &str, want_dir: bool) -> Answer {
        let id = *self.entries(dir).get(name).ok_or(libc::ENOENT)?;
        match (&self.nodes[id].body, want_dir) {
            (Body::Dir(entries), true) if !entries.is_empty() => return Err(libc::ENOTEMPTY),
            (Body::Dir(_), false) => return Err(libc::EISDIR),
            (Body::File(_) | Body::Link(_), true) => return Err(libc::ENOTDIR),
            _ => {}
        }
        self.entries(dir).remove(name);
        self.drop_name(dir, id);
        Ok(())
    }

    fn drop_name(&mut self, dir: Id, id: Id) {
        if self.is_dir(id) {
            self.nodes[dir].nlink -= 1;
            self.nodes[id].nlink = 0;
        } else {
            self.nodes[id].nlink -= 1;
        }
    }

    fn is_above(&self, id: Id, below: Id) -> bool {
        let mut at = below;
        loop {
            if at == id {
                return true;
            }
            if at == 0 {
                return false;
            }
            at = self.nodes[at].parent;
        }
    }

    fn rename(&mut self, from: Id, name: &str, to: Id, new_name: &str, flags: u8) -> Answer {
        let source = self.entries(from).get(name).copied();
        let target = self.entries(to).get(new_name).copied();
        if let Some(source) = source
            && from != to
            && self.is_dir(source)
            && self.is_above(source, to)
        {
            return Err(libc::EINVAL);
        }
        if let Some(target) = target
            && from != to
            && self.is_dir(target)
            && (source.is_some_and(|s| self.is_dir(s)) || flags == 2)
            && self.is_above(target, from)
        {
            return Err(if flags == 2 { libc::EINVAL } else { libc::ENOTEMPTY });
        }
        let source = source.ok_or(libc::ENOENT)?;
        if flags == 1 && target.is_some() {
            return Err(libc::EEXIST);
        }
        if flags == 2 && target.is_none() {
            return Err(libc::ENOENT);
        }
        if target == Some(source) {
            return Ok(());
        }
        if let Some(target) = target
            && flags == 2
        {
            self.entries(from).insert(name.to_owned(), target);
            self.entries(to).insert(new_name.to_owned(), source);
            for (id, old, new) in [(source, from, to), (target, to, from)] {
                self.reparent(id, old, new);
            }
            return Ok(());
        }
        if let Some(target) = target {
            match (self.is_dir(source), self.is_dir(target)) {
                (true, false) => return Err(libc::ENOTDIR),
                (false, true) => return Err(libc::EISDIR),
                _ => {}
            }
            if let Body::Dir(entries) = &self.nodes[target].body
                && !entries.is_empty()
            {
                return Err(libc::ENOTEMPTY);
            }
            self.drop_name(to, target);
        }
        self.entries(from).remove(name);
        self.entries(to).insert(new_name.to_owned(), source);
        self.reparent(source, from, to);
        Ok(())
    }

    fn reparent(&mut self, id: Id, old: Id, new: Id) {
        if self.is_dir(id) {
            self.nodes[old].nlink -= 1;
            self.nodes[new].nlink += 1;
        }
        self.nodes[id].parent = new;
    }

    fn bytes(&mut self, file: Id) -> &mut Vec<u8> {
        match &mut self.nodes[file].body {
            Body::File(bytes) => bytes,
            Body::Dir(_) | Body::Link(_) => panic!("a file was chosen"),
        }
    }

    fn write(&mut self, file: Id, offset: usize, data: &[u8]) {
        let bytes = self.bytes(file);
        if bytes.len() < offset + data.len() {
            bytes.resize(offset + data.len(), 0);
        }
        bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    /// Carries out an operation on both and compares the answers. `Remount` is the caller's.
    pub async fn apply(&mut self, fs: &Filesystem, op: &Op) {
        self.carry_out(fs, op).await;
        let Self { nodes, synced, .. } = self;
        synced.retain(|id, node| nodes[*id] == *node);
    }

    async fn carry_out(&mut self, fs: &Filesystem, op: &Op) {
        match *op {
            Op::Create { dir, name } => {
                let (dir, name) = (self.dir(dir), name_of(name));
                let flags = libc::O_RDWR | libc::O_EXCL;
                let got = fs.create(ME, self.inos[dir], name.as_bytes(), 0o640, flags).await;
                if let Ok((_, opened)) = &got {
                    fs.release(opened.handle).await.unwrap();
                }
                let wanted = self.add(dir, name, Body::File(Vec::new()), 0o640);
                self.made(fs, got.map(|(attr, _)| attr.ino), wanted);
            }
            Op::Mkdir { dir, name } => {
                let (dir, name) = (self.dir(dir), name_of(name));
                let got = fs.mkdir(ME, self.inos[dir], name.as_bytes(), 0o750).await;
                let inherited = self.nodes[dir].mode & libc::S_ISGID;
                let wanted = self.add(dir, name, Body::Dir(BTreeMap::new()), 0o750 | inherited);
                self.made(fs, got.map(|attr| attr.ino), wanted);
            }
            Op::Symlink { dir, name } => {
                let (dir, name) = (self.dir(dir), name_of(name));
                let target = name.repeat(3).into_bytes();
                let got = fs.symlink(ME, self.inos[dir], name.as_bytes(), &target).await;
                let wanted = self.add(dir, name, Body::Link(target), 0o777);
                self.made(fs, got.map(|attr| attr.ino), wanted);
            }
            Op::Link { file, dir, name } => {
                let Some(file) = self.choose(file, |node| !matches!(node.body, Body::Dir(_))) else { return };
                let (dir, name) = (self.dir(dir), name_of(name));
                let got = fs.link(self.inos[file], self.inos[dir], name.as_bytes()).await;
                if got.is_ok() {
                    fs.forget(self.inos[file], 1);
                }
                let wanted = match self.entries(dir).contains_key(&name) {
                    true => Err(libc::EEXIST),
                    false => {
                        self.entries(dir).insert(name, file);
                        self.nodes[file].nlink += 1;
                        Ok(())
                    }
                };
                assert_eq!(errno(got), wanted);
            }
            Op::Unlink { dir, name } | Op::Rmdir { dir, name } => {
                let (dir, name) = (self.dir(dir), name_of(name));
                let want_dir = matches!(op, Op::Rmdir { .. });
                let got = match want_dir {
                    true => fs.rmdir(self.inos[dir], name.as_bytes()).await,
                    false => fs.unlink(self.inos[dir], name.as_bytes()).await,
                };
                assert_eq!(errno(got), self.remove(dir, &name, want_dir));
            }
            Op::Rename { from, name, to, new_name, flags } => {
                let (from, to) = (self.dir(from), self.dir(to));
                let (name, new_name) = (name_of(name), name_of(new_name));
                let how = RenameFlags { no_replace: flags == 1, exchange: flags == 2 };
                let (a, b) = (self.inos[from], self.inos[to]);
                let got = fs.rename(a, name.as_bytes(), b, new_name.as_bytes(), how).await;
                assert_eq!(errno(got), self.rename(from, &name, to, &new_name, flags));
            }
            Op::Write { file, offset, len, seed } => {
                let Some(file) = self.file(file) else { return };
                let data = pattern(seed.into(), len as usize);
                let handle = self.open(fs, file).await;
                fs.put(handle, offset.into(), &data).await.unwrap();
                fs.release(handle).await.unwrap();
                self.write(file, offset as usize, &data);
            }
            Op::Append { file, len, seed } => {
                let Some(file) = self.file(file) else { return };
                let data = pattern(seed.into(), len.into());
                let handle = self.open(fs, file).await;
                fs.append(handle, &data).await.unwrap();
                fs.release(handle).await.unwrap();
                let end = self.bytes(file).len();
                self.write(file, end, &data);
            }
            Op::Truncate { file, size } => {
                let Some(file) = self.file(file) else { return };
                fs.resize(self.inos[file], size.into()).await.unwrap();
                self.bytes(file).resize(size as usize, 0);
            }
            Op::Chmod { node, mode } => {
                let node = self.choose(node, |_| true).expect("there is a root");
                let set = SetAttr { mode: Some(mode.into()), ..SetAttr::default() };
                fs.setattr(self.inos[node], set).await.unwrap();
                self.nodes[node].mode = mode.into();
            }
            Op::SetXattr { node, name, len } => {
                let node = self.choose(node, |_| true).expect("there is a root");
                let (name, value) = (format!("user.{}", name_of(name)), pattern(len.into(), len.into()));
                fs.setxattr(self.inos[node], name.as_bytes(), &value, XattrSet::Any).await.unwrap();
                self.nodes[node].xattrs.insert(name, value);
            }
            Op::RemoveXattr { node, name } => {
                let node = self.choose(node, |_| true).expect("there is a root");
                let name = format!("user.{}", name_of(name));
                let got = fs.removexattr(self.inos[node], name.as_bytes()).await;
                let wanted = self.nodes[node].xattrs.remove(&name).map(drop).ok_or(libc::ENODATA);
                assert_eq!(errno(got), wanted);
            }
            Op::Check { file } => {
                if let Some(file) = self.file(file) {
                    assert!(fs.whole(self.inos[file]).await == *self.bytes(file), "content differs");
                }
            }
            Op::Fsync { file } => {
                if let Some(file) = self.file(file) {
                    let handle = self.open(fs, file).await;
                    fs.fsync(handle, false).await.unwrap();
                    fs.release(handle).await.unwrap();
                    self.synced.insert(file, self.nodes[file].clone());
                }
            }
            Op::Wait { .. } | Op::Remount => {}
        }
    }

    async fn open(&self, fs: &Filesystem, file: Id) -> Handle {
        fs.open(self.inos[file], libc::O_RDWR).await.unwrap().handle
    }

    fn made(&mut self, fs: &Filesystem, got: mfs::ops::Result<Ino>, wanted: Result<Id, i32>) {
        match (got, wanted) {
            (Ok(ino), Ok(id)) => {
                assert_eq!(id, self.inos.len());
                self.inos.push(ino);
                // Whoever uses the number next, on any node, has not looked it up.
                fs.forget(ino, 1);
            }
            (Err(got), Err(wanted)) => assert_eq!(got.errno(), wanted),
            (got, wanted) => panic!("got {got:?}, wanted {wanted:?}"),
        }
    }

    /// Compares everything that can be reached.
    pub async fn compare(&self, fs: &Filesystem) {
        for (id, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.nlink > 0) {
            self.compare_node(fs, id, node).await;
        }
    }

    /// Compares what a crash must leave; returns how many files that are.
    pub async fn compare_synced(&self, fs: &Filesystem) -> usize {
        for (id, node) in &self.synced {
            self.compare_node(fs, *id, node).await;
        }
        self.synced.len()
    }

    async fn compare_node(&self, fs: &Filesystem, id: Id, node: &Node) {
        {
            let ino = self.inos[id];
            let attr = fs.getattr(ino).await.unwrap().attr;
            assert_eq!((attr.nlink, attr.mode & 0o7777), (node.nlink, node.mode), "node {id}");
            match &node.body {
                Body::File(bytes) => {
                    assert_eq!(attr.size, bytes.len() as u64);
                    assert!(fs.whole(ino).await == *bytes, "content of node {id}");
                }
                Body::Link(target) => assert_eq!(fs.readlink(ino).await.unwrap(), *target),
                Body::Dir(entries) => {
                    let mut wanted: Vec<String> = entries.keys().cloned().collect();
                    wanted.extend([".".into(), "..".into()]);
                    wanted.sort();
                    assert_eq!(fs.names(ino).await, wanted);
                    for (name, child) in entries {
                        let found = fs.lookup(ino, name.as_bytes()).await.unwrap().ino;
                        assert_eq!(found, self.inos[*child]);
                        fs.forget(found, 1);
                    }
                }
            }
            let names = fs.listxattr(ino).await.unwrap();
            assert_eq!(
                names,
                node.xattrs.keys().flat_map(|n| [n.as_bytes(), b"\0"].concat()).collect::<Vec<_>>()
            );
            for (name, value) in &node.xattrs {
                assert_eq!(fs.getxattr(ino, name.as_bytes()).await.unwrap(), *value);
            }
        }
    }
}
