//! Slots under simulated time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::*;
use crate::device::Request;
use crate::gate::{CloseReason, Gate};
use crate::ids::{BLOCK_SIZE, Clock, Incarnation, NodeId};
use crate::label::Label;
use crate::lease::LeaseTimes;
use crate::medium::WriteLife;
use crate::mem_device::{Fault, MemDevice};
use crate::process::ProcessIdentity;
use crate::register::Register;
use crate::runtime::{Runtime, SimRuntime};

pub(crate) const TIMES: LeaseTimes = LeaseTimes { write_life: WriteLife::Bounded(Duration::from_secs(1)) };
const BLOCKS: u64 = 20_000;

/// A formatted device in simulated time.
pub(crate) struct World {
    pub(crate) runtime: SimRuntime,
    pub(crate) device: MemDevice,
    pub(crate) label: Label,
}

/// One node.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) gate: Gate,
    pub(crate) area: SlotArea,
    pub(crate) keeper: SlotKeeper,
    stopped: Arc<AtomicBool>,
}

impl World {
    pub(crate) fn new(seed: u64) -> World {
        let runtime = SimRuntime::new(seed);
        let device = MemDevice::new(BLOCKS);
        let (shared, clock): (Arc<dyn crate::Device>, Arc<dyn Runtime>) =
            (Arc::new(device.clone()), Arc::new(runtime.clone()));
        let label = runtime.run(async move {
            let options = Default::default();
            let label = crate::mkfs::prepare(&shared, &NoLocks, TIMES, &clock, &options, &|_| Vec::new())
                .await
                .unwrap();
            crate::mkfs::finish(&*shared, &NoLocks, TIMES, &*clock, &label).await.unwrap();
            label
        });
        World { runtime, device, label }
    }

    pub(crate) fn area(&self, gate: &Gate) -> SlotArea {
        SlotArea::new(gate, self.label.clone(), Arc::new(self.runtime.clone()))
    }

    pub(crate) fn gate(&self) -> Gate {
        Gate::new(Arc::new(self.device.clone()), Arc::new(self.runtime.clone()))
    }

    fn try_claim(&self, name: &str, times: LeaseTimes) -> Result<(Node, Claimed), ClaimError> {
        let gate = self.gate();
        let area = self.area(&gate);
        let who = claimant(name);
        let locks: Arc<dyn SlotLocks> = Arc::new(NoLocks);
        let (inner_area, inner_gate) = (area.clone(), gate.clone());
        let claimed =
            self.runtime.run(async move { claim(&inner_area, &inner_gate, &locks, who, times).await })?;
        let keeper = claimed.keeper.clone();
        Ok((Node { gate, area, keeper, stopped: Arc::default() }, claimed))
    }

    pub(crate) fn claim(&self, name: &str) -> (Node, Claimed) {
        self.try_claim(name, TIMES).unwrap()
    }

    pub(crate) fn renew(&self, node: &Node) -> Result<Renewed, RenewError> {
        let keeper = node.keeper.clone();
        self.runtime.run(async move { keeper.renew(Beat::default()).await })
    }

    /// Renews every second until the node is stopped.
    pub(crate) fn keep(&self, node: &Node) {
        let (node, runtime) = (node.clone(), self.runtime.clone());
        self.runtime.spawn(Box::pin(async move {
            while !node.stopped.load(Ordering::Acquire) {
                let _ = node.keeper.renew(Beat::default()).await;
                runtime.sleep(LeaseTimes::RENEW_EVERY).await;
            }
        }));
    }

    pub(crate) fn admit(&self, node: &Node) {
        node.keeper.acknowledge(1);
        node.keeper.admit();
    }
}

impl Node {
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }
}

fn claimant(name: &str) -> Claimant {
    Claimant {
        node_name: name.into(),
        host_name: format!("host of {name}"),
        process: ProcessIdentity { boot_id: [name.len() as u8; 16], pid: 1, start_time: 1 },
        address: NO_ADDRESS,
        fingerprint: [7; 32],
    }
}

