//! Several changes as one: all of them happen at the same moment, or none does.
//!
//! A transaction drains what all its steps touch, lets each step prepare what may fail or take long, makes all edits on
//! one copy of the graph, and publishes that. Whatever fails before is undone, the last step first.

use std::collections::BTreeSet;
use std::pin::Pin;

use super::control::{Committed, Graph, Permit};
use super::drain::Drained;
use super::edit::{DrainedSet, GraphEdit};
use super::id::NodeId;
use super::permission::Role;
use super::shape::{Vertex, Vertices};
use crate::base::{Error, IoError, Result, ResultExt};
use crate::rt::sync::{Turns, yield_now};

/// The future of a step's part.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// One change of a transaction. It is asked in this order: `drains`, `prepare`, `edit`, and then either `commit` or
/// `abort`, and `clean`. Steps prepare in order; they are committed, aborted and cleaned up the last one first.
pub trait Step {
    /// The nodes that no request may be at or above while this change is made. An error ends the transaction before
    /// anything was done. Asked again once they are drained.
    fn drains(&self, graph: &Graph) -> Result<Vec<NodeId>>;

    /// The node whose image this step changes, besides what is in memory.
    fn changes_image(&self, _graph: &Graph) -> Option<NodeId> {
        None
    }

    /// The node that gets a new configuration, for which its image is left in good order.
    fn reopens(&self) -> Option<NodeId> {
        None
    }

    /// What happens to nodes that go with this step cannot keep it from being made.
    fn lets_go(&self) -> bool {
        false
    }

    /// What may fail or take long, while requests are out.
    fn prepare<'a>(&'a mut self, _drained: &'a mut Drained<'_>) -> Pending<'a, Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Makes the change on the copy. Asked several times: the copy is thrown away until all that the change needs is
    /// there.
    fn edit<'d>(&self, edit: &mut GraphEdit<'d>, set: DrainedSet<'d>) -> Result<()>;

    /// The change is published: nothing can fail any more.
    fn commit(&mut self) {}

    /// There will be no change: undoes what `prepare` did, before any request is let in. Only asked of steps whose
    /// `prepare` was begun.
    fn abort<'a>(&'a mut self, _drained: &'a mut Drained<'_>) -> Pending<'a, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Lets go of what is needed for neither, after `commit` or `abort`.
    fn clean(&mut self) {}
}

impl Permit {
    /// Makes all the changes, or none. Written nodes that are replaced are flushed first; where that fails, so does the
    /// change.
    pub async fn transact(&mut self, mut steps: Vec<Box<dyn Step>>) -> Result<()> {
        let mut nodes = Vec::new();
        for step in &steps {
            nodes.extend(step.drains(self.graph())?);
        }
        let drained = self.drain(&nodes).await?;
        // The plan is checked again: while we waited for the drain, somebody may have shut out what it is about.
        steps.iter().try_for_each(|step| step.drains(drained.graph()).map(drop))?;
        check_together(&steps, drained.graph())?;
        match drained.attempt(&mut steps).await {
            Ok(committed) => {
                steps.iter_mut().rev().for_each(|step| step.commit());
                steps.iter_mut().rev().for_each(|step| step.clean());
                drop(steps);
                committed.close(self).await;
                Ok(())
            }
            Err(error) => {
                steps.iter_mut().rev().for_each(|step| step.clean());
                Err(error)
            }
        }
    }
}

