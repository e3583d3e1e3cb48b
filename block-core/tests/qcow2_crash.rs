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
#[path = "support/qcow2.rs"]
mod qcow2;
#[path = "support/random.rs"]
mod random;

use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bench::{add, with};
use block_core::graph::{Graph, Limits, NodeId};
use crash::{Report, Trial};
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

/// There is room for what the disk has and for little else, so that a cluster which is set free is soon another's.
#[test]
fn a_crash_leaves_leaks_at_most_where_clusters_are_used_again() {
    for (options, room) in [("cluster_size=512", 140 * 512), ("cluster_size=4096", 22 * 4096)] {
        let tight = json!({ "file": { "driver": "raw", "file": "disk", "size": room, "discard": "unmap" } });
        for seed in 1..=3 {
            let mut trial = trial(seed, options, false);
            trial.images[0].resize(room, 0);
            let report = trial.run(stack(tight.clone()), stack(tight.clone()));
            assert_eq!(report.first, None, "{options}, seed {seed}: {report:?}");
            assert!(report.states > 300, "{}", report.states);
        }
    }
}

/// The judge sees what it has to see: flushes that are dropped make refcounts come too late.
#[test]
fn an_image_whose_flushes_are_dropped_is_caught() {
    let careless = json!({ "file": { "driver": "raw", "file": "disk", "cache": { "no-flush": true } } });
    let Report { first, lost, .. } = trial(1, "cluster_size=512", false).run(stack(careless), stack(json!({})));
    assert!(first.is_some() && lost > 0, "{first:?}");
}
