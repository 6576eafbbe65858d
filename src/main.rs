//! The `matrix` binary: command line, and the daemon that serves a node's mount.
//!
//! This package is the composition root. It owns what the layers below must not know: the real clock, sockets,
//! threads, processes and the terminal. Nothing depends on it.

mod cli;
mod cluster;
mod control;
mod daemon;
mod failure;
mod interconnect;
mod runtime;

fn main() -> std::process::ExitCode {
    cli::main()
}
