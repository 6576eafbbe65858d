//! Small stories, told to a single core whose register, devices and peers the test plays.

use std::collections::BTreeMap;
use std::sync::Arc;

use membership::frame::PROTOCOL_VERSION;
use membership::{
    Applicant, CasOutcome, Input, Membership, Message, NamingDatabase, NodeSet, Output, Phase, Refusal,
    SlotSeen, View,
};
use storage_control::{DeviceId, Generation, Incarnation, Instant, NodeId};

pub(crate) const ME: u16 = 0;
pub(crate) const SLOTS: u16 = 4;

pub(crate) fn applicant(node: u16, incarnation: u64) -> Applicant {
    Applicant {
        node: NodeId(node),
        incarnation: Incarnation(incarnation),
        name: format!("n{node}"),
        addr: "10.0.0.1:7000".parse().expect("an address"),
        fingerprint: [node as u8; 32],
    }
}

pub(crate) fn names() -> NamingDatabase {
    NamingDatabase::of_one("disk1".parse().expect("a name"), DeviceId([1; 16]), 20_000)
}

fn slot(applicant: &Applicant, sequence: u64) -> SlotSeen {
    SlotSeen {
        node: applicant.node,
        incarnation: applicant.incarnation,
        sequence,
        heard: NodeSet::from_iter((0..SLOTS).map(NodeId)),
        healthy: true,
        stopped: false,
        unfenceable: None,
        name: applicant.name.clone(),
        addr: applicant.addr,
        fingerprint: applicant.fingerprint,
    }
}

/// The ADM's core, the register, and the other nodes' slots.
pub(crate) struct Story {
    pub(crate) core: Membership,
    pub(crate) now_ms: u64,
    pub(crate) register: (u64, Arc<View>),
    /// Slots that are renewed with every step.
    pub(crate) alive: Vec<SlotSeen>,
    /// What comes of looking for the devices; `None`: no answer yet.
    pub(crate) devices: Option<Result<(), String>>,
    /// Who says that it knows another version of the naming database than the current one.
    pub(crate) says: BTreeMap<NodeId, Option<Generation>>,
    pub(crate) outputs: Vec<Output>,
}

impl Story {
    /// A matrix with this node as its only member, and this many journals.
    pub(crate) fn formed(journals: u16) -> Story {
        let mut story = Story::outside(View::empty(journals, names()));
        story.give(Input::Tick);
        assert_eq!(*story.core.phase(), Phase::Member);
        story.outputs.clear();
        story
    }

    pub(crate) fn outside(view: View) -> Story {
        let now_ms = 1_000_000;
        Story {
            core: Membership::new(applicant(ME, 1), SLOTS, Instant(now_ms * 1_000_000)),
            now_ms,
            register: (1, Arc::new(view)),
            alive: Vec::new(),
            devices: Some(Ok(())),
            says: BTreeMap::new(),
            outputs: Vec::new(),
        }
    }

    /// Gives an input and answers the register's outputs, as long as there are any.
    pub(crate) fn give(&mut self, input: Input) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            self.core.handle(Instant(self.now_ms * 1_000_000), input);
            while let Some(output) = self.core.poll() {
                match &output {
                    Output::ReadRegister => inputs.push(Input::RegisterRead(Some(self.register.clone()))),
                    Output::Cas { expected, view } => {
                        assert_eq!(*expected, self.register.0);
                        view.check().expect("a view");
                        self.register = (expected + 1, Arc::clone(view));
                        inputs.push(Input::CasDone(CasOutcome::Committed(expected + 1)));
                    }
                    Output::FindDevices(view) => {
                        let version = view.names.version;
                        let found = self.devices.clone();
                        inputs.extend(found.map(|result| Input::DevicesFound { version, result }));
                    }
                    _ => {}
                }
                self.outputs.push(output);
            }
        }
    }

    /// Time passes; the living renew their slots and speak.
    pub(crate) fn pass(&mut self, millis: u64) {
        let end = self.now_ms + millis;
        while self.now_ms < end {
            self.now_ms += 100;
            self.alive.iter_mut().for_each(|slot| slot.sequence += 1);
            self.give(Input::Slots(self.alive.clone()));
            for slot in self.alive.clone() {
                let heard = slot.heard;
                let current = Some(self.register.1.names.version);
                let names = self.says.get(&slot.node).copied().unwrap_or(current);
                let message = Message::Heartbeat { sequence: 0, heard, healthy: slot.healthy, names };
                self.give(Input::Received { node: slot.node, incarnation: slot.incarnation, message });
            }
        }
    }

    /// Another node writes a new view.
    pub(crate) fn renew(&mut self, change: impl FnOnce(&mut View)) {
        let mut view = View::clone(&self.register.1);
        view.generation = Generation(view.generation.0 + 1);
        view.burnt = view.generation;
        change(&mut view);
        view.check().expect("a view");
        self.register = (self.register.0 + 1, Arc::new(view));
        self.give(Input::RegisterMoved);
        self.pass(300);
        self.outputs.clear();
    }

    pub(crate) fn connect(&mut self, applicant: &Applicant) {
        self.alive.push(slot(applicant, 1));
        self.pass(200);
        self.give(Input::Connected { node: applicant.node, incarnation: applicant.incarnation });
    }

    pub(crate) fn ask(
        &mut self,
        applicant: &Applicant,
        change: impl FnOnce(&mut Message),
    ) -> Option<Refusal> {
        let generation = self.register.1.generation;
        let mut message = Message::Join {
            applicant: applicant.clone(),
            version: PROTOCOL_VERSION,
            generation,
            healthy: true,
            names: self.register.1.names.version,
        };
        change(&mut message);
        self.outputs.clear();
        self.give(Input::Received { node: applicant.node, incarnation: applicant.incarnation, message });
        self.outputs.iter().find_map(|output| match output {
            Output::Send { to, message: Message::Refused(refusal) } if *to == applicant.node => {
                Some(refusal.clone())
            }
            _ => None,
        })
    }

    pub(crate) fn is_member(&self, applicant: &Applicant) -> bool {
        self.register.1.is_member(applicant.node, applicant.incarnation)
    }

    pub(crate) fn wants(&self, wanted: impl Fn(&Output) -> bool) -> bool {
        self.outputs.iter().any(wanted)
    }
}
