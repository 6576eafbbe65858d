//! Recovery of a dead node.
