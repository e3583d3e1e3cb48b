//! Copy-on-read over an overlay: what is copied, what is not, and that no write is lost to a copy.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "support/random.rs"]
mod random;
mod support;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bench::{READER, add, attach, enter, io_thread, on, range, read, write, writer};
use block_core::base::IoError;
use block_core::graph::{DirectRequest, Graph, NodeId, WriteFlags};
use block_core::port::{Port, PortHandle, PortLane};
use block_core::rt::sync::oneshot;
use block_core::rt::{IoThread, Local, run_control};
use random::Random;
use serde_json::json;
use support::overlay::{Cluster, NewOverlay, Table};
use support::{Seen, Valve, graph, mem, park};

const NONE: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };

/// Sixteen clusters of 4 KiB, all of them 7, below an overlay that has none yet, below the filter.
struct Scene {
    graph: Rc<Graph>,
    base: Arc<Seen>,
    table: Arc<Table>,
    store: Arc<Seen>,
    top: NodeId,
    port: Port,
}

impl Scene {
    async fn new() -> Self {
        Self::with_valve(&Arc::default(), false).await
    }

    /// What is read from the lowest layer waits at the valve.
    async fn with_valve(valve: &Arc<Valve>, hurries: bool) -> Self {
        let (graph, base) = (graph(), Arc::new(Seen::default()));
        let below = support::add(&graph, mem("base", 7, &base)).await;
        let below = support::add(&graph, park("park", below, valve, hurries)).await;
        let (top, table, store) = NewOverlay::above(Some(below)).prepare_seen(&graph, "top").await;
        let top = support::add(&graph, top).await;
        let node = add(&graph, json!({ "driver": "copy-on-read", "node-name": "cor", "file": "top" })).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        Self { graph, base, table, store, top, port }
    }

    fn lane(&self) -> Rc<PortLane> {
        self.port.handle().lane(&Local::current())
    }

    fn writes(&self) -> u64 {
        self.store.writes.load(SeqCst)
    }

    async fn end(self) {
        self.port.detach(&mut self.graph.permit()).await;
    }
}

/// Starts a request beside this task, and counts its end.
fn start(done: &Arc<AtomicUsize>, request: impl Future<Output = Result<(), IoError>> + 'static) {
    let done = done.clone();
    Local::current().spawn(async move {
        request.await.unwrap();
        done.fetch_add(1, SeqCst);
    });
}

