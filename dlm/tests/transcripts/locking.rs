//! Requests, conversions, tries, callbacks and values among members that stay.

use super::*;

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
