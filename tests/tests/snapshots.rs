//! Snapshots below a guest's disk: images made by `blockdev-create` and `blockdev-snapshot-sync`, put above nodes that are
//! written meanwhile, and what QEMU's programs say of the chain that is left.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use trellis_tests::qmp::Qmp;
use trellis_tests::scene::OK_WRITE;
use trellis_tests::server::Server;
use trellis_tests::vhost_user::client::{Client, Setup};
use trellis_tests::vhost_user::wire::pause;

struct Scene {
    qmp: Qmp,
    folder: tempfile::TempDir,
    server: Server,
}

const MIB: usize = 1 << 20;

impl Scene {
    /// A raw disk of 1 MiB of sevens.
    fn new(start: impl FnOnce(&std::path::Path, &[&str]) -> Server) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = start(folder.path(), &[]);
        let mut scene = Self { qmp: server.qmp(), folder, server };
        std::fs::write(scene.path("base.raw"), vec![7; MIB]).unwrap();
        let file = json!({ "driver": "file", "filename": scene.path("base.raw") });
        scene.ok("blockdev-add", &json!({ "driver": "raw", "node-name": "base", "file": file }));
        scene
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn ok(&mut self, command: &str, arguments: &Value) -> Value {
        self.qmp.execute(command, arguments)
    }

    fn refused(&mut self, command: &str, arguments: &Value) -> String {
        self.qmp.try_execute(command, arguments).unwrap_err().desc
    }

    fn export(&mut self, node: &str) {
        let addr = json!({ "type": "unix", "path": self.path("x.sock") });
        let options = json!({ "type": "vhost-user-blk", "id": "x", "node-name": node, "writable": true, "addr": addr });
        self.ok("block-export-add", &options);
    }

    fn unexport(&mut self) {
        self.ok("block-export-del", &json!({ "id": "x" }));
        self.qmp.event("BLOCK_EXPORT_DELETED");
    }

    /// Makes a qcow2 image of `size` bytes and opens it without a backing node.
    fn overlay(&mut self, name: &str, size: usize) {
        let path = self.path(&format!("{name}.qcow2"));
        let file = json!({ "driver": "file", "filename": path, "size": 0 });
        self.create(&format!("{name}-file"), &file);
        let image = json!({ "driver": "qcow2", "size": size, "file": { "driver": "file", "filename": path } });
        self.create(&format!("{name}-image"), &image);
        let options = json!({ "driver": "qcow2", "node-name": name, "file": image["file"], "backing": null });
        self.ok("blockdev-add", &options);
    }

    fn create(&mut self, job: &str, options: &Value) {
        self.ok("blockdev-create", &json!({ "job-id": job, "options": options }));
        loop {
            let event = self.qmp.event("JOB_STATUS_CHANGE");
            if event["status"] == "concluded" {
                break;
            }
        }
        let jobs = self.ok("query-jobs", &json!({}));
        assert!(jobs[0].get("error").is_none(), "{jobs}");
        self.ok("job-dismiss", &json!({ "id": job }));
        self.qmp.event("JOB_STATUS_CHANGE");
    }

    /// What a node reads, through an export that is made for this.
    fn sync(&self, node: &str, file: &str, overlay: &str) -> Value {
        json!({ "node-name": node, "snapshot-file": self.path(file), "snapshot-node-name": overlay })
    }
}

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img is installed");
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_snapshot_is_taken_below_an_export_and_is_a_chain_for_qemu() {
    let mut scene = Scene::new(Server::start);
    scene.export("base");
    let sync = scene.sync("base", "one.qcow2", "one");
    scene.ok("blockdev-snapshot-sync", &sync);
    let sync = scene.sync("one", "two.qcow2", "two");
    scene.ok("blockdev-snapshot-sync", &sync);
    scene.unexport();
    // From the top: what stands on it goes first.
    for node in ["two", "one", "base"] {
        scene.ok("blockdev-del", &json!({ "node-name": node }));
    }
    let chain: Value =
        serde_json::from_str(&qemu_img(&["info", "--backing-chain", "--output=json", &scene.path("two.qcow2")]))
            .unwrap();
    let names: Vec<_> = chain.as_array().unwrap().iter().map(|image| image["filename"].clone()).collect();
    assert_eq!(names, ["two.qcow2", "one.qcow2", "base.raw"].map(|name| json!(scene.path(name))));
    assert_eq!(chain[0]["backing-filename-format"], "qcow2");
    assert_eq!(chain[1]["backing-filename-format"], "raw");
    qemu_img(&["check", &scene.path("two.qcow2")]);
    qemu_img(&["convert", "-O", "raw", &scene.path("two.qcow2"), &scene.path("all.raw")]);
    assert_eq!(std::fs::read(scene.path("all.raw")).unwrap(), vec![7; MIB]);
}