#[test]
fn the_first_claim_takes_a_slot_that_was_never_used() {
    let world = World::new(1);
    let (node, claimed) = world.claim("anna");
    assert_eq!((node.keeper.node(), node.keeper.incarnation()), (NodeId(0), Incarnation(1)));
    assert!(claimed.previous.is_none());
    let (other, _) = world.claim("berta");
    assert_eq!(other.keeper.node(), NodeId(1));
}

#[test]
fn claims_at_the_same_time_get_different_slots() {
    for seed in 0..20 {
        let world = World::new(seed);
        let taken = Arc::new(Mutex::new(Vec::new()));
        for name in ["anna", "berta", "carla", "dora"] {
            let gate = world.gate();
            let (area, taken) = (world.area(&gate), Arc::clone(&taken));
            world.runtime.spawn(Box::pin(async move {
                let locks: Arc<dyn SlotLocks> = Arc::new(NoLocks);
                let claimed = claim(&area, &gate, &locks, claimant(name), TIMES).await.unwrap();
                taken.lock().push(claimed.keeper.node());
            }));
        }
        world.runtime.advance(Duration::from_secs(60));
        let mut taken = taken.lock().clone();
        taken.sort();
        assert_eq!(taken, [0, 1, 2, 3].map(NodeId), "seed {seed}");
    }
}

#[test]
fn a_restarted_node_gets_its_own_slot_back_after_the_full_wait() {
    let world = World::new(1);
    let (first, _) = world.claim("anna");
    world.renew(&first).unwrap();
    world.claim("berta");
    let before = world.runtime.now();
    let (again, claimed) = world.claim("anna");
    assert_eq!((again.keeper.node(), again.keeper.incarnation()), (NodeId(0), Incarnation(2)));
    assert_eq!(claimed.previous.unwrap().nonce, first.keeper.record().nonce);
    assert!(world.runtime.now().since(before) >= TIMES.full_wait().unwrap());
}

#[test]
fn a_slot_that_changes_is_alive_whoever_it_says_it_is() {
    let world = World::new(1);
    let (first, _) = world.claim("anna");
    world.keep(&first);
    let (twin, _) = world.claim("anna");
    assert_eq!(twin.keeper.node(), NodeId(1));
    assert!(first.gate.closed().is_none());
}

#[test]
fn a_slot_whose_holder_left_is_free_without_the_full_wait() {
    let world = World::new(1);
    let (first, _) = world.claim("anna");
    let keeper = first.keeper.clone();
    world.runtime.run(async move { keeper.release().await }).unwrap();
    let before = world.runtime.now();
    let (again, claimed) = world.claim("anna");
    assert_eq!(again.keeper.node(), NodeId(0));
    assert_eq!(claimed.previous.unwrap().state, SlotState::Stopped);
    assert!(world.runtime.now().since(before) < TIMES.full_wait().unwrap());
}

#[test]
fn without_a_bound_on_writes_no_slot_can_be_claimed() {
    let world = World::new(1);
    let error = world.try_claim("anna", LeaseTimes { write_life: WriteLife::Unbounded }).err().unwrap();
    assert!(error.to_string().contains("--io-timeout"), "{error}");
}

#[test]
fn a_full_cluster_is_refused() {
    let world = World::new(1);
    for slot in 0..world.label.quorum.slots {
        let mut record = record::tests::sample();
        record.node = NodeId(slot);
        let area = world.area(&world.gate());
        world.runtime.run(async move { area.write(&record).await }).unwrap();
    }
    // Someone renews all of them.
    let area = world.area(&world.gate());
    let (runtime, slots) = (world.runtime.clone(), world.label.quorum.slots);
    world.runtime.spawn(Box::pin(async move {
        for sequence in 0.. {
            for slot in 0..slots {
                let record = SlotRecord { node: NodeId(slot), sequence, ..record::tests::sample() };
                area.write(&record).await.unwrap();
            }
            runtime.sleep(Duration::from_secs(1)).await;
        }
    }));
    assert!(matches!(world.try_claim("anna", TIMES), Err(ClaimError::Full { slots: 64 })));
}

