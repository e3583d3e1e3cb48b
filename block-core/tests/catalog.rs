//! Names, references, inheritance and windows: what `blockdev-add` and `blockdev-reopen` accept (hostile inputs GR-01
//! to GR-03, GR-09 to GR-11, GR-23, GR-26).
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;

use std::rc::Rc;
use std::sync::Arc;

use bench::{add, attach, enter, io_thread, on, reopen, with, writer};
use block_core::base::ByteRange;
use block_core::catalog;
use block_core::graph::{DetectZeroes, DiscardMode, Graph, PermSet, Perms, Preallocation, WriteFlags};
use block_core::rt::{IoBuf, run_control};
use serde_json::{Value, json};

fn graph() -> Rc<Graph> {
    Graph::new(Arc::new(|_| ()))
}

fn disk(name: &str) -> Value {
    json!({ "driver": "null-co", "node-name": name, "size": 10240 })
}

#[test]
fn the_catalog_knows_its_drivers() {
    let mut known = catalog::drivers().to_vec();
    known.sort_unstable();
    let expected = [
        "blkdebug",
        "blklogwrites",
        "blkreplay",
        "blkverify",
        "compress",
        "copy-before-write",
        "copy-on-read",
        "file",
        "host_device",
        "luks",
        "null-aio",
        "null-co",
        "preallocate",
        "qcow2",
        "quorum",
        "raw",
        "snapshot-access",
        "throttle",
    ];
    assert_eq!(known, expected);
}

#[test]
fn what_makes_no_node_is_refused_in_qemus_words() {
    run_control(async |_| {
        let graph = graph();
        add(&graph, disk("taken")).await.unwrap();
        let deep = (0..100).fold(json!({ "driver": "null-co" }), |below, _| json!({ "driver": "raw", "file": below }));
        for (options, reason) in [
            (json!({ "driver": "null-co" }), "'node-name' must be specified for the root node"),
            (disk("1n"), "Invalid node-name: '1n'"),
            (disk("a/b"), "Invalid node-name: 'a/b'"),
            (disk(""), "Invalid node-name: ''"),
            (disk(&"n".repeat(32)), "Node name too long"),
            (disk("taken"), "Duplicate nodes with node-name='taken'"),
            (json!({ "driver": "nope", "node-name": "n" }), "Parameter 'driver' does not accept value 'nope'"),
            (json!({ "node-name": "n" }), "Parameter 'driver' is missing"),
            (with(disk("n"), &json!({ "filename": "x" })), "Parameter 'filename' is unexpected"),
            (
                with(disk("n"), &json!({ "latency-ns": 1_u64 << 63 })),
                "latency-ns is invalid: 9223372036854775808 is more than",
            ),
            (with(disk("n"), &json!({ "size": -1 })), "Value '-1' is out of range for parameter 'size'"),
            (with(disk("n"), &json!({ "detect-zeroes": "unmap" })), "setting detect-zeroes to unmap is not allowed"),
            (json!({ "driver": "raw", "node-name": "n" }), "Parameter 'file' is missing"),
            (json!({ "driver": "raw", "node-name": "n", "file": "n" }), "Cannot find device='n' nor node-name='n'"),
            (json!({ "driver": "raw", "node-name": "n", "file": disk("n") }), "Duplicate nodes with node-name='n'"),
            (with(deep, &json!({ "node-name": "deep" })), "Parameter 'file.file.file"),
        ] {
            let error = add(&graph, options).await.unwrap_err();
            assert!(error.starts_with(reason), "{error}");
            assert_eq!(graph.nodes().len(), 1, "{reason}");
        }
        add(&graph, disk(&"n".repeat(31))).await.unwrap();
    });
}

#[test]
fn a_chain_has_an_end() {
    run_control(async |_| {
        let graph = graph();
        let mut refused = None;
        for number in 0..100 {
            let below = if number == 0 { "zero".to_owned() } else { format!("r{}", number - 1) };
            if number == 0 {
                add(&graph, disk("zero")).await.unwrap();
            }
            let raw = json!({ "driver": "raw", "node-name": format!("r{number}"), "file": below });
            if let Err(error) = add(&graph, raw).await {
                refused = Some((number, error));
                break;
            }
        }
        let (number, error) = refused.expect("some depth is too much");
        assert_eq!((number, error.as_str()), (63, "The graph may not be deeper than 64 nodes"));
    });
}

#[test]
fn a_window_fits_its_file_or_is_refused() {
    run_control(async |_| {
        let graph = graph();
        add(&graph, disk("file")).await.unwrap();
        let raw = |more: Value| with(json!({ "driver": "raw", "node-name": "n", "file": "file" }), &more);
        let most = i64::MAX - 511;
        for (wrong, reason) in [
            (json!({ "offset": 20480 }), "Offset (20480) cannot be greater than size of the containing file (10240)"),
            (json!({ "offset": 512, "size": 20480 }), "The sum of offset (512) and size (20480) has to be smaller"),
            (json!({ "offset": 100 }), "Specified offset is not multiple of 512"),
            (json!({ "size": 1000 }), "Specified size is not multiple of 512"),
            (json!({ "offset": -512 }), "Parameter 'offset' expects"),
            (json!({ "size": i64::MIN }), "Parameter 'size' expects"),
            (json!({ "offset": most, "size": most }), "Offset"),
            (json!({ "offset": 1u64 << 63 }), "Invalid parameter type for 'offset'"),
        ] {
            let error = add(&graph, raw(wrong)).await.unwrap_err();
            assert!(error.starts_with(reason), "{error}");
        }
        let node = add(&graph, raw(json!({ "offset": 10240 }))).await.unwrap();
        assert_eq!(graph.node(node).unwrap().geometry.size, 0);
    });
}

