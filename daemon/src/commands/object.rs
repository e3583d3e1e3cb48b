//! Making and ending objects.

use std::rc::Rc;

use qmp::schema::Empty;
use qmp::{Qapi, Result};

use super::Table;
use crate::daemon::Daemon;
use crate::object::ObjectOptions;

pub(super) fn register(table: &mut Table) {
    table.add("object-add", "Makes an object.", object_add);
    table.add("object-del", "Removes an object that nobody uses.", object_del);
}

/// The arguments of `object-del`.
#[derive(Clone, Debug, Qapi)]
struct ObjectDelArguments {
    /// The object's id.
    id: String,
}

async fn object_add(daemon: Rc<Daemon>, options: ObjectOptions) -> Result<Empty> {
    daemon.objects.add(options).await.map(|()| Empty {})
}

/// An IOThread that an export uses is refused, instead of leaving the export without a thread.
async fn object_del(daemon: Rc<Daemon>, arguments: ObjectDelArguments) -> Result<Empty> {
    daemon.objects.remove(&arguments.id).map(|()| Empty {})
}
