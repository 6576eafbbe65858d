//! The chain of committed values, under every interleaving of small worlds and random ones of larger worlds.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

/// What one node does in a world: its slot, and after which other actors it may start.
#[derive(Clone, Copy)]
struct Actor {
    slot: u16,
    /// Starts only when this actor has crashed or ended: the next owner of its slot, after its fence.
    after: Option<usize>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
#[allow(clippy::large_enum_variant, reason = "worlds are small")]
enum Life {
    Waiting,
    Running { core: Core, pending: Vec<Output>, runs_left: u8, expected: u64 },
    Ended,
    Crashed,
}

/// Acceptors, actors, and what was committed. Bodies are left out: the hash stands for them.
#[derive(Clone, PartialEq, Eq, Hash)]
struct World {
    acceptors: Vec<Vec<Block>>,
    actors: Vec<Life>,
    /// Writes of crashed actors that have not landed yet.
    late: Vec<(usize, usize, u16, Block)>,
    committed: Vec<Value>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Move {
    Start(usize),
    /// Carry out one pending output.
    Do(usize, usize),
    /// The write happens, the answer is lost.
    Fail(usize, usize),
    Crash(usize),
    /// Crash with one write still under way.
    CrashLate(usize, usize),
    Land(usize),
}

struct Rules {
    actors: Vec<Actor>,
    runs: u8,
    /// Deaths are of interest only where someone follows.
    crashes: bool,
    failures: bool,
    late_writes: bool,
    /// What must not be done: clear a slot's block for its next owner.
    clear_blocks: bool,
    /// What must not be done: let the next owner start while a late write can still land.
    ignore_write_life: bool,
}

fn op_of(actor: usize, run: u8) -> OpId {
    OpId((actor as u128 + 1) << 8 | u128::from(run))
}

impl World {
    fn new(rules: &Rules, acceptors: usize) -> World {
        let slots = rules.actors.iter().map(|actor| actor.slot).max().unwrap() as usize + 1;
        let mut blocks = vec![Block::default(); slots];
        let value = Value::first(OpId(0xF1257), b"");
        let ballot = Ballot::new(1, NodeId(0));
        blocks[0] = Block {
            promised: ballot,
            accepted: Some(Accepted { ballot, value: value.clone(), buffer: BodyBuffer::A }),
        };
        World {
            acceptors: vec![blocks; acceptors],
            actors: vec![Life::Waiting; rules.actors.len()],
            late: Vec::new(),
            committed: vec![value],
        }
    }

    fn may_start(&self, rules: &Rules, actor: usize) -> bool {
        let Some(before) = rules.actors[actor].after else { return true };
        let over = matches!(self.actors[before], Life::Ended | Life::Crashed);
        over && (rules.ignore_write_life || self.late.iter().all(|(owner, ..)| *owner != before))
    }

    fn moves(&self, rules: &Rules) -> Vec<Move> {
        let mut moves = Vec::new();
        for (actor, life) in self.actors.iter().enumerate() {
            match life {
                Life::Waiting if self.may_start(rules, actor) => moves.push(Move::Start(actor)),
                Life::Running { pending, .. } => {
                    let followed = rules.actors.iter().any(|other| other.after == Some(actor));
                    let crash = rules.crashes && followed;
                    if crash {
                        moves.push(Move::Crash(actor));
                    }
                    for (index, output) in pending.iter().enumerate() {
                        moves.push(Move::Do(actor, index));
                        let access = matches!(output, Output::Access { .. });
                        if rules.failures && access {
                            moves.push(Move::Fail(actor, index));
                        }
                        if crash && rules.late_writes && access {
                            moves.push(Move::CrashLate(actor, index));
                        }
                    }
                }
                Life::Waiting | Life::Ended | Life::Crashed => {}
            }
        }
        moves.extend((0..self.late.len()).map(Move::Land));
        moves
    }

