mod hostile;

use std::sync::Arc;

use storage_control::{Clock, MemDevice, block_on};

use super::*;
use crate::alloc::Want;
use crate::dir;
use crate::extent::{self, Extent};
use crate::format::dinode::flags;
use crate::format::header::{self, Block, Header, seal};
use crate::format::journal::ORPHANS_AT;
use crate::index::tests::{BITMAP_CREDITS, Rig};
use crate::inode::{self, Content, Dinode, FileType};
use crate::orphan::{Orphan, OrphanKind, Table};
use crate::xattr;

const FS_START: BlockAddr = BlockAddr(1040);

/// A filesystem with something of everything in it.
struct Sample {
    rig: Rig,
    small_dir: u64,
    large_dir: u64,
    wide_dir: u64,
    many_names: u64,
    fragmented: u64,
    linked: u64,
    with_attributes: u64,
    orphan: u64,
}

async fn make(rig: &Rig, parent: &mut Dinode, name: &[u8], kind: FileType) -> Dinode {
    let mut dinode = rig.inode(kind).await;
    rig.link(parent, name, &mut dinode).await;
    dinode
}

/// A file of so many extents of one block, one block apart.
async fn make_fragmented(rig: &Rig, parent: &mut Dinode, name: &[u8], extents: u64) -> u64 {
    let mut file = rig.inode(FileType::Regular).await;
    file.content = Content::Extents(Vec::new());
    file.size = extents * 2 * 4096;
    for i in 0..extents {
        let needs = extent::insert_needs(&rig.store, &file, i * 2, 1).await.unwrap();
        let want = Want { meta: needs.meta, data: 1, near: Some((i % 8) as u32), ..Want::default() };
        let mut res = rig.alloc.reserve(want).await.unwrap();
        let run = res.runs()[0];
        let mut txn = rig.store.begin(needs.credits + 1 + res.credits()).await.unwrap();
        let new = Extent::new(i * 2, run.addr, run.len);
        extent::insert(&rig.store, &mut txn, &mut res, &mut file, new).await.unwrap();
        res.log_run(&mut txn, run).await.unwrap();
        inode::write(&mut txn, &file).await.unwrap();
    }
    rig.link(parent, name, &mut file).await;
    file.ino
}

/// A directory with index nodes, all names of which mean one file. Returns both.
async fn make_wide(rig: &Rig, parent: &mut Dinode) -> (u64, u64) {
    let mut wide = make(rig, parent, b"wide", FileType::Directory).await;
    // Leaves less room for the root.
    let change =
        xattr::set(&rig.store, &wide, b"user.inline", &[7; 1000], xattr::SetMode::Any).await.unwrap();
    rig.change(&mut wide, change.needs(), async |txn, res, dir| xattr::apply(txn, res, dir, change).await)
        .await
        .unwrap();
    let mut file = rig.inode(FileType::Regular).await;
    let target = dir::Target::of(&file);
    let is_deep = |wide: &Dinode| matches!(&wide.content, Content::DirentTree(root) if root.depth == 2);
    file.nlink = 0;
    while !is_deep(&wide) {
        let name = format!("{:0250}", file.nlink).into_bytes();
        let needs = dir::insert_needs(&wide);
        rig.change(&mut wide, needs, async |txn, res, wide| {
            dir::insert(&rig.store, txn, res, wide, &name, target).await
        })
        .await
        .unwrap();
        file.nlink += 1;
    }
    rig.change(&mut file, inode::Needs::default(), async |_, _, _| Ok(())).await.unwrap();
    (wide.ino, file.ino)
}

async fn make_orphan(rig: &Rig) -> u64 {
    let mut orphan = rig.inode(FileType::Regular).await;
    orphan.nlink = 0;
    orphan.set(flags::ORPHAN, true);
    let journal = rig.store.superblock().journal(0).unwrap();
    let table = Table::load(&rig.store, 0, BlockAddr(journal.0 + ORPHANS_AT)).await.unwrap();
    let slot = table.slot();
    let mut txn = rig.store.begin(2 + BITMAP_CREDITS).await.unwrap();
    let entry = Orphan { ino: orphan.ino, generation: orphan.generation, kind: OrphanKind::Free };
    table.add(&mut txn, None, slot, entry).await.unwrap();
    inode::write(&mut txn, &orphan).await.unwrap();
    orphan.ino
}