async fn until(is: impl Fn() -> bool) {
    while !is() {
        Local::current().sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn what_is_read_from_below_is_there_the_next_time() {
    run_control(async |_| {
        let scene = Scene::new().await;
        let lane = scene.lane();
        assert_eq!(read(&lane, range(5000, 100)).await.unwrap(), [7; 100]);
        assert_eq!([0, 1, 2].map(|number| scene.table.at(number)), [Cluster::Absent, Cluster::Data, Cluster::Absent]);
        // The layer below is not needed any more for this cluster, and no other one was touched.
        scene.base.fail_reads.store(2, SeqCst);
        assert_eq!(read(&lane, range(4096, 4096)).await.unwrap(), [7; 4096]);
        assert_eq!(scene.writes(), 1);
        assert_eq!(read(&lane, range(8192, 512)).await, Err(IoError::Os(5)));
        assert_eq!(scene.table.allocated(), 1, "what could not be read was not copied");
        *scene.store.write_error.lock().unwrap() = Some(IoError::NoSpace);
        scene.base.fail_reads.store(0, SeqCst);
        assert_eq!(read(&lane, range(8192, 512)).await, Err(IoError::NoSpace));
        assert_eq!(scene.table.allocated(), 1);
        *scene.store.write_error.lock().unwrap() = None;
        assert_eq!(read(&lane, range(8192, 512)).await.unwrap(), [7; 512]);
        drop(lane);
        scene.end().await;
    });
}

#[test]
fn what_the_layer_has_stays_and_zeroes_stay_zeroes() {
    run_control(async |_| {
        let scene = Scene::new().await;
        let lane = scene.lane();
        write(&lane, 4096, &[1; 4096], NONE).await.unwrap();
        lane.write_zeroes(&enter(&lane).await, range(12288, 4096), NONE).await.unwrap();
        let before = scene.writes();
        let mut expected = vec![7; 20000];
        expected[4096..8192].fill(1);
        expected[12288..16384].fill(0);
        assert_eq!(read(&lane, range(0, 20000)).await.unwrap(), expected);
        assert_eq!(scene.table.at(3), Cluster::Zero);
        assert_eq!((scene.table.allocated(), scene.writes() - before), (5, 3));
        assert_eq!(read(&lane, range(0, 20000)).await.unwrap(), expected);
        drop(lane);
        scene.end().await;
    });
}

#[test]
fn zeroes_from_below_take_no_room() {
    run_control(async |local| {
        let graph = graph();
        let base = support::add(&graph, mem("base", 0, &Arc::default())).await;
        let (_, table) = NewOverlay::above(Some(base)).add(&graph, "top").await;
        let node = add(&graph, json!({ "driver": "copy-on-read", "node-name": "cor", "file": "top" })).await.unwrap();
        // Copies are written whether or not the reader may write.
        let port = attach(&graph, node, READER).await.unwrap();
        assert_eq!(read(&port.handle().lane(&local), range(100, 100)).await.unwrap(), [0; 100]);
        assert_eq!(table.at(0), Cluster::Zero);
        port.detach(&mut graph.permit()).await;
    });
}

#[test]
fn what_lies_below_the_bottom_is_not_copied() {
    run_control(async |local| {
        let graph = graph();
        let base = support::add(&graph, mem("base", 7, &Arc::default())).await;
        let (middle, _) = NewOverlay::above(Some(base)).add(&graph, "middle").await;
        let port = attach(&graph, middle, writer()).await.unwrap();
        write(&port.handle().lane(&local), 4096, &[3; 8192], NONE).await.unwrap();
        port.detach(&mut graph.permit()).await;
        let (_, table) = NewOverlay::above(Some(middle)).add(&graph, "top").await;
        let cor = json!({ "driver": "copy-on-read", "node-name": "cor", "file": "top", "bottom": "middle" });
        let node = add(&graph, cor).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let seen = read(&port.handle().lane(&local), range(0, 16384)).await.unwrap();
        assert_eq!(seen, [[7; 4096], [3; 4096], [3; 4096], [7; 4096]].concat());
        let copied = [0, 1, 2, 3].map(|number| table.at(number) == Cluster::Data);
        assert_eq!(copied, [false, true, true, false]);
        port.detach(&mut graph.permit()).await;
    });
}

/// Past the end of a short layer there are zeroes. Were they left to the layers below, those would show what they have
/// there as soon as the short one is taken out.
#[test]
fn zeroes_past_the_end_of_a_short_layer_are_copied() {
    run_control(async |local| {
        let graph = graph();
        let base = support::add(&graph, mem("base", 7, &Arc::default())).await;
        let middle = NewOverlay { size: 8192, ..NewOverlay::above(Some(base)) };
        let (middle, _) = middle.add(&graph, "middle").await;
        let (_, table) = NewOverlay::above(Some(middle)).add(&graph, "top").await;
        let cor = json!({ "driver": "copy-on-read", "node-name": "cor", "file": "top", "bottom": "middle" });
        let node = add(&graph, cor).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let seen = read(&port.handle().lane(&local), range(4096, 8192)).await.unwrap();
        assert_eq!(seen, [[7; 4096], [0; 4096]].concat());
        assert_eq!([1, 2].map(|number| table.at(number)), [Cluster::Absent, Cluster::Zero]);
        port.detach(&mut graph.permit()).await;
    });
}

/// The write comes between the copy's read and its write-back. Unless it waits, the copy puts the old bytes back.
#[test]
fn a_write_during_a_copy_is_not_lost() {
    run_control(async |local| {
        let valve = Valve::shut();
        let scene = Scene::with_valve(&valve, false).await;
        let done = Arc::new(AtomicUsize::new(0));
        let (one, two) = (scene.lane(), scene.lane());
        start(&done, async move { read(&one, range(512, 512)).await.map(|_| ()) });
        until(|| valve.parked() > 0).await;
        start(&done, async move { write(&two, 0, &[1; 4096], NONE).await });
        local.sleep(Duration::from_millis(30)).await;
        assert_eq!((done.load(SeqCst), scene.writes()), (0, 0), "the write did not wait for the copy");
        // Elsewhere nobody waits.
        write(&scene.lane(), 8192, &[2; 4096], NONE).await.unwrap();
        valve.open();
        until(|| done.load(SeqCst) == 2).await;
        assert_eq!(read(&scene.lane(), range(0, 4096)).await.unwrap(), [1; 4096]);
        scene.end().await;
    });
}

#[test]
fn two_reads_of_a_cluster_copy_it_once() {
    run_control(async |_| {
        let valve = Valve::shut();
        let scene = Scene::with_valve(&valve, false).await;
        let done = Arc::new(AtomicUsize::new(0));
        for number in 0..8 {
            let lane = scene.lane();
            start(&done, async move { read(&lane, range(number * 512, 512)).await.map(|_| ()) });
        }
        until(|| valve.parked() > 0).await;
        valve.open();
        until(|| done.load(SeqCst) == 8).await;
        assert_eq!(scene.writes(), 1);
        scene.end().await;
    });
}

#[test]
fn a_drain_ends_copies_and_who_waits_for_them() {
    run_control(async |_| {
        let valve = Valve::shut();
        let scene = Scene::with_valve(&valve, true).await;
        let done = Arc::new(AtomicUsize::new(0));
        let (one, two) = (scene.lane(), scene.lane());
        start(&done, async move { read(&one, range(0, 512)).await.map(|_| ()) });
        until(|| valve.parked() > 0).await;
        start(&done, async move { write(&two, 0, &[1; 4096], NONE).await });
        Local::current().sleep(Duration::from_millis(5)).await;
        scene.end().await;
        assert_eq!(done.load(SeqCst), 2);
    });
}

/// Each task has every eighth sector, one of each cluster, to itself; reads go everywhere and copy clusters under the
/// others' writes. Four tasks take turns on each of two threads.
#[test]
fn two_threads_of_four_tasks_lose_no_write() {
    run_control(async |_| {
        let threads = [io_thread(), io_thread()];
        for round in 0..20 {
            let scene = Scene::new().await;
            let owners = (0..OWNERS).map(|number| owner(&threads[number % 2], &scene.port.handle(), number, round));
            for end in owners.collect::<Vec<_>>() {
                end.await.unwrap();
            }
            scene.end().await;
        }
    });
}

const OWNERS: usize = 8;
const SECTORS: u64 = 128;

fn owner(thread: &IoThread, handle: &PortHandle, number: usize, round: u64) -> block_core::rt::sync::Receiver<()> {
    let (done, end) = oneshot();
    let handle = handle.clone();
    thread.remote().spawn(move |local| async move {
        let lane = handle.lane(&local);
        let (mut random, mut mine) = (Random(round * 8 + number as u64 + 1), [7; SECTORS as usize]);
        for step in 0..30 {
            let cluster = random.below(SECTORS / 8);
            if random.below(2) == 0 {
                let sector = cluster * 8 + number as u64;
                write(&lane, sector * 512, &[step; 512], NONE).await.unwrap();
                mine[sector as usize] = step;
            }
            check(&lane, cluster * 8, 8, number, &mine).await;
        }
        check(&lane, 0, SECTORS, number, &mine).await;
        let _ = done.send(());
    });
    end
}

async fn check(lane: &PortLane, from: u64, sectors: u64, number: usize, mine: &[u8]) {
    let seen = read(lane, range(from * 512, sectors * 512)).await.unwrap();
    for (sector, bytes) in (from as usize..).zip(seen.chunks(512)).filter(|(sector, _)| sector % OWNERS == number) {
        assert!(bytes.iter().all(|byte| *byte == mine[sector]), "sector {sector} of {number} lost a write");
    }
}

#[test]
fn who_does_not_come_through_the_filter_may_not_write() {
    run_control(async |_| {
        let scene = Scene::new().await;
        let error = attach(&scene.graph, scene.top, writer()).await.map(|_| ()).unwrap_err();
        assert!(error.contains("'write'") && error.contains("'cor'"), "{error}");
        scene.end().await;
    });
}

#[test]
fn it_is_put_above_a_node_that_is_being_written() {
    run_control(async |local| {
        let graph = graph();
        let base = support::add(&graph, mem("base", 7, &Arc::default())).await;
        let (top, table) = NewOverlay::above(Some(base)).add(&graph, "top").await;
        let port = attach(&graph, top, writer()).await.unwrap();
        let cor = json!({ "driver": "copy-on-read", "node-name": "cor", "file": "top" });
        let cor = add(&graph, cor).await.unwrap();
        let error = attach(&graph, cor, READER).await.map(|_| ()).unwrap_err();
        assert!(error.contains("'write'"), "somebody writes past it: {error}");
        graph.permit().insert_filter(cor, top).await.unwrap();
        let lane = port.handle().lane(&local);
        assert_eq!(read(&lane, range(0, 512)).await.unwrap(), [7; 512]);
        write(&lane, 4096, &[1; 512], NONE).await.unwrap();
        assert_eq!(table.allocated(), 2);
        drop(lane);
        graph.permit().remove_filter(cor).await.unwrap();
        port.detach(&mut graph.permit()).await;
    });
}

#[test]
fn what_cannot_be_copied_to_is_refused() {
    run_control(async |_| {
        let graph = graph();
        add(&graph, json!({ "driver": "null-co", "node-name": "ro", "read-only": true })).await.unwrap();
        for read_only in [true, false] {
            let cor = json!({ "driver": "copy-on-read", "node-name": "cor", "file": "ro", "read-only": read_only });
            let error = add(&graph, cor).await.unwrap_err();
            assert!(error.ends_with("is read-only"), "{error}");
        }
        let missing = json!({ "driver": "copy-on-read", "node-name": "cor", "file": "ro", "bottom": "zz" });
        let error = add(&graph, missing).await.unwrap_err();
        assert!(error.contains("'zz'"), "{error}");
        // What is inactive writes nothing.
        let below = json!({ "driver": "null-co" });
        let idle = json!({ "driver": "copy-on-read", "node-name": "cor", "file": below, "active": false });
        add(&graph, idle).await.unwrap();
    });
}

/// Another process may be the writer of what an inactive node stands on.
#[test]
fn an_inactive_node_reads_and_copies_nothing() {
    for all in [false, true] {
        run_control(async |_| {
            let Scene { graph, base, table, store, top, port } = Scene::new().await;
            port.detach(&mut graph.permit()).await;
            let cor = graph.find("cor").unwrap();
            graph.permit().deactivate(Some(cor)).await.unwrap();
            if !all {
                graph.permit().activate(Some(top)).await.unwrap();
            }
            let port = attach(&graph, cor, READER).await.unwrap();
            let scene = Scene { graph, base, table, store, top, port };
            assert_eq!(read(&scene.lane(), range(5000, 100)).await, Ok(vec![7; 100]), "all: {all}");
            assert_eq!((scene.table.allocated(), scene.writes()), (0, 0), "all: {all}");
            scene.end().await;
        });
    }
}

#[test]
fn without_a_layer_below_requests_take_the_direct_path() {
    run_control(async |local| {
        let graph = graph();
        let below = json!({ "driver": "null-co", "size": 65536 });
        let cor = json!({ "driver": "copy-on-read", "node-name": "cor", "file": below });
        let node = add(&graph, cor).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let scene = Scene::new().await;
        for (port, is_direct) in [(&port, true), (&scene.port, false)] {
            let lane = port.handle().lane(&local);
            let pin = lane.try_enter().unwrap();
            for write in [false, true] {
                let request = DirectRequest { write, at: range(0, 512), fua: false, memory_bits: 0 };
                assert_eq!(lane.direct(&pin, request).is_some(), is_direct);
            }
        }
        port.detach(&mut graph.permit()).await;
        scene.end().await;
    });
}

#[test]
fn a_copy_has_no_more_than_the_node() {
    run_control(async |_| {
        let graph = graph();
        let base = support::add(&graph, mem("base", 7, &Arc::default())).await;
        let (_, table) = NewOverlay { size: 10000, ..NewOverlay::above(Some(base)) }.add(&graph, "top").await;
        let node = add(&graph, json!({ "driver": "copy-on-read", "node-name": "cor", "file": "top" })).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let seen = on(&io_thread(), &port.handle(), async |lane| read(&lane, range(9999, 1)).await).await;
        assert_eq!(seen.unwrap(), [7]);
        assert_eq!(table.at(2), Cluster::Data);
        port.detach(&mut graph.permit()).await;
    });
}
