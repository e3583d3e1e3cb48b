//! Descriptors that are watched: once for a future, or for every edge on behalf of a source. The slot keeps the
//! descriptor open until the driver has said its last word about it.

use super::driver::Interest;
use super::token::Token;
use super::{Local, SharedFd};
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Ends when the descriptor is ready, or will give its error at once. Dropping it stops the watch.
#[must_use = "readiness does nothing unless it is awaited"]
pub struct Readiness {
    local: Rc<Local>,
    slot: Option<u32>,
}

impl Future for Readiness {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let slot = self.slot.expect("a future is not polled after its end");
        if !self.local.watches().fired(slot, cx.waker()) {
            return Poll::Pending;
        }
        self.slot = None;
        Poll::Ready(())
    }
}

impl Drop for Readiness {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.local.watches().end(&self.local, slot);
        }
    }
}

/// A source's watch. One that is over is harmless to end again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchId {
    slot: u32,
    birth: u32,
}

impl WatchId {
    #[cfg(test)]
    pub(super) fn token(self) -> Token {
        Token::Poll(self.slot)
    }
}

/// The watched descriptors of one thread.
#[derive(Default)]
pub(super) struct Watches {
    slots: RefCell<Slab<Slot>>,
    born: Cell<u32>,
}

struct Slot {
    fd: SharedFd,
    birth: u32,
    purpose: Purpose,
    /// The driver has it, and will say something about it.
    armed: bool,
    /// When the driver last ended a source's watch by itself.
    ended: Option<Instant>,
}

/// A watch that ends as soon as it has begun is not begun again before.
const PAUSE: Duration = Duration::from_millis(10);

enum Purpose {
    /// For a future that has not been polled yet, or waits.
    Once(Option<Waker>),
    /// A future's descriptor was ready; the driver is done with it.
    Fired,
    Source {
        source: u32,
        tag: u32,
    },
    /// Nobody cares any more; the driver's last word is awaited.
    Ended,
}

/// What a completion of a watch means for the loop.
pub(super) enum Fired {
    Nothing,
    Wake(Option<Waker>),
    Kick { source: u32, tag: u32 },
}

impl Watches {
    pub(super) fn once(&self, local: Rc<Local>, fd: SharedFd, interest: Interest) -> Readiness {
        let id = self.insert(&local, fd, interest, Purpose::Once(None));
        Readiness { local, slot: Some(id.slot) }
    }

    pub(super) fn add(&self, local: &Local, source: u32, tag: u32, fd: SharedFd) -> WatchId {
        self.insert(local, fd, Interest::Edges, Purpose::Source { source, tag })
    }

    pub(super) fn remove(&self, local: &Local, id: WatchId) {
        if self.slots.borrow().get(id.slot as usize).is_some_and(|slot| slot.birth == id.birth) {
            self.end(local, id.slot);
        }
    }

    /// Ends all watches of a source.
    pub(super) fn remove_source(&self, local: &Local, gone: u32) {
        let of_source = |slot: &Slot| matches!(slot.purpose, Purpose::Source { source, .. } if source == gone);
        let slots = self.slots.borrow();
        let keys: Vec<usize> = slots.iter().filter(|(_, slot)| of_source(slot)).map(|(key, _)| key).collect();
        drop(slots);
        for key in keys {
            self.end(local, u32::try_from(key).expect("keys were made from u32"));
        }
    }

    /// A completion has been taken. A watch of a source that the kernel ended is armed again.
    pub(super) fn complete(&self, local: &Local, slot: u32, result: i32, more: bool) -> Fired {
        let (mut slots, key) = (self.slots.borrow_mut(), slot as usize);
        let (fired, keep) = match &mut slots[key].purpose {
            Purpose::Once(waker) => {
                let waker = waker.take();
                slots[key].purpose = Purpose::Fired;
                (Fired::Wake(waker), true)
            }
            Purpose::Fired => unreachable!("a watch for one event fires once"),
            Purpose::Source { source, tag } => {
                let kick = Fired::Kick { source: *source, tag: *tag };
                // Cancelled by nobody here (those are `Ended`), or squeezed out by a full completion queue: once more. What
                // cannot be watched, as a regular file, ends each time, and is looked at now and then.
                let refused = result < 0 && result != -libc::ECANCELED && !more;
                if refused {
                    tracing::error!(errno = -result, source, tag, "a queue's event descriptor cannot be watched");
                } else if !more {
                    slots[key].ended_by_driver(local, slot);
                }
                (kick, !refused)
            }
            Purpose::Ended => (Fired::Nothing, more),
        };
        if !keep {
            slots.remove(key);
        }
        fired
    }

    fn insert(&self, local: &Local, fd: SharedFd, interest: Interest, purpose: Purpose) -> WatchId {
        let (raw, birth) = (fd.as_raw_fd(), self.born.get().wrapping_add(1));
        self.born.set(birth);
        let slot = self.slots.borrow_mut().insert(Slot { fd, birth, purpose, armed: true, ended: None });
        let slot = u32::try_from(slot).expect("fewer than 2^32 descriptors fit in a process");
        local.driver().borrow_mut().watch(raw, interest, Token::Poll(slot));
        WatchId { slot, birth }
    }

    fn fired(&self, slot: u32, waker: &Waker) -> bool {
        let (mut slots, key) = (self.slots.borrow_mut(), slot as usize);
        match &mut slots[key].purpose {
            Purpose::Once(old) => {
                *old = Some(waker.clone());
                false
            }
            Purpose::Fired => {
                slots.remove(key);
                true
            }
            Purpose::Source { .. } | Purpose::Ended => unreachable!("this slot belongs to a future that is polled"),
        }
    }

    fn end(&self, local: &Local, slot: u32) {
        let (mut slots, key) = (self.slots.borrow_mut(), slot as usize);
        let purpose = std::mem::replace(&mut slots[key].purpose, Purpose::Ended);
        match purpose {
            Purpose::Source { .. } if !slots[key].armed => drop(slots.remove(key)),
            Purpose::Fired => drop(slots.remove(key)),
            Purpose::Once(_) | Purpose::Source { .. } => local.driver().borrow_mut().unwatch(Token::Poll(slot)),
            Purpose::Ended => {}
        }
        drop(slots);
        drop(purpose);
    }
}

impl Slot {
    /// Arms a source's watch again: at once, or after a pause where that was tried just now.
    fn ended_by_driver(&mut self, local: &Local, slot: u32) {
        let now = Instant::now();
        let tried = self.ended.replace(now).is_some_and(|last| now < last + PAUSE);
        if !tried {
            return self.arm(local, slot);
        }
        self.armed = false;
        let (birth, me) = (self.birth, local.me());
        local.spawn(async move {
            me.sleep(PAUSE).await;
            if let Some(slot_there) = me.watches().slots.borrow_mut().get_mut(slot as usize)
                && slot_there.birth == birth
            {
                slot_there.arm(&me, slot);
            }
        });
    }

    fn arm(&mut self, local: &Local, slot: u32) {
        self.armed = true;
        local.driver().borrow_mut().watch(self.fd.as_raw_fd(), Interest::Edges, Token::Poll(slot));
    }
}
