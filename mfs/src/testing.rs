//! A filesystem in memory, for unit tests.

use std::sync::Arc;

use lcl::Lcl;
use storage_control::{BlockAddr, Clock, Device, LamportClock, MemDevice, Runtime, SimRuntime, WallTime};

use crate::{
    alloc::Alloc,
    format::superblock::Superblock,
    mkfs::{Options, mkfs},
    store::Store,
};

/// Where the superblock is in tests: behind a quorum region of 4 MiB.
pub(crate) const FS_START: BlockAddr = BlockAddr(1040);

/// 64 MiB.
pub(crate) const BLOCKS: u64 = 16_384;

/// What `mkfs` makes in tests.
pub(crate) fn options(blocks: u64) -> Options {
    Options {
        blocks,
        fs_start: FS_START,
        label: "test".into(),
        uuid: [1; 16],
        secret: *b"0123456789abcdef",
        now: WallTime { secs: 1_700_000_000, nanos: 5 },
        journals: Some(2),
        group_blocks: None,
    }
}

/// A fresh filesystem on a device in memory.
pub(crate) fn formatted(world: &SimRuntime, options: Options) -> (MemDevice, Superblock) {
    let device = MemDevice::new(options.blocks);
    let on: Arc<dyn Device> = Arc::new(device.clone());
    let superblock = world.run(async move { mkfs(&on, &options, |_, _| ()).await }).expect("mkfs succeeds");
    (device, superblock)
}

/// A mounted node.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) world: SimRuntime,
    pub(crate) device: MemDevice,
    pub(crate) store: Store,
    pub(crate) lcl: Lcl,
    pub(crate) alloc: Alloc,
}

impl Node {
    /// Formats and mounts a device of that many blocks.
    pub(crate) fn new(seed: u64, blocks: u64) -> Node {
        let world = SimRuntime::new(seed);
        let (device, superblock) = formatted(&world, options(blocks));
        Node::mount(&world, &device, &superblock, 0)
    }

    /// Mounts with a journal that needs no replay, as the only node.
    pub(crate) fn mount(world: &SimRuntime, device: &MemDevice, sb: &Superblock, journal: u16) -> Node {
        let store = open_store(world, device, sb, journal);
        store.set_peer_tail(Clock(u64::MAX));
        let lcl = Lcl::solo(Arc::new(world.clone()));
        store.register_callouts(&lcl);
        let alloc = Alloc::new(store.clone(), lcl.clone());
        Node { world: world.clone(), device: device.clone(), store, lcl, alloc }
    }
}

/// Opens a store alone.
pub(crate) fn open_store(world: &SimRuntime, device: &MemDevice, sb: &Superblock, journal: u16) -> Store {
    let (on, sb) = (Arc::new(device.clone()), sb.clone());
    let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
    let opened = world
        .run(async move { Store::open(on, sb, journal, Arc::new(LamportClock::default()), runtime).await });
    opened.expect("a clean journal opens")
}

/// splitmix64, for tests that draw from a seed.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }
}
