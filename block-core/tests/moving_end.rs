//! Files whose end moves while requests run, and space that is taken ahead of those who move it.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod support;

use std::rc::Rc;

use bench::{add, attach, enter, range, read, write, writer};
use block_core::base::IoError;
use block_core::catalog;
use block_core::graph::{Graph, NodeId, PermSet, Perms, Preallocation, WriteFlags};
use block_core::port::{PORT, Port};
use block_core::rt::sync::oneshot;
use block_core::rt::{IoBuf, IoThread, Local, PollParams, run_control};
use serde_json::{Value, json};
use support::graph;

/// A format's way of using its file.
fn grower() -> Perms {
    Perms { uses: PermSet::ALL.without(PermSet::WRITE_UNCHANGED), shares: PermSet::CONSISTENT_READ }
}

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// Ways of having a file open.
fn engines() -> Vec<Value> {
    let all = [("threads", false), ("io_uring", false), ("threads", true), ("io_uring", true)];
    all.map(|(aio, direct)| json!({ "aio": aio, "cache": { "direct": direct } })).into()
}

fn file(path: &str, engine: &Value) -> Value {
    let mut options = json!({ "driver": "file", "node-name": "file", "filename": path });
    let members = options.as_object_mut().unwrap();
    members.extend(engine.as_object().unwrap().clone());
    options
}

