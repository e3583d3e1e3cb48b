//! The graph as a whole: its edges, its children that come and go, which part of it is active.

use std::collections::BTreeMap;
use std::rc::Rc;

use block_core::graph::{EdgeReport, NodeId, PermSet, VertexReport};
use qmp::schema::Empty;
use qmp::{Error, Qapi, Result};

use super::Table;
use super::blockdev::{find, no_such_device};
use crate::daemon::Daemon;
use crate::refused;

pub(super) fn register(table: &mut Table) {
    table.add(
        "blockdev-set-active",
        "Makes nodes inactive, so that another process may have their images, or active again.",
        blockdev_set_active,
    );
    table.add(
        "change-backing-file",
        "Lets an image name another backing file. What its node stands on stays as it is.",
        change_backing_file,
    );
    table.add_with(
        "x-blockdev-change",
        "Adds a child to a quorum, or takes one from it, while it is in use.",
        &["unstable"],
        x_blockdev_change,
    );
    table.add_with(
        "x-blockdev-set-iothread",
        "Checks its arguments and does nothing: nodes have no thread here, the queues of exports have.",
        &["unstable"],
        x_blockdev_set_iothread,
    );
    table.add_with(
        "x-debug-query-block-graph",
        "All nodes and exports, and what each uses and bears of those below it.",
        &["unstable"],
        x_debug_query_block_graph,
    );
}

/// The arguments of `blockdev-set-active`.
#[derive(Clone, Debug, Qapi)]
struct SetActiveArguments {
    /// The node; with it goes what it stands on. All nodes if absent.
    node_name: Option<String>,
    /// Whether it is to be active.
    active: bool,
}

/// The arguments of `change-backing-file`.
#[derive(Clone, Debug, Qapi)]
struct ChangeBackingFileArguments {
    /// The node that `image-node-name` is, or that stands on it. No other node may stand on it.
    device: String,
    /// The node whose image is changed: it has a backing node, and is not read-only.
    image_node_name: String,
    /// What the image is to call its backing file: at most 1023 bytes, which are not looked at. Empty: it names none. The
    /// format that it names stays.
    backing_file: String,
}

/// The arguments of `x-blockdev-change`. Either `child` or `node` is given.
#[derive(Clone, Debug, Qapi)]
struct ChangeArguments {
    /// The quorum.
    parent: String,
    /// The edge to the child that is taken away, `children.1` for instance.
    child: Option<String>,
    /// The node that becomes one more child; nobody uses it yet.
    node: Option<String>,
}

/// The arguments of `x-blockdev-set-iothread`.
#[derive(Clone, Debug, Qapi)]
struct SetIothreadArguments {
    /// The node.
    node_name: String,
    /// An IOThread, or null for the main thread.
    iothread: StrOrNull,
    /// Whether the node may have an export.
    force: Option<bool>,
}

/// A text or nothing.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(alternate)]
enum StrOrNull {
    /// The text.
    S(String),
    /// Nothing.
    N,
}

/// The answer of `x-debug-query-block-graph`.
#[derive(Clone, Debug, Qapi)]
struct XDbgBlockGraph {
    /// What there is.
    nodes: Vec<XDbgBlockGraphNode>,
    /// What leads where.
    edges: Vec<XDbgBlockGraphEdge>,
}

/// A node or an export.
#[derive(Clone, Debug, Qapi)]
struct XDbgBlockGraphNode {
    /// A number that holds in this answer alone.
    id: i64,
    /// What it is.
    r#type: XDbgBlockGraphNodeType,
    /// Its name.
    name: String,
}

/// What stands in the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
enum XDbgBlockGraphNodeType {
    /// An export, or whatever else starts requests.
    #[qapi(rename = "block-backend")]
    Backend,
    /// A job.
    #[qapi(rename = "block-job")]
    Job,
    /// A node.
    #[qapi(rename = "block-driver")]
    Driver,
}

/// An edge.
#[derive(Clone, Debug, Qapi)]
struct XDbgBlockGraphEdge {
    /// Where it begins.
    parent: i64,
    /// Where it leads.
    child: i64,
    /// What the parent calls it.
    name: String,
    /// What the parent does with the child.
    perm: Vec<BlockPermission>,
    /// What the parent bears from others.
    shared_perm: Vec<BlockPermission>,
}

/// What can be done with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
enum BlockPermission {
    /// Reads see nothing half-done.
    ConsistentRead,
    /// Writes.
    Write,
    /// Writes that change nothing that is read.
    WriteUnchanged,
    /// Changes of the size.
    Resize,
}