async fn sample() -> Sample {
    let rig = Rig::with_blocks(20_000).await;
    let mut root = rig.root().await;
    let mut small = make(&rig, &mut root, b"small", FileType::Directory).await;
    make(&rig, &mut small, b"pipe", FileType::Fifo).await;
    let mut linked = rig.inode(FileType::Regular).await;
    linked.nlink = 2;
    linked.content = Content::Data(b"hello".to_vec());
    linked.size = 5;
    rig.link(&mut small, b"first", &mut linked).await;
    rig.link(&mut root, b"second", &mut linked).await;

    let mut large = make(&rig, &mut root, b"large", FileType::Directory).await;
    for n in 0..300 {
        let name = format!("a rather long name that fills leaves quickly {n}").into_bytes();
        let kind = if n % 50 == 0 { FileType::Directory } else { FileType::Regular };
        make(&rig, &mut large, &name, kind).await;
    }
    let fragmented = make_fragmented(&rig, &mut large, b"fragmented", 400).await;

    let mut attributed = make(&rig, &mut large, b"attributed", FileType::Symlink).await;
    let change =
        xattr::set(&rig.store, &attributed, b"user.big", &[7; 10_000], xattr::SetMode::Any).await.unwrap();
    let needs = change.needs();
    rig.change(&mut attributed, needs, async |txn, res, file| xattr::apply(txn, res, file, change).await)
        .await
        .unwrap();
    let (wide_dir, many_names) = make_wide(&rig, &mut root).await;
    let orphan = make_orphan(&rig).await;
    Sample {
        wide_dir,
        many_names,
        small_dir: small.ino,
        large_dir: large.ino,
        fragmented,
        linked: linked.ino,
        with_attributes: attributed.ino,
        orphan,
        rig,
    }
}

/// Changes the body of a metadata block on the device and puts its checksum right.
fn forge(device: &MemDevice, addr: BlockAddr, change: impl FnOnce(&mut Block)) {
    device.poke(addr, |block| {
        let version = Header::of(block).clock();
        change(block);
        seal(block, version);
    });
}

fn forge_dinode(device: &MemDevice, ino: u64, change: impl FnOnce(&mut Dinode)) {
    forge(device, BlockAddr(ino), |block| {
        let mut dinode = Dinode::decode(ino, &block[..]).unwrap();
        change(&mut dinode);
        dinode.encode(block);
    });
}

async fn check_device(device: &Arc<MemDevice>) -> Report {
    check_at(device.clone(), FS_START, Options::default()).await
}

fn assert_found(report: &Report, what: &str, why: &str) {
    let found =
        report.findings.iter().any(|finding| finding.what.contains(what) && finding.why.contains(why));
    assert!(found, "no finding about {what:?} with {why:?} in {report:#?}");
    assert_eq!(report.exit_code(), 4);
}

#[test]
fn a_filesystem_with_something_of_everything_is_clean() {
    block_on(async {
        let sample = sample().await;
        let report = sample.rig.check().await;
        assert!(report.is_clean(), "{report:#?}");
        assert_eq!(report.exit_code(), 0);
        // Root, small, large and six below it, wide.
        assert_eq!((report.stats.directories, report.stats.orphans), (10, 1));
        let many = inode::read(&sample.rig.store, sample.many_names).await.unwrap().nlink;
        // The orphan and the root have no name, two files have more than one.
        assert_eq!(report.stats.inodes, 10 + 294 + 6);
        assert_eq!(report.stats.names, 10 + 294 + 6 - 2 + 1 + u64::from(many) - 1);
        assert_eq!(report.stats.data_blocks, 400);

        sample.rig.store.shutdown().await.unwrap();
        let closed = check_device(&sample.rig.device).await;
        assert_eq!(closed.findings, []);
    });
}

#[test]
fn nothing_is_written_by_a_check() {
    block_on(async {
        let sample = sample().await;
        sample.rig.store.commit().await.unwrap();
        let options = Options { replay: Some(Arc::clone(&sample.rig.runtime)), ..Options::default() };
        let device = Arc::new(MemDevice::from_image(&sample.rig.device.image()));
        check_at(device.clone(), FS_START, options).await;
        assert_eq!(device.writes(), 0);
    });
}

