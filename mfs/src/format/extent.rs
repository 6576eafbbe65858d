//! On-disk extents and extent tree nodes.
