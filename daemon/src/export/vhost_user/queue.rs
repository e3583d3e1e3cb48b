//! One virtqueue on the thread that serves it: takes chains, sends requests down, gives answers back.
//!
//! Everything here runs on one thread. The control side changes a queue by messages ([`super::queue_ref`]); what
//! becomes of a chain is `visit.rs`, what it means `request.rs`, the ring itself `ring.rs`.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use block_core::graph::{Settled, ViewPin};
use block_core::port::PortLane;
use block_core::rt::sync::{Notify, yield_now};
use block_core::rt::{Local, Source, SourceId, WatchId};

use super::chain::{Broken, Chain};
use super::memory::{Mapped, Transfers};
use super::moderation::{Moderation, Moment};
use super::place::Place;
use super::request::{Disk, Status};
use super::settings::{Settings, Traits};
use super::slots::{Flight, Slots};
use super::stats::QueueStats;
use super::visit::{Job, Spent, Visit};

/// Chains taken in one visit; then they are submitted, what is complete is shown to the guest, and other queues of the
/// thread have their turn. Small, so that a guest that sleeps is woken while the rest of its batch is still under way:
/// on a disk that answers at once, 64 made the guest wait for the last of 32 requests before it heard of the first.
const BUDGET: u16 = 8;

/// Where no more than [`FEW`] wait, answers that were there at once are shown after so many chains, and not only at the end of
/// the visit: a guest that is about to sleep finds them in its last look, and so does not sleep while we are the faster. The
/// guest reads the line that such a store writes, so that one for each answer was slower than one for two.
const SHOWN_TOGETHER: u16 = 2;

/// A guest with more requests than this under way has answers to look at in any case.
const FEW: u16 = 4 * BUDGET;

/// See the module's head. What is not private is for [`Visit`].
pub(super) struct Queue {
    me: Weak<Self>,
    pub(super) local: Rc<Local>,
    pub(super) lane: Rc<PortLane>,
    source: OnceCell<SourceId>,
    pub(super) traits: Traits,
    pub(super) stats: Arc<QueueStats>,
    state: RefCell<State>,
    /// A task waits for the graph to open; requests stay in the ring meanwhile.
    shut_out: Cell<bool>,
    /// Nobody waits for the graph any more.
    removed: Notify,
}

#[derive(Default)]
struct State {
    /// `Some` while the ring is started and enabled.
    serving: Option<Serving>,
    chain: Chain,
    slots: Slots,
    transfers: Transfers,
}

struct Serving {
    settings: Settings,
    map: Rc<Mapped>,
    place: Place,
    watch: Option<WatchId>,
    /// The ring is touched from the first kick on.
    kicked: bool,
    /// By a kick, since the last visit.
    asked: bool,
    broken: bool,
    /// What waited at the end of a visit that is to be published: the next one, in the next pass, will take it.
    left: u16,
    moderation: Moderation,
    /// Whoever waits for the queue to end. Nothing new is taken meanwhile.
    stopping: Vec<SyncSender<u16>>,
}

impl Queue {
    pub(super) fn new(local: &Rc<Local>, lane: Rc<PortLane>, traits: Traits, stats: Arc<QueueStats>) -> Rc<Self> {
        let queue = Rc::new_cyclic(|me| Self {
            me: me.clone(),
            local: local.clone(),
            lane,
            source: OnceCell::new(),
            traits,
            stats,
            state: RefCell::default(),
            shut_out: Cell::new(false),
            removed: Notify::new(),
        });
        let source = local.add_source(queue.clone());
        queue.source.set(source).expect("set here only");
        queue
    }

    /// Begins to serve. Nothing is read from the ring before the first kick.
    pub(super) fn start(&self, settings: Settings) {
        let map = Rc::new(Mapped::new(settings.memory.clone()));
        let place = Place::find(&map, &settings);
        let watch = self.watch_kick(&settings);
        // Whoever served the ring before us may have died between an answer and its call.
        settings.call.iter().for_each(|call| call.notify());
        let serving = Serving {
            settings,
            map,
            place,
            watch,
            kicked: false,
            asked: false,
            broken: false,
            left: 0,
            moderation: Moderation::default(),
            stopping: Vec::new(),
        };
        let before = self.state.borrow_mut().serving.replace(serving);
        assert!(before.is_none(), "a queue is started once");
    }

