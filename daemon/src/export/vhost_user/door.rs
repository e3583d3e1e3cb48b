//! The way into an export: its sessions wait here for the next frontend, and other threads reach the one that is inside.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block_core::rt::SharedFd;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{Shutdown, SocketFlags};

use super::message::BACKEND_CONFIG_CHANGE;
use super::wire::{PATIENCE, tell};

/// How long to wait where a frontend cannot be served, because descriptors or memory are short.
pub(super) const BETTER_TIMES: Duration = Duration::from_millis(50);

/// See the module's head. One frontend is inside at a time; the next one waits in the socket's backlog.
pub(super) struct Door {
    /// Listens, and does not block.
    socket: SharedFd,
    /// Readable from [`Door::close`] on.
    closing: OwnedFd,
    inside: Mutex<Inside>,
}

#[derive(Default)]
struct Inside {
    closed: bool,
    visitor: Option<Visitor>,
}

struct Visitor {
    frontend: Arc<UnixStream>,
    channel: Option<OwnedFd>,
}

impl Door {
    /// An open door, for who connects to this listening socket. Fails where descriptors are short.
    pub(super) fn new(socket: SharedFd) -> io::Result<Self> {
        let closing = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { socket, closing, inside: Mutex::default() })
    }

    /// Waits for the next frontend, on the thread of its session. `None` where the door is closed.
    pub(super) fn let_in(&self) -> Option<Arc<UnixStream>> {
        while !self.is_closed() {
            match self.accept() {
                Ok(frontend) => return self.enter(frontend),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(None),
                // Descriptors or memory are short, or the frontend went away: there may be better times.
                Err(_) => self.wait(Some(BETTER_TIMES)),
            }
        }
        None
    }

    /// The frontend has gone, or is to go.
    pub(super) fn let_out(&self) {
        self.lock().visitor = None;
    }

    /// Nobody gets in any more, and who is inside is thrown out.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        // An event counter takes a one.
        let _ = rustix::io::write(&self.closing, &1u64.to_ne_bytes());
        self.hang_up();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// True while a frontend is connected.
    pub(super) fn is_connected(&self) -> bool {
        self.lock().visitor.is_some()
    }

    /// Ends the session, wherever it is.
    pub(super) fn hang_up(&self) {
        if let Some(visitor) = &self.lock().visitor {
            // Fails only where the other side was faster.
            let _ = rustix::net::shutdown(&visitor.frontend, Shutdown::Both);
        }
    }

    /// Tells the frontend that the config space has changed, if it gave us a channel. Asks for no answer, and never
    /// waits: a frontend that does not read loses the news, not the others their disk.
    pub(super) fn config_changed(&self) {
        if let Some(channel) = self.lock().visitor.as_ref().and_then(|visitor| visitor.channel.as_ref()) {
            let _ = tell(channel, BACKEND_CONFIG_CHANGE);
        }
    }

    /// Where the frontend wants to be told.
    pub(super) fn set_channel(&self, channel: OwnedFd) {
        if let Some(visitor) = &mut self.lock().visitor {
            visitor.channel = Some(channel);
        }
    }

    fn accept(&self) -> io::Result<UnixStream> {
        let frontend = UnixStream::from(rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC)?);
        frontend.set_write_timeout(Some(PATIENCE))?;
        Ok(frontend)
    }

    fn enter(&self, frontend: UnixStream) -> Option<Arc<UnixStream>> {
        let mut inside = self.lock();
        if inside.closed {
            return None;
        }
        let frontend = Arc::new(frontend);
        inside.visitor = Some(Visitor { frontend: frontend.clone(), channel: None });
        Some(frontend)
    }

    /// Until somebody knocks or the door closes.
    fn wait(&self, at_most: Option<Duration>) {
        let timeout = at_most.map(|limit| Timespec::try_from(limit).expect("less than a second"));
        let mut both = [PollFd::new(&self.closing, PollFlags::IN), PollFd::new(&self.socket, PollFlags::IN)];
        // In better times the socket is looked at again; that somebody knocks on it does not make them better.
        let fds = if at_most.is_some() { &mut both[..1] } else { &mut both[..] };
        // An error is an interruption: the caller looks again.
        let _ = poll(fds, timeout.as_ref());
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;
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
            let door = Arc::new(Door::new(Arc::new(listener.into())).unwrap());
            Self { _directory: directory, path, door }
        }

        fn session(&self) -> JoinHandle<Option<Arc<UnixStream>>> {
            let door = self.door.clone();
            std::thread::Builder::new().spawn(move || door.let_in()).unwrap()
        }
    }

    #[test]
    fn a_waiting_session_gets_the_frontend_that_comes_and_can_throw_it_out() {
        let house = House::new();
        let session = house.session();
        assert!(!house.door.is_connected());
        let mut frontend = UnixStream::connect(&house.path).unwrap();
        let inside = session.join().unwrap().expect("the door is open");
        assert!(house.door.is_connected());
        house.door.hang_up();
        assert_eq!(frontend.read(&mut [0]).unwrap(), 0);
        drop(inside);
        house.door.let_out();
        assert!(!house.door.is_connected());
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

    #[test]
    fn a_socket_that_lets_nobody_in_is_tried_again_at_leisure() {
        let (no_listener, _other) = UnixStream::pair().unwrap();
        let door = Arc::new(Door::new(Arc::new(no_listener.into())).unwrap());
        let session = std::thread::Builder::new().spawn({
            let door = door.clone();
            move || {
                assert!(door.let_in().is_none());
                std::fs::read_to_string("/proc/thread-self/schedstat").unwrap()
            }
        });
        let closes_at = Instant::now() + Duration::from_millis(200);
        while Instant::now() < closes_at {
            std::thread::park_timeout(Duration::from_millis(10));
        }
        door.close();
        let schedstat = session.unwrap().join().unwrap();
        let cpu_ns: u64 = schedstat.split(' ').next().unwrap().parse().unwrap();
        assert!(cpu_ns < 20_000_000, "{cpu_ns} ns of 200 ms");
    }
}
