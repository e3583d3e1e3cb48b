//! The same for what stands above files, and for changes of the graph: every call fails at every place, and afterwards the
//! disk holds what it may, the graph is as before or as after, nothing is left. How: `support/faults.rs`.
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
mod support;

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bench::{add, file, parsed, range, with};
use block_core::base::Error;
use block_core::catalog;
use block_core::graph::{Change, DetectZeroes, NodeId, Permit, Role, Step, WriteFlags};
use block_core::rt::fault::{Fault, Site};
use faults::{Above, SIZE, Scene, Subject};
use scenarios::fault_at_every_call;
use serde_json::{Value, json};
use support::overlay::{NewOverlay, Table};

fault_at_every_call! { filters(), SOME;
    opening_and_closing reading mapping writing_blocks writing_parts writing_through writing_zeroes unmapping discarding
    flushing growing shrinking
}

fault_at_every_call! { filters().into_iter().filter(|one| !one.name.starts_with("quorum")), SOME; reopening }

/// What the file drivers make of the others is `fault.rs`; those above them see these.
const SOME: [(Fault, bool); 3] =
    [(Fault::Errno(libc::EIO), false), (Fault::Errno(libc::EIO), true), (Fault::Short, false)];

/// Files named as in the options, of which those that `log` in their name may grow.
fn subject(name: &str, files: &'static [&'static str], options: impl Fn(&dyn Fn(&str) -> Value) -> Value) -> Subject {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let below = |name: &str| {
        let path = dir.path().join(name);
        json!({ "driver": "file", "filename": path, "discard": "unmap" })
    };
    let options = with(options(&below), &json!({ "node-name": "subject", "discard": "unmap" }));
    let prepare = move |dir: &Path| {
        for name in files {
            let size = if name.contains("log") { 16 << 20 } else { SIZE };
            File::create(dir.join(name)).unwrap().set_len(size).unwrap();
        }
    };
    Subject {
        name: name.into(),
        dir,
        prepare: Box::new(prepare),
        options,
        above: None,
        resizes: true,
        buffers: false,
        heals: |_| false,
        block: 1,
        check: |_| Ok(()),
    }
}

fn filters() -> Vec<Subject> {
    let over = |driver: &'static str| {
        subject(driver, &["disk"], move |below| json!({ "driver": driver, "file": below("disk") }))
    };
    let throttle = subject(
        "throttle",
        &["disk"],
        |below| json!({ "driver": "throttle", "throttle-group": "free", "file": below("disk") }),
    );
    let debug = subject(
        "blkdebug with blocks",
        &["disk"],
        |below| json!({ "driver": "blkdebug", "align": 4096, "max-transfer": 8192, "image": below("disk") }),
    );
    let cbw = subject(
        "copy-before-write",
        &["disk", "target"],
        |below| json!({ "driver": "copy-before-write", "file": below("disk"), "target": below("target") }),
    );
    let log = subject(
        "blklogwrites",
        &["disk", "log"],
        |below| json!({ "driver": "blklogwrites", "file": below("disk"), "log": below("log") }),
    );
    // Each is written, or the write fails; what is read is the first one's.
    let fifo = subject(
        "quorum, fifo",
        &["a", "b"],
        |below| json!({ "driver": "quorum", "read-pattern": "fifo", "vote-threshold": 2, "children": [below("a"), below("b")] }),
    );
    vec![
        throttle,
        over("copy-on-read"),
        debug,
        Subject { resizes: false, ..cbw },
        log,
        Subject { heals: |sites| sites.iter().all(|site| *site == Site::Read), resizes: false, ..fifo },
        overlay("overlay", false),
        overlay("compress over an overlay", true),
    ]
}

/// Above a store that is a file, with a table that outlives its nodes.
fn overlay(name: &str, compresses: bool) -> Subject {
    let made = || NewOverlay { size: SIZE, ..NewOverlay::above(None) };
    let table: Arc<Mutex<Arc<Table>>> = Arc::new(Mutex::new(made().table()));
    let below = subject(name, &["disk"], |below| below("disk"));
    let fresh = table.clone();
    let prepare = move |dir: &Path| {
        File::create(dir.join("disk")).unwrap().set_len(SIZE).unwrap();
        File::create(dir.join("base")).unwrap().set_len(SIZE).unwrap();
        *fresh.lock().unwrap() = made().table();
    };
    let base = below.dir.path().join("base");
    let above: Above = Box::new(move |graph, store| {
        let (table, base) = (table.lock().unwrap().clone(), file("base", base.to_str().unwrap()));
        Box::pin(async move {
            let base = add(graph, base).await?;
            let layer = NewOverlay { backing: Some(base), ..made() };
            let added = graph.permit().add(layer.over("overlay", store, &table)).await;
            let Ok(overlay) = added else {
                // That something may be lost is said once.
                let gone = [graph.permit().remove(base).await, graph.permit().remove(base).await];
                assert!(gone.iter().any(Result::is_ok), "{gone:?}");
                return Err(added.unwrap_err().full());
            };
            if !compresses {
                return Ok(vec![overlay, base]);
            }
            let filter = json!({ "driver": "compress", "node-name": "compress", "file": "overlay" });
            let filter = add(graph, filter).await.expect("it is made of nothing that fails");
            Ok(vec![filter, overlay, base])
        })
    });
    Subject { prepare: Box::new(prepare), above: Some(above), resizes: false, ..below }
}

