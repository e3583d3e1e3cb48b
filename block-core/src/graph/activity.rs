//! Nodes that become active or inactive (QMP: `blockdev-set-active`). An inactive node holds no locks of its image and
//! takes no writes, so that another process may have it; whoever is active stands on active nodes.

use std::collections::BTreeSet;

use super::control::{Graph, Permit};
use super::drain::Drained;
use super::id::NodeId;
use super::options::NodeOptions;
use super::permission::PermSet;
use super::resize::NewBody;
use super::shape::Vertex;
use crate::base::{Error, IoError, Result, ResultExt};

impl Permit {
    /// Makes a node active with all that it stands on; without one, all nodes.
    pub async fn activate(&mut self, of: Option<NodeId>) -> Result<()> {
        let graph = self.graph().clone();
        let nodes = graph.and_below(of).into_iter().filter(|id| !graph.is_active(*id)).collect();
        self.set_active(nodes, true).await
    }

    /// Makes a node inactive with what it stands on, as far as nobody else does; without one, all nodes. Refused while
    /// an active node or a writer stands on it.
    pub async fn deactivate(&mut self, of: Option<NodeId>) -> Result<()> {
        let graph = self.graph().clone();
        if of.is_some_and(|id| graph.active_parents(id).next().is_some()) {
            return Err(Error::new("Node has active parent node"));
        }
        let mut nodes = Vec::new();
        for id in graph.and_below(of) {
            // What an inactive node stands on is not asked for with it.
            let is_meant = of.is_none_or(|of| of == id) || graph.parents(id).iter().any(|id| nodes.contains(id));
            let is_free = graph.active_parents(id).all(|parent| nodes.contains(&parent));
            if is_meant && is_free && graph.is_active(id) {
                nodes.push(id);
            }
        }
        if let Some(writer) = nodes.iter().find_map(|id| graph.writing_root(*id)) {
            let what = if of.is_some() { "node" } else { "all nodes" };
            let text = format!("Failed to inactivate {what}: Operation not permitted while {writer} writes");
            return Err(Error::new(text));
        }
        self.set_active(nodes, false).await
    }

    async fn set_active(&mut self, nodes: Vec<NodeId>, active: bool) -> Result<()> {
        if nodes.is_empty() {
            return Ok(());
        }
        let mut drained = self.drain(&nodes).await?;
        if !active {
            drained.handed_over(&nodes).await?;
        }
        let mut ready = Vec::new();
        for id in nodes {
            ready.push(drained.with_activity(id, active).await?);
        }
        let committed = drained.reconfigured(ready).await?;
        committed.close(self).await;
        Ok(())
    }
}

impl Drained<'_> {
    /// Whoever has the images next sees all of them, or it is said once that what was written may be lost.
    async fn handed_over(&mut self, nodes: &[NodeId]) -> Result<()> {
        let mut result = Ok(());
        for id in nodes {
            let shared = |vertex: &Vertex| vertex.node().map(|node| (node.shared.clone(), node.options));
            let Some((shared, options)) = self.graph().vertex(*id, shared).flatten() else { continue };
            if options.read_only {
                continue;
            }
            let flushed = self.exclusive(*id)?.with(async |child| child.finish_and_flush().await).await;
            if let Err(error) = flushed
                && !(shared.tell_loss() && error == IoError::FlushLatched)
                && result.is_ok()
            {
                result = Err(error).doing(|| format!("Could not flush node '{}' before deactivating it", shared.name));
            }
        }
        result
    }

    /// A node's configuration as an active or an inactive one.
    async fn with_activity(&self, id: NodeId, active: bool) -> Result<NewBody> {
        let missing = || Error::new("There is no such node");
        let report = self.graph().node(id).ok_or_else(missing)?;
        let old = self.graph().borrow_body(id).ok_or_else(missing)?;
        let options = NodeOptions { active, ..report.options };
        let new = old.body.set_active(options, report.perms).await?;
        Ok((id, new.unwrap_or_else(|| old.body.clone()), options))
    }
}

impl Graph {
    /// A node and what it stands on, or all nodes: parents before children.
    fn and_below(&self, of: Option<NodeId>) -> Vec<NodeId> {
        let tops = of.map_or_else(|| self.nodes().iter().map(|node| node.id).collect(), |id| vec![id]);
        self.below(tops)
    }

    fn is_active(&self, id: NodeId) -> bool {
        self.vertex(id, |vertex| vertex.node().is_some_and(|node| node.options.active)).unwrap_or(false)
    }

    fn active_parents(&self, id: NodeId) -> impl Iterator<Item = NodeId> {
        self.parents(id).into_iter().filter(|parent| self.is_active(*parent))
    }

    /// How messages call a root right above the node that writes.
    fn writing_root(&self, id: NodeId) -> Option<String> {
        let writes = PermSet::WRITE | PermSet::WRITE_UNCHANGED;
        let root = |vertex: &Vertex| {
            let is_writer = vertex.root().is_some() && !(vertex.perms.uses & writes).is_empty();
            is_writer.then(|| vertex.described())
        };
        self.parents(id).into_iter().find_map(|parent| self.vertex(parent, root).flatten())
    }

    fn parents(&self, id: NodeId) -> BTreeSet<NodeId> {
        self.vertex(id, |vertex| vertex.parents.iter().copied().collect()).unwrap_or_default()
    }
}
