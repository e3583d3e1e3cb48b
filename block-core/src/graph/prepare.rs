//! What has to be there before a change can be made: other commands' drains are out of its way, and the nodes hold the
//! external locks (of image files) that their users are going to need.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::{Rc, Weak};
use std::time::Duration;

use super::control::{Borrowed, Graph};
use super::edit::{DrainedSet, GraphEdit, Outcome};
use super::id::NodeId;
use super::permission::Perms;
use super::shape::Vertex;
use crate::base::{Error, Result};
use crate::rt::sync::{Receiver, oneshot, yield_now};
use crate::rt::{Local, within};

/// A set that a command has drained, and how long that command waits for others meanwhile.
pub(super) type Own<'a> = (&'a Rc<BTreeSet<NodeId>>, Duration);

impl Graph {
    /// What other commands are draining and this change touches.
    fn in_the_way(&self, outcome: &Outcome, own: Option<&Rc<BTreeSet<NodeId>>>) -> Vec<Rc<BTreeSet<NodeId>>> {
        let drains = self.drains.borrow();
        let others = drains.iter().filter(|other| own.is_none_or(|own| !Rc::ptr_eq(own, other)));
        others.filter(|set| outcome.touched.keys().any(|id| set.contains(id))).cloned().collect()
    }

    pub(super) fn collides(&self, outcome: &Outcome, own: Option<&Rc<BTreeSet<NodeId>>>) -> bool {
        !self.in_the_way(outcome, own).is_empty()
    }

    /// Waits until one of these drains is over. Two commands that hold drains do not wait for each other: the second one
    /// is refused.
    async fn over(&self, drains: Vec<Rc<BTreeSet<NodeId>>>, own: Option<Own<'_>>) -> Result<()> {
        let among = |all: &RefCell<Vec<Rc<BTreeSet<NodeId>>>>, one| all.borrow().iter().any(|set| Rc::ptr_eq(set, one));
        let over = self.when(|| drains.iter().any(|one| !among(&self.drains, one)).then_some(()));
        let Some((own, patience)) = own else {
            over.await;
            return Ok(());
        };
        let refused = || Error::new("Another command is changing the same part of the graph");
        if drains.iter().any(|one| among(&self.held_up, one)) {
            return Err(refused());
        }
        let _held_up = HeldUp::note(self, own);
        within(&Local::current(), patience, over).await.ok_or_else(refused)
    }

    /// Waits for drains of other commands that are in the way of a change, and takes the external locks that it is going
    /// to need. It can be made then, as long as the caller does not wait for anything else.
    pub(super) async fn prepared<R>(
        self: &Rc<Self>,
        own: Option<Own<'_>>,
        change: impl for<'d> Fn(&mut GraphEdit<'d>, DrainedSet<'d>) -> Result<R>,
    ) -> Result<Locks> {
        let none = Rc::default();
        let drained = own.map(|(set, _)| set);
        let set = drained.unwrap_or(&none);
        loop {
            let (_, outcome) = self.preview(set, &change)?;
            let in_the_way = self.in_the_way(&outcome, drained);
            if !in_the_way.is_empty() {
                drop(outcome);
                self.over(in_the_way, own).await?;
                continue;
            }
            let locks = self.tighten(&outcome).await?;
            drop(outcome);
            // Each look at a change of many steps takes a while, and others have their turn in between.
            yield_now().await;
            // The plan is checked again: while the locks were taken, others may have changed what it rests on.
            let (_, now) = self.preview(set, &change)?;
            if self.first_lacking(&now).is_none() && !self.collides(&now, drained) {
                return Ok(locks);
            }
        }
    }

    /// Takes what the nodes of `outcome` will need on top of what they hold. Undone when the value is dropped before
    /// the change has been published.
    pub(super) async fn tighten(self: &Rc<Self>, outcome: &Outcome) -> Result<Locks> {
        // All are claimed, so that what others are just giving back is not counted on.
        let locks = self.claim_locks(outcome.relock.iter().copied().collect()).await;
        let lacking: Vec<_> = outcome.relock.iter().filter_map(|id| Tighten::of(outcome, *id)).collect();
        for node in lacking {
            // Noted first: one that fails half-way has something to give back.
            node.held.set(node.perms);
            node.borrowed.body.tighten(node.perms).await?;
        }
        Ok(locks)
    }