#[test]
fn only_an_admitted_node_gets_a_lease() {
    let world = World::new(1);
    let (node, _) = world.claim("anna");
    assert!(matches!(world.renew(&node), Ok(Renewed::Renewed { until: None, .. })));
    assert!(node.gate.check().is_err());
    world.admit(&node);
    let now = world.runtime.now();
    let Ok(Renewed::Renewed { until: Some(until), .. }) = world.renew(&node) else {
        panic!("it is admitted")
    };
    assert_eq!(until, now + LeaseTimes::LEASE);
    node.gate.check().unwrap();
}

#[test]
fn another_nonce_in_the_slot_closes_the_gate() {
    let world = World::new(1);
    let (node, _) = world.claim("anna");
    world.admit(&node);
    world.renew(&node).unwrap();
    let thief = SlotRecord { nonce: Nonce::random(), ..node.keeper.record() };
    let area = node.area.clone();
    world.runtime.run(async move { area.write(&thief).await }).unwrap();
    assert!(matches!(world.renew(&node), Err(RenewError::Closed(CloseReason::SlotTaken))));
    assert_eq!(node.gate.closed(), Some(CloseReason::SlotTaken));
}

#[test]
fn another_file_system_on_the_device_closes_the_gate() {
    let world = World::new(1);
    let (node, _) = world.claim("anna");
    let other = Label { fs: uuid::Uuid::nil(), ..world.label.clone() };
    let device = world.device.clone();
    world.runtime.run(async move { other.write(&device).await }).unwrap();
    assert!(matches!(world.renew(&node), Err(RenewError::Closed(CloseReason::ForeignFilesystem))));
}

/// SCL-1: a device is known by the id in its label, wherever the path leads.
#[test]
fn another_device_of_the_file_system_closes_the_gate() {
    let world = World::new(1);
    let (node, _) = world.claim("anna");
    let other = Label { device: crate::DeviceId([9; 16]), ..world.label.clone() };
    let device = world.device.clone();
    world.runtime.run(async move { other.write(&device).await }).unwrap();
    assert!(matches!(world.renew(&node), Err(RenewError::Closed(CloseReason::ForeignDevice))));
}

#[test]
fn a_node_that_does_not_know_the_newest_value_of_the_register_falls_silent() {
    let world = World::new(1);
    let (node, _) = world.claim("anna");
    world.admit(&node);
    world.renew(&node).unwrap();
    let before = node.keeper.record();
    let runtime = Arc::new(world.runtime.clone());
    let register = Register::on_device(NodeId(5), Arc::new(world.device.clone()), &world.label, runtime, 1);
    world.runtime.run(async move { register.cas(1, b"without anna".to_vec()).await }).unwrap();
    let Ok(Renewed::Behind { look }) = world.renew(&node) else { panic!("the node is behind") };
    assert_eq!((look.head.sequence, node.keeper.record()), (2, before));
    node.keeper.acknowledge(2);
    assert!(matches!(world.renew(&node), Ok(Renewed::Renewed { .. })));
}

#[test]
fn a_node_that_stays_behind_keeps_the_register_but_not_its_lease() {
    let world = World::new(1);
    let (node, _) = world.claim("anna");
    world.admit(&node);
    world.renew(&node).unwrap();
    let runtime = Arc::new(world.runtime.clone());
    let register = Register::on_device(NodeId(5), Arc::new(world.device.clone()), &world.label, runtime, 1);
    world.runtime.run(async move { register.cas(1, b"new".to_vec()).await }).unwrap();
    world.runtime.advance(Duration::from_secs(5));
    assert!(node.gate.check_register().is_err());
    assert!(matches!(world.renew(&node), Ok(Renewed::Behind { .. })));
    node.gate.check_register().unwrap();
    assert!(node.gate.check().is_err());
}

#[test]
fn nobody_can_claim_a_slot_while_its_former_holder_may_write_the_register() {
    let world = World::new(1);
    let (node, _) = world.claim("anna");
    world.admit(&node);
    world.renew(&node).unwrap();
    // Falls behind, and looks again and again without acting.
    let runtime = Arc::new(world.runtime.clone());
    let register = Register::on_device(NodeId(5), Arc::new(world.device.clone()), &world.label, runtime, 1);
    world.runtime.run(async move { register.cas(1, b"new".to_vec()).await }).unwrap();
    for _ in 0..3 {
        world.runtime.advance(Duration::from_secs(1));
        world.renew(&node).unwrap();
    }
    let (next, _) = world.claim("anna");
    assert_eq!(next.keeper.node(), node.keeper.node());
    assert!(node.gate.check_register().is_err());
}

