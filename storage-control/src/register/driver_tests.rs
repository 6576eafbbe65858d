use std::collections::BTreeSet;

use uuid::Uuid;

use super::*;
use crate::device::Request;
use crate::mem_device::{Fault, MemDevice};
use crate::runtime::SimRuntime;

const LAYOUT: QuorumLayout = QuorumLayout { start: BlockAddr(16), slots: 8 };

struct World {
    runtime: SimRuntime,
    devices: Vec<MemDevice>,
}

impl World {
    fn new(seed: u64, devices: usize) -> World {
        let runtime = SimRuntime::new(seed);
        let world = World { runtime, devices: (0..devices).map(|_| MemDevice::new(1000)).collect() };
        for acceptor in world.acceptors() {
            world.runtime.run(async move { acceptor.format(b"start", OpId(1)).await.unwrap() });
        }
        world
    }

    fn acceptors(&self) -> Vec<Acceptor> {
        let acceptor = |(index, device): (usize, &MemDevice)| Acceptor {
            device: Arc::new(device.clone()),
            layout: LAYOUT,
            id: AcceptorId { fs: Uuid::nil(), acceptor: Uuid::from_u128(index as u128), config: 1 },
        };
        self.devices.iter().enumerate().map(acceptor).collect()
    }

    fn register(&self, me: u16) -> Register {
        Register::new(NodeId(me), self.acceptors(), Arc::new(self.runtime.clone()), self.runtime.random())
    }

    fn read(&self, register: &Register) -> Result<Snapshot, RegisterError> {
        let register = register.clone();
        self.runtime.run(async move { register.read().await })
    }

    fn cas(&self, register: &Register, expected: u64, body: &[u8]) -> Result<Outcome, RegisterError> {
        let (register, body) = (register.clone(), body.to_vec());
        self.runtime.run(async move { register.cas(expected, body).await })
    }
}

fn snapshot(sequence: u64, body: &[u8]) -> Snapshot {
    Snapshot { sequence, body: body.into() }
}

#[test]
fn a_compare_and_set_replaces_exactly_the_expected_value() {
    for devices in [1, 3] {
        let world = World::new(1, devices);
        let (one, two) = (world.register(1), world.register(2));
        assert_eq!(world.read(&one).unwrap(), snapshot(1, b"start"));
        assert_eq!(world.cas(&one, 1, b"first").unwrap(), Outcome::Committed { sequence: 2 });
        let conflict = world.cas(&two, 1, b"second").unwrap();
        assert_eq!(conflict, Outcome::Conflict(snapshot(2, b"first")));
        assert_eq!(world.cas(&two, 2, b"second").unwrap(), Outcome::Committed { sequence: 3 });
        assert_eq!(world.read(&one).unwrap(), snapshot(3, b"second"));
    }
}

#[test]
fn a_body_of_24_kib_is_carried_from_node_to_node_and_a_longer_one_refused() {
    let world = World::new(1, 1);
    let (one, two, three) = (world.register(1), world.register(2), world.register(3));
    let body: Vec<u8> = (0..MAX_BODY_BYTES).map(|at| at as u8).collect();
    world.cas(&one, 1, &body).unwrap();
    assert_eq!(world.read(&two).unwrap(), snapshot(2, &body));
    assert_eq!(world.read(&three).unwrap(), snapshot(2, &body));
    assert_eq!(world.cas(&one, 2, b"").unwrap(), Outcome::Committed { sequence: 3 });
    assert_eq!(world.read(&two).unwrap(), snapshot(3, b""));
    let long = vec![0; MAX_BODY_BYTES + 1];
    assert!(matches!(world.cas(&one, 2, &long), Err(RegisterError::TooLong(_))));
}

/// Every node adds its number to the value until it is in; nobody's may be lost.
#[test]
fn nodes_that_compete_all_get_through_and_lose_nothing() {
    for seed in 0..30 {
        let world = World::new(seed, if seed % 2 == 0 { 1 } else { 3 });
        for node in 0..6 {
            let register = world.register(node);
            world.runtime.spawn(Box::pin(async move {
                for round in 0..5 {
                    let mut current = register.read().await.unwrap();
                    loop {
                        let mut body = current.body.to_vec();
                        body.push(node as u8 * 16 + round);
                        match register.cas(current.sequence, body).await.unwrap() {
                            Outcome::Committed { .. } => break,
                            Outcome::Conflict(newer) => current = newer,
                            Outcome::Unknown { why, .. } => panic!("nothing failed, but: {why:?}"),
                        }
                    }
                }
            }));
        }
        world.runtime.advance(Duration::from_secs(600));
        let last = world.read(&world.register(7)).unwrap();
        assert_eq!(last.sequence, 31, "seed {seed}");
        let added: BTreeSet<u8> = last.body[b"start".len()..].iter().copied().collect();
        assert_eq!(added.len(), 30, "seed {seed}");
    }
}

