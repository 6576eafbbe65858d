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

mod on_a_store {
    use std::collections::BTreeMap;

    use storage_control::block_on;

    use super::*;
    use crate::index::tests::{BITMAP_CREDITS, Rig};
    use crate::inode::{self, FileType};

    async fn carry_out(rig: &Rig, dinode: &mut Dinode, change: Change) {
        let needs = change.needs();
        rig.change(dinode, needs, async |txn, res, dinode| apply(txn, res, dinode, change).await)
            .await
            .unwrap();
        while let Some(step) = next_to_free(&rig.store, dinode, false).await.unwrap() {
            let guard = rig.alloc.lock_groups_for_free(&[step.addr]).await.unwrap();
            let mut txn = rig.store.begin(inode::FREE_STEP_CREDITS + BITMAP_CREDITS).await.unwrap();
            free_step(&mut txn, &guard, dinode, step).await.unwrap();
            inode::write(&mut txn, dinode).await.unwrap();
        }
    }

    #[test]
    fn attributes_move_out_of_the_dinode_and_back() {
        block_on(async {
            let rig = Rig::new().await;
            let mut dinode = rig.inode(FileType::Regular).await;
            let store = &rig.store;
            let big = vec![9; VALUE_MAX];
            for (name, value) in [(&b"user.a"[..], &b"1"[..]), (b"trusted.b", &big), (b"security.c", b"")] {
                let change = set(store, &dinode, name, value, SetMode::Create).await.unwrap();
                carry_out(&rig, &mut dinode, change).await;
                assert_eq!(get(store, &dinode, name).await.unwrap().as_deref(), Some(value));
                rig.assert_written(&dinode).await;
            }
            assert!(dinode.blocks >= 17 && dinode.xattrs.inline.is_empty());
            let names: Vec<_> = list(store, &dinode).await.unwrap().into_iter().map(|x| x.name).collect();
            assert_eq!(names, [&b"security.c"[..], b"trusted.b", b"user.a"]);

            let again = set(store, &dinode, b"user.a", b"2", SetMode::Create).await;
            assert!(matches!(again, Err(FsError::Exists)));
            let absent = set(store, &dinode, b"user.z", b"2", SetMode::Replace).await;
            assert!(matches!(absent, Err(FsError::NoData)));
            assert!(matches!(remove(store, &dinode, b"user.z").await, Err(FsError::NoData)));
            let full = set(store, &dinode, b"user.z", &big, SetMode::Any).await;
            assert!(matches!(full, Err(FsError::NoSpace)));

            let change = remove(store, &dinode, b"trusted.b").await.unwrap();
            carry_out(&rig, &mut dinode, change).await;
            assert_eq!((dinode.blocks, dinode.xattrs.root), (0, None));
            assert_eq!(get(store, &dinode, b"user.a").await.unwrap().as_deref(), Some(&b"1"[..]));
            let change = set(store, &dinode, b"user.big", &big, SetMode::Any).await.unwrap();
            carry_out(&rig, &mut dinode, change).await;
            rig.empty(&mut dinode).await;
        });
    }

    #[test]
    fn attributes_leave_a_full_dinode_alone() {
        block_on(async {
            let rig = Rig::new().await;
            let mut dinode = rig.inode(FileType::Regular).await;
            dinode.content = Content::Data(vec![1; dinode.inline_room()]);
            dinode.size = dinode.inline_room() as u64;
            let change = set(&rig.store, &dinode, b"user.a", b"1", SetMode::Any).await.unwrap();
            carry_out(&rig, &mut dinode, change).await;
            assert_eq!(dinode.blocks, 1);
            assert_eq!(get(&rig.store, &dinode, b"user.a").await.unwrap().as_deref(), Some(&b"1"[..]));
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn attributes_are_their_model(steps in proptest::collection::vec((0_u8..6, 0_usize..9000, any::<bool>()), 1..40)) {
            block_on(async {
                let rig = Rig::new().await;
                let mut dinode = rig.inode(FileType::Directory).await;
                let mut model = BTreeMap::new();
                for (which, len, keep) in steps {
                    let name = format!("user.{which}").into_bytes();
                    let change = if keep {
                        model.insert(name.clone(), vec![which; len]);
                        set(&rig.store, &dinode, &name, &vec![which; len], SetMode::Any).await
                    } else if model.remove(&name).is_some() {
                        remove(&rig.store, &dinode, &name).await
                    } else {
                        continue;
                    };
                    carry_out(&rig, &mut dinode, change.unwrap()).await;
                    let found = list(&rig.store, &dinode).await.unwrap();
                    assert_eq!(found.into_iter().map(|x| (x.name, x.value)).collect::<BTreeMap<_, _>>(), model);
                }
                rig.assert_written(&dinode).await;
                rig.assert_sound(&mut dinode).await;
            });
        }
    }
}
