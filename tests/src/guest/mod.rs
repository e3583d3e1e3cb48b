//! A Linux guest in a real QEMU, on disks that the server under test exports.
//!
//! [`Server`] runs the server with a control socket; [`Guest`] boots QEMU on the server's vhost-user sockets and
//! runs shell commands in it. What the guest consists of is `initramfs.rs` and `init.sh`; its kernel comes from
//! [`crate::cloud_kernel`]. Everything that is waited for has a limit: a peer that hangs fails its test.

mod child;
mod initramfs;
mod lines;
mod machine;
mod qmp;
mod server;

use std::time::{Duration, Instant};

pub use lines::{LineError, Lines};
pub use machine::Guest;
pub use qmp::{Qmp, QmpError};
pub use server::Server;

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
