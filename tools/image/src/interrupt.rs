//! Being asked to end (SIGINT, SIGTERM, SIGHUP) in the middle of work that must not be left half done.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use block_core::base::{Result, ResultExt};
use block_core::rt::{Local, SharedFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::session::Session;

/// See the module's head. The second time that we are asked ends us as if nobody watched.
pub struct Interrupt {
    state: Rc<State>,
}

struct State {
    /// The one that has arrived.
    signal: Cell<Option<u8>>,
    then: RefCell<Then>,
}

/// What is done when we are asked.
enum Then {
    /// This, and we end.
    End(Box<dyn FnOnce()>),
    /// This, and the work comes to an end by itself.
    Stop(Box<dyn FnOnce()>),
}

impl Interrupt {
    /// Lets the signals wait until [`Interrupt::watch`], instead of ending us. Call it before the first thread is made.
    pub fn block() -> Result<()> {
        ends().thread_block().doing(|| "Cannot block signals")
    }

    /// Ends the process with [`Interrupt::code`] when it is asked to, be it before this call.
    pub fn watch(session: &Session) -> Result<Self> {
        let signals = SignalFd::with_flags(&ends(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        let signals = Arc::new(OwnedFd::from(signals.doing(|| "Cannot wait for signals")?));
        let state = Rc::new(State { signal: Cell::new(None), then: RefCell::new(Then::End(Box::new(|| ()))) });
        session.local.spawn(answer(session.local.clone(), signals, state.clone()));
        Ok(Self { state })
    }

    /// From now on `undo` goes before the end.
    pub fn undo_first(&self, undo: impl FnOnce() + 'static) {
        self.state.then.replace(Then::End(Box::new(undo)));
    }

    /// From now on the process does not end, but `stop` is called.
    pub fn stop_only(&self, stop: impl FnOnce() + 'static) {
        self.state.then.replace(Then::Stop(Box::new(stop)));
    }

    /// The exit code of who has been asked to end, which is a shell's for who was ended by the signal.
    pub fn code(&self) -> Option<u8> {
        self.state.signal.get().map(|signal| 128 + signal)
    }
}

async fn answer(local: Rc<Local>, signals: SharedFd, state: Rc<State>) {
    local.readable(&signals).await;
    // struct signalfd_siginfo: 128 bytes, the signal's number first.
    let mut info = [0u8; 128];
    if rustix::io::read(&signals, &mut info).is_err() {
        return;
    }
    state.signal.set(Some(info[0]));
    // If ending takes too long for somebody, they may ask again.
    let _unblocked: nix::Result<()> = ends().thread_unblock();
    match state.then.replace(Then::Stop(Box::new(|| ()))) {
        Then::Stop(stop) => stop(),
        Then::End(undo) => {
            undo();
            std::process::exit(128 + i32::from(info[0]));
        }
    }
}

fn ends() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect()
}
