//! The socket on which frontends connect: makes it, or takes one that listens already.

use std::os::fd::OwnedFd;

use block_core::base::{Error, Result, ResultExt};
use rustix::net::AddressFamily;

use super::options::Address;
use crate::process::socket::Listener;

/// See the module's head.
pub(super) async fn open(address: &Address) -> Result<Listener> {
    match address {
        Address::Unix(path) => Listener::bind(path, false).await,
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
    if !can_be_called(&fd) {
        return Err(Error::new(format!("File descriptor '{word}' is not a listening unix socket")));
    }
    Ok(fd)
}

fn can_be_called(fd: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_acceptconn(fd) == Ok(true)
        && rustix::net::sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use block_core::rt::run_control;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::Path;

    fn at(path: &Path) -> Result<Listener> {
        let address = Address::Unix(path.to_owned());
        run_control(|_| open(&address))
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
        let number = socket.as_raw_fd().to_string();
        assert!(can_be_called(&socket.into()));
        let (one, _two) = UnixStream::pair().unwrap();
        assert!(!can_be_called(&one.into()));
        let opens = |word: &str| inherited(word).is_ok();
        assert!(!opens("-1") && !opens("nobody") && !opens(&number), "nobody passed us these");
    }
}
