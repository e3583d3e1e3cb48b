//! Dirty bitmaps in images: what QEMU's programs store is found, what is stored they find, and what may say too little is
//! never believed.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block_core::catalog;
use block_core::graph::{BitmapAction, BitmapChange, Change, Graph, NodeId, Preallocation, Repair, WriteFlags};
use block_core::rt::{Local, run_control};
use serde_json::{Value, json};

use crate::bench::{add, attach, parsed, reopen, with, write, writer};
use crate::peer::{KINDS, Kind, check, create, node, run};

const SIZE: u64 = (3 << 20) + 512;

/// Kinds of image that can have bitmaps: those of version 3.
fn kinds() -> impl Iterator<Item = Kind> {
    KINDS.iter().copied().filter(|kind| !kind.options.contains("0.10"))
}

fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// What QEMU says of the bitmaps in an image: names, granularities and flags.
fn listed(path: &str) -> Vec<(String, u64, Vec<String>)> {
    let said: Value = serde_json::from_str(&run("qemu-img", &["info", "-f", "qcow2", "--output=json", path])).unwrap();
    let all = said["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let flags = |one: &Value| one["flags"].as_array().unwrap().iter().map(text).collect();
    all.iter().map(|one| (text(&one["name"]), one["granularity"].as_u64().unwrap(), flags(one))).collect()
}

/// Which parts of the disk QEMU's NBD server says are dirty, as runs of bytes.
fn dirty(path: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let socket = format!("{path}.{bitmap}.sock");
    let mut server = Command::new("timeout")
        .args(["60", "qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap, "-k", &socket, path])
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !Path::new(&socket).exists() {
        assert!(begun.elapsed() < Duration::from_secs(30), "qemu-nbd has no socket");
        std::thread::yield_now();
    }
    let options = format!("driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}");
    let said = run("qemu-img", &["map", "--output=json", "--image-opts", &options]);
    let runs: Vec<Value> = serde_json::from_str(&said).unwrap();
    // Where the map says that there is no data, there are marks.
    let marked = runs.iter().filter(|one| one["data"] == false);
    let mut all: Vec<(u64, u64)> = Vec::new();
    for one in marked {
        let (start, len) = (one["start"].as_u64().unwrap(), one["length"].as_u64().unwrap());
        match all.last_mut() {
            Some(last) if last.1 == start => last.1 += len,
            _ => all.push((start, start + len)),
        }
    }
    // It ends with its client, and removes its socket.
    assert!(server.wait().unwrap().success());
    all
}

/// A node over an image, and what it does.
async fn opened(path: &str, kind: Kind, more: &Value) -> Result<(Rc<Graph>, NodeId), String> {
    let graph = Graph::new(Arc::new(|_| ()));
    let options = with(with(node(path, kind, None), &json!({ "node-name": "top" })), more);
    let node = add(&graph, options).await?;
    Ok((graph, node))
}

async fn change(graph: &Rc<Graph>, node: NodeId, name: &str, what: BitmapAction) -> Result<(), String> {
    let step = BitmapChange { node, name: name.into(), what };
    graph.permit().transact(vec![Box::new(step)]).await.map_err(|error| error.full())
}

fn new(granularity: u32, recording: bool) -> BitmapAction {
    BitmapAction::Add { granularity: Some(granularity), recording, persistent: true }
}

async fn written(graph: &Rc<Graph>, node: NodeId, places: &[(u64, u64)]) {
    let port = attach(graph, node, writer()).await.unwrap();
    let lane = port.handle().lane(&Local::current());
    for (start, end) in places {
        write(&lane, *start, &vec![7; (end - start) as usize], WriteFlags::default()).await.unwrap();
    }
    drop(lane);
    port.detach(&mut graph.permit()).await;
}

/// Names, whether they record, whether they are inconsistent, and runs of marks.
type Seen = Vec<(String, bool, bool, Vec<(u64, u64)>)>;

fn seen(graph: &Rc<Graph>, node: NodeId) -> Seen {
    let all = graph.node(node).unwrap().bitmaps;
    assert!(all.iter().all(|bitmap| bitmap.persistent));
    let runs = |bits: &block_core::bitmap::Bitmap| bits.dirty().map(|run| (run.start(), run.end())).collect();
    all.iter().map(|one| (one.name.clone(), one.recording, one.inconsistent, runs(&one.bits))).collect()
}

async fn closed(graph: Rc<Graph>, node: NodeId) {
    graph.permit().remove(node).await.map_err(|error| error.full()).unwrap();
}

#[test]
fn what_is_stored_is_what_qemu_finds() {
    for kind in kinds() {
        let dir = in_memory();
        let path = create(dir.path(), "top.qcow2", kind, SIZE, None);
        run_control(async |_| {
            let (graph, node) = opened(&path, kind, &json!({})).await.unwrap();
            change(&graph, node, "fine", new(512, true)).await.unwrap();
            change(&graph, node, "off", new(65536, false)).await.unwrap();
            written(&graph, node, &[(1024, 1536), (1 << 20, (1 << 20) + 100_000)]).await;
            closed(graph, node).await;
        });
        check(&path);
        let auto = vec!["auto".to_owned()];
        assert_eq!(listed(&path), [("fine".into(), 512, auto), ("off".into(), 65536, vec![])], "{}", kind.options);
        if !kind.external {
            let fine = [(1024, 1536), (1 << 20, (1 << 20) + 100_352)];
            assert_eq!(dirty(&path, "fine"), fine, "{}", kind.options);
        }
        run_control(async |_| {
            let (graph, node) = opened(&path, kind, &json!({})).await.unwrap();
            let fine = vec![(1024, 1536), (1 << 20, (1 << 20) + 100_352)];
            let expected = [("off".into(), false, false, vec![]), ("fine".into(), true, false, fine)];
            assert_eq!(seen(&graph, node), expected, "{}", kind.options);
            // All of it, so that whole clusters of the bitmap are dirty; and nothing of the other.
            written(&graph, node, &[(0, SIZE)]).await;
            change(&graph, node, "off", BitmapAction::Enable).await.unwrap();
            closed(graph, node).await;
            check(&path);
            let (graph, node) = opened(&path, kind, &json!({})).await.unwrap();
            let expected = [("off".into(), true, false, vec![]), ("fine".into(), true, false, vec![(0, SIZE)])];
            assert_eq!(seen(&graph, node), expected, "{}", kind.options);
            change(&graph, node, "fine", BitmapAction::Remove).await.unwrap();
            change(&graph, node, "off", BitmapAction::Remove).await.unwrap();
            closed(graph, node).await;
        });
        check(&path);
        assert!(listed(&path).is_empty());
    }
}

#[test]
fn what_qemu_stores_is_found_and_kept() {
    for kind in kinds().filter(|kind| !kind.external) {
        let dir = in_memory();
        let path = create(dir.path(), "top.qcow2", kind, SIZE, None);
        run("qemu-img", &["bitmap", "--add", "-g", "512", &path, "one"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write 5k 3k", "-c", "write 1M 64k", &path]);
        run("qemu-img", &["bitmap", "--disable", &path, "one"]);
        run("qemu-img", &["bitmap", "--add", "-g", "64k", &path, "two"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write 2M 512", &path]);
        run("qemu-img", &["bitmap", "--add", "--disable", &path, "sum"]);
        run("qemu-img", &["bitmap", "--merge", "one", "--merge", "two", &path, "sum"]);
        let before = listed(&path);
        let (one, two) = (vec![(5 << 10, 8 << 10), (1 << 20, (1 << 20) + 65536)], vec![(2 << 20, (2 << 20) + 65536)]);
        run_control(async |_| {
            let bytes = std::fs::read(&path).unwrap();
            let (graph, node) = opened(&path, kind, &json!({ "read-only": true })).await.unwrap();
            let found = seen(&graph, node);
            let [(_, false, false, sum), (_, true, false, second), (_, false, false, first)] = &found[..] else {
                panic!("{found:?}")
            };
            assert_eq!((first, second), (&one, &two));
            assert!(sum.iter().map(|(start, end)| end - start).sum::<u64>() >= 3072 + 2 * 65536, "{sum:?}");
            let refused = change(&graph, node, "two", BitmapAction::Clear).await.unwrap_err();
            assert!(refused.contains("Bitmap 'two' is readonly and cannot be modified"), "{refused}");
            let refused = change(&graph, node, "new", new(512, true)).await.unwrap_err();
            assert!(refused.contains("Can't store persistent bitmaps to top"), "{refused}");
            closed(graph, node).await;
            assert!(std::fs::read(&path).unwrap() == bytes, "who only reads changes nothing");
            let (graph, node) = opened(&path, kind, &json!({})).await.unwrap();
            closed(graph, node).await;
            assert!(std::fs::read(&path).unwrap() == bytes, "who does not write changes nothing");
            // Closed, reopened and written, in all orders.
            let (graph, top) = opened(&path, kind, &json!({ "read-only": true })).await.unwrap();
            let options = with(crate::peer::node(&path, kind, None), &json!({ "node-name": "top" }));
            reopen(&graph, std::slice::from_ref(&options)).await.unwrap();
            written(&graph, top, &[(0, 512)]).await;
            reopen(&graph, &[with(options.clone(), &json!({ "read-only": true }))]).await.unwrap();
            assert_eq!(listed(&path), before, "they are in good order as soon as nobody can write");
            reopen(&graph, &[options]).await.unwrap();
            written(&graph, top, &[(131_072, 131_584)]).await;
            closed(graph, top).await;
        });
        check(&path);
        assert_eq!(listed(&path), before);
        assert_eq!(dirty(&path, "two"), [(0, 65536), (131_072, 196_608), (2 << 20, (2 << 20) + 65536)]);
        assert_eq!(dirty(&path, "one"), one);
    }
}

/// Whoever dies with an image open leaves bitmaps that nobody believes, and that can only be removed.
#[test]
fn after_a_crash_a_bitmap_is_not_believed() {
    let kind = KINDS[0];
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", kind, SIZE, None);
    let copy = dir.path().join("copy.qcow2").to_str().unwrap().to_owned();
    run("qemu-img", &["bitmap", "--add", &path, "one"]);
    run("qemu-img", &["bitmap", "--add", "--disable", &path, "two"]);
    let flags = |path: &str| listed(path).into_iter().map(|(_, _, flags)| flags.join(" ")).collect::<Vec<_>>();
    run_control(async |_| {
        let (graph, node) = opened(&path, kind, &json!({})).await.unwrap();
        std::fs::copy(&path, &copy).unwrap();
        assert_eq!(flags(&copy), ["auto", ""], "nothing was written: all are true");
        written(&graph, node, &[(0, 512)]).await;
        std::fs::copy(&path, &copy).unwrap();
        assert_eq!(flags(&copy), ["in-use auto", "in-use"]);
        closed(graph, node).await;
        assert_eq!(flags(&path), ["auto", ""]);
        // A change of marks without any write is as bad.
        for (what, name) in
            [(BitmapAction::Clear, "one"), (BitmapAction::Enable, "two"), (BitmapAction::Merge(Vec::new()), "two")]
        {
            let (graph, node) = opened(&path, kind, &json!({})).await.unwrap();
            change(&graph, node, name, what).await.unwrap();
            std::fs::copy(&path, &copy).unwrap();
            assert!(flags(&copy).iter().all(|flags| flags.contains("in-use")));
            closed(graph, node).await;
        }
        let (graph, node) = opened(&copy, kind, &json!({})).await.unwrap();
        let expected = [("two".into(), false, true, vec![]), ("one".into(), false, true, vec![])];
        assert_eq!(seen(&graph, node), expected);
        for what in [BitmapAction::Clear, BitmapAction::Enable, BitmapAction::Disable, BitmapAction::Merge(vec![])] {
            let refused = change(&graph, node, "one", what).await.unwrap_err();
            assert!(refused.contains("Bitmap 'one' is inconsistent and cannot be used"), "{refused}");
        }
        change(&graph, node, "sum", new(65536, true)).await.unwrap();
        let merged = change(&graph, node, "sum", BitmapAction::Merge(vec![(node, "one".into())])).await;
        assert!(merged.unwrap_err().contains("inconsistent"));
        let refused = graph.permit().resize(node, 2 * SIZE, Preallocation::Off).await.unwrap_err().full();
        assert!(refused.contains("inconsistent"), "{refused}");
        change(&graph, node, "one", BitmapAction::Remove).await.unwrap();
        closed(graph, node).await;
        assert_eq!(flags(&copy), ["in-use auto", "auto"], "the one that is left stays as it is");
        let (graph, node) = opened(&copy, kind, &json!({})).await.unwrap();
        change(&graph, node, "two", BitmapAction::Remove).await.unwrap();
        graph.permit().resize(node, 2 * SIZE, Preallocation::Off).await.unwrap();
        written(&graph, node, &[(SIZE, SIZE + 512)]).await;
        closed(graph, node).await;
    });
    check(&copy);
    assert_eq!(dirty(&copy, "sum").last().unwrap().1, (SIZE + 512).next_multiple_of(65536));
}

/// A program that knows no bitmaps has written to the image: it says so by clearing a bit, and there are no bitmaps.
#[test]
fn bitmaps_that_the_image_does_not_vouch_for_are_none() {
    let kind = KINDS[0];
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", kind, SIZE, None);
    run("qemu-img", &["bitmap", "--add", &path, "one"]);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[95] &= !1;
    std::fs::write(&path, bytes).unwrap();
    run_control(async |_| {
        let (graph, node) = opened(&path, kind, &json!({})).await.unwrap();
        assert!(seen(&graph, node).is_empty());
        written(&graph, node, &[(0, 512)]).await;
        change(&graph, node, "two", new(512, true)).await.unwrap();
        closed(graph, node).await;
        assert_eq!(listed(&path), [("two".into(), 512, vec!["auto".into()])]);
        // What the old ones had leaks.
        let (graph, node) = opened(&path, kind, &json!({})).await.unwrap();
        let report = graph.permit().check(node, Repair::Leaks).await.unwrap();
        assert!(report.leaks_fixed > 0 && report.is_consistent(), "{report:?}");
        assert_eq!(seen(&graph, node).len(), 1);
        closed(graph, node).await;
    });
    check(&path);
}

#[test]
fn what_cannot_be_stored_is_refused() {
    let dir = in_memory();
    let old = create(dir.path(), "old.qcow2", KINDS[1], SIZE, None);
    let base = dir.path().join("b".repeat(240)).to_str().unwrap().to_owned();
    std::fs::write(&base, vec![0; SIZE as usize]).unwrap();
    let narrow = create(dir.path(), "narrow.qcow2", KINDS[3], SIZE, Some((&base, "raw")));
    let path = create(dir.path(), "top.qcow2", KINDS[0], SIZE, None);
    run_control(async |_| {
        let (graph, node) = opened(&old, KINDS[1], &json!({})).await.unwrap();
        let refused = change(&graph, node, "a", new(512, true)).await.unwrap_err();
        assert!(
            refused.contains("Can't make bitmap 'a' persistent in 'top': Cannot store dirty bitmaps in qcow2 v2 files")
        );
        closed(graph, node).await;
        let (graph, node) = opened(&narrow, KINDS[3], &json!({})).await.unwrap();
        let refused = change(&graph, node, "a", new(512, true)).await.unwrap_err();
        assert!(refused.contains("has no room"), "{refused}");
        assert!(seen(&graph, node).is_empty());
        closed(graph, node).await;
        let (graph, node) = opened(&path, KINDS[0], &json!({})).await.unwrap();
        change(&graph, node, &"a".repeat(1024), new(512, true)).await.unwrap_err();
        change(&graph, node, "a", new(256, true)).await.unwrap_err();
        change(&graph, node, &"n".repeat(1023), new(1 << 31, true)).await.unwrap();
        assert!(change(&graph, node, &"n".repeat(1023), new(512, true)).await.unwrap_err().contains("already exists"));
        closed(graph, node).await;
    });
    check(&path);
    assert_eq!(listed(&path), [("n".repeat(1023), 1 << 31, vec!["auto".into()])]);
}

/// A bitmap is changed and an overlay comes above its node in one transaction: the image gets what the bitmap is then.
#[test]
fn a_change_beside_an_overlay_is_stored() {
    let kind = KINDS[0];
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", kind, SIZE, None);
    let over = create(dir.path(), "over.qcow2", kind, SIZE, None);
    run_control(async |_| {
        let (graph, node) = opened(&path, kind, &json!({})).await.unwrap();
        change(&graph, node, "some", new(65536, true)).await.unwrap();
        written(&graph, node, &[(0, 65536)]).await;
        change(&graph, node, "sum", new(65536, false)).await.unwrap();
        // Somebody writes, so that the overlay takes over from a node that is written.
        let port = attach(&graph, node, writer()).await.unwrap();
        let options = with(crate::peer::node(&over, kind, None), &json!({ "node-name": "over" }));
        let mut options = options.as_object().unwrap().clone();
        options.remove("backing");
        let overlay = add(&graph, Value::Object(options)).await.unwrap();
        let merge = BitmapAction::Merge(vec![(node, "some".into())]);
        let mut steps = Change::append(overlay, node);
        steps.push(Box::new(BitmapChange { node, name: "sum".into(), what: merge }));
        graph.permit().transact(steps).await.map_err(|error| error.full()).unwrap();
        port.detach(&mut graph.permit()).await;
        closed(graph.clone(), overlay).await;
        closed(graph, node).await;
    });
    assert_eq!(dirty(&path, "sum"), [(0, 65536)]);
}

/// What a reopen leaves in the image would not be what the bitmap is afterwards.
#[test]
fn a_change_beside_a_reopen_is_refused() {
    let kind = KINDS[0];
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", kind, SIZE, None);
    run_control(async |_| {
        let (graph, node) = opened(&path, kind, &json!({})).await.unwrap();
        change(&graph, node, "kept", new(65536, true)).await.unwrap();
        let again = with(crate::peer::node(&path, kind, None), &json!({ "node-name": "top", "read-only": true }));
        for what in [BitmapAction::Clear, BitmapAction::Disable, BitmapAction::Remove] {
            let mut steps = catalog::reopen_steps(&graph, &[parsed(again.clone())]).await.unwrap();
            steps.push(Box::new(BitmapChange { node, name: "kept".into(), what }));
            let refused = graph.permit().transact(steps).await.unwrap_err().full();
            assert!(refused.contains("cannot be reopened in one transaction"), "{refused}");
        }
        reopen(&graph, &[again]).await.unwrap();
        closed(graph, node).await;
    });
    assert_eq!(listed(&path), [("kept".into(), 65536, vec!["auto".to_owned()])]);
}

/// An image whose bitmaps were larger than what is loaded could not be opened any more.
#[test]
fn a_disk_does_not_outgrow_its_bitmaps() {
    const SMALL: u64 = 1 << 30;
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", KINDS[0], SMALL, None);
    run_control(async |_| {
        let (graph, node) = opened(&path, KINDS[0], &json!({})).await.unwrap();
        for name in ["a", "b", "c"] {
            change(&graph, node, name, new(512, true)).await.unwrap();
        }
        written(&graph, node, &[(0, 65536)]).await;
        let size = 1900 << 30;
        let refused = graph.permit().resize(node, size, Preallocation::Off).await.unwrap_err().full();
        assert!(refused.contains("The bitmaps of 'top' cannot have a disk of 2040109465600 bytes"), "{refused}");
        assert!(refused.contains("The bitmaps of the image would have more than 1073741824 bytes"), "{refused}");
        assert_eq!(graph.node(node).unwrap().geometry.size, SMALL);
        graph.permit().resize(node, 600 << 30, Preallocation::Off).await.unwrap();
        change(&graph, node, "c", BitmapAction::Remove).await.unwrap();
        graph.permit().resize(node, 1000 << 30, Preallocation::Off).await.unwrap();
        closed(graph, node).await;
        let (graph, node) = opened(&path, KINDS[0], &json!({})).await.unwrap();
        let all = seen(&graph, node);
        assert_eq!(all.len(), 2);
        assert!(all.iter().all(|(_, recording, wrong, runs)| *recording && !wrong && runs == &[(0, 65536)]), "{all:?}");
        closed(graph, node).await;
    });
    check(&path);
}
