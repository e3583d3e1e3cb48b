//! How other threads reach a runtime thread: a lock-free queue and one state, so that a message costs a system call
//! only where the receiver sleeps. The only file of the room with memory orderings that matter; `tests/rt_loom.rs`
//! explores it.
//!
//! The receiver says SLEEPING and then looks at the queue; a sender fills the queue and then looks at the state. A fence
//! on each side makes sure that whoever comes second sees the other. The end works the same way with CLOSED.

use super::shim::Queue;
use crate::base::canary;
use crate::base::shim::{AtomicU8, Ordering, fence};

/// Messages for one thread.
pub struct Mailbox<T> {
    queue: Queue<T>,
    state: AtomicU8,
}

impl<T> Mailbox<T> {
    /// Empty; its receiver is awake.
    #[expect(clippy::new_without_default, reason = "a mailbox is made in one place, with its signal beside it")]
    pub fn new() -> Self {
        Self { queue: Queue::new(), state: AtomicU8::new(AWAKE) }
    }

    /// Leaves a message. `signal` is called where the receiver sleeps and nobody has signalled it yet; it must end the
    /// receiver's sleep, also where the sleep begins later. After [`close`](Self::close) the message is dropped.
    #[inline]
    pub fn post(&self, message: T, signal: impl FnOnce()) {
        self.queue.push(message);
        fence(Ordering::SeqCst);
        match self.state.load(Ordering::Relaxed) {
            AWAKE => {}
            SLEEPING => {
                if self.state.compare_exchange(SLEEPING, AWAKE, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    signal();
                }
            }
            _ => self.discard(),
        }
    }

    /// The oldest message. Only the receiver calls this.
    #[inline]
    pub fn take(&self) -> Option<T> {
        self.queue.pop()
    }

    /// True where [`take`](Self::take) would give nothing: one look at memory.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The receiver is about to sleep. `false` where a message is there already: it must not sleep then.
    #[must_use]
    pub fn prepare_sleep(&self) -> bool {
        // The canary asks before it says that it sleeps: a message between the two wakes nobody.
        let asked_too_early = canary("rt_wake").then(|| self.queue.is_empty());
        self.state.store(SLEEPING, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let empty = asked_too_early.unwrap_or_else(|| self.queue.is_empty());
        if !empty {
            self.woke();
        }
        empty
    }

    /// The receiver is awake again, whatever woke it.
    pub fn woke(&self) {
        self.state.store(AWAKE, Ordering::Relaxed);
    }

    /// The receiver ends: what is in the queue, and what will come, is dropped.
    pub fn close(&self) {
        self.state.store(CLOSED, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.discard();
    }

    fn discard(&self) {
        while let Some(message) = self.queue.pop() {
            drop(message);
        }
    }
}

const AWAKE: u8 = 0;
const SLEEPING: u8 = 1;
const CLOSED: u8 = 2;
