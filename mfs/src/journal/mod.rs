//! Journal records and replay.
