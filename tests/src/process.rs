//! Other programs: a child process that does not outlive the test, and waiting with a limit.

use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// Asks `ready` again and again until it gives something.
///
/// # Panics
/// When `limit` is over, with `what` in the sentence.
pub fn wait_for<T>(what: &str, limit: Duration, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = ready() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} for {what}, in vain");
        #[expect(clippy::disallowed_methods, reason = "a test waits for another program, and serves nobody meanwhile")]
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Killed when dropped.
#[derive(Debug)]
pub(crate) struct OwnedChild(Child);

impl OwnedChild {
    /// Starts `command`.
    ///
    /// # Panics
    /// Where the program is missing, saying what brings it.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let program = command.get_program().to_owned();
        Self(command.spawn().unwrap_or_else(|error| {
            panic!("starting {}: {error} (`.ci/setup` installs what tests need)", program.display())
        }))
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// How it ended, where it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().expect("the child is ours")
    }

    /// How it ends.
    ///
    /// # Panics
    /// Where it does not within `limit`.
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
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
