//! The Matrix filesystem.
