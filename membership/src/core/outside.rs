//! The way in: joining a matrix that lives, or forming one where nobody does (SMS-7). Only a node that knows the naming
//! database comes this far.
//!
//! A former takes the candidacy in the register before it touches anything; only the candidate fences and replays
//! while there are no members. It becomes a member, and its view is installed, when no recovery is open. A former
//! that stops half-way is recorded and fenced by the next, like a member.

use std::sync::Arc;

use storage_control::NodeId;

use super::watch::Standing;
use super::{Membership, Notice, Output, Who};
use crate::frame::PROTOCOL_VERSION;
use crate::message::{Message, Refusal};
use crate::times::{HEARTBEAT_MS, ms};
use crate::view::{Candidate, View};

/// So often a join is tried again with a freshly read generation before the disagreement is believed.
const GENERATION_TRIES: u32 = 20;

impl Membership {
    /// One step of a node that is not a member.
    pub(super) fn outside(&mut self, view: &Arc<View>) {
        self.probe_all(view);
        let dead = |who: Who| self.watch.standing(self.now, who.0, who.1) == Standing::Dead;
        if view.members.values().any(|member| !dead((member.node, member.incarnation))) {
            return self.ask_to_join(view);
        }
        match view.candidate {
            Some(former) if (former.node, former.incarnation) == self.who() => self.form(view),
            Some(former)
                if !view.is_member(former.node, former.incarnation)
                    && !dead((former.node, former.incarnation)) =>
            {
                self.look_again();
                self.notice(Notice::WaitingForFormer(former.node));
            }
            candidate => self.take_over(view, candidate),
        }
    }

    /// Nobody is alive: everybody who was there goes to recovery, and this node is the one to do it. What could not be
    /// replayed before is tried again, or a device that was away once would be lost for good.
    fn take_over(&mut self, view: &View, former: Option<Candidate>) {
        let mut next = view.clone();
        let members: std::collections::BTreeSet<NodeId> = next.members.keys().copied().collect();
        if let Some(former) = former.filter(|former| !view.is_member(former.node, former.incarnation)) {
            next.exclude_former(former);
        }
        next.exclude(&members);
        if !members.is_empty() {
            next.next_generation();
        }
        next.replay_again();
        next.nominate(self.me.node, self.me.incarnation);
        self.write(next);
    }

    /// Asks once for a proof of every incarnation that stands in the way.
    fn probe_all(&mut self, view: &View) {
        let members = view.members.values().map(|member| (member.node, member.incarnation));
        let former = view.candidate.map(|candidate| (candidate.node, candidate.incarnation));
        let all: Vec<Who> = members.chain(former).filter(|who| who.0 != self.me.node).collect();
        for who in all {
            if self.probed.insert(who) {
                self.out.push_back(Output::Probe { node: who.0, incarnation: who.1 });
            }
        }
    }

    fn ask_to_join(&mut self, view: &View) {
        if self.now < self.next_ask {
            return;
        }
        self.look_again();
        let Some(adm) = view.member(view.adm) else { return };
        if !self.watch.is_connected(adm.node, adm.incarnation) {
            return self.notice(Notice::WaitingForAdm(adm.node));
        }
        let message = Message::Join {
            applicant: self.me.clone(),
            version: PROTOCOL_VERSION,
            generation: view.generation,
            healthy: self.watch.healthy(self.now),
            names: view.names.version,
        };
        self.send(adm.node, message);
    }

    /// Outside nobody tells us of changes: the register is read with every try.
    fn look_again(&mut self) {
        if self.now >= self.next_ask {
            self.next_ask = self.now + ms(HEARTBEAT_MS);
            self.must_read = true;
        }
    }

    pub(super) fn refused(&mut self, by: NodeId, refusal: Refusal) {
        if self.phase != super::Phase::Outside || self.view().is_none_or(|view| view.adm != by) {
            return;
        }
        let generation = matches!(refusal, Refusal::WrongGeneration { .. });
        self.refused_for_generation = if generation { self.refused_for_generation + 1 } else { 0 };
        let again = refusal.is_transient() || (generation && self.refused_for_generation < GENERATION_TRIES);
        if again {
            self.must_read = true;
            self.notice(Notice::NotYet(refusal));
        } else {
            self.end(Output::Refused(refusal));
        }
    }
}
