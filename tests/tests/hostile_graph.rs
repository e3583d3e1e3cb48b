//! Options, graph edits and exports that make no sense, or come at a bad time (GR), and the rows of QMP that need a guest
//! or a secret, of `hostile-inputs.md`: one test a row, over the monitor of a running daemon.
//!
//! | row | here as, or why not |
//! |---|---|
//! | GR-04, GR-09, GR-31 | what the schema refuses never reaches a driver |
//! | GR-10 | references cannot close a circle: a child has to be there first, and a reopen keeps the children; `x-blockdev-change` could, and is refused |
//! | GR-12 | 10 000 nodes and then a removal of all; up to the limit of 65 536 in the long form |
//! | GR-13 | against `qemu-io`; it has no name in the refusal, as the kernel tells none for such locks |
//! | GR-14 | no descriptor can be passed for an image, and no NFS is here: a second descriptor of our own is closed |
//! | GR-20 | in `graph_change.rs`, and in `block-core/tests/change.rs` |
//! | GR-21 | in `block-core/tests/change.rs` |
//! | GR-22 | with a child that `x-blockdev-change` adds; a replaced one in `block-core/tests/change.rs` |
//! | GR-23 | "during mirror" waits for jobs; below used data is defined: it is cut off, as by `truncate` |
//! | GR-27 | in `block-core/tests/luks/refusing.rs` and `luks.rs` |
//! | GR-30 | a block of more than a cluster is several clusters: taken, as by the peer |
//! | GR-32 | an export has no `share-rw` and bears all others, as the peer's: two writable ones are taken, in two daemons too |
//! | GR-34 | another user's socket needs root: nobody else can make one |
//! | GR-35 to GR-41, GR-43 | of jobs there is `blockdev-create` (`jobs.rs`); those that copy between nodes come later |
//! | GR-42 | bitmaps: in `fleecing.rs` and `block-core/tests/dirty_bitmaps.rs`; `inconsistent` in `persistent_bitmaps.rs`, `busy` waits for the jobs that use them |
//! | GR-44, GR-45 | NBD and FUSE exports are later features |
//! | QMP-22, QMP-25 | in `daemon/tests/monitor.rs` |
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]
#![expect(clippy::cast_possible_truncation, reason = "offsets and counts of tests are short")]

use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use trellis_tests::qmp::Qmp;
use trellis_tests::scene::{DISK, IOERR, OK_WRITE, SECTORS, SLOW, Scene, long, repeats};
use trellis_tests::vhost_user::client::{Client, DATA, Setup, slot};
use trellis_tests::vhost_user::protocol::{config, kind, status};
use trellis_tests::vhost_user::ring::{readable, writable};
use trellis_tests::vhost_user::wire::{hung_up_within, pause};
use trellis_tests::watched::Watched;

// ---- what every case goes through ----------------------------------------------------------------------------------

/// What a case may not change.
#[derive(Debug, PartialEq, Eq)]
struct Baseline {
    nodes: Vec<Value>,
    exports: Value,
    locks: usize,
    fds: usize,
}

impl Baseline {
    /// Once it has stayed the same: an export that has just come or gone has one descriptor more or less for a moment.
    fn settled(server: &Watched) -> Self {
        let end = Instant::now() + Duration::from_secs(2);
        let mut now = Self::of(server);
        loop {
            pause(Duration::from_millis(10));
            let next = Self::of(server);
            if next == now || Instant::now() > end {
                return next;
            }
            now = next;
        }
    }

    fn of(server: &Watched) -> Self {
        let mut nodes = server.qmp("query-named-block-nodes", &json!({ "flat": true }));
        // The space that a file takes is its guests' doing.
        let named = |node: &mut Value| {
            node["image"].as_object_mut().unwrap().remove("actual-size");
            node["image"].as_object_mut().unwrap().remove("format-specific");
            node.take()
        };
        Self {
            nodes: nodes.as_array_mut().unwrap().iter_mut().map(named).collect(),
            exports: server.qmp("query-block-exports", &json!({})),
            locks: locks_of(server.pid()),
            fds: server.fds(),
        }
    }
}

/// Byte-range locks on the files that a process has open; such locks belong to no process, but to open files.
fn locks_of(pid: u32) -> usize {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let texts = infos.filter_map(|info| fs::read_to_string(info.unwrap().path()).ok());
    texts.map(|text| text.lines().filter(|line| line.starts_with("lock:")).count()).sum()
}

/// Runs a case. Everything must be as before afterwards: nodes, exports, locks, descriptors, and guests that work.
fn on_a_scene(case: impl FnOnce(&mut Scene)) {
    let mut scene = Scene::new();
    let before = Baseline::settled(scene.server());
    case(&mut scene);
    expect_same(scene.server(), &before);
    expect_good_command(scene.server());
    scene.still_good();
}

/// Asserts that the server has what it had; threads that are idle for a while end, and with them what they hold.
#[track_caller]
fn expect_same(server: &Watched, before: &Baseline) {
    let end = Instant::now() + Duration::from_secs(2);
    let mut now = Baseline::of(server);
    while now != *before && Instant::now() < end {
        pause(Duration::from_millis(10));
        now = Baseline::of(server);
    }
    assert_eq!(now, *before);
}

fn expect_good_command(server: &Watched) {
    server.qmp("blockdev-add", &json!({ "driver": "null-co", "node-name": "good", "size": 512 }));
    server.qmp("blockdev-del", &json!({ "node-name": "good" }));
}

/// A command that is refused with `sentence` in its description, and changes nothing.
#[track_caller]
fn refused(server: &Watched, command: &str, arguments: &Value, sentence: &str) {
    let before = Baseline::settled(server);
    let desc = refusal(server, command, arguments);
    assert!(desc.contains(sentence), "{command} {}: {desc}", shortened(arguments));
    expect_same(server, &before);
}

/// The description with which a command is refused.
#[track_caller]
fn refusal(server: &Watched, command: &str, arguments: &Value) -> String {
    let begun = Instant::now();
    let reply = server.qmp_raw(&json!({ "execute": command, "arguments": arguments }));
    assert!(begun.elapsed() < Duration::from_secs(2), "{command} took {:?}", begun.elapsed());
    let desc = reply["error"]["desc"].as_str();
    assert_eq!(reply["error"]["class"], "GenericError", "{command} {}: {reply}", shortened(arguments));
    desc.unwrap().to_owned()
}

fn shortened(arguments: &Value) -> String {
    arguments.to_string().chars().take(200).collect()
}

fn null_disk(name: &str) -> Value {
    json!({ "driver": "null-co", "node-name": name, "size": 1 << 20 })
}

fn file(name: &str, path: &Path) -> Value {
    json!({ "driver": "file", "node-name": name, "filename": path })
}

/// `base` with the members of `more` in it.
fn with(mut base: Value, more: &Value) -> Value {
    base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    base
}

/// A new image of `size` bytes, each of them `fill`, in the server's directory.
fn image(scene: &mut Scene, name: &str, size: usize, fill: u8) -> PathBuf {
    let path = scene.server().dir().join(name);
    fs::write(&path, vec![fill; size]).unwrap();
    path
}

fn export(id: &str, node: &str, socket: &Path) -> Value {
    json!({ "type": "vhost-user-blk", "id": id, "node-name": node, "addr": { "type": "unix", "path": socket } })
}

/// The size that the graph gives a node, in bytes.
fn size_of(server: &Watched, node: &str) -> u64 {
    let nodes = server.qmp("query-named-block-nodes", &json!({}));
    let found = nodes.as_array().unwrap().iter().find(|one| one["node-name"] == node);
    found.unwrap()["image"]["virtual-size"].as_u64().unwrap()
}

fn delete(server: &Watched, node: &str) {
    server.qmp("blockdev-del", &json!({ "node-name": node }));
}

// ---- names and drivers ---------------------------------------------------------------------------------------------

#[test]
fn gr_01_node_names_of_31_and_32_characters() {
    on_a_scene(|scene| {
        let server = scene.server();
        refused(server, "blockdev-add", &null_disk(&"n".repeat(32)), "Node name too long");
        server.qmp("blockdev-add", &null_disk(&"n".repeat(31)));
        delete(server, &"n".repeat(31));
    });
}

#[test]
fn gr_02_node_names_that_are_none() {
    on_a_scene(|scene| {
        let server = scene.server();
        for name in ["1n", "a/b", "", "#block1", "a b", "\u{1b}[31m", "%s%n"] {
            refused(server, "blockdev-add", &null_disk(name), "Invalid node-name");
        }
        refused(server, "blockdev-add", &json!({ "driver": "null-co" }), "'node-name' must be specified");
        let inner = json!({ "driver": "raw", "node-name": "outer", "file": null_disk("1n") });
        refused(server, "blockdev-add", &inner, "Invalid node-name: '1n'");
    });
}

