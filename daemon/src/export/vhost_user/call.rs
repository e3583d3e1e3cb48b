//! What a front-end gave us to call it by, and to tell it of errors.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block_core::rt::Notifier;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::descriptors::{Bin, Waste, is_pipe};

/// See the module's head. A signal never waits, and never fails: what cannot be delivered is the front-end's loss.
pub(super) enum Call {
    Event(Notifier),
    Pipe(Arc<Pipe>),
}

impl Call {
    /// Of an eventfd or a pipe; `bin` is where pipes are written to. Fails where the descriptor is neither, or where
    /// descriptors or memory are short.
    pub(super) fn new(fd: OwnedFd, bin: &Arc<Bin>) -> io::Result<Self> {
        if is_pipe(&fd) {
            bin.needed()?;
            return Ok(Self::Pipe(Arc::new(Pipe { fd, bin: bin.clone(), is_called: AtomicBool::new(false) })));
        }
        Notifier::new(fd).map(Self::Event)
    }

    /// One signal.
    #[inline]
    pub(super) fn notify(&self) {
        match self {
            Self::Event(notifier) => notifier.notify(),
            Self::Pipe(pipe) => pipe.notify(),
        }
    }
}

/// Whoever writes to a pipe may wait for as long as a stranger likes: the one that reads from it, into a page that is not
/// there yet, has its lock. So that is done where other things are that may take long.
pub(super) struct Pipe {
    fd: OwnedFd,
    bin: Arc<Bin>,
    /// A signal is on its way, which stands for all until it is given.
    is_called: AtomicBool,
}

impl Pipe {
    #[cold]
    fn notify(self: &Arc<Self>) {
        if !self.is_called.swap(true, Ordering::AcqRel) {
            self.bin.put_first(Box::new(self.clone()));
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.bin.needed_no_more();
    }
}

impl Waste for Arc<Pipe> {
    fn get_rid(self: Box<Self>) {
        self.is_called.store(false, Ordering::Release);
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        // A full pipe has a signal in it. Nobody may read any more: SIGPIPE is ignored, as in all Rust programs.
        if poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1) {
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn within_patience(mut is_so: impl FnMut() -> bool) {
        let patience = Instant::now() + Duration::from_secs(10);
        while !is_so() {
            assert!(Instant::now() < patience);
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_pipe_is_written_to_by_somebody_else_once_for_many_signals() {
        let bin = Arc::<Bin>::default();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let call = Call::new(writer, &bin).unwrap();
        let mut signal = [0; 64];
        call.notify();
        assert_eq!(rustix::io::read(&reader, &mut signal).unwrap(), 8);
        assert_eq!(signal[..8], 1u64.to_ne_bytes());
        // Nobody reads: a pipe has 64 KiB, which is 8192 signals.
        let start = Instant::now();
        (0..20_000).for_each(|_| call.notify());
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        let Call::Pipe(pipe) = &call else { panic!("it is a pipe") };
        within_patience(|| !pipe.is_called.load(Ordering::Acquire));
        drop(reader);
        call.notify();
        within_patience(|| !pipe.is_called.load(Ordering::Acquire));
    }

    #[test]
    fn nothing_else_is_a_call() {
        let bin = Arc::<Bin>::default();
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Call::new(socket.into(), &bin).is_err());
        assert!(Call::new(tempfile::tempfile().unwrap().into(), &bin).is_err());
    }
}
