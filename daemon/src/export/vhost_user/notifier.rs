//! The descriptor by which the guest is called. Never blocks, never fails: an interrupt that cannot be delivered is the
//! frontend's loss.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

/// See the module's head.
#[derive(Debug)]
pub(super) struct Notifier {
    fd: OwnedFd,
    /// The other side opened it blocking. We do not change that (the flag is shared), we ask first.
    may_block: bool,
}

impl Notifier {
    /// Fails only where the descriptor is none.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let may_block = !rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK);
        Ok(Self { fd, may_block })
    }

    /// One signal. A counter at its end counts as delivered, a pipe without reader too.
    pub(super) fn signal(&self) {
        if self.may_block && !self.is_writable() {
            return;
        }
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    fn is_writable(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn a_full_counter_does_not_stop_us() {
        for flags in [EventfdFlags::CLOEXEC, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK] {
            let fd = eventfd(0, flags).unwrap();
            let full = u64::MAX - 1;
            rustix::io::write(&fd, &full.to_ne_bytes()).unwrap();
            Notifier::new(fd.try_clone().unwrap()).unwrap().signal();
            let mut count = [0; 8];
            rustix::io::read(&fd, &mut count).unwrap();
            assert_eq!(u64::from_ne_bytes(count), full);
        }
    }

    #[test]
    fn a_signal_arrives() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let notifier = Notifier::new(fd.try_clone().unwrap()).unwrap();
        notifier.signal();
        notifier.signal();
        let mut count = [0; 8];
        rustix::io::read(&fd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 2);
    }

    #[test]
    fn a_pipe_without_reader_is_ignored() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        Notifier::new(writer).unwrap().signal();
    }
}
