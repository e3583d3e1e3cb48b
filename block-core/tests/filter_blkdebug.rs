//! blkdebug: which requests fail, wait or are cut, and when; with qemu-io beside it where it is right.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod support;

use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;

use bench::{READER, add, attach, enter, file, flush, image, io_thread, on, range, read, reopen, with, write, writer};
use block_core::base::IoError;
use block_core::drivers::filter::blkdebug::{Blkdebug, Breakpoints};
use block_core::graph::{DebugEvent, DirectRequest, Graph, NewNode, NodeId, NodeOptions, PermSet, Perms, WriteFlags};
use block_core::pipeline::Filtered;
use block_core::port::{Port, PortHandle, PortLane};
use block_core::rt::{IoThread, Local, run_control};
use serde_json::{Value, json};
use support::{Mem, Seen, park};

const SIZE: usize = 1 << 20;
const ERROR: IoError = IoError::Os(libc::EIO);
const NO: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };

fn graph() -> Rc<Graph> {
    Graph::new(Arc::new(|_| ()))
}

/// A blkdebug node over an image full of 0xaa, with a port above it.
struct Disk {
    graph: Rc<Graph>,
    node: NodeId,
    port: Port,
    path: String,
    _dir: tempfile::TempDir,
}

impl Disk {
    async fn new(options: Value) -> Self {
        Self::below(options, |debug| debug).await
    }

    /// With what `above` makes of it on top.
    async fn below(options: Value, above: impl FnOnce(Value) -> Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "r.raw", SIZE, 0xaa);
        let graph = graph();
        let debug =
            json!({ "driver": "blkdebug", "node-name": "debug", "discard": "unmap", "image": file("f", &path) });
        let top = add(&graph, above(with(debug, &options))).await.unwrap();
        let port = attach(&graph, top, writer()).await.unwrap();
        let node = graph.find("debug").unwrap();
        Self { graph, node, port, path, _dir: dir }
    }

    async fn raw(options: Value) -> Self {
        Self::below(options, |debug| json!({ "driver": "raw", "node-name": "raw", "file": debug })).await
    }

    fn lane(&self) -> Rc<PortLane> {
        self.port.handle().lane(&Local::current())
    }

    fn breakpoints(&self) -> Arc<Breakpoints> {
        let look = |driver: &Filtered<Blkdebug>| driver.0.breakpoints();
        self.graph.look_into(self.node, look).expect("the node is blkdebug")
    }
}

async fn zero(lane: &PortLane, start: u64, len: u64) -> Result<(), IoError> {
    lane.write_zeroes(&enter(lane).await, range(start, len), NO).await
}

