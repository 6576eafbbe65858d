//! Damaged images: one change of one metadata block, mount, some operations, unmount, check.
//!
//! Whatever is on the disk, the filesystem answers with its data or an error and stops in time; nothing panics and
//! memory stays small. A change that leaves the checksum wrong is an accident of the medium: then no byte of another
//! file is ever returned, because the damaged block is refused. A change with the checksum put right is an attack:
//! a mapping that names another file's blocks cannot be told from a true one, which is why such runs do not look at
//! contents.

use std::sync::Arc;
use std::time::Duration;

use lcl::Lcl;
use mfs::callouts::NoKernelCache;
use mfs::format::header::{self, Block, BlockKind, Header};
use mfs::format::superblock::Superblock;
use mfs::ops::{Caller, Ino, Operations, RenameFlags, SetAttr, Write, XattrSet};
use mfs::{Filesystem, FsError, Options, Parts, fsck, journal, mkfs};
use storage_control::mem_device::Image;
use storage_control::{
    BLOCK_SIZE, BlockAddr, Clock, Device, LamportClock, MemDevice, Runtime, SimRuntime, WallTime,
};

use crate::random::Random;

const ME: Caller = Caller { uid: 1000, gid: 100 };
const FS_START: BlockAddr = BlockAddr(1040);
const BLOCKS: u64 = 16_384;

/// What became of a damaged image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// It could not be mounted.
    Refused,
    /// It was mounted and the check found something afterwards.
    Damaged,
    /// It was mounted and nothing is wrong.
    Sound,
}

/// An undamaged image and where its metadata are.
pub(crate) struct Original {
    image: Image,
    /// Addresses of metadata blocks by kind.
    kinds: Vec<(BlockKind, Vec<BlockAddr>)>,
}

impl Original {
    /// A filesystem with something of everything: of a node that left (`crashed` false) or whose last changes are
    /// in its journal only.
    pub(crate) fn make(crashed: bool) -> Original {
        let world = SimRuntime::new(1);
        let device = MemDevice::new(BLOCKS);
        let (on, runtime) = (device.clone(), world.clone());
        world.run(async move {
            let options = mkfs::Options {
                blocks: BLOCKS,
                fs_start: FS_START,
                label: "fuzz".into(),
                uuid: [1; 16],
                secret: [7; 16],
                now: WallTime { secs: 1_700_000_000, nanos: 0 },
                journals: Some(2),
                group_blocks: None,
            };
            let shared: Arc<dyn Device> = Arc::new(on.clone());
            mkfs::mkfs(&shared, &options, |_, _| {}).await.expect("mkfs");
            let fs = mount(&on, &runtime).await.expect("mount");
            fill(&fs).await.expect("fill");
            if crashed {
                fs.store().checkpoint().await.expect("checkpoint");
                change(&fs, fs.root()).await.expect("change");
                fs.store().commit().await.expect("commit");
                fs.withdraw("the power goes");
            } else {
                fs.unmount().await.expect("unmount");
            }
        });
        let mut kinds: Vec<(BlockKind, Vec<BlockAddr>)> = Vec::new();
        for addr in (0..BLOCKS).map(BlockAddr) {
            let found = device.peek(addr, 1);
            let block: &Block = found[..].try_into().expect("one block");
            let head = Header::of(block);
            // In a journal without live records the copies of blocks mean nothing.
            if head.magic != header::MAGIC || !crashed && head.addr != addr.0 {
                continue;
            }
            let Some(kind) = BlockKind::from_number(head.kind.get()) else { continue };
            match kinds.iter_mut().find(|(k, _)| *k == kind) {
                Some((_, blocks)) => blocks.push(addr),
                None => kinds.push((kind, vec![addr])),
            }
        }
        Original { image: device.image(), kinds }
    }

    /// The kinds of metadata that there are.
    pub(crate) fn kinds(&self) -> usize {
        self.kinds.len()
    }