#[test]
fn what_cannot_be_a_snapshot_is_refused_as_qemu_refuses_it() {
    let answers = [Scene::new(Server::start), Scene::new(Server::start_peer)].map(|mut scene| {
        scene.overlay("one", MIB);
        scene.overlay("two", MIB);
        scene.ok("blockdev-add", &json!({ "driver": "null-co", "node-name": "null", "size": MIB }));
        let snapshot = |node: &str, overlay: &str| json!({ "node": node, "overlay": overlay });
        let mut answers = Vec::new();
        for (node, overlay) in [("nobody", "one"), ("base", "nobody"), ("base", "null"), ("base", "base")] {
            answers.push(scene.refused("blockdev-snapshot", &snapshot(node, overlay)));
        }
        scene.ok("blockdev-snapshot", &snapshot("base", "one"));
        for (node, overlay) in [("base", "one"), ("one", "one"), ("base", "two")] {
            answers.push(scene.refused("blockdev-snapshot", &snapshot(node, overlay)));
        }
        let busy = scene.sync("base", "three.qcow2", "three");
        answers.push(scene.refused("blockdev-snapshot-sync", &busy));
        let taken = scene.sync("one", "three.qcow2", "two");
        answers.push(scene.refused("blockdev-snapshot-sync", &taken));
        for format in ["raw", "bogus"] {
            let mut other = scene.sync("one", "three.img", "three");
            other["format"] = json!(format);
            answers.push(scene.refused("blockdev-snapshot-sync", &other));
        }
        let missing = scene.sync("one", "no/folder.qcow2", "three");
        let folder = scene.folder.path().to_str().unwrap().to_owned();
        answers.push(scene.refused("blockdev-snapshot-sync", &missing).replace(&folder, "FOLDER"));
        answers.push(scene.refused("blockdev-snapshot-sync", &json!({ "snapshot-file": "x" })));
        let mut device = scene.sync("one", "three.qcow2", "three");
        let name = device.as_object_mut().unwrap().remove("node-name").unwrap();
        device["device"] = name;
        answers.push(scene.refused("blockdev-snapshot-sync", &device));
        assert!(!std::fs::exists(scene.path("three.qcow2")).unwrap());
        answers
    });
    let [ours, theirs] = answers;
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
}

/// A transaction that fails leaves no overlay and no image that it made.
#[test]
fn a_transaction_that_fails_leaves_no_image() {
    let mut scene = Scene::new(Server::start);
    scene.export("base");
    let sync = scene.sync("base", "one.qcow2", "one");
    let actions = json!([{ "type": "blockdev-snapshot-sync", "data": sync }, { "type": "abort", "data": {} }]);
    let refused = scene.refused("transaction", &json!({ "actions": actions }));
    assert_eq!(refused, "Transaction aborted using Abort action");
    assert!(!std::fs::exists(scene.path("one.qcow2")).unwrap());
    let nodes = scene.ok("query-named-block-nodes", &json!({}));
    let names: Vec<_> = nodes.as_array().unwrap().iter().filter_map(|node| node["node-name"].as_str()).collect();
    assert!(!names.contains(&"one"), "{names:?}");
    // The same without the abort.
    let actions = json!([{ "type": "blockdev-snapshot-sync", "data": sync }]);
    scene.ok("transaction", &json!({ "actions": actions }));
    scene.unexport();
    scene.ok("blockdev-del", &json!({ "node-name": "one" }));
    qemu_img(&["check", &scene.path("one.qcow2")]);
}

/// A transaction that takes its time and then fails, while `other` goes on until it is told to stop. What it is refused with.
fn refused_transaction_beside(scene: &mut Scene, other: impl FnOnce(&mut Qmp, &AtomicBool) + Send) -> String {
    let mut actions = vec![json!({ "type": "blockdev-snapshot-sync", "data": scene.sync("base", "one.qcow2", "one") })];
    actions.extend((0..10_000).map(|number| {
        let data = json!({ "node": "base", "name": format!("b{number}") });
        json!({ "type": "block-dirty-bitmap-add", "data": data })
    }));
    actions.push(json!({ "type": "abort", "data": {} }));
    let (mut second, over) = (scene.server.qmp(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| other(&mut second, &over));
        let refused = scene.refused("transaction", &json!({ "actions": actions }));
        over.store(true, Ordering::Relaxed);
        refused
    })
}

