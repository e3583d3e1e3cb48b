//! `file` and `host_device` where they differ from other drivers: what is opened and what is refused, locks with QEMU
//! as the other party, flushes that fail, reopen.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
mod bench;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;

use bench::{
    Failing, Loop, READER, add, attach, enter, file, flush, image, io_thread, on, range, read, reopen, with, write,
    writer,
};
use block_core::base::IoError;
use block_core::drivers::protocol::file::{CreateOptions, create};
use block_core::graph::{DirectRequest, Graph, Passed, PermSet, Perms, Preallocation, RingEntry, Settled, WriteFlags};
use block_core::port::Port;
use block_core::rt::fault::{Fault, Faults, Plan};
use block_core::rt::{Engine, IoBuf, run_control};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use serde_json::{Value, json};

fn graph() -> Rc<Graph> {
    Graph::new(Arc::new(|_| ()))
}

const FLAGS: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };

// ---- what is opened (hostile inputs GR-04 to GR-08) -------------------------------------------------------------

async fn refused(driver: &str, path: &str) -> String {
    let graph = graph();
    let error = add(&graph, json!({ "driver": driver, "node-name": "n", "filename": path })).await.unwrap_err();
    assert!(graph.nodes().is_empty());
    error
}

#[test]
fn what_cannot_be_opened_is_said_in_qemus_words() {
    let dir = tempfile::tempdir().unwrap();
    let here = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (missing, looped, long) = (here("missing"), here("loop"), here(&"x".repeat(5000)));
    symlink(&looped, &looped).unwrap();
    run_control(async |_| {
        assert_eq!(refused("file", &missing).await, format!("Could not open '{missing}': No such file or directory"));
        assert_eq!(refused("file", "/tmp").await, "Could not open '/tmp': Is a directory");
        assert!(refused("file", &looped).await.ends_with("Too many levels of symbolic links"));
        assert!(refused("file", &long).await.ends_with("File name too long"));
        assert!(refused("file", "a\0b").await.contains("NUL"));
        assert!(refused("file", "").await.ends_with("No such file or directory"));
        for protocol in
            ["json:{\"driver\":\"null-co\"}", "nbd://localhost/x", "host:path", "fat:rw:/tmp", "file:/tmp/x"]
        {
            assert!(refused("file", protocol).await.ends_with("No such file or directory"), "{protocol}");
        }
    });
}

#[test]
fn only_files_and_devices_are_images() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let regular = image(dir.path(), "x.img", 4096, 0);
    let device = Loop::over(&regular);
    run_control(async |_| {
        let made_up =
            ["/proc/self/mem", "/proc/self/maps", "/sys/kernel/uevent_seqnum", "/dev/mem", "/dev/null", "/dev/tty"];
        let special = [fifo.to_str().unwrap(), socket.to_str().unwrap(), &device.path];
        for path in made_up.into_iter().chain(special) {
            let expected = format!("'file' driver requires '{path}' to be a regular file");
            let error = refused("file", path).await;
            // Not every machine has every one of them.
            assert!(error == expected || error.ends_with("No such file or directory"), "{error}");
        }
        for path in ["/dev/null", &regular, fifo.to_str().unwrap()] {
            let error = refused("host_device", path).await;
            assert_eq!(error, format!("'host_device' driver requires '{path}' to be a block device"));
        }
    });
}

#[test]
fn a_file_is_found_through_a_link_and_under_any_name() {
    let dir = tempfile::tempdir().unwrap();
    image(dir.path(), "nbd:odd", 4096, 7);
    let link = dir.path().join("link");
    symlink(dir.path().join("nbd:odd"), &link).unwrap();
    run_control(async |_| {
        let graph = graph();
        add(&graph, file("direct", dir.path().join("nbd:odd").to_str().unwrap())).await.unwrap();
        add(&graph, file("linked", link.to_str().unwrap())).await.unwrap();
    });
}

