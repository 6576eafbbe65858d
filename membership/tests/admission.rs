//! Who is let in, who is not and why, and the other things that one node decides alone: small stories, told to a single
//! core whose register this test plays.

mod story;

use std::sync::Arc;

use membership::frame::PROTOCOL_VERSION;
use membership::times::{DISK_SILENCE_MS, HEARTBEAT_MS, RETRY_MS, SILENCE_MS};
use membership::{
    Applicant, CloseReason, FenceState, Input, Membership, Message, Output, Phase, Refusal, View,
};
use storage_control::{Generation, Incarnation, Instant, NodeId};

use story::{ME, SLOTS, Story, applicant};

#[test]
fn an_applicant_gets_shards_and_a_clean_journal() {
    let mut story = Story::formed(2);
    let newcomer = applicant(2, 1);
    story.connect(&newcomer);
    assert_eq!(story.ask(&newcomer, |_| ()), None);
    assert!(story.is_member(&newcomer));
    let view = &story.register.1;
    assert_eq!(view.member(NodeId(2)).expect("a member").journal, 1);
    assert_eq!(view.shards.of(NodeId(2)).len(), 512);
    assert!(story.wants(|o| matches!(o, Output::InstallView(view) if view.members.len() == 2)));
}

#[test]
fn a_journal_is_made_before_its_owner_is_admitted() {
    let mut story = Story::formed(1);
    let newcomer = applicant(2, 1);
    story.connect(&newcomer);
    assert_eq!(story.ask(&newcomer, |_| ()), None);
    assert!(!story.is_member(&newcomer) && story.wants(|o| matches!(o, Output::MakeJournal { index: 1 })));
    story.give(Input::JournalMade { index: 1, result: Ok(()) });
    assert!(story.is_member(&newcomer));
    assert_eq!(story.register.1.journals, 2);
}

#[test]
fn a_journal_that_cannot_be_made_is_a_refusal_and_is_tried_again_later() {
    let mut story = Story::formed(1);
    let newcomer = applicant(2, 1);
    story.connect(&newcomer);
    story.ask(&newcomer, |_| ());
    story.outputs.clear();
    story.give(Input::JournalMade { index: 1, result: Err(String::from("no space")) });
    assert!(
        story.wants(|o| matches!(o, Output::Send { message: Message::Refused(Refusal::NoJournal(_)), .. }))
    );
    story.pass(RETRY_MS + 100);
    assert_eq!(story.ask(&newcomer, |_| ()), None);
    assert!(story.wants(|o| matches!(o, Output::MakeJournal { index: 1 })));
}

#[test]
fn a_key_that_is_not_the_slots_is_refused() {
    let mut story = Story::formed(2);
    let newcomer = applicant(2, 1);
    story.connect(&newcomer);
    let forged = Applicant { fingerprint: [9; 32], ..newcomer };
    assert_eq!(story.ask(&forged, |_| ()), Some(Refusal::WrongKey));
    let in_anothers_name = Applicant { node: NodeId(3), ..applicant(2, 1) };
    let message = Message::Join {
        applicant: in_anothers_name,
        version: PROTOCOL_VERSION,
        generation: story.register.1.generation,
        healthy: true,
        names: story.register.1.names.version,
    };
    story.outputs.clear();
    story.give(Input::Received { node: NodeId(2), incarnation: Incarnation(1), message });
    assert!(story.wants(|o| matches!(o, Output::Send { message: Message::Refused(Refusal::WrongKey), .. })));
}

#[test]
fn another_generation_version_or_health_is_refused_with_its_name() {
    let mut story = Story::formed(2);
    let newcomer = applicant(2, 1);
    story.connect(&newcomer);
    let ours = story.register.1.generation;
    let refusal = story.ask(&newcomer, |message| {
        let Message::Join { generation, .. } = message else { unreachable!("it is a join") };
        *generation = Generation(99);
    });
    assert_eq!(refusal, Some(Refusal::WrongGeneration { theirs: Generation(99), ours }));
    let refusal = story.ask(&newcomer, |message| {
        let Message::Join { version, .. } = message else { unreachable!("it is a join") };
        *version = 7;
    });
    assert_eq!(refusal, Some(Refusal::UnknownVersion { theirs: 7, ours: PROTOCOL_VERSION }));
    let refusal = story.ask(&newcomer, |message| {
        let Message::Join { healthy, .. } = message else { unreachable!("it is a join") };
        *healthy = false;
    });
    assert_eq!(refusal, Some(Refusal::Unhealthy));
    assert!(!story.is_member(&newcomer));
}

