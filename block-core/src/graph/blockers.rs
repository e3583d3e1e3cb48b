//! What must not be done to a node for a while, and why: links that have to stay, operations that are shut out. For
//! long-running work (jobs), which depends on parts of the graph that it has no request in.

use std::rc::{Rc, Weak};

use super::control::Graph;
use super::id::NodeId;
use super::shape::Vertices;
use crate::base::{Error, Result};

/// What an operator may do to a node and somebody may have to prevent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Changing the size.
    Resize,
    /// Putting another node in its place, or taking it from its parent.
    Replace,
    /// Changing options.
    Reopen,
    /// Taking, deleting or applying an internal snapshot.
    InternalSnapshot,
}

/// Operations that are shut out from a node until this is dropped.
#[must_use = "dropped at once, it prevents nothing"]
pub struct Blocker {
    graph: Weak<Graph>,
    blocked: Rc<Blocked>,
}

/// A link that stays as it is until this is dropped.
#[must_use = "dropped at once, it freezes nothing"]
#[derive(Debug)]
pub struct Frozen(Rc<std::cell::Cell<u32>>);

/// What is shut out, and why.
pub(super) struct Blocked {
    node: NodeId,
    operations: Vec<Operation>,
    reason: String,
}

impl Graph {
    /// Shuts operations out from a node. `reason` is what those are told who try.
    pub fn block(self: &Rc<Self>, node: NodeId, operations: &[Operation], reason: impl Into<String>) -> Blocker {
        let blocked = Rc::new(Blocked { node, operations: operations.to_vec(), reason: reason.into() });
        self.blockers.borrow_mut().push(blocked.clone());
        Blocker { graph: Rc::downgrade(self), blocked }
    }

    /// Keeps the link of `parent` that QMP calls `child` as it is.
    pub fn freeze(&self, parent: NodeId, child: &str) -> Result<Frozen> {
        let shape = self.shape.borrow();
        let edge = shape.vertex(parent).and_then(|vertex| vertex.edges.iter().find(|edge| edge.name == child));
        let frozen = edge.ok_or_else(|| Error::new(format!("There is no child '{child}'")))?.frozen.clone();
        frozen.set(frozen.get() + 1);
        Ok(Frozen(frozen))
    }

    /// An error where somebody shuts this out.
    pub(super) fn check_operation(&self, node: NodeId, operation: Operation) -> Result<()> {
        let blockers = self.blockers.borrow();
        let found = blockers.iter().find(|blocked| blocked.node == node && blocked.operations.contains(&operation));
        match found {
            None => Ok(()),
            Some(blocked) => {
                let name = self.node(node).map(|report| report.name).unwrap_or_default();
                Err(Error::new(format!("Node '{name}' is busy: {}", blocked.reason)))
            }
        }
    }
}

impl Drop for Blocker {
    fn drop(&mut self) {
        if let Some(graph) = self.graph.upgrade() {
            graph.blockers.borrow_mut().retain(|other| !Rc::ptr_eq(other, &self.blocked));
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
