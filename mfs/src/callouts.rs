//! What happens before a lock goes.
