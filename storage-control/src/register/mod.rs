//! The quorum register: what the nodes of a matrix agree on, by compare-and-set.
//!
//! [`core`] holds the rules, `format` the bytes, `driver` the I/O.

pub mod core;
pub mod driver;
mod format;

pub use self::core::{Ballot, OpId};
pub use driver::{Acceptor, AcceptorError, Outcome, Register, RegisterError, Snapshot, Unsettled};
#[cfg(test)]
pub(crate) use format::RawRegister;
pub(crate) use format::decode;
pub use format::{AcceptorId, BadBlock};