#[test]
fn a_full_matrix_and_a_taken_name_are_refused() {
    let mut story = Story::formed(5);
    for node in 1..SLOTS {
        let member = applicant(node, 1);
        story.connect(&member);
        assert_eq!(story.ask(&member, |_| ()), None);
    }
    let late = applicant(SLOTS, 1);
    story.connect(&late);
    assert_eq!(story.ask(&late, |_| ()), Some(Refusal::Full(SLOTS)));

    let mut story = Story::formed(2);
    let namesake = Applicant { name: format!("n{ME}"), ..applicant(2, 1) };
    story.connect(&namesake);
    assert_eq!(story.ask(&namesake, |_| ()), Some(Refusal::NameTaken(format!("n{ME}"))));
}

#[test]
fn a_node_that_could_not_be_fenced_is_refused() {
    let mut story = Story::formed(2);
    let newcomer = applicant(2, 1);
    story.connect(&newcomer);
    story.alive[0].unfenceable = Some(String::from("writes to this device live for ever"));
    story.pass(100);
    assert!(matches!(story.ask(&newcomer, |_| ()), Some(Refusal::NoFence(_))));
}

/// Restart of a daemon whose former incarnation is a member still: excluded, fenced, replayed, then let in.
#[test]
fn a_restarted_node_waits_for_the_recovery_of_its_former_self() {
    let mut story = Story::formed(2);
    let (former, heir) = (applicant(2, 1), applicant(2, 2));
    story.connect(&former);
    story.ask(&former, |_| ());
    assert!(story.is_member(&former));
    story.alive.clear();
    story.outputs.clear();
    story.connect(&heir);
    // Its slot alone tells: the claim of the slot was only possible after the former's end.
    assert!(story.wants(|o| matches!(o, Output::Fence { node: NodeId(2), incarnation: Incarnation(1) })));
    assert_eq!(story.ask(&heir, |_| ()), Some(Refusal::FormerPending(Incarnation(1))));
    story.give(Input::FenceDone { node: NodeId(2), incarnation: Incarnation(1), result: Ok(()) });
    assert_eq!(story.register.1.recoveries[0].state, FenceState::FencedDirty);
    assert!(story.wants(|o| matches!(o, Output::Replay { journal: 1, .. })));
    story.outputs.clear();
    story.give(Input::ReplayDone { node: NodeId(2), incarnation: Incarnation(1), result: Ok(()) });
    let told = |o: &Output| matches!(o, Output::Recovered { node: NodeId(2), incarnation: Incarnation(1) });
    assert!(story.wants(told));
    assert_eq!(story.ask(&heir, |_| ()), None);
    assert!(story.is_member(&heir));
}

#[test]
fn a_failed_replay_leaves_the_recovery_open_and_the_node_outside() {
    let mut story = Story::formed(2);
    let (former, heir) = (applicant(2, 1), applicant(2, 2));
    story.connect(&former);
    story.ask(&former, |_| ());
    story.alive.clear();
    story.connect(&heir);
    story.give(Input::FenceDone { node: NodeId(2), incarnation: Incarnation(1), result: Ok(()) });
    story.give(Input::ReplayDone {
        node: NodeId(2),
        incarnation: Incarnation(1),
        result: Err(String::from("rotten")),
    });
    assert!(story.register.1.recoveries[0].failed);
    assert!(!story.wants(|o| matches!(o, Output::Recovered { .. })));
    assert_eq!(story.ask(&heir, |_| ()), Some(Refusal::FormerFailed(Incarnation(1))));
}

#[test]
fn silence_on_network_and_disk_is_death_after_five_seconds() {
    let mut story = Story::formed(2);
    let member = applicant(2, 1);
    story.connect(&member);
    story.ask(&member, |_| ());
    story.pass(2_000);
    let quiet = std::mem::take(&mut story.alive);
    let still = |story: &mut Story, millis: u64| {
        for _ in 0..millis / 100 {
            story.now_ms += 100;
            story.give(Input::Slots(quiet.clone()));
        }
    };
    still(&mut story, SILENCE_MS - 200);
    assert!(story.is_member(&member));
    still(&mut story, 300);
    assert!(!story.is_member(&member));
    assert!(story.wants(|o| matches!(o, Output::Fence { node: NodeId(2), .. })));
}

