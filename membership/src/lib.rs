//! Views: who is a member, under which generation.
