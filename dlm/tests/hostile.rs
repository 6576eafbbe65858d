//! Messages that no correct member sends.

use std::collections::BTreeMap;
use std::sync::Arc;

use dlm::{Body, Dlm, Entry, EntryAsk, Epoch, Fault, Message, Mode, Op, Resource};
use membership::ShardMap;
use storage_control::{Generation, Incarnation, Instant, NodeId};

const NOW: Instant = Instant(1_000_000_000);

fn epoch(generation: u64) -> Arc<Epoch> {
    let members: BTreeMap<_, _> = (0..2).map(|n| (NodeId(n), Incarnation(1))).collect();
    let shards = ShardMap::all_to(NodeId(0));
    Arc::new(Epoch { generation: Generation(generation), members, shards, recoveries: Vec::new() })
}

/// Found by tests/fuzz (SEED=1090 and SEED=2432, `hostile_lock_messages`): a report of a lock that is held and asked for
/// in a weaker mode was refused, and one of a lock neither held nor asked for was accepted, but a resource without
/// holders or waiters stayed in the master's table for good.
#[test]
fn a_report_that_contradicts_itself_leaves_nothing_behind() {
    let weaker = Some(EntryAsk { op: Op(108), want: Mode::CW, waited_ms: 252 });
    for (held, ask) in [(Mode::PW, weaker), (Mode::NL, None)] {
        reported(held, ask);
    }
}

fn reported(held: Mode, ask: Option<EntryAsk>) {
    let mut core = Dlm::new(NodeId(0), Incarnation(1), 0);
    core.install_view(NOW, epoch(1));
    core.install_view(NOW, epoch(2));
    let names = (0..).map(|n| Resource { shard: (n % 1024) as u16, kind: 1, number: n, part: 0 });
    let res = names.into_iter().find(|res| res.partition() == 0).expect("one in sixteen is");
    let entries = vec![Entry { res, held, value: None, ask }];
    let body = Body::Report { partition: 0, entries, last: false };
    let message = Message { generation: Generation(2), body };
    assert_eq!(core.message(NOW, NodeId(1), message), Err(Fault::Contradiction(res)));
    core.assert_consistent();
}
