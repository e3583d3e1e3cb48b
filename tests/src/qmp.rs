//! A small QMP client: one command at a time, events kept until somebody asks for them.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::lines::{LineError, Lines};
use crate::process::wait_for;

/// A negotiated control connection.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines,
    events: VecDeque<Value>,
}

/// The server's answer to a command that it refused.
#[derive(Debug)]
pub struct QmpError {
    /// `GenericError`, `CommandNotFound`, …
    pub class: String,
    /// The sentence for people.
    pub desc: String,
}

impl Qmp {
    /// Connects, reads the greeting and leaves negotiation mode. The socket may appear a little later.
    ///
    /// # Panics
    /// Where the server does not come up or does not speak QMP.
    #[must_use]
    pub fn connect(path: &Path) -> Self {
        let what = format!("a server on {}", path.display());
        let lines = wait_for(&what, ANSWER_LIMIT, || Lines::connect(path).ok());
        let mut qmp = Self { lines, events: VecDeque::new() };
        let greeting = qmp.receive(Instant::now() + ANSWER_LIMIT);
        assert!(greeting.is_some_and(|greeting| greeting.get("QMP").is_some()), "the server sent no greeting");
        qmp.execute("qmp_capabilities", &json!({}));
        qmp
    }

    /// What the command returned.
    ///
    /// # Panics
    /// Where the server refuses it.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        self.try_execute(command, arguments)
            .unwrap_or_else(|error| panic!("{command} {arguments}: {} ({})", error.desc, error.class))
    }

    /// What the command returned, or how it was refused.
    ///
    /// # Errors
    /// The server's error.
    ///
    /// # Panics
    /// Where no answer comes.
    pub fn try_execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let mut message = self.ask(&json!({ "execute": command, "arguments": arguments }));
        let Some(error) = message.get("error") else { return Ok(message["return"].take()) };
        let text = |member: &str| error[member].as_str().unwrap_or_default().to_owned();
        Err(QmpError { class: text("class"), desc: text("desc") })
    }

    /// The whole reply to a whole message; events that come before it are kept.
    ///
    /// # Panics
    /// Where no answer comes.
    pub fn ask(&mut self, message: &Value) -> Value {
        self.lines.send(&message.to_string()).expect("the control socket takes a command");
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let Some(reply) = self.receive(deadline) else { panic!("{message}: no answer") };
            if reply.get("event").is_none() {
                return reply;
            }
            self.events.push_back(reply);
        }
    }

    /// The events that came so far and that nobody has taken yet, oldest first.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }

    /// The data of the oldest event of this name that nobody has taken yet, waiting for it where there is none.
    ///
    /// # Panics
    /// Where it does not come.
    pub fn event(&mut self, name: &str) -> Value {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return self.events.remove(at).expect("the position is in range")["data"].take();
            }
            let Some(message) = self.receive(deadline) else { panic!("no event {name}") };
            self.events.push_back(message);
        }
    }

    fn receive(&mut self, deadline: Instant) -> Option<Value> {
        match self.lines.next(deadline) {
            Ok(line) => Some(serde_json::from_str(&line).expect("a QMP message is JSON")),
            Err(LineError::TimedOut) => None,
            Err(error) => panic!("the control socket broke: {error:?}"),
        }
    }
}

const ANSWER_LIMIT: Duration = Duration::from_secs(20);
