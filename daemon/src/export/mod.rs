//! Exports: their options as QMP has them, which of them exist, and how they begin and end.
//!
//! An export is a port into the graph, threads for its queues, and a server that guests connect to (`vhost_user`).

mod options;
mod threads;
pub mod vhost_user;
mod watch;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block_core::graph::{Graph, NodeId, PermSet, Perms};
use block_core::port::{Port, PortNews, PortOptions};
use block_core::rt::sync::Notify;
use qmp::{Error, Qapi, Result};

pub use options::{
    BlockExportOptions, CommonOptions, ExportAddress, ExportKind, FdAddress, InetAddress, UnixAddress,
    VhostUserBlkOptions, VirtQueueMapping, VsockAddress,
};

use crate::commands::no_such_device;
use crate::control::Event;
use crate::daemon::Daemon;
use crate::object::IoThreadObject;
use crate::{all, first, refused};
use vhost_user::{QueueReport, VhostUserExport};
use watch::{Found, Watch};

pub use watch::keep_watch;

/// An element of `query-block-exports`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockExportInfo {
    /// The export's id.
    pub id: String,
    /// How guests reach it.
    #[qapi(rename = "type")]
    pub kind: ExportType,
    /// The node that it serves.
    pub node_name: String,
    /// Whether it is being removed.
    pub shutting_down: bool,
}

/// How guests reach an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockExportType")]
pub enum ExportType {
    /// Over a vhost-user socket, as a virtio-blk device.
    VhostUserBlk,
}

/// An element of `x-query-export-details`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ExportDetails {
    /// The export's id.
    pub id: String,
    /// Whether a guest is connected.
    pub connected: bool,
    /// Requests inside.
    pub in_flight: u32,
    /// Its queues, in order.
    pub queues: Vec<QueueDetails>,
}

/// A queue since its export was added.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct QueueDetails {
    /// The IOThread that serves it; where none was named it is the export's own, and has its id.
    pub iothread: String,
    /// Times that the guest woke us.
    pub kicks: u64,
    /// Times that we woke the guest.
    pub interrupts: u64,
    /// Requests answered, with whatever status.
    pub requests: u64,
    /// Requests answered with an error.
    pub refused: u64,
    /// Reads and writes that could not take the shortest way.
    pub slow: u64,
    /// Times that the guest broke the queue's rules, so that it was stopped.
    pub broken: u64,
}

/// All exports, in the order in which they were added.
#[derive(Default)]
pub struct Exports {
    list: RefCell<Vec<Rc<Export>>>,
    /// The daemon ends: none is added any more.
    closing: Cell<bool>,
    /// One was set up, or taken down.
    changed: Notify,
}

/// One export. Its id is taken from the first moment of `block-export-add` to the last of `block-export-del`.
struct Export {
    id: String,
    /// What it was added for.
    node_name: String,
    stopping: Cell<bool>,
    /// Absent while it is being set up or taken down.
    running: RefCell<Option<Running>>,
}

/// What an export is made of.
struct Running {
    server: Server,
    port: Port,
    /// The thread of each queue; kept, so that none is removed under it.
    threads: Vec<Rc<IoThreadObject>>,
    watch: Cell<Watch>,
}

/// The server, shared with the port's news. Absent before it is there and when it is being stopped.
type Server = Rc<RefCell<Option<VhostUserExport>>>;

/// Adds an export.
pub async fn add(daemon: &Rc<Daemon>, options: BlockExportOptions) -> Result<()> {
    let BlockExportOptions { common, kind: ExportKind::VhostUserBlk(own) } = options;
    let reserved = daemon.exports.reserve(&common.id, &common.node_name)?;
    let running = start(daemon, &common, own).await?;
    *reserved.export.running.borrow_mut() = Some(running);
    tracing::info!("export '{}' serves node '{}'", common.id, common.node_name);
    Ok(())
}

/// Ends all exports, hard, and waits for those that are being added or removed. From now on none can be added.
pub async fn end_all(daemon: &Rc<Daemon>) {
    let exports = &daemon.exports;
    exports.closing.set(true);
    loop {
        all(exports.removable().into_iter().map(|id| end(daemon, id))).await;
        if exports.list.borrow().is_empty() {
            return;
        }
        exports.changed.notified().await;
    }
}

