//! The affected roots, stopped and empty; and the control task's own I/O while they are.

use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::control::{Committed, Graph};
use super::cx::Child;
use super::edit::{DrainedSet, GraphEdit, Leaving};
use super::id::{ChildId, NodeId};
use super::lane::Root;
use super::prepare::Locks;
use super::view::View;
use crate::base::{Error, Result};
use crate::rt::{Local, within};

/// A drained part of the graph. One change, or none, may be made; then requests flow again.
#[must_use = "requests wait as long as the drain lasts"]
pub struct Drained<'p> {
    stopped: Stopped,
    /// The command's permit is spoken for: no second drain, no edit beside this one.
    permit: PhantomData<&'p mut ()>,
}

/// The stopped roots. Dropped: they resume with the view that they had.
struct Stopped {
    graph: Rc<Graph>,
    set: Rc<BTreeSet<NodeId>>,
    roots: Vec<Root>,
    deadline: Duration,
}

impl Drained<'_> {
    pub(super) async fn begin(graph: &Rc<Graph>, nodes: &[NodeId], deadline: Duration) -> Result<Self> {
        // Whoever reads on behalf of an open waits for nothing any longer.
        graph.hurry_private(nodes);
        let reserved = within(&Local::current(), deadline, graph.reserve(nodes)).await;
        let set = reserved.ok_or_else(|| {
            let seconds = deadline.as_secs_f32();
            Error::new(format!("Other commands kept {} for {seconds} s", described_all(graph, nodes)))
        })?;
        let roots = graph.roots_in(&set);
        let stopped = Stopped { graph: graph.clone(), set, roots, deadline };
        stopped.roots.iter().for_each(|root| root.gate().stop());
        stopped.emptied().await?;
        Ok(Drained { stopped, permit: PhantomData })
    }

    /// Spends the drain: after a change, what is above what may be another set.
    pub fn write<R>(
        self,
        change: impl for<'d> FnOnce(&mut GraphEdit<'d>, DrainedSet<'d>) -> Result<R>,
    ) -> Result<Committed<R>> {
        self.write_once(change)
    }

    /// The same for a caller that has something to undo where it fails, before requests flow again. Where it does not
    /// fail, the drain is spent.
    pub(super) fn write_once<R>(
        &self,
        change: impl for<'d> FnOnce(&mut GraphEdit<'d>, DrainedSet<'d>) -> Result<R>,
    ) -> Result<Committed<R>> {
        let Stopped { graph, set, .. } = &self.stopped;
        graph.commit(Some(set), change)
    }

    /// The command's own I/O on a drained node before the change (a flush before a reopen, growing for a resize);
    /// nobody else is there.
    pub fn exclusive(&mut self, id: NodeId) -> Result<Exclusive<'_>> {
        if !self.stopped.set.contains(&id) {
            return Err(Error::new("The change needs a node that is not drained"));
        }
        Ok(self.own_io(id))
    }

    /// The same on a node below the drained ones, where requests of others may be: for what may run beside them, a flush.
    pub(super) fn own_io(&self, id: NodeId) -> Exclusive<'_> {
        Exclusive { graph: self.stopped.graph.clone(), node: id, drained: PhantomData }
    }

    /// Checks a change without making it; says which nodes are going to lose users by it.
    pub(super) fn preview(
        &self,
        change: impl for<'d> FnOnce(&mut GraphEdit<'d>, DrainedSet<'d>) -> Result<()>,
    ) -> Result<Leaving> {
        let Stopped { graph, set, .. } = &self.stopped;
        Ok(graph.preview(set, change)?.1.leaving)
    }

    /// Lets nodes that nobody makes grow any more give back what they took for that, while they still have their locks.
    /// One that cannot keeps space that it does not need.
    pub(super) async fn calm(&self, nodes: Vec<NodeId>) {
        for id in nodes {
            if let Err(error) = self.own_io(id).with(async |child| child.end_growth().await).await {
                tracing::warn!("{} keeps what was taken ahead of its writers: {error}", self.described(id));
            }
        }
    }

    /// Waits for drains of other commands that `change` would reach into, as long as a drain may take, and takes the
    /// external locks (of image files) that it is going to need; they are kept until the value is dropped, and beyond
    /// that if the change was published. A change that reaches nowhere else and lets nobody do more than before needs
    /// none of this.
    pub async fn prepare(
        &self,
        change: impl for<'d> Fn(&mut GraphEdit<'d>, DrainedSet<'d>) -> Result<()>,
    ) -> Result<Locks> {
        let Stopped { graph, set, deadline, .. } = &self.stopped;
        graph.prepared(Some((set, *deadline)), change).await
    }

    pub(super) fn check_unused(&self, id: NodeId) -> Result<()> {
        let (name, parents) = {
            let graph = &self.stopped.graph;
            let report = graph.node(id).ok_or_else(|| Error::new("There is no such node"))?;
            (report.name, report.parents)
        };
        match parents.first() {
            None => Ok(()),
            Some(user) => Err(Error::new(format!("Node '{name}' is in use by {user}"))),
        }
    }

    pub(super) fn described(&self, id: NodeId) -> String {
        self.stopped.graph.described(id)
    }

    pub(super) fn graph(&self) -> &Rc<Graph> {
        &self.stopped.graph
    }
}

