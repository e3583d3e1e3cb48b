//! The compress filter over an overlay that records compressed writes.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod support;

use std::rc::Rc;
use std::sync::Arc;

use bench::{add, attach, enter, range, read, write, writer};
use block_core::graph::{PermSet, Perms, WriteFlags};
use block_core::port::PortLane;
use block_core::rt::sync::oneshot;
use block_core::rt::{Local, run_control};
use serde_json::{Value, json};
use support::overlay::{Cluster, NewOverlay, Table};
use support::{graph, mem};

fn compress(file: &Value) -> Value {
    json!({ "driver": "compress", "node-name": "compress", "file": file })
}

/// Two clusters of 4 KiB and a part of a third one, all of them 7 in the layer below.
async fn scene(work: impl AsyncFnOnce(Rc<PortLane>, Arc<Table>)) {
    let graph = graph();
    let base = support::add(&graph, mem("base", 7, &Arc::default())).await;
    let (_, table) = NewOverlay { size: 10000, ..NewOverlay::above(Some(base)) }.add(&graph, "top").await;
    let node = add(&graph, compress(&json!("top"))).await.unwrap();
    // Whoever writes to an incomplete last cluster has to be allowed to resize.
    let writer = Perms { uses: writer().uses | PermSet::RESIZE, ..writer() };
    let port = attach(&graph, node, writer).await.unwrap();
    assert_eq!(port.geometry().size, 10000);
    work(port.handle().lane(&Local::current()), table).await;
    port.detach(&mut graph.permit()).await.unwrap();
}

#[test]
fn every_write_is_one_of_whole_compressed_clusters() {
    run_control(async |_| {
        scene(async |lane, table| {
            let none = WriteFlags::default();
            write(&lane, 100, &[1; 10], none).await.unwrap();
            write(&lane, 9990, &[2; 10], none).await.unwrap();
            assert_eq!(table.compressed(), [range(0, 4096), range(8192, 10000 - 8192)]);
            let mut expected = vec![7; 10000];
            expected[100..110].fill(1);
            expected[9990..].fill(2);
            assert_eq!(read(&lane, range(0, 10000)).await.unwrap(), expected);
            write(&lane, 0, &[3; 8192], none).await.unwrap();
            assert_eq!(table.compressed()[2..], [range(0, 8192)]);
            // Zeroes take no room as they are.
            lane.write_zeroes(&enter(&lane).await, range(4096, 4096), none).await.unwrap();
            assert_eq!((table.at(1), table.compressed().len()), (Cluster::Zero, 3));
        })
        .await;
    });
}

#[test]
fn writes_into_one_cluster_keep_each_other() {
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
            assert!(table.compressed().iter().all(|at| *at == range(0, 4096)));
        })
        .await;
    });
}

/// A filter that takes writes in pieces leaves large clusters whole.
#[test]
fn a_cluster_goes_as_a_whole_through_a_log() {
    run_control(async |local| {
        const CLUSTER: u64 = 2 << 20;
        let graph = graph();
        let new = NewOverlay { size: 2 * CLUSTER, cluster: CLUSTER, ..NewOverlay::above(None) };
        let (_, table) = new.add(&graph, "top").await;
        let log = json!({ "driver": "null-co", "size": 64 << 20 });
        let logged = json!({ "driver": "blklogwrites", "file": "top", "log": log });
        let node = add(&graph, compress(&logged)).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        write(&port.handle().lane(&local), 0, &vec![1; 2 << 20], WriteFlags::default()).await.unwrap();
        assert_eq!(table.compressed(), [range(0, CLUSTER)]);
        port.detach(&mut graph.permit()).await.unwrap();
    });
}

#[test]
fn what_cannot_compress_is_refused() {
    run_control(async |_| {
        let graph = graph();
        let base = support::add(&graph, mem("base", 7, &Arc::default())).await;
        NewOverlay::above(Some(base)).add(&graph, "top").await;
        let disk = json!({ "driver": "null-co" });
        for file in [disk.clone(), json!({ "driver": "raw", "file": disk }), json!({ "driver": "raw", "file": "top" })]
        {
            let error = add(&graph, compress(&file)).await.unwrap_err();
            assert_eq!(error, "Compression is not supported for underlying format");
        }
        let filtered = json!({ "driver": "copy-on-read", "file": "top" });
        add(&graph, compress(&filtered)).await.unwrap();
    });
}
