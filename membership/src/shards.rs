//! The lock space's shards and how they are dealt to the members.
//!
//! Always: a map names a master for every shard. A deal is balanced (any two members differ by at most one
//! shard), moves as few shards as any balanced deal could, spreads what a member has evenly over the shard
//! numbers (a small filesystem uses only the first few), and depends on nothing but its arguments.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use storage_control::NodeId;

/// Number of shards of the lock space. Part of the protocol: never changed.
pub const SHARDS: usize = 1024;

/// A set of shard numbers.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ShardSet([u64; SHARDS / 64]);

impl ShardSet {
    /// The empty set.
    pub const EMPTY: ShardSet = ShardSet([0; SHARDS / 64]);

    /// Adds a shard; a number past the last shard is a mistake of ours.
    pub fn insert(&mut self, shard: u16) {
        self.0[usize::from(shard) / 64] |= 1 << (shard % 64);
    }

    /// Takes a shard out.
    pub fn remove(&mut self, shard: u16) {
        self.0[usize::from(shard) / 64] &= !(1 << (shard % 64));
    }

    /// Whether the shard is in the set. Numbers past the last shard are in no set.
    pub fn contains(&self, shard: u16) -> bool {
        self.0.get(usize::from(shard) / 64).is_some_and(|word| word >> (shard % 64) & 1 == 1)
    }

    /// How many shards are in the set.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The shards in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (0..SHARDS as u16).filter(|shard| self.contains(*shard))
    }
}

impl FromIterator<u16> for ShardSet {
    fn from_iter<I: IntoIterator<Item = u16>>(shards: I) -> ShardSet {
        let mut set = ShardSet::EMPTY;
        shards.into_iter().for_each(|shard| set.insert(shard));
        set
    }
}

impl fmt::Debug for ShardSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShardSet({} shards)", self.len())
    }
}

/// The master of every shard.
#[derive(Clone, PartialEq, Eq)]
pub struct ShardMap(Box<[NodeId; SHARDS]>);

impl ShardMap {
    /// All shards to one node.
    pub fn all_to(node: NodeId) -> ShardMap {
        ShardMap(Box::new([node; SHARDS]))
    }

    /// The node named for a shard; `None` past the last shard.
    pub fn get(&self, shard: u16) -> Option<NodeId> {
        self.0.get(usize::from(shard)).copied()
    }

    /// The shards of one node.
    pub fn of(&self, node: NodeId) -> ShardSet {
        (0..SHARDS as u16).filter(|shard| self.0[usize::from(*shard)] == node).collect()
    }

    /// The shards whose master differs between two maps.
    pub fn moved(&self, other: &ShardMap) -> ShardSet {
        (0..SHARDS as u16).filter(|shard| self.get(*shard) != other.get(*shard)).collect()
    }

    /// The map in which exactly `members` (at least one) are masters, made from this one with the fewest moves.
    ///
    /// The members that have most now get the shards left over by the division, so that nobody gives up a
    /// shard needlessly. A member that gives some up keeps an even pattern of its own, and what moves is dealt
    /// in turns, weighted by need: both keep every prefix of the shard numbers balanced too.
    pub fn deal(&self, members: &BTreeSet<NodeId>) -> ShardMap {
        assert!(!members.is_empty(), "shards are dealt to at least one member");
        let mut have: BTreeMap<NodeId, usize> = members.iter().map(|node| (*node, 0)).collect();
        for node in self.0.iter() {
            if let Some(count) = have.get_mut(node) {
                *count += 1;
            }
        }
        let quota = quotas(&have);

        let mut next = self.clone();
        let mut moving = Vec::new();
        let mut seen: BTreeMap<NodeId, usize> = BTreeMap::new();
        for (shard, node) in self.0.iter().enumerate() {
            let keeps = match have.get(node) {
                None => false,
                Some(had) if *had <= quota[node] => true,
                Some(had) => {
                    let nth = seen.entry(*node).or_default();
                    *nth += 1;
                    *nth * quota[node] / had > (*nth - 1) * quota[node] / had
                }
            };
            if !keeps {
                moving.push(shard);
            }
        }

        let needs: Vec<(NodeId, usize)> = have
            .iter()
            .map(|(node, had)| (*node, quota[node].saturating_sub(*had)))
            .filter(|(_, need)| *need > 0)
            .collect();
        let mut turns = Turns::new(needs);
        for shard in moving {
            next.0[shard] = turns.next();
        }
        next
    }
}

/// What each member shall have, given what it has: equal up to one, the larger shares to those with most.
fn quotas(have: &BTreeMap<NodeId, usize>) -> BTreeMap<NodeId, usize> {
    let (each, over) = (SHARDS / have.len(), SHARDS % have.len());
    let mut by_most: Vec<(NodeId, usize)> = have.iter().map(|(node, had)| (*node, *had)).collect();
    by_most.sort_by_key(|(node, had)| (std::cmp::Reverse(*had), *node));
    by_most.into_iter().enumerate().map(|(rank, (node, _))| (node, each + usize::from(rank < over))).collect()
}

