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
use block_core::base::IoError;
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
    port.detach(&mut graph.permit()).await;
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
        port.detach(&mut graph.permit()).await;
    });
}

/// A node that takes less than two clusters at once gets one at a time, not one and a half.
#[test]
fn what_is_cut_is_cut_between_clusters() {
    run_control(async |local| {
        for (most, fits) in [(6144, true), (2048, false)] {
            let graph = graph();
            let (_, table) = NewOverlay { size: 16384, ..NewOverlay::above(None) }.add(&graph, "top").await;
            let cut = json!({ "driver": "blkdebug", "image": "top", "max-transfer": most });
            let node = add(&graph, compress(&cut)).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            let written = write(&port.handle().lane(&local), 0, &[1; 12288], WriteFlags::default()).await;
            if fits {
                written.unwrap();
                assert_eq!(table.compressed(), [range(0, 4096), range(4096, 4096), range(8192, 4096)]);
            } else {
                assert_eq!((written, table.compressed()), (Err(IoError::Unsupported), Vec::new()));
            }
            port.detach(&mut graph.permit()).await;
        }
    });
}

/// Who asks for compressed writes by himself asks for whole clusters; the last one may be short.
#[test]
fn a_part_of_a_cluster_is_not_compressed() {
    run_control(async |local| {
        let graph = graph();
        let (node, table) = NewOverlay { size: 10000, ..NewOverlay::above(None) }.add(&graph, "top").await;
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        let compressed = WriteFlags { compressed: true, ..WriteFlags::default() };
        for (start, len) in [(512, 4096), (0, 512), (4096, 4608), (8192, 1000), (8704, 10000 - 8704)] {
            let refused = write(&lane, start, &vec![1; len], compressed).await;
            assert_eq!(refused, Err(IoError::Misaligned), "{start} {len}");
        }
        assert_eq!((table.compressed(), table.allocated()), (Vec::new(), 0));
        write(&lane, 4096, &[1; 10000 - 4096], compressed).await.unwrap();
        assert_eq!(table.compressed(), [range(4096, 10000 - 4096)]);
        port.detach(&mut graph.permit()).await;
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
