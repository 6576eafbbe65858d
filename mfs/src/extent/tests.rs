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

mod on_a_store {
    use storage_control::block_on;

    use super::*;
    use crate::index::tests::{BITMAP_CREDITS, Rig};
    use crate::inode::{self, FileType};

    async fn file(rig: &Rig) -> Dinode {
        let mut dinode = rig.inode(FileType::Regular).await;
        dinode.content = Content::Extents(Vec::new());
        dinode
    }

    async fn add(rig: &Rig, file: &mut Dinode, new: Extent) -> Result<(), FsError> {
        let needs = insert_needs(&rig.store, file, new.logical, u64::from(new.len)).await?;
        rig.change(file, needs, async |txn, res, file| insert(&rig.store, txn, res, file, new).await).await
    }

    async fn take(rig: &Rig, file: &mut Dinode, range: Range<u64>, most_steps: usize) {
        for _ in 0..most_steps {
            let Some(step) = next_to_free(&rig.store, file, range.clone()).await.unwrap() else { return };
            let needs = remove_needs(file, &range);
            let guard = rig.alloc.lock_groups_for_free(&[step.addr]).await.unwrap();
            let freed = rig
                .change(file, needs, async |txn, res, file| {
                    remove_step(&rig.store, txn, &guard, Some(res), file, range.clone(), step).await
                })
                .await
                .unwrap();
            let group = |addr| rig.store.geometry().group_of(addr);
            assert!(freed.iter().all(|run| group(run.addr) == group(step.addr)), "a step frees in one group");
        }
    }

    async fn mapped(rig: &Rig, file: &Dinode, range: Range<u64>) -> Model {
        let pieces = map(&rig.store, file, range.start, range.end - range.start).await.unwrap();
        let mut at = range.start;
        let mut found = Model::new();
        for piece in pieces {
            let (logical, len) = match piece {
                Mapping::Hole { logical, len } => (logical, len),
                Mapping::Data(extent) => {
                    found.extend(flat(&[extent]));
                    (extent.logical, u64::from(extent.len))
                }
            };
            assert_eq!(logical, at, "pieces cover the range");
            at += len;
        }
        assert_eq!(at, range.end);
        found
    }

    /// Places far from what the allocator of the rig gives away, in different groups.
    fn place(logical: u64, way: u64) -> BlockAddr {
        BlockAddr(60_000 + (logical * way) % 30_000)
    }

    #[test]
    fn a_fragmented_file_grows_a_tree_and_gives_all_of_it_back() {
        block_on(async {
            let rig = Rig::new().await;
            let mut file = file(&rig).await;
            let mut model = Model::new();
            // Every second block, in an order that fills leaves everywhere.
            for i in 0..12_000_u64 {
                let logical = i * 7919 % 12_000 * 2;
                let new = Extent::new(logical, place(logical, 3), 1);
                add(&rig, &mut file, new).await.unwrap();
                model.extend(flat(&[new]));
            }
            let Content::ExtentTree(root) = &file.content else { panic!("it is a tree") };
            assert_eq!(root.depth, 1);
            assert_eq!(mapped(&rig, &file, 0..30_000).await, model);
            assert_eq!(next_data(&rig.store, &file, 10_001).await.unwrap().map(|e| e.logical), Some(10_002));
            assert_eq!(next_data(&rig.store, &file, 24_000).await.unwrap(), None);
            rig.assert_written(&file).await;
            assert!(add(&rig, &mut file, Extent::new(4000, BlockAddr(60_000), 1)).await.is_err());

            take(&rig, &mut file, 20_000..u64::MAX, usize::MAX).await;
            model.retain(|logical, _| *logical < 20_000);
            assert_eq!(mapped(&rig, &file, 0..30_000).await, model);
            take(&rig, &mut file, 5000..15_000, usize::MAX).await;
            model.retain(|logical, _| !(5000..15_000).contains(logical));
            assert_eq!(mapped(&rig, &file, 0..30_000).await, model);
            rig.empty(&mut file).await;
            assert_eq!(file.content, Content::Extents(Vec::new()));
        });
    }

    #[test]
    fn a_file_that_is_only_appended_to_has_full_leaves() {
        block_on(async {
            let rig = Rig::new().await;
            let mut file = file(&rig).await;
            for logical in 0..2000 {
                add(&rig, &mut file, Extent::new(logical * 2, place(logical, 7), 1)).await.unwrap();
            }
            let nodes = file.blocks - 2000;
            assert!(nodes <= 2000_u64.div_ceil(LEAF_MAX as u64) + 1, "{nodes} blocks");
        });
    }