async fn blockdev_set_active(daemon: Rc<Daemon>, arguments: SetActiveArguments) -> Result<Empty> {
    let SetActiveArguments { node_name, active } = arguments;
    let node = node_name.map(|name| find(&daemon, &name)).transpose()?;
    let mut permit = daemon.graph.permit();
    let done = if active { permit.activate(node).await } else { permit.deactivate(node).await };
    done.map(|()| Empty {}).map_err(refused)
}

async fn change_backing_file(daemon: Rc<Daemon>, arguments: ChangeBackingFileArguments) -> Result<Empty> {
    let ChangeBackingFileArguments { device, image_node_name, backing_file } = arguments;
    let graph = &daemon.graph;
    let top = graph.find(&device).ok_or_else(|| no_such_device(Some(&device), Some(&device)))?;
    graph.check_root(top).map_err(refused)?;
    let image = graph.find(&image_node_name).ok_or_else(|| no_such_device(None, Some(&image_node_name)))?;
    let name = Some(&*backing_file).filter(|name| !name.is_empty());
    graph.permit().change_backing_file(top, image, name).await.map_err(refused)?;
    Ok(Empty {})
}

async fn x_blockdev_change(daemon: Rc<Daemon>, arguments: ChangeArguments) -> Result<Empty> {
    let ChangeArguments { parent, child, node } = arguments;
    let missing = || no_such_device(Some(&parent), Some(&parent));
    let parent = daemon.graph.find(&parent).ok_or_else(missing)?;
    let mut permit = daemon.graph.permit();
    let done = match (child, node) {
        (None, None) => return Err(Error::generic("Either child or node must be specified")),
        (Some(_), Some(_)) => return Err(Error::generic("The parameters child and node are in conflict")),
        (Some(child), None) => permit.remove_child(parent, &child).await,
        (None, Some(node)) => {
            let missing = || Error::generic(format!("Node '{node}' not found"));
            permit.add_child(parent, daemon.graph.find(&node).ok_or_else(missing)?).await
        }
    };
    done.map(|()| Empty {}).map_err(refused)
}

async fn x_blockdev_set_iothread(daemon: Rc<Daemon>, arguments: SetIothreadArguments) -> Result<Empty> {
    let SetIothreadArguments { node_name, iothread, force } = arguments;
    let node = find(&daemon, &node_name)?;
    if force != Some(true) && daemon.graph.has_root(node) {
        return Err(Error::generic(format!(
            "Node {node_name} is associated with a BlockBackend and could be in use (use force=true to override this \
             check)"
        )));
    }
    match iothread {
        StrOrNull::S(id) if daemon.objects.find(&id).is_none() => {
            Err(Error::generic(format!("Cannot find iothread {id}")))
        }
        StrOrNull::S(_) | StrOrNull::N => Ok(Empty {}),
    }
}

async fn x_debug_query_block_graph(daemon: Rc<Daemon>, _: Empty) -> Result<XDbgBlockGraph> {
    Ok(XDbgBlockGraph::of(&daemon.graph.picture()))
}

impl XDbgBlockGraph {
    fn of(picture: &[VertexReport]) -> Self {
        let numbers: BTreeMap<NodeId, i64> = picture.iter().map(|vertex| vertex.id).zip(1..).collect();
        let edges = picture.iter().flat_map(|vertex| {
            vertex.edges.iter().map(|edge| XDbgBlockGraphEdge::of(numbers[&vertex.id], edge, numbers[&edge.to]))
        });
        let nodes = picture.iter().map(|vertex| XDbgBlockGraphNode {
            id: numbers[&vertex.id],
            r#type: match vertex.is_root {
                true => XDbgBlockGraphNodeType::Backend,
                false => XDbgBlockGraphNodeType::Driver,
            },
            name: vertex.name.clone(),
        });
        Self { nodes: nodes.collect(), edges: edges.collect() }
    }
}

impl XDbgBlockGraphEdge {
    fn of(parent: i64, edge: &EdgeReport, child: i64) -> Self {
        let (perm, shared_perm) = (listed(edge.perms.uses), listed(edge.perms.shares));
        Self { parent, child, name: edge.name.clone().into_owned(), perm, shared_perm }
    }
}

fn listed(perms: PermSet) -> Vec<BlockPermission> {
    let all = [
        (PermSet::CONSISTENT_READ, BlockPermission::ConsistentRead),
        (PermSet::WRITE, BlockPermission::Write),
        (PermSet::WRITE_UNCHANGED, BlockPermission::WriteUnchanged),
        (PermSet::RESIZE, BlockPermission::Resize),
    ];
    all.into_iter().filter(|(perm, _)| perms.contains(*perm)).map(|(_, listed)| listed).collect()
}
