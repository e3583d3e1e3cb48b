//! Every call of the file below a qcow2 image fails once, and from then on, in every way that calls fail: the disk holds
//! what it may, errors are reported, and the image has leaks at most. How: `support/faults.rs`.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

#[path = "support/allowed.rs"]
mod allowed;
#[path = "support/amending.rs"]
mod amending;
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

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use block_core::drivers::format::qcow2::AmendOptions;
use block_core::graph::{BitmapAction, BitmapChange, Graph, NodeBitmap, WriteFlags};
use block_core::rt::fault::{Faults, Plan};
use block_core::rt::{Local, run_control};
use faults::{PLANS, SIZE, Scene, Subject};
use history::{ALL, Past, Used, What};
use scenarios::fault_at_every_call;
use serde_json::json;

fault_at_every_call! { subjects() }

fn subjects() -> Vec<Subject> {
    let of_one_file = ["cluster_size=512", "cluster_size=16K,extended_l2=on,lazy_refcounts=on"];
    of_one_file
        .into_iter()
        .map(subject)
        .chain([with_data_file("cluster_size=16K,extended_l2=on"), with_data_file("cluster_size=4K,data_file_raw=on")])
        .chain([encrypted(subject(&format!("cluster_size=4K,{}", qcow2::ENCRYPTED)))])
        .chain([encrypted(with_data_file(&format!("cluster_size=16K,extended_l2=on,{}", qcow2::ENCRYPTED)))])
        .collect()
}

fn encrypted(mut subject: Subject) -> Subject {
    subject.options["encrypt"] = json!({ "format": "luks", "key-secret": "word" });
    subject.block = 512;
    subject
}

/// Guest data is in a file of its own.
fn with_data_file(options: &str) -> Subject {
    let mut subject = subject("cluster_size=512");
    let data = subject.dir.path().join("disk.data");
    let fresh = qcow2::fresh(&format!("{options},data_file={}", data.display()), SIZE);
    subject.name = format!("{options}, with a data file");
    subject.options["data-file"] = json!({ "driver": "file", "filename": data, "aio": "io_uring", "discard": "unmap" });
    subject.prepare = Box::new(move |dir: &Path| {
        std::fs::write(dir.join("disk.img"), &fresh).unwrap();
        std::fs::write(dir.join("disk.data"), vec![0; SIZE as usize]).unwrap();
    });
    subject
}

fn subject(options: &str) -> Subject {
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
            // What is called dirty is repaired when it is opened.
            if !qcow2::is_dirty(&image) {
                qcow2::corrupt(&image).unwrap_or_else(|wrong| panic!("{which}: {wrong}"));
            }
            if points % 23 == 0 && !qcow2::is_dirty(&image) {
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
    for options in ["cluster_size=512", "cluster_size=16K,extended_l2=on", "cluster_size=512,lazy_refcounts=on"] {
        for what in ALL {
            eprintln!("{options}, {what:?}: {} faults", failing(options, what));
        }
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
        let tried = faults::with_plans(&subject, &PLANS, scenario);
        points += tried.unwrap_or_else(|wrong| panic!("{wrong}"));
    }
    eprintln!("{points} faults");
    assert!(points > 100);
}

/// What is in the image, by who only reads it: all bytes, and its bitmaps.
async fn looked(scene: &Scene<'_>) -> (Vec<u8>, Vec<NodeBitmap>) {
    let graph = faults::graph();
    let options = bench::with(scene.options(), &json!({ "read-only": true }));
    let node = bench::add(&graph, options).await.unwrap();
    let port = bench::attach(&graph, node, bench::READER).await.unwrap();
    let lane = port.handle().lane(&Local::current());
    let bytes = bench::read(&lane, bench::range(0, port.geometry().size)).await.unwrap();
    drop(lane);
    port.detach(&mut graph.permit()).await;
    let bitmaps = graph.node(node).unwrap().bitmaps;
    graph.permit().remove(node).await.unwrap();
    (bytes, bitmaps)
}

async fn add_bitmap(scene: &mut Scene<'_>, name: &str) {
    let Some(report) = scene.node() else { return };
    let what = BitmapAction::Add { granularity: Some(512), recording: true, persistent: true };
    let step = BitmapChange { node: report.id, name: name.into(), what };
    let added = scene.graph.permit().transact(vec![Box::new(step)]).await;
    scene.note("add a bitmap", added);
}

/// A bitmap is stored, or it is not there, or it is not believed; and one that is believed says enough.
#[test]
fn storing_bitmaps() {
    let (mut points, believed) = (0, Cell::new(0));
    for subject in subjects() {
        let scenario = async |scene: &mut Scene<'_>| {
            scene.open().await;
            add_bitmap(scene, "old").await;
            scene.close().await;
            let (before, found) = looked(scene).await;
            assert_eq!(found.len(), 1);
            scene.arm();
            scene.open().await;
            scene.write(bench::range(4096, 512), WriteFlags::default()).await;
            add_bitmap(scene, "young").await;
            scene.write(bench::range(20480, 4096), WriteFlags::default()).await;
            scene.close().await;
            scene.disarm();
            let (after, bitmaps) = looked(scene).await;
            for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.inconsistent) {
                believed.set(believed.get() + 1);
                let changed = (0..SIZE).step_by(512).filter(|at| {
                    let sector = *at as usize..*at as usize + 512;
                    before[sector.clone()] != after[sector] && (bitmap.name == "old" || *at != 4096)
                });
                let missing = changed.into_iter().find(|at| bitmap.bits.next_dirty(bench::range(*at, 512)).is_none());
                scene.expect(missing.is_none(), &format!("'{}' has no mark for {missing:?}", bitmap.name));
            }
        };
        let tried = faults::with_plans(&subject, &PLANS, scenario);
        points += tried.unwrap_or_else(|wrong| panic!("{wrong}"));
    }
    eprintln!("{points} faults, after which {} bitmaps are believed", believed.get());
    assert!(points > 100 && believed.get() > 100);
}

