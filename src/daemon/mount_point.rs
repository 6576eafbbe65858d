//! What the kernel knows of a mount: finding it, unmounting, detaching, aborting its FUSE connection.
//!
//! Nothing here touches a file of the mount itself: a daemon that asks its own mount hangs itself, and a dead
//! mount answers ENOTCONN. All knowledge comes from `/proc/self/mountinfo`.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Filesystem types that a mount of ours may have in the mount table.
const FS_TYPES: [&str; 2] = ["fuse", "fuse.matrix"];

const FUSE_CONTROL: &str = "/sys/fs/fuse/connections";

/// One FUSE mount in this process's mount table; the registry tells which are ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountPoint {
    pub(crate) dir: PathBuf,
    /// Minor device number: the FUSE connection's number under /sys/fs/fuse/connections
    pub(crate) connection: u32,
    /// Device or image, as `df` shows it
    pub(crate) source: String,
}

/// All FUSE mounts, in the order they were made.
fn all() -> io::Result<Vec<MountPoint>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?))
}

/// The mount at exactly `dir` (the topmost, if several are stacked).
pub(crate) fn find(dir: &Path) -> io::Result<Option<MountPoint>> {
    Ok(all()?.into_iter().rfind(|m| m.dir == dir))
}

/// `dir` as the mount table names it, without touching `dir` itself: its parent resolved, its name kept.
pub(crate) fn absolute(dir: &Path) -> io::Result<PathBuf> {
    let dir = std::path::absolute(dir)?;
    if all()?.iter().any(|m| m.dir == dir) {
        return Ok(dir);
    }
    match (dir.parent(), dir.file_name()) {
        (Some(parent), Some(name)) => {
            let named = fs::canonicalize(parent)?.join(name);
            let is_link = !all()?.iter().any(|m| m.dir == named)
                && fs::symlink_metadata(&named).is_ok_and(|m| m.file_type().is_symlink());
            if is_link { fs::canonicalize(&named) } else { Ok(named) }
        }
        _ => Ok(dir),
    }
}

/// Takes `dir` out of the tree at once, whoever uses it.
pub(crate) fn detach(dir: &Path) -> io::Result<()> {
    umount2(dir, libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW)
}

/// Ends a FUSE connection: every request waiting or new fails with ENOTCONN; the mount stays, dead.
pub(crate) fn abort(connection: u32) -> io::Result<()> {
    if !Path::new(FUSE_CONTROL).join(connection.to_string()).exists() {
        mount_fuse_control()?;
    }
    fs::write(Path::new(FUSE_CONTROL).join(connection.to_string()).join("abort"), b"1")
}

/// Processes that have a file, directory, root or mapping below `dir`, as `name (pid)`; a few suffice to tell a person
/// what keeps a mount busy.
pub(crate) fn users(dir: &Path) -> Vec<String> {
    const ENOUGH: usize = 5;
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered = processes.filter(|p| p.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()));
    numbered
        .filter(|process| uses(&process.path(), dir))
        .take(ENOUGH)
        .map(|process| {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            format!("{} ({})", name.trim(), process.file_name().to_string_lossy())
        })
        .collect()
}

/// Whether `process`, a directory of /proc, uses something below `dir`. Reading these links asks no filesystem.
fn uses(process: &Path, dir: &Path) -> bool {
    let below = |link: PathBuf| fs::read_link(link).is_ok_and(|target| target.starts_with(dir));
    let open = |name: &str| {
        fs::read_dir(process.join(name)).into_iter().flatten().flatten().any(|e| below(e.path()))
    };
    below(process.join("cwd")) || below(process.join("root")) || open("fd") || open("map_files")
}

fn mount_fuse_control() -> io::Result<()> {
    let (kind, dir) = (c"fusectl", CString::new(FUSE_CONTROL)?);
    // SAFETY: all three strings are zero-terminated and live over the call; fusectl takes no data.
    let done = unsafe { libc::mount(kind.as_ptr(), dir.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn umount2(dir: &Path, flags: i32) -> io::Result<()> {
    let path = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: `path` is zero-terminated and lives over the call.
    if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `ID PARENT MAJOR:MINOR ROOT DIR OPTIONS [TAGS..] - TYPE SOURCE SUPER` (proc(5)); other lines are not ours.
fn parse(table: &[u8]) -> Vec<MountPoint> {
    table.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountPoint> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().position(|f| f == b"-")?;
    let kind = *fields.get(dash + 1)?;
    if !FS_TYPES.iter().any(|known| known.as_bytes() == kind) {
        return None;
    }
    let (_, minor) = std::str::from_utf8(fields.get(2)?).ok()?.split_once(':')?;
    Some(MountPoint {
        dir: PathBuf::from(std::ffi::OsString::from_vec(unescape(fields.get(4)?))),
        connection: minor.parse().ok()?,
        source: String::from_utf8_lossy(&unescape(fields.get(dash + 2)?)).into_owned(),
    })
}

/// Undoes the table's `\040` for space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = (*first == b'\\' && tail.len() >= 3)
            .then(|| {
                tail[..3]
                    .iter()
                    .try_fold(0u32, |n, d| matches!(d, b'0'..=b'7').then(|| n * 8 + u32::from(d - b'0')))
            })
            .flatten()
            .and_then(|n| u8::try_from(n).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuse_mounts_are_found_in_the_table() {
        let table = b"22 1 0:20 / /proc rw shared:5 - proc proc rw\n\
            61 29 0:57 / /mnt/a\\040b rw,relatime shared:9 - fuse.matrix /img\\011x rw,user_id=0\n";
        let found = parse(table);
        assert_eq!(found, [MountPoint { dir: "/mnt/a b".into(), connection: 57, source: "/img\tx".into() }]);
    }

    #[test]
    fn odd_lines_are_passed_over() {
        assert!(
            parse(b"\n- \n1 2 3\n1 2 x:y / /m rw - fuse.matrix\n1 2 0:x / /m rw - fuse.matrix s o\n")
                .is_empty()
        );
    }
}