// ---- copies ----------------------------------------------------------------------------------------------------

/// Two of three copies are enough: what fails once in one of them is not even noticed.
#[test]
fn what_fails_in_one_copy_is_outvoted() {
    let subject = subject(
        "quorum",
        &["a", "b", "c"],
        |below| json!({ "driver": "quorum", "vote-threshold": 2, "children": [below("a"), below("b"), below("c")] }),
    );
    let subject = Subject { heals: |sites| !sites.contains(&Site::Call), ..subject };
    let once = async |scene: &mut Scene<'_>| {
        if scene.plan().lasting {
            return;
        }
        scenarios::reading(scene).await;
        scene.write(range(4096, 8192), WriteFlags::default()).await;
        scene.write_zeroes(range(16384, 4096), WriteFlags::default()).await;
        scene.flush().await;
        scene.read().await;
    };
    let points = faults::at_every_call(&subject, once).unwrap();
    assert!(points > 30, "{points}");
}

/// Both have to say the same, so after a write that one of them has not got nothing can be said of the disk; but before that.
#[test]
fn what_is_verified_fails_with_either_side() {
    let subject = subject(
        "blkverify",
        &["test", "raw"],
        |below| json!({ "driver": "blkverify", "test": below("test"), "raw": below("raw") }),
    );
    let subject = Subject { resizes: false, ..subject };
    let mut points = 0;
    points += faults::at_every_call(&subject, scenarios::opening_and_closing).unwrap();
    points += faults::at_every_call(&subject, scenarios::reading).unwrap();
    points += faults::at_every_call(&subject, scenarios::flushing_only).unwrap();
    assert!(points > 30, "{points}");
}

// ---- changes of the graph --------------------------------------------------------------------------------------

fn plain() -> Subject {
    subject("file", &["disk"], |below| below("disk"))
}

