//! Snapshots: what a disk is now stays as it is, below an overlay that takes what is written from now on.

use std::rc::Rc;

use block_core::catalog::{
    self, BlockdevCreateOptions, BlockdevCreateOptionsFile, BlockdevCreateOptionsQcow2, BlockdevOptions, PreallocMode,
};
use block_core::graph::{Blocker, Change, DiscardMode, DriverInfo, NodeId, NodeReport, Operation, Step};
use block_core::rt::blocking;
use qmp::schema::{Empty, from_value};
use qmp::{Error, Qapi, Result};
use serde_json::json;

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
    table.add(
        "blockdev-snapshot-sync",
        "Makes an image and puts it above a node as its overlay: what is written from now on goes there.",
        blockdev_snapshot_sync,
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

/// The arguments of `blockdev-snapshot-sync`.
#[derive(Clone, Debug, Qapi)]
pub(super) struct BlockdevSnapshotSync {
    /// Always wrong: there are no devices.
    device: Option<String>,
    /// The node that shall stay as it is.
    node_name: Option<String>,
    /// The path of the overlay's image.
    snapshot_file: String,
    /// The overlay's node-name; a fresh one if absent.
    snapshot_node_name: Option<String>,
    /// The overlay's format. `qcow2` if absent, and the only one that there is.
    format: Option<String>,
    /// Where the image comes from.
    #[qapi(default = NewImageMode::AbsolutePaths)]
    mode: NewImageMode,
}

/// Where a new image comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
enum NewImageMode {
    /// It is there already.
    Existing,
    /// It is made now.
    AbsolutePaths,
}

/// An overlay that has been made, and that nobody uses yet.
pub(super) struct NewOverlay {
    node: NodeId,
    base: NodeId,
    /// The file that was made for it and was not there before.
    made: Option<String>,
    /// The base keeps the size that the overlay was made for.
    _size: Blocker,
}

impl NewOverlay {
    /// What puts it above its base, as steps of a transaction.
    pub(super) fn steps(&self) -> Vec<Box<dyn Step>> {
        Change::publish(self.node, self.base)
    }

    /// It is not needed: there shall be nothing of it.
    pub(super) async fn undo(self, daemon: &Daemon) {
        match self.remove(daemon).await {
            Ok(()) => remove_made(self.made).await,
            Err(error) => {
                let text = "an overlay that is not needed could not be removed";
                let left = self.made.map(|file| format!(", and its file '{file}' is left")).unwrap_or_default();
                tracing::error!("{text}{left}: {}", error.full());
            }
        }
    }

    async fn remove(&self, daemon: &Daemon) -> block_core::base::Result<()> {
        match daemon.graph.permit().remove(self.node).await {
            Ok(()) => Ok(()),
            // The second time nobody minds what cannot be flushed.
            Err(_) => daemon.graph.permit().remove(self.node).await,
        }
    }
}

async fn remove_made(file: Option<String>) {
    let Some(file) = file else { return };
    let path = file.clone();
    if let Err(error) = blocking(move || std::fs::remove_file(path)).await {
        tracing::error!("'{file}', which was made for an overlay, could not be removed: {error}");
    }
}

async fn exists(file: &str) -> bool {
    let path = file.to_owned();
    // What cannot be looked at is not ours to remove.
    blocking(move || std::fs::exists(path).unwrap_or(true)).await
}

impl BlockdevSnapshotSync {
    /// Makes the image and opens it.
    pub(super) async fn prepared(&self, daemon: &Rc<Daemon>) -> Result<NewOverlay> {
        let (device, name) = (self.device.as_deref(), self.node_name.as_deref());
        let base = name.and_then(|name| daemon.graph.find(name));
        let base = base.ok_or_else(|| no_such_device(Some(device.unwrap_or("")), Some(name.unwrap_or(""))))?;
        self.check(daemon)?;
        daemon.graph.check_free_base(base).map_err(refused)?;
        let size = daemon.graph.block(base, &[Operation::Resize], "an overlay of its size is being made");
        let report = daemon.graph.node(base).ok_or_else(|| no_such_device(device, name))?;
        let made = match self.mode {
            NewImageMode::Existing => None,
            NewImageMode::AbsolutePaths => self.make(daemon, &report).await?,
        };
        match self.open(daemon, &report).await {
            Ok(node) => Ok(NewOverlay { node, base, made, _size: size }),
            Err(error) => {
                remove_made(made).await;
                Err(error)
            }
        }
    }

    fn check(&self, daemon: &Daemon) -> Result<()> {
        if self.snapshot_node_name.as_deref().is_some_and(|name| daemon.graph.find(name).is_some()) {
            return Err(Error::generic("New overlay node-name already in use"));
        }
        match self.format.as_deref() {
            None | Some("qcow2") => Ok(()),
            Some(format) if catalog::drivers().contains(&format) => {
                Err(Error::generic(format!("Backing file not supported for file format '{format}'")))
            }
            Some(format) => Err(Error::generic(format!("Unknown file format '{format}'"))),
        }
    }

    /// The file's name, if it was not there before.
    async fn make(&self, daemon: &Rc<Daemon>, base: &NodeReport) -> Result<Option<String>> {
        let missing = || {
            let text = "which is no image in a file: use blockdev-create and blockdev-snapshot";
            Error::generic(format!("The overlay cannot name node '{}', {text}", base.name))
        };
        let info = name_in_image(daemon, base).await.ok_or_else(missing)?;
        let made = (!exists(&self.snapshot_file).await).then(|| self.snapshot_file.clone());
        match self.make_image(daemon, base, info.filename, info.driver).await {
            Ok(()) => Ok(made),
            Err(error) => {
                // Where there is no file yet, it could not even be begun.
                if exists(&self.snapshot_file).await {
                    remove_made(made).await;
                }
                Err(error)
            }
        }
    }

    async fn make_image(&self, daemon: &Rc<Daemon>, base: &NodeReport, backing: String, format: &str) -> Result<()> {
        let filename = self.snapshot_file.clone();
        let file = BlockdevCreateOptionsFile {
            filename: filename.clone(),
            size: 0,
            preallocation: PreallocMode::Off,
            nocow: false,
            extent_size_hint: 0,
        };
        catalog::create(&daemon.graph, BlockdevCreateOptions::File(file)).await.map_err(refused)?;
        let options = json!({
            "file": { "driver": "file", "filename": filename },
            "size": base.geometry.size,
            "backing-file": absolute(&backing),
            "backing-fmt": format,
        });
        let options: BlockdevCreateOptionsQcow2 = from_value(options)?;
        catalog::create(&daemon.graph, BlockdevCreateOptions::Qcow2(options)).await.map_err(refused)
    }

    /// Opened as the base is.
    async fn open(&self, daemon: &Rc<Daemon>, base: &NodeReport) -> Result<NodeId> {
        let common = base.options;
        let mut options = json!({
            "driver": "qcow2",
            "cache": { "direct": common.direct, "no-flush": common.no_flush },
            "discard": if common.discard == DiscardMode::Unmap { "unmap" } else { "ignore" },
            "file": { "driver": "file", "filename": self.snapshot_file },
            "backing": null,
        });
        if let Some(name) = &self.snapshot_node_name {
            options["node-name"] = json!(name);
        }
        let options: BlockdevOptions = from_value(options)?;
        let mut permit = daemon.graph.permit();
        let added = match self.mode {
            NewImageMode::Existing => catalog::add_unnamed(&mut permit, options).await,
            NewImageMode::AbsolutePaths => catalog::add_withheld(&mut permit, options).await,
        };
        added.map_err(refused)
    }
}

/// Whoever opens the file under its name, as the format that the driver is, sees what the node has.
async fn name_in_image(daemon: &Daemon, base: &NodeReport) -> Option<DriverInfo> {
    let info = catalog::info(&daemon.graph, base.id).await?;
    let is_protocol = |info: &DriverInfo| ["file", "host_device"].contains(&info.driver);
    if is_protocol(&info) {
        return Some(info);
    }
    let file = daemon.graph.node(base.children.first()?.1)?;
    let is_whole = info.driver == "qcow2" || file.geometry.size == base.geometry.size;
    let below = daemon.graph.info(file.id).await?;
    (["qcow2", "raw"].contains(&info.driver) && is_whole && is_protocol(&below)).then_some(info)
}

/// An image names its base from wherever it is looked at.
fn absolute(path: &str) -> String {
    let absolute = std::path::absolute(path).ok();
    absolute.and_then(|path| path.into_os_string().into_string().ok()).unwrap_or_else(|| path.to_owned())
}

async fn blockdev_snapshot(daemon: Rc<Daemon>, arguments: BlockdevSnapshot) -> Result<Empty> {
    let steps = arguments.steps(&daemon)?;
    daemon.graph.permit().transact(steps).await.map_err(refused)?;
    Ok(Empty {})
}

async fn blockdev_snapshot_sync(daemon: Rc<Daemon>, arguments: BlockdevSnapshotSync) -> Result<Empty> {
    let overlay = arguments.prepared(&daemon).await?;
    let result = daemon.graph.permit().transact(overlay.steps()).await;
    if let Err(error) = result {
        overlay.undo(&daemon).await;
        return Err(refused(error));
    }
    Ok(Empty {})
}

fn find(daemon: &Daemon, name: &str) -> Result<NodeId> {
    daemon.graph.find(name).ok_or_else(|| no_such_device(Some(name), Some(name)))
}
