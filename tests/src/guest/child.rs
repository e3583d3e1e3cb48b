//! A child process that does not outlive the test.

use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use super::wait_for;

/// Killed when dropped.
pub(super) struct OwnedChild(Child);

impl OwnedChild {
    /// Starts `command`.
    ///
    /// # Panics
    /// Where the program is missing, saying what brings it.
    pub(super) fn spawn(command: &mut Command) -> Self {
        let program = command.get_program().to_owned();
        Self(command.spawn().unwrap_or_else(|error| {
            panic!("starting {}: {error} (`.ci/setup` installs what tests need)", program.display())
        }))
    }

    /// How it ended, where it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().expect("the child is ours")
    }

    /// How it ends.
    ///
    /// # Panics
    /// Where it does not within `limit`.
    pub(super) fn wait(&mut self, limit: Duration) -> ExitStatus {
        wait_for("the end of a child process", limit, || self.ended())
    }
}

impl Drop for OwnedChild {
    fn drop(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
