//! What deriving keys may cost: a header of others says how much it wants.

use crate::base::{Error, Result};

/// The costs that are taken, all slots of a header together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Iterations of PBKDF2.
    pub pbkdf2_iterations: u64,
    /// Memory of Argon2 at one time, in KiB.
    pub argon2_memory_kib: u64,
    /// Memory of Argon2 times passes over it, in KiB.
    pub argon2_work_kib: u64,
}

/// Iterations of PBKDF2 that the slots of one header may ask together. A slot that was made to take two seconds has a few
/// millions of them; this many take one helper thread about a minute.
pub const MAX_PBKDF2_ITERATIONS: u64 = 100_000_000;
/// Memory that one slot may ask, in KiB: what cryptsetup takes at the most.
pub const MAX_ARGON2_MEMORY: u64 = 1 << 20;
/// Memory times passes that the slots of one header may ask together, in KiB: with the most memory, 32 passes.
pub const MAX_ARGON2_WORK: u64 = 32 << 20;

impl Default for Budget {
    fn default() -> Self {
        Self {
            pbkdf2_iterations: MAX_PBKDF2_ITERATIONS,
            argon2_memory_kib: MAX_ARGON2_MEMORY,
            argon2_work_kib: MAX_ARGON2_WORK,
        }
    }
}

/// What is left of a budget.
pub(super) struct Left<'b> {
    budget: &'b Budget,
    iterations: u64,
    work_kib: u64,
}

impl<'b> Left<'b> {
    pub(super) fn of(budget: &'b Budget) -> Self {
        Self { budget, iterations: budget.pbkdf2_iterations, work_kib: budget.argon2_work_kib }
    }

    /// `what` is who asks, for the refusal.
    pub(super) fn pbkdf2(&mut self, what: &str, iterations: u32) -> Result<()> {
        if iterations == 0 {
            return Err(Error::new(format!("{what} asks for no iterations of PBKDF2")));
        }
        self.iterations = self.iterations.checked_sub(iterations.into()).ok_or_else(|| {
            let most = self.budget.pbkdf2_iterations;
            Error::new(format!("{what} asks for {iterations} iterations of PBKDF2; an image may ask for {most} in all"))
        })?;
        Ok(())
    }

    pub(super) fn argon2(&mut self, what: &str, memory_kib: u32, passes: u32) -> Result<()> {
        let (memory, most) = (u64::from(memory_kib), self.budget.argon2_memory_kib);
        if memory > most {
            return Err(Error::new(format!(
                "{what} asks for {memory} KiB of memory for Argon2; at most {most} are taken"
            )));
        }
        let asked = memory * u64::from(passes);
        self.work_kib = self.work_kib.checked_sub(asked).ok_or_else(|| {
            let most = self.budget.argon2_work_kib;
            Error::new(format!(
                "{what} asks for {passes} passes of Argon2 over {memory} KiB; {most} KiB are taken in all"
            ))
        })?;
        Ok(())
    }
}
