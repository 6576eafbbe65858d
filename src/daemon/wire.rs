//! Lock messages on the interconnect: [`lcl::Wire`] over the cluster's connections, and the bytes of a message.
//!
//! A message is given to the interconnect in the order in which it was given here, also while the cluster is still
//! being put together: what comes before waits.

use std::sync::Arc;

use dlm::{Fault, Message};
use lcl::Wire;
use parking_lot::Mutex;
use storage_control::NodeId;

use crate::cluster::Cluster;

/// Largest lock message, bytes: a report of the largest size is far below.
const MAX_MESSAGE_BYTES: usize = 256 << 10;

/// The wire of one node.
#[derive(Default)]
pub(super) struct ClusterWire {
    state: Mutex<State>,
}

enum State {
    /// What was sent before the cluster was there
    Early(Vec<(NodeId, Message)>),
    Open(Arc<Cluster>),
}

impl Default for State {
    fn default() -> State {
        State::Early(Vec::new())
    }
}

impl ClusterWire {
    /// Sends what has waited, and everything from now on.
    pub(super) fn open(&self, cluster: Arc<Cluster>) {
        let mut state = self.state.lock();
        if let State::Early(early) = std::mem::take(&mut *state) {
            early.iter().for_each(|(to, message)| send(&cluster, *to, message));
        }
        *state = State::Open(cluster);
    }
}

impl Wire for ClusterWire {
    fn send(&self, to: NodeId, message: Message) {
        match &mut *self.state.lock() {
            State::Early(early) => early.push((to, message)),
            State::Open(cluster) => send(cluster, to, &message),
        }
    }

    fn fault(&self, from: NodeId, fault: Fault) {
        if let State::Open(cluster) = &*self.state.lock() {
            cluster.disconnect(from, &fault.to_string());
        }
    }
}

fn send(cluster: &Cluster, to: NodeId, message: &Message) {
    tracing::trace!(%to, ?message, "lock message out");
    cluster.send_dlm(to, message.generation, &encode(message));
}

fn encode(message: &Message) -> Vec<u8> {
    bincode::serde::encode_to_vec(message, bincode::config::standard()).expect("memory takes every message")
}

/// The message in a frame; an error where no correct member sends such bytes.
pub(super) fn decode(bytes: &[u8]) -> Result<Message, String> {
    let config = bincode::config::standard().with_limit::<MAX_MESSAGE_BYTES>();
    let (message, used) = bincode::serde::decode_from_slice(bytes, config).map_err(|e| e.to_string())?;
    if used == bytes.len() { Ok(message) } else { Err(format!("{} bytes too many", bytes.len() - used)) }
}

#[cfg(test)]
mod tests {
    use dlm::{Body, Mode, Resource};
    use storage_control::Generation;

    use super::*;

    fn message() -> Message {
        let res = Resource { shard: 7, kind: 4, number: 4711, part: 0 };
        Message { generation: Generation(3), body: Body::Blocking { res, wanted: Mode::EX } }
    }

    #[test]
    fn a_message_is_read_as_it_was_written() {
        assert_eq!(decode(&encode(&message())), Ok(message()));
    }

    #[test]
    fn damaged_messages_are_errors() {
        let bytes = encode(&message());
        assert!((0..bytes.len()).all(|cut| decode(&bytes[..cut]).is_err()));
        assert!(decode(&[bytes, vec![0]].concat()).is_err());
        assert!(decode(&[0xff; 4096]).is_err());
    }
}
