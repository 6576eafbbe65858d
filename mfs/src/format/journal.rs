//! Journal header and records.
