//! The overlay format of the test suite does what a format does, or nothing that is tested with it means anything.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod support;

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use bench::{attach, enter, range, read, write, writer};
use block_core::base::Result;
use block_core::graph::{
    ChildId, DriverInfo, NewNode, NodeOptions, Perms, Preallocation, ReopenRequest, Role, WriteFlags,
};
use block_core::pipeline::{Filter, Filtered};
use block_core::port::PortLane;
use block_core::rt::sync::oneshot;
use block_core::rt::{Local, run_control};
use support::overlay::{Cluster, NewOverlay, Table};
use support::{Seen, add, graph, mem};

/// An overlay of 64 KiB in clusters of 4 KiB above bytes that are all 7.
async fn scene(work: impl AsyncFnOnce(Rc<PortLane>, Arc<Table>)) {
    let graph = graph();
    let base = add(&graph, mem("base", 7, &Arc::<Seen>::default())).await;
    let (node, table) = NewOverlay::above(Some(base)).add(&graph, "top").await;
    let port = attach(&graph, node, writer()).await.unwrap();
    work(port.handle().lane(&Local::current()), table).await;
    port.detach(&mut graph.permit()).await;
}

#[test]
fn what_an_overlay_has_not_got_is_its_backing_nodes() {
    run_control(async |_| {
        scene(async |lane, table| {
            let none = WriteFlags::default();
            write(&lane, 5000, &[1; 100], none).await.unwrap();
            lane.write_zeroes(&enter(&lane).await, range(8192, 4096), none).await.unwrap();
            let mut expected = vec![7; 16384];
            expected[5000..5100].fill(1);
            expected[8192..12288].fill(0);
            assert_eq!(read(&lane, range(0, 16384)).await.unwrap(), expected);
            assert_eq!([0, 1, 2, 3].map(|number| table.at(number)), {
                [Cluster::Absent, Cluster::Data, Cluster::Zero, Cluster::Absent]
            });
            // A part of a cluster of zeroes is written as data.
            write(&lane, 8192, &[2; 1], none).await.unwrap();
            lane.write_zeroes(&enter(&lane).await, range(12288, 512), none).await.unwrap();
            expected[8192] = 2;
            expected[12288..12800].fill(0);
            assert_eq!(read(&lane, range(0, 16384)).await.unwrap(), expected);
            assert_eq!(table.allocated(), 3);
        })
        .await;
    });
}

#[test]
fn compressed_writes_are_recorded() {
    run_control(async |_| {
        scene(async |lane, table| {
            let compressed = WriteFlags { compressed: true, ..WriteFlags::default() };
            write(&lane, 4096, &[3; 8192], compressed).await.unwrap();
            assert_eq!(read(&lane, range(4096, 8192)).await.unwrap(), [3; 8192]);
            assert_eq!(table.compressed(), [range(4096, 8192)]);
        })
        .await;
    });
}

/// Two writes into one cluster that has yet to be allocated: neither may lose the other's bytes.
#[test]
fn writes_that_allocate_the_same_cluster_keep_each_other() {
    run_control(async |local| {
        scene(async |lane, table| {
            let mut ends = Vec::new();
            for number in 0..8_u8 {
                let (lane, (done, end)) = (lane.clone(), oneshot());
                local.spawn(async move {
                    write(&lane, u64::from(number) * 512, &[number; 512], WriteFlags::default()).await.unwrap();
                    let _ = done.send(());
                });
                ends.push(end);
            }
            for end in ends {
                end.await.unwrap();
            }
            let expected: Vec<u8> = (0..8).flat_map(|number| [number; 512]).collect();
            assert_eq!(read(&lane, range(0, 4096)).await.unwrap(), expected);
            assert_eq!(table.allocated(), 1);
        })
        .await;
    });
}

#[test]
fn what_an_overlay_grows_by_reads_as_zeroes() {
    run_control(async |local| {
        let graph = graph();
        let base = add(&graph, mem("base", 7, &Arc::<Seen>::default())).await;
        let (node, _) = NewOverlay { size: 8192, ..NewOverlay::above(Some(base)) }.add(&graph, "top").await;
        graph.permit().resize(node, 12288, Preallocation::Off).await.unwrap();
        graph.permit().resize(node, 12800, Preallocation::Off).await.unwrap_err();
        let port = attach(&graph, node, writer()).await.unwrap();
        let seen = read(&port.handle().lane(&local), range(4096, 8192)).await.unwrap();
        assert_eq!(seen, [[7; 4096], [0; 4096]].concat());
        port.detach(&mut graph.permit()).await;
    });
}

/// A filter that keeps what it was told.
struct Told {
    file: ChildId,
    active: Arc<Mutex<Vec<bool>>>,
}

impl Filter for Told {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    async fn reopen(&self, (): &(), _: ReopenRequest<'_>) -> Result<()> {
        Ok(())
    }

    async fn set_active(&self, (): &(), common: NodeOptions, _: Perms) -> Result<Option<()>> {
        self.active.lock().unwrap().push(common.active);
        Ok(None)
    }

    fn info(&self, (): &()) -> DriverInfo {
        DriverInfo { driver: "told", ..DriverInfo::default() }
    }
}

/// Authors of formats and filters hear, as those of protocols do, when their node becomes active or inactive.
#[test]
fn formats_and_filters_are_told_of_activity() {
    run_control(async |_| {
        let graph = graph();
        let (overlay, table) = NewOverlay::above(None).add(&graph, "overlay").await;
        let told: Arc<Mutex<Vec<bool>>> = Arc::default();
        let filter = NewNode::new("filter".into(), NodeOptions::default(), |edges| {
            let file = edges.to("file", overlay, Role::Filtered);
            (Filtered(Told { file, active: told.clone() }), ())
        });
        let filter = add(&graph, filter).await;
        graph.permit().deactivate(Some(filter)).await.unwrap();
        graph.permit().activate(Some(filter)).await.unwrap();
        assert_eq!((table.told_active(), told.lock().unwrap().clone()), (vec![false, true], vec![false, true]));
    });
}
