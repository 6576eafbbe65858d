//! How a lost ADM is replaced (SMS-6).
//!
//! The coordinator picks a candidate; the candidate takes a generation in the register and reports; the coordinator
//! permits, or undoes; the candidate commits, and excludes the lost ADM in the same write. Every step is a
//! compare-and-set, so two coordinators do no harm. A candidate that does not finish in time is passed over, its
//! generation stays burnt.
//!
//! The coordinator picks the lowest member of those that know the naming database (SMS-10), reach the storage and have
//! not recently failed; itself, where it is one of them. So another is picked at once where the coordinator itself
//! cannot serve, and not only after a failed attempt.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use storage_control::{Generation, Incarnation, Instant, NodeId};

use super::watch::Judgement;
use super::{Membership, Notice, coordinator};
use crate::message::Message;
use crate::times::{CANDIDATE_REST_MS, ELECTION_MS, HEARTBEAT_MS, ms};
use crate::view::{Candidate, View};

#[derive(Debug, Default)]
pub(super) struct Election {
    /// The register's candidate, and since when we know of it.
    candidate: Option<(Candidate, Instant)>,
    /// The coordinator wants us, in the view of this generation.
    pub(super) nominated: Option<Generation>,
    /// A candidate reported to us.
    pub(super) elected: Option<(NodeId, Incarnation, Generation)>,
    /// The coordinator's answer to us.
    pub(super) permit: Option<Generation>,
    pub(super) undo: Option<Generation>,
    /// Whom we, as coordinator, have asked, and since when.
    asked: Option<(NodeId, Instant)>,
    failed: BTreeMap<NodeId, Instant>,
    next_message: Instant,
}

impl Election {
    pub(super) fn adopted(&mut self, view: &View, now: Instant) {
        match view.candidate {
            None => {
                self.candidate = None;
                self.permit = None;
                self.undo = None;
                self.elected = None;
            }
            Some(candidate) if self.candidate.is_some_and(|(known, _)| known == candidate) => {}
            Some(candidate) => {
                self.candidate = Some((candidate, now));
                self.asked = None;
            }
        }
        if self.nominated.is_some_and(|generation| generation != view.generation) {
            self.nominated = None;
        }
    }

    pub(super) fn expired(&self, now: Instant, after: Duration) -> bool {
        self.candidate.is_some_and(|(_, since)| now.since(since) >= after)
    }

    fn has_failed(&self, now: Instant, node: NodeId) -> bool {
        self.failed.get(&node).is_some_and(|at| now.since(*at) < ms(CANDIDATE_REST_MS))
    }
}

impl Membership {
    /// One step of a member that is not the ADM.
    pub(super) fn elect(&mut self, view: &Arc<View>, judgement: &Judgement) {
        let lost = judgement.out.contains(&view.adm);
        if coordinator(view, judgement) == Some(self.me.node) {
            self.coordinate(view, judgement, lost);
        } else if view.candidate.is_some_and(|c| (c.node, c.incarnation) == self.who()) {
            self.stand(view, judgement);
        } else if self.election.nominated == Some(view.generation) && view.candidate.is_none() {
            self.election.nominated = None;
            self.take_candidacy(view);
        }
    }

    fn coordinate(&mut self, view: &Arc<View>, judgement: &Judgement, lost: bool) {
        match view.candidate {
            None if !lost => {
                self.election.asked = None;
                if self.election.nominated.take() == Some(view.generation) {
                    self.take_candidacy(view);
                }
            }
            None => self.pick(view, judgement),
            Some(candidate) if self.election.expired(self.now, ms(ELECTION_MS)) => {
                self.election.failed.insert(candidate.node, self.now);
                let mut next = View::clone(view);
                next.candidate = None;
                self.write(next);
            }
            Some(candidate) if (candidate.node, candidate.incarnation) == self.who() => {
                if lost {
                    self.commit(view, judgement)
                } else {
                    self.give_up(view)
                }
            }
            Some(candidate) => self.answer(candidate, judgement, lost),
        }
    }

    /// Picks a candidate, see the module's header.
    fn pick(&mut self, view: &Arc<View>, judgement: &Judgement) {
        if let Some((node, since)) = self.election.asked
            && self.now.since(since) >= ms(ELECTION_MS)
        {
            self.election.failed.insert(node, self.now);
            self.election.asked = None;
        }
        let (now, me) = (self.now, self.me.node);
        let mut may = self.eligible(view);
        may.retain(|node| !judgement.out.contains(node));
        let fit = |node: &&NodeId| {
            let member = &view.members[*node];
            let reaches = self.watch.reaches_storage(now, member.node, member.incarnation);
            reaches && !self.election.has_failed(now, **node)
        };
        // Where nobody is fit, the coordinator itself tries all the same, or the first that may: somebody must.
        let anyway = || may.iter().find(|node| **node == me).or(may.first());
        let Some(chosen) = may.iter().find(fit).or_else(anyway).copied() else {
            return self.notice(Notice::NoCandidate);
        };
        if chosen == self.me.node {
            return self.take_candidacy(view);
        }
        if self.election.asked.is_none_or(|(node, _)| node != chosen) {
            self.election.asked = Some((chosen, self.now));
            self.election.next_message = self.now;
        }
        self.say(chosen, Message::Nominate { generation: view.generation });
    }

    fn answer(&mut self, candidate: Candidate, judgement: &Judgement, lost: bool) {
        let reported = (candidate.node, candidate.incarnation, candidate.generation);
        let generation = candidate.generation;
        if !lost || judgement.out.contains(&candidate.node) {
            self.say(candidate.node, Message::Undo { generation });
        } else if self.election.elected.take() == Some(reported) {
            self.send(candidate.node, Message::Permit { generation });
        }
    }

    /// One step of the candidate, where another is coordinator.
    fn stand(&mut self, view: &Arc<View>, judgement: &Judgement) {
        let Some(candidate) = view.candidate else { return };
        let generation = candidate.generation;
        if self.election.undo == Some(generation) || self.election.expired(self.now, ms(ELECTION_MS)) {
            self.give_up(view);
        } else if self.election.permit == Some(generation) {
            self.commit(view, judgement);
        } else if let Some(coordinator) = coordinator(view, judgement) {
            self.say(coordinator, Message::Elected { generation });
        }
    }

    /// Only with the naming database known: a change of devices is a new generation, which ends the candidacy.
    fn take_candidacy(&mut self, view: &View) {
        if !self.knows_names(view) {
            return;
        }
        let mut next = view.clone();
        next.nominate(self.me.node, self.me.incarnation);
        self.write(next);
    }

    fn give_up(&mut self, view: &View) {
        let mut next = view.clone();
        next.candidate = None;
        self.write(next);
    }

    /// Becomes the ADM; the lost one and whoever else is lost go in the same write.
    fn commit(&mut self, view: &View, judgement: &Judgement) {
        let mut out: BTreeSet<NodeId> = judgement.out.clone();
        out.insert(view.adm);
        let mut next = view.clone();
        next.take_candidates_generation();
        next.exclude(&out);
        next.adm = self.me.node;
        self.write(next);
    }

    /// Sends at most one election message per quarter of a second: what is not answered is said again.
    fn say(&mut self, to: NodeId, message: Message) {
        if self.now >= self.election.next_message {
            self.election.next_message = self.now + ms(HEARTBEAT_MS) / 2;
            self.send(to, message);
        }
    }
}