#[test]
fn options_without_effect_are_taken_and_wrong_ones_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 4096, 0);
    run_control(async |_| {
        let graph = graph();
        let taken = json!({ "aio-max-batch": 16, "drop-cache": false, "x-check-cache-dropped": true, "locking": "on" });
        add(&graph, with(file("taken", &path), &taken)).await.unwrap();
        for (wrong, reason) in [
            (json!({ "aio": "native" }), "aio=native was specified, but it requires cache.direct=on"),
            (json!({ "pr-manager": "pr0" }), "Parameter 'pr-manager' is not supported yet"),
            (json!({ "aio-max-batch": -1 }), "Parameter 'aio-max-batch' expects"),
            (json!({ "aio": "posix" }), "Parameter 'aio' does not accept value 'posix'"),
            (json!({ "size": 1 }), "Parameter 'size' is unexpected"),
            (json!({ "force-share": true }), "force-share=on can only be used with read-only images"),
        ] {
            let error = add(&graph, with(file("wrong", &path), &wrong)).await.unwrap_err();
            assert!(error.starts_with(reason), "{error}");
        }
    });
}

// ---- read-only and auto-read-only -------------------------------------------------------------------------------

/// A file that nobody can write to, root neither.
struct Immutable(File);

impl Immutable {
    fn new(path: &str) -> Self {
        let file = File::open(path).unwrap();
        ioctl_setflags(&file, ioctl_getflags(&file).unwrap() | IFlags::IMMUTABLE)
            .expect("needs root and ext4 or the like");
        Self(file)
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        let flags = ioctl_getflags(&self.0).unwrap();
        ioctl_setflags(&self.0, flags.difference(IFlags::IMMUTABLE)).unwrap();
    }
}

#[test]
fn a_node_that_may_turns_read_only_with_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 4096, 7);
    let _held = Immutable::new(&path);
    run_control(async |_| {
        let graph = graph();
        let error = add(&graph, file("rw", &path)).await.unwrap_err();
        assert_eq!(error, format!("Could not open '{path}': Operation not permitted"));
        let auto = json!({ "auto-read-only": true });
        let node = add(&graph, with(file("auto", &path), &auto)).await.unwrap();
        assert!(graph.node(node).unwrap().options.read_only);
        let error = attach(&graph, node, writer()).await.err().unwrap();
        assert!(error.contains("read-only"), "{error}");
        let raw = json!({ "driver": "raw", "node-name": "raw", "auto-read-only": true,
                          "file": { "driver": "file", "filename": path } });
        let raw = add(&graph, raw).await.unwrap();
        assert!(graph.node(raw).unwrap().options.read_only);
        // GR-18: read-only to read-write is refused, and the other half of the list is taken back.
        let wanted = json!({ "read-only": false });
        let other = image(dir.path(), "other.img", 4096, 0);
        let other_node = add(&graph, file("other", &other)).await.unwrap();
        let list = [with(file("other", &other), &json!({ "read-only": true })), with(file("auto", &path), &wanted)];
        let error = reopen(&graph, &list).await.unwrap_err();
        assert_eq!(error, format!("Could not reopen '{path}': Operation not permitted"));
        assert!(!graph.node(other_node).unwrap().options.read_only);
    });
}

// ---- locks: QEMU as the other party (D26, GR-13, GR-15) --------------------------------------------------------

/// `qemu-io` with the image open, until dropped.
struct QemuIo(Child);

