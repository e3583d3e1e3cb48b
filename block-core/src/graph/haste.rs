//! A request's own reason to hurry: somebody who is being drained waits for it.
//!
//! A request parks until its root is drained (`IoCx::unless_hurried`), which a range lock may be held across. Whoever
//! waits for that lock under another root and is drained hands its hurry on to the holder, and to nobody else: the
//! holder's neighbours wait as before.

use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};

use crate::base::canary;
use crate::base::shim::{Mutex, MutexGuard};

/// Of one request, with all that it forks. Once hurried, it stays so to its end.
#[derive(Debug, Default)]
pub struct Haste(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    hurried: bool,
    parked: Vec<Waker>,
}

impl Haste {
    /// Somebody who is being drained waits for this request.
    pub fn hurry(&self) {
        let parked = {
            let mut state = self.lock();
            state.hurried = true;
            std::mem::take(&mut state.parked)
        };
        parked.into_iter().for_each(Waker::wake);
    }

    /// Ready once the request is hurried.
    pub fn poll_hurried(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if state.hurried {
            return Poll::Ready(());
        }
        if canary("haste_late_waker") {
            // Who hurries it between the look and the registration wakes nobody.
            drop(state);
            state = self.lock();
        }
        if !state.parked.iter().any(|known| known.will_wake(cx.waker())) {
            state.parked.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
