//! On-disk extended attributes.
