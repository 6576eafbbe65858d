//! The changes a view may undergo, as pure functions. Each leaves a view that [`View::check`] accepts.
//!
//! A change of members, shards, ADM or devices takes a new generation, one for all the changes that go into the register
//! together: [`View::next_generation`]. The order of an incarnation's end is fixed here: a member, then
//! `FencePending`, then `FencedDirty` with a replayer, then gone, its journal clean.

use std::collections::BTreeSet;

use storage_control::{Generation, Incarnation, NodeId};

use crate::view::{Candidate, FenceState, Member, Recovery, View};

impl View {
    /// Takes the next generation for a changed view. An election in progress is overtaken by it.
    pub(crate) fn next_generation(&mut self) {
        self.burnt = Generation(self.burnt.0 + 1);
        self.generation = self.burnt;
        self.candidate = None;
    }

    /// Takes a generation for a candidate; the view itself stays as it is.
    pub(crate) fn nominate(&mut self, node: NodeId, incarnation: Incarnation) {
        self.burnt = Generation(self.burnt.0 + 1);
        self.candidate = Some(Candidate { node, incarnation, generation: self.burnt });
    }

    /// Makes the candidate's generation the view's. Returns false where there is no candidate.
    pub(crate) fn take_candidates_generation(&mut self) -> bool {
        let Some(candidate) = self.candidate.take() else { return false };
        self.generation = candidate.generation;
        true
    }

    /// Moves members to recovery. Their shards go to the rest, where there is a rest.
    pub(crate) fn exclude(&mut self, nodes: &BTreeSet<NodeId>) {
        for node in nodes {
            let Some(member) = self.members.remove(node) else { continue };
            self.recoveries.push(Recovery {
                node: member.node,
                incarnation: member.incarnation,
                journal: Some(member.journal),
                state: FenceState::FencePending,
                replayer: None,
                failed: false,
                shards: self.shards.of(member.node),
            });
        }
        self.deal();
    }

    /// Records a former that stopped half-way: it may still be replaying, so it is fenced like a member.
    pub(crate) fn exclude_former(&mut self, former: Candidate) {
        self.past.insert(former.node, former.incarnation);
        if self.recovery(former.node, former.incarnation).is_none() {
            self.recoveries.push(Recovery {
                node: former.node,
                incarnation: former.incarnation,
                journal: None,
                state: FenceState::FencePending,
                replayer: None,
                failed: false,
                shards: Default::default(),
            });
        }
    }

    /// Takes a member out that has given up its locks and emptied its journal.
    pub(crate) fn leave(&mut self, node: NodeId) {
        self.members.remove(&node);
        self.deal();
    }

    /// Lets a node in, under a clean journal.
    pub(crate) fn admit(&mut self, member: Member) {
        self.past.insert(member.node, member.incarnation);
        self.members.insert(member.node, member);
        self.deal();
    }

    fn deal(&mut self) {
        let members: BTreeSet<NodeId> = self.members.keys().copied().collect();
        if !members.is_empty() {
            self.shards = self.shards.deal(&members);
        }
    }

    /// The fence of an excluded incarnation is confirmed.
    pub(crate) fn confirm_fence(&mut self, node: NodeId, incarnation: Incarnation) {
        for recovery in &mut self.recoveries {
            if recovery.node == node && recovery.incarnation == incarnation {
                recovery.state = FenceState::FencedDirty;
            }
        }
    }

    /// Names a replayer for every fenced recovery that has none, or whose replayer is gone and cannot write any
    /// more; a recovery without journal ends here. `replayers` are those that may be named, the preferred first:
    /// each gets as many as the others, counting what it has.
    pub(crate) fn assign_replayers(&mut self, replayers: &[(NodeId, Incarnation)]) {
        let pending: BTreeSet<(NodeId, Incarnation)> = self
            .recoveries
            .iter()
            .filter(|r| r.state == FenceState::FencePending)
            .map(|r| (r.node, r.incarnation))
            .collect();
        self.recoveries.retain(|r| r.journal.is_some() || r.state == FenceState::FencePending);
        for at in 0..self.recoveries.len() {
            let recovery = &self.recoveries[at];
            if recovery.state == FenceState::FencePending || recovery.failed {
                continue;
            }
            let may_write = |who: (NodeId, Incarnation)| {
                replayers.contains(&who) || pending.contains(&who) || self.is_member(who.0, who.1)
            };
            let settled = recovery.replayer.is_some_and(may_write);
            if settled {
                continue;
            }
            let load = |who: &(NodeId, Incarnation)| {
                self.recoveries.iter().filter(|r| r.replayer == Some(*who) && !r.failed).count()
            };
            let chosen = replayers.iter().min_by_key(|who| load(who)).copied();
            self.recoveries[at].replayer = chosen;
        }
    }

