//! Hostile messages to one real core: from members that lie, and as bytes that nobody wrote.
//!
//! A member that lies can get locks that it should not have; it has the disk anyway. It must not bring another node
//! to panic, to use memory without end, to leave the matrix, or to contradict itself.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use dlm::{Body, Dlm, Entry, EntryAsk, Epoch, Mode, Op, Output, Refusal, Resource, Value, ValueBlock};
use membership::codec::{decode_message, decode_view, encode_message, encode_view};
use membership::frame::{Channel, HEADER_BYTES, Header, MAX_PAYLOAD_BYTES, PROTOCOL_VERSION};
use membership::{
    Applicant, CasOutcome, Input, Membership, Message, NamingDatabase, NodeSet, Output as Said, ShardMap,
    SlotSeen, View,
};
use storage_control::{Clock, DeviceId, Generation, Incarnation, Instant, NodeId};

use crate::random::Random;

/// Messages of one case.
pub(crate) const MESSAGES: u64 = 250;

const MODES: [Mode; 6] = [Mode::NL, Mode::CR, Mode::CW, Mode::PR, Mode::PW, Mode::EX];
const LIARS: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(7)];

/// Changes some bytes, or the length.
pub(crate) fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let end = bytes.len() as u64;
        match random.below(8) {
            0 if end > 0 => bytes.truncate(random.below(end) as usize),
            1 => bytes.extend((0..random.below(20)).map(|_| random.next() as u8)),
            // Lengths and numbers of many bytes begin with these.
            2 if end > 0 => bytes[random.below(end) as usize] = 251 + random.below(5) as u8,
            _ if end > 0 => bytes[random.below(end) as usize] ^= 1 << random.below(8),
            _ => bytes.push(random.next() as u8),
        }
    }
}

fn draw(random: &mut Random, small: u64) -> u64 {
    if random.chance(90) { random.below(small) } else { *random.pick(&[u64::MAX, 1 << 62, 1 << 32]) }
}

// The lock manager.

fn resource(random: &mut Random) -> Resource {
    let number = random.below(40);
    let shard = if random.chance(98) { number as u16 } else { random.next() as u16 };
    Resource { shard, kind: 1, number, part: 0 }
}

fn value(random: &mut Random) -> Option<Value> {
    random
        .chance(30)
        .then(|| Value { sequence: draw(random, 9), block: ValueBlock([random.next() as u8; 64]) })
}

/// A message, most of them with the operation number that comes next.
fn body(random: &mut Random, next: u64) -> Body {
    let res = resource(random);
    let op = Op(if random.chance(80) { next } else { draw(random, 300) });
    let mode = *random.pick(&MODES);
    match random.below(7) {
        0 => Body::Ask { res, op, want: mode, no_queue: random.chance(50) },
        1 => Body::Cancel { res, op, ask: Op(draw(random, 300)) },
        2 => {
            let value = random.chance(30).then_some(ValueBlock([3; 64]));
            Body::Down { res, op, to: mode, value }
        }
        3 => Body::Granted { res, op, mode, value: value(random) },
        4 => {
            let why = *random.pick(&[Refusal::Busy, Refusal::Deadlock, Refusal::Cancelled]);
            Body::Refused { res, op, why }
        }
        5 => Body::Blocking { res, wanted: mode },
        _ => {
            let entries = random.below(6);
            let entry = |random: &mut Random| Entry {
                res: resource(random),
                held: *random.pick(&MODES),
                value: value(random),
                ask: random.chance(40).then(|| EntryAsk {
                    op: Op(draw(random, 300)),
                    want: *random.pick(&MODES),
                    waited_ms: draw(random, 1000),
                }),
            };
            let entries = (0..entries).map(|_| entry(random)).collect();
            Body::Report { partition: draw(random, 2) as u16, entries, last: random.chance(50) }
        }
    }
}

fn epoch(generation: u64) -> Epoch {
    let members: BTreeMap<_, _> = (0..3).map(|n| (NodeId(n), Incarnation(1))).collect();
    let shards = ShardMap::all_to(NodeId(0)).deal(&members.keys().copied().collect());
    Epoch { generation: Generation(generation), members, shards, recoveries: Vec::new() }
}

