//! A job's permit: a lane of its own root, borrowed for one step at a time.
//!
//! While a step holds the pin, the permit is borrowed: no second pin, no pause point, and so no drain that would wait
//! for the job itself.

use std::marker::PhantomData;
use std::rc::Rc;

use super::cx::IoCx;
use super::lane::{Lane, ViewPin};
use crate::rt::sync::yield_now;

/// See the module's head.
pub struct JobCx {
    lane: Rc<Lane>,
}

/// A job inside the graph, for one step.
pub struct Entered<'j> {
    pin: ViewPin,
    permit: PhantomData<&'j mut JobCx>,
}

impl Entered<'_> {
    /// The way down.
    pub fn cx(&self) -> IoCx<'_> {
        self.pin.cx()
    }
}

impl JobCx {
    /// The permit for the job that works through `lane`.
    pub fn new(lane: Rc<Lane>) -> Self {
        Self { lane }
    }

    /// Enters the graph until the value is dropped; waits while the job's root is drained.
    pub async fn enter(&mut self) -> Entered<'_> {
        Entered { pin: self.lane.enter().await, permit: PhantomData }
    }

    /// One step of the job inside the graph.
    pub async fn step<R>(&mut self, work: impl AsyncFnOnce(IoCx<'_>) -> R) -> R {
        let entered = self.enter().await;
        work(entered.cx()).await
    }

    /// Lets others go first: a drain of the job's root gets through here.
    pub async fn pause_point(&mut self) {
        yield_now().await;
    }
}
