//! Orphan tables: inodes without a name that are still open, and truncations under way.
//!
//! Each journal has one table. What is in a table on disk is finished by its node or, after the node's death,
//! by whoever adopts the table. An inode is at most once in a table; a slot is claimed in memory before the
//! transaction that fills it, so that no two operations fill the same one.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use storage_control::BlockAddr;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::alloc::Reservation;
use crate::error::FsError;
use crate::format::header::{Block, BlockKind};
use crate::format::orphan::{CHAIN_MAX, HEAD_AT, OrphanHead, RawOrphan, SLOTS, SLOTS_AT};
use crate::inode::Needs;
use crate::lock_name::LockName;
use crate::store::{Store, Txn};

/// Why an inode is in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum OrphanKind {
    /// It has no name: free it when nobody has it open.
    Free = 1,
    /// Its blocks past its size are to be freed.
    Truncate = 2,
}

/// An entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Orphan {
    /// Inode number.
    pub ino: u64,
    /// The inode's generation.
    pub generation: u64,
    /// What is to be done.
    pub kind: OrphanKind,
}

/// What a block of a table says.
pub(crate) struct TableBlock {
    pub(crate) next: Option<BlockAddr>,
    /// Slots in use.
    pub(crate) used: Vec<(usize, Orphan)>,
}

/// Checks and reads the body of a table's block.
pub(crate) fn read_block(addr: BlockAddr, block: &[u8]) -> Result<TableBlock, FsError> {
    let bad = |why| FsError::corrupt("orphan table", addr, why);
    let head = OrphanHead::read_from_bytes(&block[HEAD_AT..SLOTS_AT]).expect("a head has its size");
    let mut used = Vec::new();
    for (slot, chunk) in block[SLOTS_AT..].chunks_exact(size_of::<RawOrphan>()).enumerate() {
        let raw = RawOrphan::read_from_bytes(chunk).expect("a slot has its size");
        let (ino, generation) = (raw.ino.get(), raw.generation.get());
        if raw.reserved.get() != 0 || (ino == 0 && (generation != 0 || raw.kind.get() != 0)) {
            return Err(bad("bytes that must be zero are not"));
        }
        let kind = match (ino, raw.kind.get()) {
            (0, _) => continue,
            (_, 1) => OrphanKind::Free,
            (_, 2) => OrphanKind::Truncate,
            _ => return Err(bad("an entry is of an unknown kind")),
        };
        used.push((slot, Orphan { ino, generation, kind }));
    }
    if head.count.get() as usize != used.len() || head.reserved.get() != 0 {
        return Err(bad("the number of its entries is wrong"));
    }
    let next = head.next.get();
    Ok(TableBlock { next: (next != 0).then_some(BlockAddr(next)), used })
}

fn head_of(block: &mut Block) -> &mut OrphanHead {
    OrphanHead::mut_from_bytes(&mut block[HEAD_AT..SLOTS_AT]).expect("a head has its size")
}

/// Fills or empties a slot.
fn write_slot(block: &mut Block, slot: usize, orphan: Option<Orphan>) {
    let at = SLOTS_AT + slot * size_of::<RawOrphan>();
    let mut raw = RawOrphan::new_zeroed();
    if let Some(orphan) = orphan {
        raw.ino = orphan.ino.into();
        raw.generation = orphan.generation.into();
        raw.kind = (orphan.kind as u32).into();
    }
    let was_used = block[at..at + 8] != [0; 8];
    block[at..at + size_of::<RawOrphan>()].copy_from_slice(raw.as_bytes());
    let head = head_of(block);
    let count = head.count.get() + u32::from(orphan.is_some()) - u32::from(was_used);
    head.count = count.into();
}

/// A place in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    block: usize,
    slot: usize,
}

#[derive(Debug, Default)]
struct State {
    blocks: Vec<BlockAddr>,
    free: Vec<Place>,
    used: BTreeMap<u64, (Place, Orphan)>,
}

/// The table of one journal as the node that owns it keeps it in memory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Table {
    owner: LockName,
    state: Arc<Mutex<State>>,
}

/// A claimed slot; dropping it gives it back.
#[derive(Debug)]
pub struct Slot {
    table: Table,
    /// `None`: the table is full and grows by a block.
    place: Option<Place>,
}

impl Slot {
    /// What [`Table::add`] with this slot may need.
    pub fn needs(&self) -> Needs {
        match self.place {
            Some(_) => Needs { meta: 0, credits: 1 },
            None => Needs { meta: 1, credits: 2 },
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.table.state.lock().free.push(place);
        }
    }
}

/// Credits of [`Table::remove`].
pub const REMOVE_CREDITS: u32 = 1;

