//! fuser's requests in terms of [`Operations`]: takes a request apart, runs the operation, answers.
//!
//! The thread that read a request polls its operation once: with the lock cached and the blocks in memory it is
//! answered there. What must wait goes to the runtime together with the reply.
//!
//! Replies that make the kernel learn of an inode (LOOKUP, CREATE, MKNOD, MKDIR, SYMLINK, LINK, READDIRPLUS)
//! have timeout 0: an invalidation that overtakes one finds no inode, and the kernel would then keep what the
//! reply brings. Only GETATTR and SETATTR replies carry a timeout.

use std::ffi::OsStr;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use storage_control::{BLOCK_SIZE, Runtime};

use super::convert::{Numbers, errno, file_type, set_time};
use crate::ops::{
    Attr, Caller, Fresh, Handle, Opened, Operations, RenameFlags, Result, SetAttr, Write, XattrSet,
};

/// Bytes in the largest WRITE and READ request.
const MAX_WRITE: u32 = 1 << 20;
/// Requests of the kernel's own (read-ahead) at a time; with few, one slow file would hold up all others.
const MAX_BACKGROUND: u16 = 1024;
/// Names asked of the filesystem for one READDIR reply.
const NAMES_PER_READDIR: usize = 512;
/// See the module's header.
const NOT_KEPT: Duration = Duration::ZERO;

pub(super) struct Adapter<O> {
    pub(super) operations: Arc<O>,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) numbers: Numbers,
}

/// Polls once here; hands over to the runtime what is not ready.
fn run(runtime: &Arc<dyn Runtime>, task: impl Future<Output = ()> + Send + 'static) {
    let mut task: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(task);
    // Whatever wakes this waker is not lost: the runtime polls a task that it is given.
    if task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
        runtime.spawn(task);
    }
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid() }
}

fn open_flags(opened: &Opened, flags: i32) -> FopenFlags {
    let mut reply = FopenFlags::empty();
    reply.set(FopenFlags::FOPEN_DIRECT_IO, opened.direct_io);
    reply.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_cache);
    // Only what was written can have an error to report at close.
    reply.set(FopenFlags::FOPEN_NOFLUSH, flags & libc::O_ACCMODE == libc::O_RDONLY);
    reply
}

/// Answers with what the future gives, or with its error's errno.
macro_rules! answer {
    ($self:ident, $reply:ident, |$fs:ident| $call:expr, |$ok:pat_param| $done:expr) => {{
        let $fs = $self.operations.clone();
        run(&$self.runtime, async move {
            match $call.await {
                Ok($ok) => $done,
                Err(error) => $reply.error(errno(&error)),
            }
        });
    }};
}

impl<O: Operations> Adapter<O> {
    fn reply_entry(numbers: Numbers, reply: ReplyEntry, attr: &Attr) {
        reply.entry(&NOT_KEPT, &numbers.attr(attr), Generation(attr.generation));
    }

    fn reply_attr(numbers: Numbers, reply: ReplyAttr, fresh: &Fresh) {
        reply.attr(&fresh.valid_for, &numbers.attr(&fresh.attr));
    }
}

/// The value, or its size where that is asked for.
fn reply_xattr(reply: ReplyXattr, size: u32, value: Result<Vec<u8>>) {
    match value {
        Err(error) => reply.error(errno(&error)),
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
    }
}

