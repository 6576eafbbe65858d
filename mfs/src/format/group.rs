//! Group header and bitmap.
