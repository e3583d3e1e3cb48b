//! The end, in the order that loses nothing: exports first, so that no guest writes any more; then nodes, which are
//! flushed and closed; then clients, who have heard of all of it; then what we left in the file system.
//!
//! A guest or a disk that does not answer can hold this up. Whoever started us may send a second signal: then there
//! are a few seconds left, and we end with a failure if they were not enough.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::process::ExitCode;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use block_core::graph::NodeReport;

use crate::daemon::Daemon;
use crate::process::signals::Signals;
use crate::setup::Held;
use crate::{First, export, first, notify};

/// Ends everything. `held` is removed last.
pub(crate) async fn run(daemon: &Rc<Daemon>, signals: &Signals, held: Held) -> ExitCode {
    notify::stopping();
    match first(orderly(daemon), hurried(daemon, signals)).await {
        First::This(()) => {
            daemon.chardevs.clear();
            daemon.objects.clear();
            ExitCode::SUCCESS
        }
        First::That(()) => {
            tracing::error!("ending without waiting any longer: requests or flushes did not finish");
            daemon.chardevs.clear();
            drop(held);
            // A thread that waits for the kernel cannot be joined, so nothing is unwound.
            std::process::exit(1);
        }
    }
}

async fn orderly(daemon: &Rc<Daemon>) {
    all(daemon.exports.ids().into_iter().map(|id| remove_export(daemon, id))).await;
    while let Some(node) = next_node(daemon) {
        if let Err(error) = daemon.graph.permit().remove(node.id).await {
            tracing::error!("could not close node '{}': {}", node.name, error.full());
            break;
        }
    }
    daemon.monitors.close(daemon, LAST_WORDS).await;
}

async fn remove_export(daemon: &Rc<Daemon>, id: String) {
    if let Err(error) = export::remove(daemon, &id, true).await {
        tracing::error!("could not end export '{id}': {error}");
    }
}

/// A node that nothing stands on any more.
fn next_node(daemon: &Daemon) -> Option<NodeReport> {
    daemon.graph.nodes().into_iter().find(|node| node.explicit && node.parents.is_empty())
}

/// Ends after a second signal and a little patience.
async fn hurried(daemon: &Daemon, signals: &Signals) {
    let signal = signals.next().await;
    tracing::warn!("{signal} came again: ending within {} s", PATIENCE.as_secs());
    daemon.local.sleep(PATIENCE).await;
}

/// Runs all at once, and waits for the last.
async fn all(futures: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut left: Vec<Pin<Box<_>>> = futures.map(Box::pin).collect();
    poll_fn(|cx| {
        left.retain_mut(|future| future.as_mut().poll(cx).is_pending());
        if left.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// For clients to take what they have not read yet.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// After a second signal.
const PATIENCE: Duration = Duration::from_secs(2);