/// A change of the backing file's name is done, or the image is as before, as it says.
#[test]
fn naming_another_backing_file() {
    let (mut points, mut failed) = (0, 0);
    for options in ["cluster_size=512", "cluster_size=2048", "cluster_size=16K"] {
        let subject = subject(options);
        let path = subject.dir.path().join("disk.img");
        let below = json!({ "driver": "null-co", "size": SIZE, "read-zeroes": true });
        let faults = Faults::default();
        let _entered = faults.enter();
        let opened = async || {
            let graph = Graph::new(Arc::new(|_| ()));
            let options = bench::with(subject.options.clone(), &json!({ "backing": below }));
            let node = bench::add(&graph, options).await.unwrap();
            (graph, node)
        };
        for (fault, lasting) in PLANS {
            for nth in 1.. {
                (subject.prepare)(subject.dir.path());
                let plan = Plan { nth, fault, lasting };
                let (struck, result) = run_control(async |_| {
                    let (graph, node) = opened().await;
                    graph.permit().change_backing_file(node, node, Some("one.img")).await.unwrap();
                    faults.arm(plan);
                    let result = graph.permit().change_backing_file(node, node, Some("another.img")).await;
                    let struck = faults.disarm();
                    let shown = graph.info(node).await.unwrap().backing.map(|(name, _)| name);
                    let expected = if result.is_ok() { "another.img" } else { "one.img" };
                    assert_eq!(shown.as_deref(), Some(expected), "{options}, {plan:?}: {result:?}");
                    // A node whose last flush failed says so first.
                    if graph.permit().remove(node).await.is_err() {
                        graph.permit().remove(node).await.unwrap();
                    }
                    (struck.len(), result)
                });
                if struck == 0 {
                    break;
                }
                points += 1;
                failed += usize::from(result.is_err());
                let which = format!("{options}, {plan:?}, {result:?}");
                qcow2::corrupt(&std::fs::read(&path).unwrap()).unwrap_or_else(|wrong| panic!("{which}: {wrong}"));
                let found = run_control(async |_| {
                    let (graph, node) = opened().await;
                    graph.info(node).await.unwrap().backing.map(|(name, _)| name).unwrap()
                });
                // Where the way back failed as well, the header says either.
                let right = if result.is_ok() { found == "another.img" } else { found == "one.img" || lasting };
                assert!(right, "{which}: {found}");
            }
        }
    }
    eprintln!("{points} faults, {failed} times it failed");
    assert!(failed > 10);
}

/// Refcounts get another width, and a call fails: the image is in order, with the old ones or the new ones.
#[test]
fn refcounts_of_another_width() {
    let (mut points, mut failed) = (0, 0);
    for (options, bits) in [("cluster_size=512", 64), ("cluster_size=16K,extended_l2=on", 1)] {
        let subject = subject(options);
        let path = subject.dir.path().join("disk.img");
        let faults = Faults::default();
        let _entered = faults.enter();
        for (fault, lasting) in PLANS {
            for nth in 1.. {
                (subject.prepare)(subject.dir.path());
                let plan = Plan { nth, fault, lasting };
                let (struck, result) = run_control(async |_| {
                    let graph = Graph::new(Arc::new(|_| ()));
                    let file = bench::with(subject.options["file"].clone(), &json!({ "node-name": "file" }));
                    let node = bench::add(&graph, file).await.unwrap();
                    faults.arm(plan);
                    let wanted = AmendOptions { refcount_bits: Some(bits), ..AmendOptions::default() };
                    let result = amending::amend(&graph, node, &wanted).await;
                    let struck = faults.disarm();
                    // A node whose last flush failed says so first.
                    if graph.permit().remove(node).await.is_err() {
                        graph.permit().remove(node).await.unwrap();
                    }
                    (struck.len(), result)
                });
                if struck == 0 {
                    break;
                }
                points += 1;
                failed += usize::from(result.is_err());
                let image = std::fs::read(&path).unwrap();
                let which = format!("{options}, {plan:?}, {result:?}");
                qcow2::corrupt(&image).unwrap_or_else(|wrong| panic!("{which}: {wrong}"));
                assert!(result.is_err() || 1 << image[99] == bits, "{which}");
                if points % 23 == 0 {
                    qcow2::qemu_repaired(&image).unwrap_or_else(|wrong| panic!("{which}: {wrong}"));
                }
            }
        }
    }
    eprintln!("{points} faults, {failed} times it failed");
    assert!(failed > 20);
}
