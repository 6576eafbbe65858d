//! On-disk orphan tables.