#[test]
fn what_makes_no_node_is_refused_in_qemus_words() {
    run_control(async |_| {
        let dir = tempfile::tempdir().unwrap();
        let graph = graph();
        add(&graph, file("f", &image(dir.path(), "r.raw", SIZE, 0))).await.unwrap();
        let with_errno = |errno: i64| json!({ "inject-error": [{ "event": "pwritev", "errno": errno }] });
        for (wrong, reason) in [
            (json!({ "align": -1 }), "Value '-1' is out of range for parameter 'align'"),
            (json!({ "align": 3 }), "Cannot meet constraints with align 3"),
            (json!({ "align": 1u64 << 31 }), "Cannot meet constraints with align 2147483648"),
            (json!({ "align": i64::MAX }), "Cannot meet constraints with align 9223372036854775807"),
            (json!({ "align": 4096, "max-transfer": 512 }), "Cannot meet constraints with max-transfer 512"),
            (json!({ "max-transfer": i32::MAX }), "Cannot meet constraints with max-transfer 2147483647"),
            (json!({ "max-transfer": 1u64 << 31 }), "Parameter 'max-transfer' expects int32"),
            (json!({ "max-transfer": -1 }), "Value '-1' is out of range for parameter 'max-transfer'"),
            (json!({ "align": 512, "opt-write-zero": 100 }), "Cannot meet constraints with opt-write-zero 100"),
            (
                json!({ "align": 512, "opt-write-zero": 4096, "max-write-zero": 512 }),
                "Cannot meet constraints with max-write-zero 512",
            ),
            (json!({ "align": 512, "opt-discard": 100 }), "Cannot meet constraints with opt-discard 100"),
            (json!({ "opt-discard": 4096, "max-discard": 512 }), "Cannot meet constraints with max-discard 512"),
            (json!({ "inject-error": [{ "event": "foo" }] }), "Parameter 'inject-error[0].event' does not accept"),
            (json!({ "inject-error": [{}] }), "Parameter 'inject-error[0].event' is missing"),
            (json!({ "set-state": [{ "event": "none" }] }), "Parameter 'set-state[0].new_state' is missing"),
            (with_errno(-5), "Value '-5' is out of range for parameter 'errno'"),
            (with_errno(1 << 32), "Value '4294967296' is out of range for parameter 'errno'"),
            (json!({ "take-child-perms": ["graph-mod"] }), "Parameter 'take-child-perms[0]' does not accept"),
            (json!({ "config": "/nonexistent" }), "Could not read blkdebug config file: No such file or directory"),
            (json!({ "config": "/tmp" }), "Cannot read config file: Is a directory"),
            (json!({ "config": "/dev/zero" }), "The blkdebug config file may not have more than"),
            (json!({ "image": "n" }), "Cannot find device='n' nor node-name='n'"),
        ] {
            let options = json!({ "driver": "blkdebug", "node-name": "n", "image": "f" });
            let error = add(&graph, with(options, &wrong)).await.unwrap_err();
            assert!(error.starts_with(reason), "{wrong}: {error}");
            assert_eq!(graph.nodes().len(), 1, "{reason}");
        }
        let most = json!({ "align": 1 << 30, "opt-write-zero": 1 << 30, "max-discard": 1 << 30, "inject-error": [] });
        add(&graph, with(json!({ "driver": "blkdebug", "node-name": "n", "image": "f" }), &most)).await.unwrap();
    });
}

/// QEMU ignores that the padding could not be read and writes zeroes beside the guest's data.
#[test]
fn a_failing_padding_read_fails_the_write() {
    for event in ["pwritev_rmw_head", "pwritev_rmw_tail"] {
        run_control(async |_| {
            let rule = json!([{ "event": event, "errno": 5, "iotype": "read" }]);
            let disk = Disk::new(json!({ "align": 4096, "inject-error": rule })).await;
            let lane = disk.lane();
            // Head and tail in one block, in two, with blocks between, and zeroes.
            for (start, len) in [(512, 512), (3072, 2048), (512, 16384)] {
                assert_eq!(write(&lane, start, &vec![0xbb; len], NO).await, Err(ERROR), "{event} {start} {len}");
            }
            assert_eq!(zero(&lane, 512, 512).await, Err(ERROR));
            assert_eq!(std::fs::read(&disk.path).unwrap(), vec![0xaa; SIZE], "{event}");
            // Whole blocks have no padding.
            write(&lane, 4096, &[0xcc; 4096], NO).await.unwrap();
        });
    }
}

/// One run of qemu-io over the same rules and the same image.
fn qemu_io(path: &str, rules: &str, commands: &[&str]) -> Vec<bool> {
    let options = format!("driver=blkdebug,image.driver=file,image.filename={path},{rules}");
    let each = commands.iter().flat_map(|command| ["-c", command]);
    let out = Command::new("qemu-io").args(["--image-opts", &options]).args(each).output();
    let out = out.expect("qemu-io is installed (qemu-utils)");
    let said = String::from_utf8([out.stdout, out.stderr].concat()).unwrap();
    let results = said.lines().filter(|line| line.contains("failed: ") || !line.contains("ops;"));
    results.map(|line| !line.contains("failed")).collect()
}