impl QemuIo {
    fn open(path: &str, more: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(more)
            .args(["-f", "raw", path])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-io is installed (qemu-utils)");
        // It has the image, and its locks, when it answers.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("MiB") || line.contains("KiB"), "qemu-io said: {line}");
        Self(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

/// What QEMU says when it opens the image; `None`: it does.
fn qemu_refuses(path: &str, more: &[&str]) -> Option<String> {
    let tried = Command::new("qemu-io").args(more).args(["-f", "raw", "-c", "length", path]).output().unwrap();
    (!tried.status.success()).then(|| String::from_utf8_lossy(&tried.stderr).into_owned())
}

fn sole_reader() -> Perms {
    Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::CONSISTENT_READ }
}

async fn user(graph: &Rc<Graph>, path: &str, perms: Perms, more: &Value) -> Result<Port, String> {
    let name = format!("n{}", graph.nodes().len());
    let node = add(graph, with(file(&name, path), more)).await?;
    attach(graph, node, perms).await
}

#[test]
fn qemu_is_kept_off_our_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    run_control(async |_| {
        let graph = graph();
        let none = json!({});
        let port = user(&graph, &path, writer(), &none).await.unwrap();
        let error = qemu_refuses(&path, &[]).expect("two writers");
        assert!(error.contains("Failed to get \"write\" lock"), "{error}");
        assert_eq!(qemu_refuses(&path, &["-r"]), None, "a writer that bears readers");
        port.detach(&mut graph.permit()).await;
        assert_eq!(qemu_refuses(&path, &[]), None, "a node that nobody uses is no obstacle");
        let port = user(&graph, &path, sole_reader(), &json!({ "read-only": true })).await.unwrap();
        assert!(qemu_refuses(&path, &[]).is_some(), "a reader that bears no writer");
        assert_eq!(qemu_refuses(&path, &["-r"]), None, "two readers");
        port.detach(&mut graph.permit()).await;
        // A resize is refused too: qemu-img needs RESIZE, which a writer of ours does not bear.
        let port = user(&graph, &path, writer(), &none).await.unwrap();
        let resize = Command::new("qemu-img").args(["resize", "-f", "raw", &path, "2M"]).output().unwrap();
        assert!(!resize.status.success());
        port.detach(&mut graph.permit()).await;
    });
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
}

#[test]
fn we_keep_off_qemus_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    let none = json!({});
    let force = json!({ "read-only": true, "force-share": true });
    let inactive = json!({ "active": false });
    run_control(async |_| {
        let graph = graph();
        let writes = QemuIo::open(&path, &[]);
        let error = user(&graph, &path, writer(), &none).await.err().expect("two writers");
        let expected = format!("Failed to get shared \"write\" lock: Is another process using the image [{path}]?");
        assert_eq!(error, expected);
        assert!(user(&graph, &path, sole_reader(), &json!({ "read-only": true })).await.is_err());
        user(&graph, &path, READER, &json!({ "read-only": true })).await.unwrap();
        user(&graph, &path, sole_reader(), &force).await.unwrap();
        add(&graph, with(file("asleep", &path), &inactive)).await.unwrap();
        add(&graph, with(file("off", &path), &json!({ "locking": "off" }))).await.unwrap();
        drop(writes);
        let reads = QemuIo::open(&path, &["-r"]);
        let port = user(&graph, &path, writer(), &none).await.unwrap();
        port.detach(&mut graph.permit()).await;
        let alone = Perms { uses: PermSet::NONE, shares: PermSet::NONE };
        let error = user(&graph, &path, alone, &none).await.err().expect("it bears no reader");
        assert!(error.starts_with("Failed to get shared \"consistent read\" lock"), "{error}");
        drop(reads);
    });
}

/// Of an image whose nodes are inactive another process may be the writer; when it is, they stay so.
#[test]
fn an_inactive_image_is_free_for_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    run_control(async |local| {
        let graph = graph();
        let below = add(&graph, file("below", &path)).await.unwrap();
        let top = add(&graph, json!({ "driver": "raw", "node-name": "top", "file": "below" })).await.unwrap();
        let set = async |node, active| {
            let mut permit = graph.permit();
            let done = if active { permit.activate(node).await } else { permit.deactivate(node).await };
            done.map_err(|error| error.full())
        };
        let is_active = || [below, top].map(|node| graph.node(node).unwrap().options.active);
        let port = attach(&graph, top, writer()).await.unwrap();
        for (node, error) in [
            (Some(below), "Node has active parent node"),
            (Some(top), "Failed to inactivate node: Operation not permitted while test writes"),
            (None, "Failed to inactivate all nodes: Operation not permitted while test writes"),
        ] {
            assert_eq!(set(node, false).await.unwrap_err(), error);
            assert_eq!(is_active(), [true; 2], "{error}");
        }
        assert!(qemu_refuses(&path, &[]).is_some());
        port.detach(&mut graph.permit()).await;
        // Who only reads may stay, and bears that others write.
        let port = attach(&graph, top, READER).await.unwrap();
        let lane = port.handle().lane(&local);
        set(Some(top), false).await.unwrap();
        assert_eq!(is_active(), [false; 2], "what only it stands on goes with it");
        assert_eq!(read(&lane, range(0, 512)).await.unwrap(), [0; 512]);
        let error = attach(&graph, top, writer()).await.err().unwrap();
        assert_eq!(error, "Block node 'top' is inactive");
        let writes = QemuIo::open(&path, &[]);
        drop(writes);
        set(Some(top), true).await.unwrap();
        assert_eq!(is_active(), [true; 2]);
        drop(lane);
        port.detach(&mut graph.permit()).await;
        let port = attach(&graph, top, writer()).await.unwrap();
        assert!(qemu_refuses(&path, &[]).is_some(), "it is locked again");
        port.detach(&mut graph.permit()).await;
        // Whoever has the image as a writer keeps out a node that wants to be the only one.
        let alone = Perms { shares: PermSet::CONSISTENT_READ, ..READER };
        let port = attach(&graph, top, alone).await.unwrap();
        set(None, false).await.unwrap();
        let writes = QemuIo::open(&path, &[]);
        let error = set(None, true).await.unwrap_err();
        assert!(error.starts_with("Failed to get shared \"write\" lock"), "{error}");
        assert_eq!(is_active(), [false; 2]);
        drop(writes);
        set(None, true).await.unwrap();
        port.detach(&mut graph.permit()).await;
        // All or nothing, and nothing twice.
        for active in [false, false, true, true] {
            set(None, active).await.unwrap();
            assert_eq!(is_active(), [active; 2]);
        }
    });
}

