//! `-r`: how fast bytes may be written.

use std::time::{Duration, Instant};

use super::scene::Scene;

const IMAGES: &[&str] = &[
    "create -q -f raw a.raw 4M",
    "qemu-io -f raw -c 'write -P 1 0 4M' a.raw",
    "create -q -f qcow2 base.qcow2 4M",
    "create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
    "qemu-io -c 'write -P 2 0 4M' top.qcow2",
];

/// From below by what the rate asks; from above so loosely that a busy machine keeps it, and tightly enough that a second wait
/// for each piece would not.
#[test]
fn a_rate_is_kept() {
    let mut scene = Scene::new(IMAGES);
    let lines = [
        "convert -f raw -O raw -r 2M a.raw 1.raw",
        "convert -f raw -O qcow2 -r 2M -W a.raw 2.qcow2",
        "commit -r 2M top.qcow2",
    ];
    for line in lines {
        let begun = Instant::now();
        let ours = scene.ours_says(line);
        let took = begun.elapsed();
        assert_eq!(ours.code, Some(0), "{line}: {}", ours.err);
        // The last piece is not waited for.
        assert!(took > Duration::from_millis(900) && took < Duration::from_secs(15), "{line}: {took:?}");
    }
    let begun = Instant::now();
    let ours = scene.ours_says("convert -f raw -O raw -r 0 a.raw 3.raw");
    assert!(ours.code == Some(0) && begun.elapsed() < Duration::from_millis(900), "0 is no limit");
    for line in lines {
        assert_eq!(scene.theirs_says(line).code, Some(0));
    }
    scene.same_images(&["1.raw", "2.qcow2", "base.qcow2"]);
    scene.same(&[
        "convert -r x a.raw b.raw",
        "convert -r -1 a.raw b.raw",
        "commit -r x base.qcow2",
        "convert -r 1Q a.raw b",
    ]);
}