    /// A node whose users would need more than it holds.
    pub(super) fn first_lacking(&self, outcome: &Outcome) -> Option<String> {
        let lacking = outcome.relock.iter().find(|id| Tighten::of(outcome, **id).is_some())?;
        outcome.touched.get(lacking)?.as_ref().map(Vertex::described)
    }

    /// One command at a time changes the locks of a node.
    pub(super) async fn claim_locks(self: &Rc<Self>, nodes: BTreeSet<NodeId>) -> Locks {
        self.when(|| {
            let mut locking = self.locking.borrow_mut();
            locking.is_disjoint(&nodes).then(|| locking.extend(&nodes))
        })
        .await;
        Locks { graph: Rc::downgrade(self), claimed: nodes }
    }

    /// Gives back what the nodes hold and their users do not need, and the claim on their locks.
    async fn relax_claimed(&self, claimed: BTreeSet<NodeId>) {
        for id in &claimed {
            self.relax(*id).await;
        }
        self.locking.borrow_mut().retain(|id| !claimed.contains(id));
        self.changed.notify_all();
    }

    async fn relax(&self, id: NodeId) {
        let held = |vertex: &Vertex| Some((vertex.perms, vertex.node()?.held.clone()));
        let Some((perms, held)) = self.vertex(id, held).flatten() else { return };
        if held.get() == perms {
            return;
        }
        let Some(borrowed) = self.borrow_body(id) else { return };
        // Noted first: while it is being given back, nobody may count on it.
        held.set(perms);
        borrowed.body.relax(perms).await;
    }
}

/// One node whose users are going to need more of the outside world than it holds.
struct Tighten {
    held: Rc<Cell<Perms>>,
    perms: Perms,
    borrowed: Borrowed,
}

impl Tighten {
    fn of(outcome: &Outcome, id: NodeId) -> Option<Self> {
        let vertex = outcome.touched.get(&id)?.as_ref()?;
        let node = vertex.node()?;
        let held = node.held.get();
        let enough = held.uses.contains(vertex.perms.uses) && vertex.perms.shares.contains(held.shares);
        let (held, perms) = (node.held.clone(), held.and(vertex.perms));
        (!enough).then(|| Self { held, perms, borrowed: Borrowed::from(node) })
    }
}

/// External locks that were taken for a change. Dropped before the change is published, they are given back.
#[must_use = "dropped at once, the locks are given back before the change"]
pub struct Locks {
    graph: Weak<Graph>,
    claimed: BTreeSet<NodeId>,
}

impl Locks {
    /// Gives back what nobody needs, and waits for it.
    pub(super) async fn give_back(mut self) {
        if let Some(over) = self.giving_back() {
            // It sends before it ends, and it ends before this thread does.
            let _ = over.await;
        }
    }

    /// Giving back asks the kernel, so it is a task of its own, which ends whatever becomes of the command; who comes
    /// next for these nodes waits for it.
    fn giving_back(&mut self) -> Option<Receiver<()>> {
        let claimed = std::mem::take(&mut self.claimed);
        let graph = self.graph.upgrade().filter(|_| !claimed.is_empty())?;
        let (done, over) = oneshot();
        Local::current().spawn(async move {
            graph.relax_claimed(claimed).await;
            // Who does not wait is not told.
            let _ = done.send(());
        });
        Some(over)
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        self.giving_back();
    }
}

/// A command that has drained a part of the graph and waits for another one, until this is dropped.
struct HeldUp<'g> {
    graph: &'g Graph,
    own: &'g Rc<BTreeSet<NodeId>>,
}

impl<'g> HeldUp<'g> {
    fn note(graph: &'g Graph, own: &'g Rc<BTreeSet<NodeId>>) -> Self {
        graph.held_up.borrow_mut().push(own.clone());
        Self { graph, own }
    }
}

impl Drop for HeldUp<'_> {
    fn drop(&mut self) {
        self.graph.held_up.borrow_mut().retain(|set| !Rc::ptr_eq(set, self.own));
    }
}