impl Table {
    /// Reads the table of `journal`, whose root block is at `root`. The caller holds its lock.
    pub async fn load(store: &Store, journal: u16, root: BlockAddr) -> Result<Table, FsError> {
        let owner = LockName::Orphans(journal);
        let mut state = State::default();
        let mut next = Some(root);
        while let Some(addr) = next {
            if state.blocks.len() == CHAIN_MAX {
                return Err(FsError::corrupt("orphan table", addr, "the chain is too long"));
            }
            let image = store.read(addr, BlockKind::Orphans, owner).await?;
            let body = read_block(addr, &image)?;
            let block = state.blocks.len();
            let mut free = [true; SLOTS];
            for (slot, orphan) in body.used {
                free[slot] = false;
                if state.used.insert(orphan.ino, (Place { block, slot }, orphan)).is_some() {
                    return Err(FsError::corrupt("orphan table", addr, "an inode is there twice"));
                }
            }
            state.free.extend((0..SLOTS).rev().filter(|&slot| free[slot]).map(|slot| Place { block, slot }));
            state.blocks.push(addr);
            next = body.next;
        }
        Ok(Table { owner, state: Arc::new(Mutex::new(state)) })
    }

    /// All entries, by inode number.
    pub fn list(&self) -> Vec<Orphan> {
        self.state.lock().used.values().map(|(_, orphan)| *orphan).collect()
    }

    /// The entry of an inode.
    pub fn find(&self, ino: u64) -> Option<Orphan> {
        self.state.lock().used.get(&ino).map(|(_, orphan)| *orphan)
    }

    /// Claims a slot, before the transaction.
    pub fn slot(&self) -> Slot {
        Slot { table: self.clone(), place: self.state.lock().free.pop() }
    }

    /// Enters an inode. One that is there already keeps its slot; [`OrphanKind::Free`] wins. The caller holds
    /// the inode's lock.
    pub async fn add(
        &self,
        txn: &mut Txn,
        res: Option<&mut Reservation>,
        mut slot: Slot,
        orphan: Orphan,
    ) -> Result<(), FsError> {
        if let Some(there) = self.find(orphan.ino) {
            return self.change_kind(txn, there, orphan).await;
        }
        let place = match slot.place.take() {
            Some(place) => place,
            None => {
                let res = res.expect("a table that grows comes with a reservation");
                self.grow(txn, res).await?
            }
        };
        self.fill(txn, place, Some(orphan)).await?;
        self.state.lock().used.insert(orphan.ino, (place, orphan));
        Ok(())
    }

    /// Takes an inode out if it is there for this reason. The caller holds the inode's lock.
    pub async fn remove(&self, txn: &mut Txn, ino: u64, kind: OrphanKind) -> Result<(), FsError> {
        let place = match self.state.lock().used.get(&ino) {
            Some((place, orphan)) if orphan.kind == kind => *place,
            Some(_) | None => return Ok(()),
        };
        self.fill(txn, place, None).await?;
        let mut state = self.state.lock();
        state.used.remove(&ino);
        state.free.push(place);
        Ok(())
    }

    async fn change_kind(&self, txn: &mut Txn, there: Orphan, wanted: Orphan) -> Result<(), FsError> {
        if there.kind <= wanted.kind {
            return Ok(());
        }
        let place = match self.state.lock().used.get(&wanted.ino) {
            Some((place, _)) => *place,
            None => return Ok(()),
        };
        self.fill(txn, place, Some(wanted)).await?;
        self.state.lock().used.insert(wanted.ino, (place, wanted));
        Ok(())
    }

    async fn fill(&self, txn: &mut Txn, place: Place, orphan: Option<Orphan>) -> Result<(), FsError> {
        let addr = self.state.lock().blocks[place.block];
        txn.edit(addr, BlockKind::Orphans, self.owner, |block| write_slot(block, place.slot, orphan)).await
    }

    /// Appends a block to the chain and returns a slot of it.
    async fn grow(&self, txn: &mut Txn, res: &mut Reservation) -> Result<Place, FsError> {
        let addr = res.meta();
        let (before, block) = {
            // Under the mutex, so that whoever sees the block in memory finds it created.
            let mut state = self.state.lock();
            if state.blocks.len() == CHAIN_MAX {
                return Err(FsError::NoSpace);
            }
            txn.create(addr, BlockKind::Orphans, self.owner, |_| ());
            let block = state.blocks.len();
            let before = *state.blocks.last().expect("a table has its root block");
            state.blocks.push(addr);
            state.free.extend((1..SLOTS).rev().map(|slot| Place { block, slot }));
            (before, block)
        };
        res.log_meta(txn, addr).await?;
        txn.edit(before, BlockKind::Orphans, self.owner, |block| head_of(block).next = addr.0.into()).await?;
        Ok(Place { block, slot: 0 })
    }
}

#[cfg(test)]
mod tests;
