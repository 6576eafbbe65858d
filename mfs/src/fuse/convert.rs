//! Our types in fuser's and back. The one place where an error becomes an errno for the kernel.
//!
//! FUSE calls the root 1. No dinode has that address, so the numbers of all others are the same on both sides.

use std::time::{Duration, SystemTime};

use fuser::{Errno, FileAttr, FileType, INodeNo, TimeOrNow};
use storage_control::WallTime;

use crate::error::FsError;
use crate::ops::{Attr, Ino, SetTime};

/// Numbers of inodes, both ways.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbers {
    pub(super) root: Ino,
}

impl Numbers {
    pub(super) fn ours(self, theirs: INodeNo) -> Ino {
        if theirs == INodeNo::ROOT { self.root } else { Ino(theirs.0) }
    }

    pub(super) fn theirs(self, ours: Ino) -> INodeNo {
        if ours == self.root { INodeNo::ROOT } else { INodeNo(ours.0) }
    }

    pub(super) fn attr(self, attr: &Attr) -> FileAttr {
        FileAttr {
            ino: self.theirs(attr.ino),
            size: attr.size,
            blocks: attr.blocks_512,
            atime: system_time(attr.atime),
            mtime: system_time(attr.mtime),
            ctime: system_time(attr.ctime),
            crtime: system_time(attr.btime),
            kind: file_type(attr.mode),
            perm: (attr.mode & 0o7777) as u16,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            blksize: storage_control::BLOCK_SIZE as u32,
            flags: 0,
        }
    }
}

pub(super) fn errno(error: &FsError) -> Errno {
    Errno::from_i32(error.errno())
}

pub(super) fn file_type(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFSOCK => FileType::Socket,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

/// Times that `SystemTime` cannot hold become the epoch.
fn system_time(time: WallTime) -> SystemTime {
    let whole = if time.secs >= 0 {
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(time.secs.unsigned_abs()))
    } else {
        SystemTime::UNIX_EPOCH.checked_sub(Duration::from_secs(time.secs.unsigned_abs()))
    };
    whole
        .and_then(|t| t.checked_add(Duration::from_nanos(time.nanos.into())))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(at) => SetTime::At(wall_time(at)),
    }
}

/// Undoes what fuser 0.18 makes of the kernel's seconds and nanoseconds: before the epoch it subtracts both.
fn wall_time(time: SystemTime) -> WallTime {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => WallTime { secs: after.as_secs() as i64, nanos: after.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            WallTime { secs: -(before.as_secs() as i64), nanos: before.subsec_nanos() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_keep_their_order() {
        let at = system_time(WallTime { secs: -2, nanos: 800_000_000 });
        assert_eq!(at, SystemTime::UNIX_EPOCH - Duration::from_millis(1200));
    }

    #[test]
    fn the_root_is_one_for_the_kernel() {
        let numbers = Numbers { root: Ino(4711) };
        assert_eq!(numbers.theirs(Ino(4711)), INodeNo::ROOT);
        assert_eq!(numbers.ours(INodeNo::ROOT), Ino(4711));
        assert_eq!(numbers.ours(numbers.theirs(Ino(99))), Ino(99));
    }
}
