//! A queue as other threads have it: messages to its thread, and their answers.
//!
//! Most calls wait for the thread. They are for the thread of a session, never for the control thread or an IOThread.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_core::port::PortHandle;
use block_core::rt::Remote;

use super::queue::Queue;
use super::settings::{Settings, Traits};
use super::stats::QueueStats;

thread_local! {
    /// This thread's queues, for messages.
    static QUEUES: RefCell<HashMap<u64, Rc<Queue>>> = RefCell::default();
}

/// See the module's head. Dropped: the queue is taken off its thread; it has to be stopped by then.
pub(super) struct QueueRef {
    id: u64,
    thread: Remote,
    /// Until its first start.
    plan: Mutex<Option<Plan>>,
}

/// What a queue is made of.
struct Plan {
    port: PortHandle,
    traits: Traits,
    stats: Arc<QueueStats>,
}

impl QueueRef {
    /// A queue of `thread`'s, which hears of it when it is started for the first time.
    pub(super) fn new(thread: Remote, port: PortHandle, traits: Traits, stats: Arc<QueueStats>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { id: NEXT.fetch_add(1, Relaxed), thread, plan: Mutex::new(Some(Plan { port, traits, stats })) }
    }

    /// See [`Queue::start`]. Does not wait: messages keep their order, and whoever stops the queue waits.
    pub(super) fn start(&self, settings: Settings) {
        let (id, plan) = (self.id, self.plan().take());
        self.thread.send(move |local| {
            if let Some(Plan { port, traits, stats }) = plan {
                let queue = Queue::new(local, port.lane(local), traits, stats);
                QUEUES.with_borrow_mut(|queues| queues.insert(id, queue));
            }
            find(id).expect("it is there from its first start on").start(settings);
        });
    }

    /// See [`Queue::adjust`].
    pub(super) fn adjust(&self, settings: Settings) {
        self.ask(move |queue, done| {
            queue.adjust(settings);
            let _ = done.send(());
        });
    }

    /// Stops the queue, waits for all that is under way, and gives its base. `None` where the thread has ended.
    pub(super) fn stop(&self) -> Option<u16> {
        self.ask(|queue, done| queue.stop(done))
    }

    fn ask<T: Send + 'static>(&self, call: impl FnOnce(&Queue, SyncSender<T>) + Send + 'static) -> Option<T> {
        let (reply, answer) = sync_channel(1);
        let id = self.id;
        self.thread.send(move |_| {
            if let Some(queue) = find(id) {
                call(&queue, reply);
            }
        });
        answer.recv().ok()
    }

    fn plan(&self) -> MutexGuard<'_, Option<Plan>> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find(id: u64) -> Option<Rc<Queue>> {
    QUEUES.with_borrow(|queues| queues.get(&id).cloned())
}

impl Drop for QueueRef {
    fn drop(&mut self) {
        if self.plan().is_some() {
            return;
        }
        let (reply, removed) = sync_channel::<()>(1);
        let id = self.id;
        self.thread.spawn(move |_| async move {
            if let Some(queue) = QUEUES.with_borrow_mut(|queues| queues.remove(&id)) {
                queue.remove().await;
            }
            drop(reply);
        });
        // Ends when `reply` is dropped: the lane is gone then, and with it the last way into the graph.
        let _ = removed.recv();
    }
}