    /// Takes over settings that may change while it serves: descriptors, memory, log, addresses, features, write mode.
    pub(super) fn adjust(&self, settings: Settings) {
        let state = &mut *self.state.borrow_mut();
        let Some(serving) = &mut state.serving else { return };
        let old = std::mem::replace(&mut serving.settings, settings);
        let now = &serving.settings;
        let moved = !Arc::ptr_eq(&old.memory, &now.memory);
        if moved {
            serving.map = Rc::new(Mapped::new(now.memory.clone()));
        }
        if moved || (old.at, old.size, old.base, old.features) != (now.at, now.size, now.base, now.features) {
            self.look_again(state);
        }
        let Some(serving) = &mut state.serving else { return };
        let now = &serving.settings;
        if old.kick.as_ref().map(Arc::as_ptr) != now.kick.as_ref().map(Arc::as_ptr) {
            let watch = self.watch_kick(now);
            serving.unwatch(&self.local);
            serving.watch = watch;
        }
        let now = &serving.settings;
        if old.call.as_ref().map(Arc::as_ptr) != now.call.as_ref().map(Arc::as_ptr) {
            // What was signalled to the old one may never have been looked at.
            now.call.iter().for_each(|call| call.notify());
        }
    }

    /// The ring may be elsewhere, or another. What was answered while it was away is shown now, and kicks are asked for as
    /// in a ring that nobody has looked at: if we look by ourselves, that ends with the next sleep at the latest.
    fn look_again(&self, state: &mut State) {
        let Some(serving) = state.serving.take() else { return };
        let Serving { place, .. } = serving;
        let place = place.look_again(&serving.map, &serving.settings);
        state.serving = Some(Serving { place, ..serving });
        self.publish_now(state);
        if let Some(serving) = &state.serving {
            serving.want_kicks(true);
            if serving.place.here().is_some() {
                self.local.make_ready(self.source());
            }
        }
    }

    /// Takes nothing new; `reply` gets the base as soon as nothing is under way any more.
    pub(super) fn stop(&self, reply: SyncSender<u16>) {
        let state = &mut *self.state.borrow_mut();
        let Some(serving) = &mut state.serving else { return };
        serving.unwatch(&self.local);
        serving.stopping.push(reply);
        self.end_if_idle(state);
    }

    /// Takes the queue off its thread, once it is stopped.
    pub(super) async fn remove(self: Rc<Self>) {
        assert!(self.state.borrow().serving.is_none(), "a queue is removed after it was stopped");
        // The one who waits, or is about to.
        self.removed.notify_one();
        while self.shut_out.get() {
            yield_now().await;
        }
        self.local.remove_source(self.source());
    }

    pub(super) fn source(&self) -> SourceId {
        *self.source.get().expect("set when it was made")
    }

    fn watch_kick(&self, settings: &Settings) -> Option<WatchId> {
        settings.kick.clone().map(|kick| self.local.watch(self.source(), 0, kick))
    }

    fn strong(&self) -> Rc<Self> {
        self.me.upgrade().expect("who calls a queue holds it")
    }

    // ---- taking requests ------------------------------------------------------------------------------------------

    fn visit(&self, state: &mut State) -> Result<bool, Broken> {
        let State { serving, chain, slots, transfers } = state;
        let Some(serving) = serving.as_mut().filter(|serving| serving.takes()) else { return Ok(false) };
        let asked = std::mem::take(&mut serving.asked);
        let ring = match serving.place.ring() {
            Ok(ring) => ring,
            // What completes meanwhile has us look as well, and is no fault of the guest's.
            Err(fault) => return if asked { Err(fault) } else { Ok(false) },
        };
        let waiting = ring.waiting()?;
        if waiting == 0 {
            return Ok(false);
        }
        let Some(pin) = self.lane.try_enter() else {
            self.wait_until_open();
            return Ok(false);
        };
        let geometry = self.lane.geometry(&pin);
        let disk = Disk { size: geometry.size, block: self.traits.block, writable: self.traits.writable };
        let mut visit = Visit {
            queue: self,
            pin: &pin,
            limits: &geometry.limits,
            disk: &disk,
            settings: &serving.settings,
            map: &serving.map,
            ring,
            slots,
            transfers,
            spent: Spent::default(),
        };
        let mut taken = 0;
        while taken < waiting.min(BUDGET) && !visit.slots.is_full() && !visit.spent.is_enough() {
            visit.one(chain)?;
            taken += 1;
            if waiting <= FEW && taken % SHOWN_TOGETHER == 0 {
                visit.settings.publish(visit.ring);
            }
        }
        self.local.requests_taken(taken.into());
        if visit.slots.is_full() {
            return Ok(false);
        }
        let waiting = visit.ring.waiting();
        serving.left = waiting.unwrap_or(0);
        Ok(waiting != Ok(0))
    }

