//! How far long work has come: `-p` shows it all the time, and SIGUSR1 asks for it once.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use block_core::base::{Result, ResultExt};
use block_core::rt::{Local, SharedFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::session::{Session, complain, say};

/// See the module's head.
pub struct Progress {
    state: Rc<State>,
}

struct State {
    /// Per cent.
    current: Cell<f64>,
    /// What was shown last.
    shown: Cell<f64>,
    is_shown: bool,
    /// The least difference that is shown, in per cent.
    step: f64,
    over: Cell<bool>,
    signals: RefCell<Option<SharedFd>>,
}

impl Progress {
    /// Lets SIGUSR1 wait until somebody reads it, instead of ending us. Call it before the first thread is made.
    pub fn block_signal() -> Result<()> {
        asking().thread_block().doing(|| "Cannot block signals")
    }

    /// Begins at 0. `is_shown`: `-p` was given, and the rest of the terminal's line is ours.
    pub fn begin(session: &Session, is_shown: bool) -> Self {
        let signals = SignalFd::with_flags(&asking(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        let signals = signals.ok().map(|signals| Arc::new(OwnedFd::from(signals)));
        let state = Rc::new(State {
            current: Cell::new(0.0),
            shown: Cell::new(-1.0),
            is_shown,
            step: 1.0,
            over: Cell::new(false),
            signals: RefCell::new(signals.clone()),
        });
        if let Some(signals) = signals {
            session.local.spawn(answer(session.local.clone(), signals, state.clone()));
        }
        let progress = Self { state };
        progress.reach(0.0);
        progress
    }

    /// It has come to `done` of `all`.
    pub fn at(&self, done: u64, all: u64) {
        #[expect(clippy::cast_precision_loss, reason = "it is shown with two digits")]
        self.reach(if all == 0 { 100.0 } else { done as f64 * 100.0 / all as f64 });
    }

    fn reach(&self, per_cent: f64) {
        let state = &self.state;
        let per_cent = per_cent.clamp(0.0, 100.0);
        state.current.set(per_cent);
        let is_due = per_cent - state.shown.get() >= state.step || (per_cent >= 100.0 && state.shown.get() < 100.0);
        if state.is_shown && is_due {
            state.shown.set(per_cent);
            say(&format!("    ({per_cent:3.2}/100%)\r"));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.state.over.set(true);
        self.state.signals.take();
        if self.state.is_shown {
            say("\n");
        }
    }
}

async fn answer(local: Rc<Local>, signals: SharedFd, state: Rc<State>) {
    loop {
        local.readable(&signals).await;
        // struct signalfd_siginfo: 128 bytes.
        let mut info = [0; 128];
        if state.over.get() || rustix::io::read(&signals, &mut info).is_err() {
            return;
        }
        complain(&format!("    ({:3.2}/100%)\n", state.current.get()));
    }
}

fn asking() -> SigSet {
    [Signal::SIGUSR1].into_iter().collect()
}
