//! Character devices, as far as monitors need them: a unix socket that we listen on or connect to, one that was passed
//! to us, stdin and stdout, or nothing at all.
//!
//! TCP is refused, and so are abstract sockets: QMP knows no password, and whoever reaches them would own every disk.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use block_core::base::{Error, Result, ResultExt};
use block_core::rt::{Local, SharedFd};
use qmp::Qapi;
use qmp::schema::Value;
use rustix::net::{SocketFlags, accept_with, sockopt};
use serde_json::json;

use super::stdio::{self, Stdio};
use crate::process::socket::{Listener, SocketFile, connect_to};
use crate::process::{background, inherited};

/// The argument of `--chardev`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChardevOptions {
    /// The name by which a monitor refers to it.
    pub id: String,
    /// What it is.
    #[qapi(flatten)]
    pub backend: ChardevBackend,
}

/// What a character device is.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(union, tag = "backend", tag_name = "ChardevBackendKind")]
pub enum ChardevBackend {
    /// A unix socket.
    Socket(SocketChardev),
    /// Nothing is ever read, and what is written is gone.
    Null(NullChardev),
    /// Stdin and stdout.
    Stdio(StdioChardev),
}

/// A unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
pub struct SocketChardev {
    /// Where to listen or connect.
    pub path: Option<String>,
    /// A socket that was passed to us: its number, or the name that systemd gave it. It replaces `path`.
    pub fd: Option<String>,
    /// Listen, instead of connecting.
    #[qapi(default = false)]
    pub server: bool,
    /// Wait for the first client before anything else is set up. With `server=on` it is on unless it is said.
    pub wait: Option<bool>,
    /// Refused: QMP over TCP would be open to everybody who reaches the port.
    pub host: Option<String>,
    /// Refused, as `host` is.
    pub port: Option<String>,
    /// Refused where it is on: a socket that is no file lets everybody in.
    #[qapi(rename = "abstract", default = false)]
    pub is_abstract: bool,
    /// Without effect: it says how the name of an abstract socket is written.
    #[qapi(default = true)]
    pub tight: bool,
    /// Without effect, as with every unix socket: it is for TCP.
    pub delay: Option<bool>,
    /// Without effect, as `delay` is.
    pub nodelay: Option<bool>,
    /// Refused unless it is 0.
    #[qapi(default = 0)]
    pub reconnect: u32,
    /// Refused unless it is 0.
    #[qapi(default = 0)]
    pub reconnect_ms: u32,
    /// Refused where it is on.
    #[qapi(default = false)]
    pub telnet: bool,
    /// Refused where it is on.
    #[qapi(default = false)]
    pub websocket: bool,
    /// Refused where it is on: every monitor has its sessions.
    #[qapi(default = false)]
    pub mux: bool,
    /// Refused.
    pub tls_creds: Option<String>,
}

/// Nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
pub struct NullChardev {
    /// Refused where it is on.
    #[qapi(default = false)]
    pub mux: bool,
}

/// Stdin and stdout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
pub struct StdioChardev {
    /// Without effect: keys that make signals keep doing so.
    #[qapi(default = true)]
    pub signal: bool,
    /// Refused where it is on.
    #[qapi(default = false)]
    pub mux: bool,
}

/// An element of `query-chardev`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ChardevInfo {
    /// The chardev's id.
    pub label: String,
    /// What it is, for people.
    pub filename: String,
    /// Whether somebody serves it.
    pub frontend_open: bool,
}

/// All character devices.
#[derive(Default)]
pub struct Chardevs(RefCell<Vec<Rc<Chardev>>>);

/// One character device.
pub struct Chardev {
    options: ChardevOptions,
    peer: Peer,
    /// The client that was waited for, until somebody serves it.
    first: RefCell<Option<SharedFd>>,
    /// What is to be undone at the end.
    kept: RefCell<Option<Kept>>,
    claimed: Cell<bool>,
    connections: Cell<i32>,
}

/// Where clients come from.
pub(super) enum Peer {
    /// They connect.
    Listening(SharedFd),
    /// There is one, and it is connected.
    Connected(SharedFd),
    /// There is never one.
    Nobody,
}

/// What a character device leaves behind if it is not undone.
enum Kept {
    /// Its file.
    File { _file: SocketFile },
    /// Bytes on their way to stdout.
    Stdio { _stdio: Stdio },
}

