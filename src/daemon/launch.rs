//! Starting a daemon from the command line, and hearing from it whether it mounted.
//!
//! The daemon is this same program run again (`matrix daemon`), so it starts with one thread and no state. Its
//! standard output is a pipe on which it says one [`Outcome`] and then closes it; its standard error is its log.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::MountRequest;
use super::run_dir::RunDir;
use crate::failure::Failure;

/// What a starting daemon tells the command that started it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// Mounted and usable
    Mounted,
    /// Not mounted, and why
    Refused(String),
}

/// Starts a daemon for `request` and waits until it has mounted or has said why not.
pub(crate) fn launch(request: &MountRequest) -> Result<(), Failure> {
    let run_dir = RunDir::new(&request.run_dir);
    let fail = |what: &str, e: std::io::Error| Failure::new(format!("{what}: {e}"));
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(run_dir.log_file())
        .map_err(|e| fail(&format!("cannot write the log {}", run_dir.log_file().display()), e))?;
    let program = std::env::current_exe().map_err(|e| fail("cannot find this program", e))?;
    let body =
        serde_json::to_string(request).map_err(|e| Failure::new(format!("cannot name the device: {e}")))?;
    let mut child = Command::new(program)
        .args(["daemon", &body])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(|e| fail("cannot start the daemon", e))?;
    let mut said = String::new();
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_string(&mut said).map_err(|e| fail("the daemon's answer cannot be read", e))?;
    }
    match serde_json::from_str(&said) {
        Ok(Outcome::Mounted) => Ok(()),
        Ok(Outcome::Refused(why)) => {
            let _ = child.wait();
            Err(Failure::new(why))
        }
        Err(_) => {
            let status = child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
            Err(Failure::new(format!(
                "the daemon ended before it mounted ({status}); the end of {}:\n{}",
                run_dir.log_file().display(),
                run_dir.log_tail(8)
            )))
        }
    }
}

/// Says `outcome` to the command that started this daemon and closes the pipe. Only once; later calls say nothing.
pub(super) fn report(outcome: &Outcome) {
    use std::io::Write;
    let text = serde_json::to_string(outcome).expect("an outcome is plain text");
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    close_standard_output();
}

/// Points standard output at the log, so that the reader of the pipe sees its end.
fn close_standard_output() {
    // SAFETY: dup2 of two standard descriptors, which are open for the life of the process.
    unsafe { libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO) };
}
