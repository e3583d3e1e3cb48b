//! What the graph lets its users do together: the rules that hold for a node whatever its driver is. The rules of roles
//! are `graph/permission.rs`, file locks `file.rs`.
#![cfg(not(loom))]

mod support;

use std::rc::Rc;
use std::sync::Arc;

use block_core::graph::{Graph, NewNode, NodeId, NodeOptions, PermSet, Perms, Preallocation};
use block_core::port::{Port, PortOptions};
use block_core::rt::run_control;
use support::overlay::NewOverlay;
use support::{Mem, add, graph, mem, park};

const fn using(uses: PermSet) -> Perms {
    Perms { uses, shares: PermSet::ALL }
}

async fn attach(graph: &Rc<Graph>, node: NodeId, perms: Perms) -> Result<Port, String> {
    let options = PortOptions { name: "test port".into(), perms };
    Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await.map_err(|error| error.full())
}

/// A memory node with blocks of 4 KiB.
async fn blocks(graph: &Rc<Graph>, name: &str, size: u64) -> NodeId {
    let mem = Mem::aligned(vec![0; 65536], &Arc::default(), 4096);
    add(graph, NewNode::new(name.into(), NodeOptions::default(), |_| (mem, size))).await
}

/// The pipeline would write the rest of the last block too, which is not there.
#[test]
fn who_writes_half_a_block_at_the_end_has_to_ask_for_resize() {
    run_control(|_| async {
        let graph = graph();
        let node = blocks(&graph, "disk", 8192 + 512).await;
        let filter = add(&graph, park("filter", node, &Arc::default(), true)).await;
        let refused = "Cannot get 'write' permission without 'resize': ";
        let why = "would write past the end of node 'disk', whose size (8704) is not a multiple of its request alignment (4096)";
        for write in [PermSet::WRITE, PermSet::WRITE_UNCHANGED] {
            let error = attach(&graph, node, using(write)).await.err().unwrap();
            assert_eq!(error, format!("{refused}test port {why}"));
            // What asks for whole blocks is the node; whoever stands further above is told all the same.
            let error = attach(&graph, filter, using(write)).await.err().unwrap();
            assert_eq!(error, format!("{refused}node 'filter' {why}"));
            let grows = attach(&graph, node, using(write | PermSet::RESIZE)).await.unwrap();
            // One who may does not help another who may not: he could leave.
            assert!(attach(&graph, node, using(write)).await.is_err());
            grows.detach(&mut graph.permit()).await;
        }
        attach(&graph, filter, using(PermSet::CONSISTENT_READ)).await.unwrap();
        let whole = blocks(&graph, "whole", 8192).await;
        attach(&graph, whole, using(PermSet::WRITE)).await.unwrap();
    });
}

/// Nor does a size come about later that its writer cannot bear: nothing is cut off before it is refused.
#[test]
fn a_node_that_is_written_keeps_whole_blocks_when_it_is_resized() {
    run_control(|_| async {
        let graph = graph();
        let node = blocks(&graph, "disk", 8192).await;
        let port = attach(&graph, node, using(PermSet::WRITE)).await.unwrap();
        let error = graph.permit().resize(node, 4608, Preallocation::Off).await.unwrap_err().full();
        assert!(error.starts_with("Cannot get 'write' permission without 'resize': test port"), "{error}");
        assert_eq!(graph.node(node).unwrap().geometry.size, 8192);
        assert_eq!(graph.node(node).unwrap().parents, ["test port"], "the resize is nobody's user any more");
        graph.permit().resize(node, 4096, Preallocation::Off).await.unwrap();
        port.detach(&mut graph.permit()).await;
        graph.permit().resize(node, 4608, Preallocation::Off).await.unwrap();
    });
}

/// Behind a filter two users are one: as long as one of them may resize, both may write; and it may leave all the same.
#[test]
fn who_may_resize_leaves_without_asking() {
    run_control(|_| async {
        let graph = graph();
        let node = blocks(&graph, "disk", 8192 + 512).await;
        let filter = add(&graph, park("filter", node, &Arc::default(), true)).await;
        let grows = attach(&graph, filter, using(PermSet::WRITE | PermSet::RESIZE)).await.unwrap();
        let writes = attach(&graph, filter, using(PermSet::WRITE)).await.unwrap();
        grows.detach(&mut graph.permit()).await;
        assert!(attach(&graph, node, using(PermSet::WRITE)).await.is_err());
        writes.detach(&mut graph.permit()).await;
        assert!(attach(&graph, filter, using(PermSet::WRITE)).await.is_err());
        let port = attach(&graph, filter, using(PermSet::CONSISTENT_READ)).await.unwrap();
        // Nor is a resize of what stands behind a filter, which ends when it is over, one who may resize.
        graph.permit().resize(filter, 8192, Preallocation::Off).await.unwrap();
        port.detach(&mut graph.permit()).await;
        let _writes = attach(&graph, filter, using(PermSet::WRITE)).await.unwrap();
        assert!(graph.permit().resize(filter, 4608, Preallocation::Off).await.is_err());
        assert_eq!(graph.node(filter).unwrap().geometry.size, 8192);
        assert_eq!(graph.node(filter).unwrap().parents, ["test port"]);
    });
}

#[test]
fn nothing_is_changed_of_a_read_only_node() {
    run_control(|_| async {
        let graph = graph();
        let options = NodeOptions { read_only: true, ..NodeOptions::default() };
        let node = NewNode::new("ro".into(), options, |_| (Mem::new(vec![0; 512], &Arc::default()), 512));
        let node = add(&graph, node).await;
        for change in [PermSet::WRITE, PermSet::WRITE_UNCHANGED, PermSet::RESIZE] {
            let error = attach(&graph, node, using(change)).await.err().unwrap();
            assert_eq!(error, "Block node 'ro' is read-only", "{change}");
        }
        attach(&graph, node, using(PermSet::CONSISTENT_READ)).await.unwrap();
    });
}

/// An image that another process may be working with: its storage and its backing node may be written and resized.
#[test]
fn an_inactive_parent_bears_that_its_children_change() {
    run_control(|_| async {
        let graph = graph();
        let base = add(&graph, mem("base", 1, &Arc::default())).await;
        let (overlay, _) = NewOverlay::above(Some(base)).add(&graph, "overlay").await;
        let store = graph.child_node(overlay, "store").unwrap();
        // The overlay's reader bears no changes of what it reads.
        let shares = PermSet::ALL.without(PermSet::WRITE | PermSet::RESIZE);
        let reader = Perms { uses: PermSet::CONSISTENT_READ, shares };
        let _reader = attach(&graph, overlay, reader).await.unwrap();
        let writer = using(PermSet::WRITE | PermSet::RESIZE);
        for below in [base, store] {
            let error = attach(&graph, below, writer).await.err().unwrap();
            assert!(error.contains("is used by test port and not shared by node 'overlay'"), "{error}");
        }
        let mut permit = graph.permit();
        permit.deactivate(Some(overlay)).await.unwrap();
        permit.activate(Some(base)).await.unwrap();
        permit.activate(Some(store)).await.unwrap();
        for below in [base, store] {
            let port = attach(&graph, below, writer).await.unwrap();
            // It cannot wake while somebody else changes what it stands on.
            let error = permit.activate(Some(overlay)).await.unwrap_err().full();
            assert!(error.contains("is used by test port and not shared by node 'overlay'"), "{error}");
            port.detach(&mut permit).await;
        }
        permit.activate(Some(overlay)).await.unwrap();
    });
}
