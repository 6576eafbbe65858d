//! An image file, loop device or block device.
//!
//! All I/O of a device goes through one descriptor, on which the open-file-description locks of slots lie: when such
//! a lock falls, no I/O of its holder is left in this kernel. I/O is direct; only an image in a file system that
//! refuses O_DIRECT goes through the page cache, and every stable write is then followed by fdatasync.
//!
//! Requests wait in one of two queues, each with its own threads: those below [`FileDevice::set_urgent_below`]
//! (slots and register) never stand behind file data, or a busy node would lose its lease. The queues are not
//! bounded here: their users are (dirty limits, FUSE threads), and refusing a journal write would kill the node.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, unbounded};

use crate::buf::{AlignedBuf, IoSlice};
use crate::completion::{Completer, completion};
use crate::device::{Device, Durability, IoFuture, Request, SubmitGuard, check_read, check_write, ready};
use crate::ids::{BLOCK_SIZE, BlockAddr};
use crate::medium::{Medium, is_local_filesystem};
use crate::sys::{self, Lock};

/// The smallest device that can be opened: a label and a quorum region.
pub const MIN_DEVICE_BYTES: u64 = 8 << 20;

/// Threads for requests of the quorum region.
const URGENT_THREADS: usize = 2;

/// How often the probe of [`FileDevice::probe_stable_writes`] tries each way.
const PROBE_ROUNDS: usize = 8;

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each message is the documentation")]
pub enum OpenError {
    #[error("{path}: no such file or device")]
    NotFound { path: PathBuf },
    #[error("{path}: neither a block device nor a regular file")]
    NotADevice { path: PathBuf },
    #[error("{path}: {bytes} bytes are too small; at least {MIN_DEVICE_BYTES} are needed")]
    TooSmall { path: PathBuf, bytes: u64 },
    #[error("{path}: permission denied; run as root, or give this user access to the device")]
    Permission { path: PathBuf },
    #[error("{path}: in use (mounted, or part of LVM, RAID or swap)")]
    InUse { path: PathBuf },
    #[error("{path}: the device is read-only")]
    ReadOnly { path: PathBuf },
    #[error("{path}: the device refuses direct I/O (O_DIRECT)")]
    DirectRefused { path: PathBuf },
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
}

impl OpenError {
    fn from_io(path: &Path, error: io::Error) -> OpenError {
        let path = path.to_owned();
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR | libc::ENXIO | libc::ENODEV) => OpenError::NotFound { path },
            Some(libc::EACCES | libc::EPERM) => OpenError::Permission { path },
            Some(libc::EBUSY) => OpenError::InUse { path },
            Some(libc::EROFS) => OpenError::ReadOnly { path },
            Some(libc::EISDIR) => OpenError::NotADevice { path },
            _ => OpenError::Io { path, error },
        }
    }
}

/// How to open a device.
#[derive(Clone, Copy, Debug)]
pub struct OpenAs {
    /// Open for writing too.
    pub write: bool,
    /// Refuse a block device that the kernel itself uses (mounted, LVM, RAID, swap).
    pub exclusive: bool,
    /// I/O threads for requests outside the quorum region.
    pub threads: usize,
}

impl Default for OpenAs {
    fn default() -> OpenAs {
        OpenAs { write: true, exclusive: false, threads: 16 }
    }
}

/// The file behind a descriptor, as this kernel knows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FileIdentity {
    /// Device number of the file system that holds the file or device node.
    pub dev: u64,
    /// Its inode number there.
    pub ino: u64,
}

enum Work {
    Read { at: BlockAddr, blocks: usize, done: Completer<AlignedBuf> },
    Write { at: BlockAddr, data: Vec<IoSlice>, durability: Durability, done: Completer<()> },
    Flush { done: Completer<()> },
}

struct Job {
    guard: Option<Arc<dyn SubmitGuard>>,
    work: Work,
}

struct Opened {
    file: File,
    path: PathBuf,
    blocks: u64,
    identity: FileIdentity,
    medium: Medium,
    direct: bool,
    dsync: AtomicBool,
    urgent_below: AtomicU64,
}

/// The device. Cloning gives another handle to the same descriptor and threads.
#[derive(Clone)]
pub struct FileDevice {
    opened: Arc<Opened>,
    normal: Sender<Job>,
    urgent: Sender<Job>,
    guard: Option<Arc<dyn SubmitGuard>>,
}

