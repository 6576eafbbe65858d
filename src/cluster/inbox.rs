//! The interconnect's side of the driver: what comes in becomes an event, or goes straight to the lock manager.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use membership::frame::{Channel, Header};
use membership::{Input, View, codec};
use parking_lot::{Mutex, RwLock};

use super::ClusterHooks;
use super::driver::Event;
use crate::interconnect::{Handler, Loss, Who};

/// Between two looks at the slots for the sake of unknown keys: strangers must not keep the disk busy.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Takes what the interconnect brings.
pub(super) struct Inbox {
    pub(super) events: Sender<Event>,
    pub(super) hooks: Arc<dyn ClusterHooks>,
    pub(super) installed: Arc<RwLock<Option<Arc<View>>>>,
    /// When an unknown key last had the slots looked at.
    pub(super) looked: Mutex<Option<Instant>>,
}

impl Inbox {
    /// Whether a lock message may be given to the lock manager: from a member of the installed view, or made under
    /// a later one, for which the lock manager keeps it.
    fn passes(&self, from: Who, header: &Header) -> bool {
        let installed = self.installed.read();
        installed
            .as_ref()
            .is_none_or(|view| view.is_member(from.0, from.1) || header.generation > view.generation)
    }
}

impl Handler for Inbox {
    fn frame(&self, from: Who, header: Header, payload: Vec<u8>) -> Result<(), String> {
        match header.channel {
            Channel::Membership => {
                let message = codec::decode_message(&payload).map_err(|error| error.to_string())?;
                let input = Input::Received { node: from.0, incarnation: from.1, message };
                self.events
                    .try_send(Event::Input(input))
                    .map_err(|_| String::from("more membership messages than can be taken in"))
            }
            Channel::Dlm if self.passes(from, &header) => self.hooks.dlm_frame(from.0, &payload),
            Channel::Dlm => Ok(()), // of a view that is over
            Channel::FileSystem | Channel::Handshake => {
                Err(format!("nothing is spoken on {:?}", header.channel))
            }
        }
    }

    fn connected(&self, peer: Who) {
        let _ = self.events.send(Event::Input(Input::Connected { node: peer.0, incarnation: peer.1 }));
    }

    fn disconnected(&self, peer: Who, _loss: &Loss) {
        let _ = self.events.send(Event::Input(Input::Disconnected { node: peer.0, incarnation: peer.1 }));
    }

    fn unknown_key(&self) {
        let now = Instant::now();
        let mut looked = self.looked.lock();
        if looked.is_none_or(|at| now - at >= LOOK_AGAIN) {
            *looked = Some(now);
            let _ = self.events.try_send(Event::UnknownKey);
        }
    }
}
