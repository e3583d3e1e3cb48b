//! Taking turns, across threads: at a table, or at guest clusters. Nobody blocks a thread; who stops waiting is forgotten.

use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use crate::base::ByteRange;
use crate::rt::sync::WakerSet;

/// Ranges that are somebody's for the moment.
#[derive(Default)]
pub(super) struct Turns {
    held: Mutex<Vec<ByteRange>>,
    waiting: WakerSet,
}

/// A range that is the holder's, until this is dropped.
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    range: ByteRange,
}

impl Turns {
    /// Waits until no part of the range is somebody else's.
    pub(super) async fn take(&self, range: ByteRange) -> Turn<'_> {
        let mut key = None;
        poll_fn(|cx| {
            if self.try_take(range) {
                return Poll::Ready(());
            }
            key = Some(self.waiting.register(cx.waker()));
            // Who gave up between the look and the registration woke nobody.
            if self.try_take(range) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        Turn { turns: self, range }
    }

    /// The turn at the one thing that is called `number`.
    pub(super) async fn at(&self, number: u64) -> Turn<'_> {
        let range = ByteRange::new(number.min(i64::MAX as u64 - 1), 1).unwrap_or(ByteRange::whole(1));
        self.take(range).await
    }

    fn try_take(&self, range: ByteRange) -> bool {
        let mut held = self.held();
        let is_free = !held.iter().any(|other| other.overlaps(range));
        if is_free {
            held.push(range);
        }
        is_free
    }

    fn held(&self) -> MutexGuard<'_, Vec<ByteRange>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        {
            let mut held = self.turns.held();
            if let Some(at) = held.iter().position(|range| *range == self.range) {
                held.swap_remove(at);
            }
        }
        self.turns.waiting.wake_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Waker};

    #[test]
    fn overlaps_wait_and_neighbours_do_not() {
        let turns = Turns::default();
        let mut cx = Context::from_waker(Waker::noop());
        let range = |start, len| ByteRange::new(start, len).unwrap();
        let Poll::Ready(first) = pin!(turns.take(range(0, 10))).as_mut().poll(&mut cx) else { panic!("free") };
        let mut second = pin!(turns.take(range(9, 1)));
        assert!(second.as_mut().poll(&mut cx).is_pending());
        let Poll::Ready(_beside) = pin!(turns.take(range(10, 5))).as_mut().poll(&mut cx) else { panic!("free") };
        {
            let mut third = pin!(turns.take(range(0, 3)));
            assert!(third.as_mut().poll(&mut cx).is_pending());
        }
        drop(first);
        assert!(second.as_mut().poll(&mut cx).is_ready(), "who gave up waiting is in nobody's way");
    }
}
