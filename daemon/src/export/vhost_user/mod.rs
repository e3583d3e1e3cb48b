//! The vhost-user-blk export: a disk for virtual machines over a unix socket.
//!
//! ```text
//! frontend ── session ── filter ── engine ── backend, vring ─┐ control: a thread a session, messages
//!     │                     (vhost-user-backend)             ▼
//!     └──────────── guest memory ── ring ── queue ── port    data: the IOThread of each queue
//! ```
//! [`VhostUserExport`] is what the daemon has of it, on the control thread, which keeps a session waiting for the next
//! frontend. The control side tells a queue what to do by message and waits; the data side takes no lock and knows no socket.

mod backend;
mod call;
mod chain;
mod config_space;
mod descriptors;
mod device;
mod door;
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

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block_core::base::{Error, Result, ResultExt};
use block_core::port::PortHandle;
use block_core::rt::sync::{Receiver, Sender, oneshot};
use block_core::rt::{Local, Remote};

use crate::process::socket::{Listener, SocketFile};
use device::ExportShared;
use door::{BETTER_TIMES, Door};
use session::Ended;

pub use options::{Address, MAX_BLOCK, MAX_QUEUES, VhostUserOptions};
pub use stats::QueueReport;

/// A running export. Lives on the control thread.
pub struct VhostUserExport {
    shared: Arc<ExportShared>,
    door: Arc<Door>,
    /// Dropped by the other side when all is over.
    over: Receiver<()>,
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
    /// A sentence: an option that makes no sense, or a socket or a thread that cannot be had.
    pub async fn start(options: VhostUserOptions, port: PortHandle, threads: Vec<Remote>) -> Result<Self> {
        options.check()?;
        if threads.len() != usize::from(options.num_queues) {
            return Err(Error::new("each queue needs exactly one I/O thread"));
        }
        let Listener { descriptor, file } = listen::open(&options.addr).await?;
        let shared = Arc::new(ExportShared::new(options, port, threads));
        let door = Arc::new(Door::new(descriptor).doing(|| "preparing the export's socket")?);
        let session = start_session(&shared, &door).doing(|| "starting the export's session")?;
        let (running, over) = oneshot();
        Local::current().spawn(keep_serving(file, shared.clone(), door.clone(), session, running));
        Ok(Self { shared, door, over })
    }

    /// Throws the frontend out, if there is one, waits for what it has under way, and removes the socket. The port has
    /// no lanes of this export afterwards. Whether a connected frontend forbids that is the caller's decision
    /// ([`VhostUserExport::close_if_unused`]).
    pub async fn stop(self) {
        self.door.close();
        // Nothing is ever sent.
        let _ = self.over.await;
    }

    /// Lets nobody in any more, unless a frontend is connected: then `false`, and nothing has changed.
    pub fn close_if_unused(&self) -> bool {
        self.door.close_if_empty()
    }

    /// The port's news: size or limits have changed. Never waits.
    pub fn resized(&self) {
        self.door.config_changed();
    }

    /// The export's options.
    pub fn options(&self) -> &VhostUserOptions {
        &self.shared.options
    }

    /// For queries.
    pub fn report(&self) -> ExportReport {
        let queues = self.shared.stats.iter().map(|stats| stats.report()).collect();
        ExportReport { connected: self.door.is_connected(), queues }
    }
}

/// Has a session ready for the next frontend whenever the last one is over, until the door closes.
async fn keep_serving(
    file: Option<SocketFile>,
    shared: Arc<ExportShared>,
    door: Arc<Door>,
    mut session: Receiver<Ended>,
    _running: Sender<()>,
) {
    let mut in_a_row = 0_u32;
    loop {
        let begun = Instant::now();
        if let Ok(why) = session.await
            && shared.thrown_out.allows()
        {
            tracing::warn!(export = shared.options.id, "a frontend was disconnected: {why}");
        }
        in_a_row = if begun.elapsed() < SHORT { in_a_row.saturating_add(1) } else { 0 };
        if in_a_row > MAX_IN_A_ROW {
            // To make a session and its thread is work, and whoever comes and goes so fast does none.
            Local::current().sleep(SHORT).await;
        }
        let Some(next) = next_session(&shared, &door).await else { break };
        session = next;
    }
    drop(file);
}

/// A session that is over so soon after it was made that no guest can have been served.
const SHORT: Duration = Duration::from_millis(10);
/// How many of those come one after the other before there is a pause after each.
const MAX_IN_A_ROW: u32 = 100;

/// `None` where the door is closed.
async fn next_session(shared: &Arc<ExportShared>, door: &Arc<Door>) -> Option<Receiver<Ended>> {
    let mut told = false;
    while !door.is_closed() {
        match start_session(shared, door) {
            Ok(session) => return Some(session),
            Err(error) if !told => {
                tracing::warn!(export = shared.options.id, "no frontend can be served until this is over: {error}");
                told = true;
            }
            Err(_) => {}
        }
        Local::current().sleep(BETTER_TIMES).await;
    }
    None
}

fn start_session(shared: &Arc<ExportShared>, door: &Arc<Door>) -> io::Result<Receiver<Ended>> {
    let (over, ended) = oneshot();
    session::start(shared, door, over)?;
    Ok(ended)
}
