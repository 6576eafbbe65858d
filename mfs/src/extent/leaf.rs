//! Lists of extents as a leaf or a dinode holds them.

use std::ops::Range;

use storage_control::BlockAddr;
use zerocopy::{FromBytes, IntoBytes};

use super::Extent;
use crate::error::FsError;
use crate::format::extent::{LEAF_MAX, LEN_MAX, LOGICAL_END, RawExtent, flags};
use crate::index::{LeafBytes, Path, Split, cut};

const SIZE: usize = size_of::<RawExtent>();
/// Why blocks cannot be mapped.
pub(super) const MAPPED: &str = "a block that is to be mapped has a place already";
const PHYSICAL_END: u64 = 1 << 48;

/// Checks and reads extents that rise and do not touch, from the block at `addr`.
pub(crate) fn decode_list(addr: BlockAddr, bytes: &[u8]) -> Result<Vec<Extent>, FsError> {
    let bad = |why| FsError::corrupt("extents", addr, why);
    if !bytes.len().is_multiple_of(SIZE) {
        return Err(bad("they do not fit their bytes"));
    }
    let mut list = Vec::with_capacity(bytes.len() / SIZE);
    let mut at = 0;
    for chunk in bytes.chunks_exact(SIZE) {
        let raw = RawExtent::read_from_bytes(chunk).expect("an extent has its size");
        let extent = Extent {
            logical: raw.logical.get(),
            physical: BlockAddr(u64::from(raw.physical_low.get()) | u64::from(raw.physical_high.get()) << 32),
            device: raw.device.get(),
            len: raw.len.get(),
            flags: raw.flags.get(),
        };
        let (start, len) = (extent.logical, extent.len);
        if len == 0 || len > LEN_MAX || start >= LOGICAL_END || extent.end() > LOGICAL_END {
            return Err(bad("one is empty, too long or beyond the largest file"));
        }
        if extent.physical.0 == 0 || extent.physical.0 + u64::from(len) > PHYSICAL_END {
            return Err(bad("one lies outside every device"));
        }
        if extent.flags & !flags::KNOWN != 0 {
            return Err(bad("one has flags that this version does not know"));
        }
        if start < at {
            return Err(bad("they overlap or are out of order"));
        }
        at = extent.end();
        list.push(extent);
    }
    Ok(list)
}

/// The bytes of a list.
pub(crate) fn encode_list(list: &[Extent]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(list.len() * SIZE);
    for extent in list {
        let raw = RawExtent {
            logical: extent.logical.into(),
            physical_low: (extent.physical.0 as u32).into(),
            physical_high: ((extent.physical.0 >> 32) as u16).into(),
            device: extent.device.into(),
            len: extent.len.into(),
            flags: extent.flags.into(),
        };
        bytes.extend_from_slice(raw.as_bytes());
    }
    bytes
}

/// The extents of the leaf at the end of a path, which must lie within what it covers.
pub(super) fn decode(path: &Path) -> Result<Vec<Extent>, FsError> {
    let body = path.leaf()?;
    let addr = path.end_addr();
    let list = decode_list(addr, body.bytes)?;
    if list.len() != body.count {
        return Err(FsError::corrupt("extents", addr, "their number is not what their leaf says"));
    }
    let below = list.first().is_some_and(|first| first.logical < path.lower);
    let above = path.upper.is_some_and(|upper| list.last().is_some_and(|last| last.end() > upper));
    if below || above {
        return Err(FsError::corrupt("extents", addr, "they lie outside what their leaf covers"));
    }
    Ok(list)
}

/// The extents that touch a range.
pub(super) fn touching<'a>(list: &'a [Extent], range: &Range<u64>) -> &'a [Extent] {
    let first = list.partition_point(|extent| extent.end() <= range.start);
    let past = list.partition_point(|extent| extent.logical < range.end);
    &list[first..past.max(first)]
}

/// Whether `second` continues `first` in the file and on the device.
fn joins(first: &Extent, second: &Extent) -> bool {
    first.end() == second.logical
        && first.physical.0 + u64::from(first.len) == second.physical.0
        && first.device == second.device
        && first.flags == second.flags
        && first.len.checked_add(second.len).is_some_and(|len| len <= LEN_MAX)
}

/// Inserts into a hole, joining neighbours; returns the place.
pub(super) fn insert(list: &mut Vec<Extent>, new: Extent) -> Result<usize, &'static str> {
    let mut at = list.partition_point(|extent| extent.logical < new.logical);
    let overlaps = at.checked_sub(1).is_some_and(|before| list[before].end() > new.logical)
        || list.get(at).is_some_and(|after| after.logical < new.end());
    if overlaps {
        return Err(MAPPED);
    }
    list.insert(at, new);
    if list.get(at + 1).is_some_and(|after| joins(&list[at], after)) {
        list[at].len += list.remove(at + 1).len;
    }
    if at > 0 && joins(&list[at - 1], &list[at]) {
        list[at - 1].len += list.remove(at).len;
        at -= 1;
    }
    Ok(at)
}

/// One leaf of a list, or two.
pub(super) fn split(mut list: Vec<Extent>, inserted_at: usize) -> Split {
    let pack = |list: &[Extent]| LeafBytes { count: list.len(), bytes: encode_list(list) };
    if list.len() <= LEAF_MAX {
        return Split::Whole(pack(&list));
    }
    let right = list.split_off(cut(list.len(), inserted_at));
    Split::Two(pack(&list), right[0].logical, pack(&right))
}
