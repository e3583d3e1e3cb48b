//! The whole graph as queries show it: every vertex, and every edge with its permissions.

use std::borrow::Cow;

use super::control::Graph;
use super::id::NodeId;
use super::permission::Perms;

/// A node or a root.
#[derive(Clone, Debug)]
pub struct VertexReport {
    /// Where it is.
    pub id: NodeId,
    /// The node-name, or how messages call a root.
    pub name: String,
    /// It starts requests: an export, a job.
    pub is_root: bool,
    /// Its edges, in order.
    pub edges: Vec<EdgeReport>,
}

/// An edge.
#[derive(Clone, Debug)]
pub struct EdgeReport {
    /// What QMP calls it.
    pub name: Cow<'static, str>,
    /// Where it leads.
    pub to: NodeId,
    /// What it uses and bears.
    pub perms: Perms,
}

impl Graph {
    /// All nodes and roots, in the order in which they were added.
    pub fn picture(&self) -> Vec<VertexReport> {
        self.vertices(|id, vertex| VertexReport {
            id,
            name: vertex.name.clone(),
            is_root: vertex.root().is_some(),
            edges: vertex
                .edges
                .iter()
                .map(|edge| EdgeReport { name: edge.name.clone(), to: edge.to, perms: edge.perms })
                .collect(),
        })
    }

    /// Whether an export or a job stands right above the node.
    pub fn has_root(&self, id: NodeId) -> bool {
        self.picture().iter().any(|vertex| vertex.is_root && vertex.edges.iter().any(|edge| edge.to == id))
    }
}