impl Stopped {
    async fn emptied(&self) -> Result<()> {
        let deadline = self.deadline;
        let local = Local::current();
        let all = async {
            for root in &self.roots {
                root.emptied().await;
            }
            self.graph.private_emptied(&self.set).await;
        };
        if within(&local, deadline, all).await.is_some() {
            return Ok(());
        }
        let busy = self.roots.iter().filter(|root| root.in_flight() > 0);
        let busy: Vec<_> = busy.map(|root| format!("{} has {} in flight", root.name(), root.in_flight())).collect();
        let seconds = deadline.as_secs_f32();
        Err(Error::new(format!("Requests did not end within {seconds} s: {}", busy.join(", "))))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // A published change has resumed those that stay, and those that it removed stay shut.
        for root in self.roots.iter().filter(|root| root.gate().is_stopped()) {
            let removed = !self.set.iter().any(|id| self.graph.is_root(*id, root));
            if !removed {
                root.gate().resume(None);
            }
        }
        self.graph.release(&self.set);
    }
}

/// A root of the control task's own I/O. It is counted like any other: a later drain waits until it is empty, even if
/// the command that made it has given up.
pub(super) struct PrivateRoot {
    /// Those nodes that a drain of which has to wait for it.
    over: BTreeSet<NodeId>,
    root: Root,
}

/// See [`Drained::exclusive`].
pub struct Exclusive<'d> {
    graph: Rc<Graph>,
    node: NodeId,
    drained: PhantomData<&'d mut ()>,
}

impl Exclusive<'_> {
    /// Runs `work` on the node. It is over when all that it started is over. It is hurried from its beginning: guests
    /// stand still meanwhile, so it may not wait for anything that a request of theirs would not wait for now.
    pub async fn with<R>(&mut self, work: impl AsyncFnOnce(Child<'_>) -> R) -> R {
        let view = self.graph.private_view(self.node);
        self.graph
            .with_private(view, BTreeSet::from([self.node]), async |child, root| {
                root.gate().stop();
                work(child).await
            })
            .await
    }
}

fn described_all(graph: &Graph, nodes: &[NodeId]) -> String {
    nodes.iter().map(|id| graph.described(*id)).collect::<Vec<_>>().join(", ")
}

impl Graph {
    /// Lets the control task's own requests, at and above these nodes, wait for nothing that they need not wait for.
    fn hurry_private(&self, nodes: &[NodeId]) {
        let set = self.above(nodes);
        let private = self.private.borrow();
        private.iter().filter(|private| !private.over.is_disjoint(&set)).for_each(|private| private.root.gate().stop());
    }

    fn is_root(&self, id: NodeId, root: &Root) -> bool {
        self.vertex(id, |vertex| vertex.root().is_some_and(|other| other.is(root))).unwrap_or(false)
    }

    /// The control task's own I/O through `view`. It is over when all that it started is over.
    pub(super) async fn with_private<R>(
        &self,
        view: View,
        over: BTreeSet<NodeId>,
        work: impl AsyncFnOnce(Child<'_>, &Root) -> R,
    ) -> R {
        let root = Root::new("the control task".into(), Arc::new(view));
        self.private.borrow_mut().push(PrivateRoot { over, root: root.clone() });
        let lane = root.lane(&Local::current());
        let pin = lane.enter().await;
        let value = work(pin.cx().child(ChildId::FIRST), &root).await;
        drop(pin);
        root.gate().stop();
        // What drivers forked has to be over as well.
        root.emptied().await;
        drop(lane);
        self.forget_private(&root);
        value
    }

    /// Waits for private roots that a command which gave up has left over a node of `set`.
    async fn private_emptied(&self, set: &BTreeSet<NodeId>) {
        let left: Vec<Root> = {
            let private = self.private.borrow();
            private
                .iter()
                .filter(|private| !private.over.is_disjoint(set))
                .map(|private| private.root.clone())
                .collect()
        };
        for root in left {
            root.gate().stop();
            root.emptied().await;
            self.forget_private(&root);
        }
    }

    fn forget_private(&self, root: &Root) {
        self.private.borrow_mut().retain(|private| !private.root.is(root));
    }
}
