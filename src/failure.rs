//! How this program says that something was not done.

use std::fmt::Display;

/// Exit code of a command that failed or was refused.
pub(crate) const EXIT_FAILED: u8 = 1;

/// Why a command did not do what was asked: one sentence that names the thing and the remedy.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) message: String,
}

impl Failure {
    /// A failure with exit code 1.
    pub(crate) fn new(message: impl Display) -> Failure {
        Failure { code: EXIT_FAILED, message: message.to_string() }
    }

    /// A failure with an exit code of its own.
    pub(crate) fn with_code(code: u8, message: impl Display) -> Failure {
        Failure { code, message: message.to_string() }
    }
}

/// Puts the thing that was being done in front of an error.
pub(crate) trait Context<T> {
    fn context(self, what: impl Display) -> Result<T, Failure>;
}

impl<T, E: Display> Context<T> for Result<T, E> {
    fn context(self, what: impl Display) -> Result<T, Failure> {
        self.map_err(|e| Failure::new(format!("{what}: {e}")))
    }
}
