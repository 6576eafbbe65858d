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
    assert_eq!(
        bytes,
        [0, 128, 1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 8, 2, b'a', b'b']
    );
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

mod on_a_store {
    use std::collections::BTreeMap;

    use storage_control::block_on;

    use super::*;
    use crate::dir::hash::tests::COLLIDE;
    use crate::index::tests::{BITMAP_CREDITS, Rig};

    /// The names of a directory and what they mean.
    type Model = BTreeMap<Vec<u8>, u64>;

    fn target(ino: u64) -> Target {
        Target { ino, generation: ino * 3, kind: FileType::Regular }
    }

    async fn add(rig: &Rig, dir: &mut Dinode, name: &[u8], ino: u64) -> Result<u64, FsError> {
        let needs = insert_needs(dir);
        rig.change(dir, needs, async |txn, res, dir| {
            insert(&rig.store, txn, res, dir, name, target(ino)).await
        })
        .await
    }

    async fn take(rig: &Rig, dir: &mut Dinode, name: &[u8], free: bool) -> Option<Dirent> {
        let removal = plan_remove(&rig.store, dir, name).await.unwrap()?;
        let guard = match removal.frees.filter(|_| free) {
            Some(addr) => Some(rig.alloc.lock_groups_for_free(&[addr]).await.unwrap()),
            None => None,
        };
        let mut txn = rig.store.begin(REMOVE_CREDITS + BITMAP_CREDITS).await.unwrap();
        remove(&rig.store, &mut txn, guard.as_ref(), dir, &removal).await.unwrap();
        crate::inode::write(&mut txn, dir).await.unwrap();
        Some(removal.dirent)
    }

    async fn all(rig: &Rig, dir: &Dinode, at_a_time: usize) -> Vec<Dirent> {
        let mut found: Vec<Dirent> = Vec::new();
        loop {
            let after = found.last().map_or(0, |dirent| dirent.cookie);
            let more = list(&rig.store, dir, after, at_a_time).await.unwrap();
            if more.is_empty() {
                return found;
            }
            found.extend(more);
        }
    }

    async fn assert_is(rig: &Rig, dir: &Dinode, model: &Model) {
        rig.assert_written(dir).await;
        let found = all(rig, dir, 7).await;
        assert!(found.windows(2).all(|pair| pair[0].cookie < pair[1].cookie));
        let names: Model = found.iter().map(|dirent| (dirent.name.clone(), dirent.ino)).collect();
        assert_eq!((&names, found.len()), (model, model.len()));
        assert_eq!(dir.entries, model.len() as u64);
        for (name, ino) in model {
            assert_eq!(lookup(&rig.store, dir, name).await.unwrap().map(|dirent| dirent.ino), Some(*ino));
        }
    }

    #[test]
    fn thousands_of_names_come_and_go() {
        block_on(async {
            let rig = Rig::new().await;
            let mut dir = rig.inode(FileType::Directory).await;
            let mut model = Model::new();
            for ino in 1..=6000 {
                let name = format!("{ino}-{}", "long name ".repeat(ino as usize % 25)).into_bytes();
                let name = name[..name.len().min(255)].to_vec();
                add(&rig, &mut dir, &name, ino).await.unwrap();
                model.insert(name, ino);
            }
            let Content::DirentTree(root) = &dir.content else { panic!("it is a tree") };
            assert!(root.depth >= 2);
            assert_is(&rig, &dir, &model).await;
            let (known, ino) = model.first_key_value().unwrap();
            assert!(matches!(add(&rig, &mut dir, known, *ino).await, Err(FsError::Exists)));
            assert_eq!(lookup(&rig.store, &dir, b"unknown").await.unwrap(), None);

            let names: Vec<_> = model.keys().cloned().collect();
            for (count, name) in names.iter().enumerate() {
                let removed = take(&rig, &mut dir, name, count % 5 != 0).await.unwrap();
                assert_eq!(Some(removed.ino), model.remove(name));
                if count % 1000 == 0 {
                    assert_is(&rig, &dir, &model).await;
                }
            }
            assert!(is_empty(&dir) && dir.size == 0);
            rig.empty(&mut dir).await;
            assert_eq!(dir.content, Content::Dirents(Vec::new()));
        });
    }

    #[test]
    #[ignore = "takes minutes in a debug build; cargo test --release -p mfs a_million -- --ignored"]
    fn a_million_names() {
        block_on(async {
            let rig = Rig::new().await;
            let mut dir = rig.inode(FileType::Directory).await;
            for ino in 1..=1_000_000 {
                add(&rig, &mut dir, format!("file-{ino:08}").as_bytes(), ino).await.unwrap();
            }
            let Content::DirentTree(root) = &dir.content else { panic!("it is a tree") };
            assert!(root.depth <= 3, "depth {}", root.depth);
            for ino in (1..=1_000_000).step_by(997) {
                let found = lookup(&rig.store, &dir, format!("file-{ino:08}").as_bytes()).await.unwrap();
                assert_eq!(found.map(|dirent| dirent.ino), Some(ino));
            }
            assert_eq!(all(&rig, &dir, 1000).await.len(), 1_000_000);
            for ino in 1..=1_000_000 {
                take(&rig, &mut dir, format!("file-{ino:08}").as_bytes(), true).await.unwrap();
            }
            rig.empty(&mut dir).await;
        });
    }

