//! Names for places in the graph.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A place in the graph: a node or a root. Never used twice in one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u64);

impl NodeId {
    /// One that was never there before. A change that is tried twice keeps its ids, so that what was prepared for a
    /// node belongs to it.
    pub(super) fn fresh() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

/// A driver's own name for one of *its* children: an index into its own edges, so it opens no other door.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChildId(pub(super) u32);

impl ChildId {
    /// The first child: a root's only one.
    pub(crate) const FIRST: Self = Self(0);

    /// The child with this number, from 0 on.
    pub(super) fn number(number: usize) -> Self {
        Self(u32::try_from(number).expect("a node has few children"))
    }

    /// What belongs to this child, in a list in edge order.
    pub fn of<T>(self, all: &[T]) -> &T {
        all.get(self.0 as usize).expect("a list in edge order has an entry for each child")
    }

    /// The first `count` children of a node, in edge order.
    pub fn all(count: u32) -> impl Iterator<Item = Self> {
        (0..count).map(Self)
    }
}
