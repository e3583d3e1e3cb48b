//! Changes of the graph's shape, alone or several as one.

use std::rc::Rc;

use block_core::base;
use block_core::catalog::{self, BlockdevOptions};
use block_core::drivers::BlockDirtyBitmap;
use block_core::graph::{BitmapAction, Change, Drained, DrainedSet, Graph, GraphEdit, NodeId, Pending, Step};
use block_core::rt::sync::Turns;
use qmp::schema::Empty;
use qmp::{Error, Qapi, Result};

use super::bitmap::{BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, step};
use super::internal_snapshot::BlockdevSnapshotInternal;
use super::snapshot::{BlockdevSnapshot, BlockdevSnapshotSync, NewOverlay};
use super::{Table, no_such_device};
use crate::daemon::Daemon;
use crate::refused;

pub(super) fn register(table: &mut Table) {
    table.add(
        "transaction",
        "Makes several changes at one moment: all of them, or where one is refused none.",
        transaction,
    );
    table.add_with(
        "x-blockdev-replace",
        "An extension: lets one parent, an export or a node, use another node. A filter is put above a node in use, and \
         taken away again, so.",
        &["unstable"],
        blockdev_replace,
    );
}

/// The arguments of `transaction`.
#[derive(Clone, Debug, Qapi)]
struct TransactionArguments {
    /// What is to be done, in this order.
    actions: Vec<TransactionAction>,
    /// How the actions belong together.
    properties: Option<TransactionProperties>,
}

/// How the actions of a transaction belong together.
#[derive(Clone, Copy, Debug, Qapi)]
struct TransactionProperties {
    /// What becomes of jobs that the actions start.
    #[qapi(default = ActionCompletionMode::Individual)]
    completion_mode: ActionCompletionMode,
}

/// What becomes of the jobs of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
enum ActionCompletionMode {
    /// Each ends by itself.
    Individual,
    /// If one fails, all do. Needs actions that start jobs; there are none yet.
    Grouped,
}

/// An action of a transaction.
#[derive(Clone, Debug, Qapi)]
#[qapi(union, tag = "type", tag_name = "TransactionActionKind")]
enum TransactionAction {
    /// Fails, so that nothing is done: for tests.
    Abort(AbortWrapper),
    /// An extension: as the command of this name.
    BlockdevReopen(ReopenWrapper),
    /// An extension: as the command of this name.
    #[qapi(rename = "x-blockdev-replace")]
    BlockdevReplace(ReplaceWrapper),
    /// As the command of this name.
    BlockdevSnapshot(SnapshotWrapper),
    /// As the command of this name.
    BlockdevSnapshotInternalSync(SnapshotInternalWrapper),
    /// As the command of this name.
    BlockdevSnapshotSync(SnapshotSyncWrapper),
    /// As the command of this name.
    BlockDirtyBitmapAdd(BitmapAddWrapper),
    /// As the command of this name.
    BlockDirtyBitmapRemove(BitmapWrapper),
    /// As the command of this name.
    BlockDirtyBitmapClear(BitmapWrapper),
    /// As the command of this name.
    BlockDirtyBitmapEnable(BitmapWrapper),
    /// As the command of this name.
    BlockDirtyBitmapDisable(BitmapWrapper),
    /// As the command of this name.
    BlockDirtyBitmapMerge(BitmapMergeWrapper),
}

/// The action `blockdev-snapshot`.
#[derive(Clone, Debug, Qapi)]
struct SnapshotWrapper {
    /// What the command takes.
    data: BlockdevSnapshot,
}

/// The action `blockdev-snapshot-internal-sync`.
#[derive(Clone, Debug, Qapi)]
struct SnapshotInternalWrapper {
    /// What the command takes.
    data: BlockdevSnapshotInternal,
}

/// The action `blockdev-snapshot-sync`.
#[derive(Clone, Debug, Qapi)]
struct SnapshotSyncWrapper {
    /// What the command takes.
    data: BlockdevSnapshotSync,
}

/// The action `block-dirty-bitmap-add`.
#[derive(Clone, Debug, Qapi)]
struct BitmapAddWrapper {
    /// What the command takes.
    data: BlockDirtyBitmapAdd,
}

/// An action on a bitmap that is there.
#[derive(Clone, Debug, Qapi)]
struct BitmapWrapper {
    /// What the command takes.
    data: BlockDirtyBitmap,
}

/// The action `block-dirty-bitmap-merge`.
#[derive(Clone, Debug, Qapi)]
struct BitmapMergeWrapper {
    /// What the command takes.
    data: BlockDirtyBitmapMerge,
}

/// The action `abort`.
#[derive(Clone, Debug, Qapi)]
struct AbortWrapper {
    /// Nothing.
    data: Abort,
}

/// What `abort` takes.
#[derive(Clone, Debug, Qapi)]
struct Abort {}

/// The action `blockdev-reopen`.
#[derive(Clone, Debug, Qapi)]
struct ReopenWrapper {
    /// What the command takes.
    data: ReopenAction,
}

/// What the action `blockdev-reopen` takes.
#[derive(Clone, Debug, Qapi)]
struct ReopenAction {
    /// For each node all its options: what is left out goes back to its default.
    options: Vec<BlockdevOptions>,
}

/// The action `x-blockdev-replace`.
#[derive(Clone, Debug, Qapi)]
struct ReplaceWrapper {
    /// What the command takes.
    data: BlockdevReplace,
}

/// The arguments of `x-blockdev-replace`.
#[derive(Clone, Debug, Qapi)]
struct BlockdevReplace {
    /// The node that the parent shall use.
    new_child: String,
    /// Whose child it becomes.
    #[qapi(flatten)]
    parent: BlockParent,
}