    #[test]
    fn names_of_one_hash_are_told_apart() {
        block_on(async {
            let rig = Rig::new().await;
            let mut dir = rig.inode(FileType::Directory).await;
            let mut model = Model::new();
            let name = |n: u64| [COLLIDE, format!("{n:0200}").as_bytes()].concat();
            for ino in 1..=300 {
                add(&rig, &mut dir, &name(ino), ino).await.unwrap();
                add(&rig, &mut dir, format!("other {ino}").as_bytes(), 1000 + ino).await.unwrap();
                model.insert(name(ino), ino);
                model.insert(format!("other {ino}").into_bytes(), 1000 + ino);
            }
            assert_is(&rig, &dir, &model).await;
            let cookie = take(&rig, &mut dir, &name(100), true).await.unwrap().cookie;
            model.remove(&name(100));
            assert_is(&rig, &dir, &model).await;
            assert_eq!(add(&rig, &mut dir, &name(999), 9).await.unwrap(), cookie);
            model.insert(name(999), 9);
            for ino in (1..=300).filter(|ino| ino % 3 == 0) {
                take(&rig, &mut dir, &name(ino), true).await.unwrap();
                model.remove(&name(ino));
            }
            assert_is(&rig, &dir, &model).await;
        });
    }

    #[test]
    fn a_listing_goes_on_behind_a_cookie_whatever_happens_to_other_names() {
        block_on(async {
            let rig = Rig::new().await;
            let mut dir = rig.inode(FileType::Directory).await;
            for ino in 1..=200 {
                add(&rig, &mut dir, format!("stays {ino}").as_bytes(), ino).await.unwrap();
            }
            let (mut seen, mut after, mut n) = (Vec::new(), 0, 0_u64);
            loop {
                let more = list(&rig.store, &dir, after, 10).await.unwrap();
                let Some(last) = more.last() else { break };
                after = last.cookie;
                seen.extend(
                    more.into_iter().filter(|dirent| dirent.name.starts_with(b"stays")).map(|d| d.ino),
                );
                for _ in 0..5 {
                    n += 1;
                    add(&rig, &mut dir, format!("comes {n}").as_bytes(), 10_000 + n).await.unwrap();
                }
                take(&rig, &mut dir, format!("comes {}", n / 2).as_bytes(), true).await;
            }
            seen.sort_unstable();
            assert_eq!(seen, (1..=200).collect::<Vec<_>>());
        });
    }

    #[test]
    fn a_name_can_be_pointed_elsewhere_and_keeps_its_cookie() {
        block_on(async {
            let rig = Rig::new().await;
            let mut dir = rig.inode(FileType::Directory).await;
            for ino in 1..=500 {
                let cookie = add(&rig, &mut dir, format!("{ino}").as_bytes(), ino).await.unwrap();
                let name = format!("{}", ino.div_ceil(2));
                let needs = Needs { meta: 0, credits: REPLACE_CREDITS };
                let old = rig
                    .change(&mut dir, needs, async |txn, _, dir| {
                        replace(&rig.store, txn, dir, name.as_bytes(), target(7000 + ino)).await
                    })
                    .await
                    .unwrap();
                let now = lookup(&rig.store, &dir, name.as_bytes()).await.unwrap().unwrap();
                assert_eq!((now.cookie, now.ino, now.name), (old.cookie, 7000 + ino, old.name));
                assert!(cookie > 2);
            }
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_directory_is_its_model(steps in proptest::collection::vec((0_u8..8, 0_u16..120, any::<bool>()), 1..300)) {
            block_on(async {
                let rig = Rig::new().await;
                let mut dir = rig.inode(FileType::Directory).await;
                let mut model = Model::new();
                for (at, (action, which, long)) in steps.into_iter().enumerate() {
                    let start: &[u8] = if which % 3 == 0 { COLLIDE } else { b"" };
                    let name = [start, which.to_string().as_bytes(), &vec![b'x'; if long { 200 } else { 3 }]].concat();
                    match action {
                        0..5 => {
                            let result = add(&rig, &mut dir, &name, at as u64 + 1).await;
                            assert_eq!(result.is_ok(), !model.contains_key(&name));
                            model.entry(name).or_insert(at as u64 + 1);
                        }
                        _ => {
                            let removed = take(&rig, &mut dir, &name, action % 2 == 0).await;
                            assert_eq!(removed.map(|dirent| dirent.ino), model.remove(&name));
                        }
                    }
                }
                assert_is(&rig, &dir, &model).await;
            });
        }
    }
}
