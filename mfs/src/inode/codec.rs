//! From the dinode's block to [`Dinode`] and back.

use storage_control::{BLOCK_SIZE, BlockAddr, WallTime};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{Content, Dinode, FileType, XattrPlace};
use crate::error::FsError;
use crate::extent;
use crate::format::dinode::{
    AREA_AT, AREA_SIZE, ContentFormat, FIXED_AT, RawDinode, XATTR_INLINE_MAX, flags,
};
use crate::format::header::Header;
use crate::index::Root;

/// More blocks than addresses have.
const COUNT_MAX: u64 = 1 << 48;
const NANOS_PER_SEC: u32 = 1_000_000_000;

/// A dinode that breaks the format.
fn bad(ino: u64, why: &'static str) -> FsError {
    FsError::corrupt("dinode", BlockAddr(ino), why)
}

pub(super) fn decode(ino: u64, block: &[u8]) -> Result<Dinode, FsError> {
    if block.len() != BLOCK_SIZE {
        return Err(bad(ino, "it is not one block"));
    }
    let raw =
        RawDinode::read_from_bytes(&block[FIXED_AT..AREA_AT]).expect("the fixed fields have their size");
    let mode = raw.mode.get();
    let kind = (mode >> 16 == 0).then(|| FileType::from_raw((mode >> 12) as u8)).flatten();
    let Some(kind) = kind else { return Err(bad(ino, "its mode is of no file type")) };

    let reserved = raw.reserved_a.get() != 0
        || raw.checksum_root.get() != 0
        || raw.encryption_root.get() != 0
        || raw.reserved_b != [0; 40];
    if reserved {
        return Err(bad(ino, "reserved bytes are not zero"));
    }
    if raw.flags.get() & !flags::KNOWN != 0 {
        return Err(bad(ino, "it has flags that this version does not know"));
    }
    if raw.size.get() > i64::MAX as u64 {
        return Err(bad(ino, "its size is beyond every file"));
    }

    if raw.blocks.get() > COUNT_MAX || raw.entries.get() > COUNT_MAX {
        return Err(bad(ino, "it counts more blocks or entries than a device can hold"));
    }

    let content_len = usize::from(raw.content_len.get());
    let xattr_len = usize::from(raw.xattr_len.get());
    if xattr_len > XATTR_INLINE_MAX || content_len + xattr_len > AREA_SIZE {
        return Err(bad(ino, "content and extended attributes do not fit its area"));
    }
    let area = &block[AREA_AT..];
    let content = decode_content(ino, kind, &raw, &area[..content_len])?;
    if area[content_len..AREA_SIZE - xattr_len].iter().any(|&byte| byte != 0) {
        return Err(bad(ino, "bytes between content and extended attributes are not zero"));
    }
    let xattr_root = raw.xattr_root.get();
    Ok(Dinode {
        ino,
        generation: raw.generation.get(),
        kind,
        perm: mode & 0o7777,
        uid: raw.uid.get(),
        gid: raw.gid.get(),
        nlink: raw.nlink.get(),
        size: raw.size.get(),
        blocks: raw.blocks.get(),
        flags: raw.flags.get(),
        project: raw.project.get(),
        rdev: raw.rdev.get(),
        parent: raw.parent.get(),
        atime: time(ino, raw.atime.get(), raw.atime_ns.get())?,
        mtime: time(ino, raw.mtime.get(), raw.mtime_ns.get())?,
        ctime: time(ino, raw.ctime.get(), raw.ctime_ns.get())?,
        btime: time(ino, raw.btime.get(), raw.btime_ns.get())?,
        entries: raw.entries.get(),
        content,
        xattrs: XattrPlace {
            inline: area[AREA_SIZE - xattr_len..].to_vec(),
            root: (xattr_root != 0).then_some(BlockAddr(xattr_root)),
        },
    })
}

fn time(ino: u64, secs: i64, nanos: u32) -> Result<WallTime, FsError> {
    if nanos >= NANOS_PER_SEC {
        return Err(bad(ino, "a time has a second or more of nanoseconds"));
    }
    Ok(WallTime { secs, nanos })
}