fn with_every_fault(scenario: impl AsyncFn(&mut Scene<'_>)) {
    let points = faults::at_every_call(&plain(), scenario).unwrap_or_else(|wrong| panic!("{wrong}"));
    eprintln!("{points} faults");
    assert!(points > 0, "nothing could fail");
}

/// Who stands on the node: nobody, or those named.
fn users(scene: &Scene<'_>, name: &str) -> Vec<String> {
    scene.graph.find(name).and_then(|id| scene.graph.node(id)).map(|node| node.parents).unwrap_or_default()
}

/// A filter above `below`, which nobody uses yet.
async fn filter_above(scene: &mut Scene<'_>, name: &str, below: &str) -> Option<NodeId> {
    let options = json!({ "driver": "throttle", "node-name": name, "throttle-group": "free", "file": below });
    let added = add(&scene.graph, options).await;
    scene.note("add", added)
}

async fn used(scene: &mut Scene<'_>) {
    scene.write(range(4096, 4096), WriteFlags::default()).await;
    scene.flush().await;
    scene.read().await;
}

/// All requests go through the filter, or none does; and it can be taken out when nothing fails any more.
#[test]
fn a_filter_is_inserted_or_not() {
    with_every_fault(async |scene| {
        scene.open().await;
        let disk = scene.graph.find("subject").unwrap();
        used(scene).await;
        scene.arm();
        let Some(filter) = filter_above(scene, "filter", "subject").await else { return };
        let inserted = scene.graph.permit().insert_filter(filter, disk).await;
        let inserted = scene.note("insert", inserted.map_err(|error| error.full())).is_some();
        let seen = (users(scene, "filter").len(), users(scene, "subject").len());
        let expected = if inserted { (1, 1) } else { (0, 2) };
        scene.expect(seen == expected, &format!("inserted ({inserted}): users {seen:?}"));
        used(scene).await;
        let out = if inserted { scene.graph.permit().remove_filter(filter).await } else { Ok(()) };
        let out = scene.note("take out", out.map_err(|error| error.full())).is_some();
        scene.expect(out == users(scene, "filter").is_empty(), "taken out or not");
        scene.disarm();
        if !out {
            cleared(scene, filter).await;
        }
        removed(scene, filter).await;
    });
}

/// A latched flush says so once more: a reopen lets the disk go on.
async fn cleared(scene: &mut Scene<'_>, filter: NodeId) {
    scene.reopen(&json!({})).await;
    let out = scene.graph.permit().remove_filter(filter).await;
    scene.expect(out.is_ok(), &format!("a filter cannot be taken out: {out:?}"));
}

async fn removed(scene: &mut Scene<'_>, node: NodeId) {
    let first = scene.graph.permit().remove(node).await;
    let result = if first.is_err() { scene.graph.permit().remove(node).await } else { first };
    scene.expect(result.is_ok(), &format!("a node cannot be removed: {result:?}"));
}

/// One filter takes another one's place, while both stand on the disk.
#[test]
fn a_node_is_replaced_or_not() {
    with_every_fault(async |scene| {
        scene.open().await;
        let disk = scene.graph.find("subject").unwrap();
        let (one, two) = (
            filter_above(scene, "one", "subject").await.unwrap(),
            filter_above(scene, "two", "subject").await.unwrap(),
        );
        scene.graph.permit().insert_filter(one, disk).await.unwrap_or_else(|error| panic!("{}", error.full()));
        // The other filter is not to go through the first one, but to stand beside it.
        let beside = Change::Repoint { parent: two, child: "file".into(), to: Some((disk, Role::Filtered)) };
        scene.graph.permit().transact(vec![Box::new(beside)]).await.unwrap();
        used(scene).await;
        scene.arm();
        let replaced = scene.graph.permit().replace_node(one, two).await;
        let replaced = scene.note("replace", replaced.map_err(|error| error.full())).is_some();
        scene.disarm();
        let seen = (users(scene, "one").len(), users(scene, "two").len());
        scene.expect(seen == if replaced { (0, 1) } else { (1, 0) }, &format!("replaced ({replaced}): users {seen:?}"));
        scene.read().await;
        let (used, unused) = if replaced { (two, one) } else { (one, two) };
        removed(scene, unused).await;
        cleared(scene, used).await;
        removed(scene, used).await;
    });
}

/// An overlay and its backing edge come together.
#[test]
fn an_overlay_is_appended_or_not() {
    with_every_fault(async |scene| {
        scene.open().await;
        let disk = scene.graph.find("subject").unwrap();
        used(scene).await;
        let layer = NewOverlay { size: SIZE, ..NewOverlay::above(None) };
        let (overlay, _) = layer.add(&scene.graph, "overlay").await;
        let store = scene.graph.child_node(overlay, "store").unwrap();
        scene.arm();
        let appended = scene.graph.permit().append(overlay, disk).await;
        let appended = scene.note("append", appended.map_err(|error| error.full())).is_some();
        scene.read().await;
        scene.disarm();
        let seen = (users(scene, "overlay").len(), scene.graph.child_node(overlay, "backing"));
        let expected = if appended { (1, Some(disk)) } else { (0, None) };
        scene.expect(seen == expected, &format!("appended ({appended}): {seen:?}"));
        scene.read().await;
        if appended {
            let back = scene.graph.permit().replace_node(overlay, disk).await;
            scene.expect(back.is_ok(), &format!("{back:?}"));
        }
        removed(scene, overlay).await;
        removed(scene, store).await;
    });
}

/// Two filters come, and the disk is reopened, at one moment or not at all.
#[test]
fn a_transaction_is_made_as_a_whole_or_not() {
    with_every_fault(async |scene| all_or_nothing(scene, async |permit, steps| permit.transact(steps).await).await);
}

/// The harness can fail: the same steps as commands of their own.
#[test]
fn steps_that_are_no_transaction_are_caught() {
    let one_by_one = async |permit: &mut Permit, steps: Vec<Box<dyn Step>>| {
        for step in steps {
            permit.transact(vec![step]).await?;
        }
        Ok(())
    };
    let wrong = faults::at_every_call(&plain(), async |scene| all_or_nothing(scene, one_by_one).await).unwrap_err();
    assert!(wrong.contains("done (false): (2, 0, Off)"), "{wrong}");
}

async fn all_or_nothing(
    scene: &mut Scene<'_>,
    make: impl AsyncFn(&mut Permit, Vec<Box<dyn Step>>) -> Result<(), Error>,
) {
    scene.open().await;
    let disk = scene.graph.find("subject").unwrap();
    used(scene).await;
    let one = filter_above(scene, "one", "subject").await.unwrap();
    let two = filter_above(scene, "two", "one").await.unwrap();
    let reopened = parsed(with(scene.options(), &json!({ "detect-zeroes": "on" })));
    let mut steps: Vec<Box<dyn Step>> =
        vec![Box::new(Change::Replace { from: disk, to: one }), Box::new(Change::Replace { from: one, to: two })];
    steps.extend(catalog::reopen_steps(&scene.graph, &[reopened]).await.unwrap());
    scene.arm();
    let done = make(&mut scene.graph.permit(), steps).await;
    let done = scene.note("transaction", done.map_err(|error| error.full())).is_some();
    scene.disarm();
    let zeroes = scene.graph.node(disk).unwrap().options.detect_zeroes;
    let seen = (users(scene, "one").len(), users(scene, "two").len(), zeroes);
    let expected = if done { (1, 1, DetectZeroes::On) } else { (1, 0, DetectZeroes::Off) };
    scene.expect(seen == expected, &format!("done ({done}): {seen:?}"));
    scene.read().await;
    for (filter, name) in [(two, "two"), (one, "one")] {
        if !users(scene, name).is_empty() {
            cleared(scene, filter).await;
        }
        removed(scene, filter).await;
    }
}
