//! Every call below an encrypted disk fails once, and from then on, in every way that calls fail: the disk holds what it may,
//! errors are reported; and of an image that could not be made there is nothing, or all. How: `support/faults.rs`.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/allowed.rs"]
mod allowed;
#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "support/faults.rs"]
mod faults;
#[path = "support/scenarios.rs"]
mod scenarios;

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use block_core::catalog;
use block_core::codec::SecretBytes;
use block_core::codec::secret::{Encoding, Secret};
use block_core::graph::Graph;
use block_core::rt::fault::{Faults, Plan};
use block_core::rt::run_control;
use faults::{PLANS, SIZE, Subject};
use scenarios::fault_at_every_call;
use serde_json::{Value, json};

// Growing is left out: what is new in an encrypted disk is noise. Where something is costs no call.
fault_at_every_call! { [subject()], PLANS;
    opening_and_closing reading writing_blocks writing_parts writing_through writing_zeroes unmapping discarding
    flushing reopening reopening_two
}

fn disk(path: &Path) -> Value {
    let below = json!({ "driver": "file", "filename": path, "aio": "io_uring" });
    json!({ "driver": "luks", "node-name": "subject", "key-secret": "word", "file": below })
}

fn subject() -> Subject {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("disk.img");
    create(&path).unwrap();
    let fresh = std::fs::read(&path).unwrap();
    Subject {
        name: "luks".into(),
        options: disk(&path),
        prepare: Box::new(move |dir: &Path| std::fs::write(dir.join("disk.img"), &fresh).unwrap()),
        dir,
        above: None,
        resizes: false,
        buffers: false,
        heals: |_| false,
        block: 512,
        check: |_| Ok(()),
    }
}

fn graph() -> Rc<Graph> {
    graph_with(&["word"])
}

/// Secrets that are called what they are.
fn graph_with(words: &[&str]) -> Rc<Graph> {
    let graph = Graph::new(Arc::new(|_| ()));
    for word in words {
        let secret = Secret::new(SecretBytes::new(word.as_bytes().to_vec()), Encoding::Raw).unwrap();
        graph.objects().insert(word, Arc::new(secret));
    }
    graph
}

fn create(path: &Path) -> Result<(), String> {
    std::fs::write(path, b"what was there").unwrap();
    run_control(async |_| make(path).await)
}

async fn make(path: &Path) -> Result<(), String> {
    let options = json!({
        "driver": "luks", "size": SIZE, "key-secret": "word", "iter-time": 1, "cipher-alg": "aes-128",
        "file": { "driver": "file", "filename": path }
    });
    let options = qmp::schema::from_value(options).unwrap();
    catalog::create(&graph(), options).await.map_err(|error| error.full())
}

#[test]
fn an_image_is_made_or_is_none() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("new.img");
    let faults = Faults::default();
    let _entered = faults.enter();
    let (mut points, mut failed) = (0, 0);
    for (fault, lasting) in PLANS {
        for nth in 1.. {
            std::fs::write(&path, b"what was there").unwrap();
            let plan = Plan { nth, fault, lasting };
            let (made, struck) = run_control(async |_| {
                faults.arm(plan);
                let made = make(&path).await;
                (made, faults.disarm().len())
            });
            if struck == 0 {
                made.unwrap();
                break;
            }
            points += 1;
            let opened = run_control(async |_| {
                let graph = graph();
                let node = bench::add(&graph, disk(&path)).await?;
                graph.permit().remove(node).await.unwrap();
                Ok::<_, String>(())
            });
            if let Err(why) = &made {
                failed += 1;
                let whole = opened.is_ok() || opened.as_ref().is_err_and(|error| error.contains("not in LUKS format"));
                assert!(whole, "{plan:?}, {why}: {opened:?}");
            } else {
                opened.unwrap_or_else(|refused| panic!("{plan:?}: it was made, and is not opened: {refused}"));
            }
        }
    }
    eprintln!("{points} faults, {failed} failures");
    assert!(failed > 20, "hardly anything could fail");
}

