//! Stories of the lock manager, each as the transcript of what nodes say.
//!
//! Nodes are `a`, `b`, `c`; resource `a1` is mastered by `a` in the first view. A line `b>a` is a message on its
//! arrival, `b:` what the node's own core says to it.

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

#[test]
fn a_master_locks_its_own_without_a_message() {
    let mut cluster = Cluster::new(2);
    cluster.ask(A, "a1", EX);
    cluster.says("a: holds a1 EX");
    cluster.down(A, "a1", NL);
    assert!(cluster.wire.is_empty());
}

#[test]
fn a_request_elsewhere_takes_one_round_trip() {
    let mut cluster = Cluster::new(2);
    cluster.ask(B, "a1", PR);
    cluster.deliver();
    cluster.says(
        "b>a ask a1 PR
         a>b granted a1 PR
         b: holds a1 PR",
    );
}

#[test]
fn each_holder_is_called_back_once_for_each_wanted_mode() {
    let mut cluster = Cluster::new(4);
    let d = NodeId(3);
    cluster.ask(B, "a1", EX);
    cluster.ask(C, "a1", PR);
    cluster.ask(d, "a1", PR);
    cluster.deliver();
    cluster.says(
        "b>a ask a1 EX
         c>a ask a1 PR
         d>a ask a1 PR
         a>b granted a1 EX
         b: holds a1 EX
         a>b blocking a1 PR
         b: in the way of a1 PR",
    );
    cluster.down(B, "a1", PR);
    cluster.deliver();
    cluster.says(
        "b>a down a1 PR
         a>c granted a1 PR
         c: holds a1 PR
         a>d granted a1 PR
         d: holds a1 PR",
    );
}

#[test]
fn a_conversion_goes_before_those_who_hold_nothing() {
    let mut cluster = Cluster::new(3);
    cluster.ask(A, "a1", PR);
    cluster.ask(B, "a1", PR);
    cluster.deliver();
    cluster.ask(C, "a1", EX);
    cluster.deliver();
    cluster.ask(B, "a1", EX);
    cluster.deliver();
    cluster.transcript.clear();
    cluster.down(A, "a1", NL);
    cluster.deliver();
    cluster.says(
        "a>b granted a1 EX
         b: holds a1 EX
         a>b blocking a1 EX
         b: in the way of a1 EX",
    );
}

#[test]
fn of_two_readers_who_both_want_to_write_the_second_must_give_up_first() {
    let mut cluster = Cluster::new(3);
    cluster.ask(B, "a1", PR);
    cluster.ask(C, "a1", PR);
    cluster.deliver();
    cluster.transcript.clear();
    cluster.ask(B, "a1", EX);
    cluster.ask(C, "a1", EX);
    cluster.deliver();
    cluster.says(
        "b>a ask a1 EX
         c>a ask a1 EX
         a>c blocking a1 EX
         c: in the way of a1 EX
         a>c refused a1 Deadlock
         c: refused a1, Deadlock",
    );
    cluster.down(C, "a1", NL);
    cluster.ask(C, "a1", EX);
    cluster.deliver();
    cluster.says(
        "c>a down a1 NL
         c>a ask a1 EX
         a>b granted a1 EX
         b: holds a1 EX
         a>b blocking a1 EX
         b: in the way of a1 EX",
    );
}

#[test]
fn from_protected_read_to_concurrent_write_is_a_wait_like_any_other() {
    let mut cluster = Cluster::new(2);
    cluster.ask(A, "a1", PR);
    cluster.ask(B, "a1", PR);
    cluster.deliver();
    cluster.transcript.clear();
    cluster.ask(A, "a1", CW);
    cluster.deliver();
    cluster.says(
        "a>b blocking a1 PW
         b: in the way of a1 PW",
    );
    cluster.down(B, "a1", CR);
    cluster.deliver();
    cluster.says(
        "b>a down a1 CR
         a: holds a1 PW",
    );
}