    /// Damages a copy as `seed` says, lives with it, and checks it.
    pub(crate) fn run(&self, seed: u64) -> Outcome {
        let mut random = Random::new(seed);
        let device = MemDevice::from_image(&self.image);
        let accident = self.damage(&device, &mut random);
        live_with(device, seed, random, accident)
    }

    /// The same without damage, which must be without fault.
    pub(crate) fn run_undamaged(&self) -> Outcome {
        live_with(MemDevice::from_image(&self.image), 1, Random::new(1), true)
    }
    /// Changes one metadata block; whether by accident, with its checksum wrong afterwards.
    fn damage(&self, device: &MemDevice, random: &mut Random) -> bool {
        let (_, blocks) = random.pick(&self.kinds);
        let addr = *random.pick(blocks);
        let accident = random.chance(30);
        let other = {
            let (_, others) = random.pick(&self.kinds);
            device.peek(*random.pick(others), 1)
        };
        device.poke(addr, |block| {
            match random.below(if accident { 3 } else { 10 }) {
                0 => (0..1 + random.below(8)).for_each(|_| {
                    block[random.below(BLOCK_SIZE as u64) as usize] ^= 1 << random.below(8);
                }),
                1 => block[BLOCK_SIZE / 2..].fill(random.next() as u8),
                2 => {
                    let from = random.below(8) as usize * 512;
                    block[from..from + 512].copy_from_slice(&other[from..from + 512]);
                }
                _ => field(block, random),
            }
            if !accident {
                let version = Header::of(block).clock();
                header::seal(
                    block,
                    if version.0 <= storage_control::ids::MAX_CLOCK { version } else { Clock(1) },
                );
            }
        });
        accident
    }
}

/// Mounts, works on and checks what is on the device.
fn live_with(device: MemDevice, seed: u64, mut random: Random, look_at_contents: bool) -> Outcome {
    let world = SimRuntime::new(seed);
    let runtime = world.clone();
    let outcome = world.run(async move {
        let mounted = match mount(&device, &runtime).await {
            Ok(fs) => {
                live(&fs, &mut random, look_at_contents).await;
                let _ = fs.unmount().await;
                true
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                false
            }
        };
        let replay: Arc<dyn Runtime> = Arc::new(runtime.clone());
        let options = fsck::Options { replay: Some(replay), ..fsck::Options::default() };
        let report = fsck::check_at(Arc::new(device.clone()), FS_START, options).await;
        match (mounted, report.is_clean()) {
            (false, _) => Outcome::Refused,
            (true, false) => Outcome::Damaged,
            (true, true) => Outcome::Sound,
        }
    });
    // What the filesystem does in the background ends, or the world would stay in memory with it.
    world.advance(Duration::from_secs(600));
    outcome
}

/// One field of the block gets a value that is likely to hurt.
fn field(block: &mut Block, random: &mut Random) {
    let width = *random.pick(&[1, 2, 4, 8]);
    // Most fields are in front; lists go on to the end.
    let end = *random.pick(&[HEADER_END, 512, BLOCK_SIZE]);
    let at = random.below((end / width) as u64) as usize * width;
    let mut bytes = [0; 8];
    bytes[..width].copy_from_slice(&block[at..at + width]);
    let old = u64::from_le_bytes(bytes);
    let new = match random.below(9) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => old.wrapping_add(1),
        4 => old.wrapping_sub(1),
        5 => old ^ (1 << random.below(8 * width as u64)),
        6 => random.below(BLOCKS),
        7 => 1 << 62,
        _ => random.next(),
    };
    block[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
}

const HEADER_END: usize = header::HEADER_LEN;

