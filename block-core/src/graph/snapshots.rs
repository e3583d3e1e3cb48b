//! Internal snapshots: what an image was, kept inside it. Which node has them, and how they are taken, deleted and applied
//! while nobody is there.

use std::sync::Arc;

use super::blockers::Operation;
use super::control::{Graph, Permit};
use super::drain::Drained;
use super::driver::DynDriver;
use super::edit::{DrainedSet, GraphEdit};
use super::id::NodeId;
use super::permission::{PermSet, Perms, Role};
use super::shape::Vertex;
use super::transaction::{Pending, Step};
use crate::base::{Error, Result, ResultExt};

/// What there is to say about an internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its id, which the image chose: no two have the same.
    pub id: String,
    /// Its name. Images of others may have two of the same.
    pub name: String,
    /// Bytes of the machine's state that it has besides the disk.
    pub vm_state_size: u64,
    /// When it was taken: seconds since 1970, and nanoseconds.
    pub date: (u32, u32),
    /// How long the machine had been running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instructions that the machine had executed, where they were counted.
    pub icount: Option<u64>,
    /// The disk's size in bytes at that time, where the image says it.
    pub disk_size: Option<u64>,
}

/// What a change was about, and the node's new configuration if it has one.
pub(crate) type Snapshotted = (SnapshotInfo, Option<Arc<dyn DynDriver>>);

/// A snapshot that shall be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name, which may be another one's too. The image chooses the id.
    pub name: String,
    /// The time now: seconds since 1970, and nanoseconds.
    pub date: (u32, u32),
}

/// How a snapshot is called. At least one of both is given, and all that are given have to fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotName {
    /// Its id.
    pub id: Option<String>,
    /// Its name. The first one that fits is meant.
    pub name: Option<String>,
}

/// What a driver is asked to do about its internal snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotChange {
    /// What the disk is now is kept.
    Take(NewSnapshot),
    /// One is not needed any more.
    Delete(SnapshotName),
    /// The disk becomes what it was, its size included. What it is now is lost, unless a snapshot has it.
    Apply(SnapshotName),
}

impl SnapshotName {
    /// It is this one's.
    pub fn fits(&self, id: &str, name: &str) -> bool {
        let (by_id, by_name) = (self.id.as_deref(), self.name.as_deref());
        by_id.is_none_or(|wanted| wanted == id) && by_name.is_none_or(|wanted| wanted == name)
    }

    fn among<'s>(&self, all: &'s [SnapshotInfo]) -> Option<&'s SnapshotInfo> {
        all.iter().find(|one| self.fits(&one.id, &one.name))
    }
}

/// A step of a transaction: takes an internal snapshot of a node, and deletes it again where the transaction fails.
pub struct TakeSnapshot {
    /// The node: nothing but exports and jobs may stand on it. The snapshot is its own, or that of the one node that it
    /// passes everything on to.
    pub node: NodeId,
    /// What is taken. No other snapshot has its name.
    pub new: NewSnapshot,
    taken: Option<(NodeId, SnapshotInfo)>,
}

impl TakeSnapshot {
    /// See the members.
    pub fn step(node: NodeId, new: NewSnapshot) -> Box<dyn Step> {
        Box::new(Self { node, new, taken: None })
    }
}

impl Step for TakeSnapshot {
    fn drains(&self, graph: &Graph) -> Result<Vec<NodeId>> {
        graph.check_snapshots(self.node)?;
        Ok(vec![graph.keeper(self.node).unwrap_or(self.node)])
    }

    fn changes_image(&self, graph: &Graph) -> Option<NodeId> {
        graph.keeper(self.node)
    }

    fn prepare<'a>(&'a mut self, drained: &'a mut Drained<'_>) -> Pending<'a, Result<()>> {
        Box::pin(async {
            let (keeper, device, all) = drained.kept(self.node).await?;
            let name = &self.new.name;
            if name.is_empty() {
                return Err(Error::new("Name is empty"));
            }
            if all.iter().any(|one| one.name == *name) {
                return Err(Error::new(format!("Snapshot with name '{name}' already exists on device '{device}'")));
            }
            let taken = drained.change_snapshots(keeper, SnapshotChange::Take(self.new.clone())).await;
            let (taken, _) = taken.doing(|| format!("Failed to create snapshot '{name}' on device '{device}'"))?;
            self.taken = Some((keeper, taken));
            Ok(())
        })
    }

    fn edit<'d>(&self, _: &mut GraphEdit<'d>, _: DrainedSet<'d>) -> Result<()> {
        Ok(())
    }

    fn abort<'a>(&'a mut self, drained: &'a mut Drained<'_>) -> Pending<'a, ()> {
        Box::pin(async {
            let Some((keeper, taken)) = self.taken.take() else { return };
            let name = SnapshotName { id: Some(taken.id), name: Some(taken.name) };
            if let Err(error) = drained.change_snapshots(keeper, SnapshotChange::Delete(name)).await {
                tracing::error!("a snapshot that is not wanted stays: {}", error.full());
            }
        })
    }
}