#[test]
fn a_try_is_refused_but_the_holder_hears_of_it() {
    let mut cluster = Cluster::new(2);
    cluster.ask(A, "a1", EX);
    cluster.try_ask(B, "a1", PR);
    cluster.deliver();
    cluster.says(
        "a: holds a1 EX
         b>a try a1 PR
         a: in the way of a1 PR
         a>b refused a1 Busy
         b: refused a1, Busy",
    );
    cluster.down(A, "a1", PR);
    cluster.try_ask(B, "a1", PR);
    cluster.deliver();
    cluster.says(
        "b>a try a1 PR
         a>b granted a1 PR
         b: holds a1 PR",
    );
}

#[test]
fn a_grant_that_crosses_its_cancel_is_kept() {
    let mut cluster = Cluster::new(2);
    cluster.ask(B, "a1", EX);
    let (from, to, ask) = cluster.wire.pop_front().unwrap();
    cluster.arrive(from, to, ask);
    cluster.cancel(B, "a1");
    cluster.deliver();
    cluster.says(
        "b>a ask a1 EX
         a>b granted a1 EX
         b: holds a1 EX
         b>a cancel a1",
    );
}

#[test]
fn a_cancelled_wait_is_answered_and_lets_others_pass() {
    let mut cluster = Cluster::new(3);
    cluster.ask(A, "a1", PR);
    cluster.ask(B, "a1", EX);
    cluster.ask(C, "a1", PR);
    cluster.deliver();
    cluster.transcript.clear();
    cluster.cancel(B, "a1");
    cluster.deliver();
    cluster.says(
        "b>a cancel a1
         a>b refused a1 Cancelled
         b: refused a1, Cancelled
         a>c granted a1 PR
         c: holds a1 PR",
    );
}

#[test]
fn a_callback_that_crosses_the_release_is_ignored() {
    let mut cluster = Cluster::new(2);
    cluster.ask(B, "a1", PR);
    cluster.deliver();
    cluster.transcript.clear();
    cluster.ask(A, "a1", EX);
    cluster.down(B, "a1", NL);
    cluster.deliver();
    cluster.says(
        "a>b blocking a1 EX
         b>a down a1 NL
         a: holds a1 EX",
    );
}

#[test]
fn a_value_goes_with_the_grant_and_dies_with_its_writer() {
    let mut cluster = Cluster::new(3);
    cluster.ask(B, "a1", EX);
    cluster.deliver();
    cluster.write_down(B, "a1", PR, Some(7));
    cluster.deliver();
    cluster.transcript.clear();
    cluster.ask(C, "a1", PR);
    cluster.deliver();
    cluster.says(
        "c>a ask a1 PR
         a>c granted a1 PR
         c: holds a1 PR, value [07]",
    );
    cluster.down(B, "a1", CR);
    cluster.ask(C, "a1", PW);
    cluster.deliver();
    cluster.dies(C);
    cluster.install_everywhere();
    cluster.deliver();
    cluster.recovered(C);
    cluster.transcript.clear();
    cluster.ask(A, "a1", CR);
    cluster.says("a: holds a1 CR");
}

#[test]
fn what_a_dead_node_read_waits_for_its_fence_and_what_it_wrote_for_its_replay() {
    let mut cluster = Cluster::new(3);
    cluster.ask(C, "a1", PR);
    cluster.ask(C, "a2", EX);
    cluster.deliver();
    cluster.dies(C);
    cluster.install_everywhere();
    cluster.deliver();
    cluster.transcript.clear();

    cluster.ask(B, "a1", PR);
    cluster.ask(A, "a1", EX);
    cluster.ask(A, "a2", EX);
    cluster.ask(B, "b1", EX);
    cluster.deliver();
    cluster.says(
        "b: holds b1 EX
         b>a ask a1 PR",
    );
    cluster.fenced(C);
    cluster.says(
        "a: holds a1 EX
         a: in the way of a1 PR",
    );
    cluster.recovered(C);
    cluster.says("a: holds a2 EX");
}

