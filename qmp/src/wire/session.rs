//! One connection's state: greeting, negotiation, one command at a time, one reply to each request, in order.
//!
//! The caller's loop: send [`Session::greeting`]; while [`Session::wants_input`], read a chunk and give it to
//! [`Session::receive`]; do what [`Session::next_action`] says until it says nothing. A command that it hands out runs
//! until the caller gives its outcome to [`Session::reply`]; meanwhile nothing else is handed out.
//!
//! Memory is bounded if the caller stops reading while `wants_input` is false or its own output is not taken: then the
//! session holds one chunk, a message in progress, and at most [`MAX_QUEUED_OOB`] requests.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::parser::{Event, Parser, SyntaxError};
use super::{Layout, to_line};
use crate::schema::{At, Members, Mode, Qapi};
use crate::{Error, ErrorClass, Result};

/// After so many syntax errors without a message between them a client is taken for no QMP client.
pub const MAX_ERRORS_IN_A_ROW: usize = 100;
/// How many requests wait while one runs.
pub const MAX_QUEUED: usize = 1;
/// How many requests wait while one runs, once the client has enabled `oob`.
pub const MAX_QUEUED_OOB: usize = 8;

/// The names of all commands, `qmp_capabilities` aside.
pub type Commands = Arc<BTreeSet<String>>;

/// What the caller is to do.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Send these bytes.
    Send(Vec<u8>),
    /// Run this command, then call [`Session::reply`].
    Execute {
        /// One of the known commands.
        command: String,
        /// A JSON object.
        arguments: Value,
    },
    /// Close the connection, once everything is sent.
    Close,
}

/// Which QEMU's language is spoken, and by whom. The answer of `query-version`, too.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct VersionInfo {
    /// The version of QEMU whose commands, members and texts are followed.
    pub qemu: VersionTriple,
    /// The program that follows them, and its version.
    pub package: String,
}

/// A version number.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct VersionTriple {
    /// Counts fixes.
    pub micro: i64,
    /// Counts releases within a year.
    pub minor: i64,
    /// Counts years.
    pub major: i64,
}

impl VersionInfo {
    /// QEMU 10.0.2 as `package` speaks it. Clients decide by the number what they may use.
    pub fn new(package: impl Into<String>) -> Self {
        Self { qemu: VersionTriple { micro: 2, minor: 0, major: 10 }, package: package.into() }
    }
}

/// The arguments of `qmp_capabilities`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct NegotiateArguments {
    /// The offered capabilities that the client will use.
    pub enable: Option<Vec<Capability>>,
}

/// What a client may enable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "QMPCapability")]
pub enum Capability {
    /// Requests that are answered out of turn. No command here takes part.
    Oob,
}

/// The state of one connection.
#[derive(Debug)]
pub struct Session {
    version: VersionInfo,
    commands: Commands,
    layout: Layout,
    parser: Parser,
    /// What was received; behind `parsed` it is not parsed yet, since enough requests wait.
    input: Vec<u8>,
    parsed: usize,
    waiting: VecDeque<Event>,
    phase: Phase,
    running: Option<Running>,
    errors_in_a_row: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Negotiating,
    Commands { oob: bool },
    Closing,
    Closed,
}

/// A command that was handed out.
#[derive(Debug)]
struct Running {
    id: Option<Value>,
}

impl Session {
    /// A session at its beginning.
    pub fn new(version: VersionInfo, commands: Commands, layout: Layout) -> Self {
        Self {
            version,
            commands,
            layout,
            parser: Parser::new(),
            input: Vec::new(),
            parsed: 0,
            waiting: VecDeque::new(),
            phase: Phase::Negotiating,
            running: None,
            errors_in_a_row: 0,
        }
    }

    /// What the client is sent first.
    pub fn greeting(&self) -> Vec<u8> {
        let capabilities = [Capability::Oob.to_value()];
        self.line(&json!({ "QMP": { "version": self.version.to_value(), "capabilities": capabilities } }))
    }

    /// Whether more bytes are welcome. If not, do not read: the socket's buffer then holds the client back.
    pub fn wants_input(&self) -> bool {
        self.input.is_empty() && self.waiting.len() < self.max_waiting() && !self.is_closing()
    }

    /// Takes bytes as they came.
    pub fn receive(&mut self, bytes: &[u8]) {
        if self.is_closing() {
            return;
        }
        self.input.extend_from_slice(bytes);
        self.parse();
    }

    /// The next thing to do, if there is one before more input or the running command's outcome.
    pub fn next_action(&mut self) -> Option<Action> {
        if self.running.is_some() {
            return None;
        }
        if self.phase == Phase::Closing {
            self.phase = Phase::Closed;
            return Some(Action::Close);
        }
        let event = self.waiting.pop_front()?;
        self.parse();
        Some(match event {
            Event::Message(message) => self.message(message),
            Event::Error(error) => self.syntax_error(&error),
        })
    }

    /// The reply to the command that runs.
    ///
    /// # Panics
    /// If none runs: each [`Action::Execute`] has one reply.
    pub fn reply(&mut self, outcome: Result<Value>) -> Vec<u8> {
        let running = self.running.take().expect("a reply belongs to a command that was handed out");
        self.reply_line(running.id, outcome)
    }

    /// An event's bytes, where the client has negotiated and so gets events. `time` counts from 1970.
    pub fn event(&self, name: &str, data: &Value, time: Duration) -> Option<Vec<u8>> {
        if !matches!(self.phase, Phase::Commands { .. }) {
            return None;
        }
        let mut event = Map::new();
        let stamp = json!({ "seconds": time.as_secs(), "microseconds": time.subsec_micros() });
        event.insert("timestamp".to_owned(), stamp);
        event.insert("event".to_owned(), name.into());
        if data.as_object().is_none_or(|members| !members.is_empty()) {
            event.insert("data".to_owned(), data.clone());
        }
        Some(self.line(&Value::Object(event)))
    }