#[test]
fn gr_03_a_node_name_that_is_taken() {
    on_a_scene(|scene| {
        let server = scene.server();
        refused(server, "blockdev-add", &null_disk("disk-a"), "Duplicate nodes with node-name='disk-a'");
        for inner in ["disk-a", "n"] {
            let twice = json!({ "driver": "raw", "node-name": "n", "file": null_disk(inner) });
            refused(server, "blockdev-add", &twice, "Duplicate nodes with node-name");
        }
    });
}

#[test]
fn gr_09_a_driver_that_is_none_and_options_of_another() {
    on_a_scene(|scene| {
        let path = image(scene, "x.img", 4096, 0);
        let server = scene.server();
        let nope = json!({ "driver": "nope", "node-name": "n" });
        refused(server, "blockdev-add", &nope, "Parameter 'driver' does not accept value 'nope'");
        refused(server, "blockdev-add", &json!({ "node-name": "n" }), "Parameter 'driver' is missing");
        for (base, more, name) in [
            (null_disk("n"), json!({ "filename": path }), "filename"),
            (file("n", &path), json!({ "latency-ns": 1 }), "latency-ns"),
            (file("n", &path), json!({ "offset": 0 }), "offset"),
            (null_disk("n"), json!({ "file": "disk-a" }), "file"),
            (null_disk("n"), json!({ "zz": 1 }), "zz"),
        ] {
            refused(server, "blockdev-add", &with(base, &more), &format!("Parameter '{name}' is unexpected"));
        }
        let device = json!({ "driver": "host_device", "node-name": "n", "filename": path });
        refused(server, "blockdev-add", &device, "to be a block device");
    });
}

// ---- what a file name may lead to ----------------------------------------------------------------------------------

#[test]
fn gr_04_a_file_name_with_a_nul() {
    on_a_scene(|scene| {
        let path = image(scene, "x.img", 4096, 0);
        let name = format!("{}\0.img", path.display());
        refused(scene.server(), "blockdev-add", &file("n", Path::new(&name)), "NUL");
    });
}

#[test]
fn gr_05_a_file_name_that_leads_to_no_file() {
    on_a_scene(|scene| {
        let server = scene.server();
        let dir = server.dir().to_owned();
        let long = dir.join("x".repeat(5000));
        for (path, sentence) in [
            (dir.clone(), "Is a directory"),
            (dir.join("missing"), "No such file or directory"),
            (dir.join("missing/x.img"), "No such file or directory"),
            (long, "File name too long"),
            ("".into(), "No such file or directory"),
        ] {
            refused(server, "blockdev-add", &file("n", &path), sentence);
        }
    });
}

#[test]
fn gr_06_a_file_name_that_leads_to_something_else() {
    on_a_scene(|scene| {
        let server = scene.server();
        let (fifo, socket) = (server.dir().join("fifo"), server.dir().join("some.sock"));
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let _listener = UnixListener::bind(&socket).unwrap();
        for path in [&*fifo, &*socket, Path::new("/dev/tty"), Path::new("/dev/null"), Path::new("/proc/self/mem")] {
            refused(server, "blockdev-add", &file("n", path), "to be a regular file");
            let device = json!({ "driver": "host_device", "node-name": "n", "filename": path });
            refused(server, "blockdev-add", &device, "to be a block device");
        }
        // Containers have none; whichever it is, no node comes of it.
        refused(server, "blockdev-add", &file("n", Path::new("/dev/mem")), "/dev/mem");
    });
}

#[test]
fn gr_07_links_are_followed_and_circles_refused() {
    on_a_scene(|scene| {
        let path = image(scene, "x.img", 4096, 7);
        let server = scene.server();
        let (link, circle) = (server.dir().join("link"), server.dir().join("circle"));
        symlink(&path, &link).unwrap();
        symlink(&circle, &circle).unwrap();
        refused(server, "blockdev-add", &file("n", &circle), "symbolic links");
        server.qmp("blockdev-add", &file("n", &link));
        assert_eq!(size_of(server, "n"), 4096);
        delete(server, "n");
    });
}

#[test]
fn gr_07_a_link_that_changes_during_the_open() {
    on_a_scene(|scene| {
        let path = image(scene, "x.img", 4096, 7);
        let server = scene.server();
        let (fifo, link) = (server.dir().join("fifo"), server.dir().join("link"));
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let places = [path, fifo, server.dir().to_owned()];
        symlink(&places[0], &link).unwrap();
        let over = AtomicBool::new(false);
        let (mut opened, mut not) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let fresh = link.with_extension("fresh");
                for place in places.iter().cycle() {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    symlink(place, &fresh).unwrap();
                    fs::rename(&fresh, &link).unwrap();
                }
            });
            let end = Instant::now() + Duration::from_secs(10);
            while (opened < 50 || not < 50) && Instant::now() < end {
                let reply = server.qmp_raw(&json!({ "execute": "blockdev-add", "arguments": file("n", &link) }));
                if reply.get("return").is_none() {
                    not += 1;
                    continue;
                }
                opened += 1;
                // What is open is the file, whatever the link says now.
                assert_eq!(size_of(server, "n"), 4096);
                delete(server, "n");
            }
            over.store(true, Ordering::Relaxed);
        });
        assert!(opened >= 50 && not >= 50, "{opened} opens went well and {not} did not: there was no race");
    });
}

#[test]
fn gr_08_a_file_name_that_looks_like_something_else() {
    on_a_scene(|scene| {
        let colon = image(scene, "host:x.img", 4096, 0);
        let braces = image(scene, "json:{\"driver\":\"null-co\"}", 8192, 0);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let server = scene.server();
        for name in
            [&format!("nbd://{address}/x"), "json:{\"driver\":\"null-co\"}", "host:x.img", "nbd:unix:/x", "fat:rw:/"]
        {
            refused(server, "blockdev-add", &file("n", Path::new(name)), "No such file or directory");
        }
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "somebody connects to a file name");
        for (path, size) in [(colon, 4096), (braces, 8192)] {
            server.qmp("blockdev-add", &file("n", &path));
            assert_eq!(size_of(server, "n"), size);
            delete(server, "n");
        }
    });
}

// ---- the shape of the graph ----------------------------------------------------------------------------------------

#[test]
fn gr_10_children_that_are_not_there_or_would_close_a_circle() {
    on_a_scene(|scene| {
        let server = scene.server();
        let raw = |name: &str, below: Value| json!({ "driver": "raw", "node-name": name, "file": below });
        for tree in [raw("n", json!("n")), raw("n", json!("unknown")), raw("n", raw("m", json!("n")))] {
            refused(server, "blockdev-add", &tree, "Cannot find device=");
        }
        server.qmp("blockdev-add", &null_disk("bottom"));
        server.qmp("blockdev-add", &raw("middle", json!("bottom")));
        server.qmp("blockdev-add", &raw("top", json!("middle")));
        for circle in [raw("middle", json!("top")), raw("middle", json!("middle"))] {
            refused(server, "blockdev-reopen", &json!({ "options": [circle] }), "would create a cycle");
        }
        ["top", "middle", "bottom"].iter().for_each(|name| delete(server, name));
    });
}

#[test]
fn gr_11_nodes_defined_inside_nodes() {
    on_a_scene(|scene| {
        let server = scene.server();
        let nested = |levels: usize| {
            let below =
                (2..levels).fold(json!({ "driver": "null-co" }), |below, _| json!({ "driver": "raw", "file": below }));
            json!({ "driver": "raw", "node-name": "deep", "file": below })
        };
        for levels in [65, 200, 500] {
            refused(server, "blockdev-add", &nested(levels), "");
        }
        server.qmp("blockdev-add", &nested(64));
        let higher = json!({ "driver": "raw", "node-name": "higher", "file": "deep" });
        refused(server, "blockdev-add", &higher, "The graph may not be deeper than 64 nodes");
        // What was defined in place goes with it.
        delete(server, "deep");
    });
}

#[test]
fn gr_12_many_nodes() {
    let server = Watched::builder().image("disk", DISK, "").export("e", "disk", ",writable=on").start();
    // A node and an export are there already.
    let count = repeats(10_000, MAX_VERTICES - 2);
    let before = Baseline::of(&server);
    let round = || {
        let first = added(&server, 0, 1000);
        let last = added(&server, 1000, count - 1000);
        println!("blockdev-add: {first:?} each for the first 1000 nodes, {last:?} each up to {count}");
        assert!(last < first * 4 + Duration::from_micros(200), "{first:?} each at 1000 nodes, {last:?} at {count}");
        if long() {
            let over = refusal(&server, "blockdev-add", &null_disk("over"));
            assert!(over.contains("more than 65536"), "{over}");
        }
        let mut guest = Client::start(&server.socket("e"), &Setup::default());
        assert_eq!(guest.write(0, 0, &[1; 512]), OK_WRITE, "a guest among many nodes");
        drop(guest);
        (0..count).for_each(|number| delete(&server, &format!("m{number}")));
        expect_same(&server, &before);
        server.rss_anon_kib()
    };
    let (once, twice) = (round(), round());
    // The allocator keeps some of what the first round freed, and the second round uses it.
    assert!(twice < once + (1 << 10), "{once} KiB after one round, {twice} after two");
    expect_good_command(&server);
}

