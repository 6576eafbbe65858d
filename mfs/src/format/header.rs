//! Block header.