/// Where qemu-io reports what happened, the same rules do the same here, and leave the same image.
#[test]
fn rules_do_what_they_do_in_qemu_io() {
    for (rules, options) in [
        ("inject-error.0.event=pwritev", json!({ "inject-error": [{ "event": "pwritev" }] })),
        (
            "align=4096,inject-error.0.event=pwritev_rmw_head,inject-error.0.iotype=write",
            json!({ "align": 4096, "inject-error": [{ "event": "pwritev_rmw_head", "iotype": "write" }] }),
        ),
        (
            "align=4096,inject-error.0.event=pwritev_rmw_after_tail,inject-error.0.iotype=write,inject-error.0.once=on",
            json!({ "align": 4096, "inject-error": [
                { "event": "pwritev_rmw_after_tail", "iotype": "write", "once": true }
            ] }),
        ),
        (
            "inject-error.0.event=pwritev_done,inject-error.0.iotype=read,inject-error.0.sector=1",
            json!({ "inject-error": [{ "event": "pwritev_done", "iotype": "read", "sector": 1 }] }),
        ),
        (
            "set-state.0.event=pwritev,set-state.0.new_state=2,set-state.1.event=pwritev,set-state.1.state=2,\
             set-state.1.new_state=3,inject-error.0.event=pwritev,inject-error.0.state=2",
            json!({ "set-state": [
                { "event": "pwritev", "new_state": 2 }, { "event": "pwritev", "state": 2, "new_state": 3 }
            ], "inject-error": [{ "event": "pwritev", "state": 2 }] }),
        ),
        (
            "inject-error.0.event=pwritev,inject-error.0.once=on,inject-error.1.event=pwritev,inject-error.1.once=on",
            json!({ "inject-error": [{ "event": "pwritev", "once": true }, { "event": "pwritev", "once": true }] }),
        ),
        (
            "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno=13",
            json!({ "inject-error": [{ "event": "none", "iotype": "read", "errno": 13 }] }),
        ),
        (
            "inject-error.0.event=pwritev,inject-error.0.errno=0,inject-error.1.event=pwritev",
            json!({ "inject-error": [{ "event": "pwritev", "errno": 0 }, { "event": "pwritev" }] }),
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "q.raw", SIZE, 0xaa);
        let commands = ["write -P 1 512 512", "read 512 512", "write -P 2 0 512", "read 0 8k", "write -P 3 4000 9000"];
        let theirs = qemu_io(&path, rules, &commands);
        run_control(async |_| {
            let disk = Disk::new(options).await;
            let lane = disk.lane();
            let ours = [
                write(&lane, 512, &[1; 512], NO).await.is_ok(),
                read(&lane, range(512, 512)).await.is_ok(),
                write(&lane, 0, &[2; 512], NO).await.is_ok(),
                read(&lane, range(0, 8192)).await.is_ok(),
                write(&lane, 4000, &[3; 9000], NO).await.is_ok(),
            ];
            assert_eq!(ours[..], theirs, "{rules}");
            assert!(std::fs::read(&disk.path).unwrap() == std::fs::read(&path).unwrap(), "{rules}");
        });
    }
}

/// A rule that fails reads once these events came in this order: each leads to the next state.
fn in_order(events: &[&str]) -> Value {
    let (last, before) = events.split_last().unwrap();
    let steps =
        before.iter().zip(1..).map(|(event, state)| json!({ "event": event, "state": state, "new_state": state + 1 }));
    json!({
        "align": 4096,
        "set-state": steps.collect::<Vec<_>>(),
        "inject-error": [{ "event": last, "state": events.len(), "iotype": "read" }]
    })
}

