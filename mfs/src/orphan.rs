//! Orphan tables.