/// Adds `count` nodes, and gives the mean time that each took.
fn added(server: &Watched, from: usize, count: usize) -> Duration {
    let begun = Instant::now();
    for number in from..from + count {
        server.qmp("blockdev-add", &json!({ "driver": "null-co", "node-name": format!("m{number}") }));
    }
    begun.elapsed() / count as u32
}

/// Nodes and exports at the most, as in `block-core/src/graph/shape.rs`.
const MAX_VERTICES: usize = 65_536;

// ---- one image, several users --------------------------------------------------------------------------------------

/// `qemu-io` with a qcow2 image open for writing, until dropped. As a guest's disk in QEMU, it bears no other writer of
/// the file; on a raw image it would.
struct QemuIo(Child);

impl QemuIo {
    fn open(path: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io is installed (qemu-utils)");
        // It has the image, and its locks, when it answers.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("iB"), "qemu-io said: {line}");
        Self(child)
    }

    /// What it says when it cannot open an image for writing; `None`: it can.
    fn refusal(path: &Path) -> Option<String> {
        let tried = Command::new("qemu-io").args(["-f", "qcow2", "-c", "length"]).arg(path).output().unwrap();
        (!tried.status.success()).then(|| String::from_utf8_lossy(&tried.stderr).into_owned())
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A new qcow2 image of 1 MiB in the server's directory, with `backing` below it.
fn qcow2(scene: &mut Scene, backing: Option<&Path>) -> PathBuf {
    let path = scene.server().dir().join("x.qcow2");
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2"]);
    if let Some(backing) = backing {
        make.args(["-F", "raw", "-b"]).arg(backing);
    }
    assert!(make.arg(&path).arg("1M").status().expect("qemu-img is installed (qemu-utils)").success());
    path
}

#[test]
fn gr_13_two_writers_on_one_image() {
    on_a_scene(|scene| {
        let path = qcow2(scene, None);
        let server = scene.server();
        let socket = server.dir().join("x.sock");
        let writable = with(export("x", "x", &socket), &json!({ "writable": true }));
        server.qmp("blockdev-add", &file("x", &path));
        let theirs = QemuIo::open(&path);
        refused(server, "block-export-add", &writable, "Is another process using the image");
        assert!(!socket.exists(), "a refused export leaves a socket");
        server.qmp("block-export-add", &export("x", "x", &socket));
        server.qmp("block-export-del", &json!({ "id": "x" }));
        drop(theirs);
        server.qmp("block-export-add", &writable);
        let said = QemuIo::refusal(&path).expect("qemu-io takes an image that a guest writes to");
        assert!(said.contains("Failed to get shared \"write\" lock"), "{said}");
        server.qmp("block-export-del", &json!({ "id": "x" }));
        assert_eq!(QemuIo::refusal(&path), None, "a lock is left");
        delete(server, "x");
    });
}

#[test]
fn gr_14_closing_another_descriptor_loses_no_lock() {
    on_a_scene(|scene| {
        let path = qcow2(scene, None);
        let server = scene.server();
        let socket = server.dir().join("x.sock");
        server.qmp("blockdev-add", &file("x", &path));
        server.qmp("block-export-add", &with(export("x", "x", &socket), &json!({ "writable": true })));
        assert!(QemuIo::refusal(&path).is_some(), "the image of a writable export is not locked");
        // With locks of the process, this close would lose all of them.
        server.qmp("blockdev-add", &with(file("again", &path), &json!({ "read-only": true })));
        delete(server, "again");
        assert!(QemuIo::refusal(&path).is_some(), "the lock is lost");
        server.qmp("block-export-del", &json!({ "id": "x" }));
        delete(server, "x");
    });
}

#[test]
fn gr_15_one_file_under_two_names() {
    on_a_scene(|scene| {
        let path = image(scene, "x.img", 1 << 20, 0);
        let server = scene.server();
        let (dir, other) = (server.dir().to_owned(), server.dir().join("other.img"));
        fs::hard_link(&path, &other).unwrap();
        server.qmp("blockdev-add", &file("x", &path));
        server.qmp("blockdev-add", &file("y", &other));
        // Whoever serves a part of a file does not bear that it shrinks, by whichever name.
        server.qmp("blockdev-add", &json!({ "driver": "raw", "node-name": "part", "file": "x", "offset": 4096 }));
        server.qmp("block-export-add", &export("x", "part", &dir.join("x.sock")));
        let resize = json!({ "node-name": "y", "size": 8192 });
        refused(server, "block_resize", &resize, "Is another process using the image");
        server.qmp("block-export-add", &export("y", "y", &dir.join("y.sock")));
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
        for id in ["x", "y"] {
            server.qmp("block-export-del", &json!({ "id": id }));
        }
        ["part", "x", "y"].iter().for_each(|name| delete(server, name));
    });
}

/// Partitions of one image, each with a guest of its own, are no conflict.
#[test]
fn gr_15_two_parts_of_one_file_are_written_side_by_side() {
    on_a_scene(|scene| {
        let path = image(scene, "x.img", 1 << 20, 0);
        let server = scene.server();
        server.qmp("blockdev-add", &file("x", &path));
        for (id, offset) in [("low", 0), ("high", 4096)] {
            let window = json!({ "driver": "raw", "node-name": id, "file": "x", "offset": offset, "size": 4096 });
            server.qmp("blockdev-add", &window);
            let socket = server.socket(id);
            server.qmp("block-export-add", &with(export(id, id, &socket), &json!({ "writable": true })));
        }
        let [mut low, mut high] = ["low", "high"].map(|id| Client::start(&server.socket(id), &Setup::default()));
        assert_eq!(low.write(0, 7, &[1; 512]), OK_WRITE);
        assert_eq!(high.write(0, 0, &[2; 512]), OK_WRITE);
        assert_eq!(low.write(0, 8, &[3; 512]), IOERR, "a guest writes into its neighbour's part");
        let bytes = fs::read(&path).unwrap();
        assert_eq!((bytes[3583], bytes[3584], bytes[4095], bytes[4096], bytes[4608]), (0, 1, 1, 2, 0));
        drop((low, high));
        for id in ["low", "high"] {
            server.qmp("block-export-del", &json!({ "id": id, "mode": "hard" }));
            delete(server, id);
        }
        delete(server, "x");
    });
}

#[test]
fn gr_16_a_file_that_is_replaced_after_the_open() {
    on_a_scene(|scene| {
        let path = scene.server().image("disk-a");
        let mut client = scene.client();
        assert_eq!(client.write(0, 0, &[1; 512]), OK_WRITE);
        let aside = path.with_extension("aside");
        fs::rename(&path, &aside).unwrap();
        fs::write(&path, vec![2; DISK as usize]).unwrap();
        assert_eq!(client.read(0, 0, 512).1, [1; 512], "the guest sees another disk");
        let again = json!({ "options": [with(file("disk-a", &path), &json!({ "discard": "unmap" }))] });
        refused(scene.server(), "blockdev-reopen", &again, "the name leads to another file now");
        assert_eq!(client.write(0, 1, &[3; 512]), OK_WRITE);
        assert_eq!(client.read(0, 0, 512).1, [1; 512]);
        drop(client);
        assert_eq!(fs::read(&path).unwrap(), vec![2; DISK as usize], "the other file was written");
        fs::rename(&aside, &path).unwrap();
        scene.server().qmp("blockdev-reopen", &again);
    });
}

// ---- removal and reopen --------------------------------------------------------------------------------------------

#[test]
fn gr_17_removing_a_node_that_is_in_use() {
    on_a_scene(|scene| {
        let server = scene.server();
        refused(server, "blockdev-del", &json!({ "node-name": "disk-a" }), "in use by export 'a'");
        refused(server, "blockdev-del", &json!({ "node-name": "unknown" }), "Failed to find node");
        refused(server, "blockdev-del", &json!({}), "Parameter 'node-name' is missing");
        server.qmp("blockdev-add", &null_disk("below"));
        server.qmp("blockdev-add", &json!({ "driver": "raw", "node-name": "above", "file": "below" }));
        refused(server, "blockdev-del", &json!({ "node-name": "below" }), "in use by node 'above'");
        let inline = json!({ "driver": "raw", "node-name": "owner", "file": null_disk("inline") });
        server.qmp("blockdev-add", &inline);
        refused(server, "blockdev-del", &json!({ "node-name": "inline" }), "in use by node 'owner'");
        ["owner", "above", "below"].iter().for_each(|name| delete(server, name));
    });
}

#[test]
fn gr_18_a_list_of_reopens_of_which_one_fails() {
    on_a_scene(|scene| {
        // Not even root may write to a program that runs.
        let program = scene.server().dir().join("program");
        fs::copy("/bin/sleep", &program).unwrap();
        let mut running = Command::new(&program).arg("60").spawn().unwrap();
        let mut client = scene.client();
        let server = scene.server();
        let disk = file("disk-a", &server.image("disk-a"));
        let read_only = json!({ "read-only": true });
        server.qmp("blockdev-add", &with(file("busy", &program), &read_only));
        server.qmp("blockdev-add", &null_disk("other"));
        let discards = with(disk.clone(), &json!({ "discard": "ignore" }));
        for (second, sentence) in [
            (file("busy", &program), "Could not reopen"),
            (json!({ "driver": "raw", "node-name": "other", "file": "busy" }), "Cannot change the option 'driver'"),
            (json!({ "driver": "null-aio", "node-name": "other" }), "Cannot change the option 'driver'"),
            (file("other", &program), "Cannot change the option 'driver'"),
            (with(null_disk("other"), &json!({ "size": -1 })), "out of range"),
            (null_disk("unknown"), "Failed to find node"),
            (disk.clone(), "is in the list twice"),
            (json!({ "driver": "null-co" }), "node-name not specified"),
        ] {
            refused(server, "blockdev-reopen", &json!({ "options": [discards, second] }), sentence);
            assert_eq!(client.discard(0, 0, 8).status, status::OK);
        }
        // Its guest writes.
        let all = json!({ "options": [with(null_disk("other"), &read_only), with(disk, &read_only)] });
        refused(server, "blockdev-reopen", &all, "read-only");
        assert_eq!(client.write(0, 0, &[1; 512]), OK_WRITE);
        drop(client);
        running.kill().unwrap();
        running.wait().unwrap();
        ["busy", "other"].iter().for_each(|name| delete(server, name));
    });
}

#[test]
fn gr_19_a_reopen_waits_for_32_requests_in_flight() {
    let mut scene = Scene::slow();
    let before = Baseline::of(scene.server());
    let mut client = scene.client();
    let same =
        with(null_disk("disk-a"), &json!({ "size": DISK, "read-zeroes": true, "latency-ns": SLOW.as_nanos() as u64 }));
    let begun = Instant::now();
    submit_reads(&mut client, 0, 32);
    pause(SLOW / 6);
    std::thread::scope(|scope| {
        let reopen = scope.spawn(|| scene.server().qmp("blockdev-reopen", &json!({ "options": [same] })));
        pause(SLOW / 6);
        // The gate is closed now; these wait outside, and are lost just as little.
        submit_reads(&mut client, 32, 32);
        reopen.join().unwrap();
        assert!(begun.elapsed() >= SLOW, "it took only {:?}: it did not wait", begun.elapsed());
        (0..64).for_each(|_| _ = client.used(0));
    });
    expect_all_ok(&client, 64);
    drop(client);
    expect_same(scene.server(), &before);
    scene.still_good();
}

#[test]
fn gr_19_reopens_under_writes_lose_none() {
    on_a_scene(|scene| {
        let path = scene.server().image("disk-a");
        let mut client = scene.client();
        let over = AtomicBool::new(false);
        let options =
            |discard: &str| json!({ "options": [with(file("disk-a", &path), &json!({ "discard": discard }))] });
        let mut rounds = 0;
        std::thread::scope(|scope| {
            let reopens = scope.spawn(|| {
                let mut count = 0;
                while !over.load(Ordering::Relaxed) {
                    ["ignore", "unmap"]
                        .iter()
                        .for_each(|how| drop(scene.server().qmp("blockdev-reopen", &options(how))));
                    count += 2;
                }
                count
            });
            let end = Instant::now() + Duration::from_secs(1);
            while rounds < 20 || Instant::now() < end {
                write_32(&mut client, rounds);
                rounds += 1;
            }
            over.store(true, Ordering::Relaxed);
            assert!(reopens.join().unwrap() >= 4, "hardly a reopen happened");
        });
        let stored = fs::read(&path).unwrap();
        for number in 0..32_usize {
            let block = &stored[number * 4096..][..4096];
            assert!(block.iter().all(|byte| *byte == pattern(rounds - 1, number as u64)), "block {number} is lost");
        }
    });
}

/// Submits `count` reads, from slot and sector `from` on, that are all in flight at once.
fn submit_reads(client: &mut Client, from: u64, count: u64) {
    for number in from..from + count {
        let chain = client.chain(number, kind::IN, number, &[writable(DATA + number * 512, 512)]);
        client.submit_at(0, number as u16 * 3, &chain);
    }
}

fn expect_all_ok(client: &Client, count: u64) {
    for number in 0..count {
        assert_eq!(client.memory().byte(slot(number).status), status::OK, "request {number}");
    }
}

/// Writes 32 blocks of 4 KiB at once, and waits for all of them.
fn write_32(client: &mut Client, round: u64) {
    for number in 0..32 {
        client.memory().fill(DATA + number * 4096, 4096, pattern(round, number));
        let chain = client.chain(number, kind::OUT, number * 8, &[readable(DATA + number * 4096, 4096)]);
        client.submit_at(0, number as u16 * 3, &chain);
    }
    (0..32).for_each(|_| _ = client.used(0));
    expect_all_ok(client, 32);
}

fn pattern(round: u64, number: u64) -> u8 {
    (round * 37 + number + 1) as u8
}

// ---- sizes ---------------------------------------------------------------------------------------------------------

#[test]
fn gr_23_sizes_that_make_no_sense() {
    on_a_scene(|scene| {
        let path = scene.server().image("disk-a");
        let mut client = scene.client();
        let server = scene.server();
        server.qmp("blockdev-add", &null_disk("null"));
        let window = json!({ "driver": "raw", "node-name": "window", "file": null_disk("below"), "size": 4096 });
        server.qmp("blockdev-add", &window);
        server.qmp("blockdev-add", &with(null_disk("ro"), &json!({ "read-only": true })));
        let sized = |node: &str, size: Value| json!({ "node-name": node, "size": size });
        for (arguments, sentence) in [
            (sized("disk-a", json!(-1)), "Parameter 'size' expects a >0 size"),
            (sized("disk-a", json!(i64::MIN)), "Parameter 'size' expects a >0 size"),
            (sized("disk-a", json!(1_u64 << 63)), "Invalid parameter type for 'size'"),
            (sized("disk-a", json!(1.5)), "Invalid parameter type for 'size'"),
            (sized("disk-a", json!(1000)), "multiple of 512"),
            (sized("disk-a", json!(i64::MAX)), "multiple of 512"),
            (sized("window", json!(8192)), "Cannot resize fixed-size raw disks"),
            (sized("null", json!(8192)), "does not support resize"),
            (sized("ro", json!(8192)), "read-only"),
            (sized("unknown", json!(8192)), "Cannot find device='' nor node-name='unknown'"),
            (json!({ "size": 8192 }), "Cannot find device=''"),
            (json!({ "node-name": "disk-a" }), "Parameter 'size' is missing"),
        ] {
            refused(server, "block_resize", &arguments, sentence);
        }
        assert_eq!(fs::metadata(&path).unwrap().len(), DISK);
        ["window", "null", "ro"].iter().for_each(|name| delete(server, name));
        assert_eq!(client.read(0, SECTORS - 1, 512).0.status, status::OK);
    });
}

#[test]
fn gr_23_a_resize_to_nothing_and_below_used_data_under_a_guest() {
    on_a_scene(|scene| {
        let path = scene.server().image("disk-a");
        let mut client = scene.client();
        let resized = |scene: &mut Scene, client: &Client, size: u64| {
            scene.server().qmp("block_resize", &json!({ "node-name": "disk-a", "size": size }));
            assert_eq!(fs::metadata(&path).unwrap().len(), size);
            let capacity = client.config()[config::CAPACITY..][..8].try_into().unwrap();
            assert_eq!(u64::from_le_bytes(capacity), size / 512, "what the guest is told");
        };
        assert_eq!(client.write(0, 0, &[1; 4096]), OK_WRITE);
        resized(scene, &client, 512);
        assert_eq!(client.read(0, 0, 512).1, [1; 512]);
        assert_eq!(client.read(0, 1, 512).0, IOERR, "a read past the new end");
        resized(scene, &client, 0);
        assert_eq!(client.read(0, 0, 512).0, IOERR);
        assert_eq!(client.flush(0).status, status::OK);
        // The largest size that fits an `off_t`: tmpfs takes it.
        let most = (1 << 63) - 512;
        resized(scene, &client, most);
        assert_eq!(client.read(0, most / 512 - 1, 512).1, [0; 512]);
        assert_eq!(client.read(0, most / 512 - 1, 1024).0, IOERR, "a read past the largest end");
        resized(scene, &client, DISK);
        assert_eq!(client.read(0, 0, 4096).1, [0; 4096], "what was cut off is back");
    });
}

#[test]
fn gr_24_throttle_groups_that_make_no_sense() {
    on_a_scene(|scene| {
        let server = scene.server();
        let group = |limits: Value| json!({ "qom-type": "throttle-group", "id": "g", "limits": limits });
        for (limits, sentence) in [
            (json!({ "bps-total": u64::MAX / 2 + 1 }), "bps-total"),
            (json!({ "bps-total": i64::MAX }), "bps/iops/max values must be within [0, 1000000000000000]"),
            (json!({ "bps-total": -1 }), "bps/iops/max values must be within"),
            (json!({ "iops-total": 100, "iops-total-max": 50 }), "bps_max/iops_max cannot be lower than bps/iops"),
            (json!({ "iops-total-max": 50 }), "bps_max/iops_max require corresponding bps/iops values"),
            (json!({ "iops-total": 100, "iops-read": 100 }), "cannot be used at the same time"),
            (json!({ "iops-total": 100, "iops-total-max": 200, "iops-total-max-length": 0 }), "burst length"),
            (json!({ "iops-size": 4096 }), "iops size requires an iops value to be set"),
        ] {
            refused(server, "object-add", &group(limits), sentence);
        }
        // All zero: no limit.
        server.qmp("object-add", &group(json!({ "bps-total": 0, "iops-total": 0 })));
        let node = json!({ "driver": "throttle", "node-name": "n", "throttle-group": "g", "file": "disk-a" });
        server.qmp("blockdev-add", &node);
        refused(server, "object-del", &json!({ "id": "g" }), "in use");
        delete(server, "n");
        server.qmp("object-del", &json!({ "id": "g" }));
        refused(server, "blockdev-add", &node, "Throttle group 'g' does not exist");
    });
}

#[test]
fn gr_26_a_window_that_does_not_fit() {
    on_a_scene(|scene| {
        let path = image(scene, "x.img", 8192, 0);
        let server = scene.server();
        let most = i64::MAX - 511;
        for (window, sentence) in [
            (json!({ "offset": 8704 }), "Offset (8704) cannot be greater than size of the containing file (8192)"),
            (json!({ "offset": 512, "size": 8192 }), "The sum of offset (512) and size (8192)"),
            (json!({ "size": 8704 }), "The sum of offset (0) and size (8704)"),
            (json!({ "offset": most, "size": most }), "Offset"),
            (json!({ "offset": 512, "size": most }), "The sum of offset"),
            (json!({ "offset": 100 }), "Specified offset is not multiple of 512"),
            (json!({ "size": 1000 }), "Specified size is not multiple of 512"),
            (json!({ "offset": -512 }), "Parameter 'offset' expects"),
            (json!({ "size": -512 }), "Parameter 'size' expects"),
            (json!({ "offset": 1_u64 << 63 }), "Invalid parameter type for 'offset'"),
        ] {
            let raw = json!({ "driver": "raw", "node-name": "n", "file": file("below", &path) });
            refused(server, "blockdev-add", &with(raw, &window), sentence);
        }
    });
}

// ---- quorum, and children that come and go -----------------------------------------------------------------------

fn quorum(name: &str, children: &[&str], threshold: i64) -> Value {
    json!({ "driver": "quorum", "node-name": name, "children": children, "vote-threshold": threshold })
}

/// `x-blockdev-change` of the quorum `q`.
fn change(more: &Value) -> Value {
    with(json!({ "parent": "q" }), more)
}

#[test]
fn gr_10_a_child_that_would_close_a_circle() {
    on_a_scene(|scene| {
        let server = scene.server();
        server.qmp("blockdev-add", &null_disk("one"));
        server.qmp("blockdev-add", &quorum("q", &["one"], 1));
        server.qmp("blockdev-add", &json!({ "driver": "raw", "node-name": "top", "file": "q" }));
        server.qmp("blockdev-add", &quorum("far", &["top"], 1));
        let circle = "Making 'far' a children.1 child of 'q' would create a cycle";
        for (node, sentence) in [("top", "The node top already has a parent"), ("far", circle)] {
            refused(server, "x-blockdev-change", &change(&json!({ "node": node })), sentence);
        }
        ["far", "top", "q", "one"].iter().for_each(|name| delete(server, name));
    });
}

#[test]
fn gr_17_removing_a_child_of_a_quorum() {
    on_a_scene(|scene| {
        let server = scene.server();
        ["one", "two"].iter().for_each(|name| drop(server.qmp("blockdev-add", &null_disk(name))));
        server.qmp("blockdev-add", &quorum("q", &["one", "two"], 2));
        refused(server, "blockdev-del", &json!({ "node-name": "one" }), "in use by node 'q'");
        for (more, sentence) in [
            (json!({ "child": "children.0" }), "The number of children cannot be lower than the vote threshold 2"),
            (json!({ "child": "one" }), "Node 'q' does not have child 'one'"),
            (json!({ "child": "" }), "Node 'q' does not have child ''"),
            (json!({ "node": "nope" }), "Node 'nope' not found"),
            (json!({}), "Either child or node must be specified"),
            (json!({ "child": "children.0", "node": "one" }), "The parameters child and node are in conflict"),
        ] {
            refused(server, "x-blockdev-change", &change(&more), sentence);
        }
        let of_a_null = json!({ "parent": "one", "node": "q" });
        refused(server, "x-blockdev-change", &of_a_null, "The node one does not support adding a child");
        let unknown = json!({ "parent": "nope", "node": "q" });
        refused(server, "x-blockdev-change", &unknown, "Cannot find device='nope' nor node-name='nope'");
        ["q", "one", "two"].iter().for_each(|name| delete(server, name));
    });
}

#[test]
fn gr_22_a_child_that_somebody_else_writes() {
    on_a_scene(|scene| {
        let server = scene.server();
        // `disk-a` is written by the export of the scene.
        server.qmp("blockdev-add", &json!({ "driver": "raw", "node-name": "second", "file": "disk-a" }));
        server.qmp("blockdev-add", &with(null_disk("one"), &json!({ "size": DISK })));
        server.qmp("blockdev-add", &quorum("q", &["one"], 1));
        let sentence = "Permission conflict on node 'disk-a': 'write'";
        refused(server, "x-blockdev-change", &change(&json!({ "node": "second" })), sentence);
        ["q", "one", "second"].iter().for_each(|name| delete(server, name));
    });
}

#[test]
fn gr_25_a_quorum_that_cannot_agree() {
    on_a_scene(|scene| {
        let server = scene.server();
        ["one", "two"].iter().for_each(|name| drop(server.qmp("blockdev-add", &null_disk(name))));
        server.qmp("blockdev-add", &with(null_disk("small"), &json!({ "size": 512 })));
        let sizes = "the children have different sizes (1048576 and 512 bytes)";
        for (children, threshold, sentence) in [
            (&["one", "two"][..], 0, "Parameter 'vote-threshold' expects a value >= 1"),
            (&["one", "two"], -1, "Parameter 'vote-threshold' expects a value >= 1"),
            (&["one", "two"], i64::MIN, "Parameter 'vote-threshold' expects a value >= 1"),
            (&["one", "two"], 3, "threshold may not exceed children count"),
            (&["one", "two"], (1 << 32) + 2, "threshold may not exceed children count"),
            (&["one", "two"], i64::MAX, "threshold may not exceed children count"),
            (&[], 1, "Number of provided children must be 1 or more"),
            (&["one", "small"], 2, sizes),
        ] {
            refused(server, "blockdev-add", &quorum("q", children, threshold), sentence);
        }
        server.qmp("blockdev-add", &quorum("q", &["one", "two"], 2));
        refused(server, "x-blockdev-change", &change(&json!({ "node": "small" })), sizes);
        let alone = json!({ "node-name": "one", "size": 512 });
        refused(server, "block_resize", &alone, "not shared by node 'q'");
        ["q", "one", "two", "small"].iter().for_each(|name| delete(server, name));
    });
}

/// A copy that differs is told of and put right; where no two agree, the read fails and that is told.
#[test]
fn gr_25_copies_that_differ_are_told_of() {
    on_a_scene(|scene| {
        let copies = [("one", 1), ("two", 9), ("three", 1)];
        let paths = copies.map(|(name, fill)| image(scene, name, 1 << 20, fill));
        let (control, socket) = (scene.server().dir().join("control.sock"), scene.server().dir().join("q.sock"));
        let server = scene.server();
        copies.iter().zip(&paths).for_each(|((name, _), path)| drop(server.qmp("blockdev-add", &file(name, path))));
        let rewrite = json!({ "rewrite-corrupted": true });
        server.qmp("blockdev-add", &with(quorum("q", &["one", "two", "three"], 2), &rewrite));
        server.qmp("block-export-add", &with(export("q", "q", &socket), &json!({ "writable": true })));
        let mut reader = Qmp::connect(&control);
        let mut client = Client::start(&socket, &Setup::default());
        assert_eq!(client.read(0, 0, 4096).1, [1; 4096]);
        let two = json!({ "type": "read", "node-name": "two", "sector-num": 0, "sectors-count": 8 });
        assert_eq!(reader.event("QUORUM_REPORT_BAD"), two);
        let stored = fs::read(&paths[1]).unwrap();
        assert!(stored[..4096].iter().all(|byte| *byte == 1) && stored[4096..].iter().all(|byte| *byte == 9));
        File::options().write(true).open(&paths[0]).unwrap().write_all_at(&[7; 512], 8192).unwrap();
        assert_eq!(client.read(0, 16, 512).0, IOERR);
        let failure = json!({ "reference": "q", "sector-num": 16, "sectors-count": 1 });
        assert_eq!(reader.event("QUORUM_FAILURE"), failure);
        // Written anew, it is one again.
        assert_eq!(client.write(0, 16, &[3; 512]), OK_WRITE);
        assert_eq!(client.read(0, 16, 512).1, [3; 512]);
        drop((client, reader));
        server.qmp("block-export-del", &json!({ "id": "q", "mode": "hard" }));
        ["q", "one", "two", "three"].iter().for_each(|name| delete(server, name));
    });
}

/// No request of a guest fails while copies of its disk come and go, and none is lost.
#[test]
fn gr_25_copies_come_and_go_under_a_guest() {
    on_a_scene(|scene| {
        let names = ["one", "two", "three"];
        let paths = names.map(|name| image(scene, name, 1 << 20, 0));
        let socket = scene.server().dir().join("q.sock");
        let server = scene.server();
        names.iter().zip(&paths).for_each(|(name, path)| drop(server.qmp("blockdev-add", &file(name, path))));
        server.qmp("blockdev-add", &quorum("q", &["one", "two"], 2));
        server.qmp("block-export-add", &with(export("q", "q", &socket), &json!({ "writable": true })));
        let mut client = Client::start(&socket, &Setup::default());
        let over = AtomicBool::new(false);
        let mut rounds = 0;
        std::thread::scope(|scope| {
            let changes = scope.spawn(|| {
                let mut count = 0;
                while !over.load(Ordering::Relaxed) {
                    server.qmp("x-blockdev-change", &change(&json!({ "node": "three" })));
                    server.qmp("x-blockdev-change", &change(&json!({ "child": "children.2" })));
                    count += 2;
                }
                count
            });
            let end = Instant::now() + Duration::from_secs(1);
            while rounds < 20 || Instant::now() < end {
                write_32(&mut client, rounds);
                rounds += 1;
            }
            over.store(true, Ordering::Relaxed);
            assert!(changes.join().unwrap() >= 4, "hardly a child came or went");
        });
        drop(client);
        for path in &paths[..2] {
            let stored = fs::read(path).unwrap();
            for number in 0..32_usize {
                let block = &stored[number * 4096..][..4096];
                assert!(block.iter().all(|byte| *byte == pattern(rounds - 1, number as u64)), "block {number} is lost");
            }
        }
        server.qmp("block-export-del", &json!({ "id": "q", "mode": "hard" }));
        ["q", "one", "two", "three"].iter().for_each(|name| delete(server, name));
    });
}

// ---- exports -------------------------------------------------------------------------------------------------------

#[test]
fn gr_28_an_export_of_an_unknown_node_or_under_a_taken_id() {
    on_a_scene(|scene| {
        let server = scene.server();
        let socket = server.dir().join("x.sock");
        let unknown = "Cannot find device='' nor node-name='unknown'";
        refused(server, "block-export-add", &export("x", "unknown", &socket), unknown);
        refused(server, "block-export-add", &export("a", "disk-b", &socket), "Block export id 'a' is already in use");
        for id in ["", "0x", "a/b", "a b"] {
            refused(server, "block-export-add", &export(id, "disk-b", &socket), "Invalid block export id");
        }
        assert!(!socket.exists(), "a refused export leaves a socket");
    });
}

#[test]
fn gr_29_a_socket_where_none_can_be() {
    on_a_scene(|scene| {
        let precious = image(scene, "precious", 4096, 7);
        let server = scene.server();
        let dir = server.dir().to_owned();
        let link = dir.join("link");
        symlink(&precious, &link).unwrap();
        for (path, sentence) in [
            (dir.join("x".repeat(200)), "107 is the limit"),
            (precious.clone(), "is not a socket"),
            (link.clone(), "is not a socket"),
            (dir.clone(), "is not a socket"),
            (dir.join("missing/x.sock"), "No such file or directory"),
            (server.socket("b"), "another process listens there"),
        ] {
            refused(server, "block-export-add", &export("x", "disk-b", &path), sentence);
        }
        assert_eq!(fs::read(&precious).unwrap(), vec![7; 4096]);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    });
}

#[test]
fn gr_30_queues_and_blocks_that_no_device_has() {
    on_a_scene(|scene| {
        let server = scene.server();
        let socket = server.dir().join("x.sock");
        for (name, values) in [
            ("num-queues", &[json!(0), json!(257), json!(65_535), json!(65_536), json!(-1), json!("1")][..]),
            ("logical-block-size", &[0, 3, 256, 513, 1 << 22, -512, 1 << 40].map(|size: i64| json!(size))),
        ] {
            for value in values {
                let arguments = with(export("x", "disk-b", &socket), &json!({ name: value }));
                refused(server, "block-export-add", &arguments, name);
            }
        }
        assert!(!socket.exists(), "a refused export leaves a socket");
    });
}

#[test]
fn gr_30_blocks_of_more_than_a_cluster() {
    on_a_scene(|scene| {
        let path = scene.server().dir().join("small.qcow2");
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"]).arg(&path).arg("1M");
        assert!(make.status().expect("qemu-img is installed (qemu-utils)").success());
        let server = scene.server();
        let file = json!({ "driver": "file", "filename": path });
        server.qmp("blockdev-add", &json!({ "driver": "qcow2", "node-name": "x", "file": file }));
        let socket = server.dir().join("x.sock");
        let blocks = json!({ "writable": true, "logical-block-size": 4096 });
        server.qmp("block-export-add", &with(export("x", "x", &socket), &blocks));
        let mut client = Client::start(&socket, &Setup::default());
        assert_eq!(client.write(0, 8, &[0x5a; 4096]), OK_WRITE);
        assert_eq!(client.read(0, 8, 4096).1, [0x5a; 4096]);
        assert_eq!(client.read(0, 16, 4096).1, [0; 4096]);
        assert_eq!(client.write(0, 9, &[1; 512]), IOERR, "less than a block");
        drop(client);
        server.qmp("block-export-del", &json!({ "id": "x", "mode": "hard" }));
        delete(server, "x");
    });
}

#[test]
fn gr_31_an_address_that_is_no_local_socket() {
    on_a_scene(|scene| {
        let server = scene.server();
        for (address, sentence) in [
            (json!({ "type": "inet", "host": "127.0.0.1", "port": "0" }), "'unix' and 'fd'"),
            (json!({ "type": "vsock", "cid": "2", "port": "1" }), "'unix' and 'fd'"),
            (json!({ "type": "fd", "str": "999" }), "999"),
            (json!({ "type": "fd", "str": "0" }), "0"),
            (json!({ "type": "fd", "str": "-1" }), "-1"),
            (json!({ "type": "unix" }), "path"),
            (json!({ "type": "pigeon" }), "pigeon"),
            (json!("x.sock"), "addr"),
        ] {
            let arguments = with(export("x", "disk-b", Path::new("x")), &json!({ "addr": address }));
            refused(server, "block-export-add", &arguments, sentence);
        }
    });
}

#[test]
fn gr_32_a_writable_export_of_a_read_only_node() {
    on_a_scene(|scene| {
        let path = image(scene, "x.img", 4096, 0);
        let server = scene.server();
        let socket = server.dir().join("x.sock");
        server.qmp("blockdev-add", &with(file("ro", &path), &json!({ "read-only": true })));
        // A node that is writable over one that is not.
        refused(
            server,
            "block-export-add",
            &with(export("x", "ro", &socket), &json!({ "writable": true })),
            "Cannot export read-only node as writable",
        );
        server.qmp("blockdev-add", &json!({ "driver": "raw", "node-name": "over", "file": "ro" }));
        let over = with(export("x", "over", &socket), &json!({ "writable": true }));
        refused(server, "block-export-add", &over, "read-only");
        assert!(!socket.exists(), "a refused export leaves a socket");
        ["over", "ro"].iter().for_each(|name| delete(server, name));
    });
}

#[test]
fn gr_32_two_writable_exports_of_one_node() {
    on_a_scene(|scene| {
        let socket = scene.server().dir().join("x.sock");
        let second = with(export("x", "disk-a", &socket), &json!({ "writable": true }));
        scene.server().qmp("block-export-add", &second);
        let (mut one, mut two) = (scene.client(), Client::start(&socket, &Setup::default()));
        assert_eq!(one.write(0, 0, &[1; 512]), OK_WRITE);
        assert_eq!(two.write(0, 1, &[2; 512]), OK_WRITE);
        assert_eq!(two.read(0, 0, 512).1, [1; 512]);
        assert_eq!(one.read(0, 1, 512).1, [2; 512]);
        drop((one, two));
        scene.server().qmp("block-export-del", &json!({ "id": "x", "mode": "hard" }));
    });
}

#[test]
fn gr_32_two_writable_exports_of_two_daemons() {
    on_a_scene(|scene| {
        let path = scene.server().image("disk-a");
        let other = Watched::builder().start();
        other.qmp("blockdev-add", &file("x", &path));
        let socket = other.socket("x");
        other.qmp("block-export-add", &with(export("x", "x", &socket), &json!({ "writable": true })));
        let (mut ours, mut theirs) = (scene.client(), Client::start(&socket, &Setup::default()));
        assert_eq!(theirs.write(0, 0, &[1; 512]), OK_WRITE);
        assert_eq!(ours.read(0, 0, 512).1, [1; 512]);
    });
}

#[test]
fn gr_33_removing_an_export_with_a_guest() {
    on_a_scene(|scene| {
        let mut client = scene.client();
        let server = scene.server();
        refused(server, "block-export-del", &json!({ "id": "a" }), "still in use");
        refused(server, "block-export-del", &json!({ "id": "a", "mode": "safe" }), "still in use");
        refused(server, "block-export-del", &json!({ "id": "a", "mode": "harder" }), "harder");
        refused(server, "block-export-del", &json!({ "id": "unknown" }), "Export 'unknown' is not found");
        assert_eq!(client.read(0, 0, 512).0.status, status::OK, "the guest notices");
    });
}

#[test]
fn gr_33_removing_an_export_hard_with_requests_in_flight() {
    let mut scene = Scene::slow();
    let before = Baseline::of(scene.server());
    let mut monitor = Qmp::connect(&scene.server().dir().join("control.sock"));
    let mut client = scene.client();
    let begun = Instant::now();
    submit_reads(&mut client, 0, 32);
    pause(SLOW / 6);
    scene.server().qmp("block-export-del", &json!({ "id": "a", "mode": "hard" }));
    assert!(begun.elapsed() >= SLOW, "it took only {:?}: it did not wait", begun.elapsed());
    (0..32).for_each(|_| _ = client.used(0));
    expect_all_ok(&client, 32);
    assert!(hung_up_within(std::os::fd::AsFd::as_fd(client.wire().stream()), SLOW), "the guest is still connected");
    monitor.ask(&json!({ "execute": "query-version" }));
    let events = monitor.take_events();
    let gone = events.iter().find(|event| event["event"] == "BLOCK_EXPORT_DELETED");
    assert_eq!(gone.unwrap()["data"], json!({ "id": "a" }));
    let socket = scene.socket();
    assert!(!socket.exists(), "the socket is left");
    drop((client, monitor));
    // Its id and its path are free again.
    let again = with(export("a", "disk-a", &socket), &json!({ "writable": true, "num-queues": 2 }));
    scene.server().qmp("block-export-add", &again);
    let exports = scene.server().qmp("query-block-exports", &json!({}));
    assert_eq!(exports.as_array().unwrap().len(), before.exports.as_array().unwrap().len());
    scene.still_good();
}

#[test]
fn gr_34_a_socket_that_a_killed_daemon_left() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("left.sock");
    let started = || {
        let options = format!("vhost-user-blk,id=x,node-name=n,addr.type=unix,addr.path={}", socket.display());
        Watched::builder().arg("--blockdev", "null-co,node-name=n").arg("--export", &options).start()
    };
    let first = started();
    let other = Watched::builder().arg("--blockdev", "null-co,node-name=n").start();
    let before = fs::symlink_metadata(&socket).unwrap().ino();
    refused(&other, "block-export-add", &export("x", "n", &socket), "another process listens there");
    assert_eq!(fs::symlink_metadata(&socket).unwrap().ino(), before, "the socket of a running daemon is taken away");
    Client::start(&socket, &Setup::default());
    // It is killed, as by SIGKILL.
    drop(first);
    assert!(fs::symlink_metadata(&socket).unwrap().file_type().is_socket(), "it left nothing, so nothing is tested");
    other.qmp("block-export-add", &export("x", "n", &socket));
    Client::start(&socket, &Setup::default());
    other.qmp("block-export-del", &json!({ "id": "x", "mode": "hard" }));
    assert!(!socket.exists());
    expect_good_command(&other);
}

#[test]
fn gr_34_a_socket_that_another_user_left() {
    on_a_scene(|scene| {
        let server = scene.server();
        let socket = server.dir().join("theirs.sock");
        drop(UnixListener::bind(&socket).unwrap());
        let nobody = std::os::unix::fs::chown(&socket, Some(65_534), None);
        nobody.expect("only root can give a socket away: this test needs it, as a container's user has it");
        refused(server, "block-export-add", &export("x", "disk-b", &socket), "belongs to somebody else");
        assert!(socket.exists(), "somebody else's socket is removed");
    });
}

// ---- what an image says about itself -------------------------------------------------------------------------------

#[test]
fn gr_46_names_in_an_image_are_not_followed() {
    on_a_scene(|scene| {
        let secret = image(scene, "secret.img", 1 << 20, 0x42);
        let path = qcow2(scene, Some(&secret));
        let header = fs::read(&path).unwrap();
        assert!(header.starts_with(b"QFI\xfb"));
        let server = scene.server();
        let raw = json!({ "driver": "raw", "node-name": "x", "file": file("below", &path) });
        for option in ["backing", "data-file"] {
            let named = with(raw.clone(), &json!({ option: "disk-a" }));
            refused(server, "blockdev-add", &named, &format!("Parameter '{option}' is unexpected"));
        }
        let named = json!({ "driver": "qcow2", "node-name": "x", "file": file("below", &path) });
        refused(server, "blockdev-add", &named, "secret.img");
        server.qmp("blockdev-add", &raw);
        assert_eq!(size_of(server, "x"), header.len().next_multiple_of(512) as u64);
        let open = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
        let opened = open.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        assert!(!opened.into_iter().any(|to| to == secret), "the image's backing file is open");
        delete(server, "x");
    });
}

/// A guest can write any header; it stays its data.
#[test]
fn gr_46_a_header_that_a_guest_writes() {
    on_a_scene(|scene| {
        let path = scene.server().image("disk-a");
        let mut client = scene.client();
        let mut header = b"QFI\xfb\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x0b".to_vec();
        header.resize(256, 0);
        header.extend(b"/etc/passwd");
        header.resize(512, 0);
        assert_eq!(client.write(0, 0, &header), OK_WRITE);
        let same = json!({ "options": [with(file("disk-a", &path), &json!({ "discard": "unmap" }))] });
        scene.server().qmp("blockdev-reopen", &same);
        assert_eq!(size_of(scene.server(), "disk-a"), DISK);
        assert_eq!(client.read(0, 0, 512).1, header);
        drop(client);
        let mut stored = [0; 512];
        File::open(&path).unwrap().read_exact_at(&mut stored, 0).unwrap();
        assert_eq!(stored, header[..]);
    });
}

// ---- the monitor ---------------------------------------------------------------------------------------------------

/// Clients that add, remove, change and export the same few nodes at once. Most commands are refused, in every order.
/// Not on a scene: each of so many exports has its line in the log.
#[test]
fn qmp_23_clients_that_change_the_same_nodes() {
    let server = Watched::builder().image("disk", DISK, "").export("e", "disk", ",writable=on").start();
    let before = Baseline::of(&server);
    let dir = server.dir().to_owned();
    let image = dir.join("x.img");
    fs::write(&image, [0; 1 << 20]).unwrap();
    let mut guest = Client::start(&server.socket("e"), &Setup::default());
    let end = Instant::now() + Duration::from_secs(repeats(2, 30) as u64);
    std::thread::scope(|scope| {
        let run = |seed| meddle(Meddler { dir: &dir, image: &image, state: seed }, end);
        let clients: Vec<_> = (1..=4).map(|seed| scope.spawn(move || run(seed))).collect();
        while Instant::now() < end {
            assert_eq!(guest.write(0, 0, &[1; 4096]), OK_WRITE, "a guest of another node");
        }
        let done: Vec<_> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        assert!(done.iter().all(|done| *done >= 50), "commands that went well: {done:?}");
    });
    drop(guest);
    clean_up(&server);
    expect_same(&server, &before);
    expect_good_command(&server);
}

/// One client with random commands; how many of them went well.
fn meddle(mut client: Meddler<'_>, end: Instant) -> usize {
    let mut monitor = Qmp::connect(&client.dir.join("control.sock"));
    let mut done = 0;
    while Instant::now() < end {
        let (command, arguments) = client.command();
        let reply = monitor.ask(&json!({ "execute": command, "arguments": arguments }));
        monitor.take_events();
        done += usize::from(reply.get("return").is_some());
    }
    done
}

/// Makes up commands about nodes `f`, `g` (one file), `n` (a slow null disk) and `r`, `s` (raw nodes over them).
struct Meddler<'a> {
    dir: &'a Path,
    image: &'a Path,
    state: u64,
}

