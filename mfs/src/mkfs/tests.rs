//! mkfs, journals made later, and bad superblocks.

use storage_control::{MemDevice, SimRuntime};

use super::*;
use crate::{
    format::superblock::{Source, SuperblockError},
    testing::{BLOCKS, FS_START, Node, formatted, open_store, options},
};

fn read(world: &SimRuntime, device: &MemDevice) -> Result<(Superblock, Source), FsError> {
    let device = device.clone();
    world.run(async move { Superblock::read(&device, FS_START).await })
}

fn superblock_error(world: &SimRuntime, device: &MemDevice) -> SuperblockError {
    match read(world, device) {
        Err(FsError::Superblock(error)) => error,
        other => panic!("a superblock error was expected, not {other:?}"),
    }
}

/// Changes the superblock and makes its checksum right again.
fn forge(device: &MemDevice, addr: BlockAddr, change: impl FnOnce(&mut Block)) {
    device.poke(addr, |block| {
        change(block);
        header::seal(block, FIRST_CLOCK);
    });
}

#[test]
fn what_mkfs_wrote_is_read_again() {
    let world = SimRuntime::new(1);
    let (device, made) = formatted(&world, options(BLOCKS));
    let (found, source) = read(&world, &device).unwrap();
    assert_eq!((&found, source), (&made, Source::Original));
    assert_eq!((found.label.as_str(), found.geometry.groups, found.journal_blocks), ("test", 8, 1024));
    assert!(found.journal(0).is_some() && found.journal(1).is_some() && found.journal(2).is_none());
    assert!(device.unflushed().is_empty(), "everything is stable");
}

#[test]
fn sizes_follow_the_rules() {
    let by_size = |blocks: u64, fs_start: u64| {
        let options = Options { fs_start: BlockAddr(fs_start), journals: None, ..options(blocks) };
        let sb = plan(&options).unwrap().superblock;
        let journals = sb.journals.iter().flatten().count();
        (sb.geometry.group_blocks, sb.geometry.groups, sb.journal_blocks, journals)
    };
    assert_eq!(by_size(BLOCKS, 1040), (2048, 8, 1024, 1));
    assert_eq!(by_size(1 << 18, 4112), (16_384, 16, 4096, 4)); // 1 GiB
    assert_eq!(by_size(1 << 19, 4112), (32_768, 16, 8192, 4)); // 2 GiB
    assert_eq!(by_size(1 << 34, 4112), (262_144, 65_536, 32_768, 4)); // 64 TiB
    let odd = (1 << 19) + 777;
    assert_eq!(by_size(odd, 4112).1, 16);
    let refused = |blocks, change: fn(&mut Options)| {
        let mut options = options(blocks);
        change(&mut options);
        plan(&options).err().expect("refused").to_string()
    };
    assert!(refused(1000, |_| ()).contains("64 MiB"));
    assert!(refused(1 << 40, |_| ()).contains("64 TiB"));
    assert!(refused(BLOCKS, |o| o.label = "x".repeat(65)).contains("label"));
    assert!(refused(BLOCKS, |o| o.journals = Some(40)).contains("40 journals"));
    assert!(refused(BLOCKS, |o| o.group_blocks = Some(3000)).contains("3000"));
}

#[test]
fn a_damaged_superblock_falls_back_to_the_copy() {
    let world = SimRuntime::new(1);
    let (device, made) = formatted(&world, options(BLOCKS));
    device.poke(FS_START, |block| block[300] ^= 1);
    let (found, source) = read(&world, &device).unwrap();
    assert_eq!((found.journals, source), (made.journals, Source::Copy));
    device.poke(made.geometry.superblock_copy(), |block| block[300] ^= 1);
    assert!(matches!(superblock_error(&world, &device), SuperblockError::Damaged { .. }));
}

