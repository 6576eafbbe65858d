//! PROTOCOL.md against the code: the tables in it are read here, so that neither can change without the other.

use std::collections::BTreeMap;

use membership::codec::{decode_message, decode_view, encode_message, encode_view};
use membership::frame::{Channel, FrameError, HEADER_BYTES, Header, MAX_PAYLOAD_BYTES};
use membership::{
    Applicant, Candidate, Device, FenceState, Member, Message, NamingDatabase, NodeSet, Recovery, Refusal,
    Role, ShardSet, View,
};
use proptest::prelude::*;
use storage_control::{Clock, DeviceId, Generation, Incarnation, NodeId};

const DOCUMENT: &str = include_str!("../PROTOCOL.md");

/// The rows of the table under a heading, cells trimmed, without head and rule.
fn table(heading: &str) -> Vec<Vec<String>> {
    let section = DOCUMENT.split("\n## ").find(|s| s.starts_with(heading)).expect("the section is there");
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn number(text: &str) -> usize {
    text.parse().expect("a number")
}

fn header() -> Header {
    Header {
        channel: Channel::Dlm,
        length: 0x0001_0203,
        sender: NodeId(0x1112),
        incarnation: Incarnation(0x2122_2324_2526_2728),
        generation: Generation(0x3132_3334_3536_3738),
        clock: Clock(0x0142_4344_4546_4748),
    }
}

#[test]
fn the_header_is_as_documented() {
    let bytes = header().encode();
    let mut end = 0;
    for row in table("Frame header") {
        let (offset, size, field, example) = (number(&row[0]), number(&row[1]), &row[2], &row[4]);
        assert_eq!(offset, end, "{field} follows the field before it");
        end = offset + size;
        assert_eq!(hex(&bytes[offset..end]), *example, "{field}");
    }
    assert_eq!(end, HEADER_BYTES);
    assert_eq!(Header::decode(&bytes), Ok(header()));
}

#[test]
fn the_channels_are_as_documented() {
    let mut bytes = header().encode();
    for row in table("Channels") {
        bytes[6] = number(&row[0]) as u8;
        let channel = Header::decode(&bytes).expect("a channel").channel;
        assert_eq!(format!("{channel:?}"), row[1]);
    }
    bytes[6] = table("Channels").len() as u8 + 1;
    assert_eq!(Header::decode(&bytes), Err(FrameError::Channel(bytes[6])));
}

#[test]
fn a_header_that_is_not_exactly_right_is_refused() {
    let changed = |at: usize, to: u8| {
        let mut bytes = header().encode();
        bytes[at] = to;
        Header::decode(&bytes)
    };
    assert_eq!(changed(0, b'X'), Err(FrameError::Magic));
    assert_eq!(changed(4, 3), Err(FrameError::Version(3)));
    assert_eq!(changed(6, 0), Err(FrameError::Channel(0)));
    assert_eq!(changed(7, 1), Err(FrameError::Reserved));
    assert_eq!(changed(14, 1), Err(FrameError::Reserved));
    let long = Header { length: MAX_PAYLOAD_BYTES as u32 + 1, ..header() };
    assert_eq!(Header::decode(&long.encode()), Err(FrameError::Length(long.length)));
}

fn member(node: u16) -> Member {
    Member {
        node: NodeId(node),
        incarnation: Incarnation(1),
        name: String::from("n"),
        addr: "10.0.0.1:7000".parse().expect("an address"),
        fingerprint: [0xAB; 32],
        journal: node,
    }
}

fn names() -> NamingDatabase {
    let device = |name: &str, id: u8, role: Role| {
        let name = name.parse().expect("a name");
        Device { name, id: DeviceId([id; 16]), blocks: 20_000, role }
    };
    let devices = vec![device("disk1", 0xD1, Role::Whole), device("disk2", 0xD2, Role::Data)];
    NamingDatabase { version: Generation(2), devices }
}

fn view() -> View {
    let only = member(0);
    View {
        generation: Generation(3),
        burnt: Generation(4),
        adm: NodeId(0),
        candidate: Some(Candidate {
            node: NodeId(0),
            incarnation: Incarnation(1),
            generation: Generation(4),
        }),
        names: names(),
        shards: membership::ShardMap::all_to(NodeId(0)),
        recoveries: vec![Recovery {
            node: NodeId(1),
            incarnation: Incarnation(2),
            journal: Some(1),
            state: FenceState::FencedDirty,
            replayer: Some((NodeId(0), Incarnation(1))),
            failed: false,
            shards: ShardSet::from_iter([1, 2]),
        }],
        journals: 2,
        past: BTreeMap::from([(NodeId(0), Incarnation(1)), (NodeId(1), Incarnation(2))]),
        members: BTreeMap::from([(NodeId(0), only)]),
    }
}

fn messages() -> Vec<(&'static str, Message)> {
    let (node, incarnation, generation) = (NodeId(1), Incarnation(2), Generation(3));
    let member = member(1);
    let applicant = Applicant {
        node,
        incarnation,
        name: member.name,
        addr: member.addr,
        fingerprint: member.fingerprint,
    };
    let heard = NodeSet::from_iter([NodeId(0), NodeId(65)]);
    vec![
        ("Heartbeat", Message::Heartbeat { sequence: 7, heard, healthy: true, names: Some(generation) }),
        ("Join", Message::Join { applicant, version: 2, generation, healthy: true, names: generation }),
        ("Refused", Message::Refused(Refusal::FormerPending(incarnation))),
        ("Register", Message::Register { sequence: 7, view: Box::new(view()) }),
        ("Leave", Message::Leave),
        ("Dead", Message::Dead { node, incarnation }),
        ("Replayed", Message::Replayed { node, incarnation, failure: None }),
        ("Nominate", Message::Nominate { generation }),
        ("Elected", Message::Elected { generation }),
        ("Permit", Message::Permit { generation }),
        ("Undo", Message::Undo { generation }),
        ("Lost", Message::Lost { generation }),
    ]
}

#[test]
fn the_messages_are_as_documented() {
    let rows = table("Membership messages");
    assert_eq!(rows.len(), messages().len());
    for (row, (name, message)) in rows.iter().zip(messages()) {
        let bytes = encode_message(&message);
        assert_eq!((number(&row[0]), row[1].as_str()), (usize::from(bytes[0]), name));
        let documented = row[3].strip_suffix(" ...").map(|start| &bytes[..start.len() / 2]).unwrap_or(&bytes);
        assert_eq!(hex(documented), row[3].trim_end_matches(" ..."), "{name}");
        assert_eq!(decode_message(&bytes).expect("our own message"), message);
    }
}

#[test]
fn the_refusals_are_as_documented() {
    let (theirs, ours) = (Generation(1), Generation(2));
    let text = String::from("x");
    let all = [
        Refusal::WrongKey,
        Refusal::WrongGeneration { theirs, ours },
        Refusal::Full(64),
        Refusal::Unhealthy,
        Refusal::UnknownVersion { theirs: 1, ours: 2 },
        Refusal::FormerPending(Incarnation(1)),
        Refusal::FormerFailed(Incarnation(1)),
        Refusal::NoJournal(text.clone()),
        Refusal::NameTaken(text.clone()),
        Refusal::NotAdm,
        Refusal::NoFence(text),
        Refusal::Ended,
        Refusal::NamesUnknown { theirs, ours },
    ];
    let rows = table("Refusals");
    assert_eq!(rows.len(), all.len());
    for (row, refusal) in rows.iter().zip(all) {
        let bytes = encode_message(&Message::Refused(refusal.clone()));
        assert_eq!(usize::from(bytes[1]), number(&row[0]), "{refusal:?}");
        assert!(format!("{refusal:?}").starts_with(&row[1]), "{refusal:?}");
        assert_eq!(refusal.is_transient(), row[2] == "yes", "{refusal:?}");
    }
}

/// FNV-1a: the whole body is too long to be printed.
fn sum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[test]
fn the_bytes_of_a_body_do_not_change() {
    let body = encode_view(&view());
    let row = &table("The register's body")[0];
    assert_eq!(
        (row[0].as_str(), row[1].as_str()),
        (body.len().to_string().as_str(), format!("{:016x}", sum(&body)).as_str())
    );
    assert_eq!(decode_view(&body).expect("our own body"), view());
}

#[test]
fn a_body_of_another_version_is_refused() {
    let mut body = encode_view(&view());
    body[0] = 1;
    assert!(decode_view(&body).expect_err("refused").to_string().contains("version"));
    assert!(decode_view(&[]).is_err());
}

#[test]
fn a_body_cut_off_anywhere_or_with_a_tail_is_refused() {
    let mut body = encode_view(&view());
    for length in 0..body.len() {
        assert!(decode_view(&body[..length]).is_err(), "{length} bytes");
    }
    body.push(0);
    assert!(decode_view(&body).is_err());
}

/// Foreign bytes where the names of devices are: an error or another possible database, never a panic (SCL-1).
#[test]
fn flipped_bits_in_the_naming_database_are_refused_or_keep_its_rules() {
    let body = encode_view(&view());
    let first = body.windows(5).position(|five| five == b"disk1").expect("the first name");
    let end = body.windows(5).position(|five| five == b"disk2").expect("the second name") + 5 + 16 + 5;
    let mut refused = 0;
    for bit in (first - 2) * 8..end * 8 {
        let mut body = body.clone();
        body[bit / 8] ^= 1 << (bit % 8);
        match decode_view(&body) {
            Ok(other) => other.check().expect("what decodes is a view"),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 60, "{refused} flips were refused");
}

#[test]
fn names_that_are_no_names_of_devices_are_refused() {
    let body = encode_view(&view());
    let at = body.windows(5).position(|five| five == b"disk1").expect("the first name");
    for bad in [b"/isk1", b"-isk1", b"di k1", b"disk\0", b"dis\xff1", b"disk2", b"disk3"] {
        let mut body = body.clone();
        body[at..at + 5].copy_from_slice(bad);
        assert!(decode_view(&body).is_err(), "{bad:?}");
    }
}

#[test]
fn a_claimed_length_of_terabytes_takes_no_memory() {
    // A name of 2^62 bytes in a join.
    let (_, join) = messages().swap_remove(1);
    let bytes = encode_message(&join);
    let at = bytes.windows(2).position(|pair| pair == [1, b'n']).expect("the name");
    let hostile = [&bytes[..at], &[253], &(1u64 << 62).to_le_bytes(), &bytes[at + 1..]].concat();
    assert!(decode_message(&hostile).is_err());
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = decode_message(&bytes);
        let _ = decode_view(&bytes);
    }

    /// A changed byte gives another possible value, or an error; what decodes keeps the invariants.
    #[test]
    fn changed_bytes_never_panic(which in 0usize..12, at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut bytes = encode_message(&messages()[which].1);
        let at = at.index(bytes.len());
        bytes[at] = to;
        if let Ok(message) = decode_message(&bytes) {
            prop_assert!(message.check().is_ok());
            prop_assert_eq!(decode_message(&encode_message(&message)).expect("it is a message"), message);
        }
    }
}
