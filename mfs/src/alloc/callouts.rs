//! What happens before a group's lock goes: promises are consumed, everything the group owns is settled, the
//! mirror is dropped.

use std::sync::{Arc, Weak};

use lcl::{CalloutError, Callouts, Mode, Resource};
use storage_control::BoxFuture;

use super::{Alloc, Inner};
use crate::LockName;

struct GroupCallouts(Weak<Inner>);

/// Registers the callouts of group locks.
pub(super) fn register(inner: &Arc<Inner>) {
    inner.lcl.set_callouts(LockName::GROUP, Arc::new(GroupCallouts(Arc::downgrade(inner))));
}

fn group_of(res: &Resource) -> Option<u32> {
    match LockName::from_resource(res) {
        Some(LockName::Group(group)) => Some(group),
        Some(_) | None => None,
    }
}

impl Callouts for GroupCallouts {
    fn purge(&self, res: Resource, _held: Mode, _keep: Mode) -> BoxFuture<()> {
        let (inner, group) = (self.0.upgrade(), group_of(&res));
        Box::pin(async move {
            let (Some(inner), Some(group)) = (inner, group) else { return };
            let unbacked = {
                let mut state = inner.state.lock();
                state.leave(group);
                state.unbacked()
            };
            let alloc = Alloc(inner);
            if unbacked > 0
                && let Some(consumer) = alloc.consumer()
            {
                consumer.consume_promises(group).await;
                let unbacked = alloc.0.state.lock().unbacked();
                if unbacked > 0 {
                    // Write-back will look for another group; only on a full filesystem it may find none.
                    tracing::debug!(group, unbacked, "promised blocks lose their group");
                }
            }
        })
    }

    fn flush(&self, res: Resource, _held: Mode, _keep: Mode) -> BoxFuture<Result<(), CalloutError>> {
        let (inner, group) = (self.0.upgrade(), group_of(&res));
        Box::pin(async move {
            let (Some(inner), Some(group)) = (inner, group) else { return Ok(()) };
            let owner = LockName::Group(group);
            inner.store.settle(owner).await.map_err(|error| CalloutError(error.to_string()))?;
            inner.store.forget(owner);
            let mirror = inner.state.lock().remove(group);
            if let Some(mut mirror) = mirror {
                mirror.thaw(inner.store.stable());
                inner.counters.set(group, mirror.free_in_time(), mirror.available());
            }
            Ok(())
        })
    }
}
