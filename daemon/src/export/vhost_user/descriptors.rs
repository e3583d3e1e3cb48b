//! Descriptors that somebody has sent us: what they are, and how to close them without waiting for whoever sent them.
//!
//! close(2) may take as long as a stranger likes: a socket lingers (socket(7), `SO_LINGER`), a file in user space is
//! flushed by its server, a unix socket is closed with all that is on its way in it, and whatever epoll takes (eventfds and
//! pipes among it) waits for an epoll set that the stranger has put it in. So only memory is closed where it is dropped. What
//! else may take as long ([`Waste`]: to write to a pipe, to wake who waits for a socket) is done by the same kind of thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

/// Descriptors of an export that may wait to be closed. Who sends more is not listened to before they are.
const MAX_WAITING: usize = 64;

/// An eventfd, by what the kernel calls it.
pub(super) fn is_eventfd(fd: impl AsFd) -> bool {
    kernels_name(fd) == b"anon_inode:[eventfd]"
}

/// A pipe without a name.
pub(super) fn is_pipe(fd: impl AsFd) -> bool {
    kernels_name(fd).starts_with(b"pipe:[")
}

/// Asks no file system, so it does not wait. What has a path begins with a slash.
fn kernels_name(fd: impl AsFd) -> Vec<u8> {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()), Vec::new());
    link.map(std::ffi::CString::into_bytes).unwrap_or_default()
}

/// A connected or unconnected unix stream socket.
pub(super) fn is_unix_stream(fd: impl AsFd) -> bool {
    socket_domain(&fd) == Ok(AddressFamily::UNIX) && socket_type(&fd) == Ok(SocketType::STREAM)
}

/// Only memory has seals, even if there is none on it (fcntl(2), F_GET_SEALS).
fn is_memory(fd: &OwnedFd) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok()
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
            Some(fd) if !is_memory(&fd) => self.bin.put(Box::new(fd)),
            _ => {}
        }
    }
}

/// Where is done, to strangers' descriptors, what may take long: one after the other, on a thread that nobody waits for. Each
/// export has one.
#[derive(Default)]
pub(super) struct Bin {
    rubbish: Mutex<Rubbish>,
    has_room: Condvar,
    has_waste: Condvar,
}

/// How long its thread stays when there is nothing to close: a frontend that comes and goes has some all the time, and to
/// make a thread takes longer than to close an eventfd.
const IDLE: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Rubbish {
    waiting: VecDeque<Box<dyn Waste>>,
    has_thread: bool,
    /// Who cannot do without the thread.
    needed_by: usize,
}

/// Something to be done that may take as long as a stranger likes.
pub(super) trait Waste: Send {
    /// Does it.
    fn get_rid(self: Box<Self>);
}

impl Waste for OwnedFd {
    fn get_rid(self: Box<Self>) {
        drop(self);
    }
}

/// Others have it for a moment yet.
struct Shared<T>(Arc<T>);