#[test]
fn inline_children_take_after_their_parent() {
    run_control(async |_| {
        let graph = graph();
        let tree = json!({
            "driver": "raw", "node-name": "top", "read-only": true, "cache": { "no-flush": true }, "detect-zeroes": "on",
            "file": { "driver": "raw", "node-name": "middle", "cache": { "direct": true },
                      "file": { "driver": "null-co", "discard": "ignore" } }
        });
        let top = add(&graph, tree).await.unwrap();
        let nodes = graph.nodes();
        assert_eq!(nodes.len(), 3);
        let named = |name: &str| nodes.iter().find(|node| node.name == name).unwrap();
        let bottom = nodes.iter().find(|node| node.name.starts_with("#block")).unwrap();
        let (top_node, middle) = (named("top"), named("middle"));
        assert!(top_node.explicit && !middle.explicit && !bottom.explicit);
        assert_eq!(top_node.children, [("file".into(), middle.id)]);
        assert!(nodes.iter().all(|node| node.options.read_only && node.options.no_flush));
        assert_eq!([top_node, middle, bottom].map(|node| node.options.direct), [false, true, true]);
        assert_eq!(
            [top_node, middle, bottom].map(|node| node.options.detect_zeroes == DetectZeroes::On),
            [true, false, false]
        );
        let unmaps = [top_node, middle, bottom].map(|node| node.options.discard == DiscardMode::Unmap);
        assert_eq!(unmaps, [false, true, false]);
        // They go with it, too.
        graph.permit().remove(top).await.unwrap();
        assert!(graph.nodes().is_empty());
    });
}

#[test]
fn a_raw_node_follows_its_file_and_a_window_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = bench::image(dir.path(), "x.img", 1 << 20, 0);
    run_control(async |_| {
        let graph = graph();
        let file = add(&graph, bench::file("file", &path)).await.unwrap();
        let raw = |name: &str, more: Value| with(json!({ "driver": "raw", "node-name": name, "file": "file" }), &more);
        let all = add(&graph, raw("all", json!({}))).await.unwrap();
        let tail = add(&graph, raw("tail", json!({ "offset": 4096 }))).await.unwrap();
        graph.permit().remove(tail).await.unwrap();
        let port = attach(&graph, all, writer()).await.unwrap();
        let error = graph.permit().resize(file, 4096, Preallocation::Off).await.unwrap_err().full();
        assert!(error.contains("resize"), "its user does not bear it: {error}");
        port.detach(&mut graph.permit()).await;
        graph.permit().resize(file, 2 << 20, Preallocation::Off).await.unwrap();
        assert_eq!(graph.node(all).unwrap().geometry.size, 2 << 20);
        graph.permit().resize(all, 3 << 20, Preallocation::Off).await.unwrap();
        assert_eq!(graph.node(file).unwrap().geometry.size, 3 << 20);
        for wrong in [i64::MAX as u64, u64::MAX, 1 << 63] {
            graph.permit().resize(all, wrong, Preallocation::Off).await.unwrap_err();
        }
        graph.permit().resize(all, 0, Preallocation::Off).await.unwrap();
        assert_eq!(graph.node(file).unwrap().geometry.size, 0);
        graph.permit().resize(all, 1 << 20, Preallocation::Off).await.unwrap();
        graph.permit().remove(all).await.unwrap();
        let window = add(&graph, raw("window", json!({ "size": 4096 }))).await.unwrap();
        let error = graph.permit().resize(window, 8192, Preallocation::Off).await.unwrap_err().full();
        assert_eq!(error, "Cannot resize fixed-size raw disks");
    });
}

/// Two partitions of one image for two guests. Neither writes over the file's end, so neither has to be able to grow it.
#[test]
fn windows_of_one_file_are_written_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let path = bench::image(dir.path(), "x.img", 1 << 20, 0);
    run_control(async |_| {
        let graph = graph();
        let file = add(&graph, bench::file("file", &path)).await.unwrap();
        let window = |name: &str, offset: u64| json!({ "driver": "raw", "node-name": name, "file": "file", "offset": offset, "size": 4096 });
        let (one, two) =
            (add(&graph, window("one", 0)).await.unwrap(), add(&graph, window("two", 4096)).await.unwrap());
        let guest = Perms { uses: PermSet::CONSISTENT_READ | PermSet::WRITE, shares: PermSet::ALL };
        let first = attach(&graph, one, guest).await.unwrap();
        let second = attach(&graph, two, guest).await.unwrap();
        let error = graph.permit().resize(file, 4096, Preallocation::Off).await.unwrap_err().full();
        assert!(error.contains("resize"), "a window needs its place in the file: {error}");
        first.detach(&mut graph.permit()).await;
        second.detach(&mut graph.permit()).await;
    });
}

