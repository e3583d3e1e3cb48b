//! Taking turns, across threads: at a table, or at guest clusters. First come, first served, so that who wants much is
//! not kept waiting by many who want little. Nobody blocks a thread; who stops waiting is forgotten.

use std::future::poll_fn;

use crate::base::ByteRange;
use crate::graph::{Ticket, Tracked};

/// Ranges that are somebody's for the moment, and those that others wait for.
#[derive(Default)]
pub(super) struct Turns(Tracked);

/// A range that is the holder's, until this is dropped.
pub(super) struct Turn<'a> {
    _ticket: Ticket<'a>,
}

impl Turns {
    /// Waits until no part of the range is somebody else's who came before.
    pub(super) async fn take(&self, range: ByteRange) -> Turn<'_> {
        let ticket = self.0.enter(range, true);
        poll_fn(|cx| ticket.poll_alone(cx)).await;
        Turn { _ticket: ticket }
    }

    /// The turn at the one thing that is called `number`.
    pub(super) async fn at(&self, number: u64) -> Turn<'_> {
        let range = ByteRange::new(number.min(i64::MAX as u64 - 1), 1).unwrap_or(ByteRange::whole(1));
        self.take(range).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

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
        let mut small = pin!(turns.take(range(9, 1)));
        assert!(small.as_mut().poll(&mut cx).is_pending());
        drop(first);
        assert!(small.as_mut().poll(&mut cx).is_pending(), "it came later");
        assert!(second.as_mut().poll(&mut cx).is_ready(), "who gave up waiting is in nobody's way");
    }
}