/// The orders are those that qemu-io shows, found by asking it about each pair of events.
#[test]
fn a_write_announces_its_steps_in_qemus_order() {
    let small = ["pwritev_rmw_head", "pwritev_rmw_tail", "pwritev_rmw_after_head", "pwritev_rmw_after_tail"];
    let large = ["pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail"];
    let tail = ["pwritev_rmw_tail", "pwritev_rmw_after_tail"];
    for (start, len, zeroes, padding, sent) in [
        (512, 512, false, &small[..], "pwritev"),
        (4000, 200, false, &small, "pwritev"),
        (512, 8192, false, &large, "pwritev"),
        (0, 512, false, &tail, "pwritev"),
        (512, 512, true, &small, "pwritev"),
        (4096, 4096, false, &[], "pwritev"),
        (4096, 4096, true, &[], "pwritev_zero"),
    ] {
        let events = [padding, &[sent, "pwritev_done"]].concat();
        run_control(async |_| {
            let disk = Disk::new(in_order(&events)).await;
            let lane = disk.lane();
            let whole = range(0, SIZE as u64);
            read(&lane, whole).await.unwrap();
            match zeroes {
                true => zero(&lane, start, len).await.unwrap(),
                false => write(&lane, start, &vec![1; usize::try_from(len).unwrap()], NO).await.unwrap(),
            }
            assert_eq!(read(&lane, whole).await, Err(ERROR), "{start} {len}: {events:?}");
        });
    }
}

#[test]
fn formats_tell_their_file_what_they_do() {
    for (event, read_fails, write_fails, flush_fails) in [
        ("read_aio", true, false, false),
        ("write_aio", false, true, false),
        ("flush_to_os", false, false, true),
        ("flush_to_disk", false, false, true),
    ] {
        run_control(async |_| {
            let told = Disk::raw(json!({ "inject-error": [{ "event": event, "once": true }] })).await;
            let lane = told.lane();
            assert_eq!(read(&lane, range(0, 512)).await.is_err(), read_fails, "{event}");
            assert_eq!(write(&lane, 0, &[1; 512], NO).await.is_err(), write_fails, "{event}");
            assert_eq!(flush(&lane).await.is_err(), flush_fails, "{event}");
        });
    }
}

#[test]
fn a_filter_hands_down_what_it_is_told() {
    run_control(async |local| {
        let disk = Disk::new(json!({ "inject-error": [{ "event": "read_aio", "iotype": "read" }] })).await;
        disk.graph.permit().add(park("between", disk.node, &Arc::default(), false)).await.unwrap();
        let raw = json!({ "driver": "raw", "node-name": "raw", "file": "between", "read-only": true });
        let raw = add(&disk.graph, raw).await.unwrap();
        let port = attach(&disk.graph, raw, READER).await.unwrap();
        assert_eq!(read(&port.handle().lane(&local), range(0, 512)).await, Err(ERROR));
    });
}

