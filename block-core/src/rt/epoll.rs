//! The fallback, and the control thread's driver: readiness by epoll, operations on helper threads. Everything comes out
//! as completions, as from the ring. Timers are as coarse as epoll's milliseconds, rounded up.
#![expect(unsafe_code, reason = "the epoll crate gives the descriptor as a number, which is wrapped once")]

use super::driver::{Completion, Interest};
use super::op::RawOp;
use super::pool;
use super::thread::Shared;
use super::token::Token;
use epoll::{ControlOptions, Event, Events};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One thread's epoll instance.
pub(super) struct Epoll {
    fd: OwnedFd,
    shared: Arc<Shared>,
    watched: HashMap<u64, Watched>,
    /// Completions for the next reap.
    stash: Vec<Completion>,
    /// Watches that could not be set up, by when whoever asked is to look for himself, the earliest first.
    refused: VecDeque<(Instant, u64)>,
}

struct Watched {
    fd: RawFd,
    /// Where one descriptor is watched twice: epoll takes each only once.
    _twin: Option<OwnedFd>,
    edges: bool,
}

impl Epoll {
    pub(super) fn new(shared: &Arc<Shared>) -> io::Result<Self> {
        let fd = epoll::create(true)?;
        // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let this =
            Self { fd, shared: shared.clone(), watched: HashMap::new(), stash: Vec::new(), refused: VecDeque::new() };
        this.add(shared.signal_fd().as_raw_fd(), Events::EPOLLIN | Events::EPOLLET, Token::Mail)?;
        Ok(this)
    }

    pub(super) fn run(&self, op: RawOp, token: Token) {
        pool::run(op, token, self.shared.clone());
    }

    pub(super) fn watch(&mut self, fd: RawFd, interest: Interest, token: Token) {
        let events = match interest {
            Interest::Readable => Events::EPOLLIN | Events::EPOLLONESHOT,
            Interest::Writable => Events::EPOLLOUT | Events::EPOLLONESHOT,
            Interest::Edges => Events::EPOLLIN | Events::EPOLLET,
        };
        match self.register(fd, events, token) {
            Ok((fd, twin)) => {
                let watched = Watched { fd, _twin: twin, edges: interest == Interest::Edges };
                self.watched.insert(token.pack(), watched);
            }
            // Out of descriptors or memory. Whoever looks at once, and asks again, would do nothing else. Watches for edges have
            // a pause of their own (`readiness.rs`).
            Err(error) if error.raw_os_error() != Some(libc::EPERM) && interest != Interest::Edges => {
                self.refused.push_back((Instant::now() + PAUSE, token.pack()));
            }
            // What epoll refuses (a regular file) is always ready.
            Err(_) => self.complete(token.pack(), READY, false),
        }
    }

    pub(super) fn unwatch(&mut self, token: Token) {
        if let Some(watched) = self.watched.remove(&token.pack()) {
            self.forget(&watched);
            self.complete(token.pack(), -libc::ECANCELED, false);
        } else if let Some(at) = self.refused.iter().position(|(_, refused)| *refused == token.pack()) {
            self.refused.remove(at);
            self.complete(token.pack(), -libc::ECANCELED, false);
        }
    }

    pub(super) fn has_completions(&self) -> bool {
        !self.stash.is_empty()
    }

    pub(super) fn reap(&mut self, out: &mut Vec<Completion>) {
        self.collect(0);
        self.let_look();
        out.append(&mut self.stash);
    }

    pub(super) fn wait(&mut self, timeout: Option<Duration>) {
        if self.stash.is_empty() {
            let pause = self.refused.front().map(|(until, _)| until.saturating_duration_since(Instant::now()));
            let timeout = pause.into_iter().chain(timeout).min();
            self.collect(timeout.map_or(-1, millis));
        }
    }

    /// Whoever's watch was refused has paused for long enough: the error, if it still is one, shows in the call that follows.
    fn let_look(&mut self) {
        if self.refused.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some((_, token)) = self.refused.pop_front_if(|(until, _)| *until <= now) {
            self.complete(token, READY, false);
        }
    }

    fn collect(&mut self, timeout_ms: i32) {
        let mut events = [Event::new(Events::empty(), 0); EVENTS];
        let count = match epoll::wait(self.fd.as_raw_fd(), timeout_ms, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("epoll_wait: {error}"),
        };
        for event in &events[..count] {
            let (token, fired) = (event.data, event.events);
            let edges = token == Token::Mail.pack() || self.watched.get(&token).is_some_and(|watched| watched.edges);
            if !edges && let Some(watched) = self.watched.remove(&token) {
                self.forget(&watched);
            }
            self.complete(token, fired.cast_signed() & i32::MAX, edges);
        }
    }

    fn complete(&mut self, token: u64, result: i32, more: bool) {
        self.stash.push(Completion { token, result, more });
    }

    fn register(&self, fd: RawFd, events: Events, token: Token) -> io::Result<(RawFd, Option<OwnedFd>)> {
        match self.add(fd, events, token) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                // SAFETY: the watch's slot keeps the descriptor open.
                let twin = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
                self.add(twin.as_raw_fd(), events, token)?;
                Ok((twin.as_raw_fd(), Some(twin)))
            }
            other => other.map(|()| (fd, None)),
        }
    }

    fn add(&self, fd: RawFd, events: Events, token: Token) -> io::Result<()> {
        epoll::ctl(self.fd.as_raw_fd(), ControlOptions::EPOLL_CTL_ADD, fd, Event::new(events, token.pack()))
    }

    fn forget(&self, watched: &Watched) {
        let (fd, nothing) = (watched.fd, Event::new(Events::empty(), 0));
        epoll::ctl(self.fd.as_raw_fd(), ControlOptions::EPOLL_CTL_DEL, fd, nothing)
            .expect("a watched descriptor is open");
    }
}

/// Rounded up: a timer may be late, never early.
fn millis(timeout: Duration) -> i32 {
    i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
}

const EVENTS: usize = 64;
const READY: i32 = Events::EPOLLIN.bits().cast_signed() | Events::EPOLLOUT.bits().cast_signed();
/// Before a watch that could not be set up is asked for again.
const PAUSE: Duration = Duration::from_millis(10);