    /// The journal of an excluded incarnation is replayed: the recovery is over, the journal clean.
    pub(crate) fn recovered(&mut self, node: NodeId, incarnation: Incarnation) {
        self.recoveries.retain(|r| !(r.node == node && r.incarnation == incarnation));
    }

    /// Journals that could not be replayed are to be tried again: the device may have been away from who tried.
    pub(crate) fn replay_again(&mut self) {
        self.recoveries.iter_mut().for_each(|recovery| recovery.failed = false);
    }

    /// The replay of its journal failed; the recovery stays open.
    pub(crate) fn recovery_failed(&mut self, node: NodeId, incarnation: Incarnation) {
        for recovery in &mut self.recoveries {
            if recovery.node == node && recovery.incarnation == incarnation {
                recovery.failed = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use storage_control::DeviceId;

    use super::*;
    use crate::devices::NamingDatabase;

    fn member(node: u16, incarnation: u64, journal: u16) -> Member {
        Member {
            node: NodeId(node),
            incarnation: Incarnation(incarnation),
            name: format!("n{node}"),
            addr: "127.0.0.1:7400".parse().expect("an address"),
            fingerprint: [node as u8; 32],
            journal,
        }
    }

    fn three() -> View {
        let names = NamingDatabase::of_one("disk1".parse().expect("a name"), DeviceId([1; 16]), 20_000);
        let mut view = View::empty(3, names);
        (0..3).for_each(|n| view.admit(member(n, 1, n)));
        view.next_generation();
        view
    }

    #[test]
    fn a_dead_replayers_recoveries_wait_for_its_own_fence() {
        let mut view = three();
        let (a, b, c) =
            ((NodeId(0), Incarnation(1)), (NodeId(1), Incarnation(1)), (NodeId(2), Incarnation(1)));
        view.exclude(&[NodeId(2)].into());
        view.confirm_fence(c.0, c.1);
        view.assign_replayers(&[b, a]);
        assert_eq!(view.recoveries[0].replayer, Some(b));
        view.exclude(&[NodeId(1)].into());
        view.assign_replayers(&[a]);
        assert_eq!(view.recoveries[0].replayer, Some(b), "b may still be replaying");
        view.confirm_fence(b.0, b.1);
        view.assign_replayers(&[a]);
        assert!(view.recoveries.iter().all(|r| r.replayer == Some(a)));
        view.check().expect("a view");
    }

    /// A seed of the simulation had a node that was about to leave lose its replay to another while it still wrote.
    #[test]
    fn a_leaving_replayer_keeps_its_replay() {
        let mut view = three();
        let (a, b, c) =
            ((NodeId(0), Incarnation(1)), (NodeId(1), Incarnation(1)), (NodeId(2), Incarnation(1)));
        view.exclude(&[NodeId(2)].into());
        view.confirm_fence(c.0, c.1);
        view.assign_replayers(&[b, a]);
        view.assign_replayers(&[a]);
        assert_eq!(view.recoveries[0].replayer, Some(b));
    }

    #[test]
    fn a_dead_members_journal_is_clean_only_after_its_recovery() {
        let mut view = three();
        view.exclude(&[NodeId(1)].into());
        view.next_generation();
        assert_eq!(view.clean_journals().count(), 0);
        view.confirm_fence(NodeId(1), Incarnation(1));
        view.recovered(NodeId(1), Incarnation(1));
        assert_eq!(view.clean_journals().collect::<Vec<_>>(), [1]);
        view.check().expect("a view");
    }

    #[test]
    fn a_shard_of_two_dead_masters_waits_for_both() {
        let mut view = three();
        let was = view.shards.of(NodeId(1));
        view.exclude(&[NodeId(1)].into());
        let moved: Vec<u16> = was.iter().filter(|s| view.master(*s) == Some(NodeId(2))).collect();
        view.exclude(&[NodeId(2)].into());
        assert!(moved.iter().all(|s| view.recoveries.iter().all(|r| r.shards.contains(*s))));
        assert!(moved.iter().all(|s| view.master(*s) == Some(NodeId(0))));
    }

    #[test]
    fn a_new_view_overtakes_an_election() {
        let mut view = three();
        view.nominate(NodeId(1), Incarnation(1));
        let burnt = view.burnt;
        view.leave(NodeId(2));
        view.next_generation();
        assert!(view.candidate.is_none() && view.generation > burnt);
        view.check().expect("a view");
    }
}