/// The filter above does not say a second time what the node says itself.
#[test]
fn a_write_is_announced_once() {
    run_control(async |local| {
        let twice = json!({
            "set-state": [{ "event": "pwritev", "state": 1, "new_state": 2 }],
            "inject-error": [{ "event": "pwritev", "state": 2 }]
        });
        let disk = Disk::new(twice).await;
        let Disk { graph, node, port, _dir, .. } = disk;
        port.detach(&mut graph.permit()).await;
        let top = graph.permit().add(park("top", node, &Arc::default(), false)).await.unwrap();
        let port = attach(&graph, top, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        write(&lane, 0, &[1; 512], NO).await.unwrap();
        assert_eq!(write(&lane, 0, &[1; 512], NO).await, Err(ERROR));
    });
}

#[test]
fn a_rule_file_is_read_before_the_options() {
    run_control(async |_| {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("rules.cfg");
        std::fs::write(
            &config,
            "[inject-error]\nevent = \"none\"\nerrno = \"28\"\niotype = \"write\"\nonce = \"on\"\n",
        )
        .unwrap();
        let rule = json!([{ "event": "none", "errno": 13, "iotype": "write", "once": true }]);
        let disk = Disk::new(json!({ "config": config.to_str().unwrap(), "inject-error": rule })).await;
        let lane = disk.lane();
        assert_eq!(write(&lane, 0, &[1; 512], NO).await, Err(IoError::NoSpace));
        assert_eq!(write(&lane, 0, &[1; 512], NO).await, Err(IoError::Os(libc::EACCES)));
        write(&lane, 0, &[1; 512], NO).await.unwrap();
        std::fs::write(&config, "[inject-error]\nevent = none\n").unwrap();
        let options =
            json!({ "driver": "blkdebug", "node-name": "n", "image": "debug", "config": config.to_str().unwrap() });
        let error = add(&disk.graph, options).await.unwrap_err();
        assert_eq!(error, format!("In blkdebug config file '{}': line 2: parse error", config.display()));
    });
}

#[test]
fn each_kind_of_request_can_fail() {
    run_control(async |_| {
        for (kind, fails) in
            [("read", 0), ("write", 1), ("write-zeroes", 2), ("discard", 3), ("flush", 4), ("block-status", 5)]
        {
            let disk =
                Disk::new(json!({ "inject-error": [{ "event": "none", "iotype": kind, "immediately": true }] })).await;
            let lane = disk.lane();
            let results = [
                read(&lane, range(0, 512)).await.err(),
                write(&lane, 0, &[1; 512], NO).await.err(),
                zero(&lane, 0, 4096).await.err(),
                lane.discard(&enter(&lane).await, range(0, 4096)).await.err(),
                flush(&lane).await.err(),
                lane.map(&enter(&lane).await, range(0, 512)).await.err(),
            ];
            let failed: Vec<_> = (0..results.len()).filter(|at| results[*at] == Some(ERROR)).collect();
            assert_eq!((failed, results.iter().flatten().count()), (vec![fails], 1), "{kind}");
        }
    });
}

#[test]
fn zeroes_and_discards_come_in_units() {
    run_control(async |_| {
        let units = json!({ "align": 512, "opt-write-zero": 1536, "max-write-zero": 3072, "opt-discard": 1536, "max-discard": 3072 });
        // Below: what is not whole units, or more than two of them, fails.
        let guard = |sector: i64, kind: &str| json!({ "event": "none", "sector": sector, "iotype": kind });
        let rules =
            json!([guard(1, "write-zeroes"), guard(22, "write-zeroes"), guard(1, "discard"), guard(22, "discard")]);
        let disk = Disk::below(json!({ "inject-error": rules }), |debug| {
            with(json!({ "driver": "blkdebug", "node-name": "top", "discard": "unmap", "image": debug }), &units)
        })
        .await;
        let lane = disk.lane();
        // 3 to 21 are whole units of three sectors.
        zero(&lane, 512, 22 * 512).await.unwrap();
        let bytes = std::fs::read(&disk.path).unwrap();
        assert!(bytes[512..23 * 512].iter().all(|byte| *byte == 0) && bytes[23 * 512] == 0xaa && bytes[511] == 0xaa);
        lane.discard(&enter(&lane).await, range(512, 22 * 512)).await.unwrap();
        let whole = lane.discard(&enter(&lane).await, range(0, 1536)).await;
        assert_eq!(whole, Err(ERROR), "the rule below would have seen it");
    });
}

/// A memory disk and blkdebug over it.
async fn over_memory(graph: &Rc<Graph>, options: Value, size: u64, seen: &Arc<Seen>) -> Port {
    let mem = Mem::new(vec![7; usize::try_from(size).unwrap()], seen);
    let mem = NewNode::new("mem".into(), NodeOptions::default(), |_| (mem, size));
    graph.permit().add(mem).await.unwrap();
    let options = with(json!({ "driver": "blkdebug", "node-name": "debug", "image": "mem" }), &options);
    let node = add(graph, options).await.unwrap();
    // Whoever writes to an incomplete last block has to be allowed to resize.
    let writer = Perms { uses: writer().uses | PermSet::RESIZE, ..writer() };
    attach(graph, node, writer).await.unwrap()
}

#[test]
fn requests_are_no_larger_than_asked_for() {
    run_control(async |local| {
        let (graph, seen) = (graph(), Arc::<Seen>::default());
        let port = over_memory(&graph, json!({ "align": 512, "max-transfer": 4096 }), 65536, &seen).await;
        let lane = port.handle().lane(&local);
        write(&lane, 100, &[1; 20000], NO).await.unwrap();
        assert_eq!(read(&lane, range(99, 20002)).await.unwrap()[..2], [7, 1]);
        assert_eq!(seen.largest.load(std::sync::atomic::Ordering::Relaxed), 4096);
    });
}

/// With `align` the last block reaches past the image's end.
#[test]
fn an_incomplete_last_block_is_written_and_read() {
    run_control(async |local| {
        let graph = graph();
        let port = over_memory(&graph, json!({ "align": 4096 }), 4096 + 512, &Arc::default()).await;
        let lane = port.handle().lane(&local);
        write(&lane, 4096 + 100, &[1; 412], NO).await.unwrap();
        assert_eq!(read(&lane, range(4096 + 99, 2)).await.unwrap(), [7, 1]);
        assert_eq!(read(&lane, range(4096, 513)).await, Err(IoError::OutOfRange));
    });
}

#[test]
fn a_failing_image_is_heard() {
    run_control(async |local| {
        let (graph, seen) = (graph(), Arc::<Seen>::default());
        let port = over_memory(&graph, json!({ "align": 4096 }), 65536, &seen).await;
        let lane = port.handle().lane(&local);
        seen.fail_reads.store(1, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(write(&lane, 512, &[1; 512], NO).await, Err(ERROR));
        *seen.flush_error.lock().unwrap() = Some(IoError::NoSpace);
        assert_eq!(flush(&lane).await, Err(IoError::NoSpace));
    });
}

#[test]
fn permissions_are_taken_and_not_shared() {
    run_control(async |_| {
        let dir = tempfile::tempdir().unwrap();
        let graph = graph();
        let path = image(dir.path(), "r.raw", SIZE, 0);
        add(&graph, with(file("ro", &path), &json!({ "read-only": true }))).await.unwrap();
        add(&graph, json!({ "driver": "null-co", "node-name": "null" })).await.unwrap();
        let debug = |image: &str, more| with(json!({ "driver": "blkdebug", "node-name": "n", "image": image }), &more);
        let takes = add(&graph, debug("ro", json!({ "take-child-perms": ["write", "resize"] }))).await;
        assert_eq!(takes.unwrap_err(), "Block node 'ro' is read-only");
        let node = graph.find("null").unwrap();
        let other = attach(&graph, node, writer()).await.unwrap();
        let refused = add(&graph, debug("null", json!({ "unshare-child-perms": ["write"] }))).await.unwrap_err();
        assert!(refused.contains("'write' is used by") && refused.contains("not shared by node 'n'"), "{refused}");
        other.detach(&mut graph.permit()).await;
        add(&graph, debug("null", json!({ "unshare-child-perms": ["write"] }))).await.unwrap();
        assert!(attach(&graph, node, writer()).await.is_err());
    });
}

fn goes_direct(lane: &PortLane) -> bool {
    let pin = lane.try_enter().unwrap();
    let request = DirectRequest { write: false, at: range(0, 512), fua: false, memory_bits: 0 };
    lane.direct(&pin, request).is_some()
}

#[test]
fn without_rules_requests_are_not_held_up() {
    run_control(async |local| {
        let graph = graph();
        add(&graph, json!({ "driver": "null-co", "node-name": "null" })).await.unwrap();
        let options = json!({ "driver": "blkdebug", "node-name": "debug", "image": "null", "align": 512 });
        let node = add(&graph, options.clone()).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        assert!(goes_direct(&lane));
        let breakpoints = graph.look_into(node, |driver: &Filtered<Blkdebug>| driver.0.breakpoints()).unwrap();
        breakpoints.set(DebugEvent::Pwritev, "a");
        assert!(!goes_direct(&lane));
        breakpoints.remove("a");
        assert!(goes_direct(&lane));
        let rules = json!({ "inject-error": [{ "event": "none", "iotype": "read" }] });
        reopen(&graph, &[with(options.clone(), &rules)]).await.unwrap();
        assert!(!goes_direct(&lane));
        assert_eq!(read(&lane, range(0, 512)).await, Err(ERROR));
        reopen(&graph, &[options]).await.unwrap();
        assert!(goes_direct(&lane));
    });
}

/// Starts a write of a sector on a thread; gives its result.
fn start_write(
    thread: &IoThread,
    handle: PortHandle,
    start: u64,
) -> block_core::rt::sync::Receiver<Result<(), IoError>> {
    let (done, result) = block_core::rt::sync::oneshot();
    thread.remote().spawn(move |local| async move {
        let _ = done.send(write(&handle.lane(&local), start, &[1; 512], NO).await);
    });
    result
}

#[test]
fn a_request_waits_at_a_breakpoint_until_it_is_resumed() {
    run_control(async |_| {
        let disk = Disk::new(json!({})).await;
        let (breakpoints, threads) = (disk.breakpoints(), [io_thread(), io_thread()]);
        breakpoints.set(DebugEvent::Pwritev, "a");
        let caught = start_write(&threads[0], disk.port.handle(), 0);
        breakpoints.suspended("a").await;
        // One request is caught; another one, from another thread, gets through.
        start_write(&threads[1], disk.port.handle(), 512).await.unwrap().unwrap();
        assert_eq!(std::fs::read(&disk.path).unwrap()[..1024], [[0xaa; 512], [1; 512]].concat());
        assert!(breakpoints.is_suspended("a") && breakpoints.resume("a"));
        caught.await.unwrap().unwrap();
        assert_eq!(std::fs::read(&disk.path).unwrap()[..1024], [1; 1024]);
    });
}

#[test]
fn a_drain_lets_suspended_requests_go_on() {
    run_control(async |_| {
        let disk = Disk::new(json!({ "align": 4096 })).await;
        let (breakpoints, threads) = (disk.breakpoints(), [io_thread(), io_thread()]);
        breakpoints.set(DebugEvent::PwritevRmwHead, "head");
        breakpoints.set(DebugEvent::Pwritev, "sent");
        // The second is caught; the third waits for the first, whose block it shares.
        let first = start_write(&threads[0], disk.port.handle(), 512);
        breakpoints.suspended("head").await;
        let second = start_write(&threads[0], disk.port.handle(), 65536 + 512);
        breakpoints.suspended("sent").await;
        let third = start_write(&threads[1], disk.port.handle(), 1024);
        drop(disk.graph.permit().drain(&[disk.node]).await.unwrap());
        for result in [first, second, third] {
            result.await.unwrap().unwrap();
        }
        assert!(!breakpoints.is_suspended("head") && !breakpoints.resume("sent"));
        assert_eq!(std::fs::read(&disk.path).unwrap()[512..1536], [1; 1024]);
    });
}

/// Rules are one state for all threads: a rule for one request makes one fail.
#[test]
fn once_is_once_for_all_threads() {
    run_control(async |_| {
        let disk = Disk::new(json!({ "inject-error": [{ "event": "none", "iotype": "write", "once": true }] })).await;
        let threads = [io_thread(), io_thread()];
        let writes: Vec<_> =
            (0..64).map(|at| start_write(&threads[at % 2], disk.port.handle(), at as u64 * 512)).collect();
        let mut failed = 0;
        for result in writes {
            failed += usize::from(result.await.unwrap().is_err());
        }
        assert_eq!(failed, 1);
        let written =
            std::fs::read(&disk.path).unwrap()[..64 * 512].chunks(512).filter(|sector| sector[0] == 1).count();
        assert_eq!(written, 63);
        on(&threads[0], &disk.port.handle(), async |lane| flush(&lane).await).await.unwrap();
    });
}
