use proptest::prelude::*;

use super::*;

fn list_strategy() -> impl Strategy<Value = Vec<Xattr>> {
    proptest::collection::btree_map(
        proptest::collection::vec(1_u8..=255, 1..255),
        proptest::collection::vec(any::<u8>(), 0..500),
        0..8,
    )
    .prop_map(|map| map.into_iter().map(|(name, value)| Xattr { name, value }).collect())
}

proptest! {
    #[test]
    fn a_list_reads_back(all in list_strategy()) {
        prop_assert_eq!(decode_list(BlockAddr(1), &list::encode_list(&all)).unwrap(), all);
    }

    #[test]
    fn hostile_lists_never_panic(mut bytes in list_strategy().prop_map(|all| list::encode_list(&all)), at in any::<prop::sample::Index>(), value: u8) {
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = decode_list(BlockAddr(1), &bytes);
    }
}
