//! Names of cluster locks.
