//! Throttle nodes and the groups that they share: who waits, who is let go, and who never touches the group at all. The
//! arithmetic has its tests, in virtual time, beside it; here are threads, drains and the clock.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod support;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use bench::{add, attach, enter, flush, io_thread, on, range, read, reopen, write, writer};
use block_core::base::IoError;
use block_core::drivers::filter::throttle::{Limits, Rate, Rates, ThrottleGroup};
use block_core::graph::{DirectRequest, Graph, NodeId, WriteFlags};
use block_core::port::{Port, PortHandle, PortLane};
use block_core::rt::{IoThread, Local, run_control};
use serde_json::{Value, json};
use support::{Seen, graph, mem};

/// So many requests a second, and no bursts.
fn iops(rate: u64) -> Limits {
    Limits { iops: Rates { total: Rate { rate, ..Rate::default() }, ..Rates::default() }, ..Limits::default() }
}

fn bps_write(rate: u64) -> Limits {
    Limits { bps: Rates { write: Rate { rate, ..Rate::default() }, ..Rates::default() }, ..Limits::default() }
}

fn group(graph: &Graph, id: &str, limits: Limits) -> Arc<ThrottleGroup> {
    let group = ThrottleGroup::new(limits);
    graph.objects().insert(id, group.clone());
    group
}

fn throttle(name: &str, group: &str) -> Value {
    let below = json!({ "driver": "null-co", "size": 1 << 20, "read-zeroes": true });
    json!({ "driver": "throttle", "node-name": name, "throttle-group": group, "file": below })
}

/// A throttle node with a port above it and a thread that sends requests.
struct Client {
    node: NodeId,
    port: Port,
    thread: IoThread,
    done: Arc<AtomicUsize>,
}

impl Client {
    async fn new(graph: &Rc<Graph>, name: &str, group: &str) -> Self {
        let node = add(graph, throttle(name, group)).await.unwrap();
        let port = attach(graph, node, writer()).await.unwrap();
        Self { node, port, thread: io_thread(), done: Arc::default() }
    }

    /// Starts `count` reads at once, or writes where the number is odd.
    fn start(&self, count: usize) {
        let (handle, done) = (self.port.handle(), self.done.clone());
        self.thread.remote().spawn(move |local| async move {
            let lane = handle.lane(&local);
            for number in 0..count {
                let (lane, done) = (lane.clone(), done.clone());
                local.spawn(async move {
                    one(&lane, number).await.unwrap();
                    done.fetch_add(1, SeqCst);
                });
            }
        });
    }

    fn done(&self) -> usize {
        self.done.load(SeqCst)
    }

    /// Waits until requests are inside and none of them moves.
    async fn stuck(&self) {
        let mut before = usize::MAX;
        while self.port.in_flight() == 0 || self.done() != before {
            before = self.done();
            Local::current().sleep(Duration::from_millis(50)).await;
        }
    }

    async fn remove(self, graph: &Rc<Graph>) {
        self.port.detach(&mut graph.permit()).await;
        graph.permit().remove(self.node).await.unwrap();
    }
}

async fn one(lane: &PortLane, number: usize) -> Result<(), IoError> {
    match number % 2 {
        0 => read(lane, range(0, 512)).await.map(|_| ()),
        _ => write(lane, 0, &[1; 512], WriteFlags::default()).await,
    }
}

/// Waits for the condition, but not for ever.
async fn soon(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what} never came");
        Local::current().sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_rate_is_kept_on_the_clock() {
    run_control(async |_| {
        let graph = graph();
        group(&graph, "g", iops(100));
        let client = Client::new(&graph, "n", "g").await;
        let begun = Instant::now();
        // Eleven come at once, and one each ten milliseconds.
        client.start(61);
        soon("the last request", || client.done() == 61).await;
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(490), "too fast: {took:?}");
        assert!(took < Duration::from_secs(5), "too slow: {took:?}");
        client.remove(&graph).await;
    });
}

