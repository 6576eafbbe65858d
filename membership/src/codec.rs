//! The only place that knows bincode. Bytes from a device or a peer give a value or an error, never a panic and
//! never more memory than their own limit; a value that breaks an invariant is an error too.

use serde::{Serialize, de::DeserializeOwned};

use crate::message::Message;
use crate::view::{BadView, View};

/// Version of the register's body, its first byte.
pub const BODY_VERSION: u8 = 2;
/// Largest register body in bytes: what its place on the disk holds.
pub const MAX_BODY_BYTES: usize = storage_control::MAX_BODY_BYTES;
/// By so much a body grows at most when a member moves to recovery.
pub(crate) const RECOVERY_BYTES: usize = 192;
/// Largest membership message in bytes: a view and a little.
pub const MAX_MESSAGE_BYTES: usize = MAX_BODY_BYTES + 1024;

/// Why bytes were not accepted.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Empty, or written by a version this one does not know.
    #[error("version {0:?} is not known here (this is version {BODY_VERSION})")]
    Version(Option<u8>),
    /// Cut off, too long, or not what it should be.
    #[error("malformed: {0}")]
    Malformed(String),
    /// Decoded, but impossible.
    #[error(transparent)]
    Impossible(#[from] BadView),
}

fn to_bytes<T: Serialize>(mut bytes: Vec<u8>, value: &T) -> Vec<u8> {
    let config = bincode::config::standard();
    bincode::serde::encode_into_std_write(value, &mut bytes, config).expect("memory takes everything");
    bytes
}

fn from_bytes<T: DeserializeOwned, const LIMIT: usize>(bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > LIMIT {
        return Err(CodecError::Malformed(format!("{} bytes, at most {LIMIT} may be", bytes.len())));
    }
    let config = bincode::config::standard().with_limit::<LIMIT>();
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, config).map_err(|e| CodecError::Malformed(e.to_string()))?;
    if used != bytes.len() {
        return Err(CodecError::Malformed(format!("{} bytes too many", bytes.len() - used)));
    }
    Ok(value)
}

/// The register's body for a view.
pub fn encode_view(view: &View) -> Vec<u8> {
    to_bytes(vec![BODY_VERSION], view)
}

/// Whether the view's body will have room whatever happens to its members.
pub(crate) fn has_room(view: &View) -> bool {
    encode_view(view).len() + view.members.len() * RECOVERY_BYTES <= MAX_BODY_BYTES
}

/// The view in a register's body.
pub fn decode_view(body: &[u8]) -> Result<View, CodecError> {
    match body.split_first() {
        Some((&BODY_VERSION, rest)) => {
            let view: View = from_bytes::<_, MAX_BODY_BYTES>(rest)?;
            view.check()?;
            Ok(view)
        }
        other => Err(CodecError::Version(other.map(|(version, _)| *version))),
    }
}

/// The payload of a frame on the membership channel.
pub fn encode_message(message: &Message) -> Vec<u8> {
    to_bytes(Vec::new(), message)
}

/// The message in such a payload.
pub fn decode_message(payload: &[u8]) -> Result<Message, CodecError> {
    let message: Message = from_bytes::<_, MAX_MESSAGE_BYTES>(payload)?;
    message.check()?;
    Ok(message)
}