#[test]
fn a_list_of_reopens_is_done_or_not() {
    run_control(async |_| {
        let graph = graph();
        let tree = json!({ "driver": "raw", "node-name": "top", "file": disk("below") });
        let top = add(&graph, tree).await.unwrap();
        let other = add(&graph, disk("other")).await.unwrap();
        let read_only = json!({ "read-only": true });
        let raw = |file: Value| json!({ "driver": "raw", "node-name": "top", "file": file });
        for (list, reason) in [
            (vec![json!({ "driver": "null-co" })], "node-name not specified"),
            (vec![disk("nope")], "Failed to find node with node-name='nope'"),
            (vec![with(disk("other"), &read_only), disk("top")], "Cannot change the option 'driver'"),
            (vec![with(disk("other"), &read_only), disk("other")], "Node 'other' is in the list twice"),
            (
                vec![with(disk("other"), &read_only), raw(json!("top"))],
                "Making 'top' a file child of 'top' would create a cycle",
            ),
            (vec![with(disk("other"), &read_only), raw(json!("nope"))], "Cannot find device='nope'"),
            (vec![with(disk("other"), &read_only), raw(disk("fresh"))], "Cannot change the option 'file'"),
            (
                vec![with(disk("other"), &read_only), with(raw(json!("below")), &json!({ "offset": 20480 }))],
                "Offset (20480) cannot be greater",
            ),
        ] {
            let error = reopen(&graph, &list).await.unwrap_err();
            assert!(error.starts_with(reason), "{error}");
            assert!(!graph.node(other).unwrap().options.read_only, "{reason}");
        }
        // Given in place again, an inline child takes after its parent again.
        reopen(&graph, &[with(raw(disk("below")), &read_only)]).await.unwrap();
        assert!(graph.nodes().iter().filter(|node| node.id != other).all(|node| node.options.read_only));
        reopen(&graph, &[with(raw(json!("below")), &json!({ "read-only": true, "size": 512 }))]).await.unwrap();
        assert_eq!(graph.node(top).unwrap().geometry.size, 512);
    });
}

#[test]
fn latency_is_slept_in_full() {
    run_control(async |_| {
        let graph = graph();
        let slow = with(disk("slow"), &json!({ "latency-ns": 30_000_000 }));
        let node = add(&graph, slow).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let begun = std::time::Instant::now();
        on(&io_thread(), &port.handle(), async |lane| lane.flush(&enter(&lane).await).await).await.unwrap();
        assert!(begun.elapsed().as_millis() >= 30);
        // A drain waits for it.
        let handle = port.handle();
        let thread = io_thread();
        let begun = std::time::Instant::now();
        let (sent, started) = block_core::rt::sync::oneshot();
        thread.remote().spawn(move |local| async move {
            let lane = handle.lane(&local);
            let pin = enter(&lane).await;
            let _ = sent.send(());
            lane.flush(&pin).await.unwrap();
        });
        started.await.unwrap();
        port.detach(&mut graph.permit()).await;
        assert!(begun.elapsed().as_millis() >= 30);
    });
}

/// GR-11: definitions inside definitions end somewhere, and a request gets through as many as there may be.
#[test]
fn nesting_has_an_end_and_requests_reach_it() {
    let nested = |levels| {
        let innermost = json!({ "driver": "null-co", "size": 4096, "read-zeroes": true });
        let mut tree = (1..levels).fold(innermost, |below, _| json!({ "driver": "raw", "file": below }));
        tree["node-name"] = json!("top");
        tree
    };
    run_control(async |_| {
        let graph = graph();
        for levels in [65, 200, 500] {
            let refused = add(&graph, nested(levels)).await.unwrap_err();
            assert!(refused.ends_with("is nested deeper than 64 levels"), "{levels}: {refused}");
        }
        assert_eq!(graph.nodes().len(), 0);
        let top = add(&graph, nested(64)).await.unwrap();
        assert_eq!(graph.nodes().len(), 64);
        let port = attach(&graph, top, writer()).await.unwrap();
        on(&io_thread(), &port.handle(), async move |lane| {
            let pin = enter(&lane).await;
            let at = ByteRange::new(0, 4096).unwrap();
            let buf = IoBuf::from_slice(&[1; 4096]).unwrap();
            lane.write(&pin, at, buf.clone(), WriteFlags::default()).await.unwrap();
            lane.read(&pin, at, buf.clone()).await.unwrap();
            lane.flush(&pin).await.unwrap();
            assert_eq!(buf.to_vec(), [0; 4096]);
        })
        .await;
        graph.permit().remove(top).await.unwrap_err();
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(top).await.unwrap();
        assert_eq!(graph.nodes().len(), 0);
    });
}