impl Meddler<'_> {
    fn command(&mut self) -> (&'static str, Value) {
        let node = self.one_of(&["f", "g", "n", "r", "s"]);
        let id = self.one_of(&["x", "y"]);
        match self.below(9) {
            0..3 => ("blockdev-add", self.options(node)),
            3 => ("blockdev-del", json!({ "node-name": node })),
            4 => ("blockdev-reopen", json!({ "options": [self.options(node)] })),
            5 => ("block_resize", json!({ "node-name": node, "size": self.one_of(&[0, 4096, 1 << 20]) })),
            6 => {
                let socket = self.dir.join(self.one_of(&["1.sock", "2.sock"]));
                let writable = json!({ "writable": self.one_of(&[true, false]) });
                ("block-export-add", with(export(id, node, &socket), &writable))
            }
            7 => ("block-export-del", json!({ "id": id, "mode": "hard" })),
            _ => (self.one_of(&["query-named-block-nodes", "x-query-export-details", "query-blockstats"]), json!({})),
        }
    }

    fn options(&mut self, node: &str) -> Value {
        let read_only = json!({ "read-only": self.below(4) == 0 });
        let latency = json!({ "latency-ns": self.one_of(&[0, 1_000_000, 20_000_000]) });
        let own = match node {
            "f" | "g" => file(node, self.image),
            "n" => with(null_disk(node), &latency),
            _ => {
                let inline = with(null_disk("inline"), &latency);
                let below = self.one_of(&[json!("f"), json!("g"), json!("n"), json!("r"), inline]);
                let window = self.one_of(&[json!({}), json!({ "offset": 512 }), json!({ "size": 4096 })]);
                with(json!({ "driver": "raw", "node-name": node, "file": below }), &window)
            }
        };
        with(own, &read_only)
    }

    fn one_of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    /// A number below `end`; the constants are those of Knuth's MMIX generator.
    fn below(&mut self, end: usize) -> usize {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) as usize % end
    }
}

