//! The vhost-user-blk export: a disk for virtual machines over a unix socket.
//!
//! ```text
//! frontend ── session ── filter ── engine ── backend, vring ─┐ control: a thread a session, messages
//!     │                     (vhost-user-backend)             ▼
//!     └──────────── guest memory ── ring ── queue ── port    data: the IOThread of each queue
//! ```
//! [`VhostUserExport`] is what the daemon has of it, on the control thread: it lets frontends in, one at a time. The
//! control side tells a queue what to do by message and waits; the data side takes no lock and knows no socket.

mod backend;
mod chain;
mod config_space;
mod descriptors;
mod device;
mod engine;
mod filter;
#[cfg(fuzzing)]
pub mod fuzzing;
mod limit;
mod listen;
mod memory;
mod message;
mod moderation;
mod options;
mod place;
mod queue;
mod queue_ref;
mod regions;
mod request;
mod ring;
mod session;
mod settings;
mod slots;
mod stats;
#[cfg(test)]
mod tests;
mod verdict;
mod visit;
mod vring;
mod wire;

use std::cell::Cell;
use std::io;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block_core::base::{Error, Result};
use block_core::port::PortHandle;
use block_core::rt::sync::{Notify, oneshot};
use block_core::rt::{Local, Remote, SharedFd};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::first;
use device::ExportShared;
use listen::Listening;
use session::Link;

pub use options::{Address, MAX_BLOCK, MAX_QUEUES, VhostUserOptions};
pub use stats::QueueReport;

/// A running export. Lives on the control thread.
pub struct VhostUserExport {
    shared: Arc<ExportShared>,
    link: Arc<Link>,
    gate: Rc<Gate>,
}

/// How the export tells its door-keeper to close, and the other way round.
struct Gate {
    closing: Cell<bool>,
    close: Notify,
    closed: Cell<bool>,
    all_out: Notify,
}

/// What queries tell about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportReport {
    /// A frontend is connected.
    pub connected: bool,
    /// Its queues, since the export was added.
    pub queues: Vec<QueueReport>,
}

impl VhostUserExport {
    /// Listens, and lets frontends in from now on. `threads` has the IOThread of each queue; whoever owns those keeps
    /// them until [`VhostUserExport::stop`] has ended. Runs on the control thread.
    ///
    /// # Errors
    /// A sentence: an option that makes no sense, or a socket that cannot be had.
    pub fn start(options: VhostUserOptions, port: PortHandle, threads: Vec<Remote>) -> Result<Self> {
        options.check()?;
        if threads.len() != usize::from(options.num_queues) {
            return Err(Error::new("each queue needs exactly one I/O thread"));
        }
        let listening = Listening::open(&options.addr)?;
        let shared = Arc::new(ExportShared::new(options, port, threads));
        let link = Arc::<Link>::default();
        let gate = Rc::new(Gate {
            closing: Cell::new(false),
            close: Notify::new(),
            closed: Cell::new(false),
            all_out: Notify::new(),
        });
        let local = Local::current();
        local.spawn(keep_door(listening, shared.clone(), link.clone(), gate.clone()));
        Ok(Self { shared, link, gate })
    }

    /// Throws the frontend out, if there is one, waits for what it has under way, and removes the socket. The port has
    /// no lanes of this export afterwards. Whether a connected frontend forbids that is the caller's decision
    /// ([`ExportReport::connected`]).
    pub async fn stop(self) {
        self.gate.closing.set(true);
        self.gate.close.notify_all();
        self.link.hang_up();
        while !self.gate.closed.get() {
            self.gate.all_out.notified().await;
        }
    }

    /// The port's news: size or limits have changed. Never waits.
    pub fn resized(&self) {
        self.link.config_changed();
    }

    /// The export's options.
    pub fn options(&self) -> &VhostUserOptions {
        &self.shared.options
    }

    /// For queries.
    pub fn report(&self) -> ExportReport {
        let queues = self.shared.stats.iter().map(|stats| stats.report()).collect();
        ExportReport { connected: self.link.is_connected(), queues }
    }
}

/// Lets one frontend after the other in, until the gate closes. The next one waits in the socket's backlog.
async fn keep_door(listening: Listening, shared: Arc<ExportShared>, link: Arc<Link>, gate: Rc<Gate>) {
    while let Some(frontend) = next_frontend(&listening, &gate).await {
        if let Err(error) = one_session(frontend, &shared, &link, &gate).await
            && shared.thrown_out.allows()
        {
            tracing::warn!(export = shared.options.id, "a frontend could not be served: {error}");
        }
    }
    drop(listening);
    gate.closed.set(true);
    gate.all_out.notify_all();
}

async fn next_frontend(listening: &Listening, gate: &Gate) -> Option<UnixStream> {
    let local = Local::current();
    while !gate.closing.get() {
        match listening.accept() {
            Ok(frontend) => return Some(frontend),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                first(local.readable(listening.socket()), gate.close.notified()).await;
            }
            // Descriptors or memory are short, or the frontend went away: there may be better times.
            Err(_) => {
                first(local.sleep(Duration::from_millis(50)), gate.close.notified()).await;
            }
        }
    }
    None
}

/// Serves a frontend from its first word on. Whoever comes and goes without one costs no more than that.
async fn one_session(
    frontend: UnixStream,
    shared: &Arc<ExportShared>,
    link: &Arc<Link>,
    gate: &Gate,
) -> io::Result<()> {
    frontend.set_nonblocking(false)?;
    let socket: SharedFd = Arc::new(frontend.try_clone()?.into());
    link.begin(socket.clone());
    if gate.closing.get() {
        link.hang_up();
    }
    let served = if speaks(&socket).await { serve(frontend, shared, link).await } else { Ok(()) };
    link.end();
    served
}

/// `false` where the frontend goes before it says anything.
async fn speaks(frontend: &SharedFd) -> bool {
    loop {
        match rustix::net::recv(frontend, &mut [0u8], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN | Errno::INTR) => Local::current().readable(frontend).await,
            answer => return matches!(answer, Ok((1, _))),
        };
    }
}

async fn serve(frontend: UnixStream, shared: &Arc<ExportShared>, link: &Arc<Link>) -> io::Result<()> {
    let (over, ended) = oneshot();
    session::start(frontend, shared, link, over)?;
    if let Ok(why) = ended.await
        && shared.thrown_out.allows()
    {
        tracing::warn!(export = shared.options.id, "a frontend was disconnected: {why}");
    }
    Ok(())
}
