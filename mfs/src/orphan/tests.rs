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