fn image(dir: &tempfile::TempDir, size: u64) -> String {
    let path = dir.path().join("image").to_str().unwrap().to_owned();
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn len(path: &str) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

fn size(graph: &Graph, node: NodeId) -> u64 {
    graph.node(node).unwrap().geometry.size
}

async fn write_at(port: &Port, at: u64, byte: u8, len: usize) -> Result<(), IoError> {
    write(&port.handle().lane(&Local::current()), at, &vec![byte; len], WriteFlags::default()).await
}

async fn bytes(port: &Port, at: u64, len: u64) -> Result<Vec<u8>, IoError> {
    read(&port.handle().lane(&Local::current()), range(at, len)).await
}

async fn set_end(port: &Port, to: u64, how: Preallocation) -> Result<(), IoError> {
    port.handle().job(&Local::current()).step(async |cx| cx.child(PORT).set_end(to, how).await).await
}

async fn zeroes(port: &Port, at: u64, len: u64) -> Result<(), IoError> {
    let lane = port.handle().lane(&Local::current());
    lane.write_zeroes(&enter(&lane).await, range(at, len), WriteFlags::default()).await
}

#[test]
fn who_may_resize_moves_the_end_by_writing() {
    let dir = tempfile::tempdir().unwrap();
    run_control(async |_| {
        for engine in engines() {
            let path = image(&dir, 64 * KIB);
            let graph = graph();
            let node = add(&graph, file(&path, &engine)).await.unwrap();
            let port = attach(&graph, node, grower()).await.unwrap();
            write_at(&port, 96 * KIB, 7, 4096).await.unwrap();
            assert_eq!((len(&path), size(&graph, node)), (100 * KIB, 100 * KIB), "{engine}");
            // What lies between was never written.
            assert_eq!(bytes(&port, 64 * KIB, 32 * KIB).await.unwrap(), vec![0; 32 << 10]);
            assert_eq!(bytes(&port, 96 * KIB, 4096).await.unwrap(), vec![7; 4096]);
            assert_eq!(bytes(&port, 100 * KIB, 512).await, Err(IoError::OutOfRange));
            // Over the end, and past it.
            zeroes(&port, 98 * KIB, 6 * KIB).await.unwrap();
            zeroes(&port, 128 * KIB, 4 * KIB).await.unwrap();
            assert_eq!((len(&path), size(&graph, node)), (132 * KIB, 132 * KIB), "{engine}");
            let mut expected = vec![0; 36 << 10];
            expected[..2048].fill(7);
            assert_eq!(bytes(&port, 96 * KIB, 36 * KIB).await.unwrap(), expected, "{engine}");
            // Back, and forth by its own operation.
            set_end(&port, 97 * KIB, Preallocation::Off).await.unwrap();
            assert_eq!(bytes(&port, 97 * KIB, 512).await, Err(IoError::OutOfRange));
            set_end(&port, 200 * KIB, Preallocation::Falloc).await.unwrap();
            assert_eq!(bytes(&port, 96 * KIB, KIB).await.unwrap(), vec![7; 1024]);
            assert_eq!(bytes(&port, 97 * KIB, 103 * KIB).await.unwrap(), vec![0; 103 << 10]);
            port.detach(&mut graph.permit()).await;
        }
    });
}

#[test]
fn nobody_else_does() {
    let dir = tempfile::tempdir().unwrap();
    run_control(async |_| {
        let path = image(&dir, 64 * KIB);
        let graph = graph();
        let node = add(&graph, file(&path, &json!({}))).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        assert_eq!(write_at(&port, 64 * KIB, 7, 512).await, Err(IoError::OutOfRange));
        assert_eq!(zeroes(&port, 63 * KIB, 2048).await, Err(IoError::OutOfRange));
        assert_eq!(set_end(&port, MIB, Preallocation::Off).await, Err(IoError::ReadOnly));
        assert_eq!(len(&path), 64 * KIB);
        port.detach(&mut graph.permit()).await;
        // What has no end that moves does not get one.
        let null = add(&graph, json!({ "driver": "null-co", "node-name": "null", "size": 4096 })).await.unwrap();
        let port = attach(&graph, null, grower()).await.unwrap();
        assert_eq!(write_at(&port, 4096, 7, 512).await, Err(IoError::OutOfRange));
        assert_eq!(set_end(&port, MIB, Preallocation::Off).await, Err(IoError::Unsupported));
        port.detach(&mut graph.permit()).await;
    });
}

#[test]
fn the_end_moves_through_what_passes_it_on() {
    let dir = tempfile::tempdir().unwrap();
    run_control(async |_| {
        let path = image(&dir, 64 * KIB);
        let graph = graph();
        let debug = json!({ "driver": "blkdebug", "node-name": "debug", "image": file(&path, &json!({})) });
        let raw = add(&graph, json!({ "driver": "raw", "node-name": "raw", "file": debug })).await.unwrap();
        let port = attach(&graph, raw, grower()).await.unwrap();
        write_at(&port, MIB, 7, 512).await.unwrap();
        assert_eq!(bytes(&port, MIB, 512).await.unwrap(), [7; 512]);
        assert_eq!(size(&graph, raw), MIB + 512);
        // Who comes later sees the end as it is, a window included, which has one of its own.
        let window =
            json!({ "driver": "raw", "node-name": "window", "file": "file", "offset": 512, "read-only": true });
        assert!(add(&graph, window.clone()).await.is_err(), "the grower shares nothing but reading");
        port.detach(&mut graph.permit()).await;
        let window = add(&graph, window).await.unwrap();
        assert_eq!(size(&graph, window), MIB);
    });
}

/// A file without a byte ends where others do: somewhere.
#[test]
fn an_empty_file_grows_through_raw() {
    let dir = tempfile::tempdir().unwrap();
    run_control(async |_| {
        let path = image(&dir, 0);
        let graph = graph();
        let raw = json!({ "driver": "raw", "node-name": "raw", "file": file(&path, &json!({})) });
        let raw = add(&graph, raw).await.unwrap();
        let port = attach(&graph, raw, grower()).await.unwrap();
        write_at(&port, 64 * KIB, 7, 512).await.unwrap();
        assert_eq!(bytes(&port, 63 * KIB, 1536).await.unwrap(), [vec![0; 1024], vec![7; 512]].concat());
        assert_eq!((len(&path), size(&graph, raw)), (64 * KIB + 512, 64 * KIB + 512));
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(raw).await.unwrap();
    });
}

#[test]
fn an_image_is_made_through_raw_in_an_empty_file() {
    let dir = tempfile::tempdir().unwrap();
    run_control(async |_| {
        let path = image(&dir, 0);
        let graph = graph();
        let below = file(&path, &json!({}));
        let raw = json!({ "driver": "raw", "node-name": "raw", "file": below });
        let raw = add(&graph, raw).await.unwrap();
        let options = json!({ "driver": "qcow2", "file": "raw", "size": MIB });
        let options = qmp::schema::from_value(options).unwrap_or_else(|error: qmp::Error| panic!("{}", error.desc));
        catalog::create(&graph, options).await.unwrap_or_else(|error| panic!("{}", error.full()));
        let image = add(&graph, json!({ "driver": "qcow2", "node-name": "image", "file": "raw" })).await.unwrap();
        assert_eq!(size(&graph, image), MIB);
        let port = attach(&graph, image, writer()).await.unwrap();
        write_at(&port, 512 * KIB, 7, 512).await.unwrap();
        assert_eq!(bytes(&port, 512 * KIB, 1024).await.unwrap(), [vec![7; 512], vec![0; 512]].concat());
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(image).await.unwrap();
        graph.permit().remove(raw).await.unwrap();
    });
}

fn preallocate(path: &str) -> Value {
    json!({ "driver": "preallocate", "node-name": "pre", "prealloc-align": 65536, "prealloc-size": MIB,
            "file": file(path, &json!({})) })
}

async fn scene(start: u64, work: impl AsyncFnOnce(Rc<Graph>, NodeId, String)) {
    scene_of(start, preallocate, work).await;
}

async fn scene_of(start: u64, node: fn(&str) -> Value, work: impl AsyncFnOnce(Rc<Graph>, NodeId, String)) {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, start);
    let graph = graph();
    let node = add(&graph, node(&path)).await.unwrap();
    work(graph, node, path).await;
}

