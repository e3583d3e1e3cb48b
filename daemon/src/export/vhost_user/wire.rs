//! vhost-user messages on a socket: a header of 12 bytes, a body of at most 64 KiB, at most 32 descriptors.
//!
//! Only framing is judged here, because a stream that lost its framing cannot be answered; what a message says is
//! `filter.rs`.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use super::descriptors::{Bin, Received};

/// Bytes of a body at the most: more than any good message has, so that an absurd table can still be refused.
pub(super) const MAX_BODY: usize = 64 << 10;
/// Descriptors with a message at the most.
pub(super) const MAX_FDS: usize = 32;
/// As many as the kernel takes (unix(7), "SCM_RIGHTS"): those for which there is no room it closes itself, on our thread.
const ALL_FDS: usize = 253;
/// How long a message that has begun may take, and how long a frontend may leave a reply unread.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How long the next message is looked for before its thread sleeps. A frontend that sets a device up sends twenty, each after
/// the reply to the last, and to wake a thread on a halted processor takes longer than to handle a message.
const EAGER: Duration = Duration::from_micros(100);

const HEADER: usize = 12;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A message in either direction.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: u32,
    pub(super) need_reply: bool,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<Received>,
}

/// Why a stream cannot go on.
#[derive(Debug)]
pub(super) enum WireError {
    /// The other side went away in the middle of a message.
    Cut,
    /// A message took longer than [`PATIENCE`].
    Late,
    /// The header has these flags.
    Flags(u32),
    /// The header announces this many bytes.
    Size(u32),
    /// More than [`MAX_FDS`] descriptors.
    Fds,
    /// The socket failed.
    Io(io::Error),
}

impl std::fmt::Display for WireError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cut => f.write_str("it went away in the middle of a message"),
            Self::Late => f.write_str("a message was begun and not finished"),
            Self::Flags(flags) => write!(f, "a message has the flags {flags:#x}"),
            Self::Size(size) => write!(f, "a message announces {size} bytes"),
            Self::Fds => f.write_str("a message carries too many descriptors"),
            Self::Io(error) => write!(f, "the socket failed: {error}"),
        }
    }
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Late,
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Cut,
            _ => Self::Io(error),
        }
    }
}

/// The next request of a frontend; `None` where it went away between two. Waits for ever for a message to begin. `bin`
/// closes what comes along.
pub(super) fn receive(stream: impl AsFd, bin: &Arc<Bin>) -> Result<Option<Message>, WireError> {
    receive_with(stream.as_fd(), 0, bin)
}

/// The next reply, from the protocol engine.
pub(super) fn receive_reply(stream: &UnixStream) -> Result<Option<Message>, WireError> {
    receive_with(stream.as_fd(), REPLY, &Arc::default())
}

/// A reply to `request`.
pub(super) fn reply(stream: impl AsFd, request: u32, body: &[u8]) -> Result<(), WireError> {
    let mut bytes = header(request, VERSION | REPLY, body);
    bytes.extend_from_slice(body);
    send_all(stream.as_fd(), &bytes)
}

/// Requests, in one piece. Only the first has descriptors.
pub(super) fn send(stream: &UnixStream, messages: &[Message]) -> Result<(), WireError> {
    let Some((first, others)) = messages.split_first() else { return Ok(()) };
    assert!(others.iter().all(|other| other.fds.is_empty()), "descriptors come with the first of several messages");
    let mut bytes = Vec::new();
    for message in messages {
        let flags = VERSION | if message.need_reply { NEED_REPLY } else { 0 };
        bytes.extend(header(message.request, flags, &message.body));
        bytes.extend_from_slice(&message.body);
    }
    let fds: Vec<BorrowedFd<'_>> = first.fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(WireError::Fds);
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
    let sent = sent.map_err(io::Error::from)?;
    send_all(stream.as_fd(), &bytes[sent..])
}

fn send_all(stream: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), WireError> {
    while !bytes.is_empty() {
        match rustix::net::send(stream, bytes, SendFlags::NOSIGNAL) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    Ok(())
}

/// Tells the other side something without ever waiting for it: the bytes, or nothing, go into the socket's buffer.
pub(super) fn tell(socket: impl AsFd, request: u32) -> io::Result<()> {
    let bytes = header(request, VERSION, &[]);
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::send(socket, &bytes, flags)?;
    Ok(())
}

fn header(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).expect("a body is small");
    [request, flags, size].into_iter().flat_map(u32::to_ne_bytes).collect()
}

fn receive_with(stream: BorrowedFd<'_>, direction: u32, bin: &Arc<Bin>) -> Result<Option<Message>, WireError> {
    let mut input = Input { stream, bin, fds: Vec::new(), deadline: None };
    let mut header = [0; HEADER];
    if !input.fill(&mut header)? {
        return Ok(None);
    }
    let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| header[at + i]));
    let (request, flags, size) = (word(0), word(4), word(8));
    if flags & !NEED_REPLY != VERSION | direction {
        return Err(WireError::Flags(flags));
    }
    let len = usize::try_from(size).ok().filter(|len| *len <= MAX_BODY).ok_or(WireError::Size(size))?;
    let mut body = vec![0; len];
    if len != 0 && !input.fill(&mut body)? {
        return Err(WireError::Cut);
    }
    Ok(Some(Message { request, need_reply: flags & NEED_REPLY != 0, body, fds: input.fds }))
}

