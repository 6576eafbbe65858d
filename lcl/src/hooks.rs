//! The clients' callouts, by kind of lock.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::api::Callouts;

#[derive(Default)]
pub(crate) struct Hooks(RwLock<BTreeMap<u8, Arc<dyn Callouts>>>);

impl Hooks {
    pub(crate) fn set(&self, kind: u8, callouts: Arc<dyn Callouts>) {
        self.0.write().insert(kind, callouts);
    }

    pub(crate) fn has(&self, kind: u8) -> bool {
        self.0.read().contains_key(&kind)
    }

    pub(crate) fn get(&self, kind: u8) -> Option<Arc<dyn Callouts>> {
        self.0.read().get(&kind).cloned()
    }
}