/// Others come between the actions of a transaction, and know the overlay that it has made by its name. The image is
/// unlinked where the transaction fails, so nobody may be using it.
#[test]
fn nobody_uses_an_overlay_before_its_transaction_is_done() {
    let mut scene = Scene::new(Server::start);
    let addr = json!({ "type": "unix", "path": scene.path("x.sock") });
    let export = json!({ "type": "vhost-user-blk", "id": "x", "node-name": "one", "writable": true, "addr": addr });
    let above = json!({ "driver": "raw", "node-name": "above", "file": "one" });
    let other_base = json!({ "driver": "null-co", "node-name": "null", "size": MIB });
    scene.ok("blockdev-add", &other_base);
    let own = json!({ "node": "null", "overlay": "one" });
    let uses = [("block-export-add", export), ("blockdev-add", above), ("blockdev-snapshot", own)];
    for (command, arguments) in uses {
        let mut busy = false;
        refused_transaction_beside(&mut scene, |second, over| {
            while !over.load(Ordering::Relaxed) {
                let refused = second.try_execute(command, &arguments).expect_err(command).desc;
                busy |= refused == "Node 'one' is busy: it is being made the overlay of another node"
                    || refused == "The overlay is already in use";
            }
        });
        assert!(busy, "{command} did not come in between");
        assert!(!std::fs::exists(scene.path("one.qcow2")).unwrap(), "{command}");
        let nodes = scene.ok("query-named-block-nodes", &json!({ "flat": true }));
        assert!(nodes.as_array().unwrap().iter().all(|node| node["node-name"] != "one"), "{command}: {nodes}");
    }
    // Once it is done, anybody may.
    let sync = scene.sync("base", "one.qcow2", "one");
    scene.ok("blockdev-snapshot-sync", &sync);
    scene.export("one");
    scene.unexport();
}

/// Whoever has taken an overlay from its transaction may have its image open under another name.
#[test]
fn the_image_of_an_overlay_that_somebody_took_away_is_left_alone() {
    let mut scene = Scene::new(Server::start);
    let file = json!({ "driver": "file", "filename": scene.path("one.qcow2") });
    let mine = json!({ "driver": "qcow2", "node-name": "mine", "file": file, "backing": null });
    let refused = refused_transaction_beside(&mut scene, |second, over| {
        let taken = json!({ "node-name": "one" });
        while second.try_execute("blockdev-del", &taken).is_err() {
            assert!(!over.load(Ordering::Relaxed), "the transaction was over too soon");
        }
        second.execute("blockdev-add", &mine);
    });
    assert_eq!(refused, "There is no such node");
    assert!(std::fs::exists(scene.path("one.qcow2")).unwrap());
    scene.export("mine");
    scene.unexport();
    scene.ok("blockdev-del", &json!({ "node-name": "mine" }));
    qemu_img(&["info", &scene.path("one.qcow2")]);
}

/// The image of a snapshot is not made over an image in use, under whatever name; and no overlay stands on two nodes.
#[test]
fn what_is_in_use_is_left_alone() {
    let mut scene = Scene::new(Server::start);
    scene.overlay("one", MIB);
    std::fs::hard_link(scene.path("base.raw"), scene.path("other-name")).unwrap();
    std::os::unix::fs::symlink(scene.path("base.raw"), scene.path("link")).unwrap();
    for file in ["base.raw", "other-name", "link"] {
        let sync = scene.sync("base", file, "new");
        let refused = scene.refused("blockdev-snapshot-sync", &sync);
        // The node that has it open was defined in place: its name tells nobody anything.
        assert!(refused.starts_with("Failed to get \"write\" lock: Is another process using the image ["), "{refused}");
    }
    assert_eq!(std::fs::read(scene.path("base.raw")).unwrap(), vec![7; MIB]);
    let file = json!({ "driver": "null-co", "size": MIB });
    scene.ok("blockdev-add", &json!({ "driver": "raw", "node-name": "second", "file": file }));
    let snapshot = |node: &str, overlay: &str| json!({ "type": "blockdev-snapshot", "data": { "node": node, "overlay": overlay } });
    let twice = json!({ "actions": [snapshot("base", "one"), snapshot("second", "one")] });
    let refused = scene.refused("transaction", &twice);
    assert_eq!(refused, "The overlay already has a backing image");
    scene.overlay("two", MIB);
    let one_base = json!({ "actions": [snapshot("base", "one"), snapshot("base", "two")] });
    let refused = scene.refused("transaction", &one_base);
    assert_eq!(refused, "Node 'base' is busy: node is used as backing hd of 'one'");
    scene.ok("blockdev-snapshot", &json!({ "node": "base", "overlay": "one" }));
}