async fn end(daemon: &Rc<Daemon>, id: String) {
    if let Err(error) = remove(daemon, &id, true).await {
        tracing::error!("could not end export '{id}': {error}");
    }
}

/// Removes an export. `hard`: also if a guest is connected, which is disconnected once what it asked for is done.
pub async fn remove(daemon: &Rc<Daemon>, id: &str, hard: bool) -> Result<()> {
    let export = daemon.exports.find(id).ok_or_else(|| Error::generic(format!("Export '{id}' is not found")))?;
    if export.stopping.get() {
        return Err(Error::generic(format!("Export '{id}' is already shutting down")));
    }
    let Some(server) = export.running.borrow().as_ref().map(|running| running.server.clone()) else {
        return Err(Error::generic(format!("Export '{id}' is still being set up")));
    };
    if !hard && server.borrow().as_ref().is_some_and(|server| !server.close_if_unused()) {
        return Err(Error::generic(format!("export '{id}' still in use: use mode=hard to disconnect its guest")));
    }
    export.stopping.set(true);
    let server = server.take();
    let root = export.running.borrow().as_ref().map(|running| running.port.root());
    if let (Some(server), Some(root)) = (server, root) {
        stop_drained(daemon, root, server).await;
    }
    let running = export.running.take();
    if let Some(Running { port, .. }) = running {
        port.detach(&mut daemon.graph.permit()).await;
    }
    daemon.exports.forget(&export);
    tracing::info!("export '{id}' is gone");
    daemon.hub.tell(Event::export_deleted(id));
    Ok(())
}

/// Ends a server while its port is drained: what waits for its turn in a throttle goes at once, as in QEMU. Where the drain
/// takes too long the server's end takes as long, drained or not.
async fn stop_drained(daemon: &Daemon, root: NodeId, server: VhostUserExport) {
    let drained = async {
        let mut permit = daemon.graph.permit();
        let _drained = permit.drain(&[root]).await;
        std::future::pending::<()>().await;
    };
    first(drained, server.stop()).await;
}

/// An id that is taken while its export is set up, and given back if nothing comes of it.
struct Reserved<'e> {
    exports: &'e Exports,
    export: Rc<Export>,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if self.export.running.borrow().is_none() {
            self.exports.forget(&self.export);
        }
        self.exports.changed.notify_one();
    }
}

impl Exports {
    /// For `query-block-exports`: the youngest first.
    pub fn list(&self, graph: &Graph) -> Vec<BlockExportInfo> {
        let shown = |export: &&Rc<Export>| export.stopping.get() || export.running.borrow().is_some();
        self.list.borrow().iter().rev().filter(shown).map(|export| export.info(graph)).collect()
    }

    /// Where an export enters the graph.
    pub(crate) fn root(&self, id: &str) -> Result<NodeId> {
        let export = self.find(id);
        let root = export.and_then(|export| Some(export.running.borrow().as_ref()?.port.root()));
        root.ok_or_else(|| Error::generic(format!("Export '{id}' is not found")))
    }

    /// For `x-query-export-details`.
    pub fn details(&self) -> Vec<ExportDetails> {
        self.list.borrow().iter().filter_map(|export| export.details()).collect()
    }

    /// Those of which looking at them shows something new.
    fn look(&self) -> Vec<(String, Found)> {
        self.list.borrow().iter().filter_map(|export| Some((export.id.clone(), export.look()?))).collect()
    }

    /// The ids of those that nobody is adding or removing.
    fn removable(&self) -> Vec<String> {
        let settled = |export: &&Rc<Export>| !export.stopping.get() && export.running.borrow().is_some();
        self.list.borrow().iter().filter(settled).map(|export| export.id.clone()).collect()
    }

    fn reserve(&self, id: &str, node_name: &str) -> Result<Reserved<'_>> {
        if self.closing.get() {
            return Err(Error::generic("The daemon is ending"));
        }
        if !block_core::catalog::is_identifier(id) {
            return Err(Error::generic("Invalid block export id"));
        }
        if self.find(id).is_some() {
            return Err(Error::generic(format!("Block export id '{id}' is already in use")));
        }
        let export = Rc::new(Export {
            id: id.to_owned(),
            node_name: node_name.to_owned(),
            stopping: Cell::new(false),
            running: RefCell::default(),
        });
        self.list.borrow_mut().push(export.clone());
        Ok(Reserved { exports: self, export })
    }

    fn find(&self, id: &str) -> Option<Rc<Export>> {
        self.list.borrow().iter().find(|export| export.id == id).cloned()
    }

    fn forget(&self, export: &Rc<Export>) {
        self.list.borrow_mut().retain(|other| !Rc::ptr_eq(other, export));
        self.changed.notify_one();
    }
}