#[test]
fn a_moved_shard_waits_for_all_reports_and_for_the_recovery() {
    let mut cluster = Cluster::new(3);
    cluster.dies(C);
    let heir = cluster.epoch.shards.get(cluster.res("c1").shard).unwrap();
    let other = if heir == A { B } else { A };
    cluster.install(heir);
    cluster.ask(heir, "c1", EX);
    cluster.ask(heir, &format!("{}1", letter(heir)), EX);
    let expected = format!("{0}: holds {0}1 EX", letter(heir));
    cluster.says(&expected);
    cluster.install(other);
    cluster.deliver();
    cluster.transcript.clear();
    cluster.recovered(C);
    cluster.says(&format!("{}: holds c1 EX", letter(heir)));
}

#[test]
fn what_a_survivor_held_exclusively_was_touched_by_no_dead_node() {
    let mut cluster = Cluster::new(3);
    let heir = cluster.epoch.shards.deal(&BTreeSet::from([A, B])).get(cluster.res("c1").shard).unwrap();
    let other = if heir == A { B } else { A };
    cluster.ask(other, "c1", EX);
    cluster.ask(heir, "c1", EX);
    cluster.deliver();
    cluster.dies(C);
    cluster.install_everywhere();
    cluster.deliver();
    cluster.transcript.clear();
    cluster.down(other, "c1", NL);
    cluster.deliver();
    cluster.says(&format!("{1}>{0} down c1 NL\n{0}: holds c1 EX", letter(heir), letter(other)));
}

#[test]
fn a_release_lost_with_the_old_view_is_settled_by_the_report() {
    let mut cluster = Cluster::new(3);
    cluster.ask(B, "a1", EX);
    cluster.deliver();
    cluster.down(B, "a1", NL);
    cluster.wire.clear();
    cluster.next_view();
    cluster.install(A);
    cluster.transcript.clear();
    cluster.ask(A, "a1", EX);
    cluster.says("");
    cluster.install(B);
    cluster.install(C);
    cluster.deliver();
    cluster.says(
        "a>b report
         a>c report
         a>b blocking a1 EX
         b>a report
         a: holds a1 EX
         b>c report
         c>a report
         c>b report",
    );
}

#[test]
fn a_grant_lost_with_the_old_view_is_given_again() {
    let mut cluster = Cluster::new(2);
    cluster.ask(B, "a1", EX);
    let (from, to, ask) = cluster.wire.pop_front().unwrap();
    cluster.arrive(from, to, ask);
    cluster.wire.clear();
    cluster.next_view();
    cluster.install_everywhere();
    cluster.transcript.clear();
    cluster.deliver();
    cluster.says(
        "a>b report
         b>a report a1 NL wants EX
         a>b granted a1 EX
         b: holds a1 EX",
    );
}

#[test]
fn a_second_view_in_the_middle_of_the_first_ones_reports_starts_anew() {
    let mut cluster = Cluster::new(4);
    let d = NodeId(3);
    let heir = {
        let without_d = cluster.epoch.shards.deal(&BTreeSet::from([A, B, C]));
        without_d.get(cluster.res("d1").shard).unwrap()
    };
    let others: Vec<NodeId> = [A, B, C].into_iter().filter(|node| *node != heir).collect();
    cluster.ask(others[0], "d1", PR);
    cluster.ask(others[1], "d1", PR);
    cluster.deliver();
    cluster.dies(d);
    // The first of the others reports, the second dies before it does.
    cluster.install(heir);
    cluster.install(others[0]);
    cluster.deliver();
    cluster.ask(heir, "d1", PR);
    cluster.dies(others[1]);
    cluster.install(heir);
    cluster.install(others[0]);
    cluster.deliver();
    cluster.transcript.clear();
    cluster.recovered(d);
    cluster.says("");
    cluster.recovered(others[1]);
    cluster.says(&format!("{}: holds d1 PR", letter(heir)));
}

