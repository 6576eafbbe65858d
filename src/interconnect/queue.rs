//! What waits to be sent to one peer: whole frames, one behind the other in one buffer.
//!
//! Appending never waits. The writer takes everything there is at once, so frames that come while it writes travel
//! together. A queue belongs to one connection, or waits for the next one. Past its bound it takes nothing more: nothing
//! is lost in the middle without the connection being lost too.

use membership::frame::{HEADER_BYTES, Header};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Most bytes that wait for one peer. A peer that takes nothing for so long is as good as gone.
const MAX_BYTES: usize = 32 << 20;

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    frames: u64,
    overflowed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    filled: Notify,
}

impl Queue {
    /// Appends a frame. False: the queue is full, the peer must be dropped.
    pub(super) fn push(&self, header: &Header, payload: &[u8]) -> bool {
        {
            let mut waiting = self.waiting.lock();
            if waiting.overflowed || waiting.bytes.len() + HEADER_BYTES + payload.len() > MAX_BYTES {
                waiting.overflowed = true;
            } else {
                waiting.bytes.extend_from_slice(&header.encode());
                waiting.bytes.extend_from_slice(payload);
                waiting.frames += 1;
            }
            if waiting.overflowed {
                drop(waiting);
                self.filled.notify_one();
                return false;
            }
        }
        self.filled.notify_one();
        true
    }

    /// All that waits, into an empty buffer, and how many frames it is; waits until there is something. `None`: too much
    /// waits.
    pub(super) async fn take(&self, into: &mut Vec<u8>) -> Option<u64> {
        loop {
            {
                let mut waiting = self.waiting.lock();
                if waiting.overflowed {
                    return None;
                }
                if !waiting.bytes.is_empty() {
                    std::mem::swap(&mut waiting.bytes, into);
                    return Some(std::mem::take(&mut waiting.frames));
                }
            }
            self.filled.notified().await;
        }
    }
}
