//! The executor: tasks that never leave their thread, in a slab. A wake on the same thread neither locks nor calls the
//! kernel; from another thread it is a message. A waker may outlive its task, its thread and everything here.

use super::thread::Shared;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

/// A look at the clock is dear beside a short poll; a long one takes a tenth of a millisecond.
const POLLS_PER_CLOCK: usize = 4;

/// The tasks of one thread.
#[derive(Default)]
pub(super) struct Tasks {
    slots: RefCell<Slab<Slot>>,
    ready: RefCell<VecDeque<TaskId>>,
    born: Cell<u32>,
    root: Cell<bool>,
}

/// A task, and which of those that had its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TaskId {
    slot: u32,
    birth: u32,
}

impl TaskId {
    /// The future that `run_control` was given: it is no task, since it may borrow.
    const ROOT: Self = Self { slot: u32::MAX, birth: 0 };
}

struct Slot {
    birth: u32,
    /// Out while it is being polled.
    task: Option<Task>,
}

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    waker: Waker,
    header: Arc<Header>,
}

/// What wakers point to.
struct Header {
    id: TaskId,
    queued: AtomicBool,
    home: Arc<Shared>,
}

impl Wake for Header {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.home.wake(self.id);
        }
    }
}

impl Tasks {
    /// Takes a task in; its first poll is in the next round.
    pub(super) fn spawn(&self, home: &Arc<Shared>, future: Pin<Box<dyn Future<Output = ()>>>) {
        let birth = self.born.get().wrapping_add(1);
        self.born.set(birth);
        let mut slots = self.slots.borrow_mut();
        let entry = slots.vacant_entry();
        let slot = u32::try_from(entry.key()).expect("fewer than 2^32 tasks fit in memory");
        let id = TaskId { slot, birth };
        let header = Arc::new(Header { id, queued: AtomicBool::new(true), home: home.clone() });
        entry.insert(Slot { birth, task: Some(Task { future, waker: header.clone().into(), header }) });
        self.ready.borrow_mut().push_back(id);
    }

    /// Marks a task as ready to go on. For the thread's own use: others send a message.
    #[inline]
    pub(super) fn push(&self, id: TaskId) {
        self.ready.borrow_mut().push_back(id);
    }

    /// Polls each task that is ready now, once, or as many as there is time for: the others keep their place. True where
    /// there was one.
    #[inline(never)]
    pub(super) fn run(&self, until: Instant) -> bool {
        let count = self.ready.borrow().len();
        for turn in 1..=count {
            if turn % POLLS_PER_CLOCK == 0 && Instant::now() >= until {
                break;
            }
            let Some(id) = self.ready.borrow_mut().pop_front() else { break };
            if id == TaskId::ROOT {
                self.root.set(true);
            } else {
                self.poll(id);
            }
        }
        count > 0
    }

    /// True where `run` would find something.
    pub(super) fn any_ready(&self) -> bool {
        !self.ready.borrow().is_empty()
    }

    fn poll(&self, id: TaskId) {
        let Some(mut task) = self.take(id) else { return };
        // Before the poll: what is woken while it runs runs again.
        task.header.queued.swap(false, Ordering::AcqRel);
        let state = task.future.as_mut().poll(&mut Context::from_waker(&task.waker));
        if state.is_pending() {
            self.slots.borrow_mut()[id.slot as usize].task = Some(task);
        } else {
            self.slots.borrow_mut().remove(id.slot as usize);
        }
    }

    /// `None` for one that is over, whatever has its slot now.
    fn take(&self, id: TaskId) -> Option<Task> {
        let mut slots = self.slots.borrow_mut();
        slots.get_mut(id.slot as usize).filter(|slot| slot.birth == id.birth)?.task.take()
    }

    /// Drops all tasks, and those that their drops start.
    pub(super) fn drop_all(&self) {
        loop {
            let slots = self.slots.take();
            if slots.is_empty() {
                return;
            }
            drop(slots);
        }
    }
}

/// A future that is driven by the loop but owned by the caller.
pub(super) struct Root {
    header: Arc<Header>,
    waker: Waker,
}

impl Root {
    /// Ready for its first poll.
    pub(super) fn new(home: &Arc<Shared>, tasks: &Tasks) -> Self {
        tasks.root.set(true);
        let header = Arc::new(Header { id: TaskId::ROOT, queued: AtomicBool::new(false), home: home.clone() });
        Self { waker: header.clone().into(), header }
    }

    /// Polls where it has been woken since the last time.
    pub(super) fn poll<F: Future>(&self, tasks: &Tasks, future: Pin<&mut F>) -> Poll<F::Output> {
        if !tasks.root.replace(false) {
            return Poll::Pending;
        }
        self.header.queued.swap(false, Ordering::AcqRel);
        future.poll(&mut Context::from_waker(&self.waker))
    }
}