/// A core that works while others lie to it. Returns the messages that it refused.
pub(crate) fn lock_messages(seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let mut core = Dlm::new(NodeId(0), Incarnation(1), 0);
    let (mut now, mut generation, mut refused) = (Instant(1_000_000_000), 1, 0);
    core.install_view(now, Arc::new(epoch(generation)));
    for number in 0..MESSAGES {
        now.0 += random.below(1_000_000);
        let message = dlm::Message {
            generation: Generation(if random.chance(85) { generation } else { draw(&mut random, 9) }),
            body: body(&mut random, number + 1),
        };
        // What a driver does: bytes that are no message never reach the core, nor does another partition's.
        let config = bincode::config::standard().with_limit::<{ 256 << 10 }>();
        let mut bytes = bincode::serde::encode_to_vec(&message, config).expect("a small message");
        if random.chance(20) {
            mutate(&mut bytes, &mut random);
        }
        match bincode::serde::decode_from_slice::<dlm::Message, _>(&bytes, config) {
            Ok((message, _)) if message.partition() == 0 => {
                let from = *random.pick(&LIARS);
                refused += u64::from(core.message(now, from, message).is_err());
            }
            Ok(_) | Err(_) => refused += 1,
        }
        work(&mut core, now, &mut random);
        if random.chance(2) {
            generation += 1;
            core.install_view(now, Arc::new(epoch(generation)));
        }
        while let Some(output) = core.poll() {
            if let Output::Send { message, .. } = output {
                assert!(bincode::serde::encode_to_vec(&message, config).is_ok());
            }
        }
        core.assert_consistent();
    }
    refused
}

/// What the node itself does with its locks meanwhile.
fn work(core: &mut Dlm, now: Instant, random: &mut Random) {
    let res = resource(random);
    if usize::from(res.shard) >= membership::SHARDS || res.partition() != 0 {
        return;
    }
    if core.is_asking(&res) {
        if random.chance(30) {
            core.cancel(now, res);
        }
    } else if core.held(&res) == Mode::NL || random.chance(50) {
        core.request(now, res, *random.pick(&MODES[1..]), random.chance(30));
    } else {
        core.downconvert(now, res, Mode::NL, None);
    }
}

// Membership.

fn applicant(node: u16) -> Applicant {
    Applicant {
        node: NodeId(node),
        incarnation: Incarnation(1),
        name: format!("n{node}"),
        addr: SocketAddr::from(([10, 0, 0, 1], 7000 + node)),
        fingerprint: [node as u8; 32],
    }
}

fn slot(node: u16, sequence: u64) -> SlotSeen {
    let who = applicant(node);
    SlotSeen {
        node: who.node,
        incarnation: who.incarnation,
        sequence,
        heard: (0..3).map(NodeId).collect(),
        healthy: true,
        stopped: false,
        unfenceable: None,
        name: who.name,
        addr: who.addr,
        fingerprint: who.fingerprint,
    }
}

/// A core with its disk: what it asks for is done at once, and others' slots are renewed.
struct Member {
    core: Membership,
    me: NodeId,
    others: Vec<u16>,
    now: Instant,
    register: (u64, Arc<View>),
    slots: u64,
}

impl Member {
    fn new(me: u16, others: &[u16], register: (u64, Arc<View>)) -> Member {
        let now = Instant(1_000_000_000);
        let core = Membership::new(applicant(me), 64, now);
        Member { core, me: NodeId(me), others: others.to_vec(), now, register, slots: 1 }
    }

    fn take(&mut self, input: Input) {
        self.core.handle(self.now, input);
        // Each answer may lead to a question; without an end there would be no progress.
        for _ in 0..1000 {
            let Some(said) = self.core.poll() else { return };
            let answer = match said {
                Said::ReadRegister => Input::RegisterRead(Some(self.register.clone())),
                Said::Cas { expected, view } => {
                    view.check().expect("a core writes possible views only");
                    Input::CasDone(if expected == self.register.0 {
                        self.register = (expected + 1, view);
                        CasOutcome::Committed(self.register.0)
                    } else {
                        CasOutcome::Conflict(self.register.0, self.register.1.clone())
                    })
                }
                Said::Fence { node, incarnation } => Input::FenceDone { node, incarnation, result: Ok(()) },
                Said::Replay { node, incarnation, .. } => {
                    Input::ReplayDone { node, incarnation, result: Ok(()) }
                }
                Said::MakeJournal { index } => Input::JournalMade { index, result: Ok(()) },
                Said::FindDevices(view) => {
                    Input::DevicesFound { version: view.names.version, result: Ok(()) }
                }
                Said::CloseGate(why) => panic!("a member was talked out of the matrix: {why}"),
                Said::Refused(why) => panic!("a member was refused: {why}"),
                Said::Left => panic!("a member left unasked"),
                Said::Send { message, .. } => {
                    assert!(!encode_message(&message).is_empty());
                    continue;
                }
                _ => continue,
            };
            self.core.handle(self.now, answer);
        }
        panic!("it asks and asks");
    }

    fn pass(&mut self, milliseconds: u64) {
        for _ in 0..milliseconds.div_ceil(100) {
            self.now.0 += 100_000_000;
            self.slots += 1;
            let seen = self.others.iter().map(|node| slot(*node, self.slots)).collect();
            self.take(Input::Slots(seen));
            self.take(Input::Tick);
        }
    }

    fn receive(&mut self, node: NodeId, message: Message) {
        self.take(Input::Received { node, incarnation: Incarnation(1), message });
    }

    fn is_member(&self) -> bool {
        self.register.1.members.contains_key(&self.me)
    }
}

