//! Changes of a node's size that meet other changes, and those that are refused when the size has changed already.
#![cfg(not(loom))]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block_core::base::{Error, Result};
use block_core::graph::{
    ChildId, DriverInfo, Geometry, Graph, NewNode, NodeId, NodeOptions, Operation, Preallocation, ReopenRequest, Role,
};
use block_core::pipeline::{Filter, Filtered};
use block_core::rt::run_control;
use support::user::{a_while, beside, until};
use support::{Seen, add, graph, mem, park};

fn size(graph: &Graph, node: NodeId) -> u64 {
    graph.node(node).expect("it is there").geometry.size
}

/// While a resize waits for its drain, the filter that it goes through is led to another node: that one changes, and the
/// one that the filter has left stays as it is.
#[test]
fn a_resize_goes_where_its_node_leads_when_it_is_drained() {
    run_control(|_| async {
        let graph = graph();
        let one = add(&graph, mem("one", 1, &Arc::default())).await;
        let other = add(&graph, mem("other", 2, &Arc::default())).await;
        let filter = add(&graph, park("filter", one, &Arc::default(), true)).await;
        let mut permit = graph.permit();
        let drained = permit.drain(&[filter]).await.unwrap();
        let resizing = graph.clone();
        let resized = beside(async move { resizing.permit().resize(filter, 4096, Preallocation::Off).await });
        a_while().await;
        let file = graph.child(filter, "file").unwrap();
        let committed = drained.write(|edit, set| edit.set_edge(set.owner(filter)?, file, other)).unwrap();
        committed.close(&mut permit).await;
        until(|| resized.borrow().is_some()).await;
        resized.take().unwrap().unwrap();
        assert_eq!((size(&graph, one), size(&graph, other), size(&graph, filter)), (65536, 4096, 4096));
    });
}

/// The same while its drain waits for another command's: what has become true meanwhile counts.
#[test]
fn a_resize_that_was_shut_out_while_it_waited_is_refused() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let filter = add(&graph, park("filter", node, &Arc::default(), true)).await;
        let mut permit = graph.permit();
        let drained = permit.drain(&[node]).await.unwrap();
        let resizing = graph.clone();
        let resized = beside(async move { resizing.permit().resize(filter, 4096, Preallocation::Off).await });
        a_while().await;
        let _blocker = graph.block(filter, &[Operation::Resize], "a test has it");
        drop(drained);
        until(|| resized.borrow().is_some()).await;
        assert_eq!(resized.take().unwrap().unwrap_err().full(), "Node 'filter' is busy: a test has it");
        assert_eq!(size(&graph, node), 65536);
    });
}

/// A filter that refuses its child's new size when the child has it already.
struct Late {
    file: ChildId,
    below: Arc<Seen>,
}

impl Filter for Late {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    fn geometry(&self, (): &(), child: Geometry, _: &[Geometry]) -> Result<Geometry> {
        if self.below.resized.load(Ordering::Relaxed) == child.size {
            return Err(Error::new("not this size"));
        }
        Ok(child)
    }

    async fn reopen(&self, (): &(), _: ReopenRequest<'_>) -> Result<()> {
        Ok(())
    }

    fn info(&self, (): &()) -> DriverInfo {
        DriverInfo { driver: "late", ..DriverInfo::default() }
    }
}

/// A resize that cannot be published gives the driver its size back: else the graph and the file differ for ever.
#[test]
fn a_resize_that_is_refused_late_is_undone() {
    run_control(|_| async {
        let graph = graph();
        let below = Arc::<Seen>::default();
        let node = add(&graph, mem("node", 1, &below)).await;
        let late = NewNode::new("late".into(), NodeOptions::default(), |edges| {
            let file = edges.to("file", node, Role::Filtered);
            (Filtered(Late { file, below: below.clone() }), ())
        });
        let late = add(&graph, late).await;
        let error = graph.permit().resize(late, 131_072, Preallocation::Off).await.unwrap_err().full();
        assert_eq!(error, "not this size");
        assert_eq!((size(&graph, node), below.resized.load(Ordering::Relaxed)), (65536, 65536));
    });
}
