//! Images that a stranger made: every field of every kind of metadata block, with the checksum put right.
//!
//! The check and every reader and mutator of inodes end with a value or an error. They do not panic, do not
//! run on for ever, and do not use memory without bound.

use std::collections::BTreeMap;

use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use storage_control::{BLOCK_SIZE, Runtime, TestRuntime};

use super::*;
use crate::dir;
use crate::error::FsError;
use crate::format::header::{BlockKind, HEADER_LEN, is_ours};
use crate::inode::next_to_free;

/// Changed images tried for each kind of block.
const TRIES: u32 = 16;
/// Blocks of each kind that are changed.
const BLOCKS_OF_A_KIND: usize = 6;
/// No directory or file of the sample has more of anything than this.
const BOUND: usize = 100_000;

/// The sealed metadata blocks of a device by kind, a few of each.
fn blocks_by_kind(device: &MemDevice, blocks: u64) -> BTreeMap<BlockKind, Vec<BlockAddr>> {
    let secret = crate::format::header::Secret([7; 16]);
    let mut by_kind: BTreeMap<BlockKind, Vec<BlockAddr>> = BTreeMap::new();
    for addr in (0..blocks).map(BlockAddr) {
        let buf = device.peek(addr, 1);
        let block: &Block = buf[..].try_into().unwrap();
        if is_ours(block, addr, &secret).is_ok() {
            let kind = BlockKind::from_number(Header::of(block).kind.get()).unwrap();
            by_kind.entry(kind).or_default().push(addr);
        }
    }
    for list in by_kind.values_mut() {
        let step = list.len().div_ceil(BLOCKS_OF_A_KIND).max(1);
        *list = list.iter().copied().step_by(step).collect();
    }
    by_kind
}

/// Values that break things more often than random ones.
const NASTY: [u64; 8] = [0, 1, 2, 0xff, 0xffff, 0xffff_ffff, i64::MAX as u64, u64::MAX];