#[test]
fn a_joining_node_becomes_master_without_disturbing_holders() {
    let mut cluster = Cluster::new(1);
    let alone = cluster.epoch.shards.clone();
    let mine = alone.deal(&BTreeSet::from([A, B]));
    let all = (0..100_000u64).map(|n| Resource { shard: (n % 1024) as u16, kind: 1, number: n, part: 0 });
    let moving = all.filter(|r| r.partition() == 0).find(|r| mine.get(r.shard) == Some(B)).unwrap();
    cluster.names.insert(moving, "m1".into());
    cluster.ask(A, "m1", EX);
    cluster.nodes.insert(B, Dlm::new(B, Incarnation(1), 0));
    cluster.epoch.members.insert(B, Incarnation(1));
    cluster.next_view();
    cluster.install(B);
    cluster.ask(B, "m1", PR);
    cluster.install(A);
    cluster.transcript.clear();
    cluster.deliver();
    cluster.says(
        "b>a report
         a>b report m1 EX
         b>a blocking m1 PR
         a: in the way of m1 PR",
    );
    cluster.down(A, "m1", PR);
    cluster.deliver();
    cluster.says(
        "a>b down m1 PR
         b: holds m1 PR",
    );
}

#[test]
fn duplicates_and_old_views_change_nothing() {
    let mut cluster = Cluster::new(2);
    cluster.ask(B, "a1", PR);
    let ask = cluster.wire[0].2.clone();
    cluster.deliver();
    cluster.down(B, "a1", NL);
    cluster.deliver();
    cluster.arrive(B, A, ask.clone());
    assert!(cluster.wire.is_empty());
    cluster.next_view();
    cluster.install_everywhere();
    cluster.deliver();
    let Body::Ask { res, .. } = ask.body else { unreachable!("it asked") };
    let late = Body::Ask { res, op: Op(1000), want: EX, no_queue: false };
    cluster.arrive(B, A, Message { generation: Generation(1), body: late });
    assert!(cluster.wire.is_empty());
    assert!(cluster.nodes[&A].snapshot(NOW).is_empty());
}

#[test]
fn what_no_member_can_say_is_a_fault() {
    let mut cluster = Cluster::new(2);
    let (a1, b1) = (cluster.res("a1"), cluster.res("b1"));
    let generation = Generation(1);
    let far = Resource { shard: 4000, ..a1 };
    let elsewhere = (0..)
        .map(|number| Resource { number, ..a1 })
        .find(|res| res.partition() != 0)
        .expect("other partitions");
    let mut say = |from: NodeId, body: Body| cluster.core(A).message(NOW, from, Message { generation, body });
    let ask = |res: Resource, want: Mode| Body::Ask { res, op: Op(77), want, no_queue: false };
    assert_eq!(say(C, ask(a1, PR)), Err(Fault::NotMember(C)));
    assert_eq!(say(B, ask(b1, PR)), Err(Fault::NotMaster(b1.shard)));
    assert!(matches!(say(B, ask(far, PR)), Err(Fault::BadResource(_))));
    assert_eq!(say(B, ask(elsewhere, PR)), Err(Fault::BadResource(elsewhere)));
    assert_eq!(say(B, ask(a1, NL)), Err(Fault::Contradiction(a1)));
    let down = Body::Down { res: a1, op: Op(78), to: NL, value: None };
    assert_eq!(say(B, down), Err(Fault::Contradiction(a1)));
    assert_eq!(say(B, Body::Blocking { res: a1, wanted: EX }), Err(Fault::NotFromMaster(a1.shard)));
    cluster.nodes[&A].assert_consistent();
    assert!(cluster.nodes[&A].snapshot(NOW).is_empty());
}

#[test]
fn the_snapshot_shows_who_waits_for_whom() {
    let mut cluster = Cluster::new(3);
    cluster.ask(A, "a1", PR);
    cluster.ask(B, "a1", EX);
    cluster.ask(C, "a1", PR);
    cluster.deliver();
    let info = cluster.nodes[&A].snapshot(NOW);
    assert_eq!(info.len(), 1);
    let holders: Vec<(NodeId, Mode)> = info[0].holders.iter().map(|h| (h.node, h.mode)).collect();
    assert_eq!(holders, [(A, PR)]);
    let waiters: Vec<(NodeId, Mode, &[NodeId])> =
        info[0].waiters.iter().map(|w| (w.node, w.want, w.waits_for.as_slice())).collect();
    assert_eq!(waiters, [(B, EX, &[A][..]), (C, PR, &[B][..])]);
}