/// Images as `blockdev-create` makes them, and as QEMU sees them.
#[test]
fn images_are_made_with_every_option() {
    let mut scene = Scene::new(Server::start);
    let cases = [
        json!({}),
        json!({ "version": "v2", "cluster-size": 4096 }),
        json!({ "extended-l2": true, "cluster-size": 131_072, "lazy-refcounts": true }),
        json!({ "refcount-bits": 1, "compression-type": "zstd" }),
        json!({ "refcount-bits": 64, "cluster-size": 512 }),
        json!({ "preallocation": "metadata" }),
        json!({ "preallocation": "falloc" }),
        json!({ "preallocation": "full" }),
        json!({ "backing-file": "base.raw", "backing-fmt": "raw" }),
    ];
    for (number, case) in cases.iter().enumerate() {
        let path = scene.path(&format!("{number}.qcow2"));
        scene.create(&format!("f{number}"), &json!({ "driver": "file", "filename": path, "size": 0 }));
        let mut options = json!({ "driver": "qcow2", "size": MIB, "file": { "driver": "file", "filename": path } });
        options.as_object_mut().unwrap().extend(case.as_object().unwrap().clone());
        scene.create(&format!("i{number}"), &options);
        let info: Value = serde_json::from_str(&qemu_img(&["info", "--output=json", &path])).unwrap();
        let (format, data) = (&info["format"], &info["format-specific"]["data"]);
        assert_eq!((format, &info["virtual-size"]), (&json!("qcow2"), &json!(MIB)), "{case}");
        let expected = |name: &str, default: Value| case.get(name).cloned().unwrap_or(default);
        assert_eq!(info["cluster-size"], expected("cluster-size", json!(65536)), "{case}");
        assert_eq!(data["refcount-bits"], expected("refcount-bits", json!(16)), "{case}");
        assert_eq!(info.get("backing-filename"), case.get("backing-file"), "{case}");
        if case.get("version").is_none() {
            assert_eq!(data["compression-type"], expected("compression-type", json!("zlib")), "{case}");
            assert_eq!(data["extended-l2"], expected("extended-l2", json!(false)), "{case}");
            assert_eq!(data["lazy-refcounts"], expected("lazy-refcounts", json!(false)), "{case}");
        }
        qemu_img(&["check", &path]);
    }
    let path = scene.path("data.qcow2");
    scene.create("fd", &json!({ "driver": "file", "filename": path, "size": 0 }));
    scene.create("fr", &json!({ "driver": "file", "filename": scene.path("data.raw"), "size": 0 }));
    let options = json!({
        "driver": "qcow2", "size": MIB, "file": { "driver": "file", "filename": path },
        "data-file": { "driver": "file", "filename": scene.path("data.raw") }, "data-file-raw": true,
    });
    scene.create("id", &options);
    qemu_img(&["check", &path]);
    let info: Value = serde_json::from_str(&qemu_img(&["info", "--output=json", &path])).unwrap();
    assert_eq!(info["format-specific"]["data"]["data-file"], scene.path("data.raw"));
    // What a raw data file has already is the disk.
    let mut options = options;
    std::fs::write(scene.path("full.raw"), vec![5; MIB]).unwrap();
    options["data-file"]["filename"] = json!(scene.path("full.raw"));
    scene.create("again", &options);
    assert_eq!(std::fs::read(scene.path("full.raw")).unwrap(), vec![5; MIB]);
    qemu_img(&["convert", "-O", "raw", &path, &scene.path("copy.raw")]);
    assert_eq!(std::fs::read(scene.path("copy.raw")).unwrap(), vec![5; MIB]);
}

fn internal(device: &str, name: &str) -> Value {
    json!({ "device": device, "name": name })
}

