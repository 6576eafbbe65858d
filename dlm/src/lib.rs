//! The distributed lock manager: resources, modes, queues, recovery.
//!
//! A core without clock, socket or thread. Each node has [`PARTITIONS`] independent [`Dlm`]s; a resource belongs
//! to one of them by its name, on every node the same. The view deals the shards of the lock space to masters; a
//! master keeps the queues of its resources, every node keeps what it holds and asks itself, and that is what
//! masters are told again after each new view. A request to a master on the same node is answered without a
//! message.
//!
//! Of the driver is required: views in rising order; messages between two members of one partition in order and
//! without loss while both keep the view. Where a connection lost messages, a new view (of the same members)
//! repairs it.

mod core;
mod epoch;
mod message;
mod mode;
mod queues;
mod recovery;
mod resource;
mod snapshot;

pub use crate::core::Dlm;
pub use crate::epoch::{Departed, Epoch};
pub use crate::message::{Body, Entry, EntryAsk, Fault, Message, Op, Output, REPORT_ENTRIES, Refusal};
pub use crate::mode::{MODES, Mode, ModeSet};
pub use crate::resource::{NameHash, NameHasher, PARTITIONS, Resource, VALUE_LEN, Value, ValueBlock};
pub use crate::snapshot::{HolderInfo, ResourceInfo, WaiterInfo};
