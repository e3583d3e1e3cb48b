//! Changing what a qcow2 image is like. A test file declares `bench` and this.

use std::rc::Rc;

use block_core::drivers::format::qcow2::{self, AmendOptions};
use block_core::graph::{Graph, NodeId, PermSet, Perms};
use block_core::port::PORT;
use block_core::rt::Local;

use crate::bench::attach;

/// Changes what the qcow2 image in a node is like.
pub(crate) async fn amend(graph: &Rc<Graph>, node: NodeId, options: &AmendOptions) -> Result<(), String> {
    let uses = PermSet::CONSISTENT_READ | PermSet::WRITE | PermSet::RESIZE;
    let perms = Perms { uses, shares: PermSet::ALL.without(PermSet::WRITE | PermSet::RESIZE) };
    let port = attach(graph, node, perms).await?;
    let mut job = port.handle().job(&Local::current());
    let amended = job.step(async |cx| qcow2::amend(cx.child(PORT), options, None).await).await;
    port.detach(&mut graph.permit()).await;
    amended.map_err(|error| error.full())
}
