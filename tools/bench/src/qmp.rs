//! A blocking QMP client, enough for a benchmark and a test: one command, one answer, events set aside.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// A connected session after `qmp_capabilities`.
#[derive(Debug)]
pub struct Monitor {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    /// Connects, reads the greeting and leaves negotiation mode. No answer may take longer than `limit`.
    ///
    /// # Errors
    /// Nobody listens, or what came is no QMP.
    pub fn connect(socket: &Path, limit: Duration) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        let lines = BufReader::new(stream.try_clone()?);
        let mut monitor = Self { stream, lines, events: Vec::new() };
        let greeting = monitor.message()?;
        if greeting.get("QMP").is_none() {
            return Err(io::Error::other(format!("no QMP greeting: {greeting}")));
        }
        monitor.run("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs one command and gives its `return`.
    ///
    /// # Errors
    /// The command's own error with its description, or the connection's.
    pub fn run(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        writeln!(self.stream, "{}", json!({ "execute": command, "arguments": arguments }))?;
        loop {
            let mut message = self.message()?;
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = message.get("error") {
                return Err(io::Error::other(format!("{command}: {}", error["desc"])));
            }
            self.events.push(message);
        }
    }

    /// Events that came so far, oldest first.
    #[must_use]
    pub fn events(&self) -> &[Value] {
        &self.events
    }

    fn message(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the monitor"));
        }
        serde_json::from_str(&line).map_err(io::Error::other)
    }
}
