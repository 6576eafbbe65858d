//! Stories of the lock manager, each as the transcript of what nodes say.
//!
//! Nodes are `a`, `b`, `c`; resource `a1` is mastered by `a` in the first view. A line `b>a` is a message on its
//! arrival, `b:` what the node's own core says to it.

mod locking;
mod views;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::sync::Arc;

use dlm::{Body, Departed, Dlm, Epoch, Fault, Message, Mode, Mode::*, Op, Output, Resource, ValueBlock};
use membership::ShardMap;
use storage_control::{Generation, Incarnation, Instant, NodeId};

struct Cluster {
    nodes: BTreeMap<NodeId, Dlm>,
    wire: VecDeque<(NodeId, NodeId, Message)>,
    names: BTreeMap<Resource, String>,
    epoch: Epoch,
    transcript: String,
}

const A: NodeId = NodeId(0);
const B: NodeId = NodeId(1);
const C: NodeId = NodeId(2);
const NOW: Instant = Instant(1_000_000_000);

fn letter(node: NodeId) -> char {
    char::from(b'a' + node.0 as u8)
}

impl Cluster {
    /// Members `a`.. and two resources mastered by each: `a1`, `a2`, `b1`...
    fn new(count: u16) -> Cluster {
        let nodes: BTreeSet<NodeId> = (0..count).map(NodeId).collect();
        let shards = ShardMap::all_to(A).deal(&nodes);
        let mut names = BTreeMap::new();
        for node in &nodes {
            let all =
                (0..100_000u64).map(|n| Resource { shard: (n % 1024) as u16, kind: 1, number: n, part: 0 });
            let own = all.filter(|res| res.partition() == 0 && shards.get(res.shard) == Some(*node));
            names.extend(own.take(2).zip(1..).map(|(res, n)| (res, format!("{}{n}", letter(*node)))));
        }
        let members = nodes.iter().map(|node| (*node, Incarnation(1))).collect();
        let epoch = Epoch { generation: Generation(1), members, shards, recoveries: Vec::new() };
        let cores = nodes.iter().map(|node| (*node, Dlm::new(*node, Incarnation(1), 0))).collect();
        let mut cluster =
            Cluster { nodes: cores, wire: VecDeque::new(), names, epoch, transcript: String::new() };
        cluster.install_everywhere();
        cluster.deliver();
        cluster.transcript.clear();
        cluster
    }

    fn res(&self, name: &str) -> Resource {
        *self.names.iter().find(|(_, known)| *known == name).expect("a name of the story").0
    }

    fn line(&mut self, line: String) {
        let mut line = line;
        for (res, name) in &self.names {
            line = line.replace(&res.to_string(), name);
        }
        writeln!(self.transcript, "{line}").expect("a string grows");
    }

    fn core(&mut self, node: NodeId) -> &mut Dlm {
        self.nodes.get_mut(&node).expect("a node of the story")
    }

    fn drain(&mut self, node: NodeId) {
        let me = letter(node);
        while let Some(output) = self.core(node).poll() {
            match output {
                Output::Send { to, message } => self.wire.push_back((node, to, message)),
                Output::Granted { res, mode, value: None } => self.line(format!("{me}: holds {res} {mode}")),
                Output::Granted { res, mode, value: Some(value) } => {
                    self.line(format!("{me}: holds {res} {mode}, value {:?}", value.block));
                }
                Output::Refused { res, why } => self.line(format!("{me}: refused {res}, {why:?}")),
                Output::Blocking { res, wanted } => self.line(format!("{me}: in the way of {res} {wanted}")),
                Output::Fault { from, fault } => self.line(format!("{me}: fault of {from}: {fault}")),
            }
        }
        self.nodes[&node].assert_consistent();
    }

    fn ask(&mut self, node: NodeId, name: &str, mode: Mode) {
        let res = self.res(name);
        self.core(node).request(NOW, res, mode, false);
        self.drain(node);
    }

    fn try_ask(&mut self, node: NodeId, name: &str, mode: Mode) {
        let res = self.res(name);
        self.core(node).request(NOW, res, mode, true);
        self.drain(node);
    }

