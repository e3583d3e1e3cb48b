//! Snapshots: what a disk is now stays as it is, below an overlay that takes what is written from now on.

use std::rc::Rc;

use block_core::graph::{Change, NodeId, Step};
use qmp::schema::Empty;
use qmp::{Qapi, Result};

use super::{Table, no_such_device};
use crate::daemon::Daemon;
use crate::refused;

pub(super) fn register(table: &mut Table) {
    table.add_with(
        "blockdev-snapshot",
        "Puts an overlay above a node: what is written from now on goes there.",
        &["allow-write-only-overlay"],
        blockdev_snapshot,
    );
}

/// The arguments of `blockdev-snapshot`.
#[derive(Clone, Debug, Qapi)]
pub(super) struct BlockdevSnapshot {
    /// The node that shall stay as it is.
    node: String,
    /// The overlay: a node that nobody uses, with no backing node.
    overlay: String,
}

impl BlockdevSnapshot {
    /// What it takes, as steps of a transaction.
    pub(super) fn steps(&self, daemon: &Daemon) -> Result<Vec<Box<dyn Step>>> {
        Ok(Change::append(find(daemon, &self.overlay)?, find(daemon, &self.node)?))
    }
}

async fn blockdev_snapshot(daemon: Rc<Daemon>, arguments: BlockdevSnapshot) -> Result<Empty> {
    let steps = arguments.steps(&daemon)?;
    daemon.graph.permit().transact(steps).await.map_err(refused)?;
    Ok(Empty {})
}

fn find(daemon: &Daemon, name: &str) -> Result<NodeId> {
    daemon.graph.find(name).ok_or_else(|| no_such_device(Some(name), Some(name)))
}