#[test]
fn a_crashed_filesystem_is_clean_after_replay_in_memory() {
    block_on(async {
        let sample = sample().await;
        // Stable in the journal, and nothing says how much of it is in place.
        sample.rig.store.commit().await.unwrap();
        let crashed = Arc::new(MemDevice::from_image(&sample.rig.device.durable_image()));
        let options = Options { replay: Some(Arc::clone(&sample.rig.runtime)), ..Options::default() };
        let report = check_at(crashed.clone(), FS_START, options).await;
        assert!(report.is_clean(), "{report:#?}");
        assert_eq!((report.stats.dirty_journals, report.stats.orphans), (1, 1));
        let without = check_device(&crashed).await;
        assert!(without.findings.iter().any(|finding| finding.severity == Severity::Note));
    });
}

/// Crash replay (SEED=1, crowded/8@163.0) cut the power between the data that were written to a freed metadata block
/// and the transaction that makes it a data block. Nothing is wrong then, and `fsck` called it damaged.
#[test]
fn data_on_their_way_to_a_freed_metadata_block_are_no_finding() {
    block_on(async {
        let rig = Rig::new().await;
        let [freed, other] = [rig.inode(FileType::Regular).await, rig.inode(FileType::Regular).await];
        rig.link(&mut rig.root().await, b"other", &mut other.clone()).await;
        let guard = rig.alloc.lock_groups_for_free(&[freed.addr()]).await.unwrap();
        let mut txn = rig.store.begin(1 + guard.credits()).await.unwrap();
        guard.free_meta(&mut txn, freed.addr()).await.unwrap();
        drop((txn, guard));
        rig.store.shutdown().await.unwrap();
        rig.device.poke(freed.addr(), |block| block.fill(b'd'));
        let report = check_device(&rig.device).await;
        assert_eq!(report.findings, []);
        assert_eq!(report.stats.freed_metadata_blocks, 1);
        // Metadata that is not marked as freed is not forgiven.
        rig.device.poke(freed.addr(), |block| {
            let group = LockName::Group(rig.store.geometry().group_of(freed.addr()).unwrap());
            let secret = rig.store.superblock().secret;
            header::init(block, BlockKind::Dinode, freed.addr(), secret, group);
            seal(block, Clock(1));
        });
        assert_found(&check_device(&rig.device).await, "freed block", "another kind");
    });
}

#[test]
fn a_device_without_a_filesystem_is_refused() {
    block_on(async {
        let device = Arc::new(MemDevice::new(20_000));
        let report = check(device.clone(), Options::default()).await;
        assert_eq!(report.exit_code(), 8);
        let report = check_device(&device).await;
        assert_eq!(report.exit_code(), 8, "{report:?}");
    });
}

