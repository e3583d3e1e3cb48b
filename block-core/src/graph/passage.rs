//! A request on the direct path: which nodes it goes through, and what it owes them when its ring entry is over.

use std::time::Duration;

use super::driver::{Direct, DirectRequest, RingEntry};
use super::lane::ViewPin;
use super::stats::OpKind;
use crate::base::ByteRange;
use crate::rt::Counted;

/// A direct answer with the nodes that it passes through.
#[derive(Clone, Copy, Debug)]
pub struct DirectPlan {
    /// What to do.
    pub answer: Direct,
    /// The nodes passed, the lowest first; deeper chains take the async path.
    pub(crate) trail: Trail,
}

impl DirectPlan {
    /// The answer of the node that gives it; nodes above add themselves on the way up.
    pub fn new(answer: Direct) -> Self {
        Self { answer, trail: Trail::default() }
    }
}

/// Up to eight view slots.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Trail {
    slots: [u8; 8],
    len: u8,
    /// A bit for each of `slots`: the node keeps this write apart from others.
    apart: u8,
    /// The slot of a node that records the write, and where in it the write begins.
    recorded: Option<(u8, u64)>,
}

impl Trail {
    /// `None` where the chain is too deep, or the view too large, for the direct path.
    #[inline]
    pub(crate) fn push(&mut self, slot: u32) -> Option<()> {
        *self.slots.get_mut(usize::from(self.len))? = u8::try_from(slot).ok()?;
        self.len += 1;
        Some(())
    }

    /// The node that was pushed last keeps this write apart from others.
    #[inline]
    pub(crate) fn keep_apart(&mut self) {
        self.apart |= 1 << (self.len - 1);
    }

    /// The node that was pushed last records the write, which begins there at `start`. One node can have this: `None`
    /// for a second.
    pub(crate) fn record(&mut self, start: u64) -> Option<()> {
        let before = self.recorded.replace((self.slots[usize::from(self.len) - 1], start));
        before.is_none().then_some(())
    }

    #[inline]
    fn slots(&self) -> impl Iterator<Item = u32> {
        self.slots[..usize::from(self.len)].iter().map(|slot| u32::from(*slot))
    }

    /// The nodes that keep the write apart.
    #[inline]
    fn apart(&self) -> impl Iterator<Item = u32> {
        let mut left = self.apart;
        std::iter::from_fn(move || {
            let next = left.trailing_zeros() as usize;
            left &= left.wrapping_sub(1);
            self.slots.get(next).map(|slot| u32::from(*slot))
        })
    }
}

/// How a request goes on that took the direct path.
#[derive(Debug)]
pub enum Passed {
    /// It is done, and no buffer was touched.
    Done,
    /// It is done once the buffer has been filled with zeroes.
    Zeroed,
    /// By a ring entry. Whoever makes it holds the passage until the entry's completion has arrived.
    Ring(RingEntry, Passage),
}

/// A request that a ring entry carries: inside its root, and inside each node that keeps writes apart, until this is
/// dropped. Then, and not before, nodes that record changes have recorded it.
pub struct Passage {
    pin: ViewPin,
    request: DirectRequest,
    trail: Trail,
}

impl ViewPin {
    /// Sets out on a plan that was made under this pin; `None`: somebody rewrites whole blocks just now, so that the
    /// request has to wait its turn on the async path.
    #[inline]
    pub(crate) fn pass(&self, plan: DirectPlan, request: DirectRequest) -> Option<Passed> {
        let DirectPlan { answer, trail } = plan;
        match answer {
            Direct::Ring(entry) => {
                self.enter_nodes(&trail)?;
                self.pinned().up();
                Some(Passed::Ring(entry, Passage { pin: self.fork(), request, trail }))
            }
            Direct::Done | Direct::Zeroed => {
                self.count(&trail, request, Duration::ZERO);
                Some(if answer == Direct::Done { Passed::Done } else { Passed::Zeroed })
            }
        }
    }

    #[inline]
    fn enter_nodes(&self, trail: &Trail) -> Option<()> {
        for (number, slot) in trail.apart().enumerate() {
            if !self.node(slot).tracked.try_write(self.pinned().writes(slot)) {
                self.leave_nodes(trail.apart().take(number));
                return None;
            }
        }
        Some(())
    }

    #[inline]
    fn leave_nodes(&self, slots: impl Iterator<Item = u32>) {
        slots.for_each(|slot| self.node(slot).tracked.wrote(self.pinned().writes(slot)));
    }

    /// The request moved all its bytes: counts it at every node that it passed through.
    #[inline]
    fn count(&self, trail: &Trail, request: DirectRequest, time: Duration) {
        let kind = if request.write { OpKind::Write } else { OpKind::Read };
        for slot in trail.slots() {
            self.pinned().counters(slot).done(kind, 1, request.at.len(), time);
        }
    }

    #[cold]
    fn record(&self, slot: u8, at: ByteRange) {
        self.pinned().view.placed(slot.into()).bitmaps.iter().for_each(|bitmap| bitmap.mark(at));
    }
}

impl Passage {
    /// The pin under which the request is inside.
    #[inline]
    pub fn pin(&self) -> &ViewPin {
        &self.pin
    }

    /// The request, as its root gave it.
    #[inline]
    pub fn request(&self) -> DirectRequest {
        self.request
    }

    /// The entry moved all its bytes, in so much time: every node that the request went through counts it.
    #[inline]
    pub fn count(&self, time: Duration) {
        self.pin.count(&self.trail, self.request, time);
    }
}

impl Drop for Passage {
    #[inline]
    fn drop(&mut self) {
        if let Some((slot, start)) = self.trail.recorded {
            let at = ByteRange::new(start, self.request.at.len());
            self.pin.record(slot, at.expect("the range was checked against the node's size"));
        }
        self.pin.leave_nodes(self.trail.apart());
        self.pin.pinned().down();
    }
}

impl std::fmt::Debug for Passage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passage").field("request", &self.request).field("trail", &self.trail).finish_non_exhaustive()
    }
}
