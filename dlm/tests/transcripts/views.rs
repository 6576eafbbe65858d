//! Deaths, joins and views: what waits, what goes on, what was lost with the old view.

use super::*;

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
