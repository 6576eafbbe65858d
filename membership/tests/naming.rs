//! Who does not know the names of all devices does not become ADM (SMS-10), and what else makes a node fit for the office
//! (SMS-6): small stories, told to a single core.

mod story;

use membership::times::{ELECTION_MS, HEARTBEAT_MS, RETRY_MS, STALL_MS};
use membership::{CloseReason, Input, Message, Notice, Output, Phase, Refusal, View};
use storage_control::{Generation, Incarnation, NodeId};

use story::{ME, SLOTS, Story, applicant, names};

/// This node (slot 0, the coordinator once the ADM is lost), the ADM in slot 1, and members in slots 2 and 3.
fn four() -> Story {
    let mut story = Story::formed(4);
    for node in 1..SLOTS {
        let member = applicant(node, 1);
        story.connect(&member);
        assert_eq!(story.ask(&member, |_| ()), None);
        assert!(story.is_member(&member));
    }
    story.renew(|view| view.adm = NodeId(1));
    story
}

/// A new version of the naming database: the device is called otherwise.
fn rename(view: &mut View) {
    view.names.version = view.generation;
    view.names.devices[0].name = format!("disk-{}", view.generation).parse().expect("a name");
}

fn lose_adm(story: &mut Story) {
    story.outputs.clear();
    story.alive.retain(|slot| slot.node != NodeId(1));
    story.give(Input::ProvenDead { node: NodeId(1), incarnation: Incarnation(1) });
}

fn nominated(story: &Story) -> Vec<NodeId> {
    let nominee = |output: &Output| match output {
        Output::Send { to, message: Message::Nominate { .. } } => Some(*to),
        _ => None,
    };
    story.outputs.iter().filter_map(nominee).collect()
}

fn candidate(story: &Story) -> Option<NodeId> {
    story.register.1.candidate.map(|candidate| candidate.node)
}

/// SMS-7: the names of the devices come before everything else.
#[test]
fn a_node_that_has_not_found_the_devices_yet_neither_forms_nor_joins() {
    let mut story = Story::outside(View::empty(2, names()));
    story.devices = None;
    story.give(Input::Tick);
    story.pass(1_000);
    assert!(story.wants(|o| matches!(o, Output::FindDevices(view) if view.names == names())));
    assert!(!story.wants(|o| matches!(o, Output::Cas { .. })));
    story.give(Input::DevicesFound { version: Generation(0), result: Ok(()) });
    assert_eq!(*story.core.phase(), Phase::Member);
}

#[test]
fn a_device_that_is_not_here_ends_the_mount_with_the_reason() {
    let mut story = Story::outside(View::empty(2, names()));
    story.devices = Some(Err(String::from("device disk1 is not here")));
    story.give(Input::Tick);
    let closes =
        |o: &Output| matches!(o, Output::CloseGate(CloseReason::Devices(why)) if why.contains("disk1"));
    assert!(story.wants(closes) && !story.wants(|o| matches!(o, Output::Cas { .. })));
    assert_eq!(*story.core.phase(), Phase::Over);
}

#[test]
fn an_applicant_that_knows_other_names_is_asked_to_look_again() {
    let mut story = Story::formed(2);
    story.renew(rename);
    let newcomer = applicant(2, 1);
    story.connect(&newcomer);
    let refusal = story.ask(&newcomer, |message| {
        let Message::Join { names, .. } = message else { unreachable!("it is a join") };
        *names = Generation(0);
    });
    let ours = story.register.1.names.version;
    assert_eq!(refusal, Some(Refusal::NamesUnknown { theirs: Generation(0), ours }));
    assert!(refusal.expect("a refusal").is_transient() && !story.is_member(&newcomer));
    assert_eq!(story.ask(&newcomer, |_| ()), None);
    assert!(story.is_member(&newcomer));
}

#[test]
fn a_coordinator_that_does_not_know_the_names_picks_another() {
    let mut story = four();
    story.devices = Some(Err(String::from("device disk2 is not here")));
    story.renew(rename);
    lose_adm(&mut story);
    assert_eq!(nominated(&story), [NodeId(2)]);
    story.pass(ELECTION_MS + 500);
    assert_eq!(nominated(&story).last(), Some(&NodeId(3)), "the first did not answer in time");
    assert_eq!(candidate(&story), None);
}

