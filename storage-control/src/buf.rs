//! Memory for direct I/O.
//!
//! The bytes of an [`AlignedBuf`] start at a page boundary and are initialised for as long as it lives.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::ids::BLOCK_SIZE;

const ALIGN_BYTES: usize = 4096;

/// Owned bytes that start at a page boundary, as O_DIRECT wants them. Cloning copies.
pub struct AlignedBuf {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an AlignedBuf owns its memory alone, like a Box<[u8]>.
unsafe impl Send for AlignedBuf {}
// SAFETY: a shared reference gives read access only.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` bytes of zeros.
    pub fn zeroed(len: usize) -> AlignedBuf {
        let layout = Self::layout(len);
        // SAFETY: the layout has a size of at least one page.
        let start = unsafe { alloc_zeroed(layout) };
        match NonNull::new(start) {
            Some(start) => AlignedBuf { start, len },
            None => handle_alloc_error(layout),
        }
    }

    /// `blocks` blocks of zeros.
    pub fn zeroed_blocks(blocks: usize) -> AlignedBuf {
        AlignedBuf::zeroed(blocks.checked_mul(BLOCK_SIZE).expect("the size of a buffer fits in usize"))
    }

    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> AlignedBuf {
        let mut buf = AlignedBuf::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), ALIGN_BYTES)
            .expect("the size of a buffer fits in isize")
            .pad_to_align()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: `start` was allocated with this layout and is freed once.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.len)) }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes from `start` belong to self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access the only one.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Clone for AlignedBuf {
    fn clone(&self) -> AlignedBuf {
        AlignedBuf::copy_of(self)
    }
}

impl PartialEq for AlignedBuf {
    fn eq(&self, other: &AlignedBuf) -> bool {
        self[..] == other[..]
    }
}

impl Eq for AlignedBuf {}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// Part of a shared buffer, as one piece of a gathered write. Offset and length are multiples of 512.
#[derive(Clone, Debug)]
pub struct IoSlice {
    /// The bytes; whoever holds another `Arc` does not change them while the write is under way.
    pub buf: Arc<AlignedBuf>,
    /// Where in `buf` the piece starts, in bytes.
    pub offset: usize,
    /// Length of the piece in bytes.
    pub len: usize,
}

impl IoSlice {
    /// The whole buffer.
    pub fn whole(buf: Arc<AlignedBuf>) -> IoSlice {
        let len = buf.len();
        IoSlice { buf, offset: 0, len }
    }

    /// The bytes of the piece.
    ///
    /// # Panics
    /// Where offset and length lie outside the buffer.
    pub fn bytes(&self) -> &[u8] {
        &self.buf[self.offset..self.offset + self.len]
    }
}

impl From<AlignedBuf> for IoSlice {
    fn from(buf: AlignedBuf) -> IoSlice {
        IoSlice::whole(Arc::new(buf))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_page_aligned_and_zero() {
        for len in [0, 1, 512, 4096, 12_288] {
            let buf = AlignedBuf::zeroed(len);
            assert_eq!(buf.as_ptr() as usize % ALIGN_BYTES, 0);
            assert_eq!(buf.len(), len);
            assert!(buf.iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn a_clone_is_a_copy() {
        let mut one = AlignedBuf::copy_of(b"abc");
        let two = one.clone();
        one[0] = b'x';
        assert_eq!(&two[..], b"abc");
    }
}
