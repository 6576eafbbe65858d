//! The store against a device in memory.

mod journals;
mod power_cut;
mod threads;
mod transactions;

use std::sync::Arc;

use storage_control::{AlignedBuf, BlockAddr, Device, Durability, IoSlice, MemDevice, Runtime, SimRuntime};

use super::*;
use crate::{
    format::{header::BlockKind, superblock::Superblock},
    journal::{ReplayReport, replay},
};

const KIND: BlockKind = BlockKind::Xattr;

fn place(node: &Superblock, n: u64) -> BlockAddr {
    // The last group holds nothing else.
    let group = node.geometry.groups - 1;
    BlockAddr(node.geometry.group_start(group).0 + 100 + n)
}

fn owner(n: u64) -> LockName {
    LockName::Inode(n)
}

fn value_of(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[64..72].try_into().unwrap())
}

fn set_value(block: &mut header::Block, value: u64) {
    block[64..72].copy_from_slice(&value.to_le_bytes());
    block[4088..].copy_from_slice(&value.to_le_bytes());
}

/// The value on the device, if a sound block is there.
fn on_disk(device: &MemDevice, sb: &Superblock, n: u64) -> Option<u64> {
    let buf = device.peek(place(sb, n), 1);
    let block = block_of(&buf);
    header::verify(block, KIND, place(sb, n), &sb.secret, owner(n)).ok()?;
    assert_eq!(block[64..72], block[4088..], "an image is whole");
    Some(value_of(block))
}

fn replay_now(world: &SimRuntime, device: &MemDevice, sb: &Superblock, journal: u16) -> ReplayReport {
    let (on, sb): (Arc<dyn Device>, _) = (Arc::new(device.clone()), sb.clone());
    let runtime: Arc<dyn Runtime> = Arc::new(world.clone());
    world.run(async move { replay(&on, &sb, journal, &runtime).await }).expect("the journal replays")
}

async fn put(store: &Store, sb: &Superblock, blocks: &[u64], value: u64, fresh: bool) -> TxnSeq {
    let mut txn = store.begin(blocks.len() as u32).await.unwrap();
    for &n in blocks {
        if fresh {
            txn.create(place(sb, n), KIND, owner(n), |block| set_value(block, value));
        } else {
            txn.edit(place(sb, n), KIND, owner(n), |block| set_value(block, value)).await.unwrap();
        }
    }
    txn.seq()
}

async fn write_block(device: &MemDevice, at: BlockAddr, block: &[u8]) {
    let data = vec![IoSlice::from(AlignedBuf::copy_of(block))];
    device.write(at, data, Durability::Stable).await.unwrap();
}
