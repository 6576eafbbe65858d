//! When each slot was last seen to change.
//!
//! Windows count only while this observer's own I/O works: after a stall all of them start anew, so that a stall
//! which everybody sees makes nobody look dead. A window starts when the read that saw the change completed and
//! ends when the latest read was issued: it is never longer than the time the slot really was unchanged.

use std::sync::Arc;
use std::time::Duration;

use super::area::Look;
use crate::buf::AlignedBuf;
use crate::ids::{BLOCK_SIZE, NodeId};
use crate::lease::STALL_MS;
use crate::runtime::Instant;

const STALL: Duration = Duration::from_millis(STALL_MS);

struct Seen {
    bytes: Arc<AlignedBuf>,
    first_byte: usize,
    issued: Instant,
    /// By slot: since when the bytes are known to be what they are now.
    since: Vec<Instant>,
    /// By slot: whether a change was ever seen.
    changed: Vec<bool>,
}

/// Watches all slots.
#[derive(Default)]
pub struct Watch {
    seen: Option<Seen>,
}

impl Watch {
    /// A watch that has seen nothing yet.
    pub fn new() -> Watch {
        Watch::default()
    }

    /// Takes note of a look.
    pub fn observe(&mut self, look: &Look) {
        let slots = look.slots.len();
        let fresh = |changed| Seen {
            bytes: Arc::clone(&look.bytes),
            first_byte: look.first_byte,
            issued: look.issued,
            since: vec![look.completed; slots],
            changed,
        };
        let Some(seen) = &mut self.seen else {
            self.seen = Some(fresh(vec![false; slots]));
            return;
        };
        if look.issued < seen.issued {
            // An older look that was slow says nothing new.
            return;
        }
        let stalled =
            look.completed.since(look.issued) > STALL || look.completed.since(seen.issued) > 2 * STALL;
        for slot in 0..slots {
            let start = seen.first_byte + slot * BLOCK_SIZE;
            let differs = seen.bytes[start..start + BLOCK_SIZE] != *look.slot_bytes(NodeId(slot as u16));
            seen.changed[slot] |= differs;
            if differs || stalled {
                seen.since[slot] = look.completed;
            }
        }
        seen.bytes = Arc::clone(&look.bytes);
        seen.first_byte = look.first_byte;
        seen.issued = look.issued;
    }

    /// The own I/O failed or hung: nothing that was not seen until now counts.
    pub fn stalled(&mut self) {
        self.seen = None;
    }

    /// How long a slot is known to be unchanged.
    pub fn unchanged_for(&self, node: NodeId) -> Duration {
        let Some(seen) = &self.seen else { return Duration::ZERO };
        let since = seen.since.get(usize::from(node.0));
        since.map_or(Duration::ZERO, |since| seen.issued.since(*since))
    }

    /// Whether a slot was seen to change: then its holder is alive.
    pub fn was_seen_changing(&self, node: NodeId) -> bool {
        let seen = self.seen.as_ref().and_then(|seen| seen.changed.get(usize::from(node.0)));
        seen.copied().unwrap_or(false)
    }

    /// When a slot will have been unchanged for `wait`, if nothing happens.
    pub fn unchanged_until(&self, node: NodeId, wait: Duration) -> Option<Instant> {
        let since = self.seen.as_ref()?.since.get(usize::from(node.0))?;
        Some(*since + wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::area::Head;

    fn look(at_ms: u64, took_ms: u64, first: u8) -> Look {
        let mut bytes = AlignedBuf::zeroed(2 * BLOCK_SIZE);
        bytes[0] = first;
        Look {
            issued: Instant(at_ms * 1_000_000),
            completed: Instant((at_ms + took_ms) * 1_000_000),
            slots: vec![crate::slots::SlotContents::Blank; 2],
            head: Head::default(),
            bytes: Arc::new(bytes),
            first_byte: 0,
        }
    }

    fn unchanged_ms(watch: &Watch, node: u16) -> u128 {
        watch.unchanged_for(NodeId(node)).as_millis()
    }

    #[test]
    fn a_slot_is_unchanged_from_the_end_of_the_first_look_to_the_start_of_the_last() {
        let mut watch = Watch::new();
        for at in [0, 1000, 2000] {
            watch.observe(&look(at, 100, 1));
        }
        assert_eq!(unchanged_ms(&watch, 0), 1900);
        assert!(!watch.was_seen_changing(NodeId(0)));
    }

    #[test]
    fn a_change_starts_the_window_of_its_slot_anew() {
        let mut watch = Watch::new();
        watch.observe(&look(0, 0, 1));
        watch.observe(&look(1000, 0, 2));
        watch.observe(&look(2000, 0, 2));
        assert_eq!((unchanged_ms(&watch, 0), unchanged_ms(&watch, 1)), (1000, 2000));
        assert!(watch.was_seen_changing(NodeId(0)) && !watch.was_seen_changing(NodeId(1)));
    }

    #[test]
    fn after_an_own_stall_all_windows_start_anew() {
        let stalls: [fn(&mut Watch); 3] = [
            |watch| watch.observe(&look(4000, 3000, 1)),
            |watch| watch.observe(&look(9000, 0, 1)),
            |watch| {
                watch.stalled();
                watch.observe(&look(4000, 0, 1));
            },
        ];
        for stall in stalls {
            let mut watch = Watch::new();
            watch.observe(&look(0, 0, 1));
            watch.observe(&look(2000, 0, 1));
            stall(&mut watch);
            assert_eq!(unchanged_ms(&watch, 0), 0);
        }
    }
}
