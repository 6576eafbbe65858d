//! Journals: their header, the space in their ring, their records, and replay.
//!
//! A journal is written by one node at a time; it can be replayed by any node, alone, twice, or late, because an
//! image goes in place only over an older version.

mod head;
mod record;
mod replay;
mod ring;

pub use head::Head;
pub(crate) use head::Place;
pub(crate) use record::{RecordHead, encode, image_record};
pub(crate) use replay::has_records;
pub use replay::{ReplayReport, Scan, replay, scan};
pub(crate) use ring::Ring;
