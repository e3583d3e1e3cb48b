//! Internal snapshots: those that we take QEMU's programs list, read, apply and delete, and the other way round; and after
//! every step they find the image in order.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use block_core::catalog::{self, BlockdevOptions, DriverOptions};
use block_core::graph::{
    Graph, NewSnapshot, NodeId, PermSet, Perms, Preallocation, SnapshotInfo, SnapshotName, TakeSnapshot, WriteFlags,
};
use block_core::port::Port;
use block_core::rt::{Local, run_control};
use serde_json::{Value, json};

use crate::bench::{READER, add, attach, flush, parsed, range, read, with, write, writer};
use crate::peer::{KINDS, Kind, check, contents, create, file, node, run, work};
use crate::random::Random;
use crate::writing::{Model, in_memory};

const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };

/// Who writes, and bears that the disk becomes another one.
fn patient() -> Perms {
    Perms { shares: PermSet::ALL, ..writer() }
}

/// An image in use.
struct Open {
    graph: Rc<Graph>,
    node: NodeId,
    port: Port,
}

impl Open {
    async fn new(options: &Value) -> Self {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, with(options.clone(), &json!({ "node-name": "top" }))).await.unwrap();
        let port = attach(&graph, node, patient()).await.unwrap();
        Self { graph, node, port }
    }

    async fn close(self) {
        self.port.detach(&mut self.graph.permit()).await;
        self.graph.permit().remove(self.node).await.unwrap();
    }

    async fn take(&self, name: &str) -> Result<(), String> {
        let step = TakeSnapshot::step(self.node, NewSnapshot { name: name.into(), date: (1_700_000_000, 5_000_000) });
        self.graph.permit().transact(vec![step]).await.map_err(|error| error.full())
    }

    async fn delete(&self, name: &str) -> Result<SnapshotInfo, String> {
        self.graph.permit().delete_snapshot(self.node, named(name)).await.map_err(|error| error.full())
    }

    async fn apply(&self, name: &str) -> Result<SnapshotInfo, String> {
        self.graph.permit().apply_snapshot(self.node, named(name)).await.map_err(|error| error.full())
    }

    fn names(&self) -> Vec<String> {
        self.graph.snapshots(self.node).unwrap().into_iter().map(|one| one.name).collect()
    }
}

fn named(name: &str) -> SnapshotName {
    SnapshotName { id: None, name: Some(name.into()) }
}

/// What QEMU sees in a snapshot.
fn snapshot_contents(path: &str, name: &str) -> Vec<u8> {
    let raw = format!("{path}.snapshot");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "-l", name, path, &raw]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

/// The names that QEMU lists, in order.
fn listed(path: &str) -> Vec<String> {
    let said: Value = serde_json::from_str(&run("qemu-img", &["info", "-f", "qcow2", "--output=json", path])).unwrap();
    let list = said["snapshots"].as_array().cloned().unwrap_or_default();
    list.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

/// Snapshots by name, with what each of them has.
type Kept = BTreeMap<String, Vec<u8>>;

fn all_is_well(path: &str, model: &Model, kept: &Kept, what: &str) {
    check(path);
    assert!(contents(path) == model.bytes, "{what}: the disk");
    let mut names = listed(path);
    names.sort();
    assert_eq!(names, kept.keys().cloned().collect::<Vec<_>>(), "{what}");
    for (name, bytes) in kept {
        assert!(snapshot_contents(path, name) == *bytes, "{what}: snapshot '{name}'");
        assert!(seen(path, name) == *bytes, "{what}: snapshot '{name}', as we see it");
    }
}

/// What a node over a snapshot shows.
fn seen(path: &str, name: &str) -> Vec<u8> {
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = catalog::add(&mut graph.permit(), past(path, name, true)).await.unwrap();
        let port = attach(&graph, node, READER).await.unwrap();
        let (lane, size) = (port.handle().lane(&Local::current()), port.geometry().size);
        let bytes = read(&lane, range(0, size)).await.unwrap();
        drop(lane);
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
        bytes
    })
}

/// Options of a node over a snapshot, as only programs can give them.
fn past(path: &str, name: &str, read_only: bool) -> BlockdevOptions {
    let more = json!({ "node-name": "past", "read-only": read_only });
    let mut options = parsed(with(node(path, KINDS[0], None), &more));
    let DriverOptions::Qcow2(image) = &mut options.driver else { panic!("it is qcow2") };
    image.own.snapshot = Some(named(name));
    options
}