#[test]
fn bad_superblocks_are_named_with_the_remedy() {
    let world = SimRuntime::new(1);
    let error = superblock_error(&world, &MemDevice::new(BLOCKS));
    assert!(matches!(error, SuperblockError::WrongMagic { .. }) && error.to_string().contains("mkfs"));

    let (device, _) = formatted(&world, options(BLOCKS));
    forge(&device, FS_START, |block| block[64] = 2);
    let error = superblock_error(&world, &device);
    assert!(error == SuperblockError::NewerFormat(2) && error.to_string().contains("newer matrix"));

    let (device, _) = formatted(&world, options(BLOCKS));
    forge(&device, FS_START, |block| block[88] = 4);
    assert_eq!(superblock_error(&world, &device), SuperblockError::UnknownFeatures(4));

    let (device, _) = formatted(&world, options(BLOCKS));
    let small = MemDevice::new(BLOCKS - 100);
    small.poke(FS_START, |block| block.copy_from_slice(&device.peek(FS_START, 1)));
    let error = superblock_error(&world, &small);
    assert!(matches!(error, SuperblockError::Truncated { .. }) && error.to_string().contains("truncated"));
}

#[test]
fn a_superblock_with_forged_numbers_is_refused_and_never_panics() {
    let world = SimRuntime::new(1);
    let (device, _) = formatted(&world, options(BLOCKS));
    let good = device.peek(FS_START, 1);
    for at in 64..BLOCK_SIZE {
        for value in [0, 1, 0x7f, 0xff] {
            let mut block: Block = good[..].try_into().unwrap();
            block[at] = value;
            header::seal(&mut block, FIRST_CLOCK);
            if let Ok(sb) = Superblock::parse(&block, FS_START) {
                let g = sb.geometry;
                assert!(g.groups > 0 && g.blocks_in(g.groups - 1) > 0);
                assert!(g.group_of(sb.root).is_some());
            }
        }
    }
}

#[test]
fn mkfs_that_was_cut_short_leaves_no_filesystem() {
    let world = SimRuntime::new(1);
    let (device, _) = formatted(&world, options(BLOCKS));
    let old = device.durable_image();
    device.record();
    let on: Arc<dyn Device> = Arc::new(device.clone());
    world.run(async move { mkfs(&on, &options(BLOCKS), |_, _| ()).await }).unwrap();
    let changes = device.take_recorded();
    let shadow = MemDevice::from_image(&old);
    let copy = BlockAddr(BLOCKS - 1);
    for (n, change) in changes.iter().enumerate() {
        shadow.apply(change);
        // From the first flush (both superblocks are gone) to the copy.
        let copy_written = changes[..=n].iter().skip(3).any(
            |change| matches!(change, storage_control::mem_device::Recorded::Write { at, .. } if *at == copy),
        );
        if n >= 2 && !copy_written {
            let cut = MemDevice::from_image(&shadow.durable_image());
            assert!(read(&world, &cut).is_err(), "after change {n}");
        }
    }
}

#[test]
fn a_journal_is_made_on_demand_and_can_be_used() {
    let node = Node::new(1, BLOCKS);
    let (alloc, lcl) = (node.alloc.clone(), node.lcl.clone());
    let place = node.world.run(async move {
        let place = make_journal(&alloc, &lcl, 7).await.unwrap();
        assert_eq!(make_journal(&alloc, &lcl, 7).await.unwrap(), place, "twice is once");
        assert!(make_journal(&alloc, &lcl, 256).await.is_err());
        place
    });
    let (sb, source) = read(&node.world, &node.device).unwrap();
    assert_eq!((sb.journal(7), source), (Some(place), Source::Original));
    let other = open_store(&node.world, &node.device, &sb, 7);
    let orphans = BlockAddr(place.0 + ORPHANS_AT);
    node.world.run(async move {
        other.read(orphans, BlockKind::Orphans, LockName::Orphans(7)).await.unwrap();
        other.shutdown().await.unwrap();
    });
    // The copy agrees.
    node.device.poke(FS_START, |block| block.fill(0));
    assert_eq!(read(&node.world, &node.device).unwrap().0.journal(7), Some(place));
}

