//! Bytes and descriptors on a vhost-user socket, with nothing checked and nothing hidden.
//!
//! What the bytes mean is `protocol`; who sends which in what order is `client`.
#![expect(unsafe_code, reason = "sendmsg, recvmsg, eventfd, memfd and poll have no safe form in std")]

use super::PATIENCE;
use super::protocol::{Header, flags};
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A message as it came from the back-end.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// As many bytes as the header says.
    pub payload: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload as one little-endian word.
    ///
    /// # Panics
    /// Where the payload is not 8 bytes.
    pub fn u64(&self) -> u64 {
        let bytes = self.payload.as_slice().try_into();
        u64::from_le_bytes(bytes.unwrap_or_else(|_| panic!("a reply of one word expected, got {self:?}")))
    }
}

/// One end of a vhost-user connection.
#[derive(Debug)]
pub struct Wire {
    stream: UnixStream,
}

impl Wire {
    /// Connects to the socket at `path`, waiting at most [`PATIENCE`] for a place in its queue.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = unix_socket()?;
        // A listener with a full backlog blocks connect() for as long as the send time-out says.
        UnixStream::set_write_timeout(&socket, Some(PATIENCE))?;
        connect_to(&socket, path)?;
        Ok(Self::from_stream(socket))
    }

    /// Speaks over a socket that is connected already.
    pub fn from_stream(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a non-zero time-out is always taken");
        stream.set_write_timeout(Some(PATIENCE)).expect("a non-zero time-out is always taken");
        Self { stream }
    }

    /// The socket itself, for time-outs and shutdown.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends `bytes` in one call with `fds` as its ancillary data; how many bytes the kernel took.
    pub fn send_some(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.send_flagged(bytes, fds, 0)
    }

    fn send_flagged(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], flags: i32) -> io::Result<usize> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut control = control_block(&raw);
        let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let message = message_header(&mut part, &mut control);
        // SAFETY: `message` points at `part`, `bytes` and `control`, which live to the end of this function.
        let sent = unsafe { libc::sendmsg(self.stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | flags) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Sends a byte as urgent (unix(7), `MSG_OOB`), with `fds`.
    pub fn send_urgent(&self, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_flagged(&[0], fds, libc::MSG_OOB).map(drop)
    }

    /// Sends all of `bytes`; `fds` go with the first of them.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let sent = self.send_some(bytes, fds)?;
        (&self.stream).write_all(&bytes[sent..])
    }

    /// Sends a message whose header says what its caller wants it to say.
    pub fn send_with(&self, header: Header, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_bytes(&[&header.bytes()[..], payload].concat(), fds)
    }

    /// Sends a well-formed message that asks for no acknowledgement.
    pub fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let header = Header { request, flags: flags::VERSION, size: payload.len() as u32 };
        self.send_with(header, payload, fds)
    }

    /// Sends a well-formed message that asks for an acknowledgement.
    pub fn send_need_reply(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let header = Header { request, flags: flags::VERSION | flags::NEED_REPLY, size: payload.len() as u32 };
        self.send_with(header, payload, fds)
    }

    /// The next message; `None` where the other side has closed, an error where nothing came in time.
    pub fn recv(&self) -> io::Result<Option<Message>> {
        let mut head = [0; Header::LEN];
        let (got, mut fds) = match self.recv_some(&mut head) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            other => other?,
        };
        if got == 0 {
            return Ok(None);
        }
        (&self.stream).read_exact(&mut head[got..])?;
        let header = Header::parse(head);
        let mut payload = vec![0; header.size.min(MAX_REPLY) as usize];
        if !payload.is_empty() {
            let (got, more) = self.recv_some(&mut payload)?;
            fds.extend(more);
            (&self.stream).read_exact(&mut payload[got..])?;
        }
        Ok(Some(Message { header, payload, fds }))
    }

    /// Whether the other side hangs up within `patience`. Messages that come first are given to `seen`.
    pub fn closes_within(&self, patience: Duration, mut seen: impl FnMut(Message)) -> bool {
        let end = Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !readable_within(self.stream.as_fd(), left) {
                return false;
            }
            match self.recv() {
                Ok(Some(message)) => seen(message),
                Ok(None) => return true,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return false,
                Err(_) => return true,
            }
        }
    }

    fn recv_some(&self, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut control = vec![0_u64; control_words(MAX_FDS)];
        let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let mut message = message_header(&mut part, &mut control);
        // SAFETY: `message` points at `part`, `bytes` and `control`, which live to the end of this function.
        let got = unsafe { libc::recvmsg(self.stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        Ok((got, received_fds(&message)))
    }
}

/// An eventfd that counts; reading it never blocks.
pub fn eventfd() -> OwnedFd {
    eventfd_with(0, libc::EFD_NONBLOCK)
}

/// An eventfd whose counter is one below the largest, so that a write to it blocks, or fails where `nonblocking`.
pub fn full_eventfd(nonblocking: bool) -> OwnedFd {
    let fd = eventfd_with(0, if nonblocking { libc::EFD_NONBLOCK } else { 0 });
    write_word(fd.as_fd(), u64::MAX - 1).expect("an empty eventfd takes any count below the largest");
    fd
}

/// Whether calls on the open file wait, for all who have a share in it.
pub fn set_nonblocking(fd: BorrowedFd<'_>, on: bool) {
    // An eventfd is open for both ways, and has no other flag.
    let flags = if on { libc::O_RDWR | libc::O_NONBLOCK } else { libc::O_RDWR };
    // SAFETY: the call takes no pointers.
    let done = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) };
    assert_eq!(done, 0, "a flag of an open file");
}

