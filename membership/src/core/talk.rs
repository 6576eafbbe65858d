//! What is said to others, and what is made of what they say. None of it decides: that is the register's part.

use std::sync::Arc;

use storage_control::NodeId;

use super::watch::Judgement;
use super::{Application, Membership, Phase, Who, Work, coordinator};
use crate::message::{Message, Refusal};
use crate::times::{HEARTBEAT_MS, ms};
use crate::view::View;

impl Membership {
    /// Shows a committed content to everybody connected; whom it excludes as well.
    pub(super) fn tell(&mut self, sequence: u64, view: &Arc<View>) {
        let connected: Vec<NodeId> = self
            .watch
            .peers
            .iter()
            .filter(|(_, peer)| peer.connected.is_some())
            .map(|(node, _)| *node)
            .collect();
        for node in connected {
            self.send(node, Message::Register { sequence, view: Box::new(View::clone(view)) });
        }
    }

    pub(super) fn received(&mut self, from: Who, message: Message) {
        let (node, incarnation) = from;
        match message {
            Message::Heartbeat { sequence, healthy, names, heard: _ } => {
                self.watch.said(from, healthy, names);
                self.compare(from, sequence);
            }
            Message::Join { applicant, version, generation, healthy, names } => {
                if (applicant.node, applicant.incarnation) == from {
                    self.watch.said(from, healthy, Some(names));
                    let application = Application { applicant, version, generation, healthy, names };
                    self.applications.insert(node, application);
                } else {
                    self.send(node, Message::Refused(Refusal::WrongKey));
                }
            }
            Message::Refused(refusal) => self.refused(node, refusal),
            Message::Register { sequence, view } => {
                // From a member as far as we know; a newer member's word waits for our own look at the register.
                if self.view().is_some_and(|known| known.is_member(node, incarnation)) {
                    self.adopt(sequence, Arc::new(*view));
                } else {
                    self.must_read = true;
                }
            }
            Message::Leave => {
                self.leavers.insert(from);
            }
            Message::Dead { node, incarnation } => {
                // Only a member's word counts, and never against ourselves: the register would tell us.
                if self.view().is_some_and(|view| view.is_member(from.0, from.1)) && node != self.me.node {
                    self.watch.proven_dead(node, incarnation);
                }
            }
            Message::Replayed { node, incarnation, failure } => {
                let named = self.view().and_then(|view| view.recovery(node, incarnation)?.replayer);
                if named == Some(from) {
                    let result = failure.map_or(Ok(()), Err);
                    self.replays.insert((node, incarnation), Work::ended(result, self.now));
                }
            }
            Message::Nominate { generation } => self.election.nominated = Some(generation),
            Message::Elected { generation } => self.election.elected = Some((node, incarnation, generation)),
            Message::Permit { generation } => self.election.permit = Some(generation),
            Message::Undo { generation } => self.election.undo = Some(generation),
            Message::Lost { generation } => {
                // Only a member's word counts; what was lost in an earlier view, this one has repaired.
                let counts =
                    |view: &Arc<View>| view.is_member(node, incarnation) && view.generation == generation;
                if self.view().is_some_and(counts) {
                    self.lost = Some(generation);
                }
            }
        }
    }

    /// A peer said what it knows of the register.
    pub(super) fn compare(&mut self, from: Who, theirs: u64) {
        let Some((ours, view)) = self.register.clone() else { return };
        if theirs > ours {
            self.moved = self.moved.or(Some(self.now));
        } else if theirs < ours && view.adm == self.me.node {
            self.send(from.0, Message::Register { sequence: ours, view: Box::new(View::clone(&view)) });
        }
    }

    pub(super) fn heartbeat(&mut self) {
        let Some((sequence, view)) = self.register.clone() else { return };
        let (heard, healthy) = self.publication();
        let names = self.names_known();
        for member in view.members.values() {
            if self.watch.is_connected(member.node, member.incarnation) {
                self.send(member.node, Message::Heartbeat { sequence, heard, healthy, names });
            }
        }
    }

    /// Tells the ADM (its successor, where it is lost) what it has to know, again and again until the register
    /// shows it.
    pub(super) fn report(&mut self, view: &View, judgement: &Judgement) {
        if self.now < self.next_ask {
            return;
        }
        let lost = judgement.out.contains(&view.adm);
        let adm = if lost { coordinator(view, judgement).unwrap_or(view.adm) } else { view.adm };
        let mut reports = Vec::new();
        for (who, work) in &self.replays {
            let mine = view.recovery(who.0, who.1).is_some_and(|r| r.replayer == Some(self.who()));
            let failure = match work {
                Work::UnderWay => continue,
                Work::Done => None,
                Work::Failed { why, .. } => Some(why.clone()),
            };
            if mine {
                reports.push(Message::Replayed { node: who.0, incarnation: who.1, failure });
            }
        }
        for member in view.members.values().filter(|member| member.node != adm) {
            if self.watch.is_proven_dead(member.node, member.incarnation) {
                reports.push(Message::Dead { node: member.node, incarnation: member.incarnation });
            }
        }
        if self.phase == Phase::Leaving
            && reports.is_empty()
            && !self.replays.values().any(|w| *w == Work::UnderWay)
        {
            reports.push(Message::Leave);
        }
        if self.lost == Some(view.generation) {
            reports.push(Message::Lost { generation: view.generation });
        }
        if !reports.is_empty() {
            self.next_ask = self.now + ms(HEARTBEAT_MS);
        }
        if adm != self.me.node {
            reports.into_iter().for_each(|report| self.send(adm, report));
        }
    }
}
