//! Sets of block numbers within a group.
//!
//! The count always equals the number of set bits.

/// A set of small numbers, one bit each.
#[derive(Clone, Debug)]
pub(crate) struct BitSet {
    words: Vec<u64>,
    len: u32,
    count: u32,
}

impl BitSet {
    /// The empty set of numbers below `len`.
    pub(crate) fn new(len: u32) -> BitSet {
        BitSet { words: vec![0; len.div_ceil(64) as usize], len, count: 0 }
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    pub(crate) fn contains(&self, n: u32) -> bool {
        n < self.len && self.words[n as usize / 64] >> (n % 64) & 1 == 1
    }

    /// True if it was not there.
    pub(crate) fn insert(&mut self, n: u32) -> bool {
        debug_assert!(n < self.len);
        let word = &mut self.words[n as usize / 64];
        let fresh = *word >> (n % 64) & 1 == 0;
        *word |= 1 << (n % 64);
        // Not `+= u32::from(fresh)`: rustc 1.95 at opt-level 2 and 3 then loses the count in an inlined loop (the
        // test below fails), at levels 0 and 1 it does not.
        if fresh {
            self.count += 1;
        }
        fresh
    }

    /// True if it was there.
    pub(crate) fn remove(&mut self, n: u32) -> bool {
        if !self.contains(n) {
            return false;
        }
        self.words[n as usize / 64] &= !(1 << (n % 64));
        self.count -= 1;
        true
    }

    /// The first member at or after `from`.
    pub(crate) fn first_from(&self, from: u32) -> Option<u32> {
        self.next(from, 0)
    }

    /// The first number at or after `from` that is not a member (at most `len`).
    fn first_gap(&self, from: u32) -> u32 {
        self.next(from, u64::MAX).unwrap_or(self.len)
    }

    fn next(&self, from: u32, flip: u64) -> Option<u32> {
        if from >= self.len {
            return None;
        }
        let mut at = from as usize / 64;
        let mut word = (self.words[at] ^ flip) & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                let n = at as u32 * 64 + word.trailing_zeros();
                return (n < self.len).then_some(n);
            }
            at += 1;
            word = *self.words.get(at)? ^ flip;
        }
    }

    /// The runs of members that start in `from..to`, as start and length.
    pub(crate) fn runs(&self, from: u32, to: u32) -> impl Iterator<Item = (u32, u32)> + '_ {
        let mut at = from;
        std::iter::from_fn(move || {
            let start = self.first_from(at).filter(|&start| start < to)?;
            at = self.first_gap(start);
            Some((start, at - start))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_members() {
        let mut set = BitSet::new(300);
        for n in (3..70).chain(100..101).chain(250..300) {
            assert!(set.insert(n));
        }
        assert_eq!(set.runs(0, 300).collect::<Vec<_>>(), [(3, 67), (100, 1), (250, 50)]);
        assert_eq!(set.runs(50, 101).collect::<Vec<_>>(), [(50, 20), (100, 1)]);
        assert_eq!(set.count(), 118);
        assert!(set.remove(100) && !set.remove(100) && !set.contains(100));
        assert_eq!(set.first_from(70), Some(250));
        assert_eq!(set.first_from(300), None);
    }
}
