//! The end, in the order that loses nothing: exports first, so that no guest writes any more; then nodes, which are
//! flushed and closed; then clients, who have heard of all of it; then what we left in the file system.
//!
//! A guest or a disk that does not answer can hold this up. Whoever started us may send a second signal: then there
//! are a few seconds left, and we end with a failure if they were not enough.

use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use block_core::graph::{NodeId, NodeReport};

use crate::daemon::Daemon;
use crate::process::signals::Signals;
use crate::setup::Held;
use crate::{First, export, first, log, notify};

/// Ends everything. `held` is removed last.
pub(crate) async fn run(daemon: &Rc<Daemon>, signals: &Signals, held: Held) -> ExitCode {
    notify::stopping();
    match first(orderly(daemon), hurried(daemon, signals)).await {
        First::This(all_is_well) => {
            daemon.chardevs.clear();
            daemon.objects.clear();
            if all_is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        First::That(()) => {
            tracing::error!("ending without waiting any longer: requests or flushes did not finish");
            daemon.chardevs.clear();
            drop(held);
            log::flush();
            // A thread that waits for the kernel cannot be joined, so nothing is unwound.
            std::process::exit(1);
        }
    }
}

/// False: something was not closed as it should be, and may be lost.
async fn orderly(daemon: &Rc<Daemon>) -> bool {
    export::end_all(daemon).await;
    daemon.jobs.end_all().await;
    let closed = close_nodes(daemon).await;
    daemon.monitors.close(daemon, LAST_WORDS).await;
    closed
}

/// From the top down. One that cannot be closed keeps no other from it.
async fn close_nodes(daemon: &Rc<Daemon>) -> bool {
    let (mut all_is_well, mut failed) = (true, Vec::new());
    while let Some(node) = next_node(daemon, &failed) {
        if let Err(error) = daemon.graph.permit().remove(node.id).await {
            tracing::error!("could not close node '{}': {}", node.name, error.full());
            all_is_well = false;
            // A flush that failed is an obstacle once.
            if daemon.graph.permit().remove(node.id).await.is_err() {
                failed.push(node.id);
            }
        }
    }
    all_is_well
}

/// A node that nothing stands on any more, and that was not tried in vain.
fn next_node(daemon: &Daemon, failed: &[NodeId]) -> Option<NodeReport> {
    let closes = |node: &NodeReport| node.explicit && node.parents.is_empty() && !failed.contains(&node.id);
    daemon.graph.nodes().into_iter().find(closes)
}

/// Ends after a second signal and a little patience.
async fn hurried(daemon: &Daemon, signals: &Signals) {
    let signal = signals.next().await;
    tracing::warn!("{signal} came again: ending within {} s", PATIENCE.as_secs());
    daemon.local.sleep(PATIENCE).await;
}

/// For clients to take what they have not read yet.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// After a second signal.
const PATIENCE: Duration = Duration::from_secs(2);
