//! One thread's runtime, as code on that thread sees it: tasks, timers, operations, descriptors, sources.
//! What a pass does with them is `run`; how a thread gets one is `thread`.
#![expect(unsafe_code, reason = "push_direct hands the caller's promise about its memory on to the ring")]

use super::driver::{Completion, Driver, Interest};
use super::exec::Tasks;
use super::inflight::InFlight;
use super::polling::{PollParams, Polling};
use super::readiness::Watches;
use super::source::Sources;
use super::sync::LocalMutex;
use super::thread::{Message, Shared};
use super::timer::Timers;
use super::token::Token;
use super::{
    DirectOp, Engine, Hold, Op, OpFuture, Readiness, Remote, SharedFd, Sleep, Source, SourceId, WatchId, fault,
};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The runtime of one thread. It never leaves the thread.
pub struct Local {
    me: Weak<Self>,
    shared: Arc<Shared>,
    driver: RefCell<Driver>,
    pub(super) tasks: Tasks,
    pub(super) sources: Sources,
    inflight: InFlight,
    watches: Watches,
    timers: RefCell<Timers>,
    pub(super) polling: RefCell<Polling>,
    pub(super) now: Cell<Instant>,
    pub(super) stopping: Cell<bool>,
    pub(super) may_wait: Cell<bool>,
    /// An I/O thread: guests wait where it does.
    pub(super) is_io: Cell<bool>,
    pub(super) counters: Cell<LoopCounters>,
    /// That sources have taken since the thread last had nothing to do.
    pub(super) requests: Cell<u32>,
    /// Passes that may leave their submission to the sleep that follows.
    pub(super) lazy: Cell<u32>,
    /// Who may do what keeps the processor busy, see [`IoBuf::fill_in_steps`](super::IoBuf::fill_in_steps).
    pub(super) long_work: LocalMutex<()>,
    /// The completions of one reap; kept for its memory.
    pub(super) reaped: RefCell<Vec<Completion>>,
}

/// What a thread's loop has done since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoopCounters {
    /// Passes of the loop.
    pub passes: u64,
    /// Times that it slept in the kernel.
    pub sleeps: u64,
    /// Busy polls that found something.
    pub polls_hit: u64,
    /// Busy polls that ended in a sleep.
    pub polls_missed: u64,
}

impl Local {
    pub(super) fn new(shared: Arc<Shared>, driver: Driver, params: PollParams) -> Rc<Self> {
        let local = Rc::new_cyclic(|me| Self {
            me: me.clone(),
            shared,
            driver: RefCell::new(driver),
            tasks: Tasks::default(),
            sources: Sources::default(),
            inflight: InFlight::default(),
            watches: Watches::default(),
            timers: RefCell::default(),
            polling: RefCell::new(Polling::new(params)),
            now: Cell::new(Instant::now()),
            stopping: Cell::new(false),
            may_wait: Cell::new(false),
            is_io: Cell::new(false),
            counters: Cell::default(),
            requests: Cell::default(),
            lazy: Cell::new(0),
            long_work: LocalMutex::new(()),
            reaped: RefCell::default(),
        });
        local.set_params(params);
        local
    }

    /// The runtime of this thread. Panics where the thread has none.
    pub fn current() -> Rc<Self> {
        Self::try_current().expect("this needs a runtime thread")
    }

    /// The runtime of this thread, if it has one that has not ended.
    pub fn try_current() -> Option<Rc<Self>> {
        CURRENT.try_with(|current| current.borrow().clone()).ok().flatten()
    }