    fn wait_until_open(&self) {
        if self.shut_out.replace(true) {
            return;
        }
        let queue = self.strong();
        self.local.spawn(async move {
            crate::first(queue.lane.opened(), queue.removed.notified()).await;
            queue.shut_out.set(false);
            queue.local.make_ready(queue.source());
        });
    }

    #[cold]
    fn break_down(&self, state: &mut State, reason: Broken) {
        let Some(serving) = &mut state.serving else { return };
        serving.broken = true;
        serving.unwatch(&self.local);
        self.stats.broke();
        if self.traits.lines.allows() {
            tracing::warn!(queue = self.traits.name, "the guest broke the queue, which stops: {reason}");
        }
        serving.settings.err.iter().for_each(|err| err.notify());
        if serving.is_poisoned() {
            (self.traits.hang_up)();
        }
    }

    // ---- giving answers -------------------------------------------------------------------------------------------

    /// A task is done with the request in `slot`.
    fn task_done(&self, slot: u32, ok: bool) {
        let state = &mut *self.state.borrow_mut();
        self.finish(state, slot, if ok { Status::Ok } else { Status::IoErr });
        self.local.make_ready(self.source());
    }

    fn finish(&self, state: &mut State, slot: u32, status: Status) {
        let serving = state.serving.as_mut().expect("a queue stops when its last request is over");
        // Also where it failed: a part may have been written.
        if state.slots.flight(slot).reply.written > 0 {
            serving.settings.log(state.slots.pieces(slot));
        }
        let was_full = state.slots.is_full();
        let flight = state.slots.release(slot);
        if was_full {
            self.local.make_ready(self.source());
        }
        self.stats.completed(status == Status::Ok);
        serving.answer(&flight, status);
    }

    fn end_if_idle(&self, state: &mut State) {
        if !state.slots.is_idle() || state.serving.as_ref().is_none_or(|serving| serving.stopping.is_empty()) {
            return;
        }
        self.publish_now(state);
        let serving = state.serving.take().expect("looked at above");
        // We may have looked by ourselves so far. Whoever serves the ring next has to be told of work.
        serving.want_kicks(true);
        let base = serving.place.next_avail().unwrap_or(serving.settings.base);
        // Who asked may have gone; the queue has ended all the same.
        for reply in &serving.stopping {
            let _ = reply.send(base);
        }
    }

    /// Shows the guest what is complete, and calls it unless the call is better kept back.
    fn publish_now(&self, state: &mut State) {
        let Some(serving) = &mut state.serving else { return };
        let Ok(ring) = serving.place.ring() else { return };
        serving.settings.publish(ring);
        let at = Moment {
            began: self.local.batch_time(),
            untold: ring.unannounced(),
            left: std::mem::take(&mut serving.left),
            idle: state.slots.is_idle(),
        };
        if serving.moderation.keeps(at, Instant::now) {
            return;
        }
        if ring.announce()
            && let Some(call) = &serving.settings.call
        {
            self.stats.interrupted();
            call.notify();
        }
    }

