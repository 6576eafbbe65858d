//! On-disk dinode.
