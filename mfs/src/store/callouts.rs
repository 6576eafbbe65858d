//! Callouts of locks that cover nothing but metadata blocks: settle, then forget.

use std::sync::{Arc, Weak};

use lcl::{CalloutError, Callouts, Lcl, Mode, Resource};
use storage_control::BoxFuture;

use super::{Handle, Store};
use crate::LockName;

struct Metadata(Weak<Handle>);

impl Store {
    /// Registers the callouts of the locks of journals and orphan tables.
    pub fn register_callouts(&self, lcl: &Lcl) {
        for kind in [LockName::Journals.kind(), LockName::ORPHANS] {
            lcl.set_callouts(kind, Arc::new(Metadata(Arc::downgrade(&self.handle))));
        }
    }
}

impl Callouts for Metadata {
    fn purge(&self, _res: Resource, _held: Mode, _keep: Mode) -> BoxFuture<()> {
        Box::pin(async {})
    }

    fn flush(&self, res: Resource, _held: Mode, keep: Mode) -> BoxFuture<Result<(), CalloutError>> {
        let store = self.0.upgrade().map(|handle| Store { handle });
        Box::pin(async move {
            let (Some(store), Some(owner)) = (store, LockName::from_resource(&res)) else { return Ok(()) };
            store.settle(owner).await.map_err(|error| CalloutError(error.to_string()))?;
            if keep == Mode::NL {
                store.forget(owner);
            }
            Ok(())
        })
    }
}