/// Removes what meddlers may have left.
fn clean_up(server: &Watched) {
    for id in ["x", "y"] {
        server.qmp_raw(&json!({ "execute": "block-export-del", "arguments": { "id": id, "mode": "hard" } }));
    }
    // Raw nodes lie on each other and on the others.
    for node in ["s", "r", "s", "n", "g", "f"] {
        server.qmp_raw(&json!({ "execute": "blockdev-del", "arguments": { "node-name": node } }));
    }
}

/// A secret is taken, and not repeated: neither where it belongs nor where it does not.
#[test]
fn qmp_24_a_secret_is_not_printed_back() {
    on_a_scene(|scene| {
        let server = scene.server();
        let secret = "correct-horse-battery-staple";
        server.qmp("object-add", &json!({ "qom-type": "secret", "id": "s0", "data": secret }));
        let said = refusal(server, "qom-get", &json!({ "path": "/objects/s0", "property": "data" }));
        assert!(!said.contains(secret), "{said}");
        for (command, arguments) in [
            ("object-add", json!({ "qom-type": "secret", "id": "s1", "data": secret, "format": "hex" })),
            ("object-add", json!({ "qom-type": "iothread", "id": "s1", "data": secret })),
            ("blockdev-add", with(null_disk("n"), &json!({ "password-secret": secret }))),
        ] {
            let said = refusal(server, command, &arguments);
            assert!(!said.contains(secret), "{said}");
        }
        for query in ["query-named-block-nodes", "query-block-exports", "query-blockstats"] {
            assert!(!server.qmp(query, &json!({})).to_string().contains(secret));
        }
        let listed = server.qmp("qom-list", &json!({ "path": "/objects/s0" }));
        assert!(!listed.to_string().contains(secret));
        server.qmp("object-del", &json!({ "id": "s0" }));
        assert!(!server.log().contains(secret), "the log has it");
    });
}