#[test]
fn space_is_taken_ahead_and_given_back() {
    run_control(async |_| {
        scene(1024, async |graph, node, path| {
            let port = attach(&graph, node, grower()).await.unwrap();
            write_at(&port, 512, 7, 512).await.unwrap();
            assert_eq!(len(&path), 1024, "nothing is taken for what fits");
            write_at(&port, 1024, 8, 512).await.unwrap();
            let ahead = (1536 + MIB).next_multiple_of(65536);
            assert_eq!((len(&path), size(&graph, node)), (ahead, 1536));
            assert_eq!(bytes(&port, 1536, 512).await, Err(IoError::OutOfRange), "it is no part of the node");
            for at in (1536..ahead).step_by(64 << 10) {
                write_at(&port, at, 9, 512).await.unwrap();
            }
            assert_eq!(len(&path), ahead, "once is enough");
            write_at(&port, ahead, 10, 512).await.unwrap();
            assert!(len(&path) > ahead);
            port.detach(&mut graph.permit()).await;
            assert_eq!((len(&path), size(&graph, node)), (ahead + 512, ahead + 512));
            graph.permit().remove(node).await.unwrap();
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!((bytes[512], bytes[1024], bytes[1536], bytes[2048]), (7, 8, 9, 0));
        })
        .await;
    });
}

#[test]
fn a_writer_that_cannot_grow_takes_nothing() {
    run_control(async |_| {
        scene(4096, async |graph, node, path| {
            let port = attach(&graph, node, writer()).await.unwrap();
            write_at(&port, 0, 7, 4096).await.unwrap();
            assert_eq!(write_at(&port, 4096, 7, 512).await, Err(IoError::OutOfRange));
            assert_eq!(len(&path), 4096);
            port.detach(&mut graph.permit()).await;
            // A resize is about the data; what was ahead of it goes.
            graph.permit().resize(node, 8192, Preallocation::Off).await.unwrap();
            assert_eq!((len(&path), size(&graph, node)), (8192, 8192));
            graph.permit().resize(node, 512, Preallocation::Off).await.unwrap();
            assert_eq!((len(&path), size(&graph, node)), (512, 512));
        })
        .await;
    });
}

