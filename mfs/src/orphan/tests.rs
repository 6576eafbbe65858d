use storage_control::BLOCK_SIZE;

use super::*;

#[test]
fn a_table_block_counts_its_slots() {
    let mut block = [0; BLOCK_SIZE];
    let orphan = |ino| Orphan { ino, generation: 5, kind: OrphanKind::Free };
    for slot in [0, 3, SLOTS - 1] {
        write_slot(&mut block, slot, Some(orphan(slot as u64 + 1)));
    }
    write_slot(&mut block, 3, Some(Orphan { kind: OrphanKind::Truncate, ..orphan(4) }));
    write_slot(&mut block, 0, None);
    let body = read_block(BlockAddr(9), &block).unwrap();
    assert_eq!(body.used.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), [3, SLOTS - 1]);
    assert_eq!(body.used[0].1.kind, OrphanKind::Truncate);
}

#[test]
fn hostile_tables_are_refused() {
    let mut good = [0; BLOCK_SIZE];
    write_slot(&mut good, 2, Some(Orphan { ino: 7, generation: 5, kind: OrphanKind::Free }));
    assert!(read_block(BlockAddr(9), &good).is_ok());
    let slot = SLOTS_AT + 2 * 24;
    for (at, value) in [(HEAD_AT + 8, 2), (HEAD_AT + 12, 1), (slot, 0), (slot + 16, 3), (slot + 20, 1)] {
        let mut bad = good;
        bad[at] = value;
        assert!(read_block(BlockAddr(9), &bad).is_err(), "{value} at {at}");
    }
}

mod on_a_store {
    use storage_control::{BlockAddr, block_on};

    use super::*;
    use crate::alloc::Want;
    use crate::index::tests::{BITMAP_CREDITS, Rig};

    async fn table(rig: &Rig) -> Table {
        let journal = rig.store.superblock().journal(0).unwrap();
        Table::load(&rig.store, 0, BlockAddr(journal.0 + crate::format::journal::ORPHANS_AT)).await.unwrap()
    }

    async fn add(rig: &Rig, table: &Table, orphan: Orphan) {
        let slot = table.slot();
        let needs = slot.needs();
        let mut res = rig.alloc.reserve(Want { meta: needs.meta, ..Want::default() }).await.unwrap();
        let mut txn = rig.store.begin(needs.credits + BITMAP_CREDITS).await.unwrap();
        table.add(&mut txn, Some(&mut res), slot, orphan).await.unwrap();
    }

    async fn remove(rig: &Rig, table: &Table, ino: u64, kind: OrphanKind) {
        let mut txn = rig.store.begin(REMOVE_CREDITS).await.unwrap();
        table.remove(&mut txn, ino, kind).await.unwrap();
    }

    fn free(ino: u64) -> Orphan {
        Orphan { ino, generation: ino + 7, kind: OrphanKind::Free }
    }

    #[test]
    fn a_table_grows_and_says_the_same_when_it_is_read_again() {
        block_on(async {
            let rig = Rig::new().await;
            let first = table(&rig).await;
            for ino in 1..=400 {
                add(&rig, &first, free(ino)).await;
            }
            for ino in (1..=400).filter(|ino| ino % 4 != 0) {
                remove(&rig, &first, ino, OrphanKind::Free).await;
            }
            let again = table(&rig).await;
            assert_eq!(first.list(), (1..=100).map(|n| free(4 * n)).collect::<Vec<_>>());
            assert_eq!(again.list(), first.list());
            // What was freed serves again: no block is needed.
            for ino in 1001..=1300 {
                assert_eq!(again.slot().needs().meta, 0);
                add(&rig, &again, free(ino)).await;
            }
            assert_eq!(table(&rig).await.list(), again.list());
        });
    }

    #[test]
    fn an_inode_is_in_a_table_once_and_to_free_it_wins() {
        block_on(async {
            let rig = Rig::new().await;
            let table = table(&rig).await;
            let truncate = Orphan { kind: OrphanKind::Truncate, ..free(5) };
            add(&rig, &table, truncate).await;
            add(&rig, &table, free(5)).await;
            add(&rig, &table, truncate).await;
            assert_eq!(table.list(), [free(5)]);
            remove(&rig, &table, 5, OrphanKind::Truncate).await;
            assert_eq!(table.find(5), Some(free(5)));
            remove(&rig, &table, 5, OrphanKind::Free).await;
            assert_eq!(table.list(), []);
        });
    }

    #[test]
    fn a_claimed_slot_is_given_back() {
        block_on(async {
            let rig = Rig::new().await;
            let table = table(&rig).await;
            let slots: Vec<_> = (0..SLOTS).map(|_| table.slot()).collect();
            assert_eq!(table.slot().needs().meta, 1);
            drop(slots);
            assert_eq!(table.slot().needs().meta, 0);
        });
    }
}
