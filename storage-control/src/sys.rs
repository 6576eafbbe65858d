//! The system calls that std does not have, each behind a safe function.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// `blkgetsize64`: the size of a block device in bytes.
pub(crate) fn block_device_bytes(file: &File) -> io::Result<u64> {
    // _IOR(0x12, 114, size_t) on every 64-bit Linux whose ioctl numbers follow asm-generic.
    const BLKGETSIZE64: u64 = 0x8008_1272;
    let mut bytes: u64 = 0;
    // SAFETY: the kernel writes one u64 to the address.
    check(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64 as _, &raw mut bytes) })?;
    Ok(bytes)
}

/// The size of a block device's logical sectors in bytes.
pub(crate) fn block_device_sector(device: &impl AsFd) -> io::Result<u32> {
    // _IO(0x12, 104), which writes an int all the same.
    const BLKSSZGET: u64 = 0x1268;
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one int to the address.
    check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BLKSSZGET as _, &raw mut bytes) })?;
    u32::try_from(bytes).map_err(io::Error::other)
}

/// Reads into `buf` at `offset` once; may be short.
pub(crate) fn pread(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buf.len()` bytes into `buf`.
    let done = unsafe { libc::pread(file.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), offset as i64) };
    check_len(done)
}

/// Writes the pieces at `offset` once; may be short. `dsync`: stable on return (RWF_DSYNC).
pub(crate) fn pwritev(
    file: &File,
    pieces: &[io::IoSlice<'_>],
    offset: u64,
    dsync: bool,
) -> io::Result<usize> {
    let count = pieces.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
    let flags = if dsync { libc::RWF_DSYNC } else { 0 };
    // SAFETY: std's IoSlice is guaranteed to have the layout of iovec; `count` of them are valid and only read.
    let done = unsafe {
        libc::pwritev2(file.as_raw_fd(), pieces.as_ptr().cast::<libc::iovec>(), count, offset as i64, flags)
    };
    check_len(done)
}

/// What became of an attempt to take a lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lock {
    Taken,
    HeldElsewhere,
}

/// Takes the open-file-description lock of one byte, exclusively, without waiting.
pub(crate) fn try_lock_byte(file: &File, byte: u64) -> io::Result<Lock> {
    match ofd_lock(file, byte, libc::F_WRLCK as libc::c_short) {
        Ok(()) => Ok(Lock::Taken),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(Lock::HeldElsewhere)
        }
        Err(error) => Err(error),
    }
}

/// Gives the lock of one byte back.
pub(crate) fn unlock_byte(file: &File, byte: u64) -> io::Result<()> {
    ofd_lock(file, byte, libc::F_UNLCK as libc::c_short)
}

fn ofd_lock(file: &File, byte: u64, kind: libc::c_short) -> io::Result<()> {
    // SAFETY: flock is a plain C struct for which zeros are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte as i64;
    lock.l_len = 1;
    // SAFETY: the kernel only reads `lock` for F_OFD_SETLK.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(drop)
}

/// A descriptor that stands for one process, whatever becomes of its pid.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: the call takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = check(fd as libc::c_int)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kills the process behind the descriptor. A process that is already gone is fine.
pub(crate) fn pidfd_kill(pidfd: &OwnedFd) -> io::Result<()> {
    let no_info: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a null siginfo is allowed.
    let done =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, no_info, 0) };
    match check(done as libc::c_int) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The magic number of the file system a file lies in.
pub(crate) fn filesystem_magic(file: &File) -> io::Result<u32> {
    // SAFETY: statfs is a plain C struct for which zeros are valid.
    let mut info: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills in `info`.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut info) })?;
    Ok(info.f_type as u32)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_len(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