    fn max_waiting(&self) -> usize {
        match self.phase {
            Phase::Commands { oob: true } => MAX_QUEUED_OOB,
            _ => MAX_QUEUED,
        }
    }

    fn is_closing(&self) -> bool {
        matches!(self.phase, Phase::Closing | Phase::Closed)
    }

    fn parse(&mut self) {
        let mut rest = &self.input[self.parsed..];
        while self.waiting.len() < self.max_waiting()
            && let Some(event) = self.parser.next(&mut rest)
        {
            self.waiting.push_back(event);
        }
        self.parsed = self.input.len() - rest.len();
        if rest.is_empty() {
            self.input.clear();
            self.parsed = 0;
        }
    }

    fn syntax_error(&mut self, error: &SyntaxError) -> Action {
        self.errors_in_a_row += 1;
        if self.errors_in_a_row >= MAX_ERRORS_IN_A_ROW || *error == SyntaxError::TooLong {
            self.close();
        }
        self.send_error(None, Error::generic(error.to_string()))
    }

    fn close(&mut self) {
        self.phase = Phase::Closing;
        (self.input, self.parsed) = (Vec::new(), 0);
        self.waiting.clear();
    }

    fn message(&mut self, message: Value) -> Action {
        self.errors_in_a_row = 0;
        let Value::Object(mut members) = message else {
            return self.send_error(None, Error::generic("QMP input must be a JSON object"));
        };
        let id = members.remove("id");
        match Request::read(members, self.phase).and_then(|request| self.request(request)) {
            Ok(Next::Execute { command, arguments }) => {
                self.running = Some(Running { id });
                Action::Execute { command, arguments }
            }
            Ok(Next::Negotiated) => Action::Send(self.reply_line(id, Ok(json!({})))),
            Err(error) => self.send_error(id, error),
        }
    }

    fn request(&mut self, request: Request) -> Result<Next> {
        let Request { command, arguments, oob } = request;
        match (self.phase, command.as_str()) {
            (Phase::Negotiating, NEGOTIATE) => self.negotiate(arguments),
            (Phase::Negotiating, _) => Err(not_now("Expecting capabilities negotiation with 'qmp_capabilities'")),
            (_, NEGOTIATE) => Err(not_now("Capabilities negotiation is already complete, command ignored")),
            _ if !self.commands.contains(&command) => Err(Error::unknown_command(&command)),
            _ if oob => Err(Error::generic(format!("The command {command} does not support OOB"))),
            _ => Ok(Next::Execute { command, arguments }),
        }
    }

    fn negotiate(&mut self, arguments: Value) -> Result<Next> {
        let arguments: NegotiateArguments = Members::whole(arguments, &At::root(Mode::Json))?;
        let oob = arguments.enable.is_some_and(|enabled| enabled.contains(&Capability::Oob));
        self.phase = Phase::Commands { oob };
        Ok(Next::Negotiated)
    }

    fn send_error(&self, id: Option<Value>, error: Error) -> Action {
        Action::Send(self.reply_line(id, Err(error)))
    }

    fn reply_line(&self, id: Option<Value>, outcome: Result<Value>) -> Vec<u8> {
        let (name, body) = match outcome {
            Ok(value) => ("return", value),
            Err(Error { class, desc }) => ("error", json!({ "class": class.name(), "desc": desc })),
        };
        let mut reply = Map::new();
        reply.insert(name.to_owned(), body);
        if let Some(id) = id {
            reply.insert("id".to_owned(), id);
        }
        self.line(&Value::Object(reply))
    }

    fn line(&self, message: &Value) -> Vec<u8> {
        to_line(message, self.layout)
    }
}

enum Next {
    Execute { command: String, arguments: Value },
    Negotiated,
}

/// A request with the right members, of which nothing else is known.
struct Request {
    command: String,
    arguments: Value,
    oob: bool,
}

impl Request {
    fn read(members: Map<String, Value>, phase: Phase) -> Result<Self> {
        let may_oob = phase == Phase::Commands { oob: true };
        let (mut command, mut arguments, mut oob) = (None, json!({}), false);
        for (name, value) in members {
            match (name.as_str(), value) {
                ("execute", _) | ("exec-oob", _) if command.is_some() && may_oob => {
                    return Err(Error::generic("QMP input member 'execute' clashes with 'exec-oob'"));
                }
                ("execute", Value::String(word)) => command = Some(word),
                ("exec-oob", Value::String(word)) if may_oob => (command, oob) = (Some(word), true),
                ("execute", _) => return Err(wrong_member(&name, "must be a string")),
                ("exec-oob", _) if may_oob => return Err(wrong_member(&name, "must be a string")),
                ("arguments", value @ Value::Object(_)) => arguments = value,
                ("arguments", _) => return Err(wrong_member(&name, "must be an object")),
                _ => return Err(wrong_member(&name, "is unexpected")),
            }
        }
        let command = command.ok_or_else(|| Error::generic("QMP input lacks member 'execute'"))?;
        Ok(Self { command, arguments, oob })
    }
}

fn wrong_member(name: &str, what: &str) -> Error {
    Error::generic(format!("QMP input member '{name}' {what}"))
}

fn not_now(desc: &str) -> Error {
    Error::new(ErrorClass::CommandNotFound, desc)
}

const NEGOTIATE: &str = "qmp_capabilities";