/// What others wrote to the file while nobody made it grow through the filter is data.
#[test]
fn what_others_wrote_is_not_cut_off() {
    run_control(async |_| {
        scene(4096, async |graph, node, path| {
            let file = graph.find("file").unwrap();
            for round in 1..3 {
                let other = attach(&graph, file, grower()).await.unwrap();
                write_at(&other, round * 64 * KIB, 5, 4096).await.unwrap();
                other.detach(&mut graph.permit()).await;
                let end = round * 64 * KIB + 4096;
                assert_eq!(size(&graph, node), end);
                let port = attach(&graph, node, grower()).await.unwrap();
                write_at(&port, end, 6, 512).await.unwrap();
                assert!(len(&path) > end + MIB);
                port.detach(&mut graph.permit()).await;
                assert_eq!(len(&path), end + 512);
            }
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!((bytes[64 << 10], bytes[68 << 10], bytes[128 << 10]), (5, 6, 5));
        })
        .await;
    });
}

/// Two threads append to one file in turns, each in steps that go past its end: nobody's data is lost to the space that
/// the other one takes.
#[test]
fn two_threads_grow_one_file() {
    grown_by_two(preallocate);
}

/// The filter takes space of a filter, which takes space itself.
#[test]
fn two_threads_grow_one_file_through_two_filters() {
    for _ in 0..5 {
        grown_by_two(|path| {
            json!({ "driver": "preallocate", "node-name": "above", "prealloc-align": 65536, "prealloc-size": 65536,
                    "file": preallocate(path) })
        });
    }
}

/// Space is taken up to here or there at the same time, by one who has seen the old end.
#[test]
fn space_that_is_taken_never_moves_the_end_back() {
    run_control(async |_| {
        scene(4096, async |graph, node, _| {
            let port = attach(&graph, node, grower()).await.unwrap();
            write_at(&port, 128 * KIB, 7, 4096).await.unwrap();
            set_end(&port, 64 * KIB, Preallocation::Falloc).await.unwrap();
            assert_eq!(size(&graph, node), 132 * KIB);
            assert_eq!(bytes(&port, 128 * KIB, 4096).await.unwrap(), [7; 4096]);
            set_end(&port, 64 * KIB, Preallocation::Off).await.unwrap();
            assert_eq!(size(&graph, node), 64 * KIB);
            port.detach(&mut graph.permit()).await;
        })
        .await;
    });
}

fn grown_by_two(node: fn(&str) -> Value) {
    const STEP: u64 = 8192;
    const ROUNDS: u64 = 200;
    run_control(async |_| {
        scene_of(0, node, async |graph, node, path| {
            let port = attach(&graph, node, grower()).await.unwrap();
            let threads = [0, 1].map(|_| IoThread::spawn("grower", PollParams::default()).unwrap());
            let mut ends = Vec::new();
            for (number, thread) in threads.iter().enumerate() {
                let (handle, (done, end)) = (port.handle(), oneshot());
                thread.remote().spawn(move |local| async move {
                    let lane = handle.lane(&local);
                    for round in 0..ROUNDS {
                        // Far apart now and then, so that space is taken again and again.
                        let at = (round * 2 + number as u64) * STEP + round / 20 * 4 * MIB;
                        let byte = u8::try_from(round % 250).unwrap() + 1;
                        let buf = IoBuf::from_slice(&[byte; 4096]).unwrap();
                        let pin = enter(&lane).await;
                        lane.write(&pin, range(at, 4096), buf, WriteFlags::default()).await.unwrap();
                    }
                    let _ = done.send(());
                });
                ends.push(end);
            }
            for end in ends {
                end.await.unwrap();
            }
            port.detach(&mut graph.permit()).await;
            let bytes = std::fs::read(&path).unwrap();
            for round in 0..ROUNDS {
                for number in 0..2 {
                    let at = usize::try_from((round * 2 + number) * STEP + round / 20 * 4 * MIB).unwrap();
                    let byte = u8::try_from(round % 250).unwrap() + 1;
                    assert!(bytes[at..at + 4096].iter().all(|found| *found == byte), "round {round} of {number}");
                    let gap = &bytes[at + 4096..(at + 8192).min(bytes.len())];
                    assert!(gap.iter().all(|found| *found == 0), "round {round} of {number}: the gap");
                }
            }
            assert_eq!(bytes.len() as u64, (ROUNDS * 2 - 1) * STEP + (ROUNDS - 1) / 20 * 4 * MIB + 4096);
        })
        .await;
    });
}