    /// Starts a task. It is dropped unfinished where the thread ends before it.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.tasks.spawn(&self.shared, Box::pin(task));
    }

    /// A handle to this thread for all others.
    pub fn remote(&self) -> Remote {
        Remote::new(self.shared.clone())
    }

    /// Ends after `duration`, counted from now; never, where that is past the end of the clock.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        let now = Instant::now();
        self.sleep_until(now.checked_add(duration).unwrap_or(now + FOR_EVER))
    }

    /// Ends at `deadline`. Dropping it cancels it.
    pub fn sleep_until(&self, deadline: Instant) -> Sleep {
        Sleep::new(self.me(), deadline)
    }

    /// Starts an operation. Descriptor, buffer and `hold` are kept until its completion has arrived, even if the future
    /// is dropped before. The answer is a count, or a negative errno; counts may be short.
    pub fn submit(&self, engine: Engine, op: Op, hold: Option<Hold>) -> OpFuture {
        self.inflight.start(self.me(), engine, op, hold)
    }

    /// Ends when `fd` can be read without blocking, or has an error or its end to tell.
    pub fn readable(&self, fd: &SharedFd) -> Readiness {
        self.watches.once(self.me(), fd.clone(), Interest::Readable)
    }

    /// Ends when `fd` can be written without blocking, or has an error to tell.
    pub fn writable(&self, fd: &SharedFd) -> Readiness {
        self.watches.once(self.me(), fd.clone(), Interest::Writable)
    }

    /// Takes a source in. It is visited when its watches fire or when it is made ready.
    pub fn add_source(&self, source: Rc<dyn Source>) -> SourceId {
        self.sources.add(source)
    }

    /// Ends the source's watches and forgets it. Panics where direct operations are still in flight.
    pub fn remove_source(&self, id: SourceId) {
        self.watches.remove_source(self, id.0);
        self.sources.remove(id);
    }

    /// Watches an eventfd for a source: each edge is a `kicked(tag)`. It is never read. One that is readable already
    /// counts as an edge.
    pub fn watch(&self, id: SourceId, tag: u32, fd: SharedFd) -> WatchId {
        self.watches.add(self, id.0, tag, fd)
    }

    /// Ends a watch. `kicked` is not called for it any more.
    pub fn unwatch(&self, id: WatchId) {
        self.watches.remove(self, id);
    }

    /// Starts an operation of a source; the completion comes back as `Source::complete(slot, result)`, never from
    /// inside this call.
    ///
    /// # Safety
    /// The scatter list, all memory that it names, and the descriptor must stay valid until that completion.
    #[inline]
    pub unsafe fn push_direct(&self, id: SourceId, slot: u32, op: DirectOp) {
        self.sources.started(id);
        let token = Token::Direct { source: id.0, slot };
        match fault::strike_direct(&op) {
            None => self.driver.borrow_mut().direct(&op, token),
            Some(result) => self.shared.post(Message::Completed { token, result }),
        }
    }

    /// The thread works for one purpose ([`run_io`](super::run_io)): a system call that waits holds nobody up, and costs
    /// less than having it waited for elsewhere.
    pub fn may_wait(&self) -> bool {
        self.may_wait.get()
    }

    /// Has the source visited in this pass (or the next, from inside its own `run`), and published after it.
    pub fn make_ready(&self, id: SourceId) {
        self.sources.make_ready(id);
    }

    /// A source has taken so many requests: how long the next ones are polled for depends on it.
    #[inline]
    pub fn requests_taken(&self, count: u32) {
        self.requests.set(self.requests.get().saturating_add(count));
    }

    /// When this pass of the loop began: one reading of the clock for all that happens in it.
    #[inline]
    pub fn batch_time(&self) -> Instant {
        self.now.get()
    }

    /// What the loop has done so far.
    pub fn counters(&self) -> LoopCounters {
        self.counters.get()
    }

    /// How this thread waits for the kernel: `io_uring` or `epoll`.
    pub fn engine_name(&self) -> &'static str {
        self.driver.borrow().name()
    }

    pub(super) fn set_params(&self, params: PollParams) {
        self.polling.borrow_mut().set_params(params);
        self.driver.borrow_mut().set_max_batch(params.aio_max_batch);
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(super) fn driver(&self) -> &RefCell<Driver> {
        &self.driver
    }

    pub(super) fn inflight(&self) -> &InFlight {
        &self.inflight
    }

    pub(super) fn watches(&self) -> &Watches {
        &self.watches
    }

    pub(super) fn timers(&self) -> &RefCell<Timers> {
        &self.timers
    }

    pub(super) fn count(&self, count: impl FnOnce(&mut LoopCounters)) {
        let mut counters = self.counters.get();
        count(&mut counters);
        self.counters.set(counters);
    }

    pub(super) fn me(&self) -> Rc<Self> {
        self.me.upgrade().expect("`self` is borrowed from its Rc")
    }
}

/// Makes a runtime the current one of its thread, until it is dropped.
pub(super) struct Entered;

impl Entered {
    /// Panics where the thread has a runtime already: they do not nest.
    pub(super) fn new(local: &Rc<Local>) -> Self {
        let before = CURRENT.with(|current| current.replace(Some(local.clone())));
        assert!(before.is_none(), "this thread has a runtime already");
        Self
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let local = CURRENT.with(RefCell::take);
        drop(local);
    }
}

/// Runs `action` where this thread is the home of `shared`.
#[inline]
pub(super) fn if_home(shared: &Arc<Shared>, action: impl FnOnce(&Local)) -> bool {
    let at_home = CURRENT.try_with(|current| {
        let current = current.borrow();
        let Some(local) = current.as_ref().filter(|local| Arc::ptr_eq(&local.shared, shared)) else { return false };
        action(local);
        true
    });
    at_home.unwrap_or(false)
}

/// A hundred years: beyond what a thread lives, and within what a clock counts.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

thread_local! {
    static CURRENT: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
}
