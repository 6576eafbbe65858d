//! On-disk directory entries.
