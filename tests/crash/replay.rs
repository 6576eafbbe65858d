//! What a recorded disk may hold when the power goes.
//!
//! Sure is what a stable write left that is done, or a write that was done before a flush was asked for that is
//! done. Of everything else that was asked for, any part may be there: blocks of a write are written one by one,
//! and a block's sectors too. Two writes of one block keep their order, since the later was asked for when the
//! earlier was done ([`Log::in_order`] holds that): so an order of writes is a choice of which are there.

use std::collections::BTreeMap;

use crate::image::{Block, Image, SECTORS, mix};
use crate::random::Random;
use crate::record::{Event, Mark};

/// What a disk held at first, and what happened.
pub struct Log {
    pub base: Image,
    pub events: Vec<Event>,
}

/// How far the user had come.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Window {
    /// Operations up to this number had begun.
    pub started: usize,
    /// So many stable points had been reached.
    pub stable: usize,
}

/// A block of a write that a power cut may undo.
struct Piece {
    id: u32,
    at: u64,
    block: Block,
    /// When it was done, as a place in the log.
    done: Option<usize>,
    stable: bool,
}

/// What a power cut makes of a block that was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    Lost,
    Landed,
    /// Only these sectors were written.
    Torn(u8),
}

/// A moment at which the power may go.
pub struct Cut {
    /// The last event before it.
    pub position: usize,
    pub window: Window,
    /// It is the end of a flush.
    pub flushed: bool,
    /// The last write that was asked for.
    pub last_write: Vec<(u64, Block)>,
    sure: Image,
    unsure: Vec<Unsure>,
}

struct Unsure {
    write: u32,
    at: u64,
    block: Block,
}

/// A choice of what is there after a power cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice {
    /// Everything that was asked for.
    All,
    /// Nothing but what is sure.
    Nothing,
    /// The blocks with a bit set.
    These(u32),
    /// Everything but the last block.
    ButLast,
    /// Everything, of the last block only its first sectors: drawn.
    LastTorn(u64),
    /// Any part, drawn: blocks, and of some only sectors.
    Any(u64),
}

impl Log {
    /// The moments worth a look: after every request, and after the end of each.
    pub fn cuts(&self) -> Cuts<'_> {
        Cuts {
            log: self,
            next: 0,
            sure: self.base.clone(),
            unsure: Vec::new(),
            flushes: BTreeMap::new(),
            window: Window::default(),
            last_write: None,
        }
    }

    /// Whether no block was written while another write of it was under way; else its number.
    pub fn in_order(&self) -> Result<(), u64> {
        let mut under_way: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
        for event in &self.events {
            match event {
                Event::Write { id, at, blocks, .. } => {
                    let end = at + blocks.len() as u64;
                    if under_way.values().any(|&(other, other_end)| *at < other_end && other < end) {
                        return Err(*at);
                    }
                    under_way.insert(*id, (*at, end));
                }
                Event::Done { id } => {
                    under_way.remove(id);
                }
                Event::Flush { .. } | Event::Mark(_) => {}
            }
        }
        Ok(())
    }
}

/// See [`Log::cuts`].
pub struct Cuts<'a> {
    log: &'a Log,
    next: usize,
    sure: Image,
    unsure: Vec<Piece>,
    /// Flushes under way, and when they were asked for.
    flushes: BTreeMap<u32, usize>,
    window: Window,
    /// The last write that was asked for, as a place in the log.
    last_write: Option<usize>,
}

impl Cuts<'_> {
    /// Makes unsure blocks sure.
    fn settle(&mut self, settled: impl Fn(&Piece) -> bool) {
        let (settled, rest): (Vec<Piece>, Vec<Piece>) = self.unsure.drain(..).partition(settled);
        self.unsure = rest;
        settled.into_iter().for_each(|piece| self.sure.put(piece.at, piece.block));
    }

    fn done(&mut self, id: u32, now: usize) -> bool {
        if let Some(asked) = self.flushes.remove(&id) {
            self.settle(|piece| piece.done.is_some_and(|done| done < asked));
            return true;
        }
        self.unsure.iter_mut().filter(|piece| piece.id == id).for_each(|piece| piece.done = Some(now));
        // What a stable write replaced cannot come back.
        let stable: Vec<u64> = self.unsure.iter().filter(|p| p.id == id && p.stable).map(|p| p.at).collect();
        self.unsure.retain(|piece| piece.id >= id || !stable.contains(&piece.at));
        self.settle(|piece| piece.id == id && piece.stable);
        false
    }
}