impl ChardevOptions {
    /// What `--qmp PATH` and `--qmp fd:NAME` stand for.
    pub fn of_short_form(id: String, place: &str) -> Self {
        let fd = place.strip_prefix("fd:").map(str::to_owned);
        let path = fd.is_none().then(|| place.to_owned());
        let socket = SocketChardev { path, fd, server: true, wait: Some(false), ..SocketChardev::default() };
        Self { id, backend: ChardevBackend::Socket(socket) }
    }

    /// `server` and `nowait` without a value are an old way to write `server=on` and `wait=off`, and still common.
    pub fn modernised(text: &str) -> String {
        let modern = |word: &str| match word {
            "server" | "wait" | "delay" | "nodelay" => format!("{word}=on"),
            "noserver" | "nowait" => format!("{}=off", &word[2..]),
            other => other.to_owned(),
        };
        let mut words = text.split(',');
        let first = words.next().unwrap_or_default().to_owned();
        std::iter::once(first).chain(words.map(modern)).collect::<Vec<_>>().join(",")
    }
}

impl Chardevs {
    /// Opens a character device. One that is to wait for its first client is waited for.
    pub async fn add(&self, local: &Local, options: ChardevOptions) -> Result<()> {
        self.check(&options)?;
        let (peer, kept) = options.backend.open().await?;
        let chardev = Rc::new(Chardev {
            options,
            peer,
            first: RefCell::default(),
            kept: RefCell::new(kept),
            claimed: Cell::new(false),
            connections: Cell::new(0),
        });
        self.0.borrow_mut().push(chardev.clone());
        let first = chardev.wait(local).await?;
        *chardev.first.borrow_mut() = first;
        Ok(())
    }

    fn check(&self, options: &ChardevOptions) -> Result<()> {
        if !block_core::catalog::is_identifier(&options.id) {
            return Err(Error::new("Parameter 'id' expects an identifier"));
        }
        if self.find(&options.id).is_some() {
            return Err(Error::new(format!("Chardev with id '{}' already exists", options.id)));
        }
        let is_stdio = |options: &ChardevOptions| matches!(options.backend, ChardevBackend::Stdio(_));
        if is_stdio(options) && self.0.borrow().iter().any(|other| is_stdio(&other.options)) {
            return Err(Error::new("Another character device has stdin and stdout"));
        }
        Ok(())
    }

    /// The chardev of this id.
    pub fn find(&self, id: &str) -> Option<Rc<Chardev>> {
        self.0.borrow().iter().find(|chardev| chardev.options.id == id).cloned()
    }

    /// An id that begins with `prefix` and that nobody has.
    pub fn free_id(&self, prefix: &str) -> String {
        let mut ids = (0_u32..).map(|number| format!("{prefix}{number}"));
        ids.find(|id| self.find(id).is_none()).unwrap_or_default()
    }

    /// For `query-chardev`.
    pub fn report(&self) -> Vec<ChardevInfo> {
        self.0.borrow().iter().map(|chardev| chardev.report()).collect()
    }

    /// All of them, in the order in which they were made.
    pub fn all(&self) -> Vec<Rc<Chardev>> {
        self.0.borrow().clone()
    }

    /// Forgets all of them, and undoes what they leave behind, although monitors may still hold them.
    pub fn clear(&self) {
        for chardev in self.0.take() {
            chardev.kept.take();
        }
    }
}

impl ChardevBackend {
    async fn open(&self) -> Result<(Peer, Option<Kept>)> {
        let mux = match self {
            Self::Socket(socket) => socket.mux,
            Self::Null(null) => null.mux,
            Self::Stdio(stdio) => stdio.mux,
        };
        if mux {
            return Err(Error::new("mux=on is not there: every client of a monitor has a session of its own"));
        }
        match self {
            Self::Socket(socket) => socket.open().await,
            Self::Null(_) => Ok((Peer::Nobody, None)),
            Self::Stdio(_) if background::is_background() => {
                Err(Error::new("stdin and stdout are not there with --daemonize"))
            }
            Self::Stdio(_) => {
                let (stream, stdio) = stdio::open()?;
                Ok((Peer::Connected(stream), Some(Kept::Stdio { _stdio: stdio })))
            }
        }
    }
}

