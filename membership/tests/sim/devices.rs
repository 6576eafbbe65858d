//! The naming database in the simulation: devices that are renamed, and nodes that do not find them.

use std::sync::Arc;

use membership::{Input, NamingDatabase, Phase, View};
use storage_control::{DeviceId, Generation};

use super::{Event, Who, World};

pub(super) fn names() -> NamingDatabase {
    NamingDatabase::of_one("disk1".parse().expect("a name"), DeviceId([1; 16]), 20_000)
}

impl World {
    /// A device that is not there keeps a node out, or unfit for the office, until it is there again.
    pub(super) fn find_devices(&mut self, who: Who, version: Generation, delay: u64) {
        let missing = self.now < self.trouble_until && self.random.chance(25);
        let result = if missing { Err(String::from("a device is not here")) } else { Ok(()) };
        let delay = delay * if self.random.chance(20) { 100 } else { 1 };
        self.after(delay, Event::Devices(who, version, result));
    }

    pub(super) fn devices_found(&mut self, who: Who, version: Generation, result: Result<(), String>) {
        if result.is_ok() {
            let known = self.knows.entry(who).or_insert(version);
            *known = version.max(*known);
        }
        self.give(who, Input::DevicesFound { version, result });
    }

    /// The devices change: a view of the same members with another version of the naming database (SMS-9).
    pub(super) fn change_devices(&mut self) {
        let mut next = View::clone(&self.register.1);
        if next.members.is_empty() {
            return;
        }
        next.burnt = Generation(next.burnt.0 + 1);
        next.generation = next.burnt;
        next.candidate = None;
        next.names.version = next.generation;
        next.names.devices[0].name = format!("disk-{}", next.generation).parse().expect("a name");
        let adm = next.member(next.adm).map(|adm| (adm.node, adm.incarnation)).expect("the ADM is a member");
        self.note(format!("the devices change in generation {}", next.generation));
        self.commit(adm, Arc::new(next));
        // The office goes from hand to hand while hardly anybody knows the new names.
        let member = self.nodes.get(&adm.0).is_some_and(|n| n.who == adm && *n.core.phase() == Phase::Member);
        if member && self.random.chance(40) {
            self.note(format!("{adm:?} wants to leave"));
            self.leaving.insert(adm);
            self.give(adm, Input::Leave);
        }
    }

    /// No node takes the office of ADM, or stands for it, that has not found the devices of the current naming
    /// database (SMS-10).
    pub(super) fn check_names(&self, before: &View, view: &View) {
        let knows = |who: Who| self.knows.get(&who) == Some(&view.names.version);
        let adm = view.member(view.adm).map(|adm| (adm.node, adm.incarnation));
        if let Some(adm) = adm.filter(|adm| before.adm != adm.0 || !before.is_member(adm.0, adm.1))
            && !knows(adm)
        {
            self.fail(&format!("{adm:?} becomes ADM and does not know the devices"));
        }
        let candidate = view.candidate.filter(|candidate| before.candidate != Some(*candidate));
        if let Some(who) = candidate.map(|c| (c.node, c.incarnation)).filter(|who| !knows(*who)) {
            self.fail(&format!("{who:?} stands for ADM and does not know the devices"));
        }
        let newcomer = view.members.values().map(|m| (m.node, m.incarnation));
        if let Some(who) = newcomer.filter(|who| !before.is_member(who.0, who.1)).find(|who| !knows(*who)) {
            self.fail(&format!("{who:?} is admitted and does not know the devices"));
        }
    }
}