/// One damage at a time to a closed filesystem, each named by what is found.
#[test]
fn every_damage_is_found_and_named() {
    block_on(async {
        let sample = sample().await;
        sample.rig.store.shutdown().await.unwrap();
        let whole = sample.rig.device.image();
        let Sample { rig, small_dir, large_dir, fragmented, linked, with_attributes, orphan, .. } = &sample;
        let superblock = rig.store.superblock();
        let geometry = superblock.geometry;
        type Damage<'a> = Box<dyn Fn(&MemDevice) + 'a>;
        let dinode = |ino: u64, change: fn(&mut Dinode)| -> Damage<'_> {
            Box::new(move |device| forge_dinode(device, ino, change))
        };
        let entry = format!("in directory {small_dir}");
        let cases: Vec<(Damage<'_>, String, &str)> = vec![
            (dinode(*linked, |d| d.nlink = 3), format!("inode {linked}"), "2 names and a link count of 3"),
            (
                dinode(*linked, |d| d.nlink = 1),
                format!("inode {linked}"),
                "it has another name and a link count of 1",
            ),
            (
                dinode(*linked, |d| d.generation += 1),
                format!("inode {linked}"),
                "the name is of an earlier inode",
            ),
            (dinode(*linked, |d| d.blocks = 7), format!("inode {linked}"), "it has 0 blocks and counts 7"),
            (
                dinode(*linked, |d| d.set(flags::ORPHAN, true)),
                format!("inode {linked}"),
                "the mark of an orphan",
            ),
            (
                dinode(*linked, |d| d.set(flags::TRUNCATING, true)),
                format!("inode {linked}"),
                "in no orphan table",
            ),
            (dinode(*small_dir, |d| d.nlink = 5), format!("directory {small_dir}"), "a link count of 5"),
            (
                dinode(*small_dir, |d| d.entries = 9),
                format!("directory {small_dir}"),
                "2 entries and counts 9",
            ),
            (
                dinode(*small_dir, |d| d.parent = 17),
                format!("inode {small_dir}"),
                "another directory as its parent",
            ),
            (dinode(*large_dir, |d| d.size += 1), format!("directory {large_dir}"), "its size is"),
            (dinode(*large_dir, |d| d.blocks += 1), format!("directory {large_dir}"), "blocks and counts"),
            (
                dinode(*fragmented, |d| d.size = 4096),
                format!("inode {fragmented}"),
                "past the end of the file",
            ),
            (dinode(*orphan, |d| d.nlink = 1), format!("inode {orphan}, orphan"), "link count"),
            (
                dinode(*linked, |d| d.content = Content::Extents(vec![Extent::new(0, BlockAddr(3), 1)])),
                format!("inode {linked}"),
                "lies outside of every group",
            ),
            (
                Box::new(|device| {
                    forge_dinode(device, *linked, |d| {
                        d.content = Content::Extents(vec![Extent::new(0, geometry.group_start(1), 1)]);
                    })
                }),
                format!("inode {linked}"),
                "is used twice",
            ),
            (
                Box::new(|device| {
                    forge_dinode(device, *small_dir, |d| {
                        let Content::Dirents(bytes) = &mut d.content else { panic!("it is small") };
                        bytes[26 - 1 + 1] ^= 1;
                    })
                }),
                format!("directory {small_dir}"),
                "does not follow from its hash",
            ),
            (
                Box::new(|device| {
                    forge_dinode(device, *small_dir, |d| {
                        let Content::Dirents(bytes) = &mut d.content else { panic!("it is small") };
                        bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
                    })
                }),
                entry.clone(),
                "outside of every group",
            ),
            (
                Box::new(|device| device.poke(BlockAddr(*linked), |block| block[300] ^= 1)),
                format!("inode {linked}"),
                "checksum",
            ),
            (
                Box::new(|device| {
                    forge(device, BlockAddr(*with_attributes), |block| {
                        block[64 + 120..64 + 128].copy_from_slice(&fragmented.to_le_bytes());
                    })
                }),
                format!("inode {with_attributes}"),
                "",
            ),
            (
                Box::new(|device| device.poke(geometry.superblock_copy(), |block| block[200] ^= 1)),
                "copy of the superblock".into(),
                "",
            ),
            (
                Box::new(|device| device.poke(FS_START, |block| block[200] ^= 1)),
                "superblock".into(),
                "its copy is used",
            ),
            (
                Box::new(|device| {
                    forge(device, BlockAddr(geometry.group_start(0).0 + 1), |block| block[4000] |= 1)
                }),
                "group 0".into(),
                "past its end",
            ),
            (
                Box::new(|device| {
                    forge(device, BlockAddr(geometry.group_start(0).0 + 1), |block| block[639] |= 64)
                }),
                "of group 0".into(),
                "marked as data and nothing uses them",
            ),
            (
                Box::new(|device| {
                    let offset = (*fragmented - geometry.group_start(0).0) as usize;
                    forge(device, BlockAddr(geometry.group_start(0).0 + 1), |block| {
                        block[128 + offset / 4] &= !(3 << (offset % 4 * 2));
                    });
                }),
                format!("block {fragmented} of group 0"),
                "in use as metadata and marked as free",
            ),
            (
                Box::new(|device| {
                    forge(device, geometry.group_start(2), |block| {
                        block[80] = block[80].wrapping_add(1);
                    })
                }),
                "group 2".into(),
                "",
            ),
            (
                Box::new(|device| device.poke(superblock.journal(0).unwrap(), |block| block[90] ^= 1)),
                "first header of journal 0".into(),
                "",
            ),
            (
                Box::new(|device| {
                    forge(device, BlockAddr(superblock.journal(0).unwrap().0 + ORPHANS_AT), |block| {
                        block[80 + 8] ^= 1;
                    })
                }),
                format!("inode {orphan}, orphan"),
                "the table means an earlier inode",
            ),
        ];
        for (number, (damage, what, why)) in cases.iter().enumerate() {
            let device = Arc::new(MemDevice::from_image(&whole));
            damage(&device);
            let report = check_device(&device).await;
            assert!(!report.is_clean(), "damage {number} to {what} ({why}) is not found");
            assert_found(&report, what, why);
        }
    });
}
