use proptest::prelude::*;
use storage_control::BLOCK_SIZE;

use super::*;
use crate::format::dinode::{AREA_AT, ContentFormat, RawDinode, XATTR_INLINE_MAX};
use crate::index::IndexEntry;

fn time(secs: i64) -> WallTime {
    WallTime { secs, nanos: 999_999_999 }
}

fn sample(kind: FileType) -> Dinode {
    let mut dinode = Dinode::new(4711, 0x0102_0304_0506_0708, kind, 0o4755, time(-1));
    dinode.uid = 1000;
    dinode.gid = 1001;
    dinode.project = 7;
    dinode.rdev = 0x0801;
    dinode.parent = 99;
    dinode.ctime = time(1 << 40);
    dinode.blocks = 5;
    dinode.set(flags::APPEND | flags::ORPHAN, true);
    dinode
}

fn encoded(dinode: &Dinode) -> [u8; BLOCK_SIZE] {
    let mut block = [0xff; BLOCK_SIZE];
    dinode.encode(&mut block);
    block
}

fn with_content(kind: FileType, content: Content) -> Dinode {
    let mut dinode = sample(kind);
    if let Content::Data(bytes) | Content::Dirents(bytes) = &content {
        dinode.size = bytes.len() as u64;
    }
    dinode.content = content;
    dinode.xattrs = XattrPlace { inline: vec![3; 77], root: Some(BlockAddr(12)) };
    dinode
}

fn samples() -> Vec<Dinode> {
    let entries =
        vec![IndexEntry { key: 0, child: BlockAddr(70) }, IndexEntry { key: 500, child: BlockAddr(71) }];
    let root = Root { depth: 3, entries };
    vec![
        with_content(FileType::Regular, Content::Data(b"hello".to_vec())),
        with_content(FileType::Symlink, Content::Data(b"../target".to_vec())),
        with_content(FileType::Regular, Content::Extents(vec![Extent::new(3, BlockAddr(1 << 40), 9)])),
        with_content(FileType::Regular, Content::ExtentTree(root.clone())),
        with_content(FileType::Directory, Content::Dirents(vec![1; 300])),
        with_content(FileType::Directory, Content::DirentTree(root)),
        with_content(FileType::Socket, Content::None),
    ]
}

#[test]
fn a_dinode_of_every_shape_reads_back() {
    for dinode in samples() {
        assert_eq!(Dinode::decode(dinode.ino, &encoded(&dinode)).unwrap(), dinode);
    }
}

#[test]
fn golden_bytes_of_a_dinode() {
    let block = encoded(&with_content(FileType::Regular, Content::Data(b"hello".to_vec())));
    assert_eq!(block[64..68], 0o104_755_u32.to_le_bytes());
    assert_eq!(block[80..88], 5_u64.to_le_bytes());
    assert_eq!(block[96..104], [8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(block[104..108], [10, 0, 0, 0]);
    assert_eq!(block[128..136], (-1_i64).to_le_bytes());
    assert_eq!(block[176..184], [ContentFormat::Data as u8, 0, 5, 0, 77, 0, 0, 0]);
    assert_eq!(block[AREA_AT..AREA_AT + 6], *b"hello\0");
    assert_eq!(block[BLOCK_SIZE - 77..], [3; 77]);
}

#[test]
fn a_dinode_that_breaks_a_rule_is_refused() {
    let good = encoded(&samples()[0]);
    let at = |field: usize| 64 + field;
    let cases: &[(&str, usize, u8)] = &[
        ("file type", at(std::mem::offset_of!(RawDinode, mode)) + 1, 0x30),
        ("directory with data", at(std::mem::offset_of!(RawDinode, mode)) + 1, 0x40),
        ("bits above st_mode", at(std::mem::offset_of!(RawDinode, mode)) + 2, 1),
        ("size of inline data", at(std::mem::offset_of!(RawDinode, size)), 6),
        ("negative size", at(std::mem::offset_of!(RawDinode, size)) + 7, 0x80),
        ("count of blocks", at(std::mem::offset_of!(RawDinode, blocks)) + 6, 2),
        ("count of entries", at(std::mem::offset_of!(RawDinode, entries)) + 7, 1),
        ("unknown flag", at(std::mem::offset_of!(RawDinode, flags)) + 3, 1),
        ("nanoseconds", at(std::mem::offset_of!(RawDinode, btime_ns)) + 3, 0xff),
        ("content format", at(std::mem::offset_of!(RawDinode, format)), 6),
        ("depth without tree", at(std::mem::offset_of!(RawDinode, depth)), 1),
        ("content past the area", at(std::mem::offset_of!(RawDinode, content_len)) + 1, 0xff),
        ("attributes past their part", at(std::mem::offset_of!(RawDinode, xattr_len)) + 1, 5),
        ("reserved", at(std::mem::offset_of!(RawDinode, reserved_b)) + 39, 1),
        ("checksum root", at(std::mem::offset_of!(RawDinode, checksum_root)), 1),
        ("rest of the area", AREA_AT + 5, 1),
    ];
    for &(what, offset, value) in cases {
        let mut bad = good;
        bad[offset] = value;
        assert!(matches!(Dinode::decode(4711, &bad), Err(FsError::Corrupt { .. })), "{what}");
    }
}

#[test]
fn attributes_take_at_most_their_part_of_the_area() {
    let mut dinode = sample(FileType::Regular);
    dinode.xattrs.inline = vec![1; XATTR_INLINE_MAX];
    let room = dinode.inline_room();
    dinode.content = Content::Data(vec![2; room]);
    dinode.size = room as u64;
    assert_eq!(Dinode::decode(4711, &encoded(&dinode)).unwrap(), dinode);
}

proptest! {
    /// Whatever stands in the fields, decoding ends with a value or an error, and a value encodes again.
    #[test]
    fn hostile_dinodes_never_panic(
        which in 0_usize..7,
        changes in proptest::collection::vec((64_usize..BLOCK_SIZE, any::<u8>()), 1..12),
        fields in proptest::collection::vec((64_usize..200, any::<u8>()), 0..4),
    ) {
        let mut block = encoded(&samples()[which]);
        for (at, value) in changes.into_iter().chain(fields) {
            block[at] = value;
        }
        if let Ok(dinode) = Dinode::decode(4711, &block) {
            prop_assert_eq!(Dinode::decode(4711, &encoded(&dinode)).unwrap(), dinode);
        }
    }
}
