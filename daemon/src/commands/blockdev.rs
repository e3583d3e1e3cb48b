//! Nodes of the graph: adding, removing, changing and listing them.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;
use std::vec;

use block_core::catalog::{self, BlockdevOptions};
use block_core::graph::{DetectZeroes, DriverInfo, NodeId, NodeReport, Preallocation};
use qmp::schema::{Empty, Value};
use qmp::{Error, Qapi, Result};

use super::bitmap::BlockDirtyInfo;
use super::internal_snapshot::SnapshotInfo;
use super::{Listing, Table};
use crate::daemon::Daemon;
use crate::refused;

pub(super) fn register(table: &mut Table) {
    table.add("blockdev-add", "Adds a node, and the nodes that are defined inside it.", blockdev_add);
    table.add(
        "blockdev-del",
        "Removes a node that nobody uses, with the nodes that were defined inside it.",
        blockdev_del,
    );
    table.add(
        "blockdev-reopen",
        "Changes options of nodes while they are in use: of all, or where one is refused of none.",
        blockdev_reopen,
    );
    table.add("block_resize", "Changes the size of a node and of what it lies on. Guests are told.", block_resize);
    table.add(
        "block-set-write-threshold",
        "Arms an event for the first write past an offset.",
        block_set_write_threshold,
    );
    table.add_list("query-named-block-nodes", "All nodes, the youngest first.", query_named_block_nodes);
    table.add("query-block", "Devices with nodes in them. There are none here: the list is empty.", query_block);
}

/// The arguments of `blockdev-del`.
#[derive(Clone, Debug, Qapi)]
struct NodeArguments {
    /// The node.
    node_name: String,
}

/// The arguments of `blockdev-reopen`.
#[derive(Clone, Debug, Qapi)]
struct ReopenArguments {
    /// For each node all its options: what is left out goes back to its default.
    options: Vec<BlockdevOptions>,
}

/// The arguments of `block_resize`.
#[derive(Clone, Debug, Qapi)]
struct ResizeArguments {
    /// The name of a device: there are none here, so `node-name` has to be given.
    device: Option<String>,
    /// The node.
    node_name: Option<String>,
    /// The new size in bytes, a multiple of 512.
    size: i64,
}

/// The arguments of `block-set-write-threshold`.
#[derive(Clone, Debug, Qapi)]
struct ThresholdArguments {
    /// The node.
    node_name: String,
    /// A byte offset; the first write past it is told and disarms it. 0 disarms it now.
    write_threshold: u64,
}

/// The arguments of `query-named-block-nodes`.
#[derive(Clone, Debug, Qapi)]
struct QueryNodesArguments {
    /// Leave out the images below each image, and how many they are.
    #[qapi(default = false)]
    flat: bool,
}

/// A node, as `query-named-block-nodes` shows it.
#[derive(Clone, Debug, Qapi)]
struct BlockDeviceInfo {
    /// What a person would call the image.
    file: String,
    /// The node's name.
    node_name: Option<String>,
    /// Whether it refuses writes.
    ro: bool,
    /// Its driver.
    drv: String,
    /// What a person would call the image that this one stands on; absent where it stands on none here.
    #[qapi(rename = "backing_file")]
    backing_file: Option<String>,
    /// How many images lie below it, those that filters let through among them; 0 where that was not asked for.
    #[qapi(rename = "backing_file_depth")]
    backing_file_depth: i64,
    /// Whether it may be used.
    active: bool,
    /// Whether its data is encrypted.
    encrypted: bool,
    /// What becomes of a write of zeroes.
    #[qapi(rename = "detect_zeroes")]
    detect_zeroes: DetectZeroesInfo,
    /// Always 0: limits belong to throttle nodes.
    bps: i64,
    /// Always 0.
    #[qapi(rename = "bps_rd")]
    bps_rd: i64,
    /// Always 0.
    #[qapi(rename = "bps_wr")]
    bps_wr: i64,
    /// Always 0.
    iops: i64,
    /// Always 0.
    #[qapi(rename = "iops_rd")]
    iops_rd: i64,
    /// Always 0.
    #[qapi(rename = "iops_wr")]
    iops_wr: i64,
    /// The image.
    image: ImageInfo,
    /// How the host caches it.
    cache: CacheInfo,
    /// The armed threshold in bytes; 0: none.
    #[qapi(rename = "write_threshold")]
    write_threshold: i64,
    /// Its dirty bitmaps, the youngest first; absent where it has none.
    dirty_bitmaps: Option<Vec<BlockDirtyInfo>>,
}

