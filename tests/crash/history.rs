//! What a user did, and so what a disk may show after a crash.
//!
//! Names and attributes change one operation at a time: after a crash they are what they were after one of the
//! operations, and not before the last that was made stable. The content of a file follows later, so that each
//! sector may be of any of the file's versions since the last stable one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use storage_control::WallTime;

/// An inode: its number, and the generation that tells it from others that have or had the number.
pub type Id = (u64, u64);

/// What an inode is.
#[derive(Clone, PartialEq, Debug)]
pub enum Kind {
    File,
    Dir(BTreeMap<String, Id>),
    Symlink(Vec<u8>),
}

/// An inode, but for a file's size and content.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    pub kind: Kind,
    pub perm: u32,
    pub nlink: u32,
    pub xattrs: BTreeMap<String, Arc<Vec<u8>>>,
}

impl Node {
    pub fn new(kind: Kind, perm: u32) -> Node {
        let nlink = if matches!(kind, Kind::Dir(_)) { 2 } else { 1 };
        Node { kind, perm, nlink, xattrs: BTreeMap::new() }
    }

    pub fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Dir(_))
    }
}

/// All inodes that have a name. Cheap to clone.
#[derive(Clone, PartialEq, Debug)]
pub struct Tree {
    pub root: Id,
    pub nodes: BTreeMap<Id, Arc<Node>>,
}

impl Tree {
    pub fn new(root: Id) -> Tree {
        let node = Arc::new(Node::new(Kind::Dir(BTreeMap::new()), 0o755));
        Tree { root, nodes: BTreeMap::from([(root, node)]) }
    }

    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[&id]
    }

    pub fn change(&mut self, id: Id) -> &mut Node {
        Arc::make_mut(self.nodes.get_mut(&id).expect("the inode is in the tree"))
    }

    pub fn names(&self, dir: Id) -> &BTreeMap<String, Id> {
        match &self.node(dir).kind {
            Kind::Dir(names) => names,
            Kind::File | Kind::Symlink(_) => panic!("{dir:?} is no directory"),
        }
    }

    pub fn find(&self, dir: Id, name: &str) -> Option<Id> {
        self.names(dir).get(name).copied()
    }

    fn names_mut(&mut self, dir: Id) -> &mut BTreeMap<String, Id> {
        match &mut self.change(dir).kind {
            Kind::Dir(names) => names,
            Kind::File | Kind::Symlink(_) => panic!("{dir:?} is no directory"),
        }
    }

    /// A new inode with a name.
    pub fn make(&mut self, dir: Id, name: &str, id: Id, node: Node) {
        self.change(dir).nlink += u32::from(node.is_dir());
        self.names_mut(dir).insert(name.to_owned(), id);
        self.nodes.insert(id, Arc::new(node));
    }

    pub fn link(&mut self, dir: Id, name: &str, id: Id) {
        self.names_mut(dir).insert(name.to_owned(), id);
        self.change(id).nlink += 1;
    }

    /// Takes a name away, and the inode with its last one.
    pub fn unlink(&mut self, dir: Id, name: &str) {
        let id = self.names_mut(dir).remove(name).expect("the name is there");
        self.lose_name(dir, id);
    }

    fn lose_name(&mut self, dir: Id, id: Id) {
        if self.node(id).is_dir() {
            self.change(dir).nlink -= 1;
            self.nodes.remove(&id);
        } else if self.node(id).nlink == 1 {
            self.nodes.remove(&id);
        } else {
            self.change(id).nlink -= 1;
        }
    }

    /// Gives an inode another name, which may have been another inode's.
    pub fn rename(&mut self, from: Id, name: &str, to: Id, new_name: &str) {
        let id = self.names_mut(from).remove(name).expect("the name is there");
        if let Some(victim) = self.names_mut(to).insert(new_name.to_owned(), id) {
            self.lose_name(to, victim);
        }
        if self.node(id).is_dir() {
            self.change(from).nlink -= 1;
            self.change(to).nlink += 1;
        }
    }

    /// Whether two trees are the same but for these names, what they stand for in either, and these inodes.
    pub fn is_but_for(&self, other: &Tree, names: &[(Id, &str)], ids: &[Id]) -> bool {
        let of = |tree: &Tree| -> BTreeSet<Id> {
            let here = |(dir, name): &(Id, &str)| tree.nodes.get(dir).and_then(|_| tree.find(*dir, name));
            names.iter().filter_map(here).collect()
        };
        let open: BTreeSet<Id> = of(self).into_iter().chain(of(other)).chain(ids.iter().copied()).collect();
        let all: BTreeSet<Id> = self.nodes.keys().chain(other.nodes.keys()).copied().collect();
        all.difference(&open).all(|id| {
            let (Some(one), Some(two)) = (self.nodes.get(id), other.nodes.get(id)) else { return false };
            let hidden: Vec<&str> =
                names.iter().filter(|(dir, _)| dir == id).map(|(_, name)| *name).collect();
            if hidden.is_empty() {
                return one == two;
            }
            let rest = |node: &Node| match &node.kind {
                Kind::Dir(names) => {
                    let mut names = names.clone();
                    names.retain(|name, _| !hidden.contains(&name.as_str()));
                    Some(names)
                }
                Kind::File | Kind::Symlink(_) => None,
            };
            rest(one) == rest(two) && (one.perm, &one.xattrs) == (two.perm, &two.xattrs)
        })
    }

    /// What another tree has otherwise, in words.
    pub fn difference(&self, other: &Tree) -> String {
        let all = self.nodes.keys().chain(other.nodes.keys());
        let mut lines: Vec<String> = all
            .filter(|id| self.nodes.get(id) != other.nodes.get(id))
            .map(|id| {
                format!("  {id:?}: {} instead of {}", short(other.nodes.get(id)), short(self.nodes.get(id)))
            })
            .collect();
        lines.sort();
        lines.dedup();
        lines.join("\n")
    }
}

