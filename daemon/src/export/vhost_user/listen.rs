//! The socket on which frontends connect: makes it, or takes one that listens already.
//!
//! A path is taken only where nothing is, or where a socket of our own user lies on which nobody listens any more
//! (left by a process that was killed). It is removed at the end only if it is still the one that was made.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block_core::base::{Error, Result, ResultExt};
use block_core::rt::SharedFd;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::options::Address;

/// Bytes of a socket's path at the most (`sun_path`, with its terminator).
const MAX_PATH: usize = 107;

/// A listening socket, non-blocking.
pub(super) struct Listening {
    socket: SharedFd,
    /// Removed when this is dropped.
    _file: Option<SocketFile>,
}

struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Listening {
    /// See the module's head.
    pub(super) fn open(address: &Address) -> Result<Self> {
        let (socket, file) = match address {
            Address::Unix(path) => bind(path).map(|(socket, file)| (socket, Some(file)))?,
            Address::Fd(word) => (inherited(word)?, None),
        };
        rustix::io::ioctl_fionbio(&socket, true).doing(|| "preparing the export's socket")?;
        Ok(Self { socket: Arc::new(socket), _file: file })
    }

    /// The next frontend, `WouldBlock` where there is none yet.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        Ok(rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC)?.into())
    }

    /// To wait for the next frontend with.
    pub(super) fn socket(&self) -> &SharedFd {
        &self.socket
    }
}

fn bind(path: &Path) -> Result<(OwnedFd, SocketFile)> {
    let name = path.display();
    if path.as_os_str().len() > MAX_PATH {
        return Err(Error::new(format!("The socket path '{name}' is longer than {MAX_PATH} bytes")));
    }
    make_room(path)?;
    let socket = UnixListener::bind(path).doing(|| format!("Could not listen on '{name}'"))?;
    let made = std::fs::symlink_metadata(path).doing(|| format!("Could not look at '{name}'"))?;
    Ok((socket.into(), SocketFile { path: path.to_owned(), identity: (made.dev(), made.ino()) }))
}

/// Removes a socket that a dead process of ours has left.
fn make_room(path: &Path) -> Result<()> {
    let name = path.display();
    let Ok(there) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !there.file_type().is_socket() {
        return Err(Error::new(format!("'{name}' exists and is not a socket")));
    }
    if there.uid() != rustix::process::geteuid().as_raw() {
        return Err(Error::new(format!("The socket '{name}' belongs to somebody else")));
    }
    if is_deserted(path) {
        return std::fs::remove_file(path).doing(|| format!("Could not remove the stale socket '{name}'"));
    }
    Err(Error::new(format!("Somebody listens on '{name}' already")))
}

/// True where nobody listens on the socket at `path`. Does not wait: where somebody listens and does not look, a
/// connection would wait for ever, and this is the control thread.
fn is_deserted(path: &Path) -> bool {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let Ok(probe) = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None) else {
        return false;
    };
    let Ok(address) = SocketAddrUnix::new(path) else { return false };
    rustix::net::connect(&probe, &address) == Err(rustix::io::Errno::CONNREFUSED)
}

/// A copy of a descriptor that was passed to us; the original stays open for whoever counts on its number.
fn inherited(word: &str) -> Result<OwnedFd> {
    let fd = crate::process::inherited::descriptor(word).doing(|| format!("Cannot use the descriptor '{word}'"))?;
    let listens = rustix::net::sockopt::socket_acceptconn(&fd) == Ok(true);
    let unix = rustix::net::sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX);
    if !listens || !unix {
        return Err(Error::new(format!("File descriptor '{word}' is not a listening unix socket")));
    }
    Ok(fd)
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |there: std::fs::Metadata| (there.dev(), there.ino()) == self.identity;
        if std::fs::symlink_metadata(&self.path).is_ok_and(ours) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn open(path: &Path) -> Result<Listening> {
        Listening::open(&Address::Unix(path.to_owned()))
    }

    #[test]
    fn a_socket_comes_and_goes_with_its_export() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = open(&path).unwrap();
        assert!(open(&path).is_err(), "somebody listens");
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_gives_way_and_nothing_else_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(open(&path).unwrap());
        std::fs::write(&path, "precious").unwrap();
        assert!(open(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn somebody_else_s_socket_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let ours = open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn a_listener_that_does_not_look_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let flags = SocketFlags::CLOEXEC;
        let busy = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::net::bind(&busy, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&busy, 0).unwrap();
        let _fills_the_backlog = UnixStream::connect(&path).unwrap();
        let (done, waits) = std::sync::mpsc::channel();
        let asked = path.clone();
        std::thread::Builder::new().spawn(move || done.send(open(&asked).is_err())).unwrap();
        assert_eq!(waits.recv_timeout(std::time::Duration::from_secs(10)), Ok(true));
        assert!(path.exists());
    }

    #[test]
    fn impossible_paths_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        assert!(open(&directory.path().join("x".repeat(200))).is_err());
        assert!(open(&directory.path().join("missing/s")).is_err());
    }

    #[test]
    fn an_inherited_descriptor_has_to_listen() {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixListener::bind(directory.path().join("s")).unwrap();
        let opens = |word: &str| Listening::open(&Address::Fd(word.to_owned())).is_ok();
        assert!(opens(&socket.as_raw_fd().to_string()));
        let (one, _two) = UnixStream::pair().unwrap();
        assert!(!opens(&one.as_raw_fd().to_string()));
        assert!(!opens("-1") && !opens("nobody"));
    }
}
