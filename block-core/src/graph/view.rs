//! What one root can reach: immutable, and the only thing that a request ever walks.

use std::sync::Arc;

use super::bitmaps::NodeBitmap;
use super::driver::DynDriver;
use super::geometry::Geometry;
use super::id::ChildId;
use super::node::NodeShared;
use super::options::NodeOptions;
use super::permission::PermSet;
use super::uses::UseGuard;
use crate::base::SECTOR;
use crate::bitmap::Bitmap;

/// Exactly the nodes that a root reaches. Slot 0 stands for the root itself, whose edges lead to its tops.
pub(crate) struct View {
    slots: Box<[Slot]>,
    /// What the root may do through its edges.
    uses: PermSet,
}

/// One node under the configuration that this view was made with.
pub(crate) struct Slot {
    /// `None` for slot 0.
    pub(crate) node: Option<Placed>,
    /// Slot numbers of the children, indexed by [`ChildId`].
    pub(crate) edges: Box<[u32]>,
}

/// A node's parts as a request needs them.
pub(crate) struct Placed {
    pub(crate) body: Arc<dyn DynDriver>,
    pub(crate) shared: Arc<NodeShared>,
    pub(crate) options: NodeOptions,
    pub(crate) geometry: Geometry,
    /// Those that record.
    pub(crate) bitmaps: Box<[Arc<Bitmap>]>,
    /// Those that the image stores.
    pub(crate) kept: Box<[NodeBitmap]>,
    /// Declared last: it says that the parts above are gone.
    pub(crate) _guard: UseGuard,
}

impl Placed {
    /// Overlapping requests are kept apart here. Guests' requests are whole sectors, so only a node with larger blocks
    /// ever sees a read-modify-write, and only there anybody has to be kept apart.
    #[inline]
    pub(crate) fn tracks(&self) -> bool {
        u64::from(self.geometry.limits.request_alignment) > SECTOR
    }
}

impl View {
    pub(crate) fn new(slots: Vec<Slot>, uses: PermSet) -> Self {
        Self { slots: slots.into_boxed_slice(), uses }
    }

    #[inline]
    pub(crate) fn placed(&self, slot: u32) -> &Placed {
        self.slots[slot as usize].node.as_ref().expect("only slot 0 is no node")
    }

    #[inline]
    pub(crate) fn edge(&self, slot: u32, child: ChildId) -> u32 {
        self.slots[slot as usize].edges[child.0 as usize]
    }

    pub(crate) fn children(&self, slot: u32) -> u32 {
        u32::try_from(self.slots[slot as usize].edges.len()).expect("a node has few children")
    }

    #[inline]
    pub(crate) fn uses(&self) -> PermSet {
        self.uses
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = Option<&Placed>> {
        self.slots.iter().map(|slot| slot.node.as_ref())
    }
}