/// A stall that everybody sees excludes nobody: the observer's own reads were missing too.
#[test]
fn an_own_stall_starts_every_window_anew() {
    let mut story = Story::formed(2);
    let member = applicant(2, 1);
    story.connect(&member);
    story.ask(&member, |_| ());
    story.pass(2_000);
    story.now_ms += 2 * DISK_SILENCE_MS; // stopped, or the array hangs
    story.give(Input::Slots(story.alive.clone()));
    story.pass(HEARTBEAT_MS);
    assert!(story.is_member(&member));
}

#[test]
fn a_proof_of_death_excludes_at_once() {
    let mut story = Story::formed(2);
    let member = applicant(2, 1);
    story.connect(&member);
    story.ask(&member, |_| ());
    story.outputs.clear();
    story.give(Input::Disconnected { node: NodeId(2), incarnation: Incarnation(1) });
    assert!(story.is_member(&member) && story.wants(|o| matches!(o, Output::Probe { node: NodeId(2), .. })));
    story.give(Input::ProvenDead { node: NodeId(2), incarnation: Incarnation(1) });
    assert!(!story.is_member(&member));
    assert!(story.wants(|o| matches!(o, Output::Fence { node: NodeId(2), .. })));
}

/// Lost messages are repaired by a new view of the same members: the lock manager tells everything anew.
#[test]
fn a_connection_that_broke_and_came_back_brings_a_new_view() {
    let mut story = Story::formed(2);
    let member = applicant(2, 1);
    story.connect(&member);
    story.ask(&member, |_| ());
    let before = story.register.1.generation;
    story.give(Input::Disconnected { node: NodeId(2), incarnation: Incarnation(1) });
    story.pass(300);
    assert_eq!(story.register.1.generation, before);
    story.give(Input::Connected { node: NodeId(2), incarnation: Incarnation(1) });
    assert!(story.register.1.generation > before && story.is_member(&member));
}

/// The same between two members that are not the ADM: it learns of it from them.
#[test]
fn a_member_tells_the_adm_what_connection_broke_until_a_new_view_is_there() {
    let mut story = Story::formed(3);
    for member in [applicant(1, 1), applicant(2, 1)] {
        story.connect(&member);
        story.ask(&member, |_| ());
    }
    let told = |story: &Story, adm: u16, of: Generation| {
        let wanted = Message::Lost { generation: of };
        let asks = |o: &&Output| matches!(o, Output::Send { to, message } if *to == NodeId(adm) && *message == wanted);
        story.outputs.iter().filter(asks).count()
    };
    let breaks = |story: &mut Story| {
        story.give(Input::Disconnected { node: NodeId(2), incarnation: Incarnation(1) });
        story.pass(300);
        story.outputs.clear();
        story.give(Input::Connected { node: NodeId(2), incarnation: Incarnation(1) });
    };
    let renew = |story: &mut Story, adm: u16| story.renew(|view| view.adm = NodeId(adm));
    renew(&mut story, 1);
    let generation = story.register.1.generation;
    breaks(&mut story);
    story.pass(3 * HEARTBEAT_MS);
    assert!((3..=5).contains(&told(&story, 1, generation)), "{}", told(&story, 1, generation));
    renew(&mut story, 1);
    story.pass(3 * HEARTBEAT_MS);
    let later = Generation(generation.0 + 1);
    assert_eq!(told(&story, 1, generation) + told(&story, 1, later), 0);

    // The next view comes while the connection is away, from another ADM: who was told before need not be there.
    story.give(Input::Disconnected { node: NodeId(2), incarnation: Incarnation(1) });
    renew(&mut story, 2);
    story.give(Input::Connected { node: NodeId(2), incarnation: Incarnation(1) });
    let later = Generation(generation.0 + 2);
    assert_eq!((told(&story, 1, later), told(&story, 2, later)), (0, 1));
}

