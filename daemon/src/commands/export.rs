//! Exports: who serves nodes to guests.

use std::rc::Rc;

use qmp::schema::Empty;
use qmp::{Qapi, Result};

use super::Table;
use crate::daemon::Daemon;
use crate::export::{self, BlockExportInfo, BlockExportOptions, ExportDetails};

pub(super) fn register(table: &mut Table) {
    table.add("block-export-add", "Starts to serve a node to guests.", block_export_add);
    table.add(
        "block-export-del",
        "Ends an export. Its socket and its threads are gone when this is answered.",
        block_export_del,
    );
    table.add("query-block-exports", "All exports, the youngest first.", query_block_exports);
    table.add_with(
        "x-query-export-details",
        "An extension: what goes on between each export and its guest.",
        &["unstable"],
        query_export_details,
    );
}

/// The arguments of `block-export-del`.
#[derive(Clone, Debug, Qapi)]
struct BlockExportDelArguments {
    /// The export's id.
    id: String,
    /// What to do about a guest that is connected.
    #[qapi(default = BlockExportRemoveMode::Safe)]
    mode: BlockExportRemoveMode,
}

/// What to do about a guest that is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
enum BlockExportRemoveMode {
    /// Refuse.
    Safe,
    /// Disconnect it, once what it asked for is done.
    Hard,
}

async fn block_export_add(daemon: Rc<Daemon>, options: BlockExportOptions) -> Result<Empty> {
    export::add(&daemon, options).await.map(|()| Empty {})
}

async fn block_export_del(daemon: Rc<Daemon>, arguments: BlockExportDelArguments) -> Result<Empty> {
    let hard = arguments.mode == BlockExportRemoveMode::Hard;
    export::remove(&daemon, &arguments.id, hard).await.map(|()| Empty {})
}

async fn query_block_exports(daemon: Rc<Daemon>, _: Empty) -> Result<Vec<BlockExportInfo>> {
    Ok(daemon.exports.list(&daemon.graph))
}

/// An extension: what goes on between an export and its guest.
async fn query_export_details(daemon: Rc<Daemon>, _: Empty) -> Result<Vec<ExportDetails>> {
    Ok(daemon.exports.details())
}