/// Both say the same of what cannot be done, and show the same of what was.
#[test]
fn internal_snapshots_are_qemus() {
    let answers = [Scene::new(Server::start), Scene::new(Server::start_peer)].map(|mut scene| {
        scene.overlay("one", MIB);
        scene.ok("blockdev-add", &json!({ "driver": "null-co", "node-name": "null", "size": MIB }));
        let (take, delete) = ("blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync");
        scene.ok(take, &internal("one", "x"));
        let mut answers = Vec::new();
        for (device, name) in [("nobody", "y"), ("null", "y"), ("one", ""), ("one", "x")] {
            answers.push(json!(scene.refused(take, &internal(device, name))));
        }
        for arguments in [
            json!({ "device": "nobody", "name": "x" }),
            json!({ "device": "one" }),
            json!({ "device": "one", "name": "y" }),
            json!({ "device": "one", "id": "7" }),
            json!({ "device": "one", "id": "7", "name": "x" }),
        ] {
            answers.push(json!(scene.refused(delete, &arguments)));
        }
        let action = |name: &str| json!({ "type": take, "data": internal("one", name) });
        let twice = json!({ "actions": [action("y"), action("y")] });
        answers.push(json!(scene.refused("transaction", &twice)));
        let aborted = json!({ "actions": [action("z"), { "type": "abort", "data": {} }] });
        answers.push(json!(scene.refused("transaction", &aborted)));
        scene.ok("transaction", &json!({ "actions": [action("2"), action("z")] }));
        scene.ok("blockdev-add", &json!({ "driver": "raw", "node-name": "above", "file": "one" }));
        answers.push(json!(scene.refused(take, &internal("one", "below"))));
        scene.ok(take, &internal("above", "through"));
        let nodes = scene.ok("query-named-block-nodes", &json!({}));
        for name in ["one", "above", "null"] {
            let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name).unwrap();
            let mut all = node["image"]["snapshots"].clone();
            all.as_array_mut().into_iter().flatten().for_each(timeless);
            answers.push(all);
        }
        let mut deleted = scene.ok(delete, &json!({ "device": "above", "id": "1", "name": "x" }));
        timeless(&mut deleted);
        answers.push(deleted);
        for node in ["above", "one"] {
            scene.ok("blockdev-del", &json!({ "node-name": node }));
        }
        qemu_img(&["check", &scene.path("one.qcow2")]);
        answers
    });
    let [ours, theirs] = answers;
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
}

/// What a clock says; QEMU's daemon has none of a machine's and says the time of day.
fn timeless(info: &mut Value) {
    for member in ["date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"] {
        assert!(info[member].is_u64(), "{info}");
        info[member] = json!(0);
    }
}

/// A guest goes round and round its disk; each snapshot has the disk of one moment, and so has the disk after it was
/// deleted again.
#[test]
fn internal_snapshots_are_of_one_moment_while_a_guest_writes() {
    const SECTORS: u64 = (MIB / 512) as u64;
    let mut scene = Scene::new(Server::start);
    scene.overlay("one", MIB);
    scene.export("one");
    let over = AtomicBool::new(false);
    let (socket, last) = (scene.path("x.sock"), std::sync::Mutex::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut guest = Client::start(std::path::Path::new(&socket), &Setup::default());
            for round in (1u8..=250).cycle() {
                for sector in (0..SECTORS).step_by(16) {
                    assert_eq!(guest.write(0, sector, &[round; 8192]), OK_WRITE);
                    if over.load(Ordering::Relaxed) {
                        *last.lock().unwrap() = round;
                        return;
                    }
                }
            }
        });
        // Also where something here goes wrong.
        let _ends = Ends(&over);
        for number in 0..40 {
            scene.ok("blockdev-snapshot-internal-sync", &internal("one", &format!("s{number}")));
            pause(Duration::from_millis(5));
            if number % 4 != 0 {
                scene.ok("blockdev-snapshot-delete-internal-sync", &internal("one", &format!("s{number}")));
            }
        }
    });
    assert!(*last.lock().unwrap() > 0, "the guest wrote something");
    // It may not have heard yet that the guest has gone.
    scene.ok("block-export-del", &json!({ "id": "x", "mode": "hard" }));
    scene.qmp.event("BLOCK_EXPORT_DELETED");
    scene.ok("blockdev-del", &json!({ "node-name": "one" }));
    let path = scene.path("one.qcow2");
    qemu_img(&["check", &path]);
    let copy = scene.path("copy.raw");
    for number in (0..40).step_by(4) {
        qemu_img(&["convert", "-O", "raw", "-l", &format!("s{number}"), &path, &copy]);
        one_moment(&std::fs::read(&copy).unwrap(), &format!("snapshot {number}"));
    }
    qemu_img(&["convert", "-O", "raw", &path, &copy]);
    one_moment(&std::fs::read(&copy).unwrap(), "the disk");
}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The guest was in the middle of a round, or at its end: what it has not got to is of the round before.
fn one_moment(disk: &[u8], what: &str) {
    let rounds: Vec<u8> = disk.chunks(8192).map(|part| part[0]).collect();
    assert!(disk.chunks(8192).all(|part| part.iter().all(|byte| *byte == part[0])), "{what}: a write is torn");
    let changes: Vec<_> = rounds.windows(2).filter(|pair| pair[0] != pair[1]).collect();
    let follows = |pair: &&[u8]| pair[0] == pair[1] + 1 || (pair[0], pair[1]) == (1, 250);
    assert!(changes.len() <= 1 && changes.iter().all(|pair| follows(&&pair[..])), "{what}: {rounds:?}");
}