#[test]
fn only_a_members_word_about_lost_messages_of_this_view_brings_a_new_one() {
    let mut story = Story::formed(3);
    let (member, stranger) = (applicant(1, 1), applicant(2, 1));
    story.connect(&member);
    story.ask(&member, |_| ());
    story.connect(&stranger);
    let before = story.register.1.generation;
    let says = |story: &mut Story, who: &Applicant, generation: Generation| {
        let message = Message::Lost { generation };
        story.give(Input::Received { node: who.node, incarnation: who.incarnation, message });
    };
    says(&mut story, &stranger, before);
    says(&mut story, &member, Generation(before.0 - 1));
    assert_eq!(story.register.1.generation, before);
    says(&mut story, &member, before);
    assert!(story.register.1.generation > before && story.is_member(&member));
    let after = story.register.1.generation;
    says(&mut story, &member, before);
    assert_eq!(story.register.1.generation, after, "one view for both ends of the connection");
}

#[test]
fn a_member_that_finds_itself_excluded_stops_for_good() {
    let mut story = Story::formed(2);
    let mut without = View::clone(&story.register.1);
    without.generation = Generation(without.generation.0 + 1);
    without.burnt = without.generation;
    without.members.clear();
    story.register = (story.register.0 + 1, Arc::new(without));
    story.give(Input::RegisterMoved);
    assert!(!story.wants(|o| matches!(o, Output::ReadRegister)), "who committed it is about to tell");
    story.pass(200);
    assert!(story.wants(|o| matches!(o, Output::CloseGate(CloseReason::Excluded(_)))));
    assert_eq!(*story.core.phase(), Phase::Over);
}

#[test]
fn a_lapsed_lease_comes_back_only_after_a_fresh_read() {
    let mut story = Story::formed(1);
    story.give(Input::LeaseLapsed);
    let at = |wanted: fn(&Output) -> bool| story.outputs.iter().position(wanted);
    let read = at(|o| matches!(o, Output::ReadRegister)).expect("a read");
    let revived = at(|o| matches!(o, Output::ReviveLease)).expect("revived");
    assert!(read < revived);
}

#[test]
fn a_former_gives_up_where_a_journal_cannot_be_replayed() {
    let mut story = Story::formed(1);
    let mut view = View::clone(&story.register.1);
    // The next start of the same node: its former self is the only member.
    view.past.insert(NodeId(ME), Incarnation(1));
    story = Story { core: Membership::new(applicant(ME, 2), SLOTS, Instant(0)), ..Story::outside(view) };
    story.give(Input::Tick);
    assert!(story.wants(|o| matches!(o, Output::Fence { node: NodeId(ME), incarnation: Incarnation(1) })));
    story.give(Input::FenceDone { node: NodeId(ME), incarnation: Incarnation(1), result: Ok(()) });
    assert!(story.wants(|o| matches!(o, Output::Replay { journal: 0, .. })));
    let result = Err(String::from("rotten"));
    story.give(Input::ReplayDone { node: NodeId(ME), incarnation: Incarnation(1), result });
    assert!(story.wants(|o| matches!(o, Output::CloseGate(CloseReason::Unrecoverable { journal: 0, .. }))));
    assert!(story.register.1.members.is_empty());
}

/// Found by tests/sim (SEED=886): the disk was away while a former replayed, and no node could ever mount again.
#[test]
fn the_next_former_tries_a_failed_replay_again() {
    let mut story = Story::formed(1);
    let mut view = View::clone(&story.register.1);
    view.past.insert(NodeId(ME), Incarnation(1));
    for incarnation in 2..4 {
        story = Story {
            core: Membership::new(applicant(ME, incarnation), SLOTS, Instant(0)),
            ..Story::outside(view.clone())
        };
        story.give(Input::Tick);
        let mut fenced = 0;
        while let Some(Output::Fence { node, incarnation }) =
            story.outputs.iter().filter(|o| matches!(o, Output::Fence { .. })).nth(fenced).cloned()
        {
            fenced += 1;
            story.give(Input::FenceDone { node, incarnation, result: Ok(()) });
        }
        assert!(story.wants(|o| matches!(o, Output::Replay { journal: 0, .. })), "start {incarnation}");
        let result = Err(String::from("the device is away"));
        story.give(Input::ReplayDone { node: NodeId(ME), incarnation: Incarnation(1), result });
        view = View::clone(&story.register.1);
        assert!(view.recoveries.iter().any(|recovery| recovery.failed));
    }
}