async fn mount(device: &MemDevice, runtime: &SimRuntime) -> Result<Arc<Filesystem>, FsError> {
    let shared: Arc<dyn Device> = Arc::new(device.clone());
    let on: Arc<dyn Runtime> = Arc::new(runtime.clone());
    let (superblock, _) = Superblock::read(device, FS_START).await?;
    let clock = Arc::new(LamportClock::new(Clock(1)));
    let replayed = journal::replay(&shared, &superblock, 0, &on).await?;
    clock
        .receive(replayed.clock)
        .map_err(|_| FsError::corrupt("journal", FS_START, "its clock is too far"))?;
    let parts = Parts {
        device: shared,
        superblock,
        journal: 0,
        lcl: Lcl::solo(on.clone()),
        clock,
        runtime: on,
        kernel: Arc::new(NoKernelCache),
        lease: Arc::new(|| Duration::from_secs(1)),
    };
    let fs = Filesystem::mount(parts, Options::default()).await?;
    fs.store().set_peer_tail(Clock(u64::MAX >> 2));
    Ok(fs)
}

/// Contents are words of the file's number, so that another file's are known for what they are.
fn content(ino: Ino, len: usize) -> Vec<u8> {
    (!ino.0).to_le_bytes().repeat(len / 8)
}

async fn put(fs: &Filesystem, dir: Ino, name: &str, pieces: &[(u64, usize)]) -> Result<Ino, FsError> {
    let (attr, opened) = fs.create(ME, dir, name.as_bytes(), 0o644, libc::O_RDWR).await?;
    for &(offset, len) in pieces {
        let data = content(attr.ino, len);
        let write = Write { offset, data, append: false, kill_suid: false, sync: false };
        fs.write(opened.handle, write).await?;
    }
    fs.fsync(opened.handle, false).await?;
    fs.release(opened.handle).await?;
    Ok(attr.ino)
}

async fn fill(fs: &Filesystem) -> Result<(), FsError> {
    let root = fs.root();
    let small = fs.mkdir(ME, root, b"small", 0o755).await?.ino;
    let large = fs.mkdir(ME, root, b"large", 0o755).await?.ino;
    for n in 0..120 {
        let name = format!("a rather long name that fills a leaf of the directory quickly {n}");
        put(fs, large, &name, &[(0, 48)]).await?;
    }
    put(fs, small, "inline", &[(0, 800)]).await?;
    put(fs, small, "whole", &[(0, 300_000)]).await?;
    // One block apart: an extent each, more than the dinode holds.
    let pieces: Vec<(u64, usize)> = (0..400).map(|n| (n * 2 * BLOCK_SIZE as u64, 8)).collect();
    let holes = put(fs, small, "holes", &pieces).await?;
    fs.link(holes, root, b"second name").await?;
    fs.symlink(ME, small, b"short", b"whole").await?;
    fs.symlink(ME, small, b"long", &[b'x'; 3000]).await?;
    fs.mknod(ME, small, b"pipe", libc::S_IFIFO | 0o600, 0).await?;
    fs.setxattr(holes, b"user.small", &[1; 100], XattrSet::Any).await?;
    fs.setxattr(small, b"user.large", &[2; 20_000], XattrSet::Any).await?;
    Ok(())
}

/// Further changes, some of which free blocks.
async fn change(fs: &Filesystem, root: Ino) -> Result<(), FsError> {
    let small = fs.lookup(root, b"small").await?.ino;
    put(fs, root, "late", &[(0, 9000)]).await?;
    fs.rename(root, b"late", small, b"whole", RenameFlags::default()).await?;
    let holes = fs.lookup(root, b"second name").await?.ino;
    fs.setattr(holes, SetAttr { size: Some(200_000), ..SetAttr::default() }).await?;
    // Open and removed: an orphan.
    let opened = fs.open(holes, libc::O_RDONLY).await?;
    fs.unlink(root, b"second name").await?;
    fs.unlink(small, b"holes").await?;
    let _kept_open = opened.handle;
    fs.mkdir(ME, small, b"new", 0o700).await?;
    Ok(())
}