fn decode_content(ino: u64, kind: FileType, raw: &RawDinode, bytes: &[u8]) -> Result<Content, FsError> {
    use ContentFormat as F;
    let format = F::from_raw(raw.format).ok_or_else(|| bad(ino, "its content has an unknown format"))?;
    let fits = match kind {
        FileType::Directory => matches!(format, F::Dirents | F::DirentTree),
        FileType::Regular | FileType::Symlink => matches!(format, F::Data | F::Extents | F::ExtentTree),
        FileType::Fifo | FileType::CharDevice | FileType::BlockDevice | FileType::Socket => format == F::None,
    };
    if !fits {
        return Err(bad(ino, "its content does not go with its file type"));
    }
    if raw.depth != 0 && !matches!(format, F::ExtentTree | F::DirentTree) {
        return Err(bad(ino, "it has a depth without a tree"));
    }
    let size = raw.size.get();
    match format {
        F::None if !bytes.is_empty() => Err(bad(ino, "a device or pipe has content")),
        F::None => Ok(Content::None),
        F::Data if bytes.len() as u64 != size => Err(bad(ino, "its size is not that of its inline data")),
        F::Data => Ok(Content::Data(bytes.to_vec())),
        F::Dirents if bytes.len() as u64 != size => Err(bad(ino, "its size is not that of its entries")),
        F::Dirents => Ok(Content::Dirents(bytes.to_vec())),
        F::Extents => Ok(Content::Extents(extent::decode_list(BlockAddr(ino), bytes)?)),
        F::ExtentTree => Ok(Content::ExtentTree(Root::decode(BlockAddr(ino), raw.depth, bytes)?)),
        F::DirentTree => Ok(Content::DirentTree(Root::decode(BlockAddr(ino), raw.depth, bytes)?)),
    }
}

pub(super) fn encode(dinode: &Dinode, block: &mut [u8; BLOCK_SIZE]) {
    let (format, depth, content) = match &dinode.content {
        Content::None => (ContentFormat::None, 0, Vec::new()),
        Content::Data(bytes) => (ContentFormat::Data, 0, bytes.clone()),
        Content::Dirents(bytes) => (ContentFormat::Dirents, 0, bytes.clone()),
        Content::Extents(list) => (ContentFormat::Extents, 0, extent::encode_list(list)),
        Content::ExtentTree(root) => (ContentFormat::ExtentTree, root.depth, root.encode()),
        Content::DirentTree(root) => (ContentFormat::DirentTree, root.depth, root.encode()),
    };
    let xattrs = &dinode.xattrs.inline;
    assert!(
        xattrs.len() <= XATTR_INLINE_MAX && content.len() + xattrs.len() <= AREA_SIZE,
        "content and attributes fit the dinode"
    );
    if let Content::Data(bytes) | Content::Dirents(bytes) = &dinode.content {
        assert_eq!(bytes.len() as u64, dinode.size, "inline content is as long as the size");
    }
    let mut raw = RawDinode::new_zeroed();
    raw.mode = dinode.mode().into();
    raw.uid = dinode.uid.into();
    raw.gid = dinode.gid.into();
    raw.nlink = dinode.nlink.into();
    raw.size = dinode.size.into();
    raw.blocks = dinode.blocks.into();
    raw.generation = dinode.generation.into();
    raw.flags = dinode.flags.into();
    raw.project = dinode.project.into();
    raw.rdev = dinode.rdev.into();
    raw.parent = dinode.parent.into();
    raw.atime = dinode.atime.secs.into();
    raw.mtime = dinode.mtime.secs.into();
    raw.ctime = dinode.ctime.secs.into();
    raw.btime = dinode.btime.secs.into();
    raw.atime_ns = dinode.atime.nanos.into();
    raw.mtime_ns = dinode.mtime.nanos.into();
    raw.ctime_ns = dinode.ctime.nanos.into();
    raw.btime_ns = dinode.btime.nanos.into();
    raw.format = format as u8;
    raw.depth = depth;
    raw.content_len = (content.len() as u16).into();
    raw.xattr_len = (xattrs.len() as u16).into();
    raw.xattr_root = dinode.xattrs.root.map_or(0, |addr| addr.0).into();
    raw.entries = dinode.entries.into();

    Header::of_mut(block).owner_generation = (dinode.generation as u32).into();
    block[FIXED_AT..AREA_AT].copy_from_slice(raw.as_bytes());
    let area = &mut block[AREA_AT..];
    area.fill(0);
    area[..content.len()].copy_from_slice(&content);
    area[AREA_SIZE - xattrs.len()..].copy_from_slice(xattrs);
}
