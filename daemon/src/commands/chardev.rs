//! Character devices. They are made on the command line only.

use std::rc::Rc;

use qmp::Result;
use qmp::schema::Empty;

use super::Table;
use crate::control::ChardevInfo;
use crate::daemon::Daemon;

pub(super) fn register(table: &mut Table) {
    table.add("query-chardev", "All character devices.", query_chardev);
}

async fn query_chardev(daemon: Rc<Daemon>, _: Empty) -> Result<Vec<ChardevInfo>> {
    Ok(daemon.chardevs.report())
}