#[test]
fn a_refused_user_leaves_no_lock() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    run_control(async |_| {
        let graph = graph();
        let reads = QemuIo::open(&path, &["-r"]);
        let alone = Perms { uses: PermSet::WRITE, shares: PermSet::NONE };
        user(&graph, &path, alone, &json!({})).await.err().expect("it bears no reader");
        drop(reads);
        assert_eq!(qemu_refuses(&path, &[]), None);
    });
}

#[test]
fn one_file_under_two_names_is_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    let other = dir.path().join("other.img");
    fs::hard_link(&path, &other).unwrap();
    let other = other.to_str().unwrap();
    run_control(async |_| {
        let graph = graph();
        let port = user(&graph, &path, writer(), &json!({})).await.unwrap();
        let error = user(&graph, other, writer(), &json!({})).await.err().expect("two writers");
        assert!(error.starts_with("Failed to get"), "{error}");
        port.detach(&mut graph.permit()).await;
        let (one, two) = (user(&graph, &path, READER, &json!({})).await, user(&graph, other, READER, &json!({})).await);
        assert!(one.is_ok() && two.is_ok(), "two readers are fine");
    });
}

#[test]
fn a_removed_node_lets_go_before_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    run_control(async |_| {
        let graph = graph();
        for round in 0..20 {
            let node = add(&graph, file("n", &path)).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            port.detach(&mut graph.permit()).await;
            graph.permit().remove(node).await.unwrap();
            let locks = fs::read_to_string("/proc/locks").unwrap();
            let inode = format!(":{} ", std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap()));
            assert!(!locks.contains(&inode), "round {round}: {locks}");
            assert_eq!(open_descriptors(&path), 0, "round {round}");
        }
    });
}

fn open_descriptors(path: &str) -> usize {
    let all = fs::read_dir("/proc/self/fd").unwrap();
    all.filter(|entry| fs::read_link(entry.as_ref().unwrap().path()).is_ok_and(|to| to == Path::new(path))).count()
}

#[test]
fn an_open_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 4096, 0);
    run_control(async |_| {
        let graph = graph();
        // The file opens; the window over it does not fit.
        let tree = json!({ "driver": "raw", "node-name": "raw", "offset": 8192,
                           "file": { "driver": "file", "node-name": "below", "filename": path } });
        let error = add(&graph, tree).await.unwrap_err();
        assert!(error.starts_with("Offset (8192) cannot be greater"), "{error}");
        assert!(graph.nodes().is_empty());
        assert_eq!(open_descriptors(&path), 0);
    });
}

// ---- reopen -----------------------------------------------------------------------------------------------------

