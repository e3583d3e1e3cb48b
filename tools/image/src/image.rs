//! An open image: a node of the graph, and our way into it.

use std::rc::Rc;

use block_core::base::{Error, Result};
use block_core::catalog::{self, AmendOptions, BlockdevAmendOptions, BlockdevRef};
use block_core::graph::{
    BackingName, CheckReport, DriverInfo, Findings, Graph, NodeId, NodeReport, PermSet, Perms, Preallocation, Repair,
    SnapshotInfo,
};
use block_core::port::{Port, PortOptions};
use block_core::rt::Local;

use crate::disk::Disk;
use crate::given::Given;
use crate::session::Session;
use crate::source::Source;

/// See the module's head. It has to be closed: what was written may not be in the file before that.
#[must_use = "an image has to be closed"]
pub struct Image {
    graph: Rc<Graph>,
    local: Rc<Local>,
    /// Its node.
    pub node: NodeId,
    /// The driver of that.
    pub driver: String,
    /// Nobody said that it is raw: its first bytes may not become those of a format.
    pub is_guess: bool,
    port: Port,
    writethrough: bool,
    shown: Option<String>,
}

/// A way into a node below an image. It has to be released.
#[must_use = "a way into a node has to be released"]
pub struct Below {
    graph: Rc<Graph>,
    local: Rc<Local>,
    port: Port,
    writethrough: bool,
}

impl Below {
    /// The node's bytes.
    pub fn disk(&self) -> Disk {
        Disk::new(self.port.handle().lane(&self.local), self.writethrough)
    }

    /// Goes out again.
    pub async fn release(self) {
        self.port.detach(&mut self.graph.permit()).await;
    }
}

impl Session {
    /// Changes what an image is like, and what it says of other files. Nobody has it open; no file that it names is looked at.
    pub async fn amend(&self, given: &Given, options: &AmendOptions) -> Result<()> {
        let given = Given { writable: true, no_backing: true, no_data: true, quiet: true, ..given.clone() };
        let file = self.file_of(&given).await?;
        catalog::amend_image(&self.graph, &BlockdevRef::Definition(Box::new(file)), options, None, false).await
    }

    /// Opens an image, and what it stands on.
    pub async fn open(&self, given: &Given) -> Result<Image> {
        let Source { options, driver, is_guess, shown } = self.source(given).await?;
        let node = catalog::add_unnamed(&mut self.graph.permit(), options).await?;
        let perms = Perms { uses: uses(given), shares: PermSet::ALL };
        let options = PortOptions { name: format!("the user of '{}'", given.name.text()), perms };
        let attached = Port::attach(&mut self.graph.permit(), node, options, Rc::new(|_| ())).await;
        let port = match attached {
            Ok(port) => port,
            Err(error) => {
                self.graph.permit().remove(node).await?;
                return Err(error);
            }
        };
        let writethrough = given.cache.writethrough;
        let (graph, local) = (self.graph.clone(), self.local.clone());
        Ok(Image { graph, local, node, driver, is_guess, port, writethrough, shown })
    }
}

fn uses(given: &Given) -> PermSet {
    let writes = if given.writable { PermSet::WRITE } else { PermSet::NONE };
    let resizes = if given.writable && given.resizes { PermSet::RESIZE } else { PermSet::NONE };
    PermSet::CONSISTENT_READ | writes | resizes
}

impl Image {
    /// Its bytes.
    pub fn disk(&self) -> Disk {
        Disk::new(self.port.handle().lane(&self.local), self.writethrough)
    }

    /// Bytes of the disk, as last published.
    pub fn size(&self) -> u64 {
        self.port.geometry().size
    }

    /// What the graph says of the node.
    pub fn report(&self) -> NodeReport {
        self.graph.node(self.node).expect("the node has a user, so it is there")
    }

    /// What the driver says of the node.
    pub async fn info(&self) -> DriverInfo {
        self.graph.info(self.node).await.expect("the node has a user, so it is there")
    }

    /// What it is called: its file, or where that does not say how it is opened, all that does.
    pub async fn filename(&self) -> String {
        let shown = self.shown.clone();
        match shown {
            Some(shown) => shown,
            None => catalog::info(&self.graph, self.node).await.map(|info| info.filename).unwrap_or_default(),
        }
    }

    /// The graph that the node is in.
    pub fn graph(&self) -> &Rc<Graph> {
        &self.graph
    }

    /// A node below: `file`, `backing`.
    pub fn child(&self, name: &str) -> Option<NodeId> {
        self.graph.child_node(self.node, name)
    }

    /// Gives it another size.
    pub async fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.graph.permit().resize(self.node, size, preallocation).await
    }

    /// Lets it name another backing file. What it stands on, as long as it is open, stays.
    pub async fn name_backing(&self, backing: Option<BackingName<'_>>) -> Result<()> {
        self.graph.permit().name_backing(self.node, backing).await
    }

    /// Changes what it is like: its key slots. `force`: also what makes data unreadable for good.
    pub async fn amend(&self, options: BlockdevAmendOptions, force: bool) -> Result<()> {
        catalog::amend(&self.graph, self.node, options, force).await
    }

    /// Compares what the image says of itself, and puts it right.
    pub async fn check(&self, repair: Repair) -> Result<CheckReport> {
        self.graph.permit().check(self.node, repair).await
    }

    /// The same, with what was found, which is there after an error too.
    pub async fn check_listing(&self, repair: Repair, findings: &mut Findings) -> Result<CheckReport> {
        self.graph.permit().check_listing(self.node, repair, findings).await
    }

    /// Its internal snapshots; `None`: it cannot have any.
    pub fn snapshots(&self) -> Option<Vec<SnapshotInfo>> {
        self.graph.snapshots(self.node)
    }

    /// A way into a node below, for as long as it is wanted.
    pub async fn enter(&self, node: NodeId, uses: PermSet) -> Result<Below> {
        let perms = Perms { uses, shares: PermSet::ALL };
        let options = PortOptions { name: "the user of a layer".to_owned(), perms };
        let port = Port::attach(&mut self.graph.permit(), node, options, Rc::new(|_| ())).await?;
        let writethrough = self.writethrough;
        Ok(Below { graph: self.graph.clone(), local: self.local.clone(), port, writethrough })
    }

    /// What was written is in the file, and the file is free. An error says that it may not be.
    pub async fn close(self) -> Result<()> {
        let Self { graph, node, port, .. } = self;
        port.detach(&mut graph.permit()).await;
        let removed = graph.permit().remove(node).await;
        if removed.is_err() {
            // The second time nobody minds what cannot be flushed.
            let _: Result<(), Error> = graph.permit().remove(node).await;
        }
        removed
    }
}