#[test]
fn a_lease_that_ran_out_needs_a_ballot_and_a_fresh_renewal() {
    let world = World::new(1);
    let (node, _) = world.claim("anna");
    world.admit(&node);
    world.renew(&node).unwrap();
    world.runtime.advance(Duration::from_secs(10));
    assert!(matches!(world.renew(&node), Ok(Renewed::Expired { .. })));
    assert!(node.gate.check().is_err());
    assert!(node.keeper.revive(world.runtime.now()));
    node.gate.check().unwrap();
    world.runtime.advance(Duration::from_secs(10));
    // A ballot alone proves nothing about the slot: others may have waited long enough since its last change.
    assert!(!node.keeper.revive(world.runtime.now()));
}

#[test]
fn a_look_shows_all_slots_and_the_largest_clock() {
    let world = World::new(1);
    let (node, _) = world.claim("anna");
    let keeper = node.keeper.clone();
    let heard = PeerSet::from_iter([NodeId(3)]);
    let beat = Beat { clock: Clock(40), journal_tail: Clock(30), heard, health: 2 };
    world.runtime.run(async move { keeper.renew(beat).await }).unwrap();
    let area = node.area.clone();
    let look = world.runtime.run(async move { area.look().await }).unwrap();
    let record = look.record(NodeId(0)).unwrap();
    assert_eq!(
        (record.clock, record.journal_tail, record.heard, record.health),
        (Clock(40), Clock(30), heard, 2)
    );
    assert_eq!((look.clock(), look.head.sequence, look.records().count()), (Clock(40), 1, 1));
}

#[test]
fn a_renewal_that_was_stopped_between_look_and_write_is_not_written() {
    let world = World::new(1);
    let (node, _) = world.claim("anna");
    let before = world.device.writes();
    // Every look takes three seconds.
    let device = world.device.clone();
    world
        .device
        .inject(|request| if matches!(request, Request::Read(..)) { Fault::Hold } else { Fault::None });
    let runtime = world.runtime.clone();
    world.runtime.spawn(Box::pin(async move {
        loop {
            runtime.sleep(Duration::from_secs(3)).await;
            device.release_held();
        }
    }));
    assert!(matches!(world.renew(&node), Err(RenewError::Delayed)));
    assert_eq!(world.device.writes(), before);
}

#[test]
fn live_nodes_are_those_whose_slots_change() {
    let world = World::new(1);
    let (live, _) = world.claim("anna");
    let (dead, _) = world.claim("berta");
    world.keep(&live);
    world.renew(&dead).unwrap();
    let area = live.area.clone();
    let found = world.runtime.run(async move { live_nodes(&area, &NoLocks, [0; 16], TIMES).await }).unwrap();
    assert_eq!(found, [live.keeper.node()]);
}

#[test]
fn a_nonce_is_seen_only_on_the_same_medium() {
    let (world, clone) = (World::new(1), World::new(2));
    let (one, two) = (world.area(&world.gate()), world.area(&world.gate()));
    let elsewhere = clone.area(&clone.gate());
    let shown = world.runtime.run(async move {
        one.show_nonce(NodeId(3), [9; 32]).await.unwrap();
        (two.shown_nonce(NodeId(3)).await.unwrap(), two.shown_nonce(NodeId(4)).await.unwrap())
    });
    assert_eq!(shown, (Some([9; 32]), None));
    let shown = clone.runtime.run(async move { elsewhere.shown_nonce(NodeId(3)).await.unwrap() });
    assert_eq!(shown, None);
}

#[test]
fn a_claim_never_clears_the_register_block_of_its_slot() {
    let world = World::new(1);
    let block = world.label.quorum.register_block(NodeId(0));
    let before = world.device.peek(block, 1);
    world.claim("anna");
    world.claim("anna");
    assert_eq!(world.device.peek(block, 1), before);
    assert_ne!(before[..], [0; BLOCK_SIZE]);
}