#[test]
fn key_slots_are_changed_or_not() {
    change_key_slots("luks", disk);
}

/// The same inside a qcow2 image.
#[test]
fn key_slots_in_a_qcow2_image_are_changed_or_not() {
    change_key_slots("qcow2", |path| {
        let below = json!({ "driver": "file", "filename": path, "aio": "io_uring" });
        let encrypt = json!({ "format": "luks", "key-secret": "word" });
        json!({ "driver": "qcow2", "node-name": "subject", "encrypt": encrypt, "file": below })
    });
}

/// A change of the key slots fails at some call: it is done, or the slots that there were open the disk; no slot that is not
/// meant is touched.
fn change_key_slots(driver: &str, disk: fn(&Path) -> Value) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("keys.img");
    // What belongs to the keys is said here, or one level deeper.
    let of_keys = |keys: Value| {
        if driver == "luks" {
            return bench::with(keys, &json!({ "driver": "luks" }));
        }
        json!({ "driver": "qcow2", "encrypt": bench::with(keys, &json!({ "format": "luks" })) })
    };
    std::fs::write(&path, b"").unwrap();
    let new = of_keys(json!({ "key-secret": "word", "iter-time": 1, "cipher-alg": "aes-128" }));
    let new = bench::with(new, &json!({ "size": SIZE, "file": { "driver": "file", "filename": path } }));
    run_control(async |_| catalog::create(&graph(), qmp::schema::from_value(new).unwrap()).await).unwrap();
    let (fresh, words) = (std::fs::read(&path).unwrap(), ["word", "other"]);
    let faults = Faults::default();
    let _entered = faults.enter();
    let opens = |number: usize| {
        run_control(async |_| {
            let graph = graph_with(&words);
            let mut options = disk(&path);
            let keys = if driver == "luks" { &mut options } else { &mut options["encrypt"] };
            keys["key-secret"] = words[number].into();
            let node = bench::add(&graph, options).await?;
            graph.permit().remove(node).await.unwrap();
            Ok::<_, String>(())
        })
        .is_ok()
    };
    let fill = of_keys(json!({ "state": "active", "new-secret": "other", "iter-time": 1 }));
    let erase = of_keys(json!({ "state": "inactive", "old-secret": "other" }));
    let change = |change: &Value, plan: Option<Plan>| {
        run_control(async |_| {
            let graph = graph_with(&words);
            let node = bench::add(&graph, disk(&path)).await.unwrap();
            if let Some(plan) = plan {
                faults.arm(plan);
            }
            let options = qmp::schema::from_value(change.clone()).unwrap();
            let changed = catalog::amend(&graph, node, options, false).await.map_err(|error| error.full());
            let struck = faults.disarm().len();
            let _ = graph.permit().remove(node).await;
            (changed, struck)
        })
    };
    std::fs::write(&path, &fresh).unwrap();
    change(&fill, None).0.unwrap();
    let filled = std::fs::read(&path).unwrap();
    let mut failed = 0;
    for (start, what, after) in [(&fresh, &fill, true), (&filled, &erase, false)] {
        for (fault, lasting) in PLANS {
            for nth in 1.. {
                std::fs::write(&path, start).unwrap();
                let plan = Plan { nth, fault, lasting };
                let (changed, struck) = change(what, Some(plan));
                if struck == 0 {
                    changed.unwrap();
                    break;
                }
                assert!(opens(0), "{what}, {plan:?}, {changed:?}: the other slot is gone");
                if changed.is_ok() {
                    assert_eq!(opens(1), after, "{what}, {plan:?}: it was done");
                } else {
                    failed += 1;
                }
            }
        }
    }
    eprintln!("{failed} failures");
    assert!(failed > 20, "hardly anything could fail");
}
