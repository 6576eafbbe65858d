//! What users do: operations on two directories with four names each, one after another or drawn at random.

use crate::image::seed_of;
use crate::random::Random;

/// Names in each of the two directories.
pub const NAMES: [&str; 4] = ["n0", "n1", "n2", "n3"];

/// One name in one of the two directories.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    pub dir: u8,
    pub name: u8,
}

impl Slot {
    pub fn all() -> impl Iterator<Item = Slot> + Clone {
        (0..2).flat_map(|dir| (0..NAMES.len() as u8).map(move |name| Slot { dir, name }))
    }

    fn draw(random: &mut Random) -> Slot {
        Slot { dir: random.below(2) as u8, name: random.below(NAMES.len() as u64) as u8 }
    }
}

/// How a write lies to what the file has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Where {
    Append,
    /// Whole blocks that are there.
    Overwrite,
    /// From anywhere to anywhere.
    Unaligned,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    Create(Slot),
    Mkdir(Slot),
    Symlink(Slot),
    Link(Slot, Slot),
    Unlink(Slot),
    Rmdir(Slot),
    Rename(Slot, Slot),
    Write(Slot, Where),
    Shrink(Slot),
    Extend(Slot),
    SetXattr(Slot, Size),
    RemoveXattr(Slot),
    /// Opens a file and keeps it open, whatever becomes of its name.
    Hold(Slot),
    /// Closes what was opened first of all that is still open.
    LetGo,
    /// Nothing for so many seconds.
    Wait(u8),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    Small,
    Large,
}

/// How the user makes sure of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    Nothing,
    Fsync,
    Fdatasync,
    Sync,
    /// The write itself is with `O_SYNC`.
    OSync,
}

/// An operation, and what comes after it. `draw` decides lengths, offsets and bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    pub operation: Operation,
    pub after: After,
    pub size: Size,
    pub draw: u64,
}

/// A workload with a name that says which.
#[derive(Clone, Debug)]
pub struct Workload {
    pub name: String,
    pub steps: Vec<Step>,
    /// Seconds that go by before the unmount: what was not asked for happens by itself.
    pub wait: u8,
}

const ENDINGS: [After; 4] = [After::Nothing, After::Fsync, After::Fdatasync, After::Sync];

/// Every operation that changes something, by kind, on every name or pair of names.
fn operations() -> Vec<Vec<Operation>> {
    use Operation::*;
    let each = |make: fn(Slot) -> Operation| Slot::all().map(make).collect();
    let two = |make: fn(Slot, Slot) -> Operation| {
        Slot::all().flat_map(|one| Slot::all().map(move |other| make(one, other))).collect()
    };
    vec![
        each(Create),
        each(Mkdir),
        each(Symlink),
        two(Link),
        each(Unlink),
        each(Rmdir),
        two(Rename),
        each(|slot| Write(slot, Where::Append)),
        each(|slot| Write(slot, Where::Overwrite)),
        each(|slot| Write(slot, Where::Unaligned)),
        each(Shrink),
        each(Extend),
        each(|slot| SetXattr(slot, Size::Small)),
        each(|slot| SetXattr(slot, Size::Large)),
        each(RemoveXattr),
    ]
}

/// Every single operation, followed by everything that may follow it.
pub fn singles(seed: u64) -> Vec<Workload> {
    let mut all = Vec::new();
    for operation in operations().concat() {
        let o_sync = matches!(operation, Operation::Write(..)).then_some(After::OSync);
        for after in ENDINGS.into_iter().chain(o_sync) {
            let draw = Random::new(seed ^ all.len() as u64).next();
            let wait = if after == After::Nothing { 12 } else { 3 };
            let step = Step { operation, after, size: Size::Small, draw };
            all.push(Workload { name: format!("single/{}", all.len()), steps: vec![step], wait });
        }
    }
    all
}

/// The n-th of many pairs of operations.
pub fn pair(seed: u64, n: u64) -> Workload {
    let mut random = Random::new(seed_of("pair", seed ^ n << 32));
    let kinds = operations();
    let steps = [(); 2].map(|()| {
        let kind = random.pick(&kinds);
        let operation = *random.pick(kind);
        Step { operation, after: *random.pick(&ENDINGS), size: Size::Small, draw: random.next() }
    });
    Workload { name: format!("pair/{n}"), steps: steps.to_vec(), wait: *random.pick(&[0, 3, 12]) }
}

/// The n-th of many long ones: up to 120 operations of any size, with pauses. `kind` is the first part of its name.
pub fn long(kind: &str, seed: u64, n: u64) -> Workload {
    let mut random = Random::new(seed_of(kind, seed ^ n << 32));
    let length = 20 + random.below(100);
    let steps = (0..length).map(|_| draw_step(&mut random)).collect();
    Workload { name: format!("{kind}/{n}"), steps, wait: *random.pick(&[0, 0, 3, 12]) }
}

/// The n-th of many runs that free and take blocks all the time, data and metadata, and wait for nothing: for a
/// filesystem with little room.
pub fn churn(seed: u64, n: u64) -> Workload {
    use Operation::*;
    let mut random = Random::new(seed_of("churn", seed ^ n << 32));
    let length = 20 + random.below(60);
    let mut step = || {
        let slot = Slot::draw(&mut random);
        let operation = match random.below(16) {
            0..2 => Create(slot),
            2..4 => Unlink(slot),
            4..6 => SetXattr(slot, Size::Large),
            6..8 => RemoveXattr(slot),
            8..11 => Shrink(slot),
            _ => Write(slot, *random.pick(&[Where::Append, Where::Unaligned])),
        };
        let after = *random.pick(&[After::Nothing, After::Nothing, After::Fsync, After::Fdatasync]);
        let size = *random.pick(&[Size::Small, Size::Large]);
        Step { operation, after, size, draw: random.next() }
    };
    let steps = (0..length).map(|_| step()).collect();
    Workload { name: format!("churn/{n}"), steps, wait: 0 }
}

/// A step of a life of several nodes: files are not kept open, and waits are short.
pub fn life_step(random: &mut Random) -> Step {
    loop {
        let step = draw_step(random);
        match step.operation {
            Operation::Hold(_) | Operation::LetGo => {}
            Operation::Wait(secs) => return Step { operation: Operation::Wait(secs.min(2)), ..step },
            _ => return step,
        }
    }
}

fn draw_step(random: &mut Random) -> Step {
    use Operation::*;
    let (slot, other) = (Slot::draw(random), Slot::draw(random));
    let place = *random.pick(&[Where::Append, Where::Overwrite, Where::Unaligned]);
    let size = *random.pick(&[Size::Small, Size::Small, Size::Large]);
    let operation = match random.below(32) {
        0..4 => Create(slot),
        4 | 5 => Mkdir(slot),
        6 => Symlink(slot),
        7 | 8 => Link(slot, other),
        9..12 => Unlink(slot),
        12 => Rmdir(slot),
        13..16 => Rename(slot, other),
        16..22 => Write(slot, place),
        22..24 => Shrink(slot),
        24 => Extend(slot),
        25 => SetXattr(slot, size),
        26 => RemoveXattr(slot),
        27 => Hold(slot),
        28 => LetGo,
        _ => Wait(*random.pick(&[0, 0, 1, 2, 6])),
    };
    let after = match random.below(10) {
        0..6 => After::Nothing,
        6 => After::Fsync,
        7 => After::Fdatasync,
        8 => After::Sync,
        _ if matches!(operation, Write(..)) => After::OSync,
        _ => After::Nothing,
    };
    Step { operation, after, size, draw: random.next() }
}
