//! Queues and the like: what a thread visits in turn. Who is ready, who is polled ("hot"), who has something to publish.
//! The order of a pass is `run`'s.

use super::token::MAX_SOURCES;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

/// What a queue is to its thread. All methods run on the owning thread; none may wait.
pub trait Source {
    /// Its watched descriptor fired: note it. `run` follows in this pass.
    fn kicked(&self, tag: u32);
    /// One visit with a budget: take work, push direct operations. True where more is waiting: others come first.
    fn run(&self) -> bool;
    /// One completion of a direct operation (bytes, or a negative errno): only note it.
    fn complete(&self, slot: u32, result: i32);
    /// After a reap, or after `run`: show the guest what is complete, once for all of it.
    fn publish(&self);
    /// Is there work that `run` would take? A cheap look at memory; it must not call the runtime.
    fn has_work(&self) -> bool;
    /// `true`: we look by ourselves, the guest need not kick. `false`: we are about to sleep, so it must.
    /// `has_work` is asked again afterwards.
    fn suppress(&self, on: bool);
}

/// A source on its thread. The number of one that was removed may come back for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceId(pub(super) u32);

/// The sources of one thread.
#[derive(Default)]
pub(super) struct Sources {
    slots: RefCell<Slab<Entry>>,
    /// To be visited, in turn.
    ready: RefCell<VecDeque<u32>>,
    /// Visited since the last sleep: looked at instead of kicked.
    hot: RefCell<Vec<u32>>,
    /// To be published at the end of this pass.
    touched: RefCell<Vec<u32>>,
    in_flight: Cell<usize>,
}

struct Entry {
    source: Rc<dyn Source>,
    in_flight: Cell<u32>,
    ready: Cell<bool>,
    hot: Cell<bool>,
    touched: Cell<bool>,
}

impl Sources {
    pub(super) fn add(&self, source: Rc<dyn Source>) -> SourceId {
        let mut slots = self.slots.borrow_mut();
        assert!(slots.len() < MAX_SOURCES, "more sources than a token can name");
        let (ready, hot, touched) = (Cell::new(false), Cell::new(false), Cell::new(false));
        let key = slots.insert(Entry { source, in_flight: Cell::new(0), ready, hot, touched });
        SourceId(u32::try_from(key).expect("limited above"))
    }

    /// Panics where a direct operation is still in flight: its memory may be about to go.
    pub(super) fn remove(&self, id: SourceId) {
        let entry = self.slots.borrow_mut().remove(id.0 as usize);
        assert_eq!(entry.in_flight.get(), 0, "a source is removed after its last completion");
        self.hot.borrow_mut().retain(|hot| *hot != id.0);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.borrow().is_empty()
    }

    /// Direct operations that the kernel works on.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    #[inline]
    pub(super) fn started(&self, id: SourceId) {
        let slots = self.slots.borrow();
        let count = &slots[id.0 as usize].in_flight;
        count.set(count.get() + 1);
        self.in_flight.set(self.in_flight.get() + 1);
    }

    /// Whom a completion is for.
    #[inline]
    pub(super) fn owner(&self, key: u32) -> Rc<dyn Source> {
        self.slots.borrow()[key as usize].source.clone()
    }

    /// `count` completions have been noted: the source publishes at the end of the pass, and is looked at from then on,
    /// because its guest may go on at once.
    #[inline]
    pub(super) fn completed(&self, key: u32, count: u32) {
        let slots = self.slots.borrow();
        let entry = &slots[key as usize];
        entry.in_flight.set(entry.in_flight.get() - count);
        self.in_flight.set(self.in_flight.get() - count as usize);
        self.touch(key, entry);
        if self.heat(key, entry) {
            let source = entry.source.clone();
            drop(slots);
            source.suppress(true);
        }
    }

    /// The watched descriptor of a source fired.
    pub(super) fn kick(&self, key: u32, tag: u32) {
        self.owner(key).kicked(tag);
        self.make_ready(SourceId(key));
    }

    /// A visit in this pass. Nothing happens for one that was removed.
    pub(super) fn make_ready(&self, id: SourceId) {
        if let Some(entry) = self.slots.borrow().get(id.0 as usize)
            && !entry.ready.replace(true)
        {
            self.ready.borrow_mut().push_back(id.0);
        }
    }

    /// Visits each source that is ready, or hot with work, once. True where there was one.
    pub(super) fn visit(&self) -> bool {
        self.look_at_hot();
        let count = self.ready.borrow().len();
        for _ in 0..count {
            let Some(key) = self.ready.borrow_mut().pop_front() else { break };
            let Some((source, heated)) = self.begin_visit(key) else { continue };
            if heated {
                source.suppress(true);
            }
            if source.run() {
                self.make_ready(SourceId(key));
            }
        }
        count > 0
    }

    /// True where a hot source has work: one look at memory each.
    #[inline]
    pub(super) fn any_work(&self) -> bool {
        let slots = self.slots.borrow();
        self.hot.borrow().iter().any(|key| slots[*key as usize].source.has_work())
    }

    /// True where a source would be looked at while polling.
    pub(super) fn any_hot(&self) -> bool {
        !self.hot.borrow().is_empty()
    }

    /// Each touched source shows the guest what is complete.
    #[inline]
    pub(super) fn publish(&self) {
        loop {
            let Some(key) = self.touched.borrow_mut().pop() else { return };
            let slots = self.slots.borrow();
            let Some(entry) = slots.get(key as usize).filter(|entry| entry.touched.replace(false)) else { continue };
            let source = entry.source.clone();
            drop(slots);
            source.publish();
        }
    }

    /// Before a sleep: guests have to kick again. False where one has work already: no sleep then.
    pub(super) fn rest(&self) -> bool {
        let mut hot = self.hot.take();
        for key in hot.drain(..) {
            let slots = self.slots.borrow();
            let Some(entry) = slots.get(key as usize).filter(|entry| entry.hot.replace(false)) else { continue };
            let source = entry.source.clone();
            drop(slots);
            source.suppress(false);
            if source.has_work() {
                self.make_ready(SourceId(key));
            }
        }
        // Its memory serves the next round.
        let mut place = self.hot.borrow_mut();
        if place.is_empty() {
            *place = hot;
        }
        drop(place);
        self.ready.borrow().is_empty()
    }

    fn look_at_hot(&self) {
        let slots = self.slots.borrow();
        for key in self.hot.borrow().iter() {
            let entry = &slots[*key as usize];
            if !entry.ready.get() && entry.source.has_work() {
                entry.ready.set(true);
                self.ready.borrow_mut().push_back(*key);
            }
        }
    }

    fn begin_visit(&self, key: u32) -> Option<(Rc<dyn Source>, bool)> {
        let slots = self.slots.borrow();
        let entry = slots.get(key as usize).filter(|entry| entry.ready.replace(false))?;
        let heated = self.heat(key, entry);
        self.touch(key, entry);
        Some((entry.source.clone(), heated))
    }

    /// True where the source was not hot before: it has to be told that it is looked at.
    #[inline]
    fn heat(&self, key: u32, entry: &Entry) -> bool {
        let heated = !entry.hot.replace(true);
        if heated {
            self.hot.borrow_mut().push(key);
        }
        heated
    }

    #[inline]
    fn touch(&self, key: u32, entry: &Entry) {
        if !entry.touched.replace(true) {
            self.touched.borrow_mut().push(key);
        }
    }
}
