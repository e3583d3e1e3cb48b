//! Random work through qcow2, and what a crash may leave of the image: leaks, never more. How: `support/crash.rs`.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

#[path = "support/allowed.rs"]
mod allowed;
#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "support/crash.rs"]
mod crash;
#[path = "support/disk.rs"]
mod disk;
#[path = "support/history.rs"]
mod history;
#[path = "support/qcow2.rs"]
mod qcow2;
#[path = "support/random.rs"]
mod random;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bench::{add, with};
use block_core::graph::{Graph, Limits, NodeId};
use block_core::rt::run_control;
use crash::{Report, Trial, cuts};
use disk::{Disk, Event, Log};
use history::{ALL, Past, Used, What};
use random::Random;
use serde_json::{Value, json};

const SIZE: u64 = 64 << 10;

/// States that were judged, of them with leaks, leaked clusters.
static JUDGED: [AtomicUsize; 3] = [const { AtomicUsize::new(0) }; 3];

/// In every state no refcount is too low. QEMU's judge has to agree, where it is asked.
fn check(image: &[u8]) -> Result<(), String> {
    let judged = qcow2::corrupt(image)?;
    let number = JUDGED[0].fetch_add(1, Relaxed);
    JUDGED[1].fetch_add(usize::from(judged.leaks > 0), Relaxed);
    JUDGED[2].fetch_add(judged.leaks, Relaxed);
    if number.is_multiple_of(199) {
        let leaks = qcow2::qemu_check(image)?;
        if leaks != (judged.leaks > 0) {
            return Err(format!("QEMU finds leaks: {leaks}, we find {}", judged.leaks));
        }
    }
    Ok(())
}

fn stack(more: Value) -> impl AsyncFn(&Rc<Graph>) -> NodeId {
    let options = json!({ "driver": "qcow2", "node-name": "top", "discard": "unmap", "file": "disk" });
    let options = with(options, &more);
    async move |graph: &Rc<Graph>| add(graph, options.clone()).await.unwrap()
}

fn limits() -> Limits {
    Limits { fua: true, discard: true, unmap_zeroes: true, ..Limits::ANY }
}

fn trial(seed: u64, options: &str, resizes: bool) -> Trial {
    Trial { seed, images: vec![qcow2::fresh(options, SIZE)], limits: limits(), size: SIZE, resizes, check }
}

fn all_is_well(name: &str, options: &str, resizes: bool, more: &Value) {
    let seeds: u64 = std::env::var("TRELLIS_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(2);
    let mut states = 0;
    for seed in 1..=seeds {
        let report = trial(seed, options, resizes).run(stack(more.clone()), stack(more.clone()));
        assert_eq!(report.first, None, "{name}, seed {seed}: {report:?}");
        states += report.states;
    }
    let [judged, leaky, leaks] = JUDGED.each_ref().map(|count| count.load(Relaxed));
    eprintln!("{name}: {states} crash states; of all so far, {judged}, {leaky} have leaks, {leaks} clusters together");
    assert!(states > 1000);
}

#[test]
fn a_crash_leaves_leaks_at_most_with_small_clusters() {
    all_is_well("512 B", "cluster_size=512", false, &json!({}));
    all_is_well("512 B, resized", "cluster_size=512,refcount_bits=64", true, &json!({}));
}

#[test]
fn a_crash_leaves_leaks_at_most_with_large_clusters() {
    all_is_well("4 KiB", "cluster_size=4096", true, &json!({}));
    all_is_well("4 KiB, 1 bit", "cluster_size=4096,refcount_bits=1", false, &json!({ "discard-no-unref": true }));
    all_is_well("version 2", "cluster_size=4096,compat=0.10", false, &json!({}));
}

#[test]
fn a_crash_leaves_leaks_at_most_with_subclusters() {
    all_is_well("subclusters", "cluster_size=16K,extended_l2=on", true, &json!({}));
}

#[test]
fn a_crash_leaves_leaks_at_most_with_small_caches() {
    let small = json!({ "l2-cache-size": 512, "refcount-cache-size": 512, "l2-cache-entry-size": 512 });
    all_is_well("small caches", "cluster_size=512", false, &small);
}

/// The judge sees what it has to see: flushes that are dropped make refcounts come too late.
#[test]
fn an_image_whose_flushes_are_dropped_is_caught() {
    let careless = json!({ "file": { "driver": "raw", "file": "disk", "cache": { "no-flush": true } } });
    let Report { first, lost, .. } = trial(1, "cluster_size=512", false).run(stack(careless), stack(json!({})));
    assert!(first.is_some() && lost > 0, "{first:?}");
}

/// A node over the image, and its user.
async fn used(image: Vec<u8>, log: &Log) -> Used {
    let graph = Graph::new(Arc::new(|_| ()));
    graph.permit().add(Disk::node(0, image, limits(), log)).await.unwrap();
    let node = stack(json!({}))(&graph).await;
    Used::new(graph, node).await
}

/// A change of the snapshots is cut off everywhere: they are as before, or as after it, and nothing is lost.
fn cut_off(options: &str, what: What) -> usize {
    let (log, mut past) = (Log::default(), Past::new(SIZE));
    let fresh = qcow2::fresh(options, SIZE);
    let begun = run_control(async |_| {
        let used = used(fresh.clone(), &log).await;
        past.made(&used).await;
        let begun = log.events().len();
        used.change(what).await.unwrap();
        begun
    });
    let (mut start, events) = (fresh, log.events());
    for event in &events[..begun] {
        if let Event::Change(_, change) = event {
            change.apply(&mut start);
        }
    }
    let after = past.after(what);
    let (mut done, mut undone) = (0, 0);
    let cuts = cuts(&events[begun..], &mut Random(7));
    for (number, cut) in cuts.iter().enumerate() {
        let image = cut.images(std::slice::from_ref(&start), &events[begun..]).remove(0);
        let which = format!("{options}, {what:?}, {cut:?}");
        qcow2::corrupt(&image).unwrap_or_else(|wrong| panic!("{which}: {wrong}"));
        let image = if number % 17 == 0 {
            qcow2::qemu_repaired(&image).unwrap_or_else(|wrong| panic!("{which}: {wrong}"))
        } else {
            image
        };
        let found = run_control(async |_| used(image, &Log::default()).await.all().await);
        let found = found.unwrap_or_else(|wrong| panic!("{which}: {wrong}"));
        assert!(found == past || found == after, "{which}");
        done += usize::from(found == after);
        undone += usize::from(found == past);
    }
    assert!(done > 0 && undone > 0, "{options}, {what:?}: it is done in {done} states, and not in {undone}");
    cuts.len()
}

#[test]
fn a_crash_leaves_snapshots_as_they_were_or_as_they_shall_be() {
    for options in ["cluster_size=512", "cluster_size=4096,compat=0.10", "cluster_size=16K,extended_l2=on"] {
        for what in ALL {
            eprintln!("{options}, {what:?}: {} states", cut_off(options, what));
        }
    }
}
