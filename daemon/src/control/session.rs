//! One client: its bytes in and out, one command at a time, and an end that loses nothing.
//!
//! A command is a task of its own: if the client goes away, the command still finishes, and only its answer is lost.
//! While an answer waits to be read, nothing more is read from the client: its own socket holds it back.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::hint::black_box;
use std::rc::Rc;
use std::time::Duration;

use block_core::rt::sync::{Notify, Turns};
use block_core::rt::{Local, SharedFd};
use qmp::schema::Value;
use qmp::wire::{Action, Layout, VersionInfo};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::event::Event;
use super::outbox::Outbox;
use crate::commands::{Answer, Rows};
use crate::daemon::Daemon;
use crate::first;
use crate::log::Rarely;

/// A connected client.
pub(super) struct Session {
    local: Rc<Local>,
    stream: SharedFd,
    protocol: RefCell<qmp::wire::Session>,
    outbox: RefCell<Outbox>,
    running: Cell<bool>,
    closing: Cell<bool>,
    dropped_told: Rarely,
    /// A command ended, an event waits, or the end has come.
    news: Notify,
}

impl Session {
    pub(super) fn new(daemon: &Rc<Daemon>, stream: SharedFd, layout: Layout) -> Rc<Self> {
        let protocol = qmp::wire::Session::new(VersionInfo::new(crate::PACKAGE), daemon.commands.names(), layout);
        let session = Self {
            local: daemon.local.clone(),
            stream,
            protocol: RefCell::new(protocol),
            outbox: RefCell::default(),
            running: Cell::new(false),
            closing: Cell::new(false),
            dropped_told: Rarely::default(),
            news: Notify::new(),
        };
        Rc::new(session)
    }

    /// Serves the client until it leaves, or is asked to.
    pub(super) async fn serve(self: &Rc<Self>, daemon: &Rc<Daemon>) {
        let greeting = self.protocol.borrow().greeting();
        self.outbox.borrow_mut().reply(greeting);
        while self.work(daemon) && !self.is_over() {
            self.something_happens().await;
            self.receive();
        }
        // A descriptor that was passed to us stays open elsewhere; the client is to see the end all the same.
        let _ = shutdown(&self.stream, Shutdown::Both);
    }

    /// Adds an event for the client, if it has negotiated.
    pub(super) fn tell(&self, event: &Event) {
        let Some(line) = self.protocol.borrow().event(event.name, &event.data, event.time) else { return };
        self.outbox.borrow_mut().event(event.key.clone(), line);
        self.news.notify_one();
    }

    /// Ends the session once everything is said.
    pub(super) fn close(&self) {
        self.closing.set(true);
        self.news.notify_one();
    }

    /// Does all that can be done without waiting, so that what is left is what [`Self::something_happens`] waits for. False:
    /// there is nobody left to send to.
    fn work(self: &Rc<Self>, daemon: &Rc<Daemon>) -> bool {
        loop {
            self.act(daemon);
            let held_back = self.outbox.borrow().is_full();
            if !self.send() {
                return false;
            }
            // What was sent may have made room for the answer to a request that waits.
            if !held_back || self.outbox.borrow().is_full() {
                return true;
            }
        }
    }

    /// After [`Self::work`] an empty outbox also says that no request waits, but for one behind a command that runs.
    fn is_over(&self) -> bool {
        self.closing.get() && !self.running.get() && self.outbox.borrow().is_empty()
    }

    /// The client has gone for good, and does not wait for answers: not one that has only said all that it has to say.
    pub(super) fn is_abandoned(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().contains(PollFlags::HUP)
    }

    async fn something_happens(&self) {
        let writes = !self.outbox.borrow().is_empty();
        let readable = if_some(self.reads().then(|| self.local.readable(&self.stream)));
        let writable = if_some(writes.then(|| self.local.writable(&self.stream)));
        first(self.news.notified(), first(readable, writable)).await;
    }

    fn reads(&self) -> bool {
        !self.closing.get() && !self.outbox.borrow().is_full() && self.protocol.borrow().wants_input()
    }

