use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::format::extent::LEAF_MAX;

/// Where every block of a file is, one by one.
type Model = BTreeMap<u64, u64>;

fn flat(list: &[Extent]) -> Model {
    list.iter().flat_map(|e| (0..u64::from(e.len)).map(|i| (e.logical + i, e.physical.0 + i))).collect()
}

#[test]
fn neighbours_that_continue_on_the_device_are_joined() {
    let mut list = vec![Extent::new(0, BlockAddr(100), 4), Extent::new(8, BlockAddr(108), 4)];
    assert_eq!(leaf::insert(&mut list, Extent::new(4, BlockAddr(104), 4)), Ok(0));
    assert_eq!(list, [Extent::new(0, BlockAddr(100), 12)]);
}

#[test]
fn a_mapped_block_is_not_mapped_again() {
    let mut list = vec![Extent::new(4, BlockAddr(100), 4)];
    for start in 1..8 {
        assert!(leaf::insert(&mut list, Extent::new(start, BlockAddr(500), 4)).is_err(), "{start}");
    }
    assert!(leaf::insert(&mut list, Extent::new(0, BlockAddr(500), 4)).is_ok());
}

#[test]
fn hostile_extents_are_refused() {
    let good = Extent::new(1, BlockAddr(100), 4);
    for bad in [
        Extent { len: 0, ..good },
        Extent { len: u32::MAX, ..good },
        Extent { logical: u64::MAX, ..good },
        Extent { logical: LOGICAL_END - 1, ..good },
        Extent { physical: BlockAddr(0), ..good },
        Extent { physical: BlockAddr((1 << 48) - 1), ..good },
        Extent { flags: 1 << 9, ..good },
    ] {
        assert!(decode_list(BlockAddr(9), &encode_list(&[bad])).is_err(), "{bad:?}");
    }
    assert!(decode_list(BlockAddr(9), &encode_list(&[good, good])).is_err());
    assert!(decode_list(BlockAddr(9), &encode_list(&[good])[1..]).is_err());
}

proptest! {
    #[test]
    fn a_list_is_what_was_inserted(pieces in proptest::collection::vec((0_u64..200, 1_u32..6, 0_u64..40), 1..60)) {
        let (mut list, mut model) = (Vec::new(), Model::new());
        for (logical, len, shift) in pieces {
            let new = Extent::new(logical, BlockAddr(1000 + logical + shift / 20 * 1000), len);
            let taken = (logical..new.end()).any(|block| model.contains_key(&block));
            prop_assert_eq!(leaf::insert(&mut list, new).is_err(), taken);
            if !taken {
                model.extend(flat(&[new]));
            }
        }
        prop_assert_eq!(flat(&list), model);
        prop_assert_eq!(decode_list(BlockAddr(1), &encode_list(&list)).unwrap(), list);
    }

    #[test]
    fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..=LEAF_MAX * 24)) {
        let _ = decode_list(BlockAddr(9), &bytes);
    }
}