/// What becomes of a write of zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevDetectZeroesOptions")]
enum DetectZeroesInfo {
    /// It is written like any other.
    Off,
    /// It becomes a write-zeroes.
    On,
    /// It becomes a write-zeroes that may free the space.
    Unmap,
}

/// An image.
#[derive(Clone, Debug, Qapi)]
struct ImageInfo {
    /// What a person would call it.
    filename: String,
    /// Its driver.
    format: String,
    /// Whether it was not closed in good order; absent where it is no file.
    dirty_flag: Option<bool>,
    /// Bytes that it occupies.
    actual_size: Option<i64>,
    /// Bytes that a guest sees.
    virtual_size: i64,
    /// Bytes in a cluster.
    cluster_size: Option<i64>,
    /// Whether its data is encrypted; absent where it is not.
    encrypted: Option<bool>,
    /// What the image says that it stands on.
    backing_filename: Option<String>,
    /// The same, from where the daemon is. What it stands on here may be another one.
    full_backing_filename: Option<String>,
    /// The format of that, as the image says.
    backing_filename_format: Option<String>,
    /// Its internal snapshots, the oldest first; absent where it has none.
    snapshots: Option<Vec<SnapshotInfo>>,
    /// The image that it stands on, or lets through; absent where that was not asked for.
    backing_image: Option<Box<ImageInfo>>,
    /// What only this driver says.
    format_specific: Option<Value>,
}

/// How the host caches a node.
#[derive(Clone, Copy, Debug, Qapi)]
#[qapi(name = "BlockdevCacheInfo")]
struct CacheInfo {
    /// A write is complete before it is stable.
    writeback: bool,
    /// The page cache is bypassed.
    direct: bool,
    /// Flushes are ignored.
    no_flush: bool,
}

async fn blockdev_add(daemon: Rc<Daemon>, options: BlockdevOptions) -> Result<Empty> {
    catalog::add(&mut daemon.graph.permit(), options).await.map_err(refused)?;
    Ok(Empty {})
}

async fn blockdev_del(daemon: Rc<Daemon>, arguments: NodeArguments) -> Result<Empty> {
    let node = find(&daemon, &arguments.node_name)?;
    daemon.graph.permit().remove(node).await.map_err(refused)?;
    Ok(Empty {})
}

async fn blockdev_reopen(daemon: Rc<Daemon>, arguments: ReopenArguments) -> Result<Empty> {
    catalog::reopen(&mut daemon.graph.permit(), arguments.options).await.map_err(refused)?;
    Ok(Empty {})
}

async fn block_resize(daemon: Rc<Daemon>, arguments: ResizeArguments) -> Result<Empty> {
    let ResizeArguments { device, node_name, size } = arguments;
    let node = node_name.as_deref().and_then(|name| daemon.graph.find(name));
    let node = node.ok_or_else(|| no_such_device(device.as_deref(), node_name.as_deref()))?;
    let size = u64::try_from(size).map_err(|_| Error::generic("Parameter 'size' expects a >0 size"))?;
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::generic(format!("The new size must be a multiple of {SECTOR}")));
    }
    daemon.graph.permit().resize(node, size, Preallocation::Off).await.map_err(refused)?;
    Ok(Empty {})
}

async fn block_set_write_threshold(daemon: Rc<Daemon>, arguments: ThresholdArguments) -> Result<Empty> {
    let ThresholdArguments { node_name, write_threshold } = arguments;
    let missing = || Error::generic(format!("Device '{node_name}' not found"));
    let node = daemon.graph.find(&node_name).ok_or_else(missing)?;
    let threshold = (write_threshold != 0).then_some(write_threshold);
    if daemon.graph.set_write_threshold(node, threshold) { Ok(Empty {}) } else { Err(missing()) }
}

async fn query_named_block_nodes(daemon: Rc<Daemon>, arguments: QueryNodesArguments) -> Result<NodeRows> {
    let nodes = daemon.graph.nodes();
    let ids: Vec<_> = nodes.iter().map(|node| node.id).collect();
    Ok(NodeRows { flat: arguments.flat, nodes: ids.into_iter(), images: Images::of(daemon, nodes) })
}

/// The nodes, the youngest first, as clients are used to.
struct NodeRows {
    flat: bool,
    nodes: vec::IntoIter<NodeId>,
    images: Images,
}

