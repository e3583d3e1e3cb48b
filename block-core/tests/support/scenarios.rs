//! What is done to a disk while calls fail: each of these is run by `faults.rs` for every driver that has a test of it.
//! A new kind of request or command that all disks have belongs here; what only one driver can do, beside its tests.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses a part")]

use block_core::graph::{DetectZeroes, Preallocation, WriteFlags};
use serde_json::json;

use crate::bench::{file, image, range, reopen, with};
use crate::faults::{SIZE, Scene};

const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };
const FUA: WriteFlags = WriteFlags { fua: true, ..PLAIN };
const UNMAP: WriteFlags = WriteFlags { may_unmap: true, ..PLAIN };

/// Makes a test of every scenario. `$each` gives the subjects.
macro_rules! fault_at_every_call {
    ($each:expr, $plans:expr; $($scenario:ident)*) => {
        $(#[test]
        fn $scenario() {
            let mut all = 0;
            for subject in $each {
                let points = faults::with_plans(&subject, &$plans, scenarios::$scenario);
                let points = points.unwrap_or_else(|wrong| panic!("{wrong}"));
                eprintln!("{}: {points} faults", subject.name);
                all += points;
            }
            assert!(all > 0, "nothing could fail");
        })*
    };
    ($each:expr) => {
        fault_at_every_call! { $each, faults::PLANS;
            opening_and_closing reading mapping writing_blocks writing_parts writing_through writing_zeroes unmapping discarding
            flushing growing growing_with_reservation growing_with_zeroes shrinking reopening reopening_two
        }
    };
}
pub(crate) use fault_at_every_call;

/// Also the tree of nodes that the options define, and the way back when the last of them fails.
pub async fn opening_and_closing(scene: &mut Scene<'_>) {
    scene.arm();
    scene.open().await;
    scene.close().await;
}

pub async fn reading(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.arm();
    scene.read().await;
    scene.read().await;
}

/// What cannot be found out is data.
pub async fn mapping(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.write_zeroes(range(16 << 10, 16 << 10), UNMAP).await;
    scene.arm();
    scene.map().await;
    scene.map().await;
}

pub async fn writing_blocks(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.arm();
    scene.write(range(0, 8192), PLAIN).await;
    scene.write(range(32 << 10, 16 << 10), PLAIN).await;
    scene.flush().await;
    scene.write(range(4096, 8192), PLAIN).await;
    scene.read().await;
}

/// Neither whole blocks nor whole sectors: what is around them has to be read, and kept.
pub async fn writing_parts(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.arm();
    scene.write(range(512, 512), PLAIN).await;
    scene.write(range(4096 + 100, 300), PLAIN).await;
    scene.write(range(8192 - 7, 1000), PLAIN).await;
    scene.write(range(SIZE - 513, 513), PLAIN).await;
    scene.read().await;
}

pub async fn writing_through(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.arm();
    scene.write(range(0, 8192), FUA).await;
    scene.write(range(1024, 512), FUA).await;
    scene.flush().await;
    scene.read().await;
}

pub async fn writing_zeroes(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.arm();
    scene.write_zeroes(range(0, 16 << 10), PLAIN).await;
    scene.write_zeroes(range(20 << 10, 512), FUA).await;
    scene.write_zeroes(range((32 << 10) + 5, 5000), PLAIN).await;
    scene.read().await;
}

pub async fn unmapping(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.arm();
    scene.write_zeroes(range(0, 16 << 10), UNMAP).await;
    scene.write_zeroes(range((32 << 10) + 512, 8192), WriteFlags { fua: true, ..UNMAP }).await;
    scene.write(range(4096, 4096), PLAIN).await;
    scene.read().await;
}

pub async fn discarding(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.arm();
    scene.discard(range(0, 16 << 10)).await;
    scene.discard(range((32 << 10) + 512, 8192)).await;
    scene.write(range(4096, 4096), PLAIN).await;
    scene.read().await;
}

pub async fn flushing(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.write(range(0, 8192), PLAIN).await;
    scene.arm();
    scene.flush().await;
    scene.write(range(4096, 8192), PLAIN).await;
    scene.flush().await;
}

/// For disks that cannot be read any more once a write has failed.
pub async fn flushing_only(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.write(range(0, 8192), PLAIN).await;
    scene.arm();
    scene.flush().await;
    scene.flush().await;
}

pub async fn growing(scene: &mut Scene<'_>) {
    resized_to(scene, SIZE + 4096, Preallocation::Off).await;
}

pub async fn growing_with_reservation(scene: &mut Scene<'_>) {
    resized_to(scene, SIZE + 4096, Preallocation::Falloc).await;
}

pub async fn growing_with_zeroes(scene: &mut Scene<'_>) {
    resized_to(scene, SIZE + (1 << 20), Preallocation::Full).await;
}

pub async fn shrinking(scene: &mut Scene<'_>) {
    resized_to(scene, SIZE / 2, Preallocation::Off).await;
}

async fn resized_to(scene: &mut Scene<'_>, size: u64, how: Preallocation) {
    scene.open().await;
    scene.arm();
    scene.resize(size, how).await;
    scene.write(range(scene.model.size() - 4096, 4096), PLAIN).await;
    scene.flush().await;
    scene.resize(SIZE, Preallocation::Off).await;
    scene.read().await;
}

pub async fn reopening(scene: &mut Scene<'_>) {
    scene.open().await;
    scene.write(range(0, 4096), PLAIN).await;
    scene.arm();
    scene.reopen(&json!({ "detect-zeroes": "on" })).await;
    scene.write(range(4096, 4096), PLAIN).await;
    scene.flush().await;
    scene.reopen(&json!({})).await;
    scene.read().await;
}

/// Both of them, or none.
pub async fn reopening_two(scene: &mut Scene<'_>) {
    scene.open().await;
    let other = file("other", &image(scene.dir(), "other.img", 4096, 0));
    let node = crate::bench::add(&scene.graph, other.clone()).await.unwrap();
    let mode = |scene: &Scene<'_>| {
        let other = scene.graph.node(node).unwrap().options.detect_zeroes;
        (scene.node().unwrap().options.detect_zeroes, other)
    };
    assert_eq!(mode(scene), (DetectZeroes::Off, DetectZeroes::Off));
    scene.arm();
    let more = json!({ "detect-zeroes": "on" });
    let list = [with(scene.options(), &more), with(other, &more)];
    let result = reopen(&scene.graph, &list).await;
    let reopened = scene.note("reopen", result).is_some();
    scene.disarm();
    let expected = if reopened { DetectZeroes::On } else { DetectZeroes::Off };
    let now = mode(scene);
    scene.expect(now == (expected, expected), &format!("a list that was reopened ({reopened}) has {now:?}"));
    scene.graph.permit().remove(node).await.unwrap();
}
