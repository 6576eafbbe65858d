//! What happens before a group's lock goes: promises are consumed, everything the group owns is settled, the
//! mirror is dropped.

use std::sync::{Arc, Weak};
use std::time::Duration;

use lcl::{CalloutError, Callouts, Mode, Resource};
use storage_control::BoxFuture;

use super::{Alloc, Inner};
use crate::LockName;

/// Between two looks at what others have written back.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// Nobody who has a promise waits for a group. If all the same they are not consumed in time, something is wrong, and
/// data that do not find space elsewhere are lost rather than that all nodes stand still.
const CONSUMED_WITHIN: Duration = Duration::from_secs(20);

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

/// Returns when the groups that stay back all that dirty data were promised.
async fn consume(inner: &Arc<Inner>, group: u32) {
    let runtime = inner.store.runtime();
    let begun = runtime.now();
    loop {
        let unbacked = inner.state.lock().unbacked();
        if unbacked == 0 || inner.lcl.closed().is_some() {
            return;
        }
        let Some(consumer) = Alloc(Arc::clone(inner)).consumer() else { return };
        consumer.consume_promises(group).await;
        let unbacked = inner.state.lock().unbacked();
        if unbacked == 0 {
            return;
        }
        if runtime.now().since(begun) > CONSUMED_WITHIN {
            return tracing::error!(group, unbacked, "promised blocks lose their group");
        }
        runtime.sleep(LOOK_AGAIN).await;
    }
}

impl Callouts for GroupCallouts {
    fn purge(&self, res: Resource, _held: Mode, _keep: Mode) -> BoxFuture<()> {
        let (inner, group) = (self.0.upgrade(), group_of(&res));
        Box::pin(async move {
            let (Some(inner), Some(group)) = (inner, group) else { return };
            inner.state.lock().leave(group);
            consume(&inner, group).await;
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
