//! The end, in the order that loses nothing: exports, jobs and commands first, so that nobody writes any more; then nodes,
//! which are flushed and closed; then clients, who have heard of all of it; then what we left in the file system.
//!
//! A guest or a disk that does not answer can hold this up, but only for what stands on that disk: whoever started us may
//! kill us before it answers, and by then all others are closed. They may also send a second signal: then there are a few
//! seconds left, and we end with a failure if they were not enough.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::error::Error as _;
use std::pin::{Pin, pin};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use block_core::base::IoError;
use block_core::graph::{NodeId, NodeReport};
use block_core::rt::sync::Notify;

use crate::daemon::Daemon;
use crate::process::signals::Signals;
use crate::setup::Held;
use crate::{First, all, export, first, log, notify, timeout};

/// Ends everything. `held` is removed last. `why` it ends says whether the next signal is the second one.
pub(crate) async fn run(daemon: &Rc<Daemon>, signals: &Signals, held: Held, why: Why) -> ExitCode {
    notify::stopping();
    match first(orderly(daemon), hurried(daemon, signals, why)).await {
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

/// Why the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Signal,
    /// A command asked for it, or the start failed.
    OwnWill,
}

/// False: something was not closed as it should be, and may be lost.
async fn orderly(daemon: &Rc<Daemon>) -> bool {
    // From here on no command begins: what it was answered would not be true.
    daemon.ask_to_quit();
    let mut users = pin!(users_end(daemon));
    // All of this takes no time where nothing hangs, and then nodes are closed from the top down.
    let mut done = timeout(&daemon.local, HEAD_START, users.as_mut()).await.is_some();
    let nodes = Nodes::of(daemon);
    loop {
        nodes.close_unused();
        if done && nodes.closing.get() == 0 {
            break;
        }
        // A user that goes sets nodes free, and does not tell us.
        let news = first(nodes.news.notified(), daemon.local.sleep(LOOK));
        if done {
            news.await;
        } else if let First::This(()) = first(users.as_mut(), news).await {
            done = true;
        }
    }
    let all_is_well = nodes.all_is_well();
    daemon.monitors.close(daemon, LAST_WORDS).await;
    all_is_well
}

/// Ends who uses nodes. Guests and jobs are waited for as long as it takes; a command that hangs is left behind.
async fn users_end(daemon: &Rc<Daemon>) {
    let commands = async {
        if timeout(&daemon.local, COMMAND_PATIENCE, daemon.commands_end()).await.is_none() {
            tracing::error!("a command does not end, and is left behind");
        }
    };
    let users: [Pin<Box<dyn Future<Output = ()> + '_>>; 3] =
        [Box::pin(export::end_all(daemon)), Box::pin(daemon.jobs.end_all()), Box::pin(commands)];
    all(users.into_iter()).await;
}

/// The nodes, on their way out: all at once, since one that hangs is to keep no other from being closed.
struct Nodes {
    daemon: Rc<Daemon>,
    /// Those that were tried: what is still there is not tried again.
    tried: RefCell<BTreeSet<NodeId>>,
    /// How many are being closed.
    closing: Cell<usize>,
    failed: Cell<bool>,
    /// One was closed, or could not be.
    news: Notify,
}

impl Nodes {
    fn of(daemon: &Rc<Daemon>) -> Rc<Self> {
        Rc::new(Self {
            daemon: daemon.clone(),
            tried: RefCell::default(),
            closing: Cell::new(0),
            failed: Cell::new(false),
            news: Notify::new(),
        })
    }

    /// Begins to close each node that nothing stands on any more.
    fn close_unused(self: &Rc<Self>) {
        for id in self.daemon.graph.unused() {
            if self.tried.borrow_mut().insert(id) {
                self.closing.set(self.closing.get() + 1);
                let nodes = self.clone();
                self.daemon.local.spawn(async move {
                    nodes.close(id).await;
                    nodes.closing.set(nodes.closing.get() - 1);
                    nodes.news.notify_one();
                });
            }
        }
    }

    async fn close(&self, id: NodeId) {
        let Err(error) = self.remove(id).await else { return };
        let Some(node) = self.daemon.graph.node(id) else { return };
        if !node.parents.is_empty() {
            // A command that was under way came before us. Its turn comes again.
            self.tried.borrow_mut().remove(&id);
            return;
        }
        self.fail(&node, &error.full());
        // A flush that failed is an obstacle once. Requests that do not end are one for ever.
        if error.source().is_some_and(|cause| cause.is::<IoError>()) {
            let _ = self.remove(id).await;
        }
    }

    async fn remove(&self, id: NodeId) -> block_core::base::Result<()> {
        let mut permit = self.daemon.graph.permit();
        permit.set_deadline(COMMAND_PATIENCE);
        permit.remove(id).await
    }

    /// Whether every node was closed as it should be. Says which was not.
    fn all_is_well(&self) -> bool {
        let tried = self.tried.borrow();
        for node in self.daemon.graph.nodes().iter().filter(|node| !tried.contains(&node.id)) {
            self.fail(node, &format!("it is used by {}", node.parents.join(", ")));
        }
        !self.failed.get()
    }

    fn fail(&self, node: &NodeReport, why: &str) {
        tracing::error!("could not close node '{}': {why}", node.name);
        self.failed.set(true);
    }
}

/// Ends after a second signal and a little patience.
async fn hurried(daemon: &Daemon, signals: &Signals, why: Why) {
    if why == Why::OwnWill {
        tracing::info!("{}: ending already", signals.next().await);
    }
    let signal = signals.next().await;
    tracing::warn!("{signal} came again: ending within {} s", PATIENCE.as_secs());
    daemon.local.sleep(PATIENCE).await;
}

/// For exports, jobs and commands to end before nodes are looked at. A second signal leaves more than this.
const HEAD_START: Duration = Duration::from_millis(500);
/// How often it is looked what else can be closed while something hangs.
const LOOK: Duration = Duration::from_millis(100);
/// For commands under way at the end, and for what they do with a node. Less than a service manager waits before it kills.
const COMMAND_PATIENCE: Duration = Duration::from_secs(20);
/// For clients to take what they have not read yet.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// After a second signal.
const PATIENCE: Duration = Duration::from_secs(2);