    /// The short cut was none: the request goes the long way, or fails.
    #[cold]
    fn settle(&self, state: &mut State, slot: u32, result: i32) {
        let flight = state.slots.flight(slot);
        let kernel = flight.kernel.take().expect("a direct request");
        let map = flight.map.clone();
        let (pin, request) = (kernel.passage.pin(), kernel.passage.request());
        match self.lane.settle(pin, request, result) {
            Settled::Failed(_) => self.finish(state, slot, Status::IoErr),
            Settled::Again => {
                state.slots.is_task_now(slot);
                let buffer = map.buffer(state.slots.pieces(slot));
                self.spawn(slot, pin.another(), Job::from_direct(request, buffer));
            }
        }
    }

    /// The rest of a request, as a task.
    pub(super) fn spawn(&self, slot: u32, pin: ViewPin, job: Job) {
        let queue = self.strong();
        self.local.spawn(async move {
            let lane = &queue.lane;
            let result = match job {
                Job::Read(at, buffer) => lane.read(&pin, at, buffer).await,
                Job::Zero(buffer) => {
                    buffer.fill_in_steps(0).await;
                    Ok(())
                }
                Job::Write(at, buffer, flags) => lane.write(&pin, at, buffer, flags).await,
                Job::WriteZeroes(at, flags) => lane.write_zeroes(&pin, at, flags).await,
                Job::Discard(at) => lane.discard(&pin, at).await,
                Job::Flush => lane.flush(&pin).await,
            };
            drop(pin);
            queue.task_done(slot, result.is_ok());
        });
    }
}

impl Source for Queue {
    fn kicked(&self, _tag: u32) {
        self.stats.kicked();
        if let Some(serving) = &mut self.state.borrow_mut().serving {
            (serving.kicked, serving.asked) = (true, true);
        }
    }

    fn run(&self) -> bool {
        let state = &mut *self.state.borrow_mut();
        self.visit(state).unwrap_or_else(|reason| {
            self.break_down(state, reason);
            false
        })
    }

    fn complete(&self, slot: u32, result: i32) {
        let state = &mut *self.state.borrow_mut();
        state.transfers.over(slot);
        let kernel = state.slots.flight(slot).kernel.as_ref().expect("a direct request");
        let whole = u64::try_from(result).is_ok_and(|moved| moved == kernel.passage.request().at.len());
        if !whole {
            return self.settle(state, slot, result);
        }
        let time = self.local.batch_time().saturating_duration_since(kernel.started);
        kernel.passage.count(time);
        self.finish(state, slot, Status::Ok);
    }

    fn publish(&self) {
        let state = &mut *self.state.borrow_mut();
        self.publish_now(state);
        self.end_if_idle(state);
        if let Some(serving) = &state.serving
            && !serving.broken
            && serving.is_poisoned()
        {
            self.break_down(state, Broken::MemoryLost);
        }
    }

    fn has_work(&self) -> bool {
        let state = self.state.borrow();
        let Some(serving) = state.serving.as_ref().filter(|serving| serving.takes()) else { return false };
        !self.shut_out.get()
            && !state.slots.is_full()
            && serving.place.here().is_some_and(|ring| ring.waiting() != Ok(0))
    }

    fn suppress(&self, on: bool) {
        if let Some(serving) = self.state.borrow().serving.as_ref().filter(|serving| serving.takes()) {
            serving.want_kicks(!on);
        }
    }
}

impl Serving {
    fn takes(&self) -> bool {
        self.kicked && !self.broken && self.stopping.is_empty()
    }

    fn is_poisoned(&self) -> bool {
        self.map.is_poisoned() || self.settings.log.as_ref().is_some_and(|log| log.is_poisoned())
    }

    fn answer(&mut self, flight: &Flight, status: Status) {
        let reply = &flight.reply;
        flight.map.copy_in(reply.status, &[status as u8]);
        self.settings.log(&[reply.status]);
        let written = if status == Status::Ok { reply.written } else { 0 };
        self.place.give_back(reply.head, written + 1);
    }

    fn unwatch(&mut self, local: &Local) {
        self.watch.take().into_iter().for_each(|watch| local.unwatch(watch));
    }

    /// Asks the driver for kicks, or tells it that none are needed. Before the first one the ring is not touched.
    fn want_kicks(&self, wanted: bool) {
        let Some(ring) = self.place.here().filter(|_| self.kicked) else { return };
        self.settings.log_ring(ring.want_kicks(wanted));
    }
}
