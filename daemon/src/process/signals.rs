//! The signals that end us, read from a descriptor in the control thread's one wait.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use block_core::base::{Result, ResultExt};
use block_core::rt::{Local, SharedFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Keeps the ending signals from interrupting any thread, and a write past the limit on file sizes from ending us: it
/// fails with EFBIG. Call it before the first thread is made: they inherit it.
pub fn block() -> Result<()> {
    let mut blocked = ending();
    blocked.add(Signal::SIGXFSZ);
    blocked.thread_block().doing(|| "Cannot block signals")
}

/// The ending signals as they come.
pub struct Signals {
    local: Rc<Local>,
    descriptor: SharedFd,
}

impl Signals {
    /// Opens the descriptor; [`block`] came before.
    pub fn open(local: Rc<Local>) -> Result<Self> {
        let descriptor = SignalFd::with_flags(&ending(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .doing(|| "Cannot open a signal descriptor")?;
        Ok(Self { local, descriptor: Arc::new(OwnedFd::from(descriptor)) })
    }

    /// Waits for the next one and gives its name.
    pub async fn next(&self) -> &'static str {
        loop {
            // struct signalfd_siginfo: 128 bytes, its first word the number.
            let mut info = [0; 128];
            if let Ok(128) = rustix::io::read(&self.descriptor, &mut info) {
                let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
                return Signal::try_from(number).map_or("a signal", Signal::as_str);
            }
            self.local.readable(&self.descriptor).await;
        }
    }
}

fn ending() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect()
}