/// A snapshot has its own size, can only be read, and has to be there.
#[test]
fn a_snapshot_is_a_node_that_is_read() {
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", KINDS[0], 1 << 20, None);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1M", &path]);
    run("qemu-img", &["snapshot", "-c", "x", &path]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 6 0 1M", &path]);
    run("qemu-img", &["resize", "-q", "-f", "qcow2", &path, "3M"]);
    assert!(seen(&path, "x") == vec![5; 1 << 20]);
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let refused = catalog::add(&mut graph.permit(), past(&path, "x", false)).await.unwrap_err().full();
        assert!(refused.contains("can only be opened with 'read-only'"), "{refused}");
        let refused = catalog::add(&mut graph.permit(), past(&path, "y", true)).await.unwrap_err().full();
        assert!(refused.contains("Can't find the snapshot"), "{refused}");
        catalog::add(&mut graph.permit(), past(&path, "x", true)).await.unwrap();
        let refused = catalog::reopen(&mut graph.permit(), vec![past(&path, "x", false)]).await.unwrap_err();
        assert!(refused.full().contains("can only be opened with 'read-only'"), "{}", refused.full());
    });
    check(&path);
}

/// Nothing is written over a snapshot's L2 table, where these are watched and as long as there is the snapshot.
#[test]
fn tables_of_snapshots_are_watched() {
    let word = |bytes: &[u8], at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
    for deleted in [false, true] {
        for (check, is_seen) in [("all", true), ("cached", false)] {
            let dir = in_memory();
            let path = create(dir.path(), "top.qcow2", KINDS[0], 1 << 20, None);
            run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1M", &path]);
            run("qemu-img", &["snapshot", "-c", "x", &path]);
            run("qemu-io", &["-f", "qcow2", "-c", "write -P 6 64k 64k", &path]);
            let mut bytes = std::fs::read(&path).unwrap();
            let l2 = |l1: u64| word(&bytes, l1) & 0x00ff_ffff_ffff_fe00;
            let (active, inactive) = (l2(word(&bytes, 40)), l2(word(&bytes, word(&bytes, 64))));
            assert_ne!(active, inactive);
            // The first cluster of the disk would be that table.
            bytes[active as usize..][..8].copy_from_slice(&(inactive | 1 << 63).to_be_bytes());
            std::fs::write(&path, &bytes).unwrap();
            run_control(async |_| {
                let open = Open::new(&with(node(&path, KINDS[0], None), &json!({ "overlap-check": check }))).await;
                if deleted {
                    open.delete("x").await.unwrap();
                }
                let lane = open.port.handle().lane(&Local::current());
                let written = write(&lane, 0, &[7; 512], PLAIN).await;
                assert_eq!(written.is_err(), is_seen && !deleted, "{check}, deleted before: {deleted}");
            });
        }
    }
}

/// `false`: it came to nothing because the refcounts are too small, which may be where `few` says so.
fn went_well<T>(result: Result<T, String>, few: &str) -> bool {
    match result {
        Ok(_) => true,
        Err(refused) if !few.is_empty() && refused.contains(few) => false,
        Err(refused) => panic!("{refused}"),
    }
}

/// One of ours: a few of them in one session, with work between them.
fn ours(options: &Value, model: &mut Model, kept: &mut Kept, round: u64, few: &str) {
    run_control(async |_| {
        let open = Open::new(options).await;
        for step in 0..4 {
            let lane = open.port.handle().lane(&Local::current());
            for _ in 0..25 {
                model.step(&lane).await.unwrap();
            }
            drop(lane);
            let some = kept.keys().nth(model.random.below(kept.len().max(1) as u64) as usize).cloned();
            match (model.random.below(4), some) {
                (0, Some(name)) => {
                    open.delete(&name).await.unwrap();
                    kept.remove(&name);
                }
                (1, Some(name)) => {
                    let applied = open.apply(&name).await;
                    if went_well(applied, few) {
                        model.bytes.clone_from(&kept[&name]);
                    }
                }
                _ if kept.len() < 3 => {
                    let name = format!("ours {round}.{step}");
                    if went_well(open.take(&name).await, few) {
                        kept.insert(name, model.bytes.clone());
                    }
                }
                _ => {}
            }
            let mut names = open.names();
            names.sort();
            assert_eq!(names, kept.keys().cloned().collect::<Vec<_>>());
        }
        let lane = open.port.handle().lane(&Local::current());
        assert!(read(&lane, range(0, model.bytes.len() as u64)).await.unwrap() == model.bytes, "before it is closed");
        drop(lane);
        open.close().await;
    });
}