#[test]
fn reopen_changes_what_can_change_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 7);
    run_control(async |_| {
        let graph = graph();
        let node = add(&graph, file("n", &path)).await.unwrap();
        let tries = [
            (json!({ "filename": "/dev/null" }), "Cannot change the option 'filename'"),
            (json!({ "aio": "native" }), "aio=native was specified"),
            (json!({ "driver": "null-co" }), "Parameter 'filename' is unexpected"),
        ];
        for (wrong, reason) in tries {
            let options = with(file("n", &path), &wrong);
            let error = match qmp::schema::from_value(options) {
                Ok(options) => {
                    block_core::catalog::reopen(&mut graph.permit(), vec![options]).await.unwrap_err().full()
                }
                Err(error) => error.desc,
            };
            assert!(error.starts_with(reason), "{error}");
        }
        let error = reopen(&graph, &[json!({ "driver": "null-co", "node-name": "n" })]).await.unwrap_err();
        assert_eq!(error, "Cannot change the option 'driver'");
        for more in [json!({ "read-only": true }), json!({ "aio": "io_uring", "cache": { "direct": true } }), json!({})]
        {
            reopen(&graph, &[with(file("n", &path), &more)]).await.unwrap();
            let options = graph.node(node).unwrap().options;
            assert_eq!(options.read_only, more.get("read-only").is_some());
            assert_eq!(options.direct, more.get("cache").is_some(), "what is left out goes back to its default");
            let port = attach(&graph, node, READER).await.unwrap();
            let bytes = on(&io_thread(), &port.handle(), async |lane| read(&lane, range(0, 512)).await).await.unwrap();
            assert_eq!(bytes, [7; 512]);
            port.detach(&mut graph.permit()).await;
        }
    });
}

#[test]
fn a_replaced_file_is_kept_and_its_reopen_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 4096, 7);
    run_control(async |_| {
        let graph = graph();
        let node = add(&graph, file("n", &path)).await.unwrap();
        fs::rename(image(dir.path(), "new.img", 4096, 9), &path).unwrap();
        let error = reopen(&graph, &[file("n", &path)]).await.unwrap_err();
        assert_eq!(error, format!("Could not reopen '{path}': the name leads to another file now"));
        let port = attach(&graph, node, READER).await.unwrap();
        let bytes = on(&io_thread(), &port.handle(), async |lane| read(&lane, range(0, 512)).await).await.unwrap();
        assert_eq!(bytes, [7; 512]);
    });
}

#[test]
fn locks_come_and_go_with_force_share() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    run_control(async |_| {
        let graph = graph();
        let shared = with(file("n", &path), &json!({ "read-only": true, "force-share": true }));
        let strict = with(file("n", &path), &json!({ "read-only": true }));
        let node = add(&graph, shared.clone()).await.unwrap();
        let port = attach(&graph, node, sole_reader()).await.unwrap();
        let writes = QemuIo::open(&path, &[]);
        let error = reopen(&graph, std::slice::from_ref(&strict)).await.unwrap_err();
        assert!(error.starts_with("Failed to get shared \"write\" lock"), "{error}");
        assert!(graph.node(node).unwrap().options.force_share);
        drop(writes);
        reopen(&graph, &[strict]).await.unwrap();
        assert!(qemu_refuses(&path, &[]).is_some());
        reopen(&graph, &[shared]).await.unwrap();
        assert_eq!(qemu_refuses(&path, &[]), None);
        port.detach(&mut graph.permit()).await;
    });
}

/// A file system that could not lock when the image was opened is asked again by who insists.
#[test]
fn a_reopen_that_insists_on_locks_gets_them_or_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    let faults = Faults::default();
    let _entered = faults.enter();
    run_control(async |_| {
        let on = with(file("n", &path), &json!({ "locking": "on" }));
        let mut unlocked = 0;
        for nth in 1..100 {
            let graph = graph();
            let node = add(&graph, file("n", &path)).await.unwrap();
            faults.arm(Plan { nth, fault: Fault::Errno(libc::ENOLCK), lasting: false });
            let port = attach(&graph, node, sole_reader()).await.unwrap();
            if faults.disarm().is_empty() {
                break;
            }
            unlocked += 1;
            assert_eq!(qemu_refuses(&path, &[]), None);
            faults.arm(Plan { nth: 1, fault: Fault::Errno(libc::ENOLCK), lasting: true });
            reopen(&graph, std::slice::from_ref(&on)).await.unwrap_err();
            faults.disarm();
            reopen(&graph, std::slice::from_ref(&on)).await.unwrap();
            assert!(qemu_refuses(&path, &[]).is_some(), "call {nth}");
            port.detach(&mut graph.permit()).await;
        }
        assert!(unlocked > 1, "each of some calls failed");
    });
}

// ---- flushes that fail (D21) ------------------------------------------------------------------------------------