/// A disk whose file was cut off fails as fast as its guest asks. A client that never reads keeps neither that guest nor
/// another one waiting.
#[test]
fn qmp_26_a_flood_of_failures() {
    const FAILURES: u16 = 5000;
    const BATCH: u16 = 50;
    const NEIGHBOUR_READS: usize = 500;
    /// Longer than that may take anywhere.
    const PATIENCE: Duration = Duration::from_secs(20);
    on_a_scene(|scene| {
        let path = scene.server().dir().join("control.sock");
        let mute = UnixStream::connect(&path).unwrap();
        (&mute).write_all(b"{\"execute\": \"qmp_capabilities\"}").unwrap();
        let mut reader = Qmp::connect(&path);
        let image = File::options().write(true).open(scene.server().image("disk-a")).unwrap();
        image.set_len(4096).unwrap();
        let mut client = scene.client();
        let neighbour = scene.server().socket("b");
        let (floods, is_enough) = (AtomicBool::new(true), AtomicBool::new(false));
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let reads = scope.spawn(|| {
                let mut other = Client::start(&neighbour, &Setup::default());
                let mut count = 0;
                while floods.load(Ordering::Relaxed) {
                    assert_eq!(other.read(0, 0, 4096).0.status, status::OK);
                    count += 1;
                    is_enough.store(count >= NEIGHBOUR_READS, Ordering::Relaxed);
                }
                count
            });
            let mut failed = 0;
            while failed < FAILURES || (!is_enough.load(Ordering::Relaxed) && begun.elapsed() < PATIENCE) {
                submit_failing_reads(&mut client, BATCH);
                failed += BATCH;
            }
            floods.store(false, Ordering::Relaxed);
            let reads = reads.join().unwrap();
            assert!(reads >= NEIGHBOUR_READS, "{reads} reads of another disk beside {failed} failures");
        });
        reader.ask(&json!({ "execute": "query-version" }));
        let told = reader.take_events();
        let most = begun.elapsed().as_secs() as usize + 2;
        assert!((1..=most).contains(&told.len()), "{} events in {:?}", told.len(), begun.elapsed());
        assert!(told.iter().all(|event| event["event"] == "BLOCK_IO_ERROR"), "{told:?}");
        image.set_len(DISK).unwrap();
        drop((client, reader, mute));
    });
}

