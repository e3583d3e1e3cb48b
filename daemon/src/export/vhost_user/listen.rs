//! The socket on which frontends connect: makes it, or takes one that listens already.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use block_core::base::{Error, Result, ResultExt};
use block_core::rt::SharedFd;
use rustix::net::AddressFamily;

use super::options::Address;
use crate::process::socket::Listener;

/// A listening socket, non-blocking. Dropping it removes the file that was made for it.
pub(super) struct Listening(Listener);

impl Listening {
    /// See the module's head.
    pub(super) fn open(address: &Address) -> Result<Self> {
        let listener = match address {
            Address::Unix(path) => Listener::bind(path, false)?,
            Address::Fd(word) => {
                let socket = inherited(word)?;
                rustix::io::ioctl_fionbio(&socket, true).doing(|| "preparing the export's socket")?;
                Listener { descriptor: Arc::new(socket), file: None }
            }
        };
        Ok(Self(listener))
    }

    /// To let frontends in by.
    pub(super) fn socket(&self) -> &SharedFd {
        &self.0.descriptor
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::Path;

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