/// One node has a few requests under way, the other very many: what counts is turns.
/// With `iops-size` a request counts as many as there are such sizes in it; a smaller one counts as one.
#[test]
fn a_large_request_counts_as_several() {
    run_control(async |local| {
        let graph = graph();
        group(&graph, "g", Limits { iops_size: 4096, ..iops(40) });
        let node = add(&graph, throttle("t", "g")).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        // What comes next waits for what this one has used up.
        let next_after = async |len| {
            Local::current().sleep(Duration::from_millis(60)).await;
            let begun = Instant::now();
            read(&lane, range(0, len)).await.unwrap();
            read(&lane, range(0, 1)).await.unwrap();
            begun.elapsed()
        };
        // A fortieth of a second each, eight of them here, and a tenth of a second passes at once.
        let wait = Duration::from_millis(90);
        assert!(next_after(32 << 10).await > wait);
        for len in [512, 4096] {
            let mut tries = 0..20;
            while next_after(len).await > wait {
                assert!(tries.next().is_some(), "{len} bytes are no more than one request");
            }
        }
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
    });
}

#[test]
fn two_nodes_on_two_threads_share_fairly() {
    run_control(async |_| {
        let graph = graph();
        let group = group(&graph, "g", iops(200));
        let greedy = Client::new(&graph, "greedy", "g").await;
        let modest = Client::new(&graph, "modest", "g").await;
        greedy.start(800);
        soon("the first requests", || greedy.done() > 0).await;
        let before = greedy.done();
        modest.start(64);
        soon("half of them", || modest.done() >= 32).await;
        let (modest_had, greedy_had) = (modest.done(), greedy.done() - before);
        assert!(greedy_had <= modest_had * 2 && modest_had <= greedy_had * 2, "{modest_had} against {greedy_had}");
        group.set_limits(Limits::default());
        modest.remove(&graph).await;
        greedy.remove(&graph).await;
    });
}

#[test]
fn a_live_change_reaches_those_who_wait() {
    run_control(async |_| {
        let graph = graph();
        let group = group(&graph, "g", iops(1));
        let (one, two) = (Client::new(&graph, "one", "g").await, Client::new(&graph, "two", "g").await);
        one.start(50);
        two.start(50);
        one.stuck().await;
        two.stuck().await;
        let begun = Instant::now();
        group.set_limits(iops(1000));
        soon("the end of the wait", || one.done() + two.done() == 100).await;
        assert!(begun.elapsed() < Duration::from_secs(5));
        // From a limit to none at all, too.
        group.set_limits(iops(1));
        one.start(20);
        one.stuck().await;
        group.set_limits(Limits::default());
        soon("the end of the limit", || one.done() + two.done() == 120).await;
        one.remove(&graph).await;
        two.remove(&graph).await;
    });
}

#[test]
fn a_drain_lets_its_own_requests_go_and_no_others() {
    run_control(async |_| {
        let graph = graph();
        let group = group(&graph, "g", iops(1));
        let (one, two) = (Client::new(&graph, "one", "g").await, Client::new(&graph, "two", "g").await);
        one.start(40);
        one.stuck().await;
        two.start(40);
        two.stuck().await;
        let (before, begun) = (two.done(), Instant::now());
        let done = one.done.clone();
        one.remove(&graph).await;
        assert!(begun.elapsed() < Duration::from_secs(2), "the drain waited for the limit");
        assert_eq!(done.load(SeqCst), 40);
        assert!(two.done() <= before + 3, "a drain of one node let another one's requests go");
        group.set_limits(Limits::default());
        soon("the others", || two.done() == 40).await;
        two.remove(&graph).await;
        assert!(!group.is_used());
    });
}

/// Limits that change all the time, requests from four threads, drains in between: everything comes to its end.
#[test]
fn no_wake_up_is_lost() {
    run_control(async |local| {
        let graph = graph();
        let group = group(&graph, "g", iops(1));
        let mut clients = Vec::new();
        for name in ["a", "b", "c", "d"] {
            clients.push(Client::new(&graph, name, "g").await);
        }
        clients.iter().for_each(|client| client.start(500));
        for step in 0..100 {
            group.set_limits(iops([1, 3000, 50, 1_000_000][step % 4]));
            local.sleep(Duration::from_millis(2)).await;
            if step % 10 == 0 {
                drop(graph.permit().drain(&[clients[step / 10 % 4].node]).await.unwrap());
            }
        }
        group.set_limits(iops(20_000));
        soon("the last request", || clients.iter().map(Client::done).sum::<usize>() == 2000).await;
        for client in clients {
            client.remove(&graph).await;
        }
    });
}

