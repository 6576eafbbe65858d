//! Proof that a peer writes to the same disk: nonces shown in the nodes' own blocks.

use std::sync::{Arc, Weak};

use storage_control::slots::{Nonce as Half, SlotArea};
use storage_control::{BoxFuture, NodeId};

use crate::interconnect::{Nonce, SameMedium};

pub(super) struct NonceBlocks {
    pub(super) me: NodeId,
    pub(super) area: SlotArea,
    /// What is shown now. A node has one block: handshakes at the same time share a nonce, later ones get another.
    shown: Arc<tokio::sync::Mutex<Weak<Nonce>>>,
}

impl NonceBlocks {
    pub(super) fn new(me: NodeId, area: SlotArea) -> NonceBlocks {
        NonceBlocks { me, area, shown: Arc::default() }
    }
}

impl SameMedium for NonceBlocks {
    fn show(&self) -> BoxFuture<Result<Arc<Nonce>, String>> {
        let (me, area, shown) = (self.me, self.area.clone(), Arc::clone(&self.shown));
        Box::pin(async move {
            let mut shown = shown.lock().await;
            if let Some(nonce) = shown.upgrade() {
                return Ok(nonce);
            }
            let (one, two) = (Half::random().0, Half::random().0);
            let nonce: Nonce = std::array::from_fn(|i| if i < 16 { one[i] } else { two[i - 16] });
            area.show_nonce(me, nonce).await.map_err(|error| error.to_string())?;
            let nonce = Arc::new(nonce);
            *shown = Arc::downgrade(&nonce);
            Ok(nonce)
        })
    }

    fn check(&self, node: NodeId, nonce: Nonce) -> BoxFuture<Result<(), String>> {
        let area = self.area.clone();
        Box::pin(async move {
            match area.shown_nonce(node).await {
                Ok(Some(found)) if found == nonce => Ok(()),
                Ok(_) => Err(String::from(
                    "what it writes to its disk does not appear on this node's: not the same disk",
                )),
                Err(error) => Err(format!("its block cannot be read here: {error}")),
            }
        })
    }
}
