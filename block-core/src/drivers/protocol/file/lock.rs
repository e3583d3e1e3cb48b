//! Byte-range locks that tell other programs what this node does with the image: QEMU's protocol, so that either
//! refuses the other's image.
//!
//! A shared lock on byte 100 + *i* says "I use permission *i*"; on byte 200 + *i*, "I bear no other user of it". They
//! are locks of the open file description, on a descriptor of their own: two nodes of one process that have the same
//! file are strangers to each other, as two processes are, and closing any other descriptor loses nothing. The price: where
//! a network file system's server has forgotten a lock, the kernel stops nobody who moves data through another descriptor.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::options::Locking;
use crate::base::{Error, Result, ResultExt};
use crate::graph::{PermSet, Perms};
use crate::rt::system_call;

/// What one node tells the world. All calls may wait, for a network file system.
#[derive(Debug)]
pub(super) struct Locks {
    fd: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    held: Perms,
    /// How many configurations have claimed the locks so far; the last one has them.
    claims: u64,
    /// The file system cannot lock, and `locking` was `auto`.
    impossible: bool,
}

/// A configuration's right to the locks. They are given back when the last configuration that wants them is gone,
/// whether it was replaced by one that does not or never came into force. One that lingers in an idle thread's view
/// gives back nothing of what a later one has claimed.
#[derive(Debug)]
pub(super) struct Claim {
    locks: Arc<Locks>,
    number: u64,
}

impl Claim {
    /// Nothing is locked yet.
    pub(super) fn new(locks: Arc<Locks>) -> Self {
        let number = {
            let mut state = locks.state();
            state.claims += 1;
            state.claims
        };
        Self { locks, number }
    }
}

impl std::ops::Deref for Claim {
    type Target = Locks;
    fn deref(&self) -> &Locks {
        &self.locks
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.locks.state();
        if state.claims == self.number {
            self.locks.give_back(&mut state, Perms::IDLE);
        }
    }
}

/// First byte of "I use".
const USES: i64 = 100;
/// First byte of "I bear no other".
const BEARS_NOT: i64 = 200;

