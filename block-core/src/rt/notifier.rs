//! A signal on a descriptor that a stranger has a share in, given without ever waiting.
//!
//! `O_NONBLOCK` belongs to the open file, and so to the stranger too: it can be taken away between a look and the write,
//! in the kernel's own ring as well (`IORING_OP_WRITE` looks at the flag before the eventfd does). So no eventfd is
//! written to: it is registered with a ring of its own, whose completions the kernel counts in it, which cannot wait.
//! Nothing else is taken: who writes to a pipe waits for the stranger that reads from it into a page that is not there yet
//! (`SPLICE_F_NONBLOCK` does not cover that), and who closes a socket for what it has not sent.
#![expect(unsafe_code, reason = "a ring entry")]

use super::uring;
use io_uring::{IoUring, opcode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// See the module's head.
pub struct Notifier {
    fd: OwnedFd,
    way: Way,
}

enum Way {
    /// A ring with the eventfd registered.
    Ring(Box<Mutex<IoUring>>),
    /// Where io_uring is refused: a look whether it would wait, and a write. A stranger who is quick can make it wait.
    Write,
}

impl Notifier {
    /// Fails where the descriptor is no eventfd, or where descriptors or memory are short.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let way = match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::Fifo | FileType::Socket => return Err(io::ErrorKind::InvalidInput.into()),
            _ if !uring::is_allowed() => Way::Write,
            _ => match ring_for(&fd) {
                Ok(ring) => Way::Ring(Box::new(Mutex::new(ring))),
                Err(error) if is_refusal(&error) => Way::Write,
                Err(error) => return Err(error),
            },
        };
        Ok(Self { fd, way })
    }

    /// One signal. Never fails: what cannot be delivered is the stranger's loss. A counter at its end counts as delivered.
    pub fn notify(&self) {
        match &self.way {
            Way::Ring(ring) => count_one(&mut ring.lock().unwrap_or_else(PoisonError::into_inner)),
            Way::Write => {
                if self.is_writable() {
                    let _ = rustix::io::write(&self.fd, &ONE);
                }
            }
        }
    }

    fn is_writable(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready == 1)
    }
}

impl std::fmt::Debug for Notifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Notifier").field(&self.fd).finish()
    }
}

fn ring_for(fd: &OwnedFd) -> io::Result<IoUring> {
    let ring = IoUring::new(1)?;
    ring.submitter().register_eventfd(fd.as_raw_fd())?;
    Ok(ring)
}

/// One completion, which the kernel counts in the eventfd before it returns.
fn count_one(ring: &mut IoUring) {
    // SAFETY: the entry points to nothing.
    let pushed = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
    // An entry that the kernel had no memory for is still there; it is that signal, and this one.
    let _ = pushed;
    let _ = ring.submit();
    ring.completion().for_each(drop);
}

/// The kernel has no io_uring, or not for us.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES))
}

/// What is added to a counter.
static ONE: [u8; 8] = 1u64.to_ne_bytes();

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::OFlags;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    const FULL: u64 = u64::MAX - 1;

    fn counter(flags: EventfdFlags, value: u64) -> (OwnedFd, Notifier) {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | flags).unwrap();
        rustix::io::write(&fd, &value.to_ne_bytes()).unwrap();
        let notifier = Notifier::new(fd.try_clone().unwrap()).unwrap();
        (fd, notifier)
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn every_signal_is_counted() {
        let (fd, notifier) = counter(EventfdFlags::NONBLOCK, 5);
        notifier.notify();
        notifier.notify();
        assert_eq!(count(&fd), 7);
        notifier.notify();
        assert_eq!(count(&fd), 1);
    }

    #[test]
    fn a_full_counter_does_not_stop_us() {
        for flags in [EventfdFlags::empty(), EventfdFlags::NONBLOCK] {
            let (fd, notifier) = counter(flags, FULL);
            notifier.notify();
            assert!(count(&fd) >= FULL);
        }
    }

    /// A write would wait for ever sooner or later, whether it looks at the flag itself or the kernel's ring does.
    #[test]
    fn a_flag_that_comes_and_goes_does_not_stop_us() {
        let (fd, notifier) = counter(EventfdFlags::NONBLOCK, FULL);
        assert!(matches!(notifier.way, Way::Ring(_)), "this test needs io_uring");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    rustix::fs::fcntl_setfl(&fd, OFlags::RDWR).unwrap();
                    rustix::fs::fcntl_setfl(&fd, OFlags::RDWR | OFlags::NONBLOCK).unwrap();
                }
            });
            let end = Instant::now() + Duration::from_millis(300);
            while Instant::now() < end {
                notifier.notify();
            }
            over.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn what_is_no_signal_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(Notifier::new(file.into()).is_err());
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Notifier::new(socket.into()).is_err());
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        assert!(Notifier::new(writer).is_err());
    }
}
