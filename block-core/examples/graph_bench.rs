//! What the graph lock costs a request: enter, pin and leave, on one thread and on two at once, and the drain of an
//! idle root. `cargo run --release -p block-core --example graph_bench`

#[path = "../tests/support/mod.rs"]
mod support;

use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use block_core::graph::{PermSet, Perms};
use block_core::port::{Port, PortHandle, PortOptions};
use block_core::rt::{IoThread, Local, PollParams, run_control};
use support::{Seen, add, graph, mem};

const ROUNDS: u32 = 20_000_000;

fn main() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("disk", 0, &Arc::<Seen>::default())).await;
        let perms = Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::ALL };
        let options = PortOptions { name: "bench".into(), perms };
        let port =
            Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await.expect("nothing is in the way");
        for threads in [1, 2] {
            report("enter, pin, leave: idle lane", threads, &port.handle(), idle_lane).await;
            report("enter, pin, leave: busy lane", threads, &port.handle(), busy_lane).await;
        }
        let begun = Instant::now();
        for _ in 0..100_000 {
            drop(graph.permit().drain(&[node]).await.expect("the root is idle"));
        }
        println!("drain and resume of an idle root: {:.2} us", begun.elapsed().as_secs_f64() * 10.0);
    });
}

async fn report(name: &str, threads: usize, port: &PortHandle, work: fn(&PortHandle, &Rc<Local>) -> f64) {
    let running: Vec<_> = (0..threads)
        .map(|_| {
            let thread = IoThread::spawn("bench", PollParams::default()).expect("a thread can be had");
            let port = port.clone();
            (thread.remote(), thread, port)
        })
        .collect();
    let calls: Vec<_> = running
        .iter()
        .map(|(remote, _, port)| {
            let port = port.clone();
            let (tell, told) = std::sync::mpsc::channel();
            remote.send(move |local| tell.send(work(&port, local)).expect("somebody waits for it"));
            told
        })
        .collect();
    let slowest = calls.iter().filter_map(|told| told.recv().ok()).fold(0.0, f64::max);
    println!("{name:<32} {threads} thread(s): {slowest:6.2} ns");
}

fn idle_lane(port: &PortHandle, local: &Rc<Local>) -> f64 {
    let lane = port.lane(local);
    timed(|| drop(black_box(lane.try_enter())))
}

fn busy_lane(port: &PortHandle, local: &Rc<Local>) -> f64 {
    let lane = port.lane(local);
    let _inside = lane.try_enter();
    timed(|| drop(black_box(lane.try_enter())))
}

fn timed(mut work: impl FnMut()) -> f64 {
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        work();
    }
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
}
