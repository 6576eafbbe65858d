//! Making a filesystem.