impl Export {
    /// The node that it serves now: another one than at first, if it was replaced.
    fn node_name(&self, graph: &Graph) -> Option<String> {
        let root = self.running.borrow().as_ref()?.port.root();
        Some(graph.node(graph.child_node(root, "root")?)?.name)
    }

    fn info(&self, graph: &Graph) -> BlockExportInfo {
        BlockExportInfo {
            id: self.id.clone(),
            kind: ExportType::VhostUserBlk,
            node_name: self.node_name(graph).unwrap_or_else(|| self.node_name.clone()),
            shutting_down: self.stopping.get(),
        }
    }

    fn look(&self) -> Option<Found> {
        let running = self.running.borrow();
        let Running { server, port, watch, .. } = running.as_ref()?;
        let answered = server.borrow().as_ref()?.report().queues.iter().map(|queue| queue.requests).sum();
        let mut now = watch.get();
        let found = now.look(answered, port.in_flight());
        watch.set(now);
        found
    }

    fn details(&self) -> Option<ExportDetails> {
        let running = self.running.borrow();
        let Running { server, port, threads, .. } = running.as_ref()?;
        let report = server.borrow().as_ref()?.report();
        let queues = report.queues.iter().zip(threads);
        Some(ExportDetails {
            id: self.id.clone(),
            connected: report.connected,
            in_flight: port.in_flight(),
            queues: queues.map(|(report, thread)| QueueDetails::of(*report, thread)).collect(),
        })
    }
}

impl QueueDetails {
    fn of(report: QueueReport, thread: &IoThreadObject) -> Self {
        let QueueReport { kicks, interrupts, requests, refused, slow, broken } = report;
        Self { iothread: thread.id().to_owned(), kicks, interrupts, requests, refused, slow, broken }
    }
}

/// Plugs into the graph and opens the socket; a failure leaves neither behind.
async fn start(daemon: &Rc<Daemon>, common: &CommonOptions, own: VhostUserBlkOptions) -> Result<Running> {
    let missing = || no_such_device(None, Some(&common.node_name));
    let node = daemon.graph.find(&common.node_name).ok_or_else(missing)?;
    let report = daemon.graph.node(node).ok_or_else(missing)?;
    if common.writable && report.options.read_only {
        return Err(Error::generic("Cannot export read-only node as writable"));
    }
    if common.allow_inactive {
        return Err(Error::generic("Export type does not support inactive exports"));
    }
    if !report.options.active {
        // Unlike QEMU, which activates the node: it would take locks behind the operator's back.
        return Err(Error::generic(format!("Node '{}' is inactive; use blockdev-set-active", common.node_name)));
    }
    let server_options = own.for_server(common)?;
    server_options.check().map_err(refused)?;
    let threads = threads::of_queues(&daemon.objects, common, &own)?;

    let server = Server::default();
    let told = server.clone();
    let news = move |PortNews::Resized(_)| {
        if let Some(server) = told.borrow().as_ref() {
            server.resized();
        }
    };
    let plug = PortOptions { name: format!("export '{}'", common.id), perms: perms(common.writable) };
    let mut permit = daemon.graph.permit();
    let port = Port::attach(&mut permit, node, plug, Rc::new(news)).await.map_err(refused)?;
    let remotes = threads.iter().map(|thread| thread.remote()).collect();
    match VhostUserExport::start(server_options, port.handle(), remotes).await {
        Ok(started) => {
            server.replace(Some(started));
            Ok(Running { server, port, threads, watch: Cell::default() })
        }
        Err(error) => {
            port.detach(&mut permit).await;
            Err(refused(error))
        }
    }
}

/// Other users may do what they like: the guest sees a resize, and a writer beside it is the operator's decision.
fn perms(writable: bool) -> Perms {
    let write = if writable { PermSet::WRITE } else { PermSet::NONE };
    Perms { uses: PermSet::CONSISTENT_READ | write, shares: PermSet::ALL }
}