#[test]
fn after_a_flush_that_failed_all_fail_until_a_reopen() {
    for aio in ["threads", "io_uring"] {
        let failing = Failing::new();
        let options = json!({ "driver": "host_device", "node-name": "n", "filename": failing.device.path, "aio": aio });
        run_control(async |_| {
            let graph = graph();
            let node = add(&graph, options.clone()).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            let thread = io_thread();
            on(&thread, &port.handle(), async |lane| {
                write(&lane, 0, &[1; 4096], FLAGS).await.unwrap();
                flush(&lane).await.unwrap();
            })
            .await;
            failing.fail();
            on(&thread, &port.handle(), async |lane| {
                // It gets as far as the page cache.
                write(&lane, 0, &[2; 4096], FLAGS).await.unwrap();
                let failed = flush(&lane).await;
                assert!(matches!(failed, Err(IoError::Os(_))), "{failed:?}");
                for _ in 0..3 {
                    assert_eq!(flush(&lane).await, Err(IoError::FlushLatched));
                }
            })
            .await;
            // The kernel itself would have said that all is well by now.
            rustix::fs::fdatasync(File::open(&failing.device.path).unwrap()).unwrap();
            reopen(&graph, &[options]).await.unwrap();
            on(&thread, &port.handle(), async |lane| flush(&lane).await).await.unwrap();
            port.detach(&mut graph.permit()).await;
        });
    }
}

#[test]
fn a_node_that_is_not_written_to_has_nothing_to_flush() {
    let failing = Failing::new();
    let options =
        json!({ "driver": "host_device", "node-name": "n", "filename": failing.device.path, "read-only": true });
    run_control(async |local| {
        let graph = graph();
        let node = add(&graph, options).await.unwrap();
        let port = attach(&graph, node, READER).await.unwrap();
        failing.fail();
        flush(&port.handle().lane(&local)).await.unwrap();
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
    });
}

/// Whoever has the image next would believe that it is whole: that it may not be is said once, and not forgotten.
#[test]
fn what_may_be_lost_is_said_before_the_image_is_handed_over() {
    let failing = Failing::new();
    let options = json!({ "driver": "host_device", "node-name": "n", "filename": failing.device.path });
    run_control(async |local| {
        let graph = graph();
        let node = add(&graph, options.clone()).await.unwrap();
        let top = add(&graph, json!({ "driver": "raw", "node-name": "top", "file": "n" })).await.unwrap();
        let port = attach(&graph, top, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        write(&lane, 0, &[2; 4096], FLAGS).await.unwrap();
        failing.fail();
        flush(&lane).await.unwrap_err();
        drop(lane);
        port.detach(&mut graph.permit()).await;
        let refused = graph.permit().deactivate(Some(top)).await.unwrap_err().full();
        assert!(refused.starts_with("Could not flush node 'top' before deactivating it: "), "{refused}");
        assert!(graph.node(node).unwrap().options.active && graph.node(top).unwrap().options.active);
        // Who insists has heard it.
        graph.permit().deactivate(Some(top)).await.unwrap();
        graph.permit().activate(Some(top)).await.unwrap();
        let port = attach(&graph, top, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        assert_eq!(flush(&lane).await, Err(IoError::FlushLatched));
        reopen(&graph, &[options]).await.unwrap();
        flush(&lane).await.unwrap();
        drop(lane);
        port.detach(&mut graph.permit()).await;
        graph.permit().deactivate(Some(top)).await.unwrap();
    });
}

#[test]
fn a_stable_write_that_failed_latches_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    run_control(async |local| {
        let graph = graph();
        let node = add(&graph, with(file("n", &path), &json!({ "aio": "io_uring" }))).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        let pin = enter(&lane).await;
        let request = DirectRequest { write: true, at: range(4096, 512), fua: true, memory_bits: 512 };
        let passed = lane.direct(&pin, request).unwrap();
        assert!(matches!(passed, Passed::Ring(RingEntry { offset: 4096, dsync: true, .. }, _)), "{passed:?}");
        assert_eq!(lane.settle(&pin, request, 511), Settled::Again, "a short write is sent again");
        assert_eq!(lane.settle(&pin, request, -libc::EINTR), Settled::Again);
        let not_stable = DirectRequest { fua: false, ..request };
        assert_eq!(lane.settle(&pin, not_stable, -libc::EIO), Settled::Failed(IoError::Os(libc::EIO)));
        flush(&lane).await.unwrap();
        assert_eq!(lane.settle(&pin, request, -libc::EIO), Settled::Failed(IoError::Os(libc::EIO)));
        assert_eq!(flush(&lane).await, Err(IoError::FlushLatched));
    });
}

// ---- the direct path, sizes, statistics -------------------------------------------------------------------------

#[test]
fn only_the_ring_has_a_direct_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    for (aio, direct, expected) in [
        ("threads", false, false),
        ("threads", true, false),
        ("io_uring", false, true),
        ("io_uring", true, true),
        ("native", true, true),
    ] {
        run_control(async |local| {
            let graph = graph();
            let more = json!({ "aio": aio, "cache": { "direct": direct } });
            let node = add(&graph, with(file("n", &path), &more)).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            let lane = port.handle().lane(&local);
            let pin = enter(&lane).await;
            let limits = lane.geometry(&pin).limits;
            assert!(limits.request_alignment <= 512, "this test wants a file system that takes sectors");
            assert_eq!(limits.memory_alignment > 1, direct);
            let request = DirectRequest { write: false, at: range(512, 512), fua: false, memory_bits: 4096 };
            assert_eq!(lane.direct(&pin, request).is_some(), expected, "{aio} {direct}");
            let crooked = DirectRequest { memory_bits: 4097, ..request };
            assert_eq!(lane.direct(&pin, crooked).is_some(), expected && !direct, "{aio} {direct}");
        });
    }
}

