//! FORMAT.md says what the structs say.

use std::mem::offset_of;

use crate::ids::BLOCK_SIZE;
use crate::label::RawLabel;
use crate::register::RawRegister;
use crate::slots::area::RawNonce;
use crate::slots::record::RawSlot;

/// Name, offset and size of a field.
type Field = (String, usize, usize);

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! fields {
    ($raw:ident { $($field:ident),* $(,)? }) => {
        vec![$((
            stringify!($field).to_owned(),
            offset_of!($raw, $field),
            size_of_field::<$raw, _>(|raw| &raw.$field),
        )),*]
    };
}

/// The rows of the table whose first heading is `name`.
fn table(name: &str) -> Vec<Field> {
    let heading = format!("| {name} | offset | bytes | meaning |");
    let lines = include_str!("../FORMAT.md").lines();
    let rows = lines.skip_while(|line| *line != heading).skip(2).take_while(|line| line.starts_with('|'));
    let field = |row: &str| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        (cells[1].trim_matches('`').to_owned(), cells[2].parse().unwrap(), cells[3].parse().unwrap())
    };
    rows.map(field).collect()
}

fn compare(name: &str, fields: Vec<Field>) {
    assert_eq!(table(name), fields, "the table of the {name} block");
    let mut end = 0;
    for (field, offset, size) in fields {
        assert_eq!(offset, end, "{name}: no hole before {field}");
        end += size;
    }
    assert_eq!(end, BLOCK_SIZE, "{name}: the fields fill the block");
}

#[test]
fn the_tables_of_the_format_document_are_the_structs() {
    compare(
        "label",
        fields!(RawLabel {
            magic,
            version,
            block_size,
            fs_uuid,
            nonce,
            device_blocks,
            quorum_start,
            quorum_blocks,
            fs_start,
            slots,
            reserved_a,
            io_timeout_ms,
            created_secs,
            created_nanos,
            reserved_b,
            text,
            device_uuid,
            reserved_c,
            checksum,
        }),
    );
    compare(
        "slot",
        fields!(RawSlot {
            magic,
            version,
            node,
            state,
            address_family,
            port,
            fs_uuid,
            nonce,
            incarnation,
            sequence,
            clock,
            journal_tail,
            boot_id,
            pid_start,
            pid,
            health,
            file_dev,
            file_ino,
            address,
            fingerprint,
            heard,
            node_name,
            host_name,
            reserved,
            checksum,
        }),
    );
    compare(
        "register",
        fields!(RawRegister {
            magic,
            version,
            node,
            has_accepted,
            body_buffer,
            recent_count,
            fs_uuid,
            acceptor_uuid,
            acceptor_config,
            promised,
            accepted,
            sequence,
            body_hash,
            body_len,
            reserved_a,
            recent,
            reserved_b,
            checksum,
        }),
    );
    compare("nonce", fields!(RawNonce { magic, node, reserved_a, fs_uuid, nonce, reserved_b, checksum }));
}
