//! The two header copies of a journal, written in turn: one of them is always whole.

use std::sync::Arc;

use storage_control::{AlignedBuf, BlockAddr, Clock, Device, Durability, IoSlice, ids::MAX_CLOCK};

use crate::{
    FsError, LockName,
    format::{
        header::{self, BlockKind, Secret},
        journal::{HEADER_A, HEADER_B, JournalImage, RING_AT},
        superblock::Superblock,
    },
    store::{block_mut, block_of},
};

/// A journal's header in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Head {
    /// Slot of the journal.
    pub journal: u16,
    /// No record needs replay and nobody writes any.
    pub clean: bool,
    /// Blocks of the ring.
    pub ring_blocks: u32,
    /// Counts the journal's uses.
    pub epoch: u64,
    /// Counts the writes of header copies.
    pub writes: u64,
    /// Number of the oldest record that may need replay.
    pub tail_seq: u64,
    /// Where in the ring it starts.
    pub tail_at: u64,
    /// Every image the journal may bring back is newer.
    pub tail_clock: Clock,
    /// The writer's clock.
    pub clock: Clock,
}

/// A journal's place and what its blocks carry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) journal: u16,
    pub(crate) start: BlockAddr,
    pub(crate) ring_blocks: u64,
    pub(crate) secret: Secret,
}

impl Place {
    pub(crate) fn of(superblock: &Superblock, journal: u16) -> Result<Place, FsError> {
        let start = superblock.journal(journal).ok_or(FsError::NotFound)?;
        let ring_blocks = superblock.journal_blocks as u64 - RING_AT;
        Ok(Place { journal, start, ring_blocks, secret: superblock.secret })
    }

    pub(crate) fn owner(&self) -> LockName {
        LockName::Orphans(self.journal)
    }

    /// Device address of a block of the ring.
    pub(crate) fn ring(&self, at: u64) -> BlockAddr {
        BlockAddr(self.start.0 + RING_AT + at)
    }

    /// The most images one transaction may have: its record is at most a quarter of the journal.
    pub(crate) fn max_images(&self) -> usize {
        let quarter = (self.ring_blocks / 4) as usize;
        quarter - crate::format::journal::descriptors(quarter)
    }
}

impl Head {
    /// The header of a new journal: empty and clean.
    pub(crate) fn new(place: &Place, clock: Clock) -> Head {
        Head {
            journal: place.journal,
            clean: true,
            ring_blocks: place.ring_blocks as u32,
            epoch: 1,
            writes: 0,
            tail_seq: 1,
            tail_at: 0,
            tail_clock: clock,
            clock,
        }
    }

    /// The next use of the journal: empty, older records and headers are void.
    pub(crate) fn next_epoch(&self, clean: bool, clock: Clock) -> Head {
        Head {
            epoch: self.epoch + 1,
            clean,
            tail_seq: 1,
            tail_at: 0,
            tail_clock: clock,
            clock,
            ..self.clone()
        }
    }

    fn image(&self, addr: BlockAddr, secret: Secret) -> AlignedBuf {
        let mut buf = AlignedBuf::zeroed_blocks(1);
        let block = block_mut(&mut buf);
        header::init(block, BlockKind::Journal, addr, secret, LockName::Orphans(self.journal));
        let image = JournalImage::of_mut(block);
        image.journal = self.journal.into();
        image.clean = u16::from(self.clean).into();
        image.ring_blocks = self.ring_blocks.into();
        image.epoch = self.epoch.into();
        image.writes = self.writes.into();
        image.tail_seq = self.tail_seq.into();
        image.tail_at = self.tail_at.into();
        image.tail_clock = self.tail_clock.0.into();
        image.clock = self.clock.0.into();
        header::seal(block, self.clock);
        buf
    }

    fn parse(buf: &AlignedBuf, place: &Place, addr: BlockAddr) -> Result<Head, FsError> {
        let block = block_of(buf);
        header::verify(block, BlockKind::Journal, addr, &place.secret, place.owner())?;
        let image = JournalImage::of(block);
        let corrupt = |why| Err(FsError::corrupt("journal header", addr, why));
        if image.journal.get() != place.journal || u64::from(image.ring_blocks.get()) != place.ring_blocks {
            return corrupt("it describes another journal");
        }
        if image.tail_at.get() > place.ring_blocks || image.clean.get() > 1 || image.epoch.get() == 0 {
            return corrupt("impossible tail or state");
        }
        if image.tail_clock.get() > MAX_CLOCK || image.clock.get() > MAX_CLOCK {
            return corrupt("its clock is beyond any possible one");
        }
        if image.epoch.get() > MAX_CLOCK || image.writes.get() > MAX_CLOCK || image.tail_seq.get() > MAX_CLOCK
        {
            return corrupt("impossible counters");
        }
        if image.reserved.iter().any(|&b| b != 0) {
            return corrupt("reserved bytes are not zero");
        }
        Ok(Head {
            journal: place.journal,
            clean: image.clean.get() == 1,
            ring_blocks: image.ring_blocks.get(),
            epoch: image.epoch.get(),
            writes: image.writes.get(),
            tail_seq: image.tail_seq.get(),
            tail_at: image.tail_at.get(),
            tail_clock: Clock(image.tail_clock.get()),
            clock: Clock(image.clock.get()),
        })
    }

    /// The newer of the two copies. One damaged copy is what a crash can leave; two are corruption.
    pub(crate) async fn read(device: &dyn Device, place: &Place) -> Result<Head, FsError> {
        let buf = device.read(place.start, 2).await?;
        let copy = |n: u64| {
            let bytes = &buf[n as usize * 4096..][..4096];
            Head::parse(&AlignedBuf::copy_of(bytes), place, BlockAddr(place.start.0 + n))
        };
        match (copy(HEADER_A), copy(HEADER_B)) {
            (Ok(a), Ok(b)) => Ok(if (a.epoch, a.writes) >= (b.epoch, b.writes) { a } else { b }),
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            (Err(error), Err(_)) => Err(error),
        }
    }

    /// Writes the copy whose turn it is.
    pub(crate) async fn write(&mut self, device: &dyn Device, place: &Place) -> Result<(), FsError> {
        self.writes += 1;
        let addr = BlockAddr(place.start.0 + if self.writes.is_multiple_of(2) { HEADER_B } else { HEADER_A });
        let image = Arc::new(self.image(addr, place.secret));
        device.write(addr, vec![IoSlice::whole(image)], Durability::Stable).await?;
        Ok(())
    }

    /// Writes both copies, one after the other: a late write of an older header cannot hide this one.
    pub(crate) async fn write_both(&mut self, device: &dyn Device, place: &Place) -> Result<(), FsError> {
        self.write(device, place).await?;
        self.write(device, place).await
    }
}