/// Adds one to an eventfd; a full counter is a delivered event.
pub fn signal(fd: BorrowedFd<'_>) {
    match write_word(fd, 1) {
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => panic!("an eventfd of our own takes no event: {e}"),
        _ => (),
    }
}

/// Takes and clears an eventfd's count; 0 where nothing came.
pub fn take_events(fd: BorrowedFd<'_>) -> u64 {
    let mut word = [0; 8];
    match as_file(fd).read_exact(&mut word) {
        Ok(()) => u64::from_ne_bytes(word),
        Err(_) => 0,
    }
}

/// Whether `fd` is readable, or hung up, before `patience` ends.
pub fn readable_within(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    polled(fd, libc::POLLIN, patience) != 0
}

/// Whether the other end of `fd` has hung up before `patience` ends, without reading what it has sent.
pub fn hung_up_within(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    polled(fd, 0, patience) & (libc::POLLHUP | libc::POLLERR) != 0
}

/// Does nothing for `time`; the tests' one way to let time pass.
pub fn pause(time: Duration) {
    let millis = i32::try_from(time.as_millis()).unwrap_or(i32::MAX).max(1);
    // SAFETY: no descriptors are passed, so the null pointer is never read.
    unsafe { libc::poll(std::ptr::null_mut(), 0, millis) };
}

/// An anonymous memory file of `size` bytes that may be sealed.
pub fn memfd(size: u64) -> OwnedFd {
    let fd = memfd_with(libc::MFD_ALLOW_SEALING).expect("memfd_create");
    set_len(fd.as_fd(), size);
    fd
}

/// The same in huge pages, `None` where the kernel has none. It can be mapped without a page in the pool; who touches it
/// then gets SIGBUS.
pub fn huge_memfd(size: u64) -> Option<OwnedFd> {
    let fd = memfd_with(libc::MFD_HUGETLB).ok()?;
    set_len(fd.as_fd(), size);
    Some(fd)
}

fn memfd_with(flags: libc::c_uint) -> io::Result<OwnedFd> {
    let name: &CStr = c"trellis-test";
    // SAFETY: the name ends in NUL and lives for the whole program.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the length of a memory file, shrinking or growing it.
pub fn set_len(fd: BorrowedFd<'_>, size: u64) {
    as_file(fd).set_len(size).expect("a memory file of ours takes any length that an off_t holds");
}

/// Forbids writes to a memory file except through mappings that exist already.
pub fn seal_future_writes(fd: BorrowedFd<'_>) {
    // SAFETY: plain integers; the descriptor is open while it is borrowed.
    let done = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE) };
    assert!(done == 0, "sealing a memory file: {}", io::Error::last_os_error());
}

/// A pipe: what is written to the second comes out of the first.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = io::pipe().expect("a pipe can be made");
    (reader.into(), writer.into())
}

/// A socket whose last close takes ten minutes (socket(7), `SO_LINGER`), for the other end does not read what it has sent.
/// It takes no time once that other end is closed.
pub fn lingering_socket() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a loopback device");
    let address = listener.local_addr().expect("a listener has an address");
    let mut socket = TcpStream::connect(address).expect("the listener has a backlog");
    let (unread, _) = listener.accept().expect("somebody has connected");
    set_nonblocking(socket.as_fd(), true);
    while socket.write(&[0; 65536]).is_ok() {}
    set_nonblocking(socket.as_fd(), false);
    let linger = libc::linger { l_onoff: 1, l_linger: 600 };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    let (level, option) = (libc::SOL_SOCKET, libc::SO_LINGER);
    // SAFETY: `linger` is a whole one of `len` bytes that lives through the call.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const linger).cast(), len) };
    assert!(done == 0, "setting SO_LINGER: {}", io::Error::last_os_error());
    (socket.into(), unread)
}

/// Has process `pid` stand still while `deed` is done.
pub fn while_it_stands_still<T>(pid: u32, deed: impl FnOnce() -> T) -> T {
    let tell = |signal| {
        // SAFETY: plain integers.
        let done = unsafe { libc::kill(pid.cast_signed(), signal) };
        assert!(done == 0, "signal {signal}: {}", io::Error::last_os_error());
    };
    tell(libc::SIGSTOP);
    let result = deed();
    tell(libc::SIGCONT);
    result
}