/// One of QEMU's.
fn theirs(path: &str, model: &mut Model, kept: &mut Kept, round: u64) {
    let some = kept.keys().nth(model.random.below(kept.len().max(1) as u64) as usize).cloned();
    match (model.random.below(3), some) {
        (0, Some(name)) => {
            run("qemu-img", &["snapshot", "-d", &name, path]);
            kept.remove(&name);
        }
        (1, Some(name)) => {
            run("qemu-img", &["snapshot", "-a", &name, path]);
            model.bytes.clone_from(&kept[&name]);
        }
        _ if kept.len() < 3 => {
            let name = format!("theirs {round}");
            run("qemu-img", &["snapshot", "-c", &name, path]);
            kept.insert(name, model.bytes.clone());
        }
        _ => {}
    }
}

fn swap(kind: Kind, seed: u64, more: &Value, rounds: u64) {
    let dir = in_memory();
    let size = if kind.cluster > 1 << 20 { (9 << 20) + 1536 } else { (2 << 20) + 512 };
    let path = create(dir.path(), "top.qcow2", kind, size, None);
    let options = with(node(&path, kind, None), more);
    let bytes = vec![0; size as usize];
    let mut model = Model { bytes, random: Random(seed), cluster: kind.cluster, compresses: true };
    let mut kept = Kept::new();
    // Clusters with much that is compressed have many references without any snapshot.
    let few = if ["=2", "=4", "=8"].iter().any(|bits| kind.options.contains(&format!("refcount_bits{bits}"))) {
        "bits end there"
    } else {
        ""
    };
    for round in 0..rounds {
        let what = format!("{}, {more}, round {round}", kind.options);
        ours(&options, &mut model, &mut kept, round, few);
        all_is_well(&path, &model, &kept, &what);
        if few.is_empty() {
            theirs(&path, &mut model, &mut kept, round);
        }
        let mut random = Random(seed + round + 1);
        work(&path, kind, size, &mut random, 8);
        model.bytes = contents(&path);
        all_is_well(&path, &model, &kept, &format!("{what}, QEMU"));
    }
}

fn can_count(kind: &&Kind) -> bool {
    !kind.external && !kind.options.contains("refcount_bits=1")
}

/// Both take, apply and delete in turns, and both write between.
#[test]
fn both_take_apply_and_delete_in_turns() {
    for (number, kind) in KINDS.iter().filter(can_count).enumerate() {
        eprintln!("{}", kind.options);
        swap(*kind, 0x7000 + number as u64, &json!({}), 5);
    }
}

#[test]
fn small_caches_are_enough() {
    let more = json!({ "l2-cache-size": 512, "refcount-cache-size": 512, "l2-cache-entry-size": 512,
        "overlap-check": "all" });
    swap(KINDS[2], 0x7100, &more, 4);
    swap(KINDS[4], 0x7101, &more, 4);
}

/// What a refcount cannot count is refused, and nothing has changed.
#[test]
fn refcounts_have_an_end() {
    for (bits, most) in [(1, 0), (2, 2), (4, 14)] {
        let dir = in_memory();
        let options = format!("compat=1.1,cluster_size=4096,refcount_bits={bits}");
        let options: &'static str = Box::leak(options.into_boxed_str());
        let kind = Kind { options, cluster: 4096, external: false };
        let path = create(dir.path(), "top.qcow2", kind, 1 << 20, None);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 300k", &path]);
        let before = contents(&path);
        run_control(async |_| {
            let open = Open::new(&node(&path, kind, None)).await;
            for number in 0..most {
                open.take(&number.to_string()).await.unwrap();
            }
            let refused = open.take("one too many").await.unwrap_err();
            assert!(refused.contains(&format!("{bits} bit")), "{refused}");
            let lane = open.port.handle().lane(&Local::current());
            write(&lane, 4096, &[9; 100], PLAIN).await.unwrap();
            drop(lane);
            open.close().await;
        });
        check(&path);
        assert_eq!(listed(&path).len(), most as usize);
        assert!(most == 0 || snapshot_contents(&path, "0") == before);
    }
}

/// What is in another file is in no snapshot, as in QEMU.
#[test]
fn a_data_file_is_refused() {
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", KINDS[13], 1 << 20, None);
    run_control(async |_| {
        let open = Open::new(&node(&path, KINDS[13], None)).await;
        let refused = open.take("x").await.unwrap_err();
        assert_eq!(refused, "Block format 'qcow2' used by device 'top' does not support internal snapshots");
        open.close().await;
    });
}