impl Iterator for Cuts<'_> {
    type Item = Cut;

    fn next(&mut self) -> Option<Cut> {
        let events = &self.log.events;
        let (position, flushed) = loop {
            let now = self.next;
            self.next += 1;
            match events.get(now)? {
                Event::Mark(Mark::Starts(operation)) => self.window.started = *operation,
                Event::Mark(Mark::Stable(point)) => self.window.stable = point + 1,
                Event::Write { id, at, blocks, stable, .. } => {
                    for (at, block) in (*at..).zip(blocks) {
                        let block = block.clone();
                        self.unsure.push(Piece { id: *id, at, block, done: None, stable: *stable });
                    }
                    self.last_write = Some(now);
                    break (now, false);
                }
                Event::Flush { id } => {
                    self.flushes.insert(*id, now);
                    break (now, false);
                }
                Event::Done { id } => break (now, self.done(*id, now)),
            }
        };
        // What was promised before the next request was promised of this state.
        let mut window = self.window;
        let mut begun = window.started;
        for event in &events[self.next..] {
            match event {
                Event::Mark(Mark::Starts(operation)) => begun = *operation,
                Event::Mark(Mark::Stable(point)) => window = Window { started: begun, stable: point + 1 },
                Event::Write { .. } | Event::Flush { .. } | Event::Done { .. } => break,
            }
        }
        let unsure = |p: &Piece| Unsure { write: p.id, at: p.at, block: p.block.clone() };
        let unsure = self.unsure.iter().map(unsure).collect();
        let last_write = match self.last_write.map(|at| &events[at]) {
            Some(Event::Write { at, blocks, .. }) => (*at..).zip(blocks.iter().cloned()).collect(),
            _ => Vec::new(),
        };
        Some(Cut { last_write, position, window, flushed, sure: self.sure.clone(), unsure })
    }
}

impl Cut {
    /// Choices that show every kind of damage; `drawn` of them at random. Where there are few, all of whole blocks.
    pub fn choices(&self, drawn: usize, random: &mut Random) -> Vec<Choice> {
        let mut choices = vec![Choice::All];
        let unsure = self.unsure.len();
        if unsure == 0 {
            return choices;
        }
        choices.push(Choice::Nothing);
        if unsure <= drawn.ilog2() as usize {
            choices.extend((1..(1_u32 << unsure) - 1).map(Choice::These));
        } else {
            choices.extend((0..drawn).map(|_| Choice::Any(random.next())));
        }
        choices.extend([Choice::ButLast, Choice::LastTorn(random.next())]);
        choices
    }

    /// Whether the last write that was asked for is not done, or done and not sure.
    pub fn is_under_way(&self) -> bool {
        self.unsure.last().is_some_and(|last| self.last_write.iter().any(|(at, _)| *at == last.at))
    }

    /// The disk after the power cut.
    pub fn image(&self, choice: Choice) -> Image {
        let mut image = self.sure.clone();
        for (n, Unsure { at, block, .. }) in self.unsure.iter().enumerate() {
            match self.fate(choice, n) {
                Fate::Lost => {}
                Fate::Landed => image.put(*at, block.clone()),
                Fate::Torn(sectors) => {
                    let torn = block.torn(image.get(*at), sectors);
                    image.put(*at, torn);
                }
            }
        }
        image
    }

    fn fate(&self, choice: Choice, n: usize) -> Fate {
        let last = n + 1 == self.unsure.len();
        match choice {
            Choice::All => Fate::Landed,
            Choice::Nothing => Fate::Lost,
            Choice::These(bits) if bits >> n & 1 == 1 => Fate::Landed,
            Choice::These(_) => Fate::Lost,
            Choice::LastTorn(_) if !last => Fate::Landed,
            Choice::ButLast if last => Fate::Lost,
            Choice::ButLast => Fate::Landed,
            // A disk writes a block's sectors from its first on.
            Choice::LastTorn(seed) => {
                let sectors = 1 + Random::new(seed).below(u64::from(SECTORS) - 1);
                Fate::Torn((1_u16 << sectors).wrapping_sub(1) as u8)
            }
            Choice::Any(seed) => {
                let mut random = Random::new(seed);
                // Few or many are there; writes as a whole, or blocks, of which some are torn.
                let (many, whole) = (1 + random.below(15), random.below(2) == 0);
                let unit = if whole { self.unsure[n].write.into() } else { n as u64 };
                let draw = Random::new(seed ^ mix(unit)).next();
                match draw % 16 < many {
                    _ if !whole && (draw >> 8).is_multiple_of(8) => Fate::Torn((draw >> 16) as u8),
                    true => Fate::Landed,
                    false => Fate::Lost,
                }
            }
        }
    }
}
