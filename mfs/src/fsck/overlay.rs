//! A device over another: writes stay in memory, so that a journal can be replayed without changing the disk.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use storage_control::{AlignedBuf, BLOCK_SIZE, BlockAddr, Device, Durability, IoFuture, IoSlice};

/// See the module.
pub(super) struct Overlay {
    below: Arc<dyn Device>,
    written: Arc<Mutex<BTreeMap<u64, Box<[u8]>>>>,
}

impl Overlay {
    pub(super) fn new(below: Arc<dyn Device>) -> Self {
        Self { below, written: Arc::default() }
    }
}

impl Device for Overlay {
    fn blocks(&self) -> u64 {
        self.below.blocks()
    }

    fn read(&self, at: BlockAddr, blocks: usize) -> IoFuture<AlignedBuf> {
        let written = Arc::clone(&self.written);
        let below = self.below.read(at, blocks);
        Box::pin(async move {
            let mut buf = below.await?;
            for (addr, bytes) in written.lock().range(at.0..at.0 + blocks as u64) {
                let offset = (addr - at.0) as usize * BLOCK_SIZE;
                buf[offset..offset + BLOCK_SIZE].copy_from_slice(bytes);
            }
            Ok(buf)
        })
    }

    fn write(&self, at: BlockAddr, data: Vec<IoSlice>, _durability: Durability) -> IoFuture<()> {
        let bytes: Vec<u8> = data.iter().flat_map(|slice| slice.bytes()).copied().collect();
        let written = Arc::clone(&self.written);
        let end = at.0.checked_add((bytes.len() / BLOCK_SIZE) as u64);
        let inside = end.is_some_and(|end| end <= self.blocks());
        Box::pin(async move {
            if !inside {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "write past the end of the device"));
            }
            let mut written = written.lock();
            for (offset, block) in bytes.chunks_exact(BLOCK_SIZE).enumerate() {
                written.insert(at.0 + offset as u64, block.into());
            }
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<()> {
        Box::pin(async { Ok(()) })
    }
}