/// A snapshot has its own size; the disk gets it back. Version 2 does not say it, so the disk keeps what it has.
#[test]
fn a_disk_with_snapshots_is_resized() {
    for kind in [KINDS[0], KINDS[4], KINDS[10]] {
        let dir = in_memory();
        let path = create(dir.path(), "top.qcow2", kind, 1 << 20, None);
        run_control(async |_| {
            let mut open = Open::new(&node(&path, kind, None)).await;
            let lane = open.port.handle().lane(&Local::current());
            write(&lane, 0, &vec![1; 1 << 20], PLAIN).await.unwrap();
            drop(lane);
            open.take("one").await.unwrap();
            open.port.detach(&mut open.graph.permit()).await;
            open.graph.permit().resize(open.node, 5 << 20, Preallocation::Off).await.unwrap();
            open.port = attach(&open.graph, open.node, patient()).await.unwrap();
            let lane = open.port.handle().lane(&Local::current());
            write(&lane, 4 << 20, &vec![2; 1 << 20], PLAIN).await.unwrap();
            drop(lane);
            open.take("five").await.unwrap();
            open.port.detach(&mut open.graph.permit()).await;
            open.graph.permit().resize(open.node, 512 << 10, Preallocation::Off).await.unwrap();
            let sizes: Vec<_> =
                open.graph.snapshots(open.node).unwrap().into_iter().map(|one| one.disk_size.unwrap()).collect();
            assert_eq!(sizes, [1 << 20, 5 << 20]);
            for (name, size) in [("five", 5 << 20), ("one", 1 << 20), ("five", 5 << 20)] {
                open.graph.permit().apply_snapshot(open.node, named(name)).await.unwrap();
                assert_eq!(open.graph.node(open.node).unwrap().geometry.size, size, "{name}");
            }
            open.port = attach(&open.graph, open.node, patient()).await.unwrap();
            open.close().await;
        });
        check(&path);
        let mut five = vec![0; 5 << 20];
        five[..1 << 20].fill(1);
        five[4 << 20..].fill(2);
        assert!(contents(&path) == five);
        run("qemu-img", &["snapshot", "-a", "one", &path]);
        assert!(contents(&path) == vec![1; 1 << 20]);
        check(&path);
    }
    let dir = in_memory();
    let path = create(dir.path(), "old.qcow2", KINDS[1], 1 << 20, None);
    run("qemu-img", &["snapshot", "-c", "x", &path]);
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, with(node(&path, KINDS[1], None), &json!({ "node-name": "top" }))).await.unwrap();
        let refused = graph.permit().resize(node, 2 << 20, Preallocation::Off).await.unwrap_err();
        assert_eq!(refused.full(), "Can't resize a v2 image which has snapshots");
    });
}

/// Ids are chosen as QEMU chooses them; names of others may be the same, ours may not.
#[test]
fn names_and_ids_are_qemus() {
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", KINDS[0], 1 << 20, None);
    for _ in 0..2 {
        run("qemu-img", &["snapshot", "-c", "twice", &path]);
    }
    run_control(async |_| {
        let open = Open::new(&node(&path, KINDS[0], None)).await;
        let refused = open.take("twice").await.unwrap_err();
        assert_eq!(refused, "Snapshot with name 'twice' already exists on device 'top'");
        assert_eq!(open.take("").await.unwrap_err(), "Name is empty");
        open.take(&"x".repeat(256)).await.unwrap_err();
        open.take("thrice").await.unwrap();
        let ids: Vec<_> = open.graph.snapshots(open.node).unwrap().into_iter().map(|one| one.id).collect();
        assert_eq!(ids, ["1", "2", "3"]);
        let both = |id: &str, name: &str| SnapshotName { id: Some(id.into()), name: Some(name.into()) };
        let refused = open.graph.permit().delete_snapshot(open.node, both("2", "thrice")).await.unwrap_err();
        let text = "Snapshot with id '2' and name 'thrice' does not exist on device 'top'";
        assert_eq!(refused.full(), text);
        let gone = open.graph.permit().delete_snapshot(open.node, both("2", "twice")).await.unwrap();
        assert_eq!((gone.id.as_str(), gone.disk_size, gone.vm_state_size), ("2", Some(1 << 20), 0));
        assert_eq!(open.delete("twice").await.unwrap().id, "1");
        open.take("again").await.unwrap();
        open.close().await;
    });
    let said: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", &path])).unwrap();
    let ids: Vec<_> = said["snapshots"].as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["3", "4"]);
    let first = &said["snapshots"][0];
    assert_eq!((&first["date-sec"], &first["date-nsec"]), (&json!(1_700_000_000), &json!(5_000_000)));
    assert_eq!((first.get("icount"), &first["vm-clock-sec"]), (None, &json!(0)));
}

