//! The socket on which frontends connect: makes it, or takes one that listens already.

use std::os::fd::OwnedFd;

use block_core::base::{Error, Result, ResultExt};
use rustix::net::AddressFamily;

use super::options::Address;
use crate::process::socket::Listener;

/// See the module's head.
pub(super) fn open(address: &Address) -> Result<Listener> {
    match address {
        Address::Unix(path) => Listener::bind(path, false),
        Address::Fd(word) => {
            let descriptor = inherited(word)?;
            rustix::io::ioctl_fionbio(&descriptor, true).doing(|| "preparing the export's socket")?;
            Ok(Listener { descriptor, file: None })
        }
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

    fn at(path: &Path) -> Result<Listener> {
        open(&Address::Unix(path.to_owned()))
    }

    #[test]
    fn a_socket_comes_and_goes_with_its_export() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = at(&path).unwrap();
        assert!(at(&path).is_err(), "somebody listens");
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn an_inherited_descriptor_has_to_listen() {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixListener::bind(directory.path().join("s")).unwrap();
        let opens = |word: &str| open(&Address::Fd(word.to_owned())).is_ok();
        assert!(opens(&socket.as_raw_fd().to_string()));
        let (one, _two) = UnixStream::pair().unwrap();
        assert!(!opens(&one.as_raw_fd().to_string()));
        assert!(!opens("-1") && !opens("nobody"));
    }
}