#[test]
fn members_that_do_not_say_that_they_know_the_names_are_not_picked() {
    let mut story = four();
    story.devices = None;
    story.says = (2..SLOTS).map(|node| (NodeId(node), Some(Generation(0)))).collect();
    story.renew(rename);
    lose_adm(&mut story);
    story.pass(2 * ELECTION_MS);
    assert!(nominated(&story).is_empty() && candidate(&story).is_none());
    assert!(story.wants(|o| matches!(o, Output::Notice(Notice::NoCandidate))));

    // One finds them: it is picked. And then this node does, and stands itself.
    story.says.remove(&NodeId(3));
    story.pass(HEARTBEAT_MS);
    assert_eq!(nominated(&story).first(), Some(&NodeId(3)));
    let version = story.register.1.names.version;
    story.give(Input::DevicesFound { version, result: Ok(()) });
    assert_eq!(story.register.1.adm, NodeId(ME));
}

#[test]
fn a_nominated_member_that_does_not_know_the_names_does_not_stand() {
    let mut story = four();
    story.devices = None;
    story.renew(rename);
    let generation = story.register.1.generation;
    let nominate = |story: &mut Story| {
        let message = Message::Nominate { generation };
        story.give(Input::Received { node: NodeId(2), incarnation: Incarnation(1), message });
    };
    nominate(&mut story);
    assert_eq!(story.register.1.burnt, generation);
    story.give(Input::DevicesFound { version: generation, result: Ok(()) });
    nominate(&mut story);
    // Taken, and given up again as the ADM is there.
    assert_eq!((story.register.1.burnt, candidate(&story)), (Generation(generation.0 + 1), None));
}

#[test]
fn a_leaving_adm_gives_its_office_only_to_a_member_that_knows_the_names() {
    let mut story = four();
    story.renew(|view| {
        view.adm = NodeId(ME);
        rename(view);
    });
    let old = Some(Generation(0));
    story.says = (1..SLOTS).map(|node| (NodeId(node), old)).collect();
    story.pass(HEARTBEAT_MS);
    story.give(Input::Leave);
    story.pass(1_000);
    assert_eq!((story.register.1.adm, story.register.1.members.len()), (NodeId(ME), 4), "nobody can take it");
    story.says.remove(&NodeId(3));
    story.pass(HEARTBEAT_MS);
    assert_eq!((story.register.1.adm, story.register.1.members.len()), (NodeId(3), 3));
    assert!(story.wants(|o| matches!(o, Output::Left)));
}

#[test]
fn a_member_says_which_names_it_knows_and_looks_again_after_a_failure() {
    let mut story = four();
    let said = |story: &Story| {
        let names = |output: &Output| match output {
            Output::Send { message: Message::Heartbeat { names, .. }, .. } => Some(*names),
            _ => None,
        };
        story.outputs.iter().filter_map(names).next_back()
    };
    story.pass(HEARTBEAT_MS);
    assert_eq!(said(&story), Some(Some(Generation(0))));
    story.devices = Some(Err(String::from("device disk2 is not here")));
    story.renew(rename);
    story.pass(HEARTBEAT_MS);
    assert_eq!((said(&story), story.core.phase()), (Some(None), &Phase::Member), "it stays a member");
    story.devices = Some(Ok(()));
    story.pass(RETRY_MS + HEARTBEAT_MS);
    assert_eq!(said(&story), Some(Some(story.register.1.names.version)));
}

#[test]
fn an_answer_about_names_of_the_past_is_not_taken_for_the_present() {
    let mut story = four();
    story.devices = None;
    story.renew(rename);
    let past = story.register.1.names.version;
    story.renew(rename);
    story.give(Input::DevicesFound { version: past, result: Ok(()) });
    lose_adm(&mut story);
    assert_eq!((candidate(&story), nominated(&story)), (None, vec![NodeId(2)]));
}

/// SMS-6: the candidate reaches the storage. The coordinator is not the candidate where it does not itself.
#[test]
fn a_coordinator_that_does_not_reach_its_storage_picks_another_at_once() {
    let mut story = four();
    let others = std::mem::take(&mut story.alive);
    for _ in 0..STALL_MS / 100 + 2 {
        story.now_ms += 100;
        for slot in &others {
            let names = Some(Generation(0));
            let message = Message::Heartbeat { sequence: 0, heard: slot.heard, healthy: true, names };
            story.give(Input::Received { node: slot.node, incarnation: slot.incarnation, message });
        }
    }
    lose_adm(&mut story);
    assert_eq!((candidate(&story), nominated(&story)), (None, vec![NodeId(2)]));
}

#[test]
fn a_member_that_does_not_reach_its_storage_is_passed_over() {
    let mut story = four();
    story.devices = None;
    story.renew(rename);
    story.alive[1].healthy = false;
    story.pass(HEARTBEAT_MS);
    lose_adm(&mut story);
    assert_eq!(nominated(&story), [NodeId(3)]);
}
