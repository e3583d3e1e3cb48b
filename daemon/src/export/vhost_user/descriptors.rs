//! Descriptors that somebody has sent us: what they are, and how to close them without waiting for whoever sent them.
//!
//! close(2) may take as long as a stranger likes: a socket lingers (socket(7), `SO_LINGER`), a file in user space is
//! flushed by its server, and a unix socket is closed with all that is on its way in it. So only what is known to close
//! at once is closed where it is dropped.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, RecvFlags, SocketType};

/// Descriptors of an export that may wait to be closed. Who sends more is not served before they are.
const MAX_WAITING: usize = 64;

/// An eventfd, by what the kernel calls it.
pub(super) fn is_eventfd(fd: impl AsFd) -> bool {
    kernel_name(fd) == b"anon_inode:[eventfd]"
}

/// Something whose write cannot change a file: an eventfd, or a pipe without a name.
pub(super) fn is_signal(fd: impl AsFd) -> bool {
    let name = kernel_name(fd);
    name == b"anon_inode:[eventfd]" || name.starts_with(b"pipe:[")
}

/// A connected or unconnected unix stream socket.
pub(super) fn is_unix_stream(fd: impl AsFd) -> bool {
    socket_domain(&fd) == Ok(AddressFamily::UNIX) && socket_type(&fd) == Ok(SocketType::STREAM)
}

/// Asks no file system, so it does not wait. A file's name begins with a slash.
fn kernel_name(fd: impl AsFd) -> Vec<u8> {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()), Vec::new());
    link.map(std::ffi::CString::into_bytes).unwrap_or_default()
}

/// Memory (only that has seals, even if there is none on it: fcntl(2), F_GET_SEALS), signals, and connections on which
/// nothing is left and nothing can come.
fn closes_at_once(fd: &OwnedFd) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok() || is_signal(fd) || is_exhausted(fd)
}

/// Where the end has been read, urgent bytes may still be there (unix(7), "MSG_OOB").
fn is_exhausted(fd: &OwnedFd) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    is_unix_stream(fd)
        && matches!(rustix::net::recv(fd, &mut [0u8], flags), Ok((0, _)))
        && rustix::io::ioctl_fionread(fd) == Ok(0)
}

/// A descriptor in whose closing a stranger has a say. Dropping it never waits.
#[derive(Debug)]
pub(super) struct Received {
    /// `Some` until it is dropped.
    fd: Option<OwnedFd>,
    bin: Arc<Bin>,
}

impl Received {
    /// To be closed by `bin`.
    pub(super) fn new(fd: OwnedFd, bin: &Arc<Bin>) -> Self {
        Self { fd: Some(fd), bin: bin.clone() }
    }
}

impl AsFd for Received {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("it is there until it is dropped").as_fd()
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        match self.fd.take() {
            Some(fd) if !closes_at_once(&fd) => self.bin.take(fd),
            _ => {}
        }
    }
}

/// Where an export's descriptors are closed that may take long: one after the other, on a thread that is there for as
/// long as there are some, and that nobody waits for.
#[derive(Debug, Default)]
pub(super) struct Bin(Mutex<Rubbish>);

#[derive(Debug, Default)]
struct Rubbish {
    waiting: VecDeque<OwnedFd>,
    is_being_emptied: bool,
}

impl Bin {
    /// True where so many wait that no more should be accepted.
    pub(super) fn is_full(&self) -> bool {
        self.lock().waiting.len() >= MAX_WAITING
    }

    fn take(self: &Arc<Self>, fd: OwnedFd) {
        let mut rubbish = self.lock();
        rubbish.waiting.push_back(fd);
        if !rubbish.is_being_emptied {
            let bin = self.clone();
            let thread = std::thread::Builder::new().name("vhu-close".into()).spawn(move || bin.empty());
            // Without a thread they wait for the next one to come.
            rubbish.is_being_emptied = thread.is_ok();
        }
    }

    fn empty(&self) {
        while let Some(fd) = self.next() {
            drop(fd);
        }
    }

    /// `None` where there is nothing more to do for the thread.
    fn next(&self) -> Option<OwnedFd> {
        let mut rubbish = self.lock();
        let next = rubbish.waiting.pop_front();
        rubbish.is_being_emptied = next.is_some();
        next
    }

    fn lock(&self) -> MutexGuard<'_, Rubbish> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::net::SendFlags;
    use rustix::net::sockopt::set_socket_linger;

    use super::*;

    /// A socket whose close waits for `linger`, since nobody reads what it has sent; and what has to be kept for that.
    fn lingering(linger: Duration) -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (unread, _) = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.write(&[0; 65536]).is_ok() {}
        socket.set_nonblocking(false).unwrap();
        set_socket_linger(&socket, Some(linger)).unwrap();
        (socket.into(), unread)
    }

    #[test]
    fn what_lingers_is_closed_by_somebody_else_and_what_comes_later_waits_for_it() {
        let bin = Arc::new(Bin::default());
        let (slow, _unread) = lingering(Duration::from_secs(1));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let start = Instant::now();
        drop(Received::new(slow, &bin));
        drop(Received::new(ours.into(), &bin));
        assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
        assert_eq!(std::io::Read::read(&mut theirs, &mut [0]).unwrap(), 0);
        assert!(start.elapsed() > Duration::from_millis(500), "{:?}: the first did not linger", start.elapsed());
    }

    #[test]
    fn a_bin_is_full_while_one_of_many_lingers_and_empty_afterwards() {
        let bin = Arc::new(Bin::default());
        let (slow, _unread) = lingering(Duration::from_secs(1));
        drop(Received::new(slow, &bin));
        for _ in 0..=MAX_WAITING {
            drop(Received::new(UnixStream::pair().unwrap().0.into(), &bin));
        }
        assert!(bin.is_full());
        let patience = Instant::now() + Duration::from_secs(10);
        while bin.lock().is_being_emptied {
            assert!(Instant::now() < patience);
            std::thread::yield_now();
        }
        assert!(!bin.is_full() && bin.lock().waiting.is_empty());
    }

    #[test]
    fn memory_signals_and_ended_connections_need_no_thread() {
        let bin = Arc::new(Bin::default());
        let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        for fd in [memory, event, reader, writer] {
            assert!(closes_at_once(&fd), "{fd:?}");
            drop(Received::new(fd, &bin));
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ours = OwnedFd::from(ours);
        assert!(!closes_at_once(&ours), "more may come");
        (&theirs).write_all(b"x").unwrap();
        rustix::net::send(&theirs, b"y", SendFlags::OOB).unwrap();
        drop(theirs);
        assert!(!closes_at_once(&ours), "a byte is there");
        let _ = rustix::net::recv(&ours, &mut [0u8], RecvFlags::empty()).unwrap();
        assert!(!closes_at_once(&ours), "an urgent byte is there");
        let _ = rustix::net::recv(&ours, &mut [0u8], RecvFlags::OOB).unwrap();
        drop(Received::new(ours, &bin));
        assert!(!bin.lock().is_being_emptied && bin.lock().waiting.is_empty());
        let file: OwnedFd = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap().into();
        assert!(!closes_at_once(&file) && !is_signal(&file) && !is_eventfd(&file));
    }
}
