//! The protocol engine of one session: a `VhostUserDaemon` behind a connection that only the session has.
//!
//! The engine wants a thread of its own, so the session lives on that one, and a message is passed on without waking
//! anybody: the session works in a callback of the engine (`Backend::set_config`), leaves in the engine's socket what the
//! engine is to do, behind it a request that makes the engine call back ([`your_turn`]), and returns.
//!
//! The engine also wants to accept its peer. So there is a listening socket with room for one, which is taken before the
//! engine accepts: nobody else can have connected.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::backend::{Backend, PROTOCOL_FEATURES};
use super::device::Device;
use super::message::Kind;
use super::session::{Session, Waiting};
use super::vring::announce;
use super::wire::{Message, WireError, receive_reply, send};

/// See the module's head. Dropping it lets go of the engine; its thread ends when the session's turn does.
pub(super) struct Engine {
    stream: UnixStream,
    _daemon: VhostUserDaemon<Backend>,
}

impl Engine {
    /// Starts an engine for the device, on a new thread of this name, with what `session` makes of it. Does not wait.
    pub(super) fn start(name: String, device: &Arc<Device>, session: impl FnOnce(Self) -> Session) -> io::Result<()> {
        let waiting = Waiting::default();
        announce(device.rings());
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let daemon = VhostUserDaemon::new(name, Backend::new(device.clone(), waiting.clone()), memory);
        // Where it failed, rings are left over, and nobody else may keep a session's queues alive.
        announce(&[]);
        let mut daemon = daemon.map_err(|error| io::Error::other(error.to_string()))?;
        let (listener, stream) = private_pair()?;
        open(&stream)?;
        // The thread that starts here asks for its session, and waits for it.
        let mut waiting = waiting.lock();
        let started = daemon.start(&mut Listener::from(listener));
        started.map_err(|error| io::Error::other(error.to_string()))?;
        *waiting = Some(session(Self { stream, _daemon: daemon }));
        Ok(())
    }

    /// Has the engine do this as soon as the session's turn is over; then it is the session's turn again. What the engine
    /// does not take ends its thread, and with it the session. Only the first message has descriptors.
    pub(super) fn ask(&self, mut messages: Vec<Message>) -> Result<(), WireError> {
        // Nobody could read an acknowledgement before the next turn, which says the same.
        messages.iter_mut().for_each(|message| message.need_reply = false);
        messages.push(your_turn());
        // In one piece: nobody makes room in the socket meanwhile.
        send(&self.stream, &messages)
    }

    /// What the engine replied to the last thing that it was asked.
    pub(super) fn reply(&self) -> Result<Vec<u8>, WireError> {
        Ok(receive_reply(&self.stream)?.ok_or(WireError::Cut)?.body)
    }
}

/// All protocol features, whatever the frontend acks (the gates are in the filter), and the session's first turn.
fn open(stream: &UnixStream) -> io::Result<()> {
    let features = plain(Kind::SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES.to_ne_bytes().to_vec());
    let opening = [features, plain(Kind::SET_OWNER, Vec::new()), your_turn()];
    send(stream, &opening).map_err(|error| io::Error::other(error.to_string()))
}

/// A change of the config space that is none: SET_CONFIG of one byte. Frontends' own never get here.
fn your_turn() -> Message {
    let [offset, size, flags] = [0u32, 1, 0].map(u32::to_ne_bytes);
    plain(Kind::SET_CONFIG, [&offset[..], &size, &flags, &[0]].concat())
}

fn plain(kind: Kind, body: Vec<u8>) -> Message {
    Message { request: kind as u32, need_reply: false, body, fds: Vec::new() }
}

/// A listening socket and its only peer. The kernel picks an abstract name, so no file has to come and go.
fn private_pair() -> io::Result<(UnixListener, UnixStream)> {
    let socket = |flags| rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let listener = socket(SocketFlags::CLOEXEC)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed())?;
    rustix::net::listen(&listener, ROOM_FOR_ONE)?;
    // Without waiting: whoever was faster has taken the only place, and this fails.
    let stream = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    rustix::net::connect(&stream, &rustix::net::getsockname(&listener)?)?;
    rustix::io::ioctl_fionbio(&stream, false)?;
    Ok((listener.into(), stream.into()))
}

/// A backlog of none: Linux lets one in.
const ROOM_FOR_ONE: i32 = 0;

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;

    use super::*;

    #[test]
    fn nobody_else_gets_the_engine_s_connection() {
        let (listener, ours) = private_pair().unwrap();
        let name = listener.local_addr().unwrap();
        assert!(name.as_abstract_name().is_some(), "no file is left behind: {name:?}");
        let late =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        let refused = rustix::net::connect(&late, &rustix::net::getsockname(&listener).unwrap());
        assert_eq!(refused, Err(rustix::io::Errno::AGAIN), "there is room for one");
        let (accepted, _) = listener.accept().unwrap();
        io::Write::write_all(&mut &ours, b"x").unwrap();
        let mut byte = [0];
        io::Read::read_exact(&mut &accepted, &mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}