/// A message on its way in. What it brings is closed with it.
struct Input<'s> {
    stream: BorrowedFd<'s>,
    bin: &'s Arc<Bin>,
    fds: Vec<Received>,
    /// From the first byte on.
    deadline: Option<Instant>,
}

impl Input<'_> {
    /// `false` where the stream ended before the first byte of a message.
    fn fill(&mut self, mut out: &mut [u8]) -> Result<bool, WireError> {
        while !out.is_empty() {
            let count = match self.receive_some(out) {
                Err(WireError::Cut) if self.deadline.is_none() => return Ok(false),
                other => other?,
            };
            let Some(count) = count else {
                self.wait()?;
                continue;
            };
            if count == 0 {
                return if self.deadline.is_none() { Ok(false) } else { Err(WireError::Cut) };
            }
            self.deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
            out = &mut out[count..];
        }
        Ok(true)
    }

    /// Until there is more, or the other side has gone. Between two messages there is no limit.
    fn wait(&self) -> Result<(), WireError> {
        let eager_until = Instant::now() + EAGER;
        while Instant::now() < eager_until {
            if self.is_readable(Some(&Timespec::default()))? {
                return Ok(());
            }
            // It may need this processor to go on.
            std::thread::yield_now();
        }
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec::try_from(left).expect("ten seconds fit"));
        if self.is_readable(timeout.as_ref())? { Ok(()) } else { Err(WireError::Late) }
    }

    /// `false` where time ran out. A signal begins the time anew: there are few.
    fn is_readable(&self, timeout: Option<&Timespec>) -> Result<bool, WireError> {
        loop {
            let mut fds = [PollFd::from_borrowed_fd(self.stream, PollFlags::IN)];
            match poll(&mut fds, timeout) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(WireError::Io(error.into())),
            }
        }
    }

    /// `None` where there is nothing now.
    fn receive_some(&mut self, out: &mut [u8]) -> Result<Option<usize>, WireError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ALL_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = loop {
            match rustix::net::recvmsg(self.stream, &mut [IoSliceMut::new(out)], &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                other => break other.map_err(io::Error::from)?,
            }
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds.map(|fd| Received::new(fd, self.bin)));
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
            return Err(WireError::Fds);
        }
        Ok(Some(received.bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn raw(request: u32, flags: u32, size: u32, body: &[u8]) -> Vec<u8> {
        let words = [request, flags, size].into_iter().flat_map(u32::to_ne_bytes);
        words.chain(body.iter().copied()).collect()
    }

    fn feed(bytes: &[u8]) -> Result<Option<Message>, WireError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&theirs).write_all(bytes).unwrap();
        drop(theirs);
        receive(&ours, &Arc::default())
    }

    #[test]
    fn a_good_message_arrives() {
        let message = feed(&raw(8, 9, 8, &[7; 8])).unwrap().unwrap();
        assert_eq!((message.request, message.need_reply, message.body), (8, true, vec![7; 8]));
        assert!(feed(&[]).unwrap().is_none());
    }

    #[test]
    fn lost_framing_is_told_by_its_reason() {
        assert!(matches!(feed(&raw(1, 1, u32::MAX, &[])), Err(WireError::Size(u32::MAX))));
        assert!(matches!(feed(&raw(1, 1, 65537, &[])), Err(WireError::Size(65537))));
        for flags in [0, 3, 5, 0x11] {
            assert!(matches!(feed(&raw(1, flags, 0, &[])), Err(WireError::Flags(_))), "{flags}");
        }
        let good = raw(2, 1, 8, &[0; 8]);
        for cut in 1..good.len() {
            assert!(matches!(feed(&good[..cut]), Err(WireError::Cut)), "{cut}");
        }
    }

    #[test]
    fn descriptors_come_along_and_too_many_end_the_stream() {
        for (count, good) in [(1, true), (MAX_FDS, true)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let copy = || Received::new(ours.as_fd().try_clone_to_owned().unwrap(), &Arc::default());
            let fds = (0..count).map(|_| copy()).collect();
            send(&theirs, &[Message { request: 5, need_reply: false, body: vec![1], fds }]).unwrap();
            assert_eq!(receive(&ours, &Arc::default()).unwrap().map(|message| message.fds.len()) == Some(count), good);
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let many: Vec<BorrowedFd<'_>> = (0..=MAX_FDS).map(|_| ours.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        let bytes = raw(5, 1, 0, &[]);
        rustix::net::sendmsg(&theirs, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
        assert!(matches!(receive(&ours, &Arc::default()), Err(WireError::Fds)));
    }
}
