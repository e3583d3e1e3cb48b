//! The way into an export: its sessions wait here for the next frontend, and other threads reach the one that is inside.
//!
//! Nothing that may take long is done under the lock, which the control thread and IOThreads take. Nor do they call a frontend
//! themselves: the kernel wakes all who wait for its socket one by one, and it may have made those many.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt::{Timeout, set_socket_oobinline, set_socket_timeout};
use rustix::net::{Shutdown, SocketFlags};

use super::descriptors::{Bin, Received};
use super::message::BACKEND_CONFIG_CHANGE;
use super::wire::{PATIENCE, tell};

/// How long to wait where a frontend cannot be served, because descriptors or memory are short.
pub(super) const BETTER_TIMES: Duration = Duration::from_millis(50);

/// See the module's head. One frontend is inside at a time; the next one waits in the socket's backlog.
pub(super) struct Door {
    /// Listens, and does not block. Who waits in its backlog may have sent something already.
    socket: Received,
    bin: Arc<Bin>,
    /// What is called to frontends. Nothing is closed here, which may take for ever.
    calls: Arc<Bin>,
    /// A call that the config space has changed waits for its turn.
    tells: Arc<AtomicBool>,
    /// Readable from [`Door::close`] on.
    closing: OwnedFd,
    inside: Arc<Mutex<Inside>>,
}

#[derive(Default)]
struct Inside {
    closed: bool,
    visitor: Option<Visitor>,
}

struct Visitor {
    frontend: Arc<Received>,
    channel: Option<Arc<Received>>,
}

