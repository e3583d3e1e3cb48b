//! The seam between us and the kernel: where a call that a signal ended is made again, and where tests have calls fail.
//!
//! Everything that can fail passes here: system calls of drivers in [`system_call`], operations where `inflight` and
//! `local` start them. Faults exist only with the feature `fault`, which tests turn on and nothing else does: without
//! it the questions below have constant answers, and nothing of them is left in the data path.

#[cfg(feature = "fault")]
mod armed;
#[cfg(not(feature = "fault"))]
mod unarmed;

#[cfg(feature = "fault")]
use self::armed as seam;
#[cfg(feature = "fault")]
pub use self::armed::{Entered, Fault, Faults, Plan, Site};
#[cfg(not(feature = "fault"))]
use self::unarmed as seam;

pub(super) use self::seam::{inherited, strike, strike_direct};

/// Makes a system call, again if a signal ended it; not for ever.
pub fn system_call<T, E: SystemError>(mut call: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    for _ in 1..TRIES {
        match once(&mut call) {
            Err(error) if error.errno() == libc::EINTR => {}
            answer => return answer,
        }
    }
    once(&mut call)
}

/// How often something is tried that the kernel could not do just now.
pub const TRIES: u32 = 64;

/// An error that a system call ends with, as several crates have it.
pub trait SystemError {
    /// From a positive errno.
    fn from_errno(errno: i32) -> Self;
    /// The positive errno.
    fn errno(&self) -> i32;
}

impl SystemError for std::io::Error {
    fn from_errno(errno: i32) -> Self {
        Self::from_raw_os_error(errno)
    }
    fn errno(&self) -> i32 {
        self.raw_os_error().unwrap_or(libc::EIO)
    }
}

impl SystemError for rustix::io::Errno {
    fn from_errno(errno: i32) -> Self {
        Self::from_raw_os_error(errno)
    }
    fn errno(&self) -> i32 {
        self.raw_os_error()
    }
}

impl SystemError for nix::errno::Errno {
    fn from_errno(errno: i32) -> Self {
        Self::from_raw(errno)
    }
    fn errno(&self) -> i32 {
        *self as i32
    }
}

fn once<T, E: SystemError>(call: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    seam::strike_call().map_or_else(call, |errno| Err(E::from_errno(errno)))
}

#[cfg(test)]
mod tests {
    use super::system_call;
    use std::io;

    fn interrupted(times: usize) -> impl FnMut() -> io::Result<usize> {
        let mut made = 0;
        move || {
            made += 1;
            if made <= times { Err(io::Error::from_raw_os_error(libc::EINTR)) } else { Ok(made) }
        }
    }

    #[test]
    fn an_interrupted_call_is_made_again_and_not_for_ever() {
        assert_eq!(system_call(interrupted(3)).unwrap(), 4);
        assert_eq!(system_call(interrupted(1000)).unwrap_err().raw_os_error(), Some(libc::EINTR));
    }
}
