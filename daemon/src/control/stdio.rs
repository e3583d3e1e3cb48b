//! A monitor on stdin and stdout. They may be anything, a terminal or a pipe, and may be shared with others: so they are not
//! made non-blocking, and two threads carry the bytes between them and a socket, which a session serves like any other.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use block_core::base::{Result, ResultExt};
use block_core::rt::SharedFd;

/// The threads. Dropped, what was said still goes to stdout.
pub(super) struct Stdio {
    /// Is gone when all is written.
    written: Receiver<()>,
}

/// Serves stdin and stdout as the socket that is given back.
pub(super) fn open() -> Result<(SharedFd, Stdio)> {
    start().doing(|| "Cannot use stdin and stdout")
}

fn start() -> io::Result<(SharedFd, Stdio)> {
    let (session, ours) = UnixStream::pair()?;
    session.set_nonblocking(true)?;
    let (reads, writes) = (ours.try_clone()?, ours);
    let (is_there, written) = channel();
    spawn("stdin", move || {
        carry(io::stdin(), |bytes| (&reads).write_all(bytes));
        // It goes on with what was asked, and then ends.
        let _ = reads.shutdown(std::net::Shutdown::Write);
    })?;
    spawn("stdout", move || {
        let _is_there: std::sync::mpsc::Sender<()> = is_there;
        let mut stdout = io::stdout();
        carry(writes, |bytes| stdout.write_all(bytes).and_then(|()| stdout.flush()));
    })?;
    Ok((Arc::new(session.into()), Stdio { written }))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
}

/// Until one of both sides ends.
fn carry(from: impl AsFd, mut to: impl FnMut(&[u8]) -> io::Result<()>) {
    // There may be a secret in it: on the heap it is wiped when it is freed.
    let mut buffer = vec![0; CHUNK];
    loop {
        match rustix::io::read(&from, &mut buffer) {
            Ok(0) => return,
            Ok(count) if to(&buffer[..count]).is_err() => return,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        let _ = self.written.recv_timeout(LAST_WORDS);
    }
}

/// Bytes carried at once.
const CHUNK: usize = 16 << 10;
/// For whoever reads our stdout, at the end.
const LAST_WORDS: Duration = Duration::from_secs(1);