fn short(node: Option<&Arc<Node>>) -> String {
    let Some(node) = node else { return "nothing".into() };
    let kind = match &node.kind {
        Kind::File => "file".into(),
        Kind::Dir(names) => {
            let names: Vec<String> =
                names.iter().filter(|(n, _)| n.len() < 20).map(|(n, id)| format!("{n}={}", id.0)).collect();
            format!("directory {names:?}")
        }
        Kind::Symlink(target) => format!("symlink of {} bytes", target.len()),
    };
    let xattrs: Vec<String> =
        node.xattrs.iter().map(|(name, value)| format!("{name}={} bytes", value.len())).collect();
    format!("{kind}, {:o}, {} names, {xattrs:?}", node.perm, node.nlink)
}

/// Content that a file once had.
#[derive(Clone, Debug)]
pub struct Version {
    /// The operation that made it.
    pub operation: usize,
    /// The last operation until then that changed more than bytes in place.
    pub sized: usize,
    pub bytes: Arc<Vec<u8>>,
}

/// What was promised to be stable at one point.
#[derive(Clone, Debug, Default)]
pub struct Promise {
    /// Names and attributes are at least as they were after this operation, as far as its node changed them.
    pub names: usize,
    pub node: u16,
    /// Files' content is at least this version.
    pub contents: Vec<(Id, usize)>,
    /// Modification and change time of an inode after an operation.
    pub times: Option<(Id, usize, [WallTime; 2])>,
}

/// All of it. Operations are numbered from 1; 0 is what was there before, all of it stable.
#[derive(Clone, Debug)]
pub struct History {
    /// The node that acts.
    pub node: u16,
    /// Names and attributes after each operation.
    pub trees: Vec<Tree>,
    /// Whose operation it was.
    pub by: Vec<u16>,
    /// Content of each file that ever was, oldest first.
    pub contents: BTreeMap<Id, Vec<Version>>,
    /// The operations that changed an inode.
    touched: BTreeMap<Id, Touched>,
    pub promises: Vec<Promise>,
}

/// Numbers of operations.
#[derive(Clone, Debug, Default)]
struct Touched {
    all: Vec<usize>,
    /// The last that changed more than content and size.
    but_for_content: usize,
}

impl History {
    pub fn new(root: Id) -> History {
        History {
            node: 0,
            trees: vec![Tree::new(root)],
            by: vec![0],
            contents: BTreeMap::new(),
            touched: BTreeMap::new(),
            promises: Vec::new(),
        }
    }

    /// The history that starts with what is there now, which is all stable.
    pub fn starting(tree: Tree, contents: impl IntoIterator<Item = (Id, Arc<Vec<u8>>)>) -> History {
        let first = |(id, bytes)| (id, vec![Version { operation: 0, sized: 0, bytes }]);
        let contents = contents.into_iter().map(first).collect();
        History { contents, trees: vec![tree.clone()], ..History::new(tree.root) }
    }

