//! Every call of the file below a qcow2 image fails once, and from then on, in every way that calls fail: the disk holds
//! what it may, errors are reported, and the image has leaks at most. How: `support/faults.rs`.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

#[path = "support/allowed.rs"]
mod allowed;
#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "support/faults.rs"]
mod faults;
#[path = "support/qcow2.rs"]
mod qcow2;
#[path = "support/scenarios.rs"]
mod scenarios;

use std::path::Path;

use faults::{SIZE, Scene, Subject};
use scenarios::fault_at_every_call;
use serde_json::json;

fault_at_every_call! { subjects() }

fn subjects() -> Vec<Subject> {
    ["cluster_size=512", "cluster_size=16K,extended_l2=on"].into_iter().map(subject).collect()
}

fn subject(options: &'static str) -> Subject {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("disk.img");
    let below = json!({ "driver": "file", "filename": path, "aio": "io_uring" });
    let fresh = qcow2::fresh(options, SIZE);
    Subject {
        name: options.into(),
        options: json!({ "driver": "qcow2", "node-name": "subject", "discard": "unmap", "file": below }),
        prepare: Box::new(move |dir: &Path| std::fs::write(dir.join("disk.img"), &fresh).unwrap()),
        dir,
        above: None,
        resizes: true,
        buffers: true,
        heals: |_| false,
        block: 1,
        // What is still called dirty is repaired when it is opened.
        check: |dir| {
            let image = std::fs::read(dir.join("disk.img")).unwrap();
            if qcow2::is_dirty(&image) { Ok(()) } else { qcow2::corrupt(&image).map(drop) }
        },
    }
}

/// An image that was not closed in good order is opened: it is repaired, or it is not there and as dirty as before.
#[test]
fn repairing() {
    let mut points = 0;
    for subject in subjects() {
        let scenario = async |scene: &mut Scene<'_>| {
            let path = scene.dir().join("disk.img");
            let mut image = std::fs::read(&path).unwrap();
            qcow2::spoil(&mut image);
            std::fs::write(path, image).unwrap();
            scene.arm();
            scene.open().await;
            scene.read().await;
            scene.close().await;
        };
        let tried = faults::with_plans(&subject, &faults::PLANS, scenario);
        points += tried.unwrap_or_else(|wrong| panic!("{wrong}"));
    }
    eprintln!("{points} faults");
    assert!(points > 100);
}
