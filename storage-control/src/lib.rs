//! Devices, the gate, leases, slots, the quorum register and fencing: everything that touches a shared disk.
//!
//! What always holds:
//! - Every access of a daemon to a shared device passes a [`Gate`].
//! - A [`FileDevice`] has exactly one descriptor; the open-file-description lock of a slot lies on it.
//! - A quorum block is written by the owner of its slot alone, and never cleared.
//! - Bytes read from a device are checked before they are believed; bad ones are an `Err`, never a panic.
//!
//! This crate decides nothing about membership: it reports what it sees as values.

pub mod buf;
mod completion;
pub mod device;
pub mod fence;
pub mod file_device;
mod format;
#[cfg(test)]
mod format_tests;
pub mod gate;
pub mod ids;
pub mod info;
pub mod label;
pub mod layout;
pub mod lease;
pub mod medium;
pub mod mem_device;
pub mod mkfs;
pub mod naming;
pub mod process;
pub mod register;
pub mod runtime;
pub mod signature;
pub mod slots;
mod sys;
mod turn;

pub use buf::{AlignedBuf, IoSlice};
pub use device::{Device, Durability, IoFuture, Request, SubmitGuard};
pub use file_device::{FileDevice, FileIdentity, OpenAs, OpenError, StableBy};
pub use gate::{CloseReason, Gate, GateRefused, GateStats};
pub use ids::{
    BLOCK_SIZE, BlockAddr, Clock, ClockError, Generation, Incarnation, LamportClock, MAX_NODES, NodeId,
};
pub use info::DeviceInfo;
pub use label::{Label, LabelError};
pub use layout::{MAX_BODY_BYTES, QuorumLayout};
pub use medium::{Medium, WriteLife};
pub use mem_device::MemDevice;
pub use naming::{DeviceId, DeviceName};
pub use register::{Outcome, Register, RegisterError, Snapshot};
pub use runtime::{BoxFuture, Instant, Runtime, SimRuntime, TestRuntime, WallTime, block_on};
pub use signature::Signature;
