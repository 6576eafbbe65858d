//! Cached cluster locks.
