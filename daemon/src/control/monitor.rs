//! Monitors: who serves QMP on a chardev. A listening chardev may have several clients at once, each with a session
//! of its own, up to a limit over all monitors.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block_core::base::{Error, Result};
use block_core::rt::SharedFd;
use block_core::rt::sync::{Notify, yield_now};
use qmp::Qapi;
use qmp::wire::Layout;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, sockopt};

use super::chardev::{Chardev, Peer};
use super::session::Session;
use crate::daemon::Daemon;
use crate::log::Rarely;

/// The argument of `--monitor`.
#[derive(Clone, Debug, Qapi)]
pub struct MonitorOptions {
    /// The monitor's name.
    pub id: Option<String>,
    /// What it speaks. There is only QMP here.
    #[qapi(default = MonitorMode::Control)]
    pub mode: MonitorMode,
    /// Whether answers are indented.
    #[qapi(default = false)]
    pub pretty: bool,
    /// The character device that it is served on.
    pub chardev: String,
}

impl MonitorOptions {
    /// A monitor as it is by default.
    pub fn on(chardev: String) -> Self {
        Self { id: None, mode: MonitorMode::Control, pretty: false, chardev }
    }
}

/// What a monitor speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum MonitorMode {
    /// Commands for people: not offered.
    Readline,
    /// QMP.
    Control,
}

/// All monitors.
#[derive(Default)]
pub struct Monitors {
    names: RefCell<Vec<String>>,
    sessions: RefCell<Vec<Rc<Session>>>,
    closing: Cell<bool>,
    /// A session ended.
    ended: Notify,
    turned_away: Rarely,
    not_taken: Rarely,
}

impl Monitors {
    /// Serves QMP as `options` say.
    pub fn add(daemon: &Rc<Daemon>, options: MonitorOptions) -> Result<()> {
        let chardev = daemon.chardevs.find(&options.chardev);
        let chardev = chardev.ok_or_else(|| Error::new(format!("chardev \"{}\" not found", options.chardev)))?;
        if options.mode == MonitorMode::Readline {
            return Err(Error::new("Only monitors with mode=control are there; use a QMP shell"));
        }
        daemon.monitors.name(options.id)?;
        chardev.claim()?;
        let layout = if options.pretty { Layout::Pretty } else { Layout::Compact };
        if let Some(stream) = chardev.first_peer() {
            start(daemon, &chardev, stream, layout);
        }
        let task = {
            let daemon = daemon.clone();
            async move { take_peers(&daemon, &chardev, layout).await }
        };
        daemon.local.spawn(task);
        Ok(())
    }

    /// Ends all sessions once everything is said, but not later than `limit`.
    pub async fn close(&self, daemon: &Daemon, limit: Duration) {
        self.closing.set(true);
        self.sessions.borrow().iter().for_each(|session| session.close());
        let all_gone = async {
            while !self.sessions.borrow().is_empty() {
                self.ended.notified().await;
            }
        };
        crate::timeout(&daemon.local, limit, all_gone).await;
    }

    fn name(&self, id: Option<String>) -> Result<()> {
        let Some(id) = id else { return Ok(()) };
        let mut names = self.names.borrow_mut();
        if names.contains(&id) {
            return Err(Error::new(format!("Duplicate ID '{id}' for mon")));
        }
        names.push(id);
        Ok(())
    }

    fn has_room(&self) -> bool {
        let sessions = self.sessions.borrow();
        // Those whose client has gone while its command hangs take no place from others, as long as they are not too many.
        let here = || sessions.iter().filter(|session| !session.is_abandoned()).count();
        let has_room = sessions.len() < MAX_SESSIONS || (sessions.len() < MAX_LEFT_BEHIND && here() < MAX_SESSIONS);
        if !has_room && let Some(more) = self.turned_away.now() {
            tracing::warn!("a QMP client was turned away, {more} more before it: {MAX_SESSIONS} are connected");
        }
        has_room && !self.closing.get()
    }
}

/// Takes clients as they come, as long as the chardev gives any.
async fn take_peers(daemon: &Rc<Daemon>, chardev: &Rc<Chardev>, layout: Layout) {
    let Peer::Listening(listener) = chardev.peer() else { return };
    loop {
        match accept_with(&**listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(stream) => {
                start(daemon, chardev, Arc::new(stream), layout);
                // Whoever connects as fast as it goes does not keep others from their turn.
                yield_now().await;
            }
            Err(Errno::AGAIN) => daemon.local.readable(listener).await,
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => {
                // Out of descriptors or memory: the client waits in the backlog until there are some again.
                if let Some(more) = daemon.monitors.not_taken.now() {
                    tracing::warn!("could not take a QMP client: {error}; {more} more times before");
                }
                daemon.local.sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn start(daemon: &Rc<Daemon>, chardev: &Rc<Chardev>, stream: SharedFd, layout: Layout) {
    if !daemon.monitors.has_room() {
        return;
    }
    if let Ok(peer) = sockopt::socket_peercred(&stream) {
        tracing::info!(pid = peer.pid.as_raw_nonzero().get(), uid = peer.uid.as_raw(), "a QMP client has connected");
    }
    let session = Session::new(daemon, stream, layout);
    daemon.hub.join(&session);
    daemon.monitors.sessions.borrow_mut().push(session.clone());
    let (daemon, chardev) = (daemon.clone(), chardev.clone());
    let local = daemon.local.clone();
    local.spawn(async move {
        chardev.connected(1);
        session.serve(&daemon).await;
        chardev.connected(-1);
        daemon.monitors.sessions.borrow_mut().retain(|other| !Rc::ptr_eq(other, &session));
        daemon.monitors.ended.notify_one();
    });
}

/// Clients at once, over all monitors.
const MAX_SESSIONS: usize = 64;
/// The same, with those that have gone while a command of theirs goes on.
const MAX_LEFT_BEHIND: usize = 1024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