impl<O: Operations> fuser::Filesystem for Adapter<O> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Without it a cached page would outlive a change that came from elsewhere.
        config.add_capabilities(InitFlags::FUSE_AUTO_INVAL_DATA).map_err(|_| {
            std::io::Error::other(
                "this kernel's FUSE cannot invalidate pages by itself (FUSE_AUTO_INVAL_DATA)",
            )
        })?;
        // Not asked for: FUSE_WRITEBACK_CACHE, which cannot be coherent, and FUSE_DO_READDIRPLUS, whose replies
        // would have timeout 0 and so save nothing. The rest is good to have; older kernels do without.
        for flag in
            [InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP, InitFlags::FUSE_ASYNC_DIO]
        {
            let _ = config.add_capabilities(flag);
        }
        config
            .set_max_write(MAX_WRITE)
            .map_err(|_| std::io::Error::other("requests of 1 MiB are refused"))?;
        config
            .set_max_background(MAX_BACKGROUND)
            .map_err(|_| std::io::Error::other("no background requests"))?;
        let _ = config.set_max_readahead(MAX_WRITE).or_else(|nearest| config.set_max_readahead(nearest));
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (numbers, parent, name) = (self.numbers, self.numbers.ours(parent), name.as_bytes().to_vec());
        answer!(self, reply, |fs| fs.lookup(parent, &name), |attr| Self::reply_entry(numbers, reply, &attr));
    }

    fn forget(&self, _request: &Request, ino: INodeNo, count: u64) {
        self.operations.forget(self.numbers.ours(ino), count);
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let (numbers, ino) = (self.numbers, self.numbers.ours(ino));
        answer!(self, reply, |fs| fs.getattr(ino), |fresh| Self::reply_attr(numbers, reply, &fresh));
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (numbers, ino) = (self.numbers, self.numbers.ours(ino));
        let (atime, mtime) = (atime.map(set_time), mtime.map(set_time));
        let set = SetAttr { mode, uid, gid, size, atime, mtime };
        answer!(self, reply, |fs| fs.setattr(ino, set), |fresh| Self::reply_attr(numbers, reply, &fresh));
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        let ino = self.numbers.ours(ino);
        answer!(self, reply, |fs| fs.readlink(ino), |target| reply.data(&target));
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (numbers, caller, parent) = (self.numbers, caller(request), self.numbers.ours(parent));
        let name = name.as_bytes().to_vec();
        answer!(self, reply, |fs| fs.mknod(caller, parent, &name, mode, rdev), |attr| {
            Self::reply_entry(numbers, reply, &attr)
        });
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let (numbers, caller, parent) = (self.numbers, caller(request), self.numbers.ours(parent));
        let name = name.as_bytes().to_vec();
        answer!(self, reply, |fs| fs.mkdir(caller, parent, &name, mode), |attr| {
            Self::reply_entry(numbers, reply, &attr)
        });
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (parent, name) = (self.numbers.ours(parent), name.as_bytes().to_vec());
        answer!(self, reply, |fs| fs.unlink(parent, &name), |()| reply.ok());
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (parent, name) = (self.numbers.ours(parent), name.as_bytes().to_vec());
        answer!(self, reply, |fs| fs.rmdir(parent, &name), |()| reply.ok());
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (numbers, caller, parent) = (self.numbers, caller(request), self.numbers.ours(parent));
        let (name, target) = (name.as_bytes().to_vec(), target.as_os_str().as_bytes().to_vec());
        answer!(self, reply, |fs| fs.symlink(caller, parent, &name, &target), |attr| {
            Self::reply_entry(numbers, reply, &attr)
        });
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let known = fuser::RenameFlags::RENAME_NOREPLACE | fuser::RenameFlags::RENAME_EXCHANGE;
        if flags.bits() & !known.bits() != 0 || flags == known {
            return reply.error(Errno::EINVAL);
        }
        let flags = RenameFlags {
            no_replace: flags.contains(fuser::RenameFlags::RENAME_NOREPLACE),
            exchange: flags.contains(fuser::RenameFlags::RENAME_EXCHANGE),
        };
        let (parent, new_parent) = (self.numbers.ours(parent), self.numbers.ours(new_parent));
        let (name, new_name) = (name.as_bytes().to_vec(), new_name.as_bytes().to_vec());
        answer!(self, reply, |fs| fs.rename(parent, &name, new_parent, &new_name, flags), |()| reply.ok());
    }

    fn link(&self, _request: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (numbers, ino, parent) = (self.numbers, self.numbers.ours(ino), self.numbers.ours(parent));
        let name = name.as_bytes().to_vec();
        answer!(self, reply, |fs| fs.link(ino, parent, &name), |attr| Self::reply_entry(
            numbers, reply, &attr
        ));
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (ino, flags) = (self.numbers.ours(ino), flags.0);
        answer!(self, reply, |fs| fs.open(ino, flags), |opened| {
            reply.opened(FileHandle(opened.handle.0), open_flags(&opened, flags))
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (numbers, caller, parent) = (self.numbers, caller(request), self.numbers.ours(parent));
        let name = name.as_bytes().to_vec();
        answer!(self, reply, |fs| fs.create(caller, parent, &name, mode, flags), |(attr, opened)| {
            reply.created(
                &NOT_KEPT,
                &numbers.attr(&attr),
                Generation(attr.generation),
                FileHandle(opened.handle.0),
                open_flags(&opened, flags),
            )
        });
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let handle = Handle(handle.0);
        answer!(self, reply, |fs| fs.read(handle, offset, size as usize), |data| reply.data(&data));
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // What the kernel writes of mapped pages has its own offset, whatever the file was opened with.
        let from_pages = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let write = Write {
            offset,
            data: data.to_vec(),
            append: !from_pages && flags.0 & libc::O_APPEND != 0,
            kill_suid: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
            sync: flags.0 & libc::O_DSYNC != 0,
        };
        let handle = Handle(handle.0);
        answer!(self, reply, |fs| fs.write(handle, write), |written| reply.written(written as u32));
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let handle = Handle(handle.0);
        answer!(self, reply, |fs| fs.flush(handle), |()| reply.ok());
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let handle = Handle(handle.0);
        answer!(self, reply, |fs| fs.release(handle), |()| reply.ok());
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let handle = Handle(handle.0);
        answer!(self, reply, |fs| fs.fsync(handle, data_only), |()| reply.ok());
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let ino = self.numbers.ours(ino);
        // No FOPEN_CACHE_DIR: the kernel would show a listing that a peer has changed.
        answer!(self, reply, |fs| fs.opendir(ino), |handle| {
            reply.opened(FileHandle(handle.0), FopenFlags::empty())
        });
    }

    fn readdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let (numbers, handle) = (self.numbers, Handle(handle.0));
        answer!(self, reply, |fs| fs.readdir(handle, offset, NAMES_PER_READDIR), |entries| {
            for e in entries {
                let name = OsStr::from_bytes(&e.name);
                if reply.add(numbers.theirs(e.ino), e.next, file_type(e.file_type), name) {
                    break;
                }
            }
            reply.ok()
        });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let (numbers, handle, operations) = (self.numbers, Handle(handle.0), self.operations.clone());
        answer!(self, reply, |fs| fs.readdirplus(handle, offset, NAMES_PER_READDIR), |entries| {
            let mut full = false;
            for (e, attr) in entries {
                let (ino, name) = (numbers.theirs(e.ino), OsStr::from_bytes(&e.name));
                let generation = Generation(attr.generation);
                full = full || reply.add(ino, e.next, name, &NOT_KEPT, &numbers.attr(&attr), generation);
                if full && e.name != b"." && e.name != b".." {
                    operations.forget(e.ino, 1);
                }
            }
            reply.ok()
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let handle = Handle(handle.0);
        answer!(self, reply, |fs| fs.releasedir(handle), |()| reply.ok());
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        let handle = Handle(handle.0);
        answer!(self, reply, |fs| fs.fsyncdir(handle), |()| reply.ok());
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        answer!(self, reply, |fs| fs.statfs(), |s| {
            let (block, name) = (BLOCK_SIZE as u32, crate::format::dirent::NAME_MAX as u32);
            reply.statfs(s.blocks, s.free, s.available, s.files, s.files_free, block, name, block)
        });
    }

    fn setxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let how = match flags {
            0 => XattrSet::Any,
            libc::XATTR_CREATE => XattrSet::Create,
            libc::XATTR_REPLACE => XattrSet::Replace,
            _ => return reply.error(Errno::EINVAL),
        };
        let (ino, name, value) = (self.numbers.ours(ino), name.as_bytes().to_vec(), value.to_vec());
        answer!(self, reply, |fs| fs.setxattr(ino, &name, &value, how), |()| reply.ok());
    }

    fn getxattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (ino, name, fs) = (self.numbers.ours(ino), name.as_bytes().to_vec(), self.operations.clone());
        run(&self.runtime, async move { reply_xattr(reply, size, fs.getxattr(ino, &name).await) });
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let (ino, fs) = (self.numbers.ours(ino), self.operations.clone());
        run(&self.runtime, async move { reply_xattr(reply, size, fs.listxattr(ino).await) });
    }

    fn removexattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (ino, name) = (self.numbers.ours(ino), name.as_bytes().to_vec());
        answer!(self, reply, |fs| fs.removexattr(ino, &name), |()| reply.ok());
    }

    // The kernel asks once for what is answered ENOSYS and then does it in its own way. POSIX and flock locks
    // are not negotiated: the kernel keeps them for this node.

    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _ino_in: INodeNo,
        _handle_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _handle_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
