//! On-disk format, version 1. Every structure is little-endian, has its size asserted at compile time and its
//! table in FORMAT.md; reserved bytes are zero and checked.

pub mod dinode;
pub mod dirent;
pub mod extent;
pub mod group;
pub mod header;
pub mod index;
pub mod journal;
pub mod orphan;
pub mod superblock;
pub mod xattr;

#[cfg(test)]
mod doc;
