//! Who knows the naming database, and is therefore fit for the office of ADM (SMS-6, SMS-10).
//!
//! A node knows the version of which it has itself found every device; of others it believes what they last said. One
//! that does not know the current version neither joins nor forms nor stands, and is not handed the office. Its own
//! knowledge is asked for anew with every version, and again after a failure.

use std::sync::Arc;

use storage_control::{Generation, NodeId};

use super::{CloseReason, Membership, Notice, Output, Phase, Work};
use crate::times::{RETRY_MS, ms};
use crate::view::{Member, View};

impl Membership {
    /// Has the devices of the current naming database found, if that is not done or under way.
    pub(super) fn find_devices(&mut self, view: &Arc<View>) {
        let version = view.names.version;
        let start = match &self.names {
            Some((known, Work::Failed { at, .. })) if *known == version => {
                self.now.since(*at) >= ms(RETRY_MS)
            }
            Some((known, Work::UnderWay | Work::Done)) => *known != version,
            Some((_, Work::Failed { .. })) | None => true,
        };
        if start {
            self.names = Some((version, Work::UnderWay));
            self.out.push_back(Output::FindDevices(Arc::clone(view)));
        }
    }

    /// The end of a search. Outside, a device that is not here is a mount that cannot be.
    pub(super) fn devices_found(&mut self, version: Generation, result: Result<(), String>) {
        if self.names != Some((version, Work::UnderWay)) {
            return; // of a version that has passed
        }
        let work = Work::ended(result, self.now);
        if let Work::Failed { why, .. } = &work {
            match self.phase {
                Phase::Starting | Phase::Outside => {
                    return self.end(Output::CloseGate(CloseReason::Devices(why.clone())));
                }
                Phase::Member | Phase::Leaving => self.notice(Notice::DevicesMissing(why.clone())),
                Phase::Over => {}
            }
        }
        self.names = Some((version, work));
        self.next_beat = self.now;
    }

    /// The version that this node knows.
    pub(super) fn names_known(&self) -> Option<Generation> {
        self.names.as_ref().filter(|(_, work)| *work == Work::Done).map(|(version, _)| *version)
    }

    /// Whether this node may stand for ADM, form a matrix or ask to join one.
    pub(super) fn knows_names(&self, view: &View) -> bool {
        self.names_known() == Some(view.names.version)
    }

    /// Whether this member may be ADM, as far as it is known here.
    pub(super) fn may_be_adm(&self, view: &View, member: &Member) -> bool {
        if member.node == self.me.node {
            return self.knows_names(view);
        }
        self.watch.names_known(member.node, member.incarnation) == Some(view.names.version)
    }

    /// The members that may be ADM; those that reach the storage first, then by slot.
    pub(super) fn eligible(&self, view: &View) -> Vec<NodeId> {
        let reaches =
            |member: &&Member| self.watch.reaches_storage(self.now, member.node, member.incarnation);
        let may = view.members.values().filter(|member| self.may_be_adm(view, member));
        let (mut first, then): (Vec<&Member>, Vec<&Member>) = may.partition(reaches);
        first.extend(then);
        first.into_iter().map(|member| member.node).collect()
    }
}
