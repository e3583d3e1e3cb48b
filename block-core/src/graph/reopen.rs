//! New options, and other children, for nodes that are there: a step of a transaction for each.

use std::any::Any;
use std::sync::Arc;

use super::blockers::Operation;
use super::change::Change;
use super::control::{Graph, Permit};
use super::drain::Drained;
use super::driver::{DynDriver, ReopenRequest};
use super::edit::{DrainedSet, GraphEdit};
use super::id::NodeId;
use super::node::NodeShared;
use super::options::NodeOptions;
use super::shape::Vertex;
use super::transaction::{Pending, Step};
use crate::base::{Error, IoError, Result, ResultExt};

/// What one node becomes.
pub struct Reopen {
    /// Which node.
    pub node: NodeId,
    /// The driver's own options, complete: what is left out goes back to its default.
    pub options: Box<dyn Any + Send>,
    /// The common options, complete.
    pub common: NodeOptions,
    /// The children that shall be other nodes than before, or none.
    pub children: Vec<Change>,
}

impl Permit {
    /// Gives several nodes new options: all of them, or none.
    pub async fn reopen(&mut self, all: Vec<Reopen>) -> Result<()> {
        self.transact(all.into_iter().map(Reopen::step).collect()).await
    }
}

impl Reopen {
    /// This reopen as a part of a transaction.
    pub fn step(self) -> Box<dyn Step> {
        Box::new(ReopenStep { what: self, ready: None, shared: None })
    }
}

struct ReopenStep {
    what: Reopen,
    /// The new configuration; dropping it aborts.
    ready: Option<Arc<dyn DynDriver>>,
    shared: Option<Arc<NodeShared>>,
}

impl Step for ReopenStep {
    fn drains(&self, graph: &Graph) -> Result<Vec<NodeId>> {
        graph.check_operation(self.what.node, Operation::Reopen)?;
        Ok(vec![self.what.node])
    }

    fn reopens(&self) -> Option<NodeId> {
        Some(self.what.node)
    }

    fn prepare<'a>(&'a mut self, drained: &'a mut Drained<'_>) -> Pending<'a, Result<()>> {
        Box::pin(async {
            self.ready = Some(drained.reopened(&self.what).await?);
            let shared = |vertex: &Vertex| vertex.node().map(|node| node.shared.clone());
            self.shared = drained.graph().vertex(self.what.node, shared).flatten();
            Ok(())
        })
    }

    fn edit<'d>(&self, edit: &mut GraphEdit<'d>, set: DrainedSet<'d>) -> Result<()> {
        let Reopen { node, common, children, .. } = &self.what;
        let owner = set.owner(*node)?;
        if edit.is_reconfigured(*node) {
            // It was prepared for what the node was before.
            return Err(Error::new(format!("{} is changed twice in one transaction", edit.described(*node))));
        }
        let body = self.ready.clone().expect("a step is prepared before it edits");
        edit.reconfigure(owner, body, *common)?;
        children.iter().try_for_each(|change| change.edit(edit, set))
    }

    fn commit(&mut self) {
        // The graph has it now; another copy would keep the node from closing.
        self.ready = None;
        // Whoever reopens a node has heard that its flushes fail, and goes on from here.
        if let Some(shared) = self.shared.take() {
            shared.forget_loss();
        }
    }

    fn abort<'a>(&'a mut self, _: &'a mut Drained<'_>) -> Pending<'a, ()> {
        self.ready = None;
        Box::pin(std::future::ready(()))
    }
}

impl Drained<'_> {
    /// The new configuration of one node.
    async fn reopened(&mut self, one: &Reopen) -> Result<Arc<dyn DynDriver>> {
        let missing = || Error::new("There is no such node");
        let report = self.graph().node(one.node).ok_or_else(missing)?;
        if !report.options.read_only {
            // The new way of having it open is told of no error that belongs to the old one.
            self.flushed(one.node, &report.name).await?;
        }
        let old = self.graph().borrow_body(one.node).ok_or_else(missing)?;
        let objects = self.graph().objects();
        let request = ReopenRequest { options: &*one.options, common: one.common, perms: report.perms, objects };
        old.body.reopen(request).await
    }

    /// Makes stable what was written. That an earlier flush failed is known already, and a reopen is the way out.
    pub(super) async fn flushed(&mut self, id: NodeId, name: &str) -> Result<()> {
        match self.exclusive(id)?.with(async |child| child.finish_and_flush().await).await {
            Ok(()) | Err(IoError::FlushLatched) => Ok(()),
            Err(error) => Err(error).doing(|| format!("Could not flush node '{name}' before reopening it")),
        }
    }
}
