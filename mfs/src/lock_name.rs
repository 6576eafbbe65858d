//! Names of cluster locks.
//!
//! Every metadata block belongs to exactly one of them, named in its header. The order of the variants is the
//! order in which an operation may wait for them; what breaks the order is taken by try.

use std::fmt;

use dlm::Resource;

use crate::format::superblock::Geometry;

/// The cluster's lock shards; a group's shard is its number modulo this.
pub const SHARDS: u64 = 1024;

/// A cluster lock of the filesystem. Declared in locking order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LockName {
    /// Taken when a directory changes its parent.
    Rename,
    /// The superblock and its table of journals.
    Journals,
    /// An allocation group: its header, bitmap and freed metadata blocks.
    Group(u32),
    /// An inode: its dinode and every block that hangs from it.
    Inode(u64),
    /// Shared by every node that has the inode open.
    Open(u64),
    /// The orphan table of a journal.
    Orphans(u16),
}

impl LockName {
    /// The number of the kind, in block headers and in `Resource::kind`. Never reused.
    pub const fn kind(self) -> u8 {
        match self {
            LockName::Rename => 1,
            LockName::Journals => 2,
            LockName::Group(_) => Self::GROUP,
            LockName::Inode(_) => Self::INODE,
            LockName::Open(_) => Self::OPEN,
            LockName::Orphans(_) => Self::ORPHANS,
        }
    }

    /// Kind number of `Group`.
    pub const GROUP: u8 = 3;
    /// Kind number of `Inode`.
    pub const INODE: u8 = 4;
    /// Kind number of `Open`.
    pub const OPEN: u8 = 5;
    /// Kind number of `Orphans`.
    pub const ORPHANS: u8 = 6;

    /// The number within the kind.
    pub const fn number(self) -> u64 {
        match self {
            LockName::Rename | LockName::Journals => 0,
            LockName::Group(g) => g as u64,
            LockName::Inode(n) | LockName::Open(n) => n,
            LockName::Orphans(j) => j as u64,
        }
    }

    /// The name with this kind and number; `None` if there is none (foreign bytes).
    pub fn from_parts(kind: u8, number: u64) -> Option<LockName> {
        match kind {
            1 if number == 0 => Some(LockName::Rename),
            2 if number == 0 => Some(LockName::Journals),
            Self::GROUP => u32::try_from(number).ok().map(LockName::Group),
            Self::INODE => Some(LockName::Inode(number)),
            Self::OPEN => Some(LockName::Open(number)),
            Self::ORPHANS => u16::try_from(number).ok().map(LockName::Orphans),
            _ => None,
        }
    }

    /// The shard of the lock: an inode's is its allocation group's.
    pub fn shard(self, geometry: &Geometry) -> u16 {
        let group = match self {
            LockName::Rename | LockName::Journals | LockName::Orphans(_) => 0,
            LockName::Group(g) => g as u64,
            LockName::Inode(n) | LockName::Open(n) => geometry.group_index_or_zero(n),
        };
        (group % SHARDS) as u16
    }

    /// The resource the lock manager knows it by.
    pub fn resource(self, geometry: &Geometry) -> Resource {
        Resource { shard: self.shard(geometry), kind: self.kind(), number: self.number(), part: 0 }
    }

    /// The name behind a resource of ours.
    pub fn from_resource(resource: &Resource) -> Option<LockName> {
        LockName::from_parts(resource.kind, resource.number)
    }
}

impl fmt::Display for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LockName::Rename => write!(f, "rename"),
            LockName::Journals => write!(f, "journals"),
            LockName::Group(g) => write!(f, "group {g}"),
            LockName::Inode(n) => write!(f, "inode {n}"),
            LockName::Open(n) => write!(f, "open {n}"),
            LockName::Orphans(j) => write!(f, "orphans {j}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kind_and_number_name_the_lock_again() {
        for name in [
            LockName::Rename,
            LockName::Journals,
            LockName::Group(7),
            LockName::Inode(9),
            LockName::Open(9),
            LockName::Orphans(3),
        ] {
            assert_eq!(LockName::from_parts(name.kind(), name.number()), Some(name));
        }
        assert_eq!(LockName::from_parts(0, 0), None);
        assert_eq!(LockName::from_parts(LockName::ORPHANS, 70_000), None);
    }
}