fn mutate(block: &mut Block, rng: &mut TestRng) {
    for _ in 0..1 + rng.next_u32() % 3 {
        // Mostly heads and first entries: that is where the meaning is.
        let room = if rng.next_u32().is_multiple_of(4) { BLOCK_SIZE - HEADER_LEN } else { 200 };
        let at = HEADER_LEN + rng.next_u32() as usize % room;
        let width = [1, 2, 4, 8][rng.next_u32() as usize % 4].min(BLOCK_SIZE - at);
        let value = match rng.next_u32() % 3 {
            0 => NASTY[rng.next_u32() as usize % NASTY.len()],
            1 => rng.next_u64(),
            _ => {
                let mut old = [0; 8];
                old[..width].copy_from_slice(&block[at..at + width]);
                u64::from_le_bytes(old) ^ 1 << (rng.next_u32() as usize % (8 * width))
            }
        };
        block[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    }
}

/// Reads all that hangs from an inode; returns the inodes it names.
async fn read_all(rig: &Rig, ino: u64) -> Result<Vec<u64>, FsError> {
    let store = &rig.store;
    let dinode = inode::read(store, ino).await?;
    let _ = xattr::list(store, &dinode).await;
    let _ = next_to_free(store, &dinode).await;
    let _ = dir::lookup(store, &dinode, b"fragmented").await;
    let _ = extent::next_data(store, &dinode, 1).await;
    let mapped = extent::map(store, &dinode, 0, 1 << 20).await.unwrap_or_default();
    assert!(mapped.len() < BOUND);
    if !dinode.is_dir() {
        return Ok(Vec::new());
    }
    let (mut named, mut after) = (Vec::new(), 0);
    loop {
        let more = dir::list(store, &dinode, after, 50).await?;
        let Some(last) = more.last() else { return Ok(named) };
        assert!(last.cookie > after && named.len() < BOUND);
        after = last.cookie;
        named.extend(more.iter().map(|dirent| dirent.ino));
    }
}

/// Changes what can be changed of an inode; whatever comes of it is an error or a change.
async fn change_all(rig: &Rig, ino: u64) -> Result<(), FsError> {
    let mut dinode = inode::read(&rig.store, ino).await?;
    if dinode.is_dir() {
        let target = dir::Target { ino: 5, generation: 6, kind: FileType::Regular };
        let needs = dir::insert_needs(&dinode);
        let name = b"a new name in a directory that may be anything";
        rig.change(&mut dinode, needs, async |txn, res, dinode| {
            dir::insert(&rig.store, txn, res, dinode, name, target).await
        })
        .await?;
        let some: Vec<_> = dir::list(&rig.store, &dinode, 0, 20).await?;
        for dirent in some {
            let Some(removal) = dir::plan_remove(&rig.store, &dinode, &dirent.name).await? else { continue };
            let needs = inode::Needs { meta: 0, credits: dir::REMOVE_CREDITS };
            rig.change(&mut dinode, needs, async |txn, _, dinode| {
                dir::remove(&rig.store, txn, None, dinode, &removal).await
            })
            .await?;
        }
    }
    let change = xattr::set(&rig.store, &dinode, b"user.new", &[1; 5000], xattr::SetMode::Any).await?;
    let needs = change.needs();
    rig.change(&mut dinode, needs, async |txn, res, dinode| xattr::apply(txn, res, dinode, change).await)
        .await?;
    if matches!(dinode.content, Content::Extents(_) | Content::ExtentTree(_)) {
        let needs = extent::insert_needs(&rig.store, &dinode, 77, 1).await?;
        rig.change(&mut dinode, needs, async |txn, res, dinode| {
            extent::insert(&rig.store, txn, res, dinode, Extent::new(77, BlockAddr(9000), 1)).await
        })
        .await?;
        let mut steps = 0;
        while let Some(step) = extent::next_to_free(&rig.store, &dinode, 0..u64::MAX).await? {
            let guard = rig.alloc.lock_groups_for_free(&[step.addr]).await?;
            let mut txn = rig.store.begin(inode::FREE_STEP_CREDITS + BITMAP_CREDITS).await?;
            extent::remove_step(&rig.store, &mut txn, &guard, None, &mut dinode, 0..u64::MAX, step).await?;
            inode::write(&mut txn, &dinode).await?;
            steps += 1;
            assert!(steps < BOUND);
        }
    }
    Ok(())
}

/// Reads everything and changes the inodes of the sample; an error where it cannot be mounted.
async fn use_all(device: &Arc<MemDevice>, sample: &[u64]) -> Result<(), FsError> {
    let rig = Rig::try_open(device.clone()).await?;
    let mut todo = vec![rig.store.superblock().root.0];
    let mut seen = std::collections::BTreeSet::new();
    while let Some(ino) = todo.pop() {
        if seen.insert(ino) && seen.len() < BOUND {
            todo.extend(read_all(&rig, ino).await.unwrap_or_default());
        }
    }
    if let Some(journal) = rig.store.superblock().journal(0) {
        let _ = Table::load(&rig.store, 0, BlockAddr(journal.0 + ORPHANS_AT)).await;
    }
    for &ino in sample {
        let _ = change_all(&rig, ino).await;
    }
    Ok(())
}

#[test]
fn no_image_makes_a_reader_panic_or_hang() {
    let (whole, targets, by_kind) = block_on(async {
        let sample = sample().await;
        sample.rig.store.shutdown().await.unwrap();
        let targets = [
            sample.small_dir,
            sample.large_dir,
            sample.wide_dir,
            sample.fragmented,
            sample.linked,
            sample.with_attributes,
            sample.orphan,
        ];
        let device = &sample.rig.device;
        (device.image(), targets, blocks_by_kind(device, 20_000))
    });
    for kind in [
        BlockKind::Superblock,
        BlockKind::Group,
        BlockKind::Bitmap,
        BlockKind::Journal,
        BlockKind::Orphans,
        BlockKind::Dinode,
        BlockKind::Extents,
        BlockKind::DirLeaf,
        BlockKind::DirIndex,
        BlockKind::Xattr,
    ] {
        assert!(by_kind.contains_key(&kind), "the sample has a {}", kind.name());
    }
    for (kind, addrs) in by_kind {
        // What the inodes of the sample consist of is certainly among those that are changed.
        let own = targets.iter().map(|ino| BlockAddr(*ino)).filter(|_| kind == BlockKind::Dinode);
        let addrs: Vec<BlockAddr> = addrs.into_iter().chain(own).collect();
        for number in 0..TRIES {
            let mut seed = [kind as u8; 32];
            seed[..4].copy_from_slice(&number.to_le_bytes());
            let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
            let device = Arc::new(MemDevice::from_image(&whole));
            let addr = addrs[rng.next_u32() as usize % addrs.len()];
            forge(&device, addr, |block| mutate(block, &mut rng));
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                block_on(async {
                    let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
                    let options = Options { replay: Some(runtime), ..Options::default() };
                    check_at(device.clone(), FS_START, options).await;
                    let mounted = use_all(&device, &targets).await;
                    let needed = matches!(kind, BlockKind::Superblock | BlockKind::Journal);
                    assert!(needed || mounted.is_ok(), "only superblock and journal keep from mounting");
                });
            }));
            assert!(
                outcome.is_ok(),
                "image {number} of a changed {} at block {addr} makes a panic",
                kind.name()
            );
        }
    }
}