impl FileDevice {
    /// Opens a device or image.
    pub fn open(path: impl AsRef<Path>, how: OpenAs) -> Result<FileDevice, OpenError> {
        let path = path.as_ref();
        let opened = Arc::new(Opened::new(path, how)?);
        let (normal, jobs) = unbounded();
        let (urgent, urgent_jobs) = unbounded();
        let start = |name: &str, jobs: &Receiver<Job>| {
            let (opened, jobs) = (Arc::clone(&opened), jobs.clone());
            thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || jobs.iter().for_each(|job| opened.carry_out(job)))
                .map(drop)
                .map_err(|error| OpenError::Io { path: path.to_owned(), error })
        };
        for _ in 0..how.threads.max(1) {
            start("io", &jobs)?;
        }
        for _ in 0..URGENT_THREADS {
            start("io-quorum", &urgent_jobs)?;
        }
        Ok(FileDevice { opened, normal, urgent, guard: None })
    }

    /// Makes a sparse image of `bytes`, which must not exist yet, and opens it.
    pub fn create(path: impl AsRef<Path>, bytes: u64, how: OpenAs) -> Result<FileDevice, OpenError> {
        let path = path.as_ref();
        if bytes < MIN_DEVICE_BYTES {
            return Err(OpenError::TooSmall { path: path.to_owned(), bytes });
        }
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        made.and_then(|file| file.set_len(bytes)).map_err(|error| OpenError::from_io(path, error))?;
        FileDevice::open(path, how)
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        &self.opened.path
    }

    /// Device and inode number of the opened file.
    pub fn identity(&self) -> FileIdentity {
        self.opened.identity
    }

    /// What kind of thing it is.
    pub fn medium(&self) -> &Medium {
        &self.opened.medium
    }

    /// Whether I/O goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.opened.direct
    }

    /// Requests that lie wholly below `block` go to the queue of their own.
    pub fn set_urgent_below(&self, block: BlockAddr) {
        self.opened.urgent_below.store(block.0, Ordering::Relaxed);
    }

    /// Measures which way of making one block stable is cheaper (RWF_DSYNC, or a write and fdatasync) and uses it
    /// from then on. Writes zeros to `scratch`, a block that belongs to this node. Blocks the calling thread.
    pub fn probe_stable_writes(&self, scratch: BlockAddr) -> io::Result<StableBy> {
        let data = vec![IoSlice::from(AlignedBuf::zeroed(BLOCK_SIZE))];
        check_write(self.opened.blocks, scratch, &data)?;
        let measure = |dsync| {
            let mut best = None;
            for _ in 0..PROBE_ROUNDS {
                let start = Instant::now();
                self.opened.write_stable(scratch, &data, dsync)?;
                best =
                    Some(best.map_or(start.elapsed(), |best: std::time::Duration| best.min(start.elapsed())));
            }
            Ok::<_, io::Error>(best)
        };
        let flushed = measure(false)?;
        // A kernel or file system without RWF_DSYNC refuses it; then the other way stays.
        let dsync = measure(true).is_ok_and(|dsync| dsync < flushed);
        self.opened.dsync.store(dsync, Ordering::Relaxed);
        Ok(if dsync { StableBy::Dsync } else { StableBy::Flush })
    }

    /// Takes the lock on the first byte of `block`, without waiting. True if this descriptor has it now.
    pub fn try_lock(&self, block: BlockAddr) -> io::Result<bool> {
        Ok(sys::try_lock_byte(&self.opened.file, lock_byte(block)?)? == Lock::Taken)
    }

    /// Gives the lock on the first byte of `block` back.
    pub fn unlock(&self, block: BlockAddr) -> io::Result<()> {
        sys::unlock_byte(&self.opened.file, lock_byte(block)?)
    }

    fn submit<T: Send + 'static>(
        &self,
        urgent: bool,
        work: impl FnOnce(Completer<T>) -> Work,
    ) -> IoFuture<T> {
        let (done, wait) = completion();
        let job = Job { guard: self.guard.clone(), work: work(done) };
        let queue = if urgent { &self.urgent } else { &self.normal };
        // Cannot fail while the threads live; if it does, the dropped completer completes with an error.
        let _ = queue.send(job);
        Box::pin(wait)
    }

    fn is_urgent(&self, at: BlockAddr, blocks: usize) -> bool {
        at.0 + blocks as u64 <= self.opened.urgent_below.load(Ordering::Relaxed)
    }
}