/// At once, and waits until each has failed.
fn submit_failing_reads(client: &mut Client, count: u16) {
    let reads: Vec<_> =
        (0..count).map(|n| client.chain(n.into(), kind::IN, SECTORS - 1, &[writable(DATA, 512)])).collect();
    let heads: Vec<u16> = (0..count).map(|n| 3 * n).collect();
    reads.iter().zip(&heads).for_each(|(chain, &head)| client.queue(0).ring.write_chain(head, chain));
    client.queue(0).ring.publish_all(&heads);
    client.kick(0);
    for _ in 0..count {
        client.used(0);
    }
    let failed = |n: u16| client.memory().byte(slot(n.into()).status) == status::IOERR;
    assert!((0..count).all(failed), "a read of what was cut off is answered");
}

/// A guest and a client that re-arms make as many events as they like; the others are told once a second.
#[test]
fn qmp_26_a_flood_of_events() {
    on_a_scene(|scene| {
        let path = scene.server().dir().join("control.sock");
        // It connects, and never reads.
        let mute = UnixStream::connect(&path).unwrap();
        (&mute).write_all(b"{\"execute\": \"qmp_capabilities\"}").unwrap();
        let mut reader = Qmp::connect(&path);
        let mut client = scene.client();
        let begun = Instant::now();
        for _ in 0..2000 {
            let arm = json!({ "node-name": "disk-a", "write-threshold": 512 });
            scene.server().qmp("block-set-write-threshold", &arm);
            assert_eq!(client.write(0, 0, &[1; 4096]), OK_WRITE);
        }
        reader.ask(&json!({ "execute": "query-version" }));
        let told = reader.take_events().len() as u64;
        let most = begun.elapsed().as_secs() + 2;
        assert!((1..=most).contains(&told), "{told} events in {:?}", begun.elapsed());
        scene.server().qmp("block-set-write-threshold", &json!({ "node-name": "disk-a", "write-threshold": 0 }));
        drop((client, reader, mute));
    });
}