    fn down(&mut self, node: NodeId, name: &str, to: Mode) {
        self.write_down(node, name, to, None);
    }

    fn write_down(&mut self, node: NodeId, name: &str, to: Mode, value: Option<u8>) {
        let res = self.res(name);
        let value = value.map(|first| {
            let mut block = ValueBlock([0; 64]);
            block.0[0] = first;
            block
        });
        self.core(node).downconvert(NOW, res, to, value);
        self.drain(node);
    }

    fn cancel(&mut self, node: NodeId, name: &str) {
        let res = self.res(name);
        self.core(node).cancel(NOW, res);
        self.drain(node);
    }

    /// Delivers what is on the wire, and what comes of it.
    fn deliver(&mut self) {
        while let Some((from, to, message)) = self.wire.pop_front() {
            self.arrive(from, to, message);
        }
    }

    fn arrive(&mut self, from: NodeId, to: NodeId, message: Message) {
        if !self.nodes.contains_key(&to) {
            return;
        }
        let what = match &message.body {
            Body::Ask { res, want, no_queue: false, .. } => format!("ask {res} {want}"),
            Body::Ask { res, want, no_queue: true, .. } => format!("try {res} {want}"),
            Body::Cancel { res, .. } => format!("cancel {res}"),
            Body::Down { res, to, .. } => format!("down {res} {to}"),
            Body::Granted { res, mode, .. } => format!("granted {res} {mode}"),
            Body::Refused { res, why, .. } => format!("refused {res} {why:?}"),
            Body::Blocking { res, wanted } => format!("blocking {res} {wanted}"),
            Body::Report { entries, last: true, .. } => {
                let told = entries.iter().map(|entry| match entry.ask {
                    Some(ask) => format!(" {} {} wants {}", entry.res, entry.held, ask.want),
                    None => format!(" {} {}", entry.res, entry.held),
                });
                format!("report{}", told.collect::<String>())
            }
            Body::Report { last: false, .. } => "report, more follows".to_string(),
        };
        self.line(format!("{}>{} {what}", letter(from), letter(to)));
        self.core(to).message(NOW, from, message).expect("members are correct");
        self.drain(to);
    }

    fn install_everywhere(&mut self) {
        let members: Vec<NodeId> = self.epoch.members.keys().copied().collect();
        members.into_iter().for_each(|node| self.install(node));
    }

    fn install(&mut self, node: NodeId) {
        let epoch = Arc::new(self.epoch.clone());
        self.core(node).install_view(NOW, epoch);
        self.drain(node);
    }

    /// The next view; nobody has it yet.
    fn next_view(&mut self) {
        self.epoch.generation.0 += 1;
        let nodes = self.epoch.members.keys().copied().collect();
        self.epoch.shards = self.epoch.shards.deal(&nodes);
    }

    /// The node is gone, with all that it sent and all that was sent to it.
    fn dies(&mut self, node: NodeId) {
        self.nodes.remove(&node);
        self.wire.retain(|(from, to, _)| *from != node && *to != node);
        let incarnation = self.epoch.members.remove(&node).expect("a member dies");
        self.epoch.recoveries.push(Departed { node, incarnation, fenced: false });
        self.next_view();
    }

    fn fenced(&mut self, node: NodeId) {
        self.everywhere(|core| core.fenced(NOW, node, Incarnation(1)));
    }

    fn recovered(&mut self, node: NodeId) {
        self.everywhere(|core| core.recovered(NOW, node, Incarnation(1)));
    }

    fn everywhere(&mut self, mut f: impl FnMut(&mut Dlm)) {
        for node in self.nodes.keys().copied().collect::<Vec<_>>() {
            f(self.core(node));
            self.drain(node);
        }
    }

    #[track_caller]
    fn says(&mut self, expected: &str) {
        let expected: Vec<&str> = expected.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let said = std::mem::take(&mut self.transcript);
        assert_eq!(said.lines().collect::<Vec<_>>(), expected);
    }
}
