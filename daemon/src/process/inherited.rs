//! Descriptors that whoever started us left open for us: `fd=3`, or a name that systemd gave (`LISTEN_FDNAMES`).
//!
//! A bare number on a command line is no proof of ownership, so it is not closed and not taken over: we send it to
//! ourselves through a socket and work with the copy that arrives. The kernel then says whether it was open at all. Numbers that
//! were not open when we were started are our own descriptors', and nobody is given those.

use std::collections::BTreeSet;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg, socketpair,
};

/// Remembers which numbers are open. To be called before anything is opened.
pub fn remember() {
    PASSED.get_or_init(|| open_now().unwrap_or_default());
}

/// A copy of the descriptor of this number or systemd name.
pub fn descriptor(word: &str) -> io::Result<OwnedFd> {
    let number = number(word)?;
    if !PASSED.get().is_some_and(|passed| passed.contains(&number)) {
        let why = "it was not open when trellisd was started, and only descriptors that were passed to it can be used";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    copy(number)
}

/// What was open at the start. None of these is ever closed.
static PASSED: OnceLock<BTreeSet<RawFd>> = OnceLock::new();

fn open_now() -> io::Result<BTreeSet<RawFd>> {
    let entries = std::fs::read_dir(OPEN)?;
    let mut open: BTreeSet<RawFd> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    // The descriptor of the look itself is among them, and closed by now.
    open.retain(|number| std::fs::symlink_metadata(format!("{OPEN}/{number}")).is_ok());
    Ok(open)
}

const OPEN: &str = "/proc/self/fd";

/// The number that is meant by a number or a systemd name.
fn number(word: &str) -> io::Result<RawFd> {
    match word.parse::<RawFd>() {
        Ok(number) if number < 0 => Err(io::Error::from_raw_os_error(libc::EBADF)),
        Ok(number) => Ok(number),
        Err(_) => named(word),
    }
}

/// The name that systemd's socket unit gave to the first descriptor it passed, if it passed any.
pub fn has_name(name: &str) -> bool {
    named(name).is_ok()
}

fn named(name: &str) -> io::Result<RawFd> {
    let mut passed = sd_notify::listen_fds_with_names()?;
    let found = passed.find(|(_, given)| given == name).map(|(number, _)| number);
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no descriptor of this name was passed to us"))
}

fn copy(number: RawFd) -> io::Result<OwnedFd> {
    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let control = [ControlMessage::ScmRights(&[number])];
    sendmsg::<()>(near.as_raw_fd(), &[IoSlice::new(&[0])], &control, MsgFlags::empty(), None)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(&far, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let arrived = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    arrived.ok_or_else(|| io::Error::from_raw_os_error(libc::EMFILE))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_copy_is_the_same_socket_and_the_original_stays() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let mut copy = UnixStream::from(copy(ours.as_raw_fd()).unwrap());
        copy.write_all(b"a").unwrap();
        ours.write_all(b"b").unwrap();
        let mut both = [0; 2];
        theirs.read_exact(&mut both).unwrap();
        assert_eq!(&both, b"ab");
    }

    #[test]
    fn what_was_not_passed_is_refused() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let refused = descriptor(&ours.as_raw_fd().to_string()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(copy(1_000_000).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(descriptor("-1").unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(descriptor("nobody").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
