//! The only place that knows bincode. Bytes from a device or a peer give a value or an error, never a panic and
//! never more memory than their own limit; a value that breaks an invariant is an error too.

use serde::{Serialize, de::DeserializeOwned};

use crate::message::Message;
use crate::view::{BadView, View};

/// Version of the register's body, its first byte.
pub const BODY_VERSION: u8 = 1;
/// Largest register body in bytes: 256 members, 256 open recoveries, a map of 1024 shards.
pub const MAX_BODY_BYTES: usize = 128 * 1024;
/// Largest membership message in bytes: a view and a little.
pub const MAX_MESSAGE_BYTES: usize = MAX_BODY_BYTES + 1024;

/// Why bytes were not accepted.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Empty, or written by a version this one does not know.
    #[error("version {0:?} is not known here (this is version 1)")]
    Version(Option<u8>),
    /// Cut off, too long, or not what it should be.
    #[error("malformed: {0}")]
    Malformed(String),
    /// Decoded, but impossible.
    #[error(transparent)]
    Impossible(#[from] BadView),
}

fn to_bytes<T: Serialize, const LIMIT: usize>(mut bytes: Vec<u8>, value: &T) -> Vec<u8> {
    let config = bincode::config::standard().with_limit::<LIMIT>();
    bincode::serde::encode_into_std_write(value, &mut bytes, config)
        .expect("our own values are within the limits");
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
    to_bytes::<_, MAX_BODY_BYTES>(vec![BODY_VERSION], view)
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
    to_bytes::<_, MAX_MESSAGE_BYTES>(Vec::new(), message)
}

/// The message in such a payload.
pub fn decode_message(payload: &[u8]) -> Result<Message, CodecError> {
    let message: Message = from_bytes::<_, MAX_MESSAGE_BYTES>(payload)?;
    message.check()?;
    Ok(message)
}