/// Limits the address space of process `pid` to `bytes`; `None` lifts the limit.
pub fn limit_address_space(pid: u32, bytes: Option<u64>) {
    let limit = libc::rlimit { rlim_cur: bytes.unwrap_or(libc::RLIM_INFINITY), rlim_max: libc::RLIM_INFINITY };
    let pid = pid.cast_signed();
    // SAFETY: `limit` lives through the call, and the old limit is not asked for.
    let done = unsafe { libc::prlimit(pid, libc::RLIMIT_AS, &raw const limit, std::ptr::null_mut()) };
    assert!(done == 0, "prlimit: {}", io::Error::last_os_error());
}

fn eventfd_with(count: u32, flags: i32) -> OwnedFd {
    // SAFETY: plain integers in, a new descriptor out.
    let fd = unsafe { libc::eventfd(count, flags | libc::EFD_CLOEXEC) };
    assert!(fd >= 0, "eventfd: {}", io::Error::last_os_error());
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn write_word(fd: BorrowedFd<'_>, word: u64) -> io::Result<()> {
    as_file(fd).write_all(&word.to_ne_bytes())
}

/// A `File` over the same open file, closed again at once: std reads and writes only what it owns.
fn as_file(fd: BorrowedFd<'_>) -> File {
    File::from(fd.try_clone_to_owned().expect("a descriptor of ours can be duplicated"))
}

fn polled(fd: BorrowedFd<'_>, events: i16, patience: Duration) -> i16 {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    let millis = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: exactly one entry is passed and it lives through the call.
    unsafe { libc::poll(&raw mut entry, 1, millis) };
    entry.revents
}

fn unix_socket() -> io::Result<UnixStream> {
    // SAFETY: plain integers in, a new descriptor out.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    Ok(UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn connect_to(socket: &UnixStream, path: &Path) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid, empty address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    assert!(bytes.len() < address.sun_path.len(), "socket path too long: {}", path.display());
    for (slot, byte) in address.sun_path.iter_mut().zip(bytes) {
        *slot = byte.cast_signed();
    }
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: `address` is a whole sockaddr_un of `len` bytes that lives through the call.
    let done = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Words of ancillary space for `count` descriptors, with its header.
fn control_words(count: usize) -> usize {
    // SAFETY: a computation on its argument only.
    let bytes = unsafe { libc::CMSG_SPACE((count * size_of::<RawFd>()) as u32) };
    (bytes as usize).div_ceil(8)
}

/// Ancillary data that carries `fds`; empty where there are none.
fn control_block(fds: &[RawFd]) -> Vec<u64> {
    if fds.is_empty() {
        return Vec::new();
    }
    let bytes = size_of_val(fds);
    // SAFETY: a computation on its argument only.
    let len = unsafe { libc::CMSG_LEN(bytes as u32) };
    let mut raw = Vec::with_capacity(control_words(fds.len()) * 8);
    raw.extend((len as usize).to_ne_bytes());
    raw.extend(libc::SOL_SOCKET.to_ne_bytes());
    raw.extend(libc::SCM_RIGHTS.to_ne_bytes());
    fds.iter().for_each(|fd| raw.extend(fd.to_ne_bytes()));
    raw.resize(control_words(fds.len()) * 8, 0);
    raw.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("chunks of eight"))).collect()
}

fn message_header(part: &mut libc::iovec, control: &mut [u64]) -> libc::msghdr {
    // SAFETY: all-zero bytes are a valid, empty message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    if !control.is_empty() {
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(control);
    }
    message
}

fn received_fds(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut out = Vec::new();
    // SAFETY: the kernel filled `message`, whose control buffer is still alive.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !at.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give null or a whole header inside the control buffer.
        let header = unsafe { at.read_unaligned() };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: `at` is a header inside the control buffer.
            let data: *const RawFd = unsafe { libc::CMSG_DATA(at) }.cast();
            // SAFETY: a computation on its argument only.
            let overhead = unsafe { libc::CMSG_LEN(0) } as usize;
            for index in 0..(header.cmsg_len - overhead) / size_of::<RawFd>() {
                // SAFETY: cmsg_len says that this many descriptors follow the header.
                let slot = unsafe { data.add(index) };
                // SAFETY: as above; the kernel gives no alignment promise, so the read makes none.
                let fd = unsafe { slot.read_unaligned() };
                // SAFETY: a descriptor that came with a message belongs to its receiver alone.
                out.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: `at` is a header inside the control buffer of `message`.
        at = unsafe { libc::CMSG_NXTHDR(message, at) };
    }
    out
}

/// More descriptors than any back-end sends with one message.
const MAX_FDS: usize = 16;
/// Longer than any reply of a block back-end, so that a wild size costs no memory.
const MAX_REPLY: u32 = 64 << 10;
