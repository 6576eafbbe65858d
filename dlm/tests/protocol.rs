//! The messages' bytes, against PROTOCOL.md.

use dlm::{Body, Entry, EntryAsk, Message, Mode, Op, REPORT_ENTRIES, Refusal, Resource, Value, ValueBlock};
use storage_control::Generation;

fn bytes(message: &Message) -> Vec<u8> {
    bincode::serde::encode_to_vec(message, bincode::config::standard()).expect("our own messages encode")
}

fn back(bytes: &[u8]) -> Message {
    bincode::serde::decode_from_slice(bytes, bincode::config::standard()).expect("they decode").0
}

const RES: Resource = Resource { shard: 300, kind: 3, number: 70_000, part: 0 };

fn bodies() -> Vec<(&'static str, Body)> {
    let (res, op) = (RES, Op(9));
    let value = Some(Value { sequence: 2, block: ValueBlock([5; 64]) });
    vec![
        ("Ask", Body::Ask { res, op, want: Mode::EX, no_queue: true }),
        ("Cancel", Body::Cancel { res, op, ask: Op(8) }),
        ("Down", Body::Down { res, op, to: Mode::PR, value: Some(ValueBlock([5; 64])) }),
        ("Granted", Body::Granted { res, op, mode: Mode::PR, value }),
        ("Refused", Body::Refused { res, op, why: Refusal::Deadlock }),
        ("Blocking", Body::Blocking { res, wanted: Mode::EX }),
        ("Report", Body::Report { partition: 4, entries: Vec::new(), last: true }),
    ]
}

#[test]
fn numbers_of_bodies_are_those_of_the_document() {
    let document = include_str!("../PROTOCOL.md");
    let table: Vec<(u8, &str)> = document
        .lines()
        .filter_map(|line| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            Some((cells.next()?.parse().ok()?, cells.next()?))
        })
        .collect();
    let coded: Vec<(u8, &str)> = bodies()
        .into_iter()
        .map(|(name, body)| (bytes(&Message { generation: Generation(7), body })[1], name))
        .collect();
    assert_eq!(table, coded);
}

#[test]
fn a_request_is_these_bytes() {
    let body = Body::Ask { res: RES, op: Op(9), want: Mode::EX, no_queue: true };
    let golden = [7, 0, 251, 44, 1, 3, 252, 0x70, 0x11, 1, 0, 0, 9, 5, 1];
    assert_eq!(bytes(&Message { generation: Generation(7), body }), golden);
}

#[test]
fn every_message_survives_the_way() {
    for (_, body) in bodies() {
        let message = Message { generation: Generation(u64::MAX), body };
        assert_eq!(back(&bytes(&message)), message);
    }
}

#[test]
fn the_longest_report_fits_a_frame_many_times() {
    let far = u64::MAX;
    let entry = Entry {
        res: Resource { shard: 1023, kind: 255, number: far, part: far },
        held: Mode::PR,
        value: Some(Value { sequence: far, block: ValueBlock([255; 64]) }),
        ask: Some(EntryAsk { op: Op(far), want: Mode::EX, waited_ms: far }),
    };
    let body = Body::Report { partition: 15, entries: vec![entry; REPORT_ENTRIES], last: false };
    let length = bytes(&Message { generation: Generation(far), body }).len();
    assert!(length < 1024 * 1024 / 8, "{length} bytes");
}