/// A filter passes snapshots on; and who stands on a node that another node uses is told to go to the top.
#[test]
fn snapshots_are_taken_through_filters() {
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", KINDS[0], 1 << 20, None);
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let image = with(node(&path, KINDS[0], None), &json!({ "node-name": "image" }));
        let below = add(&graph, image).await.unwrap();
        let top = add(&graph, json!({ "driver": "copy-on-read", "node-name": "top", "file": "image" })).await.unwrap();
        let new = |name: &str| NewSnapshot { name: name.into(), date: (0, 0) };
        let refused = graph.permit().transact(vec![TakeSnapshot::step(below, new("x"))]).await.unwrap_err();
        assert_eq!(refused.full(), "Need a root block node");
        graph.permit().transact(vec![TakeSnapshot::step(top, new("x"))]).await.unwrap();
        assert_eq!(graph.snapshots(top).unwrap(), graph.snapshots(below).unwrap());
        assert_eq!(graph.snapshots(top).unwrap().len(), 1);
        // Two of them at once: the first goes again.
        let both = vec![TakeSnapshot::step(top, new("y")), TakeSnapshot::step(top, new("x"))];
        graph.permit().transact(both).await.unwrap_err();
        assert_eq!(graph.snapshots(top).unwrap().len(), 1);
        let both = vec![TakeSnapshot::step(top, new("y")), TakeSnapshot::step(top, new("z"))];
        graph.permit().transact(both).await.unwrap();
        graph.permit().remove(top).await.unwrap();
        graph.permit().remove(below).await.unwrap();
    });
    assert_eq!(listed(&path), ["x", "y", "z"]);
    check(&path);
}

/// Nobody takes a snapshot of what may not be written, and none whose disk has dirty bitmaps is applied.
#[test]
fn what_may_not_be_done_is_refused() {
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", KINDS[0], 1 << 20, None);
    run("qemu-img", &["snapshot", "-c", "x", &path]);
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let options = with(node(&path, KINDS[0], None), &json!({ "node-name": "top", "read-only": true }));
        let top = add(&graph, options).await.unwrap();
        let step = TakeSnapshot::step(top, NewSnapshot { name: "y".into(), date: (0, 0) });
        let refused = graph.permit().transact(vec![step]).await.unwrap_err();
        assert_eq!(refused.full(), "Device 'top' is read only");
        graph.permit().delete_snapshot(top, named("x")).await.unwrap_err();
        let raw = json!({ "driver": "raw", "node-name": "raw", "file": file(&path) });
        graph.permit().remove(top).await.unwrap();
        let raw = add(&graph, raw).await.unwrap();
        let step = TakeSnapshot::step(raw, NewSnapshot { name: "y".into(), date: (0, 0) });
        let refused = graph.permit().transact(vec![step]).await.unwrap_err();
        assert_eq!(refused.full(), "Block format 'raw' used by device 'raw' does not support internal snapshots");
        graph.permit().remove(raw).await.unwrap();
    });
}

/// Figures for `docs/performance.md`: an image with 10^4 clusters.
#[test]
#[ignore = "prints figures, which mean something on an idle machine only"]
fn how_long_it_takes() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [KINDS[0], KINDS[5], KINDS[10]] {
        let size = 10_000 * kind.cluster;
        let path = create(dir.path(), "top.qcow2", kind, size, None);
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &format!("{},preallocation=metadata", kind.options),
                &path,
                &size.to_string(),
            ],
        );
        run_control(async |_| {
            let open = Open::new(&node(&path, kind, None)).await;
            let timed = |what: &str, begun: Instant| eprintln!("{}: {what} {:?}", kind.options, begun.elapsed());
            let begun = Instant::now();
            open.take("x").await.unwrap();
            timed("taken", begun);
            let begun = Instant::now();
            open.apply("x").await.unwrap();
            timed("applied", begun);
            let begun = Instant::now();
            open.delete("x").await.unwrap();
            timed("deleted", begun);
            let lane = open.port.handle().lane(&Local::current());
            flush(&lane).await.unwrap();
            drop(lane);
            open.close().await;
        });
        check(&path);
    }
}
