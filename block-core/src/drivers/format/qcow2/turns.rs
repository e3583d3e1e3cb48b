//! Taking turns, across threads: at a table, or at guest clusters. First come, first served, so that who wants much is
//! not kept waiting by many who want little; and who is drained hurries those that he waits for.
//!
//! Who waits is not at the node meanwhile (`IoCx::aside`): what he knew of its tables, and has no turn at, has to be looked
//! up again.

use crate::base::ByteRange;
use crate::graph::{IoCx, Ticket, Tracked};

/// Ranges that are somebody's for the moment, and those that others wait for.
#[derive(Default)]
pub(super) struct Turns(Tracked);

/// A range that is the holder's, until this is dropped.
pub(super) struct Turn<'a> {
    _ticket: Ticket<'a>,
}

impl Turns {
    /// Waits until no part of the range is somebody else's who came before.
    pub(super) async fn take<'a>(&'a self, cx: IoCx<'a>, range: ByteRange) -> Turn<'a> {
        Turn { _ticket: cx.aside(cx.alone(&self.0, range, true)).await }
    }

    /// The turn at the one thing that is called `number`.
    pub(super) async fn at<'a>(&'a self, cx: IoCx<'a>, number: u64) -> Turn<'a> {
        let range = ByteRange::new(number.min(i64::MAX as u64 - 1), 1).unwrap_or(ByteRange::whole(1));
        self.take(cx, range).await
    }
}