#[test]
fn small_reads_of_what_is_in_memory_are_done_at_once_and_o_direct_leaves_nothing_to_copy() {
    let (memory, disk) = (tempfile::tempdir_in("/dev/shm").unwrap(), tempfile::tempdir_in("/var/tmp").unwrap());
    for (dir, in_memory, direct) in [(&memory, true, false), (&disk, false, false), (&disk, false, true)] {
        let path = image(dir.path(), "x.img", 1 << 20, 0);
        run_control(async |local| {
            let graph = graph();
            let node =
                add(&graph, with(file("n", &path), &json!({ "aio": "io_uring", "cache": { "direct": direct } })));
            let port = attach(&graph, node.await.unwrap(), writer()).await.unwrap();
            let lane = port.handle().lane(&local);
            let pin = enter(&lane).await;
            let otherwise = if direct { Engine::Ring } else { Engine::Cached };
            for (write, len, small_read) in [(false, 65536, true), (false, 131_072, false), (true, 4096, false)] {
                let request = DirectRequest { write, at: range(0, len), fua: false, memory_bits: 4096 };
                let Passed::Ring(entry, _) = lane.direct(&pin, request).unwrap() else { panic!("no ring") };
                let expected = if in_memory && small_read { Engine::AtOnce } else { otherwise };
                assert_eq!(entry.engine, expected, "{path} {write} {len}");
            }
        });
    }
}

#[test]
fn a_device_that_grew_is_looked_at_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    let device = Loop::over(&path);
    run_control(async |_| {
        let graph = graph();
        let options = json!({ "driver": "host_device", "node-name": "n", "filename": device.path });
        let node = add(&graph, options).await.unwrap();
        let refused = async |size: u64| graph.permit().resize(node, size, Preallocation::Off).await.unwrap_err().full();
        assert_eq!(refused(2 << 20).await, "Cannot grow device files");
        assert_eq!(refused(512).await, "Cannot resize device files");
        File::options().write(true).open(&path).unwrap().set_len(2 << 20).unwrap();
        assert!(Command::new("losetup").args(["--set-capacity", &device.path]).status().unwrap().success());
        graph.permit().resize(node, 2 << 20, Preallocation::Off).await.unwrap();
        assert_eq!(graph.node(node).unwrap().geometry.size, 2 << 20);
    });
}

