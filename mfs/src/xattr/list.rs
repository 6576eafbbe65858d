//! The list of attributes as bytes.

use storage_control::BlockAddr;

use super::Xattr;
use crate::error::FsError;
use crate::format::xattr::{ENTRY_HEAD, NAME_MAX, VALUE_MAX};

/// The bytes of a list sorted by name.
pub(super) fn encode_list(all: &[Xattr]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for xattr in all {
        bytes.push(xattr.name.len() as u8);
        bytes.extend_from_slice(&(xattr.value.len() as u32).to_le_bytes()[..3]);
        bytes.extend_from_slice(&xattr.name);
        bytes.extend_from_slice(&xattr.value);
    }
    bytes
}

/// Checks and reads a list; `addr` is where it starts.
pub(crate) fn decode_list(addr: BlockAddr, mut bytes: &[u8]) -> Result<Vec<Xattr>, FsError> {
    let bad = |why| FsError::corrupt("extended attributes", addr, why);
    let mut all: Vec<Xattr> = Vec::new();
    while let Some((&[name_len, a, b, c], rest)) = bytes.split_first_chunk::<ENTRY_HEAD>() {
        let (name_len, value_len) = (usize::from(name_len), u32::from_le_bytes([a, b, c, 0]) as usize);
        if name_len == 0 || value_len > VALUE_MAX {
            return Err(bad("one has no name or too long a value"));
        }
        let (name, rest) = rest.split_at_checked(name_len).ok_or_else(|| bad("they end within a name"))?;
        let (value, rest) = rest.split_at_checked(value_len).ok_or_else(|| bad("they end within a value"))?;
        if name.contains(&0) || all.last().is_some_and(|last| last.name.as_slice() >= name) {
            return Err(bad("their names are out of order"));
        }
        all.push(Xattr { name: name.to_vec(), value: value.to_vec() });
        bytes = rest;
    }
    if !bytes.is_empty() {
        return Err(bad("they end within an entry"));
    }
    Ok(all)
}

const _: () = assert!(NAME_MAX == u8::MAX as usize);
