//! The process itself.

use std::rc::Rc;

use qmp::Result;
use qmp::schema::Empty;

use super::Table;
use crate::daemon::Daemon;

pub(super) fn register(table: &mut Table) {
    table.add("quit", "Ends the daemon in good order: exports first, then nodes are flushed and closed.", quit);
}

/// The answer is sent before anything ends: sessions are closed last.
async fn quit(daemon: Rc<Daemon>, _: Empty) -> Result<Empty> {
    tracing::info!("a client asked us to quit");
    daemon.ask_to_quit();
    Ok(Empty {})
}
