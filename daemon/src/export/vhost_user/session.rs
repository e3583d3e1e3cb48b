//! One frontend's session, on the thread of its protocol engine: takes its messages, has them judged, carries out the
//! verdicts.
//!
//! It is made before its frontend comes, and waits for it at the door. It is resumed by the engine (`engine.rs`) and goes
//! on until the engine has something to do. A session ends at any byte: then its queues are stopped, what they had under
//! way is waited for, memory is unmapped and every descriptor closed, before the next session lets somebody in.

use std::cell::RefCell;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_core::rt::sync::Sender;

use super::descriptors::Received;
use super::device::{Device, ExportShared};
use super::door::{BETTER_TIMES, Door};
use super::engine::Engine;
use super::filter::Filter;
use super::memory::MemoryMap;
use super::message::Kind;
use super::regions::Region;
use super::verdict::{Effect, Verdict};
use super::wire::{Message, WireError, receive, reply};

const APPLIED: [u8; 8] = 0u64.to_ne_bytes();
const NOT_APPLIED: [u8; 8] = 1u64.to_ne_bytes();

/// Why a session ended before the frontend wanted it to.
#[derive(Debug)]
pub(super) enum Ended {
    Wire(WireError),
    Verdict(&'static str),
    Engine,
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
        }
    }
}

/// Makes a session and its thread, which wait for a frontend. `over` gets the reason where the session ended against that
/// one's will, or is dropped, when nothing of the session is left. Does not wait.
pub(super) fn start(export: &Arc<ExportShared>, door: &Arc<Door>, over: Sender<Ended>) -> io::Result<()> {
    let for_queues = door.clone();
    let hang_up = Arc::new(move || for_queues.hang_up());
    let device = Arc::new(Device::new(export.clone(), hang_up, door.bin()));
    let filter = Filter::new(device.features(), device.rings().len(), export.quota.clone());
    let name = format!("vhu-{}", export.options.id);
    Engine::start(name, &device.clone(), |engine| Session {
        filter,
        owed: None,
        engine,
        device,
        _afterwards: TrimHeap,
        frontend: None,
        visit: Visit { door: door.clone() },
        over: Over { to: Some(over), why: Some(Ended::Engine) },
    })
}

/// Where a session waits for the engine's thread, which takes it.
#[derive(Clone, Default)]
pub(super) struct Waiting(Arc<Mutex<Option<Session>>>);

impl Waiting {
    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Session>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session's turn, on the engine's thread. An error where it is over.
    pub(super) fn resume(&self) -> io::Result<()> {
        SESSION.with_borrow_mut(|session| {
            let session = session.get_or_insert_with(|| self.lock().take().expect("it waits from the start"));
            if session.turn() { Ok(()) } else { Err(io::Error::other("the session is over")) }
        })
    }
}

thread_local! {
    /// The session is its thread's: dropped after the engine has returned, whatever made it return.
    static SESSION: RefCell<Option<Session>> = const { RefCell::new(None) };
}

/// See the module's head. Its fields are dropped in this order.
pub(super) struct Session {
    filter: Filter,
    /// `Some` while the engine has something to do.
    owed: Option<Owed>,
    /// Has the rings and the guest's memory.
    engine: Engine,
    /// The queues are taken off their threads with it.
    device: Arc<Device>,
    _afterwards: TrimHeap,
    /// `None` before the first word.
    frontend: Option<Arc<Received>>,
    visit: Visit,
    over: Over,
}

/// What the frontend is to get when the engine is done.
enum Owed {
    Nothing,
    /// An acknowledgement of this request.
    Acknowledgement(u32),
    /// The engine's reply to this request.
    Reply(u32),
}

/// A guest may have made its queues hold much. Dropped after the session, it gives that back to the kernel.
struct TrimHeap;

impl Drop for TrimHeap {
    fn drop(&mut self) {
        block_core::rt::trim_heap();
    }
}

/// Dropped: the frontend is out, whose place nobody else had until now.
struct Visit {
    door: Arc<Door>,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.door.let_out();
    }
}

/// Dropped last: tells that nothing is left.
struct Over {
    to: Option<Sender<Ended>>,
    why: Option<Ended>,
}

impl Drop for Over {
    fn drop(&mut self) {
        if let (Some(to), Some(why)) = (self.to.take(), self.why.take()) {
            // Whoever is gone does not want to know.
            let _ = to.send(why);
        }
    }
}