    #[test]
    fn a_file_of_8_tib_is_sparse() {
        block_on(async {
            let rig = Rig::new().await;
            let mut file = file(&rig).await;
            let end = (8 << 40) / 4096;
            for i in 1..=400 {
                add(&rig, &mut file, Extent::new(end / 400 * i - 1, place(i, 1000), 1)).await.unwrap();
            }
            assert_eq!(mapped(&rig, &file, 0..end).await.len(), 400);
            assert_eq!(
                next_data(&rig.store, &file, 1).await.unwrap().map(|e| e.logical),
                Some(end / 400 - 1)
            );
            rig.empty(&mut file).await;
        });
    }

    #[test]
    fn an_extent_over_what_several_leaves_cover_is_found_from_every_block() {
        block_on(async {
            let rig = Rig::new().await;
            let mut file = file(&rig).await;
            for logical in 0..500 {
                add(&rig, &mut file, Extent::new(logical * 2, place(logical, 11), 1)).await.unwrap();
            }
            // Data go, nodes stay: as after a crash between two steps.
            let Content::ExtentTree(before) = file.content.clone() else { panic!("it is a tree") };
            for logical in (10..990).step_by(2) {
                take(&rig, &mut file, logical..logical + 1, 1).await;
            }
            add(&rig, &mut file, Extent::new(20, BlockAddr(50_000), 900)).await.unwrap();
            let Content::ExtentTree(after) = file.content.clone() else { panic!("it is a tree") };
            assert!(before.entries.len() >= 3 && after.entries.len() >= 2);
            for logical in 20..920 {
                let found = mapped(&rig, &file, logical..logical + 1).await;
                assert_eq!(found, Model::from([(logical, 50_000 + logical - 20)]));
            }
        });
    }

    /// `insert` after a crash that left nothing but an empty index node.
    #[test]
    fn an_empty_branch_grows_again() {
        block_on(async {
            let rig = Rig::new().await;
            let mut file = file(&rig).await;
            let mut logical = 0;
            while !matches!(&file.content, Content::ExtentTree(root) if root.depth == 2) {
                add(&rig, &mut file, Extent::new(logical * 2, place(logical, 7), 1)).await.unwrap();
                logical += 1;
            }
            loop {
                let step = next_to_free(&rig.store, &file, 0..u64::MAX).await.unwrap().unwrap();
                let Content::ExtentTree(root) = &file.content else { panic!("the root goes last") };
                let path = tree(&rig.store, &file).descend(root, u64::MAX - 1).await.unwrap();
                if matches!(path.end, crate::index::End::EmptyNode) {
                    assert_eq!(step.addr, path.end_addr());
                    break;
                }
                take(&rig, &mut file, 0..u64::MAX, 1).await;
            }
            assert_eq!(mapped(&rig, &file, 0..1 << 30).await, Model::new());
            let new = Extent::new(5, BlockAddr(50_000), 3);
            add(&rig, &mut file, new).await.unwrap();
            assert_eq!(mapped(&rig, &file, 0..1 << 30).await, flat(&[new]));
            rig.empty(&mut file).await;
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_file_is_its_model(
            steps in proptest::collection::vec((0_u8..10, 0_u64..3000, 1_u32..12, 0_u64..4), 1..500),
        ) {
            block_on(async {
                let rig = Rig::new().await;
                let mut file = file(&rig).await;
                let mut model = Model::new();
                for (action, logical, len, way) in steps {
                    let range = logical..logical + u64::from(len);
                    if action == 9 {
                        // A hole, or in every fourth case the end of the file; perhaps not to the end.
                        let range = if way == 0 { logical..u64::MAX } else { logical..logical + 100 * way };
                        take(&rig, &mut file, range.clone(), usize::MAX).await;
                        model.retain(|block, _| !range.contains(block));
                    } else if model.range(range).next().is_none() {
                        // Spread, so that few neighbours join; within one group, as the allocator gives them.
                        let new = Extent::new(logical, BlockAddr(1056 + 2048 * (1 + way * 9 + logical % 9) + logical % 2000), len);
                        add(&rig, &mut file, new).await.unwrap();
                        model.extend(flat(&[new]));
                    }
                }
                assert_eq!(mapped(&rig, &file, 0..5000).await, model);
                rig.assert_written(&file).await;
                rig.empty(&mut file).await;
            });
        }
    }
}