impl Door {
    /// An open door, for who connects to this listening socket. Fails where descriptors are short.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        let closing = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let bin = Arc::<Bin>::default();
        let socket = Received::new(socket, &bin);
        let (calls, tells, inside) = Default::default();
        Ok(Self { socket, bin, calls, tells, closing, inside })
    }

    /// Where what its frontends send is closed.
    pub(super) fn bin(&self) -> &Arc<Bin> {
        &self.bin
    }

    /// Waits for the next frontend, on the thread of its session. `None` where the door is closed.
    pub(super) fn let_in(&self) -> Option<Arc<Received>> {
        while !self.is_closed() {
            if !self.bin.is_full() && self.somebody_knocks() {
                match self.accept() {
                    Ok(frontend) => return self.enter(frontend),
                    // Whoever shares the socket was faster.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    // Descriptors or memory are short, or the frontend went away.
                    Err(_) => {}
                }
            }
            self.wait(&mut [PollFd::new(&self.closing, PollFlags::IN)], Some(BETTER_TIMES));
        }
        None
    }

    /// The frontend has gone, or is to go. On the thread of its session.
    pub(super) fn let_out(&self) {
        let gone = self.lock().visitor.take();
        if let Some(gone) = &gone {
            hang_up_on(&gone.frontend);
        }
    }

    /// Nobody gets in any more, and who is inside is thrown out.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.wake();
        self.hang_up();
    }

    /// [`Door::close`], unless somebody is inside: then `false`.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut inside = self.lock();
        inside.closed |= inside.visitor.is_none();
        let closed = inside.closed;
        drop(inside);
        if closed {
            self.wake();
        }
        closed
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// True while a frontend is connected.
    pub(super) fn is_connected(&self) -> bool {
        self.lock().visitor.is_some()
    }

    /// Ends the session soon, wherever it is.
    pub(super) fn hang_up(&self) {
        let frontend = self.lock().visitor.as_ref().map(|visitor| visitor.frontend.clone());
        if let Some(frontend) = frontend {
            self.calls.run(move || hang_up_on(&frontend));
        }
    }

    /// Tells the frontend that the config space has changed, if it gave us a channel. Asks for no answer, and never
    /// waits: a frontend that does not read loses the news, not the others their disk.
    pub(super) fn config_changed(&self) {
        if self.lock().visitor.as_ref().is_none_or(|visitor| visitor.channel.is_none()) {
            return;
        }
        if self.tells.swap(true, Ordering::AcqRel) {
            return;
        }
        let (tells, inside) = (self.tells.clone(), self.inside.clone());
        self.calls.run(move || {
            // What changes from here on is told of once more.
            tells.store(false, Ordering::Release);
            let inside = inside.lock().unwrap_or_else(PoisonError::into_inner);
            let channel = inside.visitor.as_ref().and_then(|visitor| visitor.channel.clone());
            drop(inside);
            if let Some(channel) = channel {
                let _ = tell(&channel, BACKEND_CONFIG_CHANGE);
            }
        });
    }

    /// Where the frontend wants to be told.
    pub(super) fn set_channel(&self, channel: Received) {
        let mut inside = self.lock();
        let old = inside.visitor.as_mut().and_then(|visitor| visitor.channel.replace(Arc::new(channel)));
        drop(inside);
        drop(old);
    }

    /// Waits until somebody does, or the door closes. `false` where the socket is of no use, or the door closed.
    fn somebody_knocks(&self) -> bool {
        let mut both = [PollFd::new(&self.closing, PollFlags::IN), PollFd::new(&self.socket, PollFlags::IN)];
        self.wait(&mut both, None);
        // A socket that was shut down (whoever shares it can do that) hangs up for ever.
        both[1].revents() == PollFlags::IN
    }

    fn wait(&self, fds: &mut [PollFd<'_>], at_most: Option<Duration>) {
        let timeout = at_most.map(|limit| Timespec::try_from(limit).expect("less than a second"));
        // An error is an interruption: the caller looks again.
        let _ = poll(fds, timeout.as_ref());
    }

    fn accept(&self) -> io::Result<Received> {
        let frontend = Received::new(rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC)?, &self.bin);
        set_socket_timeout(&frontend, Timeout::Send, Some(PATIENCE))?;
        // Else an urgent byte is passed over, and what came along with it closed, by whoever receives the next one.
        set_socket_oobinline(&frontend, true)?;
        Ok(frontend)
    }

    fn enter(&self, frontend: Received) -> Option<Arc<Received>> {
        let frontend = Arc::new(frontend);
        let mut inside = self.lock();
        if inside.closed {
            return None;
        }
        inside.visitor = Some(Visitor { frontend: frontend.clone(), channel: None });
        Some(frontend)
    }

    /// Whoever waits looks whether the door is closed. An event counter takes a one.
    fn wake(&self) {
        let _ = rustix::io::write(&self.closing, &1u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn hang_up_on(frontend: &Received) {
    // Fails only where the other side was faster.
    let _ = rustix::net::shutdown(frontend, Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;
    use std::thread::JoinHandle;
    use std::time::Instant;

    use super::*;

    struct House {
        _directory: tempfile::TempDir,
        path: PathBuf,
        door: Arc<Door>,
    }

    impl House {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("s");
            let listener = UnixListener::bind(&path).unwrap();
            listener.set_nonblocking(true).unwrap();
            Self { _directory: directory, path, door: Arc::new(Door::new(listener.into()).unwrap()) }
        }

        fn session(&self) -> JoinHandle<Option<Arc<Received>>> {
            wait_at(&self.door)
        }
    }

    fn wait_at(door: &Arc<Door>) -> JoinHandle<Option<Arc<Received>>> {
        let door = door.clone();
        let session = std::thread::Builder::new().spawn(move || door.let_in()).unwrap();
        rest(Duration::from_millis(50));
        assert!(!session.is_finished());
        session
    }

    fn rest(time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_waiting_session_gets_the_frontend_that_comes_and_can_throw_it_out() {
        let house = House::new();
        let session = house.session();
        assert!(!house.door.is_connected());
        let mut frontend = UnixStream::connect(&house.path).unwrap();
        let inside = session.join().unwrap().expect("the door is open");
        assert!(house.door.is_connected() && !house.door.close_if_empty());
        house.door.hang_up();
        assert_eq!(frontend.read(&mut [0]).unwrap(), 0);
        drop(inside);
        house.door.let_out();
        assert!(!house.door.is_connected());
        let session = house.session();
        assert!(house.door.close_if_empty());
        assert!(session.join().unwrap().is_none());
    }

    #[test]
    fn a_door_that_closes_lets_the_session_go_that_waits_at_it_and_nobody_in() {
        let house = House::new();
        let session = house.session();
        house.door.close();
        assert!(session.join().unwrap().is_none());
        let _knocks = UnixStream::connect(&house.path).unwrap();
        assert!(house.door.let_in().is_none());
        let late = house.door.accept().unwrap();
        assert!(house.door.enter(late).is_none(), "it came while the door was closing");
        assert!(!house.door.is_connected());
    }

    /// Whoever shares an inherited socket can shut it down: then it is readable for ever, and nobody comes.
    #[test]
    fn a_socket_that_lets_nobody_in_is_tried_again_at_leisure() {
        let listener = UnixListener::bind(tempfile::tempdir().unwrap().path().join("s")).unwrap();
        listener.set_nonblocking(true).unwrap();
        rustix::net::shutdown(&listener, Shutdown::Both).unwrap();
        let (no_listener, _other) = UnixStream::pair().unwrap();
        for socket in [OwnedFd::from(listener), no_listener.into()] {
            let door = Arc::new(Door::new(socket).unwrap());
            let session = std::thread::Builder::new().spawn({
                let door = door.clone();
                move || {
                    assert!(door.let_in().is_none());
                    own_cpu_ns()
                }
            });
            rest(Duration::from_millis(200));
            door.close();
            let cpu_ns = session.unwrap().join().unwrap();
            assert!(cpu_ns < 20_000_000, "{cpu_ns} ns of 200 ms");
        }
    }

    fn own_cpu_ns() -> u64 {
        let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        schedstat.split(' ').next().unwrap().parse().unwrap()
    }

    /// Threads that all wait for this descriptor, as often as one may.
    fn crowd(stream: &UnixStream) -> Vec<JoinHandle<()>> {
        crate::process::raise_file_limit();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1 << 20);
        let times = usize::try_from(limit).unwrap().min(19_000);
        let waits = |_| {
            let stream = stream.try_clone().unwrap();
            let waiter = move || {
                let mut list = vec![PollFd::new(&stream, PollFlags::IN); times];
                let _ = poll(&mut list, None);
            };
            std::thread::Builder::new().spawn(waiter).unwrap()
        };
        let crowd = (0..400_000 / times).map(waits).collect();
        rest(Duration::from_millis(500));
        crowd
    }

    /// The control thread and IOThreads call frontends, and have others to serve.
    #[test]
    fn a_frontend_that_many_wait_for_is_not_woken_by_who_calls_it() {
        let house = House::new();
        let session = house.session();
        let mut frontend = UnixStream::connect(&house.path).unwrap();
        let inside = session.join().unwrap().expect("the door is open");
        let (theirs, mut ours) = UnixStream::pair().unwrap();
        house.door.set_channel(Received::new(theirs.into(), house.door.bin()));
        let waiters = [crowd(&ours), crowd(&frontend)];
        for call in [Door::config_changed, Door::hang_up] {
            let before = own_cpu_ns();
            call(&house.door);
            let spent = own_cpu_ns() - before;
            assert!(spent < 15_000_000, "it took {spent} ns of this thread's");
        }
        waiters.into_iter().flatten().for_each(|waiter| waiter.join().unwrap());
        assert_eq!(ours.read(&mut [0; 12]).unwrap(), 12);
        assert_eq!(frontend.read(&mut [0]).unwrap(), 0);
        drop(inside);
        house.door.let_out();
    }

    #[test]
    fn each_change_is_told_of_after_it_was_made() {
        let house = House::new();
        let session = house.session();
        let _frontend = UnixStream::connect(&house.path).unwrap();
        let inside = session.join().unwrap().expect("the door is open");
        let (theirs, mut ours) = UnixStream::pair().unwrap();
        house.door.set_channel(Received::new(theirs.into(), house.door.bin()));
        for _ in 0..100 {
            house.door.config_changed();
            ours.read_exact(&mut [0; 12]).unwrap();
        }
        drop(inside);
        house.door.let_out();
    }
}
