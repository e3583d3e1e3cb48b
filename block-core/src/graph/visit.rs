//! I/O on the children of a node that is being opened: what an image says about itself has to be read before there is a
//! node of it.
//!
//! The children that were defined with it are not in the graph either. They are seen as they would be if they were
//! added just now, which is what happens next.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::control::{Graph, view_from};
use super::cx::Child;
use super::edit::NewNode;
use super::id::NodeId;
use super::options::NodeOptions;
use super::permission::{PermSet, Perms};
use super::shape::{Shape, Vertex, Vertices};
use crate::base::{Error, Result};

/// The graph with a tree of nodes that are not in it.
struct Supposed<'a> {
    shape: &'a Shape,
    touched: BTreeMap<NodeId, Option<Vertex>>,
}

impl Vertices for Supposed<'_> {
    fn vertex(&self, id: NodeId) -> Option<&Vertex> {
        self.touched.get(&id).map_or_else(|| self.shape.vertex(id), Option::as_ref)
    }
}

impl Graph {
    /// Lets `work` read from `top`: one of `tree`, which is open and not in the graph, or a node of the graph. Other
    /// programs are kept from changing the images of `tree` from now on, and from reading them where that shall not be beside
    /// a writer, as `visitor` has it: the options of the node that is being opened.
    pub(crate) async fn visit<R>(
        self: &Rc<Self>,
        tree: &[NewNode],
        top: NodeId,
        visitor: NodeOptions,
        work: impl AsyncFnOnce(Child<'_>) -> R,
    ) -> Result<R> {
        let (inside, outside) = reached(tree, top);
        if visitor.active && !visitor.force_share {
            let changes = PermSet::WRITE | PermSet::RESIZE;
            let uses = PermSet::CONSISTENT_READ | if visitor.read_only { PermSet::NONE } else { changes };
            for node in inside {
                node.body().tighten(Perms { uses, shares: PermSet::ALL.without(changes) }).await?;
            }
        }
        // Nobody changes what it stands on meanwhile.
        let _reserved = self.reserved(&outside).await;
        let view = {
            let (_, outcome) = self.preview(&BTreeSet::new(), |edit, _| {
                tree.iter().try_for_each(|node| edit.add(node.clone()).map(drop))
            })?;
            let shape = self.shape.borrow();
            let supposed = Supposed { shape: &shape, touched: outcome.touched };
            supposed.vertex(top).ok_or_else(|| Error::new("There is no such node"))?;
            view_from(&supposed, Some(top), PermSet::CONSISTENT_READ)
        };
        Ok(self.with_private(view, outside.into_iter().collect(), async |child, _| work(child).await).await)
    }
}

/// Which of `tree` can be reached from `top`, and at which nodes of the graph it ends.
fn reached(tree: &[NewNode], top: NodeId) -> (Vec<&NewNode>, Vec<NodeId>) {
    let (mut inside, mut outside): (BTreeMap<NodeId, &NewNode>, BTreeSet<NodeId>) = Default::default();
    let mut queue = vec![top];
    while let Some(id) = queue.pop() {
        match tree.iter().find(|node| node.id() == id) {
            Some(node) => {
                if inside.insert(id, node).is_none() {
                    queue.extend(node.children());
                }
            }
            None => drop(outside.insert(id)),
        }
    }
    (inside.into_values().collect(), outside.into_iter().collect())
}