#[test]
fn making_a_journal_survives_a_crash_at_any_write() {
    let node = Node::new(1, BLOCKS);
    let before = node.device.durable_image();
    node.device.record();
    let (alloc, lcl) = (node.alloc.clone(), node.lcl.clone());
    node.world.run(async move { make_journal(&alloc, &lcl, 3).await }).unwrap();
    let changes = node.device.take_recorded();
    let sb = node.store.superblock().clone();
    for stop in 0..changes.len() {
        let device = MemDevice::from_image(&before);
        changes[..stop].iter().for_each(|change| device.apply(change));
        device.crash(|_| stop % 2 == 0);
        let world = SimRuntime::new(1);
        let (on, copy): (Arc<dyn Device>, _) = (Arc::new(device.clone()), sb.clone());
        let runtime: Arc<dyn storage_control::Runtime> = Arc::new(world.clone());
        world.run(async move { crate::journal::replay(&on, &copy, 0, &runtime).await }).unwrap();
        let (sb, _) = read(&world, &device).unwrap();
        let again = Node::mount(&world, &device, &sb, 1);
        let (alloc, lcl) = (again.alloc.clone(), again.lcl.clone());
        let place = world.run(async move { make_journal(&alloc, &lcl, 3).await }).unwrap();
        let (sb, _) = read(&world, &device).unwrap();
        assert_eq!(sb.journal(3), Some(place), "cut after change {stop}");
        let alloc = again.alloc.clone();
        let free = world.run(async move { alloc.statfs().await }).unwrap().free;
        let alloc = node.alloc.clone();
        let expected = node.world.run(async move { alloc.statfs().await }).unwrap().free;
        assert_eq!(free, expected, "cut after change {stop}: a journal is allocated once");
    }
}

/// The checksum covers every byte, so it stands for all of them: when one of these fails, the format has changed.
#[test]
fn golden_checksums() {
    let world = SimRuntime::new(1);
    let (device, sb) = formatted(&world, options(BLOCKS));
    let checksum = |addr: BlockAddr| {
        let buf = device.peek(addr, 1);
        header::Header::of(block_of(&buf)).checksum.get()
    };
    let group = sb.geometry.group_start(0);
    let journal = sb.journal(0).unwrap();
    let golden = [
        ("superblock", checksum(FS_START)),
        ("copy", checksum(sb.geometry.superblock_copy())),
        ("group header", checksum(group)),
        ("bitmap", checksum(BlockAddr(group.0 + 1))),
        ("journal header", checksum(journal)),
        ("orphan table", checksum(BlockAddr(journal.0 + ORPHANS_AT))),
        ("root", checksum(sb.root)),
    ];
    assert_eq!(
        golden,
        [
            ("superblock", 0x03c50ec2),
            ("copy", 0xd9edcf49),
            ("group header", 0x24b5c474),
            ("bitmap", 0x0f3a05c0),
            ("journal header", 0xdacf861e),
            ("orphan table", 0x0493d5ae),
            ("root", 0x5e472e4e),
        ]
    );
}

#[test]
fn a_large_filesystem_is_made_by_its_group_headers_alone() {
    let world = SimRuntime::new(1);
    let (device, sb) = formatted(&world, options(1 << 30)); // 4 TiB
    assert_eq!((sb.geometry.groups, sb.geometry.group_blocks), (4096, MAX_GROUP_BLOCKS));
    assert!(device.writes() < 4096 + 100);
    let node = Node::mount(&world, &device, &sb, 0);
    world.run(async move {
        let usage = node.alloc.statfs().await.unwrap();
        assert!(usage.free > (1 << 30) * 99 / 100);
        // Deep in a group whose bitmaps were never written.
        let goal = BlockAddr(sb.geometry.group_start(77).0 + 200_000);
        let want = crate::alloc::Want { data: 20_000, goal: Some(goal), ..Default::default() };
        let res = node.alloc.reserve(want).await.unwrap();
        assert_eq!(res.runs(), [Run { addr: goal, len: 20_000 }]);
        let mut txn = node.store.begin(res.credits()).await.unwrap();
        res.log_run(&mut txn, res.runs()[0]).await.unwrap();
        drop((txn, res));
        node.lcl.trim(0).await;
        assert_eq!(node.alloc.statfs().await.unwrap().free, usage.free - 20_000);
        let guard = node.alloc.lock_groups_for_free(&[goal]).await.unwrap();
        let mut txn = node.store.begin(guard.credits()).await.unwrap();
        guard.free_run(&mut txn, Run { addr: goal, len: 20_000 }).await.unwrap();
        drop((txn, guard));
        node.store.shutdown().await.unwrap();
        assert_eq!(node.alloc.statfs().await.unwrap().free, usage.free);
    });
}