    /// The history that starts with the end of this one.
    pub fn begin_here(&self) -> History {
        let tree = self.now().clone();
        let contents = tree.nodes.keys().filter_map(|id| Some((*id, self.content(*id)?)));
        History::starting(tree.clone(), contents)
    }

    pub fn now(&self) -> &Tree {
        self.trees.last().expect("a history has a beginning")
    }

    /// The number of the last operation.
    pub fn last(&self) -> usize {
        self.trees.len() - 1
    }

    pub fn content(&self, id: Id) -> Option<Arc<Vec<u8>>> {
        self.contents.get(&id)?.last().map(|version| version.bytes.clone())
    }

    /// An operation ended, and left this.
    pub fn done(&mut self, tree: Tree) {
        self.trees.push(tree);
        self.by.push(self.node);
    }

    /// The operation that is being recorded gave a file this content, or with `in_place` bytes where it had some.
    pub fn new_content(&mut self, id: Id, operation: usize, bytes: Vec<u8>, in_place: bool) {
        let versions = self.contents.entry(id).or_default();
        let before = versions.last().map(|version| version.sized).filter(|_| in_place);
        let sized = before.unwrap_or(operation);
        versions.push(Version { operation, sized, bytes: Arc::new(bytes) });
    }

    /// The operation changed these inodes; with `content_only`, nothing but content and size.
    pub fn touch(&mut self, operation: usize, ids: &[Id], content_only: bool) {
        for id in ids {
            let touched = self.touched.entry(*id).or_default();
            touched.all.push(operation);
            if !content_only {
                touched.but_for_content = operation;
            }
        }
    }

    fn touches(&self, id: Id) -> &[usize] {
        self.touched.get(&id).map_or(&[], |touched| &touched.all)
    }

    /// What there would be without some operations, which no later one built on.
    pub fn without(&self, dropped: &[usize]) -> Tree {
        let mut tree = self.trees[0].clone();
        for n in (1..self.trees.len()).filter(|n| !dropped.contains(n)) {
            let (before, after) = (&self.trees[n - 1].nodes, &self.trees[n].nodes);
            for id in before.keys().filter(|id| !after.contains_key(id)) {
                tree.nodes.remove(id);
            }
            for (id, node) in after.iter().filter(|(id, node)| before.get(id) != Some(node)) {
                tree.nodes.insert(*id, node.clone());
            }
        }
        tree
    }

    /// Forgets what came after an operation.
    pub fn forget_after(&mut self, last: usize) {
        self.trees.truncate(last + 1);
        self.by.truncate(last + 1);
        self.promises.retain(|promise| promise.names <= last);
        for versions in self.contents.values_mut() {
            versions.retain(|version| version.operation <= last);
        }
        self.contents.retain(|_, versions| !versions.is_empty());
        self.touched.values_mut().for_each(|touched| touched.all.retain(|n| *n <= last));
    }

    /// Whether another node changed something later that this operation changed.
    pub fn is_followed_by_another(&self, operation: usize) -> bool {
        let others = |n: &usize| *n > operation && self.by[*n] != self.by[operation];
        self.touched
            .values()
            .any(|touched| touched.all.contains(&operation) && touched.all.iter().any(others))
    }

    /// Whether an operation after `from`, up to `to`, changed the inode.
    pub fn is_touched(&self, id: Id, from: usize, to: usize) -> bool {
        self.touches(id).iter().any(|n| from < *n && *n <= to)
    }

    /// An `fsync` of an inode returned, or an `fdatasync`, which promises no more of names than what concerns the inode; `times` as it was then. Returns the promise's number.
    pub fn synced(&mut self, id: Id, data_only: bool, times: Option<[WallTime; 2]>) -> usize {
        let names = match self.touched.get(&id) {
            Some(touched) if data_only => touched.but_for_content,
            Some(touched) => touched.all.last().copied().unwrap_or(0),
            None => 0,
        };
        let contents = self.contents.get(&id).map(|versions| (id, versions.len() - 1)).into_iter().collect();
        let times = times.map(|times| (id, self.last(), times));
        self.promises.push(Promise { names, node: self.by[names], contents, times });
        self.promises.len() - 1
    }

    /// Everything that this node changed is stable, and all content.
    pub fn all_synced(&mut self) -> usize {
        let contents = self.contents.iter().map(|(id, versions)| (*id, versions.len() - 1)).collect();
        self.promises.push(Promise { names: self.last(), node: self.node, contents, times: None });
        self.promises.len() - 1
    }
}