impl SocketChardev {
    async fn open(&self) -> Result<(Peer, Option<Kept>)> {
        if self.host.is_some() || self.port.is_some() {
            return Err(Error::new("A QMP socket over TCP would be open to everybody: use path= or fd="));
        }
        if self.is_abstract {
            return Err(Error::new("An abstract QMP socket would be open to everybody: use path= or fd="));
        }
        let missing = [
            (self.reconnect > 0, "reconnect"),
            (self.reconnect_ms > 0, "reconnect-ms"),
            (self.telnet, "telnet"),
            (self.websocket, "websocket"),
            (self.tls_creds.is_some(), "tls-creds"),
        ];
        if let Some((_, name)) = missing.iter().find(|(asked, _)| *asked) {
            return Err(Error::new(format!("'{name}' is not there yet")));
        }
        if !self.server && self.wait.is_some() {
            return Err(Error::new("'wait' option is incompatible with socket in client connect mode"));
        }
        match (&self.path, &self.fd) {
            (Some(path), None) => self.open_path(Path::new(path)).await,
            (None, Some(word)) => self.open_passed(word),
            (Some(_), Some(_)) => Err(Error::new("'path' and 'fd' exclude each other")),
            (None, None) => Err(Error::new("A socket needs 'path' or 'fd'")),
        }
    }

    /// QMP's `SocketAddress`.
    fn address(&self) -> Value {
        match (&self.path, &self.fd) {
            (Some(path), _) => json!({ "type": "unix", "path": path }),
            (None, fd) => json!({ "type": "fd", "str": fd.as_deref().unwrap_or_default() }),
        }
    }

    async fn open_path(&self, path: &Path) -> Result<(Peer, Option<Kept>)> {
        if !self.server {
            return Ok((Peer::Connected(connect_to(path)?), None));
        }
        let listener = Listener::bind(path, true).await?;
        Ok((Peer::Listening(Arc::new(listener.descriptor)), listener.file.map(|file| Kept::File { _file: file })))
    }

    fn open_passed(&self, word: &str) -> Result<(Peer, Option<Kept>)> {
        let descriptor = inherited::descriptor(word).doing(|| format!("Cannot use the descriptor '{word}'"))?;
        let listens = sockopt::socket_acceptconn(&descriptor)
            .map_err(|_| Error::new(format!("File descriptor '{word}' is not a socket")))?;
        if listens != self.server {
            let is = if listens { "listens" } else { "does not listen" };
            return Err(Error::new(format!("The socket '{word}' {is}, but server={}", on_off(self.server))));
        }
        rustix::io::ioctl_fionbio(&descriptor, true).doing(|| format!("Cannot use the socket '{word}'"))?;
        let descriptor = Arc::new(descriptor);
        Ok((if listens { Peer::Listening(descriptor) } else { Peer::Connected(descriptor) }, None))
    }
}

impl Chardev {
    /// The chardev's id.
    pub fn id(&self) -> &str {
        &self.options.id
    }

    /// The name of its type in the object tree.
    pub fn type_name(&self) -> &'static str {
        match self.options.backend {
            ChardevBackend::Socket(_) => SOCKET_TYPE,
            ChardevBackend::Null(_) => "chardev-null",
            ChardevBackend::Stdio(_) => "chardev-stdio",
        }
    }

    /// The properties of the chardevs of a type, with their types, besides `type`.
    pub fn properties(type_name: &str) -> &'static [(&'static str, &'static str)] {
        if type_name == SOCKET_TYPE { &[("connected", "bool"), ("addr", "SocketAddress")] } else { &[] }
    }

    /// The value of one of them.
    pub fn property(&self, name: &str) -> Option<Value> {
        let ChardevBackend::Socket(socket) = &self.options.backend else { return None };
        match name {
            "connected" => Some((self.connections.get() > 0).into()),
            "addr" => Some(socket.address()),
            _ => None,
        }
    }

    /// Makes the caller the only one that serves it.
    pub(super) fn claim(&self) -> Result<()> {
        if self.claimed.replace(true) {
            return Err(Error::new(format!("chardev '{}' is already in use", self.options.id)));
        }
        Ok(())
    }

    pub(super) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The client that is there already.
    pub(super) fn first_peer(&self) -> Option<SharedFd> {
        match &self.peer {
            Peer::Connected(stream) => Some(stream.clone()),
            Peer::Listening(_) => self.first.take(),
            Peer::Nobody => None,
        }
    }

    /// The first client, where it is to be waited for.
    async fn wait(&self, local: &Local) -> Result<Option<SharedFd>> {
        let listener = match &self.peer {
            Peer::Listening(listener) if self.waits() => listener,
            Peer::Connected(_) | Peer::Listening(_) | Peer::Nobody => return Ok(None),
        };
        tracing::info!("waiting for a client on {}", self.filename());
        loop {
            local.readable(listener).await;
            match accept_with(&**listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(stream) => return Ok(Some(Arc::new(stream))),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => return Err(Error::new(format!("Cannot take the first client: {error}"))),
            }
        }
    }

    pub(super) fn connected(&self, change: i32) {
        self.connections.set(self.connections.get() + change);
    }

    fn waits(&self) -> bool {
        matches!(&self.options.backend, ChardevBackend::Socket(socket) if socket.wait.unwrap_or(true))
    }

    fn report(&self) -> ChardevInfo {
        let label = self.options.id.clone();
        ChardevInfo { label, filename: self.filename(), frontend_open: self.claimed.get() }
    }

    fn filename(&self) -> String {
        match &self.options.backend {
            ChardevBackend::Null(_) => "null".to_owned(),
            ChardevBackend::Stdio(_) => "stdio".to_owned(),
            ChardevBackend::Socket(socket) => {
                let prefix = if self.connections.get() == 0 && socket.server { "disconnected:" } else { "" };
                let place = match (&socket.path, &socket.fd) {
                    (Some(path), _) => format!("unix:{}", PathBuf::from(path).display()),
                    (None, fd) => format!("fd:{}", fd.as_deref().unwrap_or_default()),
                };
                let server = if socket.server { ",server=on" } else { "" };
                format!("{prefix}{place}{server}")
            }
        }
    }
}