impl Locks {
    /// `fd`: open for reading, and nobody else's.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd, state: Mutex::new(State { held: Perms::IDLE, claims: 0, impossible: false }) }
    }

    /// Takes what `perms` needs on top of what is held, or nothing.
    pub(super) fn tighten(&self, perms: Perms, locking: Locking, filename: &str) -> Result<()> {
        let mut state = self.state();
        if locking == Locking::Off || (locking == Locking::Auto && state.impossible) {
            return Ok(());
        }
        let held = state.held;
        let wanted = held.and(perms);
        let refused = self.acquire(held, wanted).and_then(|()| self.refusal(wanted));
        if refused == Ok(None) {
            (state.held, state.impossible) = (wanted, false);
            return Ok(());
        }
        self.release(wanted, held);
        match refused {
            Ok(refusal) => {
                let error = Error::new(format!("Is another process using the image [{filename}]?"));
                Err(error).doing(|| refusal.unwrap_or_default())
            }
            Err(errno) if locking == Locking::Auto && cannot_lock(errno) => {
                tracing::warn!("'{filename}' is not locked: its file system cannot do it ({})", errno.desc());
                state.impossible = true;
                Ok(())
            }
            Err(errno) => Err(Error::new(errno.desc())).doing(|| format!("Failed to lock '{filename}'")),
        }
    }

    /// Gives back what `perms` does not need. What is not held is not taken.
    pub(super) fn relax(&self, perms: Perms) {
        self.give_back(&mut self.state(), perms);
    }

    fn give_back(&self, state: &mut State, perms: Perms) {
        let kept = Perms { uses: state.held.uses & perms.uses, shares: state.held.shares | perms.shares };
        self.release(state.held, kept);
        state.held = kept;
    }

    fn acquire(&self, from: Perms, to: Perms) -> Result<(), Errno> {
        let bytes = bytes(to);
        bytes.filter(|byte| !held(from, *byte)).try_for_each(|byte| self.set(byte, libc::F_RDLCK))
    }

    fn release(&self, from: Perms, to: Perms) {
        for byte in bytes(from).filter(|byte| !held(to, *byte)) {
            // Unlocking a byte of a file that is open cannot fail; should it, the lock goes with the descriptor.
            let _ = self.set(byte, libc::F_UNLCK);
        }
    }

    /// What others do not agree to. Ours are in place already, so that of two who do this at once at least one is refused.
    fn refusal(&self, wanted: Perms) -> Result<Option<String>, Errno> {
        for (bit, name) in wanted.uses.bits() {
            if self.is_taken(BEARS_NOT + i64::from(bit))? {
                return Ok(Some(format!("Failed to get \"{name}\" lock")));
            }
        }
        for (bit, name) in PermSet::ALL.without(wanted.shares).bits() {
            if self.is_taken(USES + i64::from(bit))? {
                return Ok(Some(format!("Failed to get shared \"{name}\" lock")));
            }
        }
        Ok(None)
    }

    fn set(&self, byte: i64, kind: i32) -> Result<(), Errno> {
        let range = one_byte(byte, kind);
        system_call(|| fcntl(&self.fd, FcntlArg::F_OFD_SETLK(&range))).map(drop)
    }

    /// Somebody else has the byte.
    fn is_taken(&self, byte: i64) -> Result<bool, Errno> {
        let mut range = one_byte(byte, libc::F_WRLCK);
        system_call(|| fcntl(&self.fd, FcntlArg::F_OFD_GETLK(&mut range)))?;
        Ok(i32::from(range.l_type) != libc::F_UNLCK)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes that say `perms`.
fn bytes(perms: Perms) -> impl Iterator<Item = i64> {
    let uses = perms.uses.bits().map(|(bit, _)| USES + i64::from(bit));
    let bears_not = PermSet::ALL.without(perms.shares).bits().map(|(bit, _)| BEARS_NOT + i64::from(bit));
    uses.chain(bears_not)
}

fn held(perms: Perms, byte: i64) -> bool {
    bytes(perms).any(|held| held == byte)
}

fn cannot_lock(errno: Errno) -> bool {
    matches!(errno, Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL)
}

fn one_byte(byte: i64, kind: i32) -> libc::flock {
    let narrow = |value: i32| i16::try_from(value).expect("lock kinds and SEEK_SET are small");
    libc::flock { l_type: narrow(kind), l_whence: narrow(libc::SEEK_SET), l_start: byte, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rt::fault::{Fault, Faults, Plan};
    use std::fs::File;
    use std::path::Path;

    fn locks(path: &Path) -> Locks {
        Locks::new(File::open(path).unwrap().into())
    }

    fn perms(uses: PermSet, shares: PermSet) -> Perms {
        Perms { uses, shares }
    }

    #[test]
    fn two_nodes_on_one_file_conflict_as_two_processes_do() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two) = (locks(file.path()), locks(file.path()));
        let take = |locks: &Locks, perms| locks.tighten(perms, Locking::On, "x.img").map_err(|error| error.full());
        let alone = perms(PermSet::WRITE, PermSet::ALL.without(PermSet::WRITE));
        take(&one, alone).unwrap();
        let refused = take(&two, perms(PermSet::WRITE, PermSet::ALL)).unwrap_err();
        assert_eq!(refused, "Failed to get \"write\" lock: Is another process using the image [x.img]?");
        take(&two, perms(PermSet::CONSISTENT_READ, PermSet::ALL)).unwrap();
        let refused = take(&two, perms(PermSet::NONE, PermSet::ALL.without(PermSet::WRITE))).unwrap_err();
        assert!(refused.starts_with("Failed to get shared \"write\" lock"), "{refused}");
        one.relax(Perms::IDLE);
        take(&two, perms(PermSet::WRITE, PermSet::ALL.without(PermSet::WRITE))).unwrap();
    }

    #[test]
    fn a_refused_tightening_leaves_what_was_held() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two, three) = (locks(file.path()), locks(file.path()), locks(file.path()));
        let reader = perms(PermSet::CONSISTENT_READ, PermSet::ALL);
        one.tighten(perms(PermSet::NONE, PermSet::ALL.without(PermSet::RESIZE)), Locking::On, "x").unwrap();
        two.tighten(reader, Locking::On, "x").unwrap();
        two.tighten(perms(PermSet::WRITE | PermSet::RESIZE, PermSet::ALL), Locking::On, "x").unwrap_err();
        // It uses no write, and still reads.
        three.tighten(perms(PermSet::NONE, PermSet::ALL.without(PermSet::WRITE)), Locking::On, "x").unwrap();
        three
            .tighten(perms(PermSet::NONE, PermSet::ALL.without(PermSet::CONSISTENT_READ)), Locking::On, "x")
            .unwrap_err();
    }

    #[test]
    fn relaxing_takes_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two) = (locks(file.path()), locks(file.path()));
        one.relax(perms(PermSet::WRITE, PermSet::NONE));
        two.tighten(perms(PermSet::ALL, PermSet::NONE), Locking::On, "x").unwrap();
    }

    #[test]
    fn a_claim_that_lingers_takes_nothing_from_the_next() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, other) = (Arc::new(locks(file.path())), locks(file.path()));
        let alone = perms(PermSet::WRITE, PermSet::ALL.without(PermSet::WRITE));
        let old = Claim::new(one.clone());
        old.tighten(alone, Locking::On, "x").unwrap();
        let new = Claim::new(one);
        new.tighten(alone, Locking::On, "x").unwrap();
        drop(old);
        other.tighten(alone, Locking::On, "x").unwrap_err();
        drop(new);
        other.tighten(alone, Locking::On, "x").unwrap();
    }

    /// Whichever call fails, nobody has the image who was not told so, and no lock is left.
    #[test]
    fn what_cannot_be_found_out_about_others_is_a_refusal() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let alone = perms(PermSet::CONSISTENT_READ | PermSet::WRITE, PermSet::ALL.without(PermSet::WRITE));
        let faults = Faults::default();
        let _entered = faults.enter();
        for nth in 1.. {
            let (one, two) = (locks(file.path()), locks(file.path()));
            faults.arm(Plan { nth, fault: Fault::Errno(libc::ENOLCK), lasting: false });
            let taken = one.tighten(alone, Locking::On, "x");
            let failed = !faults.disarm().is_empty();
            assert_eq!(taken.is_err(), failed, "call {nth}: {taken:?}");
            assert_eq!(two.tighten(alone, Locking::On, "x").is_ok(), failed, "call {nth}");
            if !failed {
                // Three bytes are locked, and three of others asked for.
                assert_eq!(nth, 7);
                break;
            }
        }
    }

    /// It may be that the file system cannot lock, or that it could not just then.
    #[test]
    fn who_insists_on_locks_tries_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let alone = perms(PermSet::WRITE, PermSet::ALL.without(PermSet::WRITE));
        let faults = Faults::default();
        let _entered = faults.enter();
        for nth in 1..=4 {
            let (one, two) = (locks(file.path()), locks(file.path()));
            let fail = |nth| faults.arm(Plan { nth, fault: Fault::Errno(libc::ENOLCK), lasting: false });
            fail(nth);
            one.tighten(alone, Locking::Auto, "x").unwrap();
            assert_eq!(faults.disarm().len(), 1);
            one.tighten(alone, Locking::Auto, "x").unwrap();
            two.tighten(alone, Locking::On, "x").expect("it has given up, and has left nothing");
            two.relax(Perms::IDLE);
            fail(1);
            one.tighten(alone, Locking::On, "x").unwrap_err();
            faults.disarm();
            one.tighten(alone, Locking::On, "x").unwrap();
            two.tighten(alone, Locking::On, "x").unwrap_err();
        }
    }

    #[test]
    fn without_locking_nobody_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two) = (locks(file.path()), locks(file.path()));
        let alone = perms(PermSet::ALL, PermSet::NONE);
        one.tighten(alone, Locking::Off, "x").unwrap();
        two.tighten(alone, Locking::On, "x").unwrap();
        one.tighten(alone, Locking::Off, "x").unwrap();
    }
}
