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
#[path = "support/history.rs"]
mod history;
#[path = "support/qcow2.rs"]
mod qcow2;
#[path = "support/scenarios.rs"]
mod scenarios;

use std::path::Path;
use std::sync::Arc;

use block_core::graph::Graph;
use block_core::rt::fault::{Faults, Plan};
use block_core::rt::run_control;
use faults::{PLANS, SIZE, Subject};
use history::{ALL, Past, Used, What};
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
        check: |dir| qcow2::corrupt(&std::fs::read(dir.join("disk.img")).unwrap()).map(drop),
    }
}

/// Each call of a change of the snapshots fails: it is done, or all is as before, as it says; and the image has leaks at
/// most, which QEMU repairs.
fn failing(options: &'static str, what: What) -> u64 {
    let subject = subject(options);
    let path = subject.dir.path().join("disk.img");
    let faults = Faults::default();
    let _entered = faults.enter();
    let (mut points, mut failed) = (0, 0);
    for (fault, lasting) in PLANS {
        for nth in 1.. {
            (subject.prepare)(subject.dir.path());
            let plan = Plan { nth, fault, lasting };
            let mut past = Past::new(SIZE);
            let opened = async || {
                let graph = Graph::new(Arc::new(|_| ()));
                let node = bench::add(&graph, subject.options.clone()).await.unwrap();
                Used::new(graph, node).await
            };
            let (struck, result) = run_control(async |_| {
                let used = opened().await;
                past.made(&used).await;
                faults.arm(plan);
                let result = used.change(what).await;
                let struck = faults.disarm();
                let expected = if result.is_ok() { past.after(what) } else { past.clone() };
                let (disk, names) = used.shown().await.unwrap();
                assert!(disk == expected.disk, "{options}, {what:?}, {plan:?}: the disk after {result:?}");
                let expected: Vec<_> = expected.kept.into_keys().collect();
                assert_eq!(names, expected, "{options}, {what:?}, {plan:?}: after {result:?}");
                used.close().await;
                (struck.len(), result)
            });
            if struck == 0 {
                break;
            }
            points += 1;
            failed += u64::from(result.is_err());
            let which = format!("{options}, {what:?}, {plan:?}, {result:?}");
            let image = std::fs::read(&path).unwrap();
            qcow2::corrupt(&image).unwrap_or_else(|wrong| panic!("{which}: {wrong}"));
            if points % 23 == 0 {
                let repaired = qcow2::qemu_repaired(&image).unwrap_or_else(|wrong| panic!("{which}: {wrong}"));
                std::fs::write(&path, repaired).unwrap();
            }
            let found = run_control(async |_| opened().await.all().await).unwrap();
            let after = past.after(what);
            // Where the way back failed as well, the header says either.
            let expected = if result.is_ok() { found == after } else { found == past || (lasting && found == after) };
            assert!(expected, "{which}: opened again");
        }
    }
    assert!(failed > 0, "{options}, {what:?}: nothing could fail");
    points
}

#[test]
fn snapshots_are_changed_or_not() {
    for options in ["cluster_size=512", "cluster_size=16K,extended_l2=on"] {
        for what in ALL {
            eprintln!("{options}, {what:?}: {} faults", failing(options, what));
        }
    }
}