impl Listing for NodeRows {
    type Row = BlockDeviceInfo;

    async fn next(&mut self) -> Option<BlockDeviceInfo> {
        loop {
            // A node that goes away meanwhile is none to report.
            let id = self.nodes.next_back()?;
            if let Some(row) = self.row(id).await {
                return Some(row);
            }
        }
    }
}

impl NodeRows {
    async fn row(&mut self, id: NodeId) -> Option<BlockDeviceInfo> {
        let (image, below) = self.images.ask(id).await?;
        let node = self.images.nodes.get(&id)?.clone();
        let attached = match child(&node, "backing") {
            Some(backing) => self.images.named_info(backing).await.map(|backing| backing.filename.clone()),
            None => None,
        };
        let mut info = BlockDeviceInfo::of(&node, image, attached);
        if !self.flat {
            let below = self.images.chain(below).await;
            info.backing_file_depth = signed(below.len() as u64);
            info.image.backing_image = below
                .into_iter()
                .rev()
                .fold(None, |backing_image, image| Some(Box::new(ImageInfo { backing_image, ..image })));
        }
        Some(info)
    }
}

/// What nodes say about their images. Each is asked once, however many stand on it.
struct Images {
    daemon: Rc<Daemon>,
    /// As they were at one moment: others change the graph meanwhile, and who stands on whom must not be a circle.
    nodes: HashMap<NodeId, NodeReport>,
    /// Without the images below; and which of them is the next one.
    asked: HashMap<NodeId, Option<(ImageInfo, Option<NodeId>)>>,
    named: HashMap<NodeId, Option<Rc<DriverInfo>>>,
}

impl Images {
    fn of(daemon: Rc<Daemon>, nodes: Vec<NodeReport>) -> Self {
        let nodes = nodes.into_iter().map(|node| (node.id, node)).collect();
        Self { daemon, nodes, asked: HashMap::new(), named: HashMap::new() }
    }

    /// The images from `next` down.
    async fn chain(&mut self, mut next: Option<NodeId>) -> Vec<ImageInfo> {
        let mut images = Vec::new();
        while let Some(id) = next
            && let Some((image, below)) = self.ask(id).await
        {
            images.push(image);
            next = below;
        }
        images
    }

    async fn ask(&mut self, id: NodeId) -> Option<(ImageInfo, Option<NodeId>)> {
        if let Some(known) = self.asked.get(&id) {
            return known.clone();
        }
        let image = self.image(id).await;
        self.asked.insert(id, image.clone());
        image
    }

    async fn image(&mut self, id: NodeId) -> Option<(ImageInfo, Option<NodeId>)> {
        let node = self.nodes.get(&id)?.clone();
        let info = self.named_info(id).await?;
        let (dirty_flag, cluster_size) = self.layout(&node, &info).await;
        let (backing_filename, backing_filename_format) =
            info.backing.clone().map_or((None, None), |(name, format)| (Some(name), format));
        let full_backing_filename = backing_filename.as_deref().map(|name| beside(&info.filename, name));
        let snapshots = self.daemon.graph.snapshots(id).unwrap_or_default();
        let snapshots: Vec<_> = snapshots.into_iter().map(SnapshotInfo::of).collect();
        let image = ImageInfo {
            filename: info.filename.clone(),
            format: info.driver.to_owned(),
            dirty_flag,
            actual_size: info.allocated.map(signed),
            virtual_size: signed(node.geometry.size),
            cluster_size: cluster_size.map(signed),
            encrypted: info.encrypted.then_some(true),
            backing_filename,
            full_backing_filename,
            backing_filename_format,
            snapshots: Some(snapshots).filter(|all| !all.is_empty()),
            backing_image: None,
            format_specific: info.specific.clone(),
        };
        Some((image, image_below(&node)))
    }

    /// Whether the image was closed in good order, and its clusters. What only hands requests on says what lies below it says.
    async fn layout(&mut self, node: &NodeReport, info: &DriverInfo) -> (Option<bool>, Option<u64>) {
        let mut known = (info.dirty, info.cluster_size);
        let mut below = bearer(node, info.driver);
        while let Some(id) = below.take_if(|_| known == (None, None)) {
            let (Some(info), Some(lower)) = (self.named_info(id).await, self.nodes.get(&id)) else { break };
            known = (info.dirty, info.cluster_size);
            below = bearer(lower, info.driver);
        }
        known
    }

