//! The process `trellisd`, as a library so that tests reach its rooms.
//!
//! - `cli` says what the command line means, `setup` obeys it, step by step; `scratch` stands in where it says nothing.
//! - `daemon` is everything that lives as long as the process; `shutdown` is its orderly end.
//! - `control` has the sockets, `commands` what can be said on them (one file a noun).
//! - `export` and `object` are what commands make, next to the nodes of `block_core`.
//! - `hidden` takes secrets off the command line.
//! - `process`, `notify` and `log` make a well-behaved service of it.

pub mod cli;
pub mod commands;
pub mod control;
mod daemon;
pub mod export;
mod hidden;
pub mod log;
mod notify;
pub mod object;
pub mod process;
mod scratch;
mod setup;
mod shutdown;

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::process::ExitCode;
use std::task::Poll;
use std::time::Duration;

use block_core::rt::Local;

pub use daemon::Daemon;

/// Our version, and the QEMU whose language we speak.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (speaks QMP of QEMU 10.0.2)");
/// What the greeting says besides QEMU's version.
pub const PACKAGE: &str = concat!("trellisd ", env!("CARGO_PKG_VERSION"));

/// The program, from its arguments to its exit code.
pub fn main() -> ExitCode {
    let code = setup::start(std::env::args_os()).unwrap_or_else(|sentence| {
        log::complain(&sentence);
        ExitCode::FAILURE
    });
    log::flush();
    code
}

/// What a command is answered when the graph, a driver or the kernel refused.
pub(crate) fn refused(error: block_core::base::Error) -> qmp::Error {
    qmp::Error::generic(error.full())
}

/// Which of two futures ended first.
pub(crate) enum First<A, B> {
    This(A),
    That(B),
}

/// Waits for the one that ends first, and drops the other.
pub(crate) async fn first<A, B>(this: impl Future<Output = A>, that: impl Future<Output = B>) -> First<A, B> {
    let (mut this, mut that) = (pin!(this), pin!(that));
    poll_fn(|cx| {
        if let Poll::Ready(value) = this.as_mut().poll(cx) {
            return Poll::Ready(First::This(value));
        }
        that.as_mut().poll(cx).map(First::That)
    })
    .await
}

/// Runs all at once, and waits for the last.
pub(crate) async fn all(futures: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut left: Vec<Pin<Box<_>>> = futures.map(Box::pin).collect();
    poll_fn(|cx| {
        left.retain_mut(|future| future.as_mut().poll(cx).is_pending());
        if left.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Gives up after `limit`.
pub(crate) async fn timeout<T>(local: &Local, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    match first(future, local.sleep(limit)).await {
        First::This(value) => Some(value),
        First::That(()) => None,
    }
}
