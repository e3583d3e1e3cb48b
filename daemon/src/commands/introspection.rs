//! What a client asks to find out whom it talks to.

use std::rc::Rc;

use qmp::schema::{Empty, Value};
use qmp::wire::VersionInfo;
use qmp::{Qapi, Result};

use super::Table;
use crate::daemon::Daemon;

pub(super) fn register(table: &mut Table) {
    table.add("query-version", "Which QEMU is spoken like, and in `package` which Trellis this is.", query_version);
    table.add("query-commands", "All commands.", query_commands);
    table.add("query-qmp-schema", "All commands, events and types, for programs.", query_qmp_schema);
}

/// An element of `query-commands`.
#[derive(Clone, Debug, Qapi)]
struct CommandInfo {
    /// The command's name.
    name: String,
}

async fn query_version(_: Rc<Daemon>, _: Empty) -> Result<VersionInfo> {
    Ok(VersionInfo::new(crate::PACKAGE))
}

async fn query_commands(daemon: Rc<Daemon>, _: Empty) -> Result<Vec<CommandInfo>> {
    let info = |name: &&str| CommandInfo { name: (*name).to_owned() };
    Ok(daemon.commands.listed().iter().map(info).collect())
}

async fn query_qmp_schema(daemon: Rc<Daemon>, _: Empty) -> Result<Vec<Value>> {
    Ok(daemon.commands.schema().as_array().cloned().unwrap_or_default())
}
