//! Histories of registers, and whether they are linearizable.
//!
//! Every value is written at most once. Then a history is linearizable exactly if (Gibbons and Korach, 1997), with the
//! zone of a value from the first end to the last start of the operations that wrote or read it: no two zones that
//! go forward overlap, no zone that goes backward lies inside one that goes forward, and no read ends before its
//! write begins.

use std::collections::BTreeMap;

/// An operation that returned, or may have had an effect.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) value: u64,
    pub(crate) is_write: bool,
    pub(crate) start: u64,
    /// `u64::MAX` for a write whose end nobody saw.
    pub(crate) end: u64,
}

/// The operations on one register, which holds 0 at first.
#[derive(Clone, Debug, Default)]
pub(crate) struct History(pub(crate) Vec<Op>);

impl History {
    /// Why there is no order of the operations that explains what was read.
    pub(crate) fn defect(&self) -> Option<String> {
        let mut values: BTreeMap<u64, Vec<Op>> = BTreeMap::new();
        values.entry(0).or_default().push(Op { value: 0, is_write: true, start: 0, end: 0 });
        for op in &self.0 {
            values.entry(op.value).or_default().push(*op);
        }
        // A write that nobody saw the end of and nobody read need not have happened.
        values.retain(|_, ops| ops.iter().any(|op| op.end != u64::MAX));
        let mut forward: Vec<(u64, u64, u64)> = Vec::new();
        let mut backward = Vec::new();
        for (value, ops) in &values {
            let Some(write) = ops.iter().find(|op| op.is_write) else {
                return Some(format!("{value} was read and never written: {ops:?}"));
            };
            if let Some(read) = ops.iter().find(|op| op.end < write.start) {
                return Some(format!("{value} was read before it was written: {read:?}, {write:?}"));
            }
            let first_end = ops.iter().map(|op| op.end).min().expect("there is the write");
            let last_start = ops.iter().map(|op| op.start).max().expect("there is the write");
            if first_end < last_start {
                forward.push((first_end, last_start, *value));
            } else {
                backward.push((last_start, first_end, *value));
            }
        }
        forward.sort_unstable();
        for two in forward.windows(2) {
            if two[1].0 < two[0].1 {
                return Some(self.explain("both stood at the same time", two[0].2, two[1].2));
            }
        }
        for (start, end, value) in backward {
            if let Some(around) = forward.iter().find(|zone| zone.0 < start && end < zone.1) {
                return Some(self.explain("the first came and went while the second stood", value, around.2));
            }
        }
        None
    }

    fn explain(&self, what: &str, a: u64, b: u64) -> String {
        let of = |value| self.0.iter().filter(|op| op.value == value).collect::<Vec<_>>();
        format!("values {a} and {b}: {what}: {:?} and {:?}", of(a), of(b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(ops: &[(char, u64, u64, u64)]) -> History {
        let op = |&(kind, value, start, end)| Op { value, is_write: kind == 'w', start, end };
        History(ops.iter().map(op).collect())
    }

    #[test]
    fn orders_that_explain_everything_are_accepted() {
        assert_eq!(history(&[('r', 0, 1, 2), ('w', 1, 3, 9), ('r', 0, 4, 5), ('r', 1, 6, 7)]).defect(), None);
        assert_eq!(history(&[('w', 1, 1, u64::MAX), ('r', 0, 5, 6)]).defect(), None);
        assert_eq!(history(&[('w', 1, 1, u64::MAX), ('r', 0, 5, 6), ('r', 1, 7, 8)]).defect(), None);
    }

    #[test]
    fn stale_lost_and_foreign_values_are_found() {
        let stale = history(&[('w', 1, 1, 2), ('r', 0, 3, 4)]);
        let back = history(&[('w', 1, 1, 9), ('r', 1, 2, 3), ('r', 0, 4, 5)]);
        let lost = history(&[('w', 1, 1, 2), ('w', 2, 3, 4), ('r', 1, 5, 6)]);
        let unknown = history(&[('w', 1, 1, u64::MAX), ('r', 1, 5, 6), ('r', 0, 7, 8)]);
        let foreign = history(&[('r', 7, 5, 6)]);
        for wrong in [stale, back, lost, unknown, foreign] {
            assert!(wrong.defect().is_some(), "{wrong:?}");
        }
    }
}
