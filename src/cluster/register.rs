//! The register as the core wants it: views instead of bodies, an event for every answer.

use std::sync::Arc;
use std::time::Duration;

use membership::{CasOutcome, Input, View, codec};
use storage_control::{Outcome, Register, Runtime};

use super::driver::Event;

/// A register that could not be read is tried again after this.
const READ_AGAIN: Duration = Duration::from_millis(200);

/// Reads it with a completed ballot.
pub(super) async fn read(register: Register, runtime: Arc<dyn Runtime>) -> Event {
    let began = runtime.now();
    let read = register.read().await.map_err(|error| error.to_string());
    let content = read.and_then(|content| {
        let view = codec::decode_view(&content.body).map_err(|error| error.to_string())?;
        Ok((content.sequence, Arc::new(view)))
    });
    match content {
        Ok(content) => Event::Read(began, Some(content)),
        Err(why) => {
            tracing::warn!(why, "the quorum register cannot be read");
            runtime.sleep(READ_AGAIN).await;
            Event::Read(began, None)
        }
    }
}

/// Replaces its content, if that still has the sequence expected.
pub(super) async fn write(register: Register, expected: u64, view: Arc<View>) -> Event {
    let outcome = match register.cas(expected, codec::encode_view(&view)).await {
        Ok(Outcome::Committed { sequence }) => CasOutcome::Committed(sequence),
        Ok(Outcome::Conflict(content)) => match codec::decode_view(&content.body) {
            Ok(view) => CasOutcome::Conflict(content.sequence, Arc::new(view)),
            Err(_) => CasOutcome::Unknown, // the read that follows says why
        },
        Ok(Outcome::Unknown { .. }) => CasOutcome::Unknown,
        Err(error) => {
            tracing::warn!(%error, "the quorum register cannot be written");
            CasOutcome::Unknown
        }
    };
    Event::Input(Input::CasDone(outcome))
}