impl Permit {
    /// Deletes an internal snapshot of a node, or of the one node that it passes everything on to; gives what it was.
    pub async fn delete_snapshot(&mut self, node: NodeId, which: SnapshotName) -> Result<SnapshotInfo> {
        self.graph().check_snapshots(node)?;
        let keeper = self.graph().keeper(node).unwrap_or(node);
        let mut drained = self.drain(&[keeper]).await?;
        drained.graph().check_snapshots(node)?;
        let (keeper, device, all) = drained.kept(node).await?;
        if which.among(&all).is_none() {
            let said = |part: &Option<String>| part.clone().unwrap_or_else(|| "null".into());
            let (id, name) = (said(&which.id), said(&which.name));
            let text = format!("Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'");
            return Err(Error::new(text));
        }
        let deleted = drained.change_snapshots(keeper, SnapshotChange::Delete(which)).await;
        let (deleted, _) = deleted.doing(|| format!("Failed to delete a snapshot of device '{device}'"))?;
        Ok(deleted)
    }

    /// Makes the disk what it was when an internal snapshot was taken; users are told of its size.
    pub async fn apply_snapshot(&mut self, node: NodeId, which: SnapshotName) -> Result<SnapshotInfo> {
        self.graph().check_snapshots(node)?;
        let perms = Perms { uses: PermSet::WRITE | PermSet::RESIZE, shares: PermSet::ALL };
        let work = async |permit: &mut Self, user| permit.become_snapshot(user, node, which).await;
        self.as_user("a snapshot that is applied", perms, node, work).await
    }

    async fn become_snapshot(&mut self, user: NodeId, node: NodeId, which: SnapshotName) -> Result<SnapshotInfo> {
        let keeper = self.graph().keeper(node).unwrap_or(node);
        let mut drained = self.drain(&[keeper]).await?;
        drained.graph().check_snapshots(node)?;
        let (keeper, device, all) = drained.kept(node).await?;
        let info = which.among(&all).ok_or_else(|| Error::new(format!("Device '{device}' has no such snapshot")))?;
        let report = drained.graph().node(keeper).ok_or_else(|| Error::new("There is no such node"))?;
        if !report.bitmaps.is_empty() {
            return Err(Error::new("Device has active dirty bitmaps"));
        }
        // Users who would not have its size say so before anything is done.
        let size = info.disk_size.unwrap_or(report.geometry.size);
        drained.preview(|edit, _| {
            edit.suppose_gone(user)?;
            edit.suppose_size(keeper, size)
        })?;
        let applied = drained.change_snapshots(keeper, SnapshotChange::Apply(which)).await;
        let (info, body) = applied.doing(|| format!("Failed to apply a snapshot to device '{device}'"))?;
        if let Some(body) = body {
            let committed = drained.reconfigured(vec![(keeper, body, report.options)]).await?;
            committed.close(self).await;
        }
        Ok(info)
    }
}

impl Drained<'_> {
    /// The node that has the internal snapshots of `node`, what that one is called, and all of them.
    async fn kept(&self, node: NodeId) -> Result<(NodeId, String, Vec<SnapshotInfo>)> {
        let graph = self.graph();
        let report = graph.node(node).ok_or_else(|| Error::new("There is no such node"))?;
        let kept = graph.keeper(node).and_then(|keeper| Some((keeper, graph.snapshots(keeper)?)));
        match kept {
            Some((keeper, all)) => Ok((keeper, report.name, all)),
            None => {
                let driver = graph.info(node).await.map(|info| info.driver).unwrap_or_default();
                let text = "does not support internal snapshots";
                Err(Error::new(format!("Block format '{driver}' used by device '{}' {text}", report.name)))
            }
        }
    }

    async fn change_snapshots(&mut self, keeper: NodeId, change: SnapshotChange) -> Result<Snapshotted> {
        self.exclusive(keeper)?.with(async |child| child.change_snapshots(&change).await).await
    }
}

impl Graph {
    /// The internal snapshots of a node, or of the one node that it passes everything on to; `None`: it cannot have any.
    pub fn snapshots(&self, node: NodeId) -> Option<Vec<SnapshotInfo>> {
        self.borrow_body(self.keeper(node)?)?.body.snapshots()
    }

    /// The node that has the internal snapshots of `node`: itself, or what it passes everything on to.
    fn keeper(&self, node: NodeId) -> Option<NodeId> {
        if self.borrow_body(node)?.body.snapshots().is_some() {
            return Some(node);
        }
        let stored = |vertex: &Vertex| -> Vec<NodeId> {
            let has_part = |role: Role| matches!(role, Role::Data | Role::Metadata | Role::Filtered);
            vertex.edges.iter().filter(|edge| has_part(edge.role)).map(|edge| edge.to).collect()
        };
        match self.vertex(node, stored)?[..] {
            [only] => self.keeper(only),
            _ => None,
        }
    }

    /// Internal snapshots of a node may be changed. In QEMU's words.
    fn check_snapshots(&self, node: NodeId) -> Result<()> {
        let report = self.node(node).ok_or_else(|| Error::new("There is no such node"))?;
        self.check_root(node)?;
        let keeper = self.keeper(node).unwrap_or(node);
        self.check_operation(keeper, Operation::InternalSnapshot)?;
        let writable = |id: NodeId| self.node(id).is_some_and(|report| !report.options.read_only);
        if writable(node) && writable(keeper) {
            return Ok(());
        }
        Err(Error::new(format!("Device '{}' is read only", report.name)))
    }
}
