//! Block allocator.