impl<T: Send + Sync> Waste for Shared<T> {
    fn get_rid(self: Box<Self>) {
        while Arc::strong_count(&self.0) > 1 {
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

/// To be done, see [`Bin::run`].
impl<F: FnOnce() + Send> Waste for F {
    fn get_rid(self: Box<Self>) {
        self();
    }
}

impl Bin {
    /// Does something that a stranger can make take long: to wake who waits for a descriptor of his. Where no thread is to be
    /// had it is done here, since others rely on it.
    pub(super) fn run(self: &Arc<Self>, errand: impl FnOnce() + Send + 'static) {
        let mut rubbish = self.lock();
        rubbish.waiting.push_back(Box::new(errand));
        let is_short = self.wake(&mut rubbish).is_err();
        drop(rubbish);
        if is_short {
            self.empty();
        }
    }

    /// Drops what other threads are letting go of, after they have: none of them is to be the last.
    pub(super) fn put_last<T: Send + Sync + 'static>(self: &Arc<Self>, shared: Option<Arc<T>>) {
        if let Some(shared) = shared {
            self.put(Box::new(Shared(shared)));
        }
    }

    /// True where so much waits that no more should be accepted.
    pub(super) fn is_full(&self) -> bool {
        self.lock().waiting.len() >= MAX_WAITING
    }

    /// Waits until it is not full, or the time is over.
    pub(super) fn wait_for_room(&self, at_most: Duration) {
        let is_full = |rubbish: &mut Rubbish| rubbish.waiting.len() >= MAX_WAITING;
        // Poison says nothing here: what a thread that panicked leaves is as good as before.
        drop(self.has_room.wait_timeout_while(self.lock(), at_most, is_full));
    }

    fn put(self: &Arc<Self>, waste: Box<dyn Waste>) {
        let mut rubbish = self.lock();
        rubbish.waiting.push_back(waste);
        let is_short = self.wake(&mut rubbish).is_err();
        if is_short && rubbish.waiting.len() >= MAX_WAITING {
            // To wait is better than to be full for ever.
            drop(rubbish);
            self.empty();
        }
    }

    /// The thread is there, and stays until [`Bin::needed_no_more`]. Fails where threads are short.
    pub(super) fn needed(self: &Arc<Self>) -> io::Result<()> {
        let mut rubbish = self.lock();
        self.wake(&mut rubbish)?;
        rubbish.needed_by += 1;
        Ok(())
    }

    /// One of those who needed it does not any more.
    pub(super) fn needed_no_more(&self) {
        self.lock().needed_by -= 1;
        self.has_waste.notify_one();
    }

    /// Before all that waits. For who needs the thread: never waits, never fails.
    pub(super) fn put_first(&self, waste: Box<dyn Waste>) {
        self.lock().waiting.push_front(waste);
        self.has_waste.notify_one();
    }

    /// Has the thread look, which is made where there is none. Fails where threads are short.
    fn wake(self: &Arc<Self>, rubbish: &mut Rubbish) -> io::Result<()> {
        if rubbish.has_thread {
            self.has_waste.notify_one();
        } else {
            let bin = self.clone();
            let life = move || while bin.turn() {};
            std::thread::Builder::new().name("vhu-close".into()).spawn(life)?;
            rubbish.has_thread = true;
        }
        Ok(())
    }

    /// One thing less, when there is one. `false` where nothing has come for long: there is no thread any more.
    fn turn(&self) -> bool {
        let mut rubbish = self.lock();
        while rubbish.needed_by > 0 && rubbish.waiting.is_empty() {
            rubbish = self.has_waste.wait(rubbish).unwrap_or_else(PoisonError::into_inner);
        }
        let waited = self.has_waste.wait_timeout_while(rubbish, IDLE, |rubbish| rubbish.waiting.is_empty());
        let (mut rubbish, _) = waited.unwrap_or_else(PoisonError::into_inner);
        rubbish.has_thread = !rubbish.waiting.is_empty() || rubbish.needed_by > 0;
        let (next, goes_on) = (rubbish.waiting.pop_front(), rubbish.has_thread);
        self.has_room.notify_all();
        drop(rubbish);
        if let Some(waste) = next {
            waste.get_rid();
        }
        goes_on
    }

    /// On the caller's own thread.
    fn empty(&self) {
        loop {
            let next = self.lock().waiting.pop_front();
            self.has_room.notify_all();
            let Some(waste) = next else { return };
            waste.get_rid();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Rubbish> {
        self.rubbish.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Bin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bin").field("waiting", &self.lock().waiting.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};
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
        assert_eq!(io::Read::read(&mut theirs, &mut [0]).unwrap(), 0);
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
        while bin.lock().has_thread {
            assert!(Instant::now() < patience);
            std::thread::yield_now();
        }
        assert!(!bin.is_full() && bin.lock().waiting.is_empty());
    }

    #[test]
    fn a_thread_that_is_needed_stays_and_goes_when_it_is_not() {
        let bin = Arc::new(Bin::default());
        bin.needed().unwrap();
        let start = Instant::now();
        while start.elapsed() < IDLE + Duration::from_millis(500) {
            assert!(bin.lock().has_thread);
            std::thread::park_timeout(Duration::from_millis(10));
        }
        bin.needed_no_more();
        while Arc::strong_count(&bin) > 1 {
            assert!(start.elapsed() < Duration::from_secs(10), "the thread stays");
            std::thread::park_timeout(Duration::from_millis(10));
        }
        assert!(!bin.lock().has_thread);
    }

    #[test]
    fn memory_needs_no_thread() {
        let bin = Arc::new(Bin::default());
        drop(Received::new(memfd_create("memory", MemfdFlags::CLOEXEC).unwrap(), &bin));
        assert!(!bin.lock().has_thread && bin.lock().waiting.is_empty());
        let file: OwnedFd = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap().into();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert!(!is_memory(&file) && !is_eventfd(&file) && !is_memory(&event) && is_eventfd(&event));
    }

    #[test]
    fn what_others_still_have_is_dropped_after_them() {
        struct Tells(std::sync::mpsc::Sender<std::thread::ThreadId>);
        impl Drop for Tells {
            fn drop(&mut self) {
                let _ = self.0.send(std::thread::current().id());
            }
        }
        let (told, tells) = std::sync::mpsc::channel();
        let bin = Arc::new(Bin::default());
        let mine = Arc::new(Tells(told));
        bin.put_last(Some(mine.clone()));
        assert!(tells.recv_timeout(Duration::from_millis(50)).is_err());
        drop(mine);
        let by = tells.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_ne!(by, std::thread::current().id());
    }
}
