//! Errors of the filesystem.