    /// What the driver says about a node. A node without a file of its own is called after what it lies on.
    async fn named_info(&mut self, id: NodeId) -> Option<Rc<DriverInfo>> {
        // From the node down to the first one that has a name, or is known already.
        let (mut nameless, mut next, mut lower) = (Vec::new(), Some(id), None);
        while let Some(id) = next {
            lower = self.named.get(&id).cloned();
            if lower.is_some() {
                break;
            }
            match self.daemon.graph.info(id).await {
                Some(info) if info.filename.is_empty() => {
                    nameless.push((id, info));
                    next = self.nodes.get(&id).and_then(file_below);
                }
                named => {
                    let named = named.map(Rc::new);
                    self.named.insert(id, named.clone());
                    lower = Some(named);
                    break;
                }
            }
        }
        for (id, mut info) in nameless.into_iter().rev() {
            let named = match lower {
                None => Some(Rc::new(info)),
                // What it lies on has gone meanwhile.
                Some(None) => None,
                Some(Some(below)) => {
                    info.filename.clone_from(&below.filename);
                    info.allocated = info.allocated.or(below.allocated);
                    Some(Rc::new(info))
                }
            };
            self.named.insert(id, named.clone());
            lower = Some(named);
        }
        lower.flatten()
    }
}

/// The image that a node stands on, or lets through.
fn image_below(node: &NodeReport) -> Option<NodeId> {
    node.filtered.or_else(|| child(node, "backing"))
}

/// There are no named devices here, only nodes.
async fn query_block(_: Rc<Daemon>, _: Empty) -> Result<Vec<Value>> {
    Ok(vec![])
}

impl BlockDeviceInfo {
    fn of(node: &NodeReport, image: ImageInfo, backing_file: Option<String>) -> Self {
        let options = &node.options;
        Self {
            file: image.filename.clone(),
            node_name: Some(node.name.clone()),
            ro: options.read_only,
            drv: image.format.clone(),
            backing_file,
            backing_file_depth: 0,
            active: options.active,
            encrypted: image.encrypted == Some(true),
            detect_zeroes: match options.detect_zeroes {
                DetectZeroes::Off => DetectZeroesInfo::Off,
                DetectZeroes::On => DetectZeroesInfo::On,
                DetectZeroes::Unmap => DetectZeroesInfo::Unmap,
            },
            bps: 0,
            bps_rd: 0,
            bps_wr: 0,
            iops: 0,
            iops_rd: 0,
            iops_wr: 0,
            image,
            cache: CacheInfo { writeback: true, direct: options.direct, no_flush: options.no_flush },
            write_threshold: node.write_threshold.map_or(0, signed),
            dirty_bitmaps: Some(node.bitmaps.iter().map(BlockDirtyInfo::of).collect())
                .filter(|all: &Vec<_>| !all.is_empty()),
        }
    }
}

/// What `name`, which the image `base` gives, means from here.
fn beside(base: &str, name: &str) -> String {
    let folder = Path::new(base).parent().unwrap_or(Path::new(""));
    folder.join(name).to_string_lossy().into_owned()
}

/// What a node says it is laid out as.
fn bearer(node: &NodeReport, driver: &str) -> Option<NodeId> {
    let is_thin = matches!(driver, "raw" | "luks");
    node.filtered.or_else(|| file_below(node).filter(|_| is_thin))
}

/// What a node lies on, if it lies on anything.
pub(super) fn file_below(node: &NodeReport) -> Option<NodeId> {
    child(node, "file")
}

fn child(node: &NodeReport, edge: &str) -> Option<NodeId> {
    node.children.iter().find(|(name, _)| *name == edge).map(|(_, id)| *id)
}

/// The node of this name, or the refusal that clients know.
pub(super) fn find(daemon: &Daemon, name: &str) -> Result<NodeId> {
    let missing = || Error::generic(format!("Failed to find node with node-name='{name}'"));
    daemon.graph.find(name).ok_or_else(missing)
}

/// The refusal of a command that takes a device or a node.
pub(crate) fn no_such_device(device: Option<&str>, node: Option<&str>) -> Error {
    let (device, node) = (device.unwrap_or_default(), node.unwrap_or_default());
    Error::generic(format!("Cannot find device='{device}' nor node-name='{node}'"))
}

/// QMP's integers are signed; sizes are at most `i64::MAX`, and counters take longer than any uptime to get there.
pub(crate) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

const SECTOR: u64 = 512;