/// How stable writes are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StableBy {
    /// One write with RWF_DSYNC.
    Dsync,
    /// A write, then fdatasync.
    Flush,
}

fn lock_byte(block: BlockAddr) -> io::Result<u64> {
    block.byte_offset().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

impl Opened {
    fn new(path: &Path, how: OpenAs) -> Result<Opened, OpenError> {
        let failed = |error| OpenError::from_io(path, error);
        // Looked at before it is opened: opening a pipe would wait, opening a tape would rewind it.
        let kind = fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::NotADevice { path: path.to_owned() });
        }
        let exclusive = if how.exclusive && kind.is_block_device() { libc::O_EXCL } else { 0 };
        let open =
            |flags| OpenOptions::new().read(true).write(how.write).custom_flags(flags | exclusive).open(path);
        let (file, direct) = match open(libc::O_DIRECT) {
            Ok(file) => (file, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && kind.is_file() => {
                (open(0).map_err(failed)?, false)
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(OpenError::DirectRefused { path: path.to_owned() });
            }
            Err(error) => return Err(failed(error)),
        };
        let meta = file.metadata().map_err(failed)?;
        let (bytes, medium) = if meta.file_type().is_block_device() {
            (sys::block_device_bytes(&file).map_err(failed)?, block_medium(meta.rdev()))
        } else if meta.file_type().is_file() {
            let local = is_local_filesystem(sys::filesystem_magic(&file).map_err(failed)?);
            (meta.len(), if local { Medium::LocalImage } else { Medium::SharedImage })
        } else {
            return Err(OpenError::NotADevice { path: path.to_owned() });
        };
        if bytes < MIN_DEVICE_BYTES {
            return Err(OpenError::TooSmall { path: path.to_owned(), bytes });
        }
        Ok(Opened {
            file,
            path: path.to_owned(),
            blocks: bytes / BLOCK_SIZE as u64,
            identity: FileIdentity { dev: meta.dev(), ino: meta.ino() },
            medium,
            direct,
            dsync: AtomicBool::new(false),
            urgent_below: AtomicU64::new(0),
        })
    }

    fn carry_out(&self, job: Job) {
        let guard = job.guard.as_deref();
        match job.work {
            Work::Read { at, blocks, done } => {
                done.complete(guard_io(guard, Request::Read(at, blocks), || self.read(at, blocks)));
            }
            Work::Write { at, data, durability, done } => {
                let blocks = data.iter().map(|piece| piece.len).sum::<usize>() / BLOCK_SIZE;
                let write = || match durability {
                    Durability::Cached => self.write(at, &data, false),
                    Durability::Stable => self.write_stable(at, &data, self.dsync.load(Ordering::Relaxed)),
                };
                done.complete(guard_io(guard, Request::Write(at, blocks, durability), write));
            }
            Work::Flush { done } => {
                done.complete(guard_io(guard, Request::Flush, || self.file.sync_data()));
            }
        }
    }

    fn read(&self, at: BlockAddr, blocks: usize) -> io::Result<AlignedBuf> {
        let mut buf = AlignedBuf::zeroed_blocks(blocks);
        let start = lock_byte(at)?;
        let mut done = 0;
        while done < buf.len() {
            match sys::pread(&self.file, &mut buf[done..], start + done as u64) {
                // The image is shorter than it was when it was opened.
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(buf)
    }

    fn write_stable(&self, at: BlockAddr, data: &[IoSlice], dsync: bool) -> io::Result<()> {
        self.write(at, data, dsync)?;
        if dsync { Ok(()) } else { self.file.sync_data() }
    }

    fn write(&self, at: BlockAddr, data: &[IoSlice], dsync: bool) -> io::Result<()> {
        let aligned = data
            .iter()
            .all(|piece| piece.offset.is_multiple_of(BLOCK_SIZE) && piece.len.is_multiple_of(BLOCK_SIZE));
        if !aligned {
            // A device of 4 KiB sectors takes no pieces of 512 bytes.
            let bytes: Vec<u8> = data.iter().flat_map(IoSlice::bytes).copied().collect();
            return self.write(at, &[AlignedBuf::copy_of(&bytes).into()], dsync);
        }
        let mut pieces: Vec<io::IoSlice<'_>> =
            data.iter().map(|piece| io::IoSlice::new(piece.bytes())).collect();
        let mut left = &mut pieces[..];
        let mut offset = lock_byte(at)?;
        while !left.is_empty() {
            match sys::pwritev(&self.file, left, offset, dsync) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                Ok(bytes) => {
                    offset += bytes as u64;
                    io::IoSlice::advance_slices(&mut left, bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Does `work` if the guard admits it, and tells the guard when it is over.
fn guard_io<T>(
    guard: Option<&dyn SubmitGuard>,
    request: Request,
    work: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let Some(guard) = guard else { return work() };
    guard.admit(request)?;
    let result = work();
    guard.finished();
    result
}

/// A loop device is as local as its backing file.
fn block_medium(rdev: u64) -> Medium {
    let (major, minor) = (libc::major(rdev), libc::minor(rdev));
    let backing = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/loop/backing_file"));
    let local = backing.and_then(|path| File::open(path.trim_end_matches('\n'))).and_then(|file| {
        let is_file = file.metadata()?.is_file();
        Ok(is_file && is_local_filesystem(sys::filesystem_magic(&file)?))
    });
    if local.unwrap_or(false) { Medium::LocalLoop } else { Medium::Block { major, minor } }
}

impl AsFd for FileDevice {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.opened.file.as_fd()
    }
}

impl std::fmt::Debug for FileDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileDevice({}, {} blocks)", self.opened.path.display(), self.opened.blocks)
    }
}

impl Device for FileDevice {
    fn blocks(&self) -> u64 {
        self.opened.blocks
    }

    fn read(&self, at: BlockAddr, blocks: usize) -> IoFuture<AlignedBuf> {
        match check_read(self.opened.blocks, at, blocks) {
            Ok(()) => self.submit(self.is_urgent(at, blocks), |done| Work::Read { at, blocks, done }),
            Err(error) => ready(Err(error)),
        }
    }

    fn write(&self, at: BlockAddr, data: Vec<IoSlice>, durability: Durability) -> IoFuture<()> {
        match check_write(self.opened.blocks, at, &data) {
            Ok(blocks) => {
                self.submit(self.is_urgent(at, blocks), |done| Work::Write { at, data, durability, done })
            }
            Err(error) => ready(Err(error)),
        }
    }

    fn flush(&self) -> IoFuture<()> {
        self.submit(false, |done| Work::Flush { done })
    }

    fn guarded(&self, guard: &Arc<dyn SubmitGuard>) -> Option<Arc<dyn Device>> {
        Some(Arc::new(FileDevice { guard: Some(Arc::clone(guard)), ..self.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::block_on;

    fn image(dir: &Path) -> FileDevice {
        FileDevice::create(dir.join("image"), MIN_DEVICE_BYTES, OpenAs::default()).unwrap()
    }

    fn filled(byte: u8, blocks: usize) -> AlignedBuf {
        AlignedBuf::copy_of(&vec![byte; blocks * BLOCK_SIZE])
    }

    #[test]
    fn what_is_written_is_read_back() {
        for dir in [tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap()] {
            let device = image(dir.path());
            for durability in [Durability::Cached, Durability::Stable] {
                let pieces = vec![filled(1, 2).into(), filled(2, 1).into()];
                block_on(device.write(BlockAddr(5), pieces, durability)).unwrap();
            }
            block_on(device.flush()).unwrap();
            let back = block_on(device.read(BlockAddr(5), 3)).unwrap();
            assert_eq!((back[0], back[2 * BLOCK_SIZE], back[3 * BLOCK_SIZE - 1]), (1, 2, 2));
        }
    }

    #[test]
    fn more_pieces_than_one_system_call_takes_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let device = image(dir.path());
        let one = Arc::new(filled(7, 1));
        let pieces = vec![IoSlice::whole(one); 1500];
        block_on(device.write(BlockAddr(100), pieces, Durability::Cached)).unwrap();
        assert!(block_on(device.read(BlockAddr(100), 1500)).unwrap().iter().all(|&byte| byte == 7));
    }

    #[test]
    fn pieces_of_512_bytes_are_joined() {
        let dir = tempfile::tempdir().unwrap();
        let device = image(dir.path());
        let piece = IoSlice { buf: Arc::new(filled(3, 1)), offset: 512, len: 512 };
        block_on(device.write(BlockAddr(1), vec![piece; 8], Durability::Stable)).unwrap();
        assert_eq!(block_on(device.read(BlockAddr(1), 1)).unwrap(), filled(3, 1));
    }

    #[test]
    fn the_probe_keeps_stable_writes_correct_whichever_way_it_finds() {
        let dir = tempfile::tempdir().unwrap();
        let device = image(dir.path());
        device.probe_stable_writes(BlockAddr(9)).unwrap();
        block_on(device.write(BlockAddr(1), vec![filled(4, 1).into()], Durability::Stable)).unwrap();
        assert_eq!(block_on(device.read(BlockAddr(1), 1)).unwrap(), filled(4, 1));
    }

    #[test]
    fn an_image_that_was_cut_off_gives_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let device = image(dir.path());
        OpenOptions::new().write(true).open(device.path()).unwrap().set_len(4096).unwrap();
        let error = block_on(device.read(BlockAddr(5), 1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_cannot_be_a_device_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| FileDevice::open(path, OpenAs::default()).unwrap_err();
        assert!(matches!(open(&dir.path().join("nothing")), OpenError::NotFound { .. }));
        assert!(matches!(open(dir.path()), OpenError::NotADevice { .. }));
        assert!(matches!(open(Path::new("/dev/null")), OpenError::NotADevice { .. }));
        let small = dir.path().join("small");
        fs::write(&small, [0; 4096]).unwrap();
        assert!(matches!(open(&small), OpenError::TooSmall { bytes: 4096, .. }));
    }

    #[test]
    fn the_lock_of_a_block_excludes_another_descriptor_of_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let one = image(dir.path());
        let two = FileDevice::open(one.path(), OpenAs::default()).unwrap();
        assert_eq!(one.identity(), two.identity());
        assert!(one.try_lock(BlockAddr(16)).unwrap());
        assert!(!two.try_lock(BlockAddr(16)).unwrap());
        assert!(two.try_lock(BlockAddr(17)).unwrap());
        one.unlock(BlockAddr(16)).unwrap();
        assert!(two.try_lock(BlockAddr(16)).unwrap());
    }

    #[test]
    fn the_guard_is_asked_when_the_request_is_submitted() {
        struct Refuse;
        impl SubmitGuard for Refuse {
            fn admit(&self, _: Request) -> io::Result<()> {
                Err(io::Error::other("refused"))
            }

            fn finished(&self) {
                unreachable!("nothing was admitted")
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let device = image(dir.path());
        let guard: Arc<dyn SubmitGuard> = Arc::new(Refuse);
        let guarded = device.guarded(&guard).unwrap();
        assert!(block_on(guarded.read(BlockAddr(0), 1)).is_err());
        assert!(
            block_on(guarded.write(BlockAddr(0), vec![filled(1, 1).into()], Durability::Cached)).is_err()
        );
        assert_eq!(block_on(device.read(BlockAddr(0), 1)).unwrap()[0], 0);
    }

    /// A loop device; `None` where this user or machine cannot make one.
    struct LoopDevice(PathBuf);

    impl LoopDevice {
        fn over(image: &Path) -> Option<LoopDevice> {
            let made =
                std::process::Command::new("losetup").args(["-f", "--show"]).arg(image).output().ok()?;
            let path = String::from_utf8(made.stdout).ok()?;
            made.status.success().then(|| LoopDevice(path.trim().into()))
        }
    }

    impl Drop for LoopDevice {
        fn drop(&mut self) {
            let _ = std::process::Command::new("losetup").arg("-d").arg(&self.0).status();
        }
    }

    #[test]
    fn a_loop_device_over_a_local_image_has_its_size_and_no_late_writes() {
        let dir = tempfile::tempdir().unwrap();
        let file = image(dir.path());
        let Some(path) = LoopDevice::over(file.path()) else { return };
        let device = FileDevice::open(&path.0, OpenAs { exclusive: true, ..OpenAs::default() }).unwrap();
        assert_eq!((device.blocks(), device.medium(), device.is_direct()), (2048, &Medium::LocalLoop, true));
        device.probe_stable_writes(BlockAddr(9)).unwrap();
        block_on(device.write(BlockAddr(2047), vec![filled(5, 1).into()], Durability::Stable)).unwrap();
        assert_eq!(block_on(device.read(BlockAddr(2047), 1)).unwrap(), filled(5, 1));
        // Another loop device over the same image does not see this one's locks: they replace no wait.
        assert!(!device.medium().lock_excludes_all());
        let again = OpenAs { exclusive: true, ..OpenAs::default() };
        assert!(matches!(FileDevice::open(&path.0, again), Err(OpenError::InUse { .. })));
    }
}