/// Walks the tree, then twenty operations; errors are expected.
async fn live(fs: &Filesystem, random: &mut Random, look_at_contents: bool) {
    let mut dirs = vec![fs.root()];
    let mut files = Vec::new();
    let mut next = 0;
    // A damaged tree may have loops.
    while next < dirs.len().min(50) {
        for (name, attr) in list(fs, dirs[next]).await {
            match attr.file_type() {
                libc::S_IFDIR if name != b"." && name != b".." => dirs.push(attr.ino),
                libc::S_IFREG => files.push(attr.ino),
                libc::S_IFLNK => drop(fs.readlink(attr.ino).await),
                _ => {}
            }
            let _ = fs.listxattr(attr.ino).await;
            let _ = fs.getxattr(attr.ino, b"user.large").await;
        }
        next += 1;
    }
    for &ino in files.iter().take(200) {
        read(fs, ino, look_at_contents).await;
    }
    for n in 0..20 {
        let dir = *random.pick(&dirs);
        let name = format!("new {n}");
        let victim = list(fs, *random.pick(&dirs)).await;
        let (victim_name, victim_attr) = match victim.is_empty() {
            true => continue,
            false => random.pick(&victim).clone(),
        };
        let _ = match random.below(9) {
            0..2 => put(fs, dir, &name, &[(0, 50_000)]).await.map(drop),
            2 => fs.mkdir(ME, dir, name.as_bytes(), 0o755).await.map(drop),
            3 => fs.unlink(dir, &victim_name).await,
            4 => {
                let size = Some(*random.pick(&[0, 1, 5000, 1 << 20]));
                fs.setattr(victim_attr.ino, SetAttr { size, ..SetAttr::default() }).await.map(drop)
            }
            5 => fs.rename(dir, &victim_name, fs.root(), name.as_bytes(), RenameFlags::default()).await,
            6 => fs.setxattr(victim_attr.ino, b"user.new", &[3; 3000], XattrSet::Any).await,
            7 => fs.link(victim_attr.ino, dir, name.as_bytes()).await.map(drop),
            _ => overwrite(fs, victim_attr.ino).await,
        };
    }
    let _ = fs.statfs().await;
}

async fn list(fs: &Filesystem, dir: Ino) -> Vec<(Vec<u8>, mfs::ops::Attr)> {
    let Ok(handle) = fs.opendir(dir).await else { return Vec::new() };
    let (mut found, mut from) = (Vec::new(), 0);
    while found.len() < 1000 {
        let Ok(part) = fs.readdir(handle, from, 64).await else { break };
        let Some(last) = part.last() else { break };
        assert!(last.next != from, "a listing stands still");
        from = last.next;
        for entry in part {
            if let Ok(attr) = fs.lookup(dir, &entry.name).await {
                found.push((entry.name, attr));
            }
        }
    }
    let _ = fs.releasedir(handle).await;
    found
}

async fn read(fs: &Filesystem, ino: Ino, look_at_contents: bool) {
    let Ok(opened) = fs.open(ino, libc::O_RDONLY).await else { return };
    for offset in [0, 4096, 100_000, 1 << 40] {
        let Ok(got) = fs.read(opened.handle, offset, 20_000).await else { continue };
        let foreign = |word: &[u8]| word != [0; 8] && word != (!ino.0).to_le_bytes();
        if look_at_contents && got.to_vec().chunks_exact(8).any(foreign) {
            panic!("{ino} holds at {offset} what was not written to it");
        }
    }
    let _ = fs.release(opened.handle).await;
}

async fn overwrite(fs: &Filesystem, ino: Ino) -> Result<(), FsError> {
    let opened = fs.open(ino, libc::O_RDWR).await?;
    let data = content(ino, 16_384);
    fs.write(opened.handle, Write { offset: 2048, data, append: false, kill_suid: false, sync: true })
        .await?;
    fs.release(opened.handle).await
}
