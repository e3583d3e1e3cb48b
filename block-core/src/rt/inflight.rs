//! Operations that futures wait for. The slot owns descriptor, buffer and hold until the completion has been taken, so
//! that a dropped future abandons only the answer.

use super::op::{Engine, Hold, Op};
use super::thread::Message;
use super::token::Token;
use super::{Local, fault, pool};
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The answer to an operation: bytes moved, or a negative errno, as the kernel gives it.
#[must_use = "an operation may fail"]
pub struct OpFuture {
    local: Rc<Local>,
    slot: Option<u32>,
}

impl Future for OpFuture {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        let slot = self.slot.expect("a future is not polled after its end");
        let Some(result) = self.local.inflight().answer(slot, cx.waker()) else { return Poll::Pending };
        self.slot = None;
        Poll::Ready(result)
    }
}

impl Drop for OpFuture {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.local.inflight().abandon(slot);
        }
    }
}

/// The operations of one thread.
#[derive(Default)]
pub(super) struct InFlight {
    slots: RefCell<Slab<Slot>>,
    running: Cell<usize>,
}

enum Slot {
    /// Boxed, so that ring entries may point into it while the slab grows.
    Running {
        kept: Box<Kept>,
        waiter: Waiter,
    },
    Done(i32),
}

struct Kept {
    op: Op,
    _hold: Option<Hold>,
}

enum Waiter {
    NotYet,
    Task(Waker),
    Abandoned,
}

impl InFlight {
    /// Starts an operation. It runs whether or not the future is polled.
    pub(super) fn start(&self, local: Rc<Local>, engine: Engine, op: Op, hold: Option<Hold>) -> OpFuture {
        let (op, answer) = fault::strike(op);
        let kept = Box::new(Kept { op, _hold: hold });
        let raw = kept.op.raw(engine);
        let slot = self.slots.borrow_mut().insert(Slot::Running { kept, waiter: Waiter::NotYet });
        let slot = u32::try_from(slot).expect("fewer than 2^32 operations fit in memory");
        self.running.set(self.running.get() + 1);
        let token = Token::Op(slot);
        match (answer, engine) {
            (Some(result), _) => local.shared().post(Message::Completed { token, result }),
            (None, Engine::Ring | Engine::Cached | Engine::AtOnce) => local.driver().borrow_mut().run(raw, token),
            (None, Engine::Pool) => pool::run(raw, token, local.shared().clone()),
        }
        OpFuture { local, slot: Some(slot) }
    }

    /// A completion has been taken: the kernel is done with what the slot keeps.
    pub(super) fn complete(&self, slot: u32, result: i32) {
        let mut slots = self.slots.borrow_mut();
        let key = slot as usize;
        let Slot::Running { kept, waiter } = std::mem::replace(&mut slots[key], Slot::Done(result)) else {
            unreachable!("an operation completes once")
        };
        self.running.set(self.running.get() - 1);
        if matches!(waiter, Waiter::Abandoned) {
            slots.remove(key);
        }
        // Owners and wakers run code of others.
        drop(slots);
        drop(kept);
        if let Waiter::Task(waker) = waiter {
            waker.wake();
        }
    }

    /// Operations that the kernel, or a helper, still works on.
    pub(super) fn count(&self) -> usize {
        self.running.get()
    }

    fn answer(&self, slot: u32, waker: &Waker) -> Option<i32> {
        let mut slots = self.slots.borrow_mut();
        let key = slot as usize;
        match &mut slots[key] {
            Slot::Running { waiter: Waiter::Task(old), .. } => old.clone_from(waker),
            Slot::Running { waiter, .. } => *waiter = Waiter::Task(waker.clone()),
            Slot::Done(result) => {
                let result = *result;
                slots.remove(key);
                return Some(result);
            }
        }
        None
    }

    fn abandon(&self, slot: u32) {
        let mut slots = self.slots.borrow_mut();
        let key = slot as usize;
        let waiter = match &mut slots[key] {
            Slot::Running { waiter, .. } => std::mem::replace(waiter, Waiter::Abandoned),
            Slot::Done(_) => {
                slots.remove(key);
                return;
            }
        };
        drop(slots);
        drop(waiter);
    }
}

impl Drop for InFlight {
    /// The loop ends only when this is empty. Where a panic unwinds past it, the kernel still has the buffers: better
    /// leaked than freed under it.
    fn drop(&mut self) {
        if self.count() > 0 {
            std::mem::forget(self.slots.take());
        }
    }
}