/// Both say the same of what cannot be done, and the image names what it was told to; QEMU takes the image's own format for
/// the backing file's.
#[test]
fn another_backing_file_is_named_as_qemu_names_it() {
    let answers = [Scene::new(Server::start), Scene::new(Server::start_peer)].map(|mut scene| {
        for (name, below, image, format) in [("one", "base", "base.raw", "raw"), ("two", "one", "one.qcow2", "qcow2")] {
            let path = scene.path(&format!("{name}.qcow2"));
            qemu_img(&["create", "-q", "-f", "qcow2", "-b", &scene.path(image), "-F", format, &path]);
            let file = json!({ "driver": "file", "filename": path });
            let options = json!({ "driver": "qcow2", "node-name": name, "file": file, "backing": below });
            scene.ok("blockdev-add", &options);
        }
        scene.overlay("alone", MIB);
        let change = |device: &str, image: &str, name: &str| {
            json!({ "device": device, "image-node-name": image, "backing-file": name })
        };
        let refusals = [("nobody", "two"), ("two", "nobody"), ("alone", "alone"), ("two", "base"), ("one", "one")];
        let mut answers: Vec<_> = refusals
            .map(|(device, image)| scene.refused("change-backing-file", &change(device, image, "x")))
            .into();
        answers.push(scene.refused("change-backing-file", &change("alone", "two", "x")));
        scene.ok("change-backing-file", &change("two", "two", "./one.qcow2"));
        let shown = scene.ok("query-named-block-nodes", &json!({}));
        let two = shown.as_array().unwrap().iter().find(|node| node["node-name"] == "two").unwrap();
        answers.push(two["image"]["backing-filename"].to_string());
        for node in ["two", "one", "base"] {
            scene.ok("blockdev-del", &json!({ "node-name": node }));
        }
        let info: Value =
            serde_json::from_str(&qemu_img(&["info", "--output=json", &scene.path("two.qcow2")])).unwrap();
        answers.push(info["backing-filename"].to_string());
        answers.push(info["backing-filename-format"].to_string());
        qemu_img(&["check", &scene.path("two.qcow2")]);
        qemu_img(&["convert", "-O", "raw", &scene.path("two.qcow2"), &scene.path("all.raw")]);
        assert_eq!(std::fs::read(scene.path("all.raw")).unwrap(), vec![7; MIB]);
        answers
    });
    let [ours, theirs] = answers;
    assert_eq!(ours, theirs);
}

/// What is not as with QEMU: the format that the image names is kept, and a read-only node is not written.
#[test]
fn a_backing_file_keeps_its_format_and_a_read_only_image_its_name() {
    let mut scene = Scene::new(Server::start);
    let sync = scene.sync("base", "one.qcow2", "one");
    scene.ok("blockdev-snapshot-sync", &sync);
    let change = json!({ "device": "one", "image-node-name": "one", "backing-file": "base.raw" });
    scene.ok("change-backing-file", &change);
    scene.ok("blockdev-del", &json!({ "node-name": "one" }));
    let info: Value = serde_json::from_str(&qemu_img(&["info", "--output=json", &scene.path("one.qcow2")])).unwrap();
    assert_eq!((&info["backing-filename"], &info["backing-filename-format"]), (&json!("base.raw"), &json!("raw")));
    let file = json!({ "driver": "file", "filename": scene.path("one.qcow2") });
    let options = json!({ "driver": "qcow2", "node-name": "one", "read-only": true, "file": file, "backing": "base" });
    scene.ok("blockdev-add", &options);
    let refusal = scene.refused("change-backing-file", &change);
    assert!(refusal.contains("read-only"), "{refusal}");
}
