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
    use crate::alloc::Want;
    use crate::index::tests::Rig;
    use crate::inode::{self, FileType};

    async fn file(rig: &Rig) -> Dinode {
        let mut dinode = rig.inode(FileType::Regular).await;
        dinode.content = Content::Extents(Vec::new());
        dinode
    }

    /// Maps fresh blocks, at most `len` in one piece, of the group of this number if it has them.
    async fn add(
        rig: &Rig,
        file: &mut Dinode,
        logical: u64,
        len: u32,
        group: u64,
    ) -> Result<Extent, FsError> {
        let needs = insert_needs(&rig.store, file, logical, u64::from(len)).await?;
        let near = Some((group % u64::from(rig.store.geometry().groups)) as u32);
        let want = Want { meta: needs.meta, data: len, near, ..Want::default() };
        let mut res = rig.alloc.reserve(want).await?;
        let run = res.runs()[0];
        let new = Extent::new(logical, run.addr, run.len);
        let mut txn = rig.store.begin(needs.credits + 1 + res.credits()).await?;
        insert(&rig.store, &mut txn, &mut res, file, new).await?;
        res.log_run(&mut txn, run).await?;
        inode::write(&mut txn, file).await?;
        Ok(new)
    }

    async fn take(rig: &Rig, file: &mut Dinode, range: Range<u64>, most_steps: usize) {
        for _ in 0..most_steps {
            let Some(step) = next_to_free(&rig.store, file, range.clone()).await.unwrap() else { return };
            let needs = remove_needs(file, &range);
            let mut res = rig.alloc.reserve(Want { meta: needs.meta, ..Want::default() }).await.unwrap();
            // Alone, so that it need not be by try.
            let guard = rig.alloc.lock_groups_for_free(&[step.addr]).await.unwrap();
            let credits = needs.credits + 1 + res.credits() + guard.credits();
            let mut txn = rig.store.begin(credits).await.unwrap();
            let freed =
                remove_step(&rig.store, &mut txn, &guard, Some(&mut res), file, range.clone(), step).await;
            let freed = freed.unwrap();
            inode::write(&mut txn, file).await.unwrap();
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

    #[test]
    fn a_fragmented_file_grows_a_tree_and_gives_all_of_it_back() {
        block_on(async {
            let rig = Rig::new().await;
            let mut file = file(&rig).await;
            let mut model = Model::new();
            // Every second block, in an order that fills leaves everywhere.
            for i in 0..12_000_u64 {
                let logical = i * 7919 % 12_000 * 2;
                let new = add(&rig, &mut file, logical, 1, i).await.unwrap();
                model.extend(flat(&[new]));
            }
            let Content::ExtentTree(root) = &file.content else { panic!("it is a tree") };
            assert_eq!(root.depth, 1);
            assert_eq!(mapped(&rig, &file, 0..30_000).await, model);
            assert_eq!(next_data(&rig.store, &file, 10_001).await.unwrap().map(|e| e.logical), Some(10_002));
            assert_eq!(next_data(&rig.store, &file, 24_000).await.unwrap(), None);
            rig.assert_written(&file).await;

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
                add(&rig, &mut file, logical * 2, 1, logical).await.unwrap();
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
                add(&rig, &mut file, end / 400 * i - 1, 1, i).await.unwrap();
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
                add(&rig, &mut file, logical * 2, 1, logical).await.unwrap();
            }
            // Data go, nodes stay: as after a crash between two steps.
            let Content::ExtentTree(before) = file.content.clone() else { panic!("it is a tree") };
            for logical in (10..990).step_by(2) {
                take(&rig, &mut file, logical..logical + 1, 1).await;
            }
            let new = add(&rig, &mut file, 20, 900, 7).await.unwrap();
            let Content::ExtentTree(after) = file.content.clone() else { panic!("it is a tree") };
            assert!(before.entries.len() >= 3 && after.entries.len() >= 2);
            for logical in 20..920 {
                let found = mapped(&rig, &file, logical..logical + 1).await;
                assert_eq!(found, Model::from([(logical, new.physical.0 + logical - 20)]));
            }
        });
    }

    /// The range of a first child that was freed belongs to the next one, whose own key was above it: a split
    /// there once put a lower key behind a higher one.
    #[test]
    fn the_range_of_a_freed_first_leaf_fills_again() {
        block_on(async {
            let rig = Rig::new().await;
            let mut file = file(&rig).await;
            for logical in 0..1000 {
                add(&rig, &mut file, logical * 2, 1, logical).await.unwrap();
            }
            take(&rig, &mut file, 0..400, usize::MAX).await;
            for logical in (0..200).rev() {
                add(&rig, &mut file, logical * 2, 1, logical).await.unwrap();
            }
            rig.assert_written(&file).await;
            assert_eq!(mapped(&rig, &file, 0..2000).await.len(), 1000);
            file.size = 2000 * 4096;
            rig.assert_sound(&mut file).await;
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
                add(&rig, &mut file, logical * 2, 1, logical).await.unwrap();
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
            let new = add(&rig, &mut file, 5, 3, 2).await.unwrap();
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
                        // Spread, so that few neighbours join.
                        let new = add(&rig, &mut file, logical, len, way * 5 + logical % 5).await.unwrap();
                        model.extend(flat(&[new]));
                    }
                }
                assert_eq!(mapped(&rig, &file, 0..5000).await, model);
                rig.assert_written(&file).await;
                file.size = 5000 * 4096;
                rig.assert_sound(&mut file).await;
                rig.empty(&mut file).await;
                let report = rig.check().await;
                assert!(report.is_clean(), "{report:#?}");
            });
        }
    }
}
