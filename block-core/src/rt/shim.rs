//! The queue that `wake` stands on: crossbeam's, or one that a checker can see into where a model runs.

#[cfg(not(any(loom, shuttle)))]
pub(super) use crossbeam_queue::SegQueue as Queue;

#[cfg(any(loom, shuttle))]
pub(super) use self::modelled::Queue;

/// A queue for models. Its emptiness is read outside the lock, as in the real one, so that a missing fence shows.
#[cfg(any(loom, shuttle))]
mod modelled {
    use crate::base::shim::{AtomicUsize, Mutex, Ordering};
    use std::collections::VecDeque;

    pub(in crate::rt) struct Queue<T> {
        items: Mutex<VecDeque<T>>,
        len: AtomicUsize,
    }

    impl<T> Queue<T> {
        pub(in crate::rt) fn new() -> Self {
            Self { items: Mutex::new(VecDeque::new()), len: AtomicUsize::new(0) }
        }

        pub(in crate::rt) fn push(&self, item: T) {
            let mut items = self.items.lock().expect("no model panics inside");
            items.push_back(item);
            self.len.store(items.len(), Ordering::Release);
        }

        pub(in crate::rt) fn pop(&self) -> Option<T> {
            if self.is_empty() {
                return None;
            }
            let mut items = self.items.lock().expect("no model panics inside");
            let item = items.pop_front();
            self.len.store(items.len(), Ordering::Release);
            item
        }

        pub(in crate::rt) fn is_empty(&self) -> bool {
            self.len.load(Ordering::Acquire) == 0
        }
    }
}
