//! What the graph lock costs a request: enter, pin and leave, on one thread and on two at once, and the drain of an
//! idle root. `cargo run --release -p block-core --example graph_bench`
//!
//! Times are the threads' own CPU times, so that other load does not count; one thread and two take turns. Two processors
//! may be one core: what that costs is shown by a loop that has the same instructions, and nothing in common.

#[path = "../tests/support/mod.rs"]
mod support;

use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use block_core::graph::{PermSet, Perms};
use block_core::port::{Port, PortHandle, PortOptions};
use block_core::rt::{IoThread, Local, PollParams, run_control};
use support::{Seen, add, graph, mem};

/// Requests in one visit.
const REQUESTS: u32 = 20_000_000;

/// Visits of one thread, and as many of two.
const ROUNDS: usize = 5;

fn main() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("disk", 0, &Arc::<Seen>::default())).await;
        let perms = Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::ALL };
        let options = PortOptions { name: "bench".into(), perms };
        let port =
            Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await.expect("nothing is in the way");
        println!("| CPU ns a request, median of {ROUNDS} | 1 thread | 2 threads | ratio |\n|---|---|---|---|");
        report("enter, pin, leave: idle lane", &port.handle(), idle_lane);
        report("enter, pin, leave: busy lane", &port.handle(), busy_lane);
        report("two stores and fences, nothing shared", &port.handle(), fences_alone);
        let begun = Instant::now();
        for _ in 0..100_000 {
            drop(graph.permit().drain(&[node]).await.expect("the root is idle"));
        }
        println!("drain and resume of an idle root: {:.2} us", begun.elapsed().as_secs_f64() * 10.0);
    });
}

fn report(name: &str, port: &PortHandle, work: Work) {
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        one.push(slowest(1, port, work));
        two.push(slowest(2, port, work));
    }
    let [one, two] = [one, two].map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    });
    println!("| {name} | {one:.2} | {two:.2} | {:.2} |", two / one);
}

/// Nanoseconds a request.
type Work = fn(&PortHandle, &Rc<Local>) -> f64;

fn slowest(threads: usize, port: &PortHandle, work: Work) -> f64 {
    let running: Vec<_> = (0..threads)
        .map(|_| {
            let thread = IoThread::spawn("bench", PollParams::default()).expect("a thread can be had");
            let (port, (tell, told)) = (port.clone(), std::sync::mpsc::channel());
            thread.remote().send(move |local| tell.send(work(&port, local)).expect("somebody waits for it"));
            (thread, told)
        })
        .collect();
    running.iter().filter_map(|(_, told)| told.recv().ok()).fold(0.0, f64::max)
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

fn fences_alone(_: &PortHandle, _: &Rc<Local>) -> f64 {
    #[repr(align(128))]
    struct Own(AtomicU32);
    let own = Box::new(Own(AtomicU32::new(0)));
    timed(|| {
        for value in [1, 0] {
            black_box(&*own).0.store(value, Ordering::Relaxed);
            fence(Ordering::SeqCst);
        }
    })
}

fn timed(mut work: impl FnMut()) -> f64 {
    let begun = cpu_time();
    for _ in 0..REQUESTS {
        work();
    }
    (cpu_time() - begun).as_secs_f64() * 1e9 / f64::from(REQUESTS)
}

/// Of the calling thread. The kernel brings it up to date with every tick of its clock.
fn cpu_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("the kernel counts CPU time");
    let nanos = text.split(' ').next().and_then(|first| first.parse().ok());
    Duration::from_nanos(nanos.expect("the first number is the CPU time"))
}
