//! Being asked to end (SIGINT, SIGTERM, SIGHUP) in the middle of work that must not be left half done.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use block_core::base::{Result, ResultExt};
use block_core::rt::{Local, SharedFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::session::Session;

/// See the module's head.
pub struct Interrupt {
    signal: Rc<Cell<Option<u8>>>,
}

impl Interrupt {
    /// Lets the signals wait until [`Interrupt::watch`], instead of ending us. Call it before the first thread is made.
    pub fn block() -> Result<()> {
        ends().thread_block().doing(|| "Cannot block signals")
    }

    /// Calls `stop` when we are asked to end for the first time, be it before this call. The second time ends us.
    pub fn watch(session: &Session, stop: impl FnOnce() + 'static) -> Result<Self> {
        let signals = SignalFd::with_flags(&ends(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
        let signals = Arc::new(OwnedFd::from(signals.doing(|| "Cannot wait for signals")?));
        let signal = Rc::new(Cell::new(None));
        session.local.spawn(answer(session.local.clone(), signals, signal.clone(), stop));
        Ok(Self { signal })
    }

    /// The signal that has arrived.
    pub fn signal(&self) -> Option<u8> {
        self.signal.get()
    }
}

async fn answer(local: Rc<Local>, signals: SharedFd, arrived: Rc<Cell<Option<u8>>>, stop: impl FnOnce()) {
    local.readable(&signals).await;
    // struct signalfd_siginfo: 128 bytes, the signal's number first.
    let mut info = [0u8; 128];
    if rustix::io::read(&signals, &mut info).is_err() {
        return;
    }
    arrived.set(Some(info[0]));
    // If ending takes too long for somebody, they may ask again.
    let _unblocked: nix::Result<()> = ends().thread_unblock();
    stop();
}

fn ends() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect()
}