#[test]
fn an_unknown_outcome_is_settled_by_the_name_of_the_operation() {
    // The write of phase 2 lands, but the read after it fails.
    for (lands, settled) in
        [(true, Outcome::Committed { sequence: 2 }), (false, Outcome::Conflict(snapshot(1, b"start")))]
    {
        let world = World::new(1, 1);
        let one = world.register(1);
        world.read(&one).unwrap();
        let writes = Mutex::new(0);
        world.devices[0].inject(move |request| match request {
            Request::Write(at, ..) if at == LAYOUT.register_block(NodeId(1)) => {
                *writes.lock() += 1;
                if *writes.lock() == 2 && !lands { Fault::Errno(libc::EIO) } else { Fault::None }
            }
            Request::Read(..) if *writes.lock() == 2 => Fault::Errno(libc::EIO),
            Request::Read(..) | Request::Write(..) | Request::Flush => Fault::None,
        });
        let Outcome::Unknown { op, expected, why } = world.cas(&one, 1, b"new").unwrap() else {
            panic!("the outcome cannot be known")
        };
        assert_eq!(why, Unsettled::NoMajority);
        world.devices[0].inject_nothing();
        let outcome = world.runtime.run(async move { one.settle(op, expected).await.unwrap() });
        assert_eq!(outcome, settled);
    }
}

#[test]
fn a_dropped_caller_leaves_nothing_half_done() {
    let world = World::new(1, 1);
    let one = world.register(1);
    let mut operation = Box::pin({
        let one = one.clone();
        async move { one.cas(1, b"new".to_vec()).await }
    });
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(operation.as_mut().poll(&mut context).is_pending());
    drop(operation);
    world.runtime.advance(Duration::from_secs(1));
    assert_eq!(world.read(&one).unwrap(), snapshot(2, b"new"));
}

#[test]
fn two_of_three_devices_are_enough_and_one_is_not() {
    let world = World::new(1, 3);
    let one = world.register(1);
    world.devices[0].inject(|_| Fault::Errno(libc::EIO));
    assert_eq!(world.cas(&one, 1, b"a").unwrap(), Outcome::Committed { sequence: 2 });
    world.devices[1].inject(|_| Fault::Errno(libc::EIO));
    assert!(matches!(world.read(&one), Err(RegisterError::NoMajority(AcceptorError::Io(_)))));
    world.devices.iter().for_each(MemDevice::inject_nothing);
    assert_eq!(world.read(&one).unwrap(), snapshot(2, b"a"));
}

#[test]
fn a_device_that_never_answers_does_not_stop_the_others() {
    let world = World::new(1, 3);
    let one = world.register(1);
    world.devices[2]
        .inject(|request| if matches!(request, Request::Write(..)) { Fault::Hold } else { Fault::None });
    for sequence in 1..5 {
        assert_eq!(world.cas(&one, sequence, b"a").unwrap(), Outcome::Committed { sequence: sequence + 1 });
    }
    assert_eq!(world.devices[2].held(), 1, "at most one write is under way");
    world.devices[2].inject_nothing();
    world.devices[2].release_held();
    assert_eq!(world.read(&one).unwrap().sequence, 5);
}

#[test]
fn a_corrupt_block_of_another_node_is_reported_not_passed_over() {
    let world = World::new(1, 1);
    let (one, two) = (world.register(1), world.register(2));
    world.cas(&one, 1, b"a").unwrap();
    world.devices[0].poke(LAYOUT.register_block(NodeId(1)), |block| block[100] ^= 1);
    let error = world.read(&two).unwrap_err();
    assert!(error.to_string().contains("register block of slot 1"), "{error}");
}

#[test]
fn a_node_whose_block_another_has_written_stops() {
    let world = World::new(1, 1);
    let (one, twin) = (world.register(1), world.register(1));
    world.read(&one).unwrap();
    let before = world.devices[0].peek(LAYOUT.register_block(NodeId(1)), 1);
    world.read(&twin).unwrap();
    // The twin's late write lands between the write and the read of the first.
    let device = world.devices[0].clone();
    world.devices[0].inject(move |request| {
        if let Request::Read(_, 8) = request {
            device.poke(LAYOUT.register_block(NodeId(1)), |block| block.copy_from_slice(&before));
        }
        Fault::None
    });
    let error = world.read(&one).unwrap_err();
    assert!(matches!(error, RegisterError::NoMajority(AcceptorError::SlotTaken(NodeId(1)))), "{error}");
}

#[test]
fn a_blank_register_is_uninitialised() {
    let world = World::new(1, 1);
    let acceptor = world.acceptors().remove(0);
    world.runtime.run(async move { acceptor.blank().await.unwrap() });
    assert!(matches!(world.read(&world.register(1)), Err(RegisterError::Uninitialised)));
}

#[test]
fn the_next_owner_of_a_slot_continues_from_its_ballot() {
    let world = World::new(1, 1);
    let block = |world: &World| {
        let bytes = world.devices[0].peek(LAYOUT.register_block(NodeId(1)), 1);
        decode(&bytes, world.acceptors()[0].id, NodeId(1)).unwrap().unwrap()
    };
    let one = world.register(1);
    world.cas(&one, 1, b"a").unwrap();
    let former = block(&world);
    drop(one);
    let next = world.register(1);
    assert_eq!(world.read(&next).unwrap(), snapshot(2, b"a"));
    assert!(block(&world).promised > former.promised);
}