const SOCKET_TYPE: &str = "chardev-socket";

fn on_off(switch: bool) -> &'static str {
    if switch { "on" } else { "off" }
}

#[cfg(test)]
mod tests {
    use block_core::rt::run_control;
    use qmp::keyval::parse_option;

    use super::*;

    fn read(text: &str) -> qmp::Result<ChardevOptions> {
        parse_option(&ChardevOptions::modernised(text), Some("backend"))?.into_typed()
    }

    fn add(chardevs: &Chardevs, text: &str) -> Result<()> {
        let options = read(text).unwrap();
        run_control(async |local| chardevs.add(&local, options).await)
    }

    #[test]
    fn the_usual_forms_are_read() {
        let socket = |text| match read(text).unwrap().backend {
            ChardevBackend::Socket(socket) => socket,
            ChardevBackend::Null(_) | ChardevBackend::Stdio(_) => panic!("a socket was asked for"),
        };
        let modern = socket("socket,id=c,path=/run/q.sock,server=on,wait=off");
        assert_eq!(modern.path.as_deref(), Some("/run/q.sock"));
        assert_eq!((modern.server, modern.wait), (true, Some(false)));
        assert_eq!(socket("socket,id=c,path=/run/q.sock,server,nowait"), modern);
        assert_eq!(socket("socket,id=c,path=/run/q.sock,server,nowait,nodelay").nodelay, Some(true));
        assert_eq!(read("null,id=n").unwrap().backend, ChardevBackend::Null(NullChardev::default()));
        assert_eq!(read("null").unwrap_err().desc, "Parameter 'id' is missing");
        assert_eq!(read("pty,id=p").unwrap_err().desc, "Parameter 'backend' does not accept value 'pty'");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let refused = |text: &str| add(&Chardevs::default(), text).unwrap_err().to_string();
        assert!(refused("socket,id=c,host=0.0.0.0,port=4444,server=on").contains("TCP"));
        assert!(refused("socket,id=c,path=x,abstract=on,server=on").contains("everybody"));
        assert_eq!(refused("socket,id=c,path=x,reconnect=1"), "'reconnect' is not there yet");
        assert!(refused("null,id=c,mux=on").contains("mux"));
        assert!(refused("socket,id=c,path=x,wait=off").contains("'wait' option is incompatible"));
        assert!(refused("socket,id=c").contains("'path' or 'fd'"));
        assert!(refused("socket,id=1c,path=x,server=on").contains("identifier"));
        assert_eq!(refused("socket,id=c,fd=99999,server=on"), "Cannot use the descriptor '99999'");
    }

    #[test]
    fn an_id_is_used_once() {
        let chardevs = Chardevs::default();
        add(&chardevs, "null,id=n").unwrap();
        assert!(add(&chardevs, "null,id=n").is_err());
        let chardev = chardevs.find("n").unwrap();
        chardev.claim().unwrap();
        assert_eq!(chardev.claim().unwrap_err().to_string(), "chardev 'n' is already in use");
    }
}