/// Weighted turns: every node is named as often as it needs, spread as evenly as can be.
struct Turns {
    needs: Vec<(NodeId, usize)>,
    credit: Vec<isize>,
}

impl Turns {
    fn new(needs: Vec<(NodeId, usize)>) -> Turns {
        let credit = vec![0; needs.len()];
        Turns { needs, credit }
    }

    fn next(&mut self) -> NodeId {
        let total: usize = self.needs.iter().map(|(_, need)| need).sum();
        let mut best = 0;
        for (i, (_, need)) in self.needs.iter().enumerate() {
            self.credit[i] += *need as isize;
            if self.credit[i] > self.credit[best] {
                best = i;
            }
        }
        self.credit[best] -= total as isize;
        self.needs[best].0
    }
}

impl fmt::Debug for ShardMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counts: BTreeMap<NodeId, usize> = BTreeMap::new();
        self.0.iter().for_each(|node| *counts.entry(*node).or_default() += 1);
        write!(f, "ShardMap({counts:?})")
    }
}

impl Serialize for ShardMap {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.0.iter())
    }
}

impl<'de> Deserialize<'de> for ShardMap {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<ShardMap, D::Error> {
        let nodes = Vec::<NodeId>::deserialize(from)?;
        let count = nodes.len();
        match <Box<[NodeId; SHARDS]>>::try_from(nodes.into_boxed_slice()) {
            Ok(all) => Ok(ShardMap(all)),
            Err(_) => Err(serde::de::Error::invalid_length(count, &"one master for each of 1024 shards")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(nodes: &[u16]) -> BTreeSet<NodeId> {
        nodes.iter().map(|n| NodeId(*n)).collect()
    }

    fn count(map: &ShardMap, node: u16) -> usize {
        map.of(NodeId(node)).len()
    }

    #[test]
    fn a_joining_node_takes_its_share_and_nothing_else_moves() {
        let one = ShardMap::all_to(NodeId(4));
        let two = one.deal(&set(&[4, 7]));
        assert_eq!((count(&two, 4), count(&two, 7)), (512, 512));
        assert_eq!(one.moved(&two).len(), 512);
        let three = two.deal(&set(&[1, 4, 7]));
        assert_eq!(two.moved(&three).len(), 341);
        assert!(two.moved(&three).iter().all(|shard| three.get(shard) == Some(NodeId(1))));
    }

    #[test]
    fn a_dead_nodes_shards_alone_move() {
        let three = ShardMap::all_to(NodeId(0)).deal(&set(&[0, 1, 2]));
        let two = three.deal(&set(&[0, 2]));
        assert_eq!(three.moved(&two), three.of(NodeId(1)));
        assert_eq!(count(&two, 0) + count(&two, 2), SHARDS);
        assert!(count(&two, 0).abs_diff(count(&two, 2)) <= 1);
    }

    #[test]
    fn the_first_few_shards_are_shared_as_well() {
        let map = ShardMap::all_to(NodeId(0)).deal(&set(&[0, 1])).deal(&set(&[0, 1, 2]));
        let mut first = BTreeMap::new();
        (0..12).for_each(|shard| *first.entry(map.get(shard)).or_insert(0) += 1);
        assert!(first.len() == 3 && first.values().all(|count| *count >= 3), "{first:?}");
    }

    proptest! {
        /// From any history of members: balanced, and no balanced deal moves less.
        #[test]
        fn every_deal_is_balanced_and_moves_the_fewest(
            history in prop::collection::vec(prop::collection::btree_set(0u16..64, 1..20), 1..6)
        ) {
            let mut map = ShardMap::all_to(NodeId(0));
            for members in history {
                let members: BTreeSet<NodeId> = members.into_iter().map(NodeId).collect();
                let next = map.deal(&members);
                prop_assert_eq!(&next, &map.deal(&members));
                let counts: Vec<usize> = members.iter().map(|m| next.of(*m).len()).collect();
                prop_assert_eq!(counts.iter().sum::<usize>(), SHARDS);
                prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
                // The fewest moves: every member can keep at most its quota, the largest holders the larger ones.
                let mut had: Vec<usize> = members.iter().map(|m| map.of(*m).len()).collect();
                had.sort_by_key(|h| std::cmp::Reverse(*h));
                let (each, over) = (SHARDS / had.len(), SHARDS % had.len());
                let kept: usize =
                    had.iter().enumerate().map(|(i, h)| (*h).min(each + usize::from(i < over))).sum();
                prop_assert_eq!(map.moved(&next).len(), SHARDS - kept);
                map = next;
            }
        }
    }
}