impl Drained<'_> {
    /// Prepares and publishes; on failure all that was begun is aborted.
    async fn attempt(mut self, steps: &mut [Box<dyn Step>]) -> Result<Committed<()>> {
        let mut turns = Turns::begin();
        for begun in 0..steps.len() {
            turns.step().await;
            if let Err(error) = steps[begun].prepare(&mut self).await {
                abort(&mut steps[..=begun], &mut self).await;
                return Err(error);
            }
        }
        let result = self.publish(steps).await;
        if result.is_err() {
            abort(steps, &mut self).await;
        }
        result
    }

    async fn publish(&self, steps: &[Box<dyn Step>]) -> Result<Committed<()>> {
        // Each look at the whole is one step.
        yield_now().await;
        let leaving = self.preview(|edit, set| edit_all(steps, edit, set))?;
        let mut lossy = Vec::new();
        for (node, by) in leaving.replaced {
            if self.flush_replaced(node).await? == Flushed::Lossy {
                lossy.push((node, by));
            }
        }
        for node in leaving.removed {
            let left = self.own_io(node).with(async |child| child.finish_and_flush().await).await;
            match left {
                Ok(()) | Err(IoError::FlushLatched) => {}
                Err(error) if steps.iter().any(|step| step.lets_go()) => {
                    tracing::warn!("{} goes, and what was written to it may be lost: {error}", self.described(node));
                }
                Err(error) => {
                    return Err(error).doing(|| format!("Could not flush {} before it goes", self.described(node)));
                }
            }
        }
        self.calm(leaving.calmed).await;
        yield_now().await;
        let locks = self.prepare(|edit, set| edit_all(steps, edit, set)).await?;
        let committed = self.write_once(|edit, set| {
            edit_all(steps, edit, set)?;
            // All is prepared, so this is published.
            edit.bequeath_loss(&lossy);
            Ok(())
        });
        drop(locks);
        committed
    }

    /// What was written before is stable when nobody flushes the node any more (design, invariant 10). That an earlier
    /// flush failed is known already: a change is the way out.
    async fn flush_replaced(&self, node: NodeId) -> Result<Flushed> {
        // It stays open, and others may be using it: no last word of its driver's.
        match self.own_io(node).with(async |child| child.flush().await).await {
            Ok(()) => Ok(Flushed::Well),
            Err(IoError::FlushLatched) => Ok(Flushed::Lossy),
            Err(error) => {
                Err(error).doing(|| format!("Could not flush {} before it is replaced", self.described(node)))
            }
        }
    }
}

/// How a node that is replaced has been flushed.
#[derive(PartialEq, Eq)]
enum Flushed {
    Well,
    /// An earlier flush failed: what was written then may be lost.
    Lossy,
}

impl GraphEdit<'_> {
    /// An overlay that comes above a node whose data may be lost, in that node's place, takes over that flushes fail: its
    /// own would succeed. What stands elsewhere, or passes flushes on, does not.
    fn bequeath_loss(&self, replaced: &[(NodeId, NodeId)]) {
        for (node, by) in replaced {
            for heir in self.below([*by]).into_iter().filter(|id| self.stands_on(*id, *node)) {
                let parts = self.vertex(heir).and_then(Vertex::node);
                parts.iter().for_each(|parts| parts.shared.inherit_loss());
            }
        }
    }

    /// As an overlay, with nothing but filters between.
    fn stands_on(&self, id: NodeId, base: NodeId) -> bool {
        let edges = self.vertex(id).into_iter().flat_map(|vertex| &vertex.edges);
        edges.filter(|edge| edge.role == Role::Cow).any(|edge| self.filters(edge.to, base))
    }

    fn filters(&self, id: NodeId, base: NodeId) -> bool {
        let vertex = self.vertex(id);
        let child = vertex.and_then(Vertex::node).and_then(|node| node.body.filtered());
        let below = child.zip(vertex).map(|(child, vertex)| child.of(&vertex.edges).to);
        id == base || below.is_some_and(|below| self.filters(below, base))
    }
}

/// A reopen leaves the image as it is to be found, so nothing else may change it in the same transaction.
fn check_together(steps: &[Box<dyn Step>], graph: &Graph) -> Result<()> {
    let reopened: BTreeSet<_> = steps.iter().filter_map(|step| step.reopens()).collect();
    let mut changed = steps.iter().filter_map(|step| step.changes_image(graph));
    match changed.find(|node| reopened.contains(node)) {
        Some(node) => Err(Error::new(format!(
            "{} cannot be reopened in one transaction with a change of its snapshots or persistent bitmaps",
            graph.described(node)
        ))),
        None => Ok(()),
    }
}

fn edit_all<'d>(steps: &[Box<dyn Step>], edit: &mut GraphEdit<'d>, set: DrainedSet<'d>) -> Result<()> {
    steps.iter().try_for_each(|step| step.edit(edit, set))
}

async fn abort(begun: &mut [Box<dyn Step>], drained: &mut Drained<'_>) {
    for step in begun.iter_mut().rev() {
        step.abort(drained).await;
    }
}