#[test]
fn queries_are_told_what_the_file_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 7);
    run_control(async |_| {
        let graph = graph();
        let node = add(&graph, with(file("n", &path), &json!({ "discard": "unmap" }))).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let over = json!({ "driver": "raw", "node-name": "over", "file": { "driver": "raw", "file": "n" } });
        let over = add(&graph, over).await.unwrap();
        let over = block_core::catalog::info(&graph, over).await.unwrap();
        assert_eq!((over.driver, over.filename.as_str()), ("raw", path.as_str()));
        assert!(over.allocated.unwrap() >= 1 << 20);
        let before = graph.info(node).await.unwrap();
        assert_eq!((before.driver, before.filename.as_str()), ("file", path.as_str()));
        assert!(before.allocated.unwrap() >= 1 << 20);
        assert_eq!(before.specific.unwrap(), json!({ "type": "file", "data": {} }));
        on(&io_thread(), &port.handle(), async |lane| {
            lane.discard(&enter(&lane).await, range(0, 1 << 19)).await.unwrap();
        })
        .await;
        let after = graph.info(node).await.unwrap();
        let expected =
            json!({ "driver": "file", "discard-nb-ok": 1, "discard-nb-failed": 0, "discard-bytes-ok": 1 << 19 });
        assert_eq!(after.statistics.unwrap(), expected);
        assert!(after.allocated.unwrap() <= (1 << 19) + 8192, "the space is given back");
    });
}

#[test]
fn zeroes_keep_their_space_unless_they_may_lose_it() {
    for dir in ["/tmp", "/dev/shm"] {
        let dir = tempfile::tempdir_in(dir).unwrap();
        let path = image(dir.path(), "x.img", 1 << 20, 7);
        run_control(async |_| {
            let graph = graph();
            let node = add(&graph, with(file("n", &path), &json!({ "discard": "unmap" }))).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            for may_unmap in [false, true] {
                on(&io_thread(), &port.handle(), async move |lane| {
                    let flags = WriteFlags { may_unmap, no_fallback: true, fua: true, ..FLAGS };
                    lane.write_zeroes(&enter(&lane).await, range(0, 1 << 19), flags).await.unwrap();
                    assert_eq!(read(&lane, range(0, 1 << 19)).await.unwrap(), vec![0; 1 << 19]);
                })
                .await;
                let allocated = graph.info(node).await.unwrap().allocated.unwrap();
                assert_eq!(allocated < 1 << 20, may_unmap, "{allocated} bytes in {path}");
            }
        });
    }
}

#[test]
fn created_files_are_what_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    run_control(async |_| {
        for (how, full) in [(Preallocation::Off, false), (Preallocation::Falloc, true), (Preallocation::Full, true)] {
            let path = dir.path().join(format!("{how:?}"));
            let filename = path.to_str().unwrap().to_owned();
            create(CreateOptions { filename, size: 1 << 20, preallocation: how, nocow: false, extent_size_hint: 0 })
                .await
                .unwrap();
            let stat = fs::metadata(&path).unwrap();
            assert_eq!(stat.len(), 1 << 20);
            assert_eq!(std::os::unix::fs::MetadataExt::blocks(&stat) * 512 >= 1 << 20, full);
        }
    });
}

#[test]
fn writes_of_zeroes_that_are_found_may_free_their_space() {
    for (found, frees) in [("off", false), ("on", false), ("unmap", true)] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "x.img", 1 << 20, 7);
        run_control(async |_| {
            let graph = graph();
            let raw = json!({
                "driver": "raw", "node-name": "r", "detect-zeroes": found, "discard": "unmap",
                "file": { "driver": "file", "filename": &path },
            });
            let node = add(&graph, raw).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            on(&io_thread(), &port.handle(), async move |lane| {
                let zeroes = IoBuf::alloc(1 << 19, 4096).unwrap();
                let pin = enter(&lane).await;
                lane.write(&pin, range(0, 1 << 19), zeroes, WriteFlags::default()).await.unwrap();
                // What is not all zeroes is data.
                let almost = IoBuf::alloc(4096, 4096).unwrap();
                almost.write_at(4095, &[1]);
                lane.write(&pin, range(1 << 18, 4096), almost, WriteFlags::default()).await.unwrap();
                let all = read(&lane, range(0, 1 << 20)).await.unwrap();
                assert_eq!(all.iter().position(|byte| *byte != 0), Some((1 << 18) + 4095));
                assert!(all[1 << 19..].iter().all(|byte| *byte == 7));
            })
            .await;
            let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap()) * 512;
            assert_eq!(allocated < 1 << 20, frees, "{allocated} bytes with detect-zeroes={found}");
        });
    }
}
