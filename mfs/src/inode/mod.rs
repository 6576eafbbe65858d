//! In-memory view of a dinode.
