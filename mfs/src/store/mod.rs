//! Block cache and transactions.
