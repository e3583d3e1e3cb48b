//! The protocol engine of one session: a `VhostUserDaemon` behind a connection that only the message filter has.
//!
//! The engine wants to accept its peer itself. So there is a socket in a directory that only we can enter, which is
//! connected to, and removed, before the engine accepts: nobody else can ever have connected.

use std::cell::Cell;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::backend::{Backend, PROTOCOL_FEATURES};
use super::device::Device;
use super::message::{Kind, u64_at};
use super::vring::announce;
use super::wire::{Message, WireError, receive_reply, send};

/// See the module's head.
pub(super) struct Engine {
    /// `None` once it was told to end.
    stream: Option<UnixStream>,
    /// The reply to the opening is still to be read: the engine's thread starts while the frontend goes on.
    opening: Cell<bool>,
    daemon: VhostUserDaemon<Backend>,
}

impl Engine {
    /// A new engine for the device, ready for whatever the filter lets through. Its thread gets this name.
    pub(super) fn start(name: &str, device: &Arc<Device>) -> io::Result<Self> {
        announce(device.rings());
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let daemon = VhostUserDaemon::new(name.to_owned(), Backend(device.clone()), memory);
        // Where it failed, rings are left over, and nobody else may keep a session's queues alive.
        announce(&[]);
        let daemon = daemon.map_err(|error| io::Error::other(error.to_string()))?;
        let (listener, stream) = private_pair()?;
        let mut engine = Self { stream: Some(stream), opening: Cell::new(true), daemon };
        let started = engine.daemon.start(&mut Listener::from(listener));
        started.map_err(|error| io::Error::other(error.to_string()))?;
        engine.negotiate().map_err(|error| io::Error::other(error.to_string()))?;
        Ok(engine)
    }

    /// Sends a request and gives the body of its reply.
    pub(super) fn ask(&self, message: &Message) -> Result<Vec<u8>, WireError> {
        let stream = self.stream();
        send(stream, message)?;
        if self.opening.replace(false) {
            receive_reply(stream)?.ok_or(WireError::Cut)?;
        }
        Ok(receive_reply(stream)?.ok_or(WireError::Cut)?.body)
    }

    /// Sends a request that has no reply of its own. `false` where the engine did not take it: it has ended then.
    pub(super) fn tell(&self, message: &mut Message) -> Result<bool, WireError> {
        message.need_reply = true;
        let answer = self.ask(message)?;
        Ok(answer.len() == 8 && u64_at(&answer, 0) == 0)
    }

    /// Sends a request and does not wait: the engine takes it before whatever is sent next.
    pub(super) fn queue(&self, message: &mut Message) -> Result<(), WireError> {
        message.need_reply = false;
        send(self.stream(), message)
    }

    /// All protocol features, whatever the frontend acks: the gates are in the filter.
    fn negotiate(&self) -> Result<(), WireError> {
        let plain = |kind: Kind, body: Vec<u8>| Message {
            request: kind as u32,
            need_reply: false,
            body,
            fds: Vec::<OwnedFd>::new(),
        };
        // It takes acknowledgements as agreed on only after it was asked for its features.
        send(self.stream(), &plain(Kind::GET_FEATURES, Vec::new()))?;
        send(self.stream(), &plain(Kind::SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES.to_ne_bytes().to_vec()))?;
        send(self.stream(), &plain(Kind::SET_OWNER, Vec::new()))
    }

    fn stream(&self) -> &UnixStream {
        self.stream.as_ref().expect("there until it is dropped")
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        drop(self.stream.take());
        // It ends with "disconnected", which is what was asked for.
        let _ = self.daemon.wait();
    }
}

fn private_pair() -> io::Result<(UnixListener, UnixStream)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let serial = NEXT.fetch_add(1, Ordering::Relaxed);
    let directory = private_root().join(format!(".trellisd-{}-{serial}", std::process::id()));
    // Fails where it is there already, whoever made it.
    DirBuilder::new().mode(0o700).create(&directory)?;
    let path = directory.join("engine");
    let pair = UnixListener::bind(&path).and_then(|listener| Ok((listener, UnixStream::connect(&path)?)));
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir(&directory);
    pair
}

fn private_root() -> PathBuf {
    // systemd may name several, separated by colons.
    let runtime = std::env::var("RUNTIME_DIRECTORY").unwrap_or_default();
    match runtime.split(':').next() {
        Some(first) if !first.is_empty() => first.into(),
        _ => std::env::temp_dir(),
    }
}
