//! File data: dirty pages, write-back, reads.
