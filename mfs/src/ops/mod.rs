//! Filesystem operations.
