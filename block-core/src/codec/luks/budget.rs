//! What deriving keys may cost: a header of others says how much it wants.

use crate::base::{Error, Result};
use crate::codec::hash::Hash;

/// The costs that are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Iterations of PBKDF2 for a try of one slot, each counted once for every block of the hash's size that is derived.
    pub pbkdf2_iterations: u64,
    /// Memory of Argon2 at one time, in KiB.
    pub argon2_memory_kib: u64,
    /// Memory of Argon2 times passes over it for a try of one slot, in KiB.
    pub argon2_work_kib: u64,
    /// All slots that are tried may cost together what so many of the dearest cost.
    pub tries: u64,
}

/// Iterations of PBKDF2 that a try of one slot may ask for: its own, and those of the key's digest. A slot that was made to take
/// two seconds has some millions of them; this many take one helper thread about a minute.
pub const MAX_PBKDF2_ITERATIONS: u64 = 200_000_000;
/// Memory that one slot may ask, in KiB: what cryptsetup takes at the most.
pub const MAX_ARGON2_MEMORY: u64 = 1 << 20;
/// Memory times passes that one slot may ask, in KiB: with the most memory, 32 passes.
pub const MAX_ARGON2_WORK: u64 = 32 << 20;
/// Slots of the dearest kind that are tried: ordinary ones cost a tenth of it, and are all tried.
pub const MAX_DEAR_TRIES: u64 = 2;

impl Default for Budget {
    fn default() -> Self {
        Self {
            pbkdf2_iterations: MAX_PBKDF2_ITERATIONS,
            argon2_memory_kib: MAX_ARGON2_MEMORY,
            argon2_work_kib: MAX_ARGON2_WORK,
            tries: MAX_DEAR_TRIES,
        }
    }
}

/// What a try of one slot costs, which is within the budget for one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost<'b> {
    budget: &'b Budget,
    iterations: u64,
    work_kib: u64,
}

impl<'b> Cost<'b> {
    pub(super) fn within(budget: &'b Budget) -> Self {
        Self { budget, iterations: 0, work_kib: 0 }
    }

    /// `len` bytes are derived. `what` is who asks, for the refusal.
    pub(super) fn pbkdf2(&mut self, what: &str, hash: Hash, iterations: u32, len: usize) -> Result<()> {
        if iterations == 0 {
            return Err(Error::new(format!("{what} asks for no iterations of PBKDF2")));
        }
        let asked = u64::from(iterations).saturating_mul(len.div_ceil(hash.size()) as u64);
        self.iterations = self.iterations.saturating_add(asked);
        let most = self.budget.pbkdf2_iterations;
        if self.iterations > most {
            return Err(Error::new(format!(
                "{what} asks for {iterations} iterations of PBKDF2; a try of one slot may ask for {most} in all"
            )));
        }
        Ok(())
    }

    pub(super) fn argon2(&mut self, what: &str, memory_kib: u32, passes: u32) -> Result<()> {
        let (memory, most) = (u64::from(memory_kib), self.budget.argon2_memory_kib);
        if memory > most {
            return Err(Error::new(format!(
                "{what} asks for {memory} KiB of memory for Argon2; at most {most} are taken"
            )));
        }
        self.work_kib = self.work_kib.saturating_add(memory * u64::from(passes));
        let most = self.budget.argon2_work_kib;
        if self.work_kib > most {
            return Err(Error::new(format!(
                "{what} asks for {passes} passes of Argon2 over {memory} KiB; {most} KiB are taken in all"
            )));
        }
        Ok(())
    }
}

/// What is left for all slots.
pub(super) struct Left {
    iterations: u64,
    work_kib: u64,
}

impl Left {
    pub(super) fn of(budget: &Budget) -> Self {
        let Budget { pbkdf2_iterations, argon2_work_kib, tries, .. } = *budget;
        Self { iterations: pbkdf2_iterations.saturating_mul(tries), work_kib: argon2_work_kib.saturating_mul(tries) }
    }

    /// Whether there is enough for another try, which costs that.
    pub(super) fn spend(&mut self, cost: Cost<'_>) -> bool {
        let left = self.iterations.checked_sub(cost.iterations).zip(self.work_kib.checked_sub(cost.work_kib));
        left.map(|(iterations, work_kib)| *self = Self { iterations, work_kib }).is_some()
    }
}
