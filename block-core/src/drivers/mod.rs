//! The drivers, in three rooms: `protocol` talks to the kernel or a peer, `format` knows the bytes of an image and
//! moves none, `filter` says only what it adds. No driver names another; who opens which child is `catalog.rs`.

pub mod filter;
pub mod format;
pub mod keys;
pub mod protocol;

use std::borrow::Cow;
use std::future::Future;

use std::rc::Rc;
use std::sync::Arc;

use qmp::Qapi;

use crate::base::{Error, Result};
use crate::bitmap::Bitmap;
use crate::graph::{Child, ChildId, Driver, Edges, EventSink, Graph, NewNode, NodeOptions, Objects};

/// A driver's own options, and how a node is made of them.
pub trait Open: Clone + PartialEq + Send + 'static {
    /// What is opened.
    type Driver: Driver;

    /// Opens what the options name.
    fn open(&self, site: Site<'_>) -> impl Future<Output = Result<Opened<Self::Driver>>>;
}

/// What a driver has to do with while it is opened: its node, its children, and what options may refer to.
pub struct Site<'a> {
    /// The node-name that it will have.
    pub name: &'a str,
    /// The common options of the node.
    pub common: NodeOptions,
    /// The children, by the names that the catalog's line and QMP give them.
    pub children: &'a [(Cow<'static, str>, ChildId)],
    /// Children that the options say the node has not got.
    pub nulls: &'a [Cow<'static, str>],
    /// What options may refer to by id.
    pub objects: &'a Objects,
    /// Where the node's events go.
    pub events: EventSink,
    /// Where bitmaps are looked up.
    pub(crate) graph: &'a Rc<Graph>,
    /// Where the children's edges lead.
    pub(crate) edges: &'a Edges,
    /// What was opened with the node, and is not in the graph either.
    pub(crate) tree: &'a [NewNode],
}

/// A dirty bitmap, as options and commands name it.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockDirtyBitmap {
    /// Its node.
    pub node: String,
    /// Its name among those of the node.
    pub name: String,
}

impl Site<'_> {
    /// A child that the catalog's line demands.
    pub fn child(&self, name: &str) -> ChildId {
        self.optional(name).expect("the catalog opens the children that its line demands")
    }

    /// The marks of a bitmap that is there. True: its node's end moves, past what is marked.
    pub fn bitmap(&self, named: &BlockDirtyBitmap) -> Result<(Arc<Bitmap>, bool)> {
        let BlockDirtyBitmap { node, name } = named;
        let node = self.graph.find(node).ok_or_else(|| Error::new(format!("Node '{node}' not found")))?;
        Ok((self.graph.bitmap(node, name)?.bits, self.graph.has_moving_end(node)))
    }

    /// Reads from a child. From now on no other program may write to it, if it was defined with this node.
    pub async fn visit<R>(&self, child: ChildId, work: impl AsyncFnOnce(Child<'_>) -> R) -> Result<R> {
        self.graph.visit(self.tree, self.edges.leads_to(child), self.common, work).await
    }

    /// The options say something of the child: a node, or that there is none.
    pub fn is_given(&self, name: &str) -> bool {
        self.optional(name).is_some() || self.nulls.iter().any(|edge| edge == name)
    }

    /// A child that need not be there.
    pub fn optional(&self, name: &str) -> Option<ChildId> {
        self.children.iter().find(|(edge, _)| edge == name).map(|(_, id)| *id)
    }
}

/// A driver that is open and not in the graph yet. Dropping it closes it.
pub struct Opened<D: Driver> {
    /// What all configurations share.
    pub driver: D,
    /// The first configuration.
    pub conf: D::Conf,
    /// The common options in force: `auto_read_only` may have turned `read_only` on.
    pub options: NodeOptions,
}
