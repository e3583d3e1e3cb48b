//! One frontend's session, on a thread of its own: takes its messages, has them judged, carries out the verdicts.
//!
//! A session ends at any byte: then its queues are stopped, what they had under way is waited for, memory is unmapped
//! and every descriptor closed, before the next frontend is let in.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device::{Device, ExportShared};
use super::engine::Engine;
use super::filter::Filter;
use super::limit::SESSION;
use super::message::{BACKEND_CONFIG_CHANGE, Kind};
use super::verdict::{Effect, Verdict};
use super::wire::{Message, PATIENCE, WireError, receive, reply, tell};

const APPLIED: [u8; 8] = 0u64.to_ne_bytes();
const NOT_APPLIED: [u8; 8] = 1u64.to_ne_bytes();

/// What other threads can do to the session of an export, if there is one.
#[derive(Default)]
pub(super) struct Link(Mutex<Option<Live>>);

struct Live {
    frontend: UnixStream,
    channel: Option<OwnedFd>,
}

impl Link {
    /// A frontend is there.
    pub(super) fn begin(&self, frontend: UnixStream) {
        *self.lock() = Some(Live { frontend, channel: None });
    }

    /// The session is over.
    pub(super) fn end(&self) {
        *self.lock() = None;
    }

    /// True while a frontend is connected.
    pub(super) fn is_connected(&self) -> bool {
        self.lock().is_some()
    }

    /// Ends the session, wherever it is.
    pub(super) fn hang_up(&self) {
        if let Some(live) = &*self.lock() {
            // Fails only where the other side was faster.
            let _ = live.frontend.shutdown(Shutdown::Both);
        }
    }

    /// Tells the frontend that the config space has changed, if it gave us a channel. Asks for no answer, and never
    /// waits: a frontend that does not read loses the news, not the others their disk.
    pub(super) fn config_changed(&self) {
        if let Some(channel) = self.lock().as_ref().and_then(|live| live.channel.as_ref()) {
            let _ = tell(channel, BACKEND_CONFIG_CHANGE);
        }
    }

    fn set_channel(&self, channel: OwnedFd) {
        if let Some(live) = &mut *self.lock() {
            live.channel = Some(channel);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Live>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a session ended before the frontend wanted it to.
enum Ended {
    Wire(WireError),
    Verdict(&'static str),
    Engine,
    Setup(std::io::Error),
}

impl From<WireError> for Ended {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Wire(error) => error.fmt(f),
            Self::Verdict(why) => f.write_str(why),
            Self::Engine => f.write_str("the protocol engine refused a message"),
            Self::Setup(error) => write!(f, "the session could not be set up: {error}"),
        }
    }
}

/// Serves a frontend until it goes or has to.
pub(super) fn serve(frontend: &UnixStream, export: &Arc<ExportShared>, link: &Arc<Link>) {
    if let Err(ended) = try_serve(frontend, export, link)
        && SESSION.allows()
    {
        tracing::warn!(export = export.options.id, "a frontend was disconnected: {ended}");
    }
}

fn try_serve(frontend: &UnixStream, export: &Arc<ExportShared>, link: &Arc<Link>) -> Result<(), Ended> {
    frontend.set_write_timeout(Some(PATIENCE)).map_err(Ended::Setup)?;
    // Whoever comes and goes without a word costs nothing more.
    let Some(first) = receive(frontend)? else { return Ok(()) };
    let _afterwards = TrimHeap;
    let mut session = Session::start(frontend, export, link)?;
    let mut next = Some(first);
    while let Some(message) = next {
        session.handle(message)?;
        next = receive(frontend)?;
    }
    Ok(())
}

/// A guest may have made its queues hold much. Dropped after the session, it gives that back to the kernel.
struct TrimHeap;

impl Drop for TrimHeap {
    fn drop(&mut self) {
        block_core::rt::trim_heap();
    }
}

struct Session<'s> {
    frontend: &'s UnixStream,
    link: &'s Arc<Link>,
    filter: Filter,
    /// Dropped before the device: the engine's thread uses it.
    engine: Engine,
    device: Arc<Device>,
}

impl<'s> Session<'s> {
    fn start(frontend: &'s UnixStream, export: &Arc<ExportShared>, link: &'s Arc<Link>) -> Result<Self, Ended> {
        let for_queues = link.clone();
        let hang_up = Arc::new(move || for_queues.hang_up());
        let device = Arc::new(Device::new(export.clone(), hang_up));
        let engine = Engine::start(&format!("vhe-{}", export.options.id), &device).map_err(Ended::Setup)?;
        let filter = Filter::new(device.features(), device.rings().len());
        Ok(Self { frontend, link, filter, engine, device })
    }

    fn handle(&mut self, mut message: Message) -> Result<(), Ended> {
        let verdict = self.filter.judge(&mut message, &self.device.config());
        let acknowledge = self.filter.wants_ack(&message);
        let request = message.request;
        match verdict {
            Verdict::Relay => {
                let answer = self.engine.ask(&message)?;
                return Ok(reply(self.frontend, request, &answer)?);
            }
            Verdict::Answer(body) => return Ok(reply(self.frontend, request, &body)?),
            Verdict::AnswerAfter(effect, body) => {
                self.apply(effect)?;
                return Ok(reply(self.frontend, request, &body)?);
            }
            Verdict::Pass => self.pass(message)?,
            Verdict::PassAfter(effect) => {
                self.apply(effect)?;
                self.pass(message)?;
            }
            Verdict::Done => {}
            Verdict::DoneAfter(effect) => return self.acknowledge_effect(request, acknowledge, effect),
            Verdict::Refuse(why) => return self.refuse(request, acknowledge, why),
            Verdict::Drop(why) => return Err(Ended::Verdict(why)),
        }
        if acknowledge { Ok(reply(self.frontend, request, &APPLIED)?) } else { Ok(()) }
    }

    fn pass(&self, mut message: Message) -> Result<(), Ended> {
        if self.filter.may_follow(&message) {
            return Ok(self.engine.queue(&mut message)?);
        }
        if self.engine.tell(&mut message)? { Ok(()) } else { Err(Ended::Engine) }
    }

    fn acknowledge_effect(&self, request: u32, acknowledge: bool, effect: Effect) -> Result<(), Ended> {
        if !self.apply(effect)? {
            return self.refuse(request, acknowledge, "the operator decides about the write cache");
        }
        if acknowledge { Ok(reply(self.frontend, request, &APPLIED)?) } else { Ok(()) }
    }

    fn refuse(&self, request: u32, acknowledge: bool, why: &'static str) -> Result<(), Ended> {
        if acknowledge { Ok(reply(self.frontend, request, &NOT_APPLIED)?) } else { Err(Ended::Verdict(why)) }
    }

    /// `false` where the effect was refused.
    fn apply(&self, effect: Effect) -> Result<bool, Ended> {
        match effect {
            Effect::LogUsed(ring, at) => self.device.set_log_used(ring, at),
            Effect::Log(log) => self.device.set_log(log),
            Effect::Writeback(on) => return Ok(self.device.set_writeback(on)),
            Effect::Channel(channel) => self.link.set_channel(channel),
            Effect::Unmap(regions) => {
                for region in regions {
                    let body = [vec![0; 8], region.bytes()].concat();
                    let request = Kind::REM_MEM_REG as u32;
                    self.pass(Message { request, need_reply: true, body, fds: Vec::new() })?;
                }
            }
        }
        Ok(true)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.device.shut();
    }
}