    fn apply(&mut self, rules: &Rules, chosen: Move) -> Result<(), String> {
        match chosen {
            Move::Start(actor) => {
                let slot = usize::from(rules.actors[actor].slot);
                if rules.clear_blocks && rules.actors[actor].after.is_some() {
                    self.acceptors.iter_mut().for_each(|blocks| blocks[slot] = Block::default());
                }
                let own = self.acceptors.iter().map(|blocks| Some(blocks[slot].clone())).collect();
                let core = Core::new(NodeId(slot as u16), own);
                self.actors[actor] =
                    Life::Running { core, pending: Vec::new(), runs_left: rules.runs, expected: 1 };
                self.next_run(actor)
            }
            Move::Do(actor, index) | Move::Fail(actor, index) => {
                let slot = rules.actors[actor].slot;
                let Life::Running { core, pending, .. } = &mut self.actors[actor] else { unreachable!() };
                let outputs = match pending.remove(index) {
                    Output::Access { acceptor, block, body: _ } => {
                        self.acceptors[acceptor][usize::from(slot)] = block;
                        let others: Vec<_> =
                            (0..).map(NodeId).zip(self.acceptors[acceptor].iter().cloned()).collect();
                        let others: Vec<_> = others.into_iter().filter(|(node, _)| node.0 != slot).collect();
                        if matches!(chosen, Move::Fail(..)) {
                            core.failed(acceptor)
                        } else {
                            core.accessed(acceptor, &others)
                        }
                    }
                    Output::Fetch { .. } => core.fetched(true),
                    Output::Done(_) => unreachable!("ends are not pending"),
                };
                self.after(actor, outputs)
            }
            Move::Crash(actor) => {
                self.actors[actor] = Life::Crashed;
                Ok(())
            }
            Move::CrashLate(actor, index) => {
                let Life::Running { pending, .. } = &mut self.actors[actor] else { unreachable!() };
                let Output::Access { acceptor, block, .. } = pending.remove(index) else { unreachable!() };
                self.actors[actor] = Life::Crashed;
                self.late.push((actor, acceptor, rules.actors[actor].slot, block));
                Ok(())
            }
            Move::Land(index) => {
                let (_, acceptor, slot, block) = self.late.remove(index);
                self.acceptors[acceptor][usize::from(slot)] = block;
                Ok(())
            }
        }
    }

    fn next_run(&mut self, actor: usize) -> Result<(), String> {
        let Life::Running { core, runs_left, expected, .. } = &mut self.actors[actor] else { unreachable!() };
        if *runs_left == 0 {
            self.actors[actor] = Life::Ended;
            return Ok(());
        }
        *runs_left -= 1;
        let op = Op { id: op_of(actor, *runs_left), expected: *expected, hash: BodyHash(0), len: 0 };
        let outputs = core.start(Some(op));
        self.after(actor, outputs)
    }

    fn after(&mut self, actor: usize, outputs: Vec<Output>) -> Result<(), String> {
        for output in outputs {
            let Life::Running { pending, expected, .. } = &mut self.actors[actor] else { unreachable!() };
            match output {
                Output::Done(verdict) => {
                    let current = match verdict {
                        Verdict::Current(value) | Verdict::Committed { value, .. } => Some(value),
                        Verdict::Preempted | Verdict::NoMajority => None,
                        Verdict::Forgotten(_) | Verdict::Uninitialised => return Err("impossible end".into()),
                    };
                    if let Some(value) = current {
                        *expected = value.sequence;
                        self.commit(value)?;
                    }
                    // An actor whose block is unknown after a failure stops; its successor reads it anew.
                    let Life::Running { core, pending, .. } = &mut self.actors[actor] else { unreachable!() };
                    let unsure = core.own.iter().any(Option::is_none);
                    if unsure || !pending.is_empty() && core.own.len() == 1 {
                        self.actors[actor] = Life::Ended;
                        return Ok(());
                    }
                    return self.next_run(actor);
                }
                other => pending.push(other),
            }
        }
        Ok(())
    }

