//! Space in a journal's ring. Sans-IO.
//!
//! Live records lie in the ring in the order of their numbers, each in one piece; no two overlap.

use std::collections::VecDeque;

use storage_control::Clock;

use crate::store::TxnSeq;

/// A record that may need replay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Live {
    /// Sequence number of the record.
    pub(crate) record: u64,
    /// The transaction in it.
    pub(crate) txn: TxnSeq,
    /// Where in the ring.
    pub(crate) at: u64,
    /// Blocks.
    pub(crate) blocks: u64,
    /// Its version.
    pub(crate) version: Clock,
}

/// Where records are in the ring.
#[derive(Debug)]
pub(crate) struct Ring {
    blocks: u64,
    head: u64,
    next_record: u64,
    live: VecDeque<Live>,
}

impl Ring {
    pub(crate) fn new(blocks: u64) -> Ring {
        Ring { blocks, head: 0, next_record: 1, live: VecDeque::new() }
    }

    /// Where a record of that size would go now.
    pub(crate) fn place(&self, blocks: u64) -> Option<u64> {
        let to_end = self.blocks - self.head;
        match self.live.front() {
            None if blocks <= to_end => Some(self.head),
            None => (blocks <= self.blocks).then_some(0),
            Some(tail) if self.head <= tail.at => (blocks <= tail.at - self.head).then_some(self.head),
            Some(_) if blocks <= to_end => Some(self.head),
            Some(tail) => (blocks <= tail.at).then_some(0),
        }
    }

    /// Takes the place of a new record.
    pub(crate) fn push(&mut self, txn: TxnSeq, blocks: u64, version: Clock) -> Option<Live> {
        let at = self.place(blocks)?;
        let live = Live { record: self.next_record, txn, at, blocks, version };
        self.next_record += 1;
        self.head = at + blocks;
        self.live.push_back(live);
        Some(live)
    }

    /// The oldest record after transaction `upto`, or the place and number of the next one.
    pub(crate) fn tail_after(&self, upto: TxnSeq) -> (u64, u64) {
        match self.first_after(upto) {
            Some(live) => (live.record, live.at),
            None => (self.next_record, self.head),
        }
    }

    /// The oldest record after transaction `upto`.
    pub(crate) fn first_after(&self, upto: TxnSeq) -> Option<&Live> {
        self.live.iter().find(|live| live.txn > upto)
    }

    /// Gives back the space of all records up to transaction `upto`.
    pub(crate) fn release(&mut self, upto: TxnSeq) {
        while self.live.front().is_some_and(|live| live.txn <= upto) {
            self.live.pop_front();
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Blocks between the oldest record and the head.
    pub(crate) fn used(&self) -> u64 {
        match self.live.front() {
            None => 0,
            Some(tail) if self.head <= tail.at => self.blocks - (tail.at - self.head),
            Some(tail) => self.head - tail.at,
        }
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_never_overlap_and_never_wrap() {
        let mut seed = 1_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let mut ring = Ring::new(100);
        let mut txn = 0;
        for _ in 0..100_000 {
            if random(3) > 0 {
                txn += 1;
                if ring.push(TxnSeq(txn), 1 + random(25), Clock(txn)).is_none() {
                    assert!(!ring.is_empty(), "an empty ring takes any record");
                    ring.release(ring.live[0].txn);
                }
            } else if !ring.is_empty() {
                ring.release(ring.live[random(ring.live.len() as u64) as usize].txn);
            }
            let mut map = [false; 100];
            for live in &ring.live {
                for place in &mut map[live.at as usize..(live.at + live.blocks) as usize] {
                    assert!(!std::mem::replace(place, true));
                }
            }
            assert!(ring.used() <= 100);
        }
    }
}
