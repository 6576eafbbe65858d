//! What the layers above need of a block device.
//!
//! A request covers whole blocks inside the device; implementations refuse others with `InvalidInput`
//! ([`check_read`], [`check_write`]). A request whose future was dropped may still be carried out.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use crate::buf::{AlignedBuf, IoSlice};
use crate::ids::{BLOCK_SIZE, BlockAddr};

/// The result of a request that is already under way.
pub type IoFuture<T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send + 'static>>;

/// What a write promises when it completes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// The device has the data, perhaps in a volatile cache; a later flush makes them stable.
    Cached,
    /// The data of this write are on stable storage.
    Stable,
}

/// A request, as fault injectors and submit guards see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// A read of that many blocks.
    Read(BlockAddr, usize),
    /// A write of that many blocks.
    Write(BlockAddr, usize, Durability),
    /// A flush.
    Flush,
}

/// Asked immediately before a request goes to the operating system, in the thread that submits it.
pub trait SubmitGuard: Send + Sync {
    /// An error keeps the request from being submitted and becomes its result.
    fn admit(&self, request: Request) -> io::Result<()>;
    /// An admitted request is over: nothing of it is left in this machine. Called once for each.
    fn finished(&self);
}

/// A device of blocks, shared with other nodes. Requests start when the method is called; two requests that
/// are under way at the same time have no order.
pub trait Device: Send + Sync {
    /// Size of the device.
    fn blocks(&self) -> u64;
    /// Reads `blocks` blocks.
    fn read(&self, at: BlockAddr, blocks: usize) -> IoFuture<AlignedBuf>;
    /// Writes the pieces one after the other from `at` on.
    fn write(&self, at: BlockAddr, data: Vec<IoSlice>, durability: Durability) -> IoFuture<()>;
    /// Makes every write that completed before this call stable.
    fn flush(&self) -> IoFuture<()>;
    /// The same device with `guard` asked as late as possible, where requests wait in a queue of their own
    /// before they are submitted. `None`: they do not, and the caller asks the guard itself.
    fn guarded(&self, guard: &Arc<dyn SubmitGuard>) -> Option<Arc<dyn Device>> {
        let _ = guard;
        None
    }
}

/// An already known result.
pub fn ready<T: Send + 'static>(result: io::Result<T>) -> IoFuture<T> {
    Box::pin(std::future::ready(result))
}

fn outside(at: BlockAddr, blocks: u64, device: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{blocks} blocks at block {at} are not inside a device of {device} blocks"),
    )
}

/// Checks that a read lies inside a device of `device_blocks`.
pub fn check_read(device_blocks: u64, at: BlockAddr, blocks: usize) -> io::Result<()> {
    match at.0.checked_add(blocks as u64) {
        Some(end) if end <= device_blocks && blocks > 0 => Ok(()),
        _ => Err(outside(at, blocks as u64, device_blocks)),
    }
}

/// Checks that a write consists of whole blocks inside a device of `device_blocks`; returns how many.
pub fn check_write(device_blocks: u64, at: BlockAddr, data: &[IoSlice]) -> io::Result<usize> {
    let invalid = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why.to_owned()));
    let mut bytes = 0_usize;
    for piece in data {
        if !piece.offset.is_multiple_of(512) || !piece.len.is_multiple_of(512) {
            return invalid("a piece of a write is not aligned to 512 bytes");
        }
        match piece.offset.checked_add(piece.len) {
            Some(end) if end <= piece.buf.len() => {}
            _ => return invalid("a piece of a write lies outside its buffer"),
        }
        bytes = match bytes.checked_add(piece.len) {
            Some(bytes) => bytes,
            None => return invalid("a write is too long"),
        };
    }
    if !bytes.is_multiple_of(BLOCK_SIZE) {
        return invalid("a write does not consist of whole blocks");
    }
    check_read(device_blocks, at, bytes / BLOCK_SIZE)?;
    Ok(bytes / BLOCK_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_outside_the_device_are_refused() {
        assert!(check_read(10, BlockAddr(9), 1).is_ok());
        assert!(check_read(10, BlockAddr(9), 2).is_err());
        assert!(check_read(10, BlockAddr(u64::MAX), 2).is_err());
        assert!(check_read(10, BlockAddr(0), 0).is_err());
    }

    #[test]
    fn writes_of_part_of_a_block_are_refused() {
        let piece = IoSlice { len: 512, ..IoSlice::from(AlignedBuf::zeroed(4096)) };
        assert!(check_write(10, BlockAddr(0), std::slice::from_ref(&piece)).is_err());
        assert_eq!(check_write(10, BlockAddr(0), &vec![piece; 8]).unwrap(), 1);
    }

    #[test]
    fn pieces_outside_their_buffer_are_refused() {
        let piece = IoSlice { offset: 4096, ..IoSlice::from(AlignedBuf::zeroed(4096)) };
        assert!(check_write(10, BlockAddr(0), &[piece]).is_err());
    }
}
