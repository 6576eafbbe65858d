//! Which members a view keeps when some pairs do not hear each other.
//!
//! The largest set in which every two hear each other; among equals the one with the ADM, then the one with the
//! lowest slots. A pure function of the pairs, so that both sides of a partition find the same answer.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use storage_control::NodeId;

/// Past this many steps the best set found so far is taken. Real partitions need a step or two per node.
const MAX_STEPS: usize = 20_000;

type Nodes = BTreeSet<NodeId>;

/// The set to keep of `nodes`, given the pairs that are broken.
pub(crate) fn keep(nodes: &Nodes, broken: &BTreeSet<(NodeId, NodeId)>, adm: NodeId) -> Nodes {
    let mut foes: BTreeMap<NodeId, Nodes> = BTreeMap::new();
    for (a, b) in broken.iter().filter(|(a, b)| nodes.contains(a) && nodes.contains(b)) {
        foes.entry(*a).or_default().insert(*b);
        foes.entry(*b).or_default().insert(*a);
    }
    let mut search = Search { foes, adm, best: None, steps: 0 };
    search.run(nodes.clone());
    search.best.unwrap_or_default()
}

struct Search {
    foes: BTreeMap<NodeId, Nodes>,
    adm: NodeId,
    best: Option<Nodes>,
    steps: usize,
}

impl Search {
    /// Takes the node with most foes: either its foes go, or it goes.
    fn run(&mut self, nodes: Nodes) {
        self.steps += 1;
        let enough =
            self.best.as_ref().is_some_and(|best| nodes.len() < best.len() || self.steps > MAX_STEPS);
        if enough {
            return;
        }
        let count = |node: &NodeId| self.foes.get(node).map_or(0, |foes| foes.intersection(&nodes).count());
        let worst = nodes.iter().map(|node| (count(node), Reverse(*node))).max();
        match worst {
            Some((foes, Reverse(node))) if foes > 0 => {
                let kept = nodes.difference(&self.foes[&node]).copied().collect();
                self.run(kept);
                let mut rest = nodes;
                rest.remove(&node);
                self.run(rest);
            }
            _ => {
                if self.best.as_ref().is_none_or(|best| self.rank(&nodes) > self.rank(best)) {
                    self.best = Some(nodes);
                }
            }
        }
    }

    fn rank(&self, nodes: &Nodes) -> (usize, bool, Reverse<Vec<NodeId>>) {
        (nodes.len(), nodes.contains(&self.adm), Reverse(nodes.iter().copied().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(count: u16, broken: &[(u16, u16)], adm: u16) -> Vec<u16> {
        let nodes = (0..count).map(NodeId).collect();
        let broken = broken.iter().map(|(a, b)| (NodeId(*a), NodeId(*b))).collect();
        keep(&nodes, &broken, NodeId(adm)).into_iter().map(|node| node.0).collect()
    }

    #[test]
    fn the_larger_side_stays() {
        assert_eq!(kept(3, &[(0, 1), (0, 2)], 0), [1, 2]);
        assert_eq!(kept(3, &[], 0), [0, 1, 2]);
    }

    #[test]
    fn of_equal_sides_the_one_with_the_adm_stays_then_the_lowest() {
        assert_eq!(kept(2, &[(0, 1)], 1), [1]);
        assert_eq!(kept(4, &[(0, 2), (0, 3), (1, 2), (1, 3)], 3), [2, 3]);
        assert_eq!(kept(3, &[(0, 1)], 2), [0, 2]);
    }

    #[test]
    fn a_large_matrix_cut_in_two_is_settled_in_few_steps() {
        let broken: Vec<(u16, u16)> = (0..30).flat_map(|a| (30..64).map(move |b| (a, b))).collect();
        assert_eq!(kept(64, &broken, 0), (30..64).collect::<Vec<_>>());
    }
}
