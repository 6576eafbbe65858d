//! MFS, the Matrix filesystem: on-disk format, journal, allocation, files and directories, operations.
//!
//! No block is changed outside a transaction; no transaction is open while a cluster lock is awaited.

pub mod alloc;
mod background;
pub mod callouts;
pub mod data;
pub mod dir;
pub mod error;
pub mod extent;
pub mod filesystem;
pub mod format;
pub mod fsck;
pub mod fuse;
pub mod index;
pub mod inode;
pub mod inode_table;
pub mod journal;
pub mod lock_name;
pub mod mkfs;
pub mod ops;
pub mod orphan;
pub mod recover;
pub mod store;
#[cfg(test)]
pub(crate) mod testing;
pub mod xattr;

pub use error::FsError;
pub use filesystem::{Filesystem, GatherTails, LeaseTime, Options, Parts};
pub use lock_name::LockName;
