//! The distributed lock manager.