/// A user of a node.
#[derive(Clone, Debug, Qapi)]
#[qapi(union, tag = "parent-type", tag_name = "BlockParentType")]
enum BlockParent {
    /// An export.
    Export(ExportParent),
    /// Another node.
    Driver(DriverParent),
}

/// An export as the user of a node.
#[derive(Clone, Debug, Qapi)]
struct ExportParent {
    /// Its id.
    export_id: String,
}

/// A node as the user of a node.
#[derive(Clone, Debug, Qapi)]
struct DriverParent {
    /// Its node-name.
    node_name: String,
    /// Which of its children: `file`, `backing`, ….
    child: String,
}

async fn transaction(daemon: Rc<Daemon>, arguments: TransactionArguments) -> Result<Empty> {
    if arguments.actions.len() > MAX_ACTIONS {
        return Err(Error::generic(format!("A transaction may not have more than {MAX_ACTIONS} actions")));
    }
    let grouped =
        arguments.properties.is_some_and(|properties| properties.completion_mode == ActionCompletionMode::Grouped);
    let (mut steps, mut overlays) = (Vec::new(), Vec::new());
    let result = collect(&daemon, arguments.actions, grouped, &mut steps, &mut overlays).await;
    let result = match result {
        Ok(()) => daemon.graph.permit().transact(steps).await.map_err(refused),
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        for overlay in overlays.into_iter().rev() {
            overlay.undo(&daemon).await;
        }
        return Err(error);
    }
    Ok(Empty {})
}

/// What the actions come to. Images are made on the way: they have to go again where the rest fails.
async fn collect(
    daemon: &Rc<Daemon>,
    actions: Vec<TransactionAction>,
    grouped: bool,
    steps: &mut Vec<Box<dyn Step>>,
    overlays: &mut Vec<NewOverlay>,
) -> Result<()> {
    let mut turns = Turns::begin();
    for action in actions {
        turns.step().await;
        if grouped {
            let name = qmp::schema::Union::tag(&action);
            let property = "transaction property completion-mode = grouped";
            return Err(Error::generic(format!("Action '{name}' does not support {property}")));
        }
        steps.extend(action.steps(daemon, overlays).await?);
    }
    Ok(())
}

async fn blockdev_replace(daemon: Rc<Daemon>, arguments: BlockdevReplace) -> Result<Empty> {
    let step = arguments.step(&daemon)?;
    daemon.graph.permit().transact(vec![step]).await.map_err(refused)?;
    Ok(Empty {})
}

impl TransactionAction {
    async fn steps(self, daemon: &Rc<Daemon>, overlays: &mut Vec<NewOverlay>) -> Result<Vec<Box<dyn Step>>> {
        match self {
            Self::Abort(_) => Ok(vec![Box::new(Aborting)]),
            Self::BlockdevReopen(wrapper) => {
                catalog::reopen_steps(&daemon.graph, &wrapper.data.options).await.map_err(refused)
            }
            Self::BlockdevReplace(wrapper) => Ok(vec![wrapper.data.step(daemon)?]),
            Self::BlockdevSnapshot(wrapper) => wrapper.data.steps(daemon),
            Self::BlockdevSnapshotInternalSync(wrapper) => Ok(vec![wrapper.data.step(daemon)?]),
            Self::BlockdevSnapshotSync(wrapper) => {
                let overlay = wrapper.data.prepared(daemon).await?;
                let steps = overlay.steps();
                overlays.push(overlay);
                Ok(steps)
            }
            Self::BlockDirtyBitmapAdd(wrapper) => Ok(vec![wrapper.data.step(daemon)?]),
            Self::BlockDirtyBitmapRemove(wrapper) => Ok(vec![step(daemon, wrapper.data, BitmapAction::Remove)?]),
            Self::BlockDirtyBitmapClear(wrapper) => Ok(vec![step(daemon, wrapper.data, BitmapAction::Clear)?]),
            Self::BlockDirtyBitmapEnable(wrapper) => Ok(vec![step(daemon, wrapper.data, BitmapAction::Enable)?]),
            Self::BlockDirtyBitmapDisable(wrapper) => Ok(vec![step(daemon, wrapper.data, BitmapAction::Disable)?]),
            Self::BlockDirtyBitmapMerge(wrapper) => Ok(vec![wrapper.data.step(daemon)?]),
        }
    }
}

impl BlockdevReplace {
    fn step(&self, daemon: &Daemon) -> Result<Box<dyn Step>> {
        let new = find(daemon, &self.new_child)?;
        let (parent, child) = match &self.parent {
            BlockParent::Export(ExportParent { export_id }) => (daemon.exports.root(export_id)?, "root".to_owned()),
            BlockParent::Driver(DriverParent { node_name, child }) => (find(daemon, node_name)?, child.clone()),
        };
        Ok(Box::new(Change::Lead { parent, child: child.into(), to: new }))
    }
}

fn find(daemon: &Daemon, name: &str) -> Result<NodeId> {
    daemon.graph.find(name).ok_or_else(|| no_such_device(None, Some(name)))
}

/// The step that always fails.
struct Aborting;

impl Step for Aborting {
    fn drains(&self, _: &Graph) -> base::Result<Vec<NodeId>> {
        Ok(Vec::new())
    }

    fn prepare<'a>(&'a mut self, _: &'a mut Drained<'_>) -> Pending<'a, base::Result<()>> {
        Box::pin(std::future::ready(Err(base::Error::new("Transaction aborted using Abort action"))))
    }

    fn edit<'d>(&self, _: &mut GraphEdit<'d>, _: DrainedSet<'d>) -> base::Result<()> {
        unreachable!("a transaction whose step fails to prepare does not edit")
    }
}

/// Actions of a transaction at the most: all of them are made in one turn.
const MAX_ACTIONS: usize = 16_384;
