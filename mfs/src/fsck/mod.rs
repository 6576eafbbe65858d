//! Read-only check of everything the format promises.
