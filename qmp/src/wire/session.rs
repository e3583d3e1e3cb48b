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
use super::{Layout, ListReply, to_line};
use crate::schema::{At, Members, Mode, Qapi};
use crate::{Error, ErrorClass, Result};

/// After so many syntax errors without a message between them a client is taken for no QMP client.
pub const MAX_ERRORS_IN_A_ROW: usize = 100;
/// How large the id of a request may be: the bytes of its texts, and one for each of its other values.
pub const MAX_ID_BYTES: usize = 1 << 20;
/// After so many bytes a sentence about a request is cut off: it may repeat what it is about.
pub const MAX_DESC_BYTES: usize = 64 << 10;
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

    /// Begins the reply to the command that runs, where its answer is a long list: [`Self::end_list`] ends it.
    pub fn begin_list(&self) -> ListReply {
        ListReply::begin(self.layout)
    }

    /// The last bytes of such a reply.
    ///
    /// # Panics
    /// If no command runs.
    pub fn end_list(&mut self, list: ListReply) -> Vec<u8> {
        let running = self.running.take().expect("a reply belongs to a command that was handed out");
        list.end(running.id.as_ref())
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
            // There may be a secret in it: whoever wipes what is freed wipes this too.
            (self.input, self.parsed) = (Vec::new(), 0);
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
        if id.as_ref().is_some_and(|id| left_of(MAX_ID_BYTES, id).is_none()) {
            return self.send_error(None, wrong_member("id", "is larger than 1 MiB"));
        }
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
            Err(Error { class, mut desc }) => {
                shorten(&mut desc);
                ("error", json!({ "class": class.name(), "desc": desc }))
            }
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

/// What is left of a budget of bytes after this value; it is not looked at further than that.
fn left_of(budget: usize, value: &Value) -> Option<usize> {
    match value {
        Value::String(text) => budget.checked_sub(text.len()),
        Value::Null | Value::Bool(_) | Value::Number(_) => budget.checked_sub(1),
        Value::Array(elements) => elements.iter().try_fold(budget.checked_sub(1)?, left_of),
        Value::Object(members) => members
            .iter()
            .try_fold(budget.checked_sub(1)?, |budget, (name, value)| left_of(budget.checked_sub(name.len())?, value)),
    }
}

fn shorten(desc: &mut String) {
    if desc.len() > MAX_DESC_BYTES {
        desc.truncate(desc.floor_char_boundary(MAX_DESC_BYTES));
        desc.push('…');
    }
}

fn wrong_member(name: &str, what: &str) -> Error {
    Error::generic(format!("QMP input member '{name}' {what}"))
}

fn not_now(desc: &str) -> Error {
    Error::new(ErrorClass::CommandNotFound, desc)
}

const NEGOTIATE: &str = "qmp_capabilities";

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::{Action, MAX_DESC_BYTES, MAX_ERRORS_IN_A_ROW, MAX_ID_BYTES, MAX_QUEUED_OOB, Session, VersionInfo};
    use crate::Error;
    use crate::wire::{Layout, parse_text};

    /// A session and the peers of its caller: commands are answered at once, with their arguments.
    struct Talk {
        session: Session,
        closed: bool,
    }

    impl Talk {
        fn new() -> Self {
            let commands: BTreeSet<_> = ["query-version", "blockdev-add"].map(str::to_owned).into();
            let session = Session::new(VersionInfo::new("Trellis 0.1"), Arc::new(commands), Layout::Compact);
            Self { session, closed: false }
        }

        fn negotiated() -> Self {
            Self::new().after(br#"{"execute":"qmp_capabilities"}"#)
        }

        fn with_oob() -> Self {
            Self::new().after(br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#)
        }

        fn after(mut self, text: &[u8]) -> Self {
            assert_eq!(self.say(text), [json!({ "return": {} })]);
            self
        }

        /// All replies to `text`.
        fn say(&mut self, text: &[u8]) -> Vec<Value> {
            self.session.receive(text);
            let mut replies = vec![];
            while let Some(action) = self.session.next_action() {
                match action {
                    Action::Send(line) => replies.push(value(&line)),
                    Action::Execute { arguments, .. } => replies.push(value(&self.session.reply(Ok(arguments)))),
                    Action::Close => self.closed = true,
                }
            }
            replies
        }

        /// Class and text of the one error that answers `text`.
        fn refused(&mut self, text: &str) -> (String, String) {
            let replies = self.say(text.as_bytes());
            let [reply] = replies.as_slice() else { panic!("{text}: {replies:?}") };
            let error = &reply["error"];
            (error["class"].as_str().unwrap().to_owned(), error["desc"].as_str().unwrap().to_owned())
        }

        fn echoes(&mut self, id: &Value) -> bool {
            let request = json!({ "execute": "query-version", "id": id }).to_string();
            self.say(request.as_bytes())[0].get("id") == Some(id)
        }

        fn still_works(&mut self) {
            let reply = self.say(br#"{"execute":"query-version","arguments":{"a":[1]},"id":"good"}"#);
            assert_eq!(reply, [json!({ "return": { "a": [1] }, "id": "good" })]);
        }
    }

    #[test]
    fn an_id_has_its_limit_and_so_has_a_sentence() {
        let mut talk = Talk::negotiated();
        let halves = |rest| json!({ "a": ["x".repeat(MAX_ID_BYTES / 2), "x".repeat(rest)] });
        for (fits, larger) in [
            (json!("x".repeat(MAX_ID_BYTES)), json!("x".repeat(MAX_ID_BYTES + 1))),
            (halves(MAX_ID_BYTES / 2 - 3), halves(MAX_ID_BYTES / 2 - 2)),
            (json!({ "x".repeat(MAX_ID_BYTES - 2): 1 }), json!({ "x".repeat(MAX_ID_BYTES - 1): 1 })),
        ] {
            assert!(talk.echoes(&fits));
            let (_, desc) = talk.refused(&json!({ "execute": "query-version", "id": larger }).to_string());
            assert_eq!(desc, "QMP input member 'id' is larger than 1 MiB");
        }
        let (class, desc) = talk.refused(&json!({ "execute": "é".repeat(MAX_DESC_BYTES) }).to_string());
        assert_eq!(class, "CommandNotFound");
        assert!(desc.ends_with("é…") && (MAX_DESC_BYTES..MAX_DESC_BYTES + 4).contains(&desc.len()), "{}", desc.len());
        talk.still_works();
    }

    fn value(line: &[u8]) -> Value {
        assert!(line.is_ascii() && line.ends_with(b"\r\n"));
        parse_text(std::str::from_utf8(line).unwrap()).unwrap()
    }

    fn not_found(desc: &str) -> (String, String) {
        ("CommandNotFound".to_owned(), desc.to_owned())
    }

    fn generic(desc: &str) -> (String, String) {
        ("GenericError".to_owned(), desc.to_owned())
    }

    #[test]
    fn the_greeting_says_which_qemu_is_followed() {
        let greeting = value(&Talk::new().session.greeting());
        let version = json!({ "qemu": { "micro": 2, "minor": 0, "major": 10 }, "package": "Trellis 0.1" });
        assert_eq!(greeting, json!({ "QMP": { "version": version, "capabilities": ["oob"] } }));
    }

    #[test]
    fn qmp_01_before_negotiation_there_are_no_commands() {
        let mut talk = Talk::new();
        let expected = not_found("Expecting capabilities negotiation with 'qmp_capabilities'");
        assert_eq!(talk.refused(r#"{"execute":"query-version"}"#), expected);
        assert_eq!(talk.refused(r#"{"execute":"no-such"}"#), expected);
        assert_eq!(talk.session.event("X", &json!({}), Duration::ZERO), None);

        let enable = |what| format!(r#"{{"execute":"qmp_capabilities","arguments":{{"enable":{what}}}}}"#);
        assert_eq!(talk.refused(&enable("[\"x\"]")), generic("Parameter 'enable[0]' does not accept value 'x'"));
        let wrong = generic("Invalid parameter type for 'enable', expected: array");
        assert_eq!(talk.refused(&enable("\"oob\"")), wrong);
        let unknown = r#"{"execute":"qmp_capabilities","arguments":{"x":1}}"#;
        assert_eq!(talk.refused(unknown), generic("Parameter 'x' is unexpected"));

        let mut talk = talk.after(br#"{"execute":"qmp_capabilities"}"#);
        let again = not_found("Capabilities negotiation is already complete, command ignored");
        assert_eq!(talk.refused(r#"{"execute":"qmp_capabilities"}"#), again);
        talk.still_works();
    }

    #[test]
    fn qmp_02_a_request_is_an_object_with_a_command() {
        let mut talk = Talk::negotiated();
        assert_eq!(talk.refused("{}"), generic("QMP input lacks member 'execute'"));
        for text in ["[]", "\"x\"", "1 ", "null ", "-1.5 "] {
            assert_eq!(talk.refused(text), generic("QMP input must be a JSON object"), "{text}");
        }
        assert_eq!(talk.refused(r#"{"execute":""}"#), not_found("The command  has not been found"));
        talk.still_works();
    }

    #[test]
    fn qmp_04_a_hundred_errors_in_a_row_close_the_session() {
        let mut talk = Talk::negotiated();
        assert_eq!(talk.say(&[0; MAX_ERRORS_IN_A_ROW - 1]).len(), MAX_ERRORS_IN_A_ROW - 1);
        talk.still_works();
        assert_eq!(talk.say(&[0; 10 * MAX_ERRORS_IN_A_ROW]).len(), MAX_ERRORS_IN_A_ROW);
        assert!(talk.closed);
        assert_eq!(talk.say(br#"{"execute":"query-version"}"#), [Value::Null; 0]);
        assert!(!talk.session.wants_input());
    }

    #[test]
    fn qmp_05_a_broken_message_does_not_break_the_session() {
        let mut talk = Talk::negotiated();
        assert_eq!(talk.refused("{\"execute\":\"query-ver\n"), generic("JSON parse error, stray '\"query-ver\n'"));
        talk.still_works();
        assert_eq!(talk.say(b"{\"execute\":\xff").len(), 1);
        talk.still_works();
    }

    #[test]
    fn qmp_08_a_nul_in_a_command_name_finds_no_command() {
        let mut talk = Talk::negotiated();
        let text = r#"{"execute":"query-version\u0000"}"#;
        assert_eq!(talk.refused(text), not_found("The command query-version\0 has not been found"));
    }

    #[test]
    fn qmp_12_unknown_top_members_are_refused() {
        let mut talk = Talk::negotiated();
        let reply = talk.say(br#"{"execute":"query-version","foo":1,"id":3}"#);
        let error = json!({ "class": "GenericError", "desc": "QMP input member 'foo' is unexpected" });
        assert_eq!(reply, [json!({ "error": error, "id": 3 })]);
        talk.still_works();
    }

    #[test]
    fn qmp_13_members_have_their_types() {
        let mut talk = Talk::negotiated();
        let wrong = generic("QMP input member 'arguments' must be an object");
        for arguments in ["[]", "null", "1", "\"\""] {
            let text = format!(r#"{{"execute":"query-version","arguments":{arguments}}}"#);
            assert_eq!(talk.refused(&text), wrong);
        }
        assert_eq!(talk.refused(r#"{"execute":1}"#), generic("QMP input member 'execute' must be a string"));
        talk.still_works();
    }

    #[test]
    fn qmp_14_nothing_is_executed_out_of_band() {
        let text = r#"{"exec-oob":"query-version"}"#;
        let unexpected = generic("QMP input member 'exec-oob' is unexpected");
        assert_eq!(Talk::new().refused(text), unexpected);
        let mut talk = Talk::negotiated();
        assert_eq!(talk.refused(text), unexpected);
        talk.still_works();

        let mut talk = Talk::with_oob();
        assert_eq!(talk.refused(text), generic("The command query-version does not support OOB"));
        assert_eq!(talk.refused(r#"{"exec-oob":"x"}"#), not_found("The command x has not been found"));
        assert_eq!(talk.refused(r#"{"exec-oob":1}"#), generic("QMP input member 'exec-oob' must be a string"));
        let both = r#"{"execute":"query-version","exec-oob":"query-version"}"#;
        assert_eq!(talk.refused(both), generic("QMP input member 'execute' clashes with 'exec-oob'"));
        talk.still_works();
    }

    #[test]
    fn qmp_16_deep_nesting_is_echoed_or_refused_once() {
        let mut talk = Talk::negotiated();
        let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        let request = |depth| format!(r#"{{"execute":"query-version","id":{}}}"#, nested(depth));
        let echoed = talk.say(request(1023).as_bytes());
        assert_eq!(echoed[0]["id"].to_string(), nested(1023), "one object and 1023 lists are 1024 levels");
        for depth in [1024, 1030] {
            assert_eq!(talk.refused(&request(depth)), generic("JSON nesting depth limit exceeded"));
            talk.still_works();
        }
        assert_eq!(talk.refused(&"[".repeat(1_000_000)), generic("JSON nesting depth limit exceeded"));
        assert_eq!(talk.say(b"\xff").len(), 1);
        talk.still_works();
    }

    #[test]
    fn qmp_18_after_a_message_that_is_too_long_the_session_closes() {
        let mut talk = Talk::negotiated();
        let chunk = vec![b'x'; 1 << 20];
        talk.session.receive(b"{\"execute\":\"");
        for _ in 0..63 {
            assert_eq!(talk.say(&chunk), [Value::Null; 0]);
        }
        let replies = talk.say(&chunk);
        assert_eq!(replies[0]["error"]["desc"], "JSON token size limit exceeded");
        assert!(talk.closed && replies.len() == 1);
    }

    #[test]
    fn qmp_20_the_id_comes_back_whatever_it_is() {
        let mut talk = Talk::negotiated();
        for id in
            [json!({ "a": [1, 2.5, "é", { "b": null }] }), json!(null), json!(u64::MAX), json!("x".repeat(1 << 20))]
        {
            let good = json!({ "execute": "query-version", "id": id }).to_string();
            assert_eq!(talk.say(good.as_bytes()), [json!({ "return": {}, "id": id })]);
            let bad = json!({ "execute": "no-such", "id": id }).to_string();
            assert_eq!(talk.say(bad.as_bytes())[0]["id"], id);
        }
    }

    #[test]
    fn qmp_21_input_waits_while_a_command_runs() {
        let mut talk = Talk::negotiated();
        let request = |id: usize| json!({ "execute": "query-version", "id": id }).to_string();
        talk.session.receive(request(0).as_bytes());
        assert!(matches!(talk.session.next_action(), Some(Action::Execute { .. })));
        assert!(talk.session.wants_input(), "one request may wait");
        let more: String = (1..100).map(request).collect();
        talk.session.receive(more.as_bytes());
        assert!(!talk.session.wants_input(), "of many the others hold the client back");
        assert_eq!(talk.session.waiting.len(), 1);
        assert_eq!(talk.session.next_action(), None, "one command runs at a time");

        assert_eq!(value(&talk.session.reply(Ok(json!({}))))["id"], 0);
        let ids: Vec<_> = talk.say(b"").iter().map(|reply| reply["id"].as_u64().unwrap()).collect();
        assert_eq!(ids, (1..100).collect::<Vec<_>>(), "in order and none lost");
        assert!(talk.session.wants_input());
    }

    #[test]
    fn qmp_21_with_oob_eight_requests_wait() {
        let mut talk = Talk::with_oob();
        talk.session.receive(&br#"{"execute":"query-version"}"#.repeat(20));
        assert!(matches!(talk.session.next_action(), Some(Action::Execute { .. })));
        assert_eq!(talk.session.waiting.len(), MAX_QUEUED_OOB);
        assert!(!talk.session.wants_input());
    }

    #[test]
    fn replies_stay_in_order_around_errors() {
        let mut talk = Talk::negotiated();
        let replies = talk.say(b"{\"execute\":\"query-version\",\"id\":1}@ {\"execute\":\"query-version\",\"id\":2}{}");
        assert_eq!(replies[0]["id"], 1);
        assert_eq!(replies[1]["error"]["desc"], "JSON parse error, stray '@'");
        assert_eq!(replies[2]["id"], 2);
        assert_eq!(replies.len(), 4);
    }

    #[test]
    fn qmp_27_what_looks_like_a_format_or_a_terminal_code_is_data() {
        let mut talk = Talk::negotiated();
        let name = "%s%n $(reboot) \u{1b}[31m";
        let text = json!({ "execute": "query-version", "arguments": { "name": name } }).to_string();
        talk.session.receive(text.as_bytes());
        let Some(Action::Execute { arguments, .. }) = talk.session.next_action() else { panic!() };
        assert_eq!(arguments["name"], name);
        let reply = talk.session.reply(Err(Error::generic(name)));
        assert!(String::from_utf8(reply).unwrap().contains("%s%n $(reboot) \\u001B[31m"), "control bytes are escaped");
    }

    #[test]
    fn events_carry_their_time() {
        let talk = Talk::negotiated();
        let time = Duration::new(1_700_000_000, 123_456_789);
        let event = talk.session.event("JOB_STATUS_CHANGE", &json!({ "id": "j" }), time).unwrap();
        let timestamp = json!({ "seconds": 1_700_000_000, "microseconds": 123_456 });
        let expected = json!({ "timestamp": timestamp, "event": "JOB_STATUS_CHANGE", "data": { "id": "j" } });
        assert_eq!(value(&event), expected);
    }
}