#[test]
fn flushes_pass_and_zeroes_and_discards_count() {
    run_control(async |_| {
        let graph = graph();
        let group = group(&graph, "g", iops(1));
        let client = Client::new(&graph, "n", "g").await;
        let begun = Instant::now();
        let group_too = group.clone();
        on(&client.thread, &client.port.handle(), async move |lane| {
            let none = WriteFlags::default();
            write(&lane, 0, &[1; 512], none).await.unwrap();
            flush(&lane).await.unwrap();
            group_too.set_limits(bps_write(1_000_000));
            lane.write_zeroes(&enter(&lane).await, range(0, 300_000), none).await.unwrap();
            flush(&lane).await.unwrap();
            read(&lane, range(0, 512)).await.unwrap();
            assert!(begun.elapsed() < Duration::from_millis(150), "a flush or a read waited");
            write(&lane, 0, &[1; 512], none).await.unwrap();
            assert!(begun.elapsed() >= Duration::from_millis(200), "zeroes were free");
        })
        .await;
        client.remove(&graph).await;
    });
}

fn direct(handle: &PortHandle, write: bool) -> bool {
    let lane = handle.lane(&Local::current());
    let pin = lane.try_enter().unwrap();
    lane.direct(&pin, DirectRequest { write, at: range(0, 512), fua: false, memory_bits: 0 }).is_some()
}

#[test]
fn without_limits_requests_take_the_direct_path() {
    run_control(async |_| {
        let graph = graph();
        let group = group(&graph, "g", Limits::default());
        let client = Client::new(&graph, "n", "g").await;
        let handle = client.port.handle();
        assert!(direct(&handle, false) && direct(&handle, true));
        group.set_limits(bps_write(1_000_000));
        assert!(direct(&handle, false) && !direct(&handle, true));
        group.set_limits(iops(1000));
        assert!(!direct(&handle, false) && !direct(&handle, true));
        group.set_limits(Limits::default());
        assert!(direct(&handle, false) && direct(&handle, true));
        drop(handle);
        client.remove(&graph).await;
    });
}

/// GR-24: the group that a node names is there, and the node can be moved to another one.
#[test]
fn a_node_is_in_the_group_that_it_names() {
    run_control(async |_| {
        let graph = graph();
        let (first, second) = (group(&graph, "first", iops(1)), group(&graph, "second", Limits::default()));
        for missing in ["zz", ""] {
            let error = add(&graph, throttle("n", missing)).await.unwrap_err();
            assert_eq!(error, format!("Throttle group '{missing}' does not exist"));
        }
        assert!(add(&graph, throttle("#", "first")).await.is_err());
        assert!(!first.is_used(), "a node that was not added is no member");
        let client = Client::new(&graph, "n", "first").await;
        assert!(first.is_used());
        let below = graph.node(client.node).unwrap().children[0].1;
        let below = graph.node(below).unwrap().name;
        let moved = |group: &str| {
            let file = json!({ "driver": "null-co", "size": 1 << 20, "read-zeroes": true, "node-name": below });
            json!({ "driver": "throttle", "node-name": "n", "throttle-group": group, "file": file })
        };
        client.start(20);
        client.stuck().await;
        assert_eq!(reopen(&graph, &[moved("zz")]).await.unwrap_err(), "Throttle group 'zz' does not exist");
        assert!(first.is_used() && !second.is_used());
        reopen(&graph, &[moved("second")]).await.unwrap();
        assert!(second.is_used());
        soon("the end of the membership", || !first.is_used()).await;
        soon("what had been waiting", || client.done() == 20).await;
        assert!(direct(&client.port.handle(), true));
        client.remove(&graph).await;
        assert!(!second.is_used());
    });
}

#[test]
fn what_fails_below_fails_above() {
    run_control(async |local| {
        let graph = graph();
        group(&graph, "g", iops(1000));
        let seen = Arc::new(Seen::default());
        support::add(&graph, mem("below", 7, &seen)).await;
        let options = json!({ "driver": "throttle", "node-name": "n", "throttle-group": "g", "file": "below" });
        let node = add(&graph, options).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        seen.fail_reads.store(1, SeqCst);
        assert_eq!(read(&lane, range(0, 512)).await, Err(IoError::Os(5)));
        assert_eq!(read(&lane, range(0, 512)).await.unwrap(), [7; 512]);
        drop(lane);
        port.detach(&mut graph.permit()).await;
    });
}