    /// All committed values are prefixes of one chain of operations.
    fn commit(&mut self, value: Value) -> Result<(), String> {
        for other in &self.committed {
            let (short, long) =
                if other.sequence <= value.sequence { (other, &value) } else { (&value, other) };
            let expected = &long.recent[..short.recent.len().min(long.recent.len())];
            if short.recent != expected || (short.sequence == long.sequence && short != long) {
                return Err(format!("{other:?} and {value:?} are not of one chain"));
            }
        }
        if !self.committed.contains(&value) {
            self.committed.push(value);
        }
        Ok(())
    }
}

/// Every interleaving. The number of states, or the first violation.
fn explore(rules: &Rules, acceptors: usize, limit: usize) -> Result<usize, String> {
    let first = World::new(rules, acceptors);
    let mut seen = HashSet::from([first.clone()]);
    let mut open = vec![first];
    while let Some(world) = open.pop() {
        assert!(seen.len() < limit, "the world is small enough to be explored in full");
        for chosen in world.moves(rules) {
            let mut next = world.clone();
            next.apply(rules, chosen)?;
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    Ok(seen.len())
}

fn actors(slots: &[(u16, Option<usize>)]) -> Vec<Actor> {
    slots.iter().map(|&(slot, after)| Actor { slot, after }).collect()
}

fn rules(slots: &[(u16, Option<usize>)], runs: u8) -> Rules {
    Rules {
        actors: actors(slots),
        runs,
        crashes: true,
        failures: false,
        late_writes: false,
        clear_blocks: false,
        ignore_write_life: false,
    }
}

#[test]
fn three_nodes_on_one_device_commit_one_chain_in_every_interleaving() {
    explore(&rules(&[(0, None), (1, None), (2, None)], 1), 1, 200_000).unwrap();
    explore(&rules(&[(0, None), (1, None)], 2), 1, 200_000).unwrap();
}

#[test]
fn two_nodes_on_three_devices_commit_one_chain_in_every_interleaving() {
    explore(&rules(&[(0, None), (1, None)], 1), 3, 400_000).unwrap();
}

#[test]
fn the_next_owner_of_a_slot_continues_the_chain() {
    let reuse = rules(&[(0, None), (0, Some(0)), (1, None)], 1);
    explore(&reuse, 1, 200_000).unwrap();
    explore(&Rules { late_writes: true, failures: true, ..reuse }, 1, 200_000).unwrap();
}

#[test]
fn clearing_the_block_of_a_slot_would_break_the_chain() {
    let cleared = Rules { clear_blocks: true, ..rules(&[(1, None), (1, Some(0)), (2, None)], 1) };
    assert!(explore(&cleared, 1, 200_000).is_err());
}

#[test]
fn a_slot_reused_before_late_writes_are_dead_would_break_the_chain() {
    let hasty = Rules {
        late_writes: true,
        ignore_write_life: true,
        ..rules(&[(1, None), (1, Some(0)), (2, None)], 1)
    };
    assert!(explore(&hasty, 1, 400_000).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_steps_crashes_failures_and_late_writes_commits_one_chain(
        acceptors in prop_oneof![Just(1_usize), Just(3)],
        choices in proptest::collection::vec(any::<u16>(), 0..400),
    ) {
        let rules = Rules {
            failures: true,
            late_writes: true,
            ..rules(&[(0, None), (1, None), (2, None), (0, Some(0)), (1, Some(1)), (0, Some(3))], 3)
        };
        let mut world = World::new(&rules, acceptors);
        for choice in choices {
            let moves = world.moves(&rules);
            if moves.is_empty() {
                break;
            }
            // Crashes and failures are rare, or nothing would ever be committed.
            let chosen = moves[usize::from(choice) % moves.len()];
            let rare = matches!(chosen, Move::Crash(_) | Move::CrashLate(..) | Move::Fail(..));
            if rare && choice % 7 != 0 {
                continue;
            }
            prop_assert_eq!(world.apply(&rules, chosen), Ok(()));
        }
    }
}

#[test]
fn an_operation_is_found_again_after_others_have_committed() {
    let first = Value::first(OpId(1), b"");
    let op = |id, expected| Op { id: OpId(id), expected, hash: BodyHash(0), len: 0 };
    let third = first.successor(&op(2, 1)).successor(&op(3, 2));
    assert_eq!(third.sequence_of(OpId(2)), Some(2));
    assert_eq!(third.sequence_of(OpId(9)), None);
    let mut value = third;
    for id in 0..RECENT_OPS as u128 {
        value = value.successor(&op(100 + id, value.sequence));
    }
    assert_eq!((value.recent.len(), value.sequence_of(OpId(3))), (RECENT_OPS, None));
}

#[test]
fn the_buffer_that_a_block_refers_to_is_never_overwritten() {
    let mut core = Core::new(NodeId(1), vec![Some(Block::default())]);
    let first = Value::first(OpId(1), b"x");
    let other = Block {
        promised: Ballot::new(1, NodeId(0)),
        accepted: Some(Accepted { ballot: Ballot::new(1, NodeId(0)), value: first, buffer: BodyBuffer::A }),
    };
    let others = [(NodeId(0), other)];
    let mut buffers = Vec::new();
    for expected in 1..4 {
        core.start(Some(Op { id: OpId(10 + expected as u128), expected, hash: BodyHash(0), len: 0 }));
        let mut outputs = core.accessed(0, &others);
        let Some(Output::Access { body, .. }) = outputs.pop() else { panic!("phase 2 follows") };
        buffers.push(body);
        let ended = core.accessed(0, &others);
        assert!(matches!(ended[..], [Output::Done(Verdict::Committed { .. })]));
    }
    assert_eq!(buffers, [Some(BodyBuffer::A), Some(BodyBuffer::B), Some(BodyBuffer::A)]);
}
