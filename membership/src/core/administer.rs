//! What the ADM does, and a former on its way there (SMS-3, SMS-8).
//!
//! Everything that is due goes into one new content of the register: exclusions first, then leaves, then the
//! progress of fences and replays, then admissions. An incarnation is excluded in the register before it is
//! fenced, and fenced before its journal has a replayer.

use std::collections::BTreeSet;
use std::sync::Arc;

use storage_control::{Generation, NodeId};

use super::watch::Standing;
use super::{Application, CloseReason, Membership, Notice, Output, Phase, Who, Work};
use crate::codec;
use crate::frame::PROTOCOL_VERSION;
use crate::message::{Message, Refusal};
use crate::times::{ELECTION_MS, RETRY_MS, ms};
use crate::view::{FenceState, MAX_JOURNALS, Member, View};

/// What becomes of an application.
enum Admission {
    Admit(u16),
    Refuse(Refusal),
    /// Not decidable yet: what is missing is on its way.
    Wait,
}

impl Membership {
    /// One step of the ADM.
    pub(super) fn administer(&mut self, view: &Arc<View>, out: &BTreeSet<NodeId>) {
        self.fence_pending(view);
        let mut next = View::clone(view);
        let mut changed = self.lost == Some(view.generation);

        if !out.is_empty() {
            next.exclude(out);
            changed = true;
            self.notice(Notice::Excluding(out.iter().copied().collect()));
        }
        changed |= self.let_go(&mut next);
        let replayers = self.replayers(&next);
        self.note_progress(&mut next, &replayers);
        if self.phase == Phase::Member {
            changed |= self.admit_applicants(&mut next);
        }
        if changed {
            next.next_generation();
        } else if self.election.expired(self.now, ms(ELECTION_MS)) {
            // Somebody wanted our office and did not finish; its generation stays burnt.
            next.candidate = None;
        }
        self.write(next);
    }

    /// One step of the node that brings a matrix without members to life.
    pub(super) fn form(&mut self, view: &Arc<View>) {
        self.fence_pending(view);
        self.replay_assigned(view);
        if let Some(failed) = view.recoveries.iter().find(|r| r.failed) {
            // Whoever held locks is not there to say what they covered: nothing can be opened safely.
            let reason =
                CloseReason::Unrecoverable { node: failed.node, journal: failed.journal.unwrap_or(u16::MAX) };
            return self.end(Output::CloseGate(reason));
        }
        let mut next = View::clone(view);
        self.note_progress(&mut next, &[self.who()]);
        if next.recoveries.is_empty() {
            let Some(journal) = next.clean_journals().next() else {
                return self.end(Output::CloseGate(CloseReason::NoJournal));
            };
            next.take_candidates_generation();
            next.adm = self.me.node;
            next.admit(self.as_member(journal));
        }
        self.write(next);
    }

    fn as_member(&self, journal: u16) -> Member {
        let me = &self.me;
        Member {
            node: me.node,
            incarnation: me.incarnation,
            name: me.name.clone(),
            addr: me.addr,
            fingerprint: me.fingerprint,
            journal,
        }
    }

    /// Starts the fences that the register asks for; a failed one again after a while.
    fn fence_pending(&mut self, view: &View) {
        for recovery in view.recoveries.iter().filter(|r| r.state == FenceState::FencePending) {
            let (node, incarnation) = (recovery.node, recovery.incarnation);
            let start = match self.fences.get(&(node, incarnation)) {
                None => true,
                Some(Work::Failed { at, .. }) => self.now.since(*at) >= ms(RETRY_MS),
                Some(Work::UnderWay | Work::Done) => false,
            };
            if start {
                self.fences.insert((node, incarnation), Work::UnderWay);
                self.out.push_back(Output::Fence { node, incarnation });
            }
        }
    }

    /// Who may replay, this node first: its own word costs no message.
    fn replayers(&self, view: &View) -> Vec<Who> {
        let leaving =
            |who: &Who| self.leavers.contains(who) || (self.phase == Phase::Leaving && *who == self.who());
        let mut all: Vec<Who> = view
            .members
            .values()
            .map(|member| (member.node, member.incarnation))
            .filter(|who| !leaving(who))
            .collect();
        all.sort_by_key(|who| (*who != self.who(), *who));
        all
    }

    /// Confirmed fences and finished replays, then replayers for what is fenced.
    fn note_progress(&self, next: &mut View, replayers: &[Who]) {
        for ((node, incarnation), work) in &self.fences {
            if *work == Work::Done {
                next.confirm_fence(*node, *incarnation);
            }
        }
        for ((node, incarnation), work) in &self.replays {
            match work {
                Work::UnderWay => {}
                Work::Done => next.recovered(*node, *incarnation),
                Work::Failed { .. } => next.recovery_failed(*node, *incarnation),
            }
        }
        next.assign_replayers(replayers);
    }