/// A matrix of nodes 0 to 2 in the register, node 0 its ADM.
fn formed() -> Member {
    let names = NamingDatabase::of_one("disk1".parse().expect("a name"), DeviceId([1; 16]), 20_000);
    let mut adm = Member::new(0, &[], (1, Arc::new(View::empty(1, names))));
    adm.pass(60_000);
    assert!(adm.is_member(), "it forms the matrix alone");
    adm.others = vec![1, 2];
    adm.pass(500);
    for node in 1..3 {
        adm.take(Input::Connected { node: NodeId(node), incarnation: Incarnation(1) });
        let generation = adm.register.1.generation;
        let names = adm.register.1.names.version;
        let (applicant, version) = (applicant(node), PROTOCOL_VERSION);
        let join = Message::Join { applicant, version, generation, healthy: true, names };
        adm.receive(NodeId(node), join);
        adm.pass(500);
    }
    assert_eq!(adm.register.1.members.len(), 3, "both were admitted");
    adm
}

fn membership_message(random: &mut Random, view: &View) -> Message {
    let node = NodeId(draw(random, 4) as u16);
    let incarnation = Incarnation(draw(random, 3));
    let generation = Generation(match random.chance(70) {
        true => view.generation.0 + random.below(2),
        false => draw(random, 9),
    });
    match random.below(12) {
        0 | 1 => Message::Heartbeat {
            sequence: draw(random, 20),
            heard: NodeSet([random.next(), random.next(), 0, 0]),
            healthy: random.chance(80),
            names: random.chance(80).then_some(generation),
        },
        2 => {
            let (applicant, version) = (applicant(node.0 % 64), PROTOCOL_VERSION);
            Message::Join { applicant, version, generation, healthy: true, names: view.names.version }
        }
        3 => Message::Refused(membership::Refusal::Ended),
        4 => Message::Register { sequence: draw(random, 20), view: Box::new(view.clone()) },
        5 => Message::Leave,
        6 => Message::Dead { node, incarnation },
        7 => Message::Replayed { node, incarnation, failure: random.chance(50).then(|| "x".repeat(9000)) },
        8 => Message::Nominate { generation },
        9 => Message::Elected { generation },
        10 => Message::Permit { generation },
        _ => match random.below(2) {
            0 => Message::Undo { generation },
            _ => Message::Lost { generation },
        },
    }
}

/// A member that is told lies: the ADM, or another. Returns the messages that were no messages.
pub(crate) fn membership_messages(seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let mut member = formed();
    if random.chance(50) {
        member = Member::new(1, &[0, 2], member.register);
        member.pass(500);
        for node in [0, 2] {
            member.take(Input::Connected { node: NodeId(node), incarnation: Incarnation(1) });
        }
    }
    let mut refused = 0;
    for _ in 0..MESSAGES {
        let mut bytes = encode_message(&membership_message(&mut random, &member.register.1));
        if random.chance(30) {
            mutate(&mut bytes, &mut random);
        }
        let from = NodeId(*random.pick(&member.others));
        match decode_message(&bytes) {
            // A register of a later sequence is believed: its sender is a member, and the disk would show it.
            Ok(Message::Register { .. }) if random.chance(95) => {}
            Ok(message @ Message::Register { .. }) => {
                let Message::Register { sequence, view } = message else { unreachable!() };
                if sequence <= member.register.0 {
                    member.receive(from, Message::Register { sequence, view });
                }
            }
            Ok(message) => member.receive(from, message),
            Err(_) => refused += 1,
        }
        if random.chance(10) {
            member.pass(100);
        }
        assert!(member.is_member(), "a member was talked out of the register");
    }
    refused
}

/// Bytes in the place of a register's body and of a frame's header.
pub(crate) fn bodies(seed: u64, body: &[u8]) -> u64 {
    let mut random = Random::new(seed);
    let frame = Header {
        channel: Channel::Dlm,
        length: 100,
        sender: NodeId(1),
        incarnation: Incarnation(1),
        generation: Generation(3),
        clock: Clock(9),
    };
    let frame = frame.encode();
    let mut refused = 0;
    for _ in 0..MESSAGES {
        let mut changed = body.to_vec();
        mutate(&mut changed, &mut random);
        match decode_view(&changed) {
            Ok(view) => {
                assert!(view.check().is_ok() && encode_view(&view).len() <= membership::codec::MAX_BODY_BYTES)
            }
            Err(_) => refused += 1,
        }
        let mut header = frame.to_vec();
        mutate(&mut header, &mut random);
        header.resize(HEADER_BYTES, 0);
        let header: [u8; HEADER_BYTES] = header.try_into().expect("made that long");
        if let Ok(found) = Header::decode(&header) {
            assert!(found.length as usize <= MAX_PAYLOAD_BYTES);
        }
    }
    refused
}

/// The body that the register holds for three members.
pub(crate) fn a_body() -> Vec<u8> {
    encode_view(&formed().register.1)
}
