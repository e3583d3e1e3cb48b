//! Making stable, and remembering for ever when that failed.
//!
//! The kernel reports a failed write-back once and then calls the pages clean, so a second fdatasync would succeed
//! over lost data. Hence the latch: after one failure every flush of this configuration fails, until a reopen makes
//! a new one (but not where the kernel could not even begin). For the same reason only one fdatasync runs at a time: of two at once, one would take the error and
//! the other would succeed. Who comes meanwhile waits, and shares the next one.

use std::future::{Future, poll_fn};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use crate::base::IoError;

/// One configuration's flushes, from any thread.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    latched: AtomicBool,
    turns: Mutex<Turns>,
}

#[derive(Debug, Default)]
struct Turns {
    /// How many have begun.
    begun: u64,
    /// The last one that ended well.
    good: u64,
    running: bool,
    waiting: Vec<Waker>,
}

/// The right to be the one that flushes. If it is dropped before the end, the next may try.
struct Turn<'a> {
    flusher: &'a Flusher,
    number: u64,
}

impl Flusher {
    /// Makes everything stable that was completed before. `sync` is run by whoever's turn it is.
    pub(super) async fn flush(&self, sync: impl Future<Output = Result<(), IoError>>) -> Result<(), IoError> {
        let wanted = self.turns().next();
        let Some(turn) = poll_fn(|cx| self.poll_turn(wanted, cx.waker())).await? else { return Ok(()) };
        let result = sync.await;
        turn.end(result);
        result
    }

    /// From now on every flush fails.
    pub(super) fn latch(&self) {
        self.latched.store(true, Ordering::Release);
    }

    /// `None`: a flush that began late enough has ended well.
    fn poll_turn(&self, wanted: u64, waker: &Waker) -> Poll<Result<Option<Turn<'_>>, IoError>> {
        let mut turns = self.turns();
        if self.latched.load(Ordering::Acquire) {
            return Poll::Ready(Err(IoError::FlushLatched));
        }
        if turns.good >= wanted {
            return Poll::Ready(Ok(None));
        }
        if turns.running {
            if !turns.waiting.iter().any(|known| known.will_wake(waker)) {
                turns.waiting.push(waker.clone());
            }
            return Poll::Pending;
        }
        turns.running = true;
        turns.begun += 1;
        Poll::Ready(Ok(Some(Turn { flusher: self, number: turns.begun })))
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turns {
    /// The first flush that covers what has been completed until now: one that has not begun yet.
    fn next(&self) -> u64 {
        self.begun + 1
    }
}

impl Turn<'_> {
    fn end(self, result: Result<(), IoError>) {
        match result {
            Ok(()) => {
                let mut turns = self.flusher.turns();
                turns.good = turns.good.max(self.number);
            }
            // No fdatasync has run: nothing is known of the data, and nobody has taken the report.
            Err(IoError::Os(libc::EAGAIN | libc::ECANCELED)) => {}
            Err(_) => self.flusher.latch(),
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut turns = self.flusher.turns();
            turns.running = false;
            std::mem::take(&mut turns.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::ready;
    use std::pin::pin;
    use std::task::Context;

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn now<T>(future: impl Future<Output = T>) -> T {
        match poll(pin!(future)) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("it should not have to wait"),
        }
    }

    /// A sync that ends when the cell is filled.
    async fn when_told(told: &Cell<Option<Result<(), IoError>>>) -> Result<(), IoError> {
        poll_fn(|_| told.get().map_or(Poll::Pending, Poll::Ready)).await
    }

    #[test]
    fn after_one_failure_every_flush_fails() {
        let flusher = Flusher::default();
        assert_eq!(now(flusher.flush(ready(Ok(())))), Ok(()));
        assert_eq!(now(flusher.flush(ready(Err(IoError::Os(libc::EIO))))), Err(IoError::Os(libc::EIO)));
        assert_eq!(now(flusher.flush(ready(Ok(())))), Err(IoError::FlushLatched));
    }

    #[test]
    fn a_flush_that_the_kernel_could_not_begin_says_nothing_of_the_data() {
        let flusher = Flusher::default();
        for errno in [libc::EAGAIN, libc::ECANCELED] {
            let told = Cell::new(None);
            let mut first = pin!(flusher.flush(when_told(&told)));
            assert!(poll(first.as_mut()).is_pending());
            let mut second = pin!(flusher.flush(ready(Ok(()))));
            assert!(poll(second.as_mut()).is_pending());
            told.set(Some(Err(IoError::Os(errno))));
            assert_eq!(poll(first.as_mut()), Poll::Ready(Err(IoError::Os(errno))));
            assert_eq!(poll(second.as_mut()), Poll::Ready(Ok(())), "it makes its own");
        }
        assert_eq!(now(flusher.flush(ready(Err(IoError::Os(libc::EINTR))))), Err(IoError::Os(libc::EINTR)));
        assert_eq!(now(flusher.flush(ready(Ok(())))), Err(IoError::FlushLatched), "it had begun");
    }

    #[test]
    fn a_flush_that_began_too_early_covers_nobody() {
        let flusher = Flusher::default();
        let (first_told, second_told) = (Cell::new(None), Cell::new(None));
        let mut first = pin!(flusher.flush(when_told(&first_told)));
        assert!(poll(first.as_mut()).is_pending());
        let mut second = pin!(flusher.flush(when_told(&second_told)));
        let mut third = pin!(flusher.flush(async { panic!("the third shares the second's") }));
        assert!(poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
        first_told.set(Some(Ok(())));
        assert!(poll(first.as_mut()).is_ready());
        assert!(poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
        second_told.set(Some(Ok(())));
        assert_eq!(poll(second.as_mut()), Poll::Ready(Ok(())));
        assert_eq!(poll(third.as_mut()), Poll::Ready(Ok(())));
    }

    #[test]
    fn who_waited_for_a_failed_flush_fails_too() {
        let flusher = Flusher::default();
        let told = Cell::new(None);
        let mut first = pin!(flusher.flush(when_told(&told)));
        assert!(poll(first.as_mut()).is_pending());
        let mut second = pin!(flusher.flush(ready(Ok(()))));
        assert!(poll(second.as_mut()).is_pending());
        told.set(Some(Err(IoError::NoSpace)));
        assert_eq!(poll(first.as_mut()), Poll::Ready(Err(IoError::NoSpace)));
        assert_eq!(poll(second.as_mut()), Poll::Ready(Err(IoError::FlushLatched)));
    }

    #[test]
    fn an_abandoned_turn_goes_to_the_next() {
        let flusher = Flusher::default();
        let told = Cell::new(None);
        let mut first = Box::pin(flusher.flush(when_told(&told)));
        assert!(poll(first.as_mut()).is_pending());
        let mut second = pin!(flusher.flush(ready(Ok(()))));
        assert!(poll(second.as_mut()).is_pending());
        drop(first);
        assert_eq!(poll(second.as_mut()), Poll::Ready(Ok(())));
    }
}