    /// Takes out who has asked to leave; this node last, and its office with it. True if somebody went.
    fn let_go(&mut self, next: &mut View) -> bool {
        let replaying =
            |next: &View, who: Who| next.recoveries.iter().any(|r| r.replayer == Some(who) && !r.failed);
        let mut gone = false;
        for who in self.leavers.clone() {
            if next.is_member(who.0, who.1) && !replaying(next, who) {
                next.leave(who.0);
                gone = true;
            }
        }
        if self.phase == Phase::Leaving && !replaying(next, self.who()) {
            let mut without = next.clone();
            without.leave(self.me.node);
            let successor = self.eligible(&without).first().copied();
            // Where others are left and none can take the office, it is kept until one can.
            if let Some(adm) = successor.or(without.members.is_empty().then_some(next.adm)) {
                without.adm = adm;
                *next = without;
                gone = true;
            }
        }
        gone
    }

    /// Admits those who may come in; answers the others. True if somebody came.
    fn admit_applicants(&mut self, next: &mut View) -> bool {
        let mut came = false;
        let applications: Vec<Application> = self.applications.values().cloned().collect();
        for application in applications {
            let applicant = &application.applicant;
            match self.admission(next, &application) {
                Admission::Admit(journal) => {
                    let mut with = next.clone();
                    with.admit(Member {
                        node: applicant.node,
                        incarnation: applicant.incarnation,
                        name: applicant.name.clone(),
                        addr: applicant.addr,
                        fingerprint: applicant.fingerprint,
                        journal,
                    });
                    if codec::has_room(&with) {
                        *next = with;
                        came = true;
                    } else {
                        self.applications.remove(&applicant.node);
                        let full = Refusal::Full(next.members.len() as u16);
                        self.send(applicant.node, Message::Refused(full));
                    }
                }
                Admission::Refuse(refusal) => {
                    self.applications.remove(&applicant.node);
                    self.send(applicant.node, Message::Refused(refusal));
                }
                Admission::Wait => {}
            }
        }
        came
    }

    fn admission(&mut self, next: &mut View, application: &Application) -> Admission {
        let applicant = &application.applicant;
        let Generation(theirs) = application.generation;
        if application.version != PROTOCOL_VERSION {
            return Admission::Refuse(Refusal::UnknownVersion {
                theirs: application.version,
                ours: PROTOCOL_VERSION,
            });
        }
        if !application.healthy {
            return Admission::Refuse(Refusal::Unhealthy);
        }
        match self.watch.slot(applicant.node) {
            Some(slot) if slot.incarnation == applicant.incarnation => {
                if let Some(why) = &slot.unfenceable {
                    return Admission::Refuse(Refusal::NoFence(why.clone()));
                }
                if slot.fingerprint != applicant.fingerprint || slot.addr != applicant.addr {
                    return Admission::Refuse(Refusal::WrongKey);
                }
            }
            Some(slot) if slot.incarnation > applicant.incarnation => {
                return Admission::Refuse(Refusal::WrongKey);
            }
            Some(_) | None => return Admission::Wait, // our last look at the slots is older than its claim
        }
        if next.was_in(applicant.node, applicant.incarnation) {
            return Admission::Refuse(Refusal::Ended);
        }
        if self.watch.standing(self.now, applicant.node, applicant.incarnation) != Standing::Well {
            return Admission::Wait; // it would be excluded again at once
        }
        if let Some(member) = next.member(applicant.node) {
            return Admission::Refuse(Refusal::FormerPending(member.incarnation));
        }
        if let Some(former) = next.recoveries.iter().find(|r| r.node == applicant.node) {
            return Admission::Refuse(match former.failed {
                true => Refusal::FormerFailed(former.incarnation),
                false => Refusal::FormerPending(former.incarnation),
            });
        }
        let Some(current) = self.view() else { return Admission::Wait };
        if theirs != current.generation.0 {
            let ours = current.generation;
            return Admission::Refuse(Refusal::WrongGeneration { theirs: application.generation, ours });
        }
        if application.names != current.names.version {
            let ours = current.names.version;
            return Admission::Refuse(Refusal::NamesUnknown { theirs: application.names, ours });
        }
        if next.members.len() >= usize::from(self.slots) {
            return Admission::Refuse(Refusal::Full(self.slots));
        }
        if next.members.values().any(|member| member.name == applicant.name) {
            return Admission::Refuse(Refusal::NameTaken(applicant.name.clone()));
        }
        if let Some(journal) = next.clean_journals().next() {
            return Admission::Admit(journal);
        }
        self.journal_for(next)
    }

    /// No journal is clean: one more is made, by this node, before anybody is admitted to it.
    fn journal_for(&mut self, next: &mut View) -> Admission {
        let index = next.journals;
        if index >= MAX_JOURNALS {
            return Admission::Refuse(Refusal::NoJournal(format!("there are {index} already")));
        }
        match &self.journal {
            Some((made, Work::Done)) if *made == index => {
                next.journals += 1;
                Admission::Admit(index)
            }
            Some((_, Work::UnderWay)) => Admission::Wait,
            Some((_, Work::Failed { why, at })) if self.now.since(*at) < ms(RETRY_MS) => {
                Admission::Refuse(Refusal::NoJournal(why.clone()))
            }
            Some((_, Work::Failed { .. } | Work::Done)) | None => {
                self.journal = Some((index, Work::UnderWay));
                self.out.push_back(Output::MakeJournal { index });
                Admission::Wait
            }
        }
    }
}
