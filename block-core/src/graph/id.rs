//! Names for places in the graph.

/// A place in the graph: a node or a root. Never used twice in one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(super) u64);

/// A driver's own name for one of *its* children: an index into its own edges, so it opens no other door.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChildId(pub(super) u32);

impl ChildId {
    /// The first child: a root's only one.
    pub(crate) const FIRST: Self = Self(0);
}
