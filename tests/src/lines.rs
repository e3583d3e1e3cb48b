//! Text lines over a stream socket, each read with a deadline.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Why there is no line.
#[derive(Debug)]
pub enum LineError {
    /// The deadline came first. What was read of the line is kept for the next call.
    TimedOut,
    /// The peer closed the connection.
    Closed,
    /// The socket failed.
    Io(io::Error),
}

/// A connection that speaks in lines.
#[derive(Debug)]
pub struct Lines {
    stream: UnixStream,
    pending: Vec<u8>,
}

impl Lines {
    /// Connects to a listening unix socket.
    ///
    /// # Errors
    /// Those of `connect`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self { stream: UnixStream::connect(path)?, pending: Vec::new() })
    }

    /// Sends `line` and its end.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn send(&mut self, line: &str) -> io::Result<()> {
        self.send_bytes(format!("{line}\n").as_bytes())
    }

    /// Sends just these bytes.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next line, without its end (LF or CRLF).
    ///
    /// # Errors
    /// See [`LineError`].
    pub fn next(&mut self, deadline: Instant) -> Result<String, LineError> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned());
            }
            self.read_more(deadline)?;
        }
    }

    fn read_more(&mut self, deadline: Instant) -> Result<(), LineError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(LineError::TimedOut);
        }
        // The kernel rounds a time-out of less than its tick down to none at all.
        self.stream.set_read_timeout(Some(left.max(Duration::from_millis(10)))).map_err(LineError::Io)?;
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(LineError::Closed),
            Ok(count) => {
                self.pending.extend_from_slice(&bytes[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(LineError::TimedOut),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(LineError::Io(error)),
        }
    }
}
