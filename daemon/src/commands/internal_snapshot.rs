//! Internal snapshots: what a disk is now is kept inside its image.

use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use block_core::graph::{NewSnapshot, SnapshotName, Step, TakeSnapshot};
use qmp::schema::Empty;
use qmp::{Error, Qapi, Result};

use super::blockdev::signed;
use super::{Table, no_such_device};
use crate::daemon::Daemon;
use crate::refused;

pub(super) fn register(table: &mut Table) {
    table.add(
        "blockdev-snapshot-internal-sync",
        "Keeps what a disk is now inside its image.",
        blockdev_snapshot_internal_sync,
    );
    table.add(
        "blockdev-snapshot-delete-internal-sync",
        "Deletes an internal snapshot; gives what it was.",
        blockdev_snapshot_delete_internal_sync,
    );
}

/// The arguments of `blockdev-snapshot-internal-sync`.
#[derive(Clone, Debug, Qapi)]
#[qapi(name = "BlockdevSnapshotInternal")]
pub(super) struct BlockdevSnapshotInternal {
    /// The node. No other node may stand on it.
    device: String,
    /// The snapshot's name: at most 255 bytes, and no other snapshot's.
    name: String,
}

/// The arguments of `blockdev-snapshot-delete-internal-sync`. One of `id` and `name` is given, or both.
#[derive(Clone, Debug, Qapi)]
struct DeleteInternal {
    /// The node.
    device: String,
    /// The snapshot's id.
    id: Option<String>,
    /// The snapshot's name. Where several have it, the first one.
    name: Option<String>,
}

/// An internal snapshot.
#[derive(Clone, Debug, Qapi)]
pub(super) struct SnapshotInfo {
    /// Its id: no two of an image have the same.
    id: String,
    /// Its name.
    name: String,
    /// Bytes of a machine's state that it has; 0 for those that are taken here.
    vm_state_size: i64,
    /// When it was taken, in seconds since 1970.
    date_sec: i64,
    /// Nanoseconds after that.
    date_nsec: i64,
    /// How long the machine had been running, in seconds; 0 for those that are taken here.
    vm_clock_sec: i64,
    /// Nanoseconds after that.
    vm_clock_nsec: i64,
    /// Instructions that the machine had executed; absent where nobody counted them.
    icount: Option<i64>,
}

impl SnapshotInfo {
    pub(super) fn of(info: block_core::graph::SnapshotInfo) -> Self {
        let clock = info.vm_clock_nsec;
        Self {
            id: info.id,
            name: info.name,
            vm_state_size: signed(info.vm_state_size),
            date_sec: info.date.0.into(),
            date_nsec: info.date.1.into(),
            vm_clock_sec: signed(clock / NSEC),
            vm_clock_nsec: signed(clock % NSEC),
            icount: info.icount.map(signed),
        }
    }
}

impl BlockdevSnapshotInternal {
    /// What it takes, as a step of a transaction.
    pub(super) fn step(&self, daemon: &Daemon) -> Result<Box<dyn Step>> {
        let node = daemon.graph.find(&self.device);
        let node = node.ok_or_else(|| no_such_device(Some(&self.device), Some(&self.device)))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The image has 32 bits for it.
        let date = (u32::try_from(now.as_secs()).unwrap_or(u32::MAX), now.subsec_nanos());
        Ok(TakeSnapshot::step(node, NewSnapshot { name: self.name.clone(), date }))
    }
}

async fn blockdev_snapshot_internal_sync(daemon: Rc<Daemon>, arguments: BlockdevSnapshotInternal) -> Result<Empty> {
    let step = arguments.step(&daemon)?;
    daemon.graph.permit().transact(vec![step]).await.map_err(refused)?;
    Ok(Empty {})
}

async fn blockdev_snapshot_delete_internal_sync(daemon: Rc<Daemon>, arguments: DeleteInternal) -> Result<SnapshotInfo> {
    let DeleteInternal { device, id, name } = arguments;
    let node = daemon.graph.find(&device).ok_or_else(|| no_such_device(Some(&device), Some(&device)))?;
    if id.is_none() && name.is_none() {
        return Err(Error::generic("Name or id must be provided"));
    }
    let deleted = daemon.graph.permit().delete_snapshot(node, SnapshotName { id, name }).await;
    deleted.map(SnapshotInfo::of).map_err(refused)
}

/// Nanoseconds in a second.
const NSEC: u64 = 1_000_000_000;