impl Session {
    /// Goes on until the engine has something to do. `false` where the session is over.
    fn turn(&mut self) -> bool {
        match self.try_turn() {
            Ok(true) => return true,
            Ok(false) => self.over.why = None,
            Err(why) => self.over.why = Some(why),
        }
        false
    }

    fn try_turn(&mut self) -> Result<bool, Ended> {
        self.settle()?;
        while self.owed.is_none() {
            let Some(message) = self.next_message()? else { return Ok(false) };
            self.handle(message)?;
        }
        Ok(true)
    }

    /// `None` where the frontend has gone, or none comes any more.
    fn next_message(&mut self) -> Result<Option<Message>, Ended> {
        let door = &self.visit.door;
        if let Some(frontend) = &self.frontend {
            // It sends descriptors faster than they can be closed.
            while door.bin().is_full() && !door.is_closed() {
                door.bin().wait_for_room(BETTER_TIMES);
            }
            return Ok(receive(frontend, door.bin())?);
        }
        while let Some(frontend) = door.let_in() {
            if let Some(message) = receive(&frontend, door.bin())? {
                self.frontend = Some(frontend);
                return Ok(Some(message));
            }
            // Whoever comes and goes without a word costs no more than that.
            door.let_out();
        }
        Ok(None)
    }

    /// The engine has done what it was asked.
    fn settle(&mut self) -> Result<(), Ended> {
        match self.owed.take() {
            None | Some(Owed::Nothing) => Ok(()),
            Some(Owed::Acknowledgement(request)) => self.reply(request, &APPLIED),
            Some(Owed::Reply(request)) => self.reply(request, &self.engine.reply()?),
        }
    }

    fn handle(&mut self, mut message: Message) -> Result<(), Ended> {
        let verdict = self.filter.judge(&mut message, &self.device.config());
        let acknowledge = self.filter.wants_ack(&message);
        let request = message.request;
        match verdict {
            Verdict::Relay => self.pass(vec![message], Owed::Reply(request)),
            Verdict::Answer(body) => self.reply(request, &body),
            Verdict::AnswerAfter(effect, body) => {
                self.apply(effect);
                self.reply(request, &body)
            }
            Verdict::Pass => self.pass(vec![message], owed(request, acknowledge)),
            Verdict::PassAfter(effect) => {
                self.apply(effect);
                self.pass(vec![message], owed(request, acknowledge))
            }
            Verdict::Unmap(regions) => {
                self.apply(Effect::Memory(MemoryMap::empty()));
                let messages = regions.iter().map(unmap).collect();
                self.pass(messages, owed(request, acknowledge))
            }
            Verdict::Done => self.acknowledge(request, acknowledge),
            Verdict::DoneAfter(effect) => {
                self.apply(effect);
                self.acknowledge(request, acknowledge)
            }
            Verdict::Refuse(why) => self.refuse(request, acknowledge, why),
            Verdict::Drop(why) => Err(Ended::Verdict(why)),
        }
    }

    fn pass(&mut self, messages: Vec<Message>, owed: Owed) -> Result<(), Ended> {
        self.owed = Some(owed);
        Ok(self.engine.ask(messages)?)
    }

    fn reply(&self, request: u32, body: &[u8]) -> Result<(), Ended> {
        let frontend = self.frontend.as_ref().expect("who replies was asked");
        Ok(reply(frontend, request, body)?)
    }

    fn acknowledge(&self, request: u32, acknowledge: bool) -> Result<(), Ended> {
        if acknowledge { self.reply(request, &APPLIED) } else { Ok(()) }
    }

    fn refuse(&self, request: u32, acknowledge: bool, why: &'static str) -> Result<(), Ended> {
        if acknowledge { self.reply(request, &NOT_APPLIED) } else { Err(Ended::Verdict(why)) }
    }

    fn apply(&self, effect: Effect) {
        match effect {
            Effect::LogUsed(ring, at) => self.device.set_log_used(ring, at),
            Effect::Memory(map) => self.device.set_memory(map),
            Effect::Log(log) => self.device.set_log(log),
            Effect::Writeback(on) => self.device.set_writeback(on),
            Effect::Channel(channel) => self.visit.door.set_channel(channel),
        }
    }
}

fn owed(request: u32, acknowledge: bool) -> Owed {
    if acknowledge { Owed::Acknowledgement(request) } else { Owed::Nothing }
}

fn unmap(region: &Region) -> Message {
    let body = [vec![0; 8], region.bytes()].concat();
    Message { request: Kind::REM_MEM_REG as u32, need_reply: false, body, fds: Vec::new() }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.device.shut();
    }
}
