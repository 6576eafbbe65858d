use proptest::prelude::*;

use super::*;
use crate::format::index::ENTRIES_SIZE;
use crate::index::Split;

const AT: u64 = 77;

fn entry(cookie: u64, name: &[u8]) -> Entry<'_> {
    Entry { cookie: cookie << 15, ino: cookie, generation: 5, kind: FileType::Regular, name }
}

fn packed_list(list: &[Entry<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in list {
        bytes = packed::with(AT, &bytes, entry).unwrap().bytes;
    }
    bytes
}

#[test]
fn golden_bytes_of_an_entry() {
    let bytes = packed_list(&[entry(3, b"ab")]);
    assert_eq!(bytes, [0, 128, 1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 8, 2, b'a', b'b']);
}

#[test]
fn entries_are_kept_in_order_of_cookies() {
    let bytes = packed_list(&[entry(5, b"e"), entry(2, b"b"), entry(9, b"i"), entry(7, b"g")]);
    let cookies: Vec<u64> = entries(BlockAddr(AT), &bytes).map(|e| e.unwrap().cookie >> 15).collect();
    assert_eq!(cookies, [2, 5, 7, 9]);
    let bytes = packed::without(AT, &bytes, 5 << 15).unwrap().bytes;
    assert_eq!(entries(BlockAddr(AT), &bytes).count(), 3);
}

#[test]
fn a_full_leaf_is_cut_so_that_both_halves_fit() {
    let name = [b'x'; 255];
    let mut all = packed_list(&[]);
    let mut count = 0;
    while all.len() <= ENTRIES_SIZE {
        count += 1;
        all = packed::with(AT, &all, &entry(count, &name)).unwrap().bytes;
    }
    let split = packed::split(packed::without(AT, &all, 0).unwrap());
    let Split::Two(left, cookie, right) = split else { panic!("it does not fit one leaf") };
    assert!(left.bytes.len() <= ENTRIES_SIZE && right.bytes.len() <= ENTRIES_SIZE);
    assert_eq!(left.count + right.count, count as usize);
    assert_eq!(entries(BlockAddr(AT), &right.bytes).next().unwrap().unwrap().cookie, cookie);
}

#[test]
fn hostile_entries_are_refused() {
    let good = packed_list(&[entry(3, b"ab"), entry(4, b"cd")]);
    let whole = |bytes: &[u8]| entries(BlockAddr(AT), bytes).collect::<Result<Vec<_>, _>>().is_ok();
    assert!(whole(&good));
    for (at, value) in [(7, 0x80), (2, 9), (24, 9), (25, 0), (25, 255), (26, b'/'), (26, 0), (28 + 2, 0)] {
        let mut bad = good.clone();
        bad[at] = value;
        assert!(!whole(&bad), "{value} at {at}");
    }
    assert!(!whole(&good[..good.len() - 1]));
    for name in [&b"."[..], b"..", b"", b"a/b", b"a\0b"] {
        assert!(check_name(name).is_err());
    }
    assert!(matches!(check_name(&[b'x'; 256]), Err(FsError::NameTooLong)));
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..ENTRIES_SIZE)) {
        prop_assert!(entries(BlockAddr(AT), &bytes).count() <= ENTRIES_SIZE);
    }
}
