//! What queries say about a node: its driver's words, and where it has none, those of the file below.

use crate::graph::{DriverInfo, Graph, NodeId};

/// A node for `query-named-block-nodes`. A format has the file name and the space of its `file`, like QEMU's.
pub async fn info(graph: &Graph, id: NodeId) -> Option<DriverInfo> {
    let mut info = graph.info(id).await?;
    let mut at = id;
    while info.filename.is_empty() || info.allocated.is_none() {
        let Some(below) = graph.node(at).and_then(|node| node.children.first().cloned()) else { break };
        at = below.1;
        let file = graph.info(at).await?;
        if info.filename.is_empty() {
            info.filename = file.filename;
        }
        info.allocated = info.allocated.or(file.allocated);
    }
    Some(info)
}
