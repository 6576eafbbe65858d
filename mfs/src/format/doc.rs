//! The tables of FORMAT.md against the structures.

use std::mem::offset_of;

use super::{dinode, dirent, extent, group, header, index, journal, orphan, superblock, xattr};

/// The rows (offset, bytes, field) of the table under the heading that names the structure.
fn table(name: &str) -> Vec<(usize, usize, String)> {
    let text = include_str!("../../FORMAT.md");
    let heading = format!("### `{name}`");
    let section = text.split(&heading).nth(1).unwrap_or_else(|| panic!("FORMAT.md has a section {heading}"));
    section
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let number = |cell: &str| cell.parse().unwrap_or_else(|_| panic!("{line} has numbers"));
            (number(cells[1]), number(cells[2]), cells[3].trim_matches('`').to_string())
        })
        .collect()
}

/// Asserts that the documented rows are the structure's fields, one behind the other to its end.
fn assert_documented(name: &str, size: usize, fields: &[(&str, usize)]) {
    let ends = fields.iter().skip(1).map(|(_, offset)| *offset).chain([size]);
    let expected: Vec<_> = fields
        .iter()
        .zip(ends)
        .map(|((field, offset), end)| (*offset, end - offset, field.to_string()))
        .collect();
    assert_eq!(table(name), expected, "{name}");
}

macro_rules! documented {
    ($module:ident::$name:ident { $($field:ident),* $(,)? }) => {
        assert_documented(
            stringify!($name),
            size_of::<$module::$name>(),
            &[$((stringify!($field), offset_of!($module::$name, $field))),*],
        )
    };
}

#[test]
fn the_structures_of_inodes_are_as_documented() {
    documented!(dinode::RawDinode {
        mode,
        uid,
        gid,
        nlink,
        size,
        blocks,
        generation,
        flags,
        project,
        rdev,
        parent,
        atime,
        mtime,
        ctime,
        btime,
        atime_ns,
        mtime_ns,
        ctime_ns,
        btime_ns,
        format,
        depth,
        content_len,
        xattr_len,
        reserved_a,
        xattr_root,
        entries,
        checksum_root,
        encryption_root,
        reserved_b,
    });
    documented!(index::NodeHead { level, count, used, reserved_a, reserved_b });
    documented!(index::RawIndexEntry { key, child });
    documented!(dirent::RawDirent { cookie, ino, generation, kind, name_len });
    documented!(extent::RawExtent { logical, physical_low, physical_high, device, len, flags });
    documented!(xattr::XattrHead { next, used, reserved });
    documented!(orphan::OrphanHead { next, count, reserved });
    documented!(orphan::RawOrphan { ino, generation, kind, reserved });
}

#[test]
fn the_structures_of_blocks_groups_and_journals_are_as_documented() {
    documented!(header::Header {
        magic,
        kind,
        flags,
        addr,
        secret,
        version,
        owner_number,
        owner_kind,
        reserved,
        owner_generation,
        checksum,
        reserved2
    });
    documented!(superblock::SuperblockImage {
        header,
        format_version,
        block_size,
        compat,
        ro_compat,
        incompat,
        uuid,
        label,
        blocks,
        fs_start,
        groups_start,
        group_blocks,
        groups,
        root,
        journal_blocks,
        journal_slots,
        created_secs,
        created_nanos,
        device_count,
        quota_root,
        deltas_root,
        orphans_root,
        reserved,
        devices,
        reserved2,
        journals
    });
    documented!(superblock::DeviceEntry { uuid, blocks, reserved });
    documented!(group::GroupImage {
        header,
        index,
        blocks,
        bitmap_blocks,
        bitmaps_written,
        free,
        data,
        metadata,
        freed_metadata,
        promised,
        refcount_root,
        reservations_root,
        stamp,
        reserved
    });
    documented!(group::BitmapImage { header, group, index, last_metadata_free, reserved, bits });
    documented!(journal::JournalImage {
        header,
        journal,
        clean,
        ring_blocks,
        epoch,
        writes,
        tail_seq,
        tail_at,
        tail_clock,
        clock,
        reserved
    });
    documented!(journal::RecordImage {
        header,
        epoch,
        seq,
        stable_seq,
        record_type,
        flags,
        images,
        descriptors,
        index,
        reserved,
        entries
    });
    documented!(journal::EntryImage { addr, checksum, reserved });
}