    /// Takes what the client has sent, if anything.
    fn receive(&self) {
        if !self.reads() {
            return;
        }
        let mut buffer = [0; CHUNK];
        match recv(&self.stream, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.closing.set(true),
            Ok((count, _)) => self.protocol.borrow_mut().receive(&buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.closing.set(true),
        }
        // A command may have had a secret in it. On the heap it is wiped when it is freed.
        buffer.fill(0);
        black_box(&buffer);
    }

    /// Does what the client asked, as long as it takes the answers.
    fn act(self: &Rc<Self>, daemon: &Rc<Daemon>) {
        while !self.outbox.borrow().is_full() {
            let Some(action) = self.protocol.borrow_mut().next_action() else { return };
            match action {
                Action::Send(line) => self.outbox.borrow_mut().reply(line),
                Action::Execute { command, arguments } => self.execute(daemon.clone(), command, arguments),
                Action::Close => self.closing.set(true),
            }
        }
    }

    fn execute(self: &Rc<Self>, daemon: Rc<Daemon>, command: String, arguments: Value) {
        self.running.set(true);
        let session = self.clone();
        let task = async move {
            if session.has_left_before_set_up(&daemon).await {
                return session.ended(Vec::new());
            }
            let reply = match daemon.begin_command() {
                Some(_runs) => match daemon.commands.run(&daemon, &command, arguments).await {
                    Ok(Answer::Rows(rows)) => session.listed(&daemon, rows).await,
                    Ok(Answer::Whole(value)) => session.whole(Ok(value)),
                    Err(error) => session.whole(Err(error)),
                },
                None => session.whole(Err(qmp::Error::generic("The daemon is ending"))),
            };
            session.ended(reply);
        };
        self.local.spawn(task);
    }

    /// Commands wait until the command line has been obeyed. Nobody waits for those of a client that has gone by then.
    async fn has_left_before_set_up(&self, daemon: &Daemon) -> bool {
        while !daemon.is_set_up() {
            crate::timeout(&self.local, LOOK_FOR_CLIENT, daemon.set_up()).await;
            if self.is_abandoned() {
                return true;
            }
        }
        false
    }

    /// A command has ended, with this reply.
    fn ended(&self, reply: Vec<Vec<u8>>) {
        let mut outbox = self.outbox.borrow_mut();
        reply.into_iter().for_each(|piece| outbox.reply(piece));
        drop(outbox);
        self.running.set(false);
        self.news.notify_one();
    }

    fn whole(&self, outcome: qmp::Result<Value>) -> Vec<Vec<u8>> {
        vec![self.protocol.borrow_mut().reply(outcome)]
    }

    /// A long list, made and written in turns with everybody else.
    async fn listed(&self, daemon: &Daemon, mut rows: Box<dyn Rows>) -> Vec<Vec<u8>> {
        let (mut pieces, mut turns) = (Vec::new(), Turns::begin());
        let mut list = self.protocol.borrow().begin_list();
        while let Some(row) = rows.next().await {
            list.row(&row);
            if list.untaken() >= PIECE {
                pieces.push(list.take());
                if self.is_abandoned() {
                    break;
                }
            }
            turns.step().await;
            if daemon.is_ending() {
                // Nodes are going, so that the rest of the list would be missing. Nothing of it has been sent.
                return self.whole(Err(qmp::Error::generic("The daemon is ending")));
            }
        }
        pieces.push(self.protocol.borrow_mut().end_list(list));
        pieces
    }

    /// Sends what can be sent without waiting, and not all the time. False: there is nobody left to send to.
    fn send(&self) -> bool {
        let mut outbox = self.outbox.borrow_mut();
        for _ in 0..PIECES {
            if outbox.is_empty() {
                break;
            }
            match send(&self.stream, outbox.next(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => outbox.sent(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return false,
            }
        }
        if outbox.has_dropped() && self.dropped_told.now().is_some() {
            tracing::warn!("a QMP client does not read: {} events were dropped", outbox.take_dropped());
        }
        true
    }
}

/// Waits for ever where there is nothing to wait for.
async fn if_some(future: Option<impl Future<Output = ()>>) {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// Bytes read at once.
const CHUNK: usize = 16 << 10;
/// Bytes of a list that are kept together.
const PIECE: usize = 32 << 10;
/// How many pieces are sent before others have their turn, to a client that reads as fast as we send.
const PIECES: u32 = 8;
/// How often to look whether a client still waits that came before the daemon was set up.
const LOOK_FOR_CLIENT: Duration = Duration::from_millis(250);
