//! The six modes and what they allow beside each other.
//!
//! Always: compatibility is symmetric; `a` covers `b` exactly if whatever may coexist with `a` may coexist with
//! `b`; NL < CR < {CW, PR} < PW < EX, with CW and PR neither above nor below each other.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A lock mode (DLM-2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub enum Mode {
    /// Null: no access. A node that holds NL holds nothing.
    #[default]
    NL,
    /// Concurrent read: others may write.
    CR,
    /// Concurrent write: others may write too.
    CW,
    /// Protected read: nobody writes.
    PR,
    /// Protected write: the only writer, among concurrent readers.
    PW,
    /// Exclusive.
    EX,
}

use Mode::{CR, CW, EX, NL, PR, PW};

/// Every mode, weakest first.
pub const MODES: [Mode; 6] = [NL, CR, CW, PR, PW, EX];

/// Row: granted, column: requested. Bit `m` is set where mode `m` may coexist.
const COMPATIBLE: [u8; 6] = [0b11_1111, 0b01_1111, 0b00_0111, 0b00_1011, 0b00_0011, 0b00_0001];

impl Mode {
    const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Whether two nodes may hold these modes at the same time.
    pub const fn compatible(self, other: Mode) -> bool {
        COMPATIBLE[self as usize] & other.bit() != 0
    }

    /// Whether a holder of `self` may do all that a holder of `other` may.
    pub const fn covers(self, other: Mode) -> bool {
        COMPATIBLE[self as usize] & !COMPATIBLE[other as usize] == 0
    }

    /// The weakest mode that covers both.
    pub fn join(self, other: Mode) -> Mode {
        MODES.into_iter().find(|m| m.covers(self) && m.covers(other)).expect("EX covers every mode")
    }

    /// Whether a holder may have changed what the resource stands for.
    pub const fn writes(self) -> bool {
        matches!(self, CW | PW | EX)
    }

    /// Whether a holder may write the value block.
    pub const fn writes_value(self) -> bool {
        matches!(self, PW | EX)
    }

    /// Whether nobody else can have written the value block while this mode was held.
    pub const fn fixes_value(self) -> bool {
        !matches!(self, NL | CR)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A set of modes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ModeSet(u8);

impl ModeSet {
    /// The empty set.
    pub const EMPTY: ModeSet = ModeSet(0);

    /// Adds a mode; true if it was not in the set.
    pub fn insert(&mut self, mode: Mode) -> bool {
        let before = self.0;
        self.0 |= mode.bit();
        before != self.0
    }

    /// Whether the mode is in the set.
    pub const fn contains(self, mode: Mode) -> bool {
        self.0 & mode.bit() != 0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The modes in the set, weakest first.
    pub fn iter(self) -> impl Iterator<Item = Mode> {
        MODES.into_iter().filter(move |mode| self.contains(*mode))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of dlm.md, written as there.
    const TABLE: [&str; 6] = ["xxxxxx", "xxxxx.", "xxx...", "xx.x..", "xx....", "x....."];

    #[test]
    fn compatibility_is_the_standard_table() {
        for (row, granted) in TABLE.iter().zip(MODES) {
            for (cell, asked) in row.chars().zip(MODES) {
                assert_eq!(granted.compatible(asked), cell == 'x', "{granted} beside {asked}");
                assert_eq!(granted.compatible(asked), asked.compatible(granted));
            }
        }
    }

    #[test]
    fn protected_read_and_concurrent_write_are_neither_up_nor_down() {
        assert!(!PR.covers(CW) && !CW.covers(PR));
        assert_eq!(PR.join(CW), PW);
        assert_eq!(CR.join(PR), PR);
        assert_eq!(PW.join(EX), EX);
        for pair in [NL, CR, CW, PW, EX].windows(2).chain([NL, CR, PR, PW, EX].windows(2)) {
            assert!(pair[1].covers(pair[0]) && !pair[0].covers(pair[1]));
        }
    }
}
