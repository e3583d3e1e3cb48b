//! blklogwrites: what the log says of what was written, replayed, and compared with the log of qemu-io.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod support;

use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;

use bench::{READER, add, attach, enter, file, flush, image, io_thread, on, range, read, reopen, with, write, writer};
use block_core::base::IoError;
use block_core::drivers::filter::blkdebug::Blkdebug;
use block_core::graph::{DebugEvent, Graph, NewNode, NodeId, NodeOptions, Preallocation, WriteFlags};
use block_core::pipeline::Filtered;
use block_core::port::Port;
use block_core::rt::{Local, run_control};
use serde_json::{Value, json};
use support::user::{a_moment, a_while, beside, reads, until};
use support::{Mem, Seen, Valve, mem, park};

const SIZE: usize = 1 << 20;
const ROOM: usize = 4 << 20;
const NO: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };
const ERROR: IoError = IoError::Os(libc::EIO);

/// A disk of zeroes whose writes are logged.
struct Logged {
    graph: Rc<Graph>,
    node: NodeId,
    port: Port,
    disk: String,
    log: String,
    dir: tempfile::TempDir,
}

impl Logged {
    async fn new(more: Value) -> Self {
        Self::over(more, |disk| disk).await
    }

    async fn over(more: Value, below: impl FnOnce(Value) -> Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = image(dir.path(), "disk.raw", SIZE, 0);
        let log = image(dir.path(), "log.raw", ROOM, 0);
        let graph = Graph::new(Arc::new(|_| ()));
        let child = below(with(file("disk", &disk), &json!({ "discard": "unmap" })));
        let node = add(&graph, with(logging(child, &log), &more)).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        Self { graph, node, port, disk, log, dir }
    }

    fn entries(&self) -> Vec<Entry> {
        entries(&std::fs::read(&self.log).unwrap())
    }

    /// The log, replayed into an empty disk, gives the disk.
    fn assert_replays(&self) {
        let disk = std::fs::read(&self.disk).unwrap();
        let replayed = replayed(&std::fs::read(&self.log).unwrap(), disk.len());
        let differs = disk.iter().zip(&replayed).position(|(one, other)| one != other);
        assert_eq!(differs, None, "the first byte that differs");
    }
}

fn logging(disk: Value, log: &str) -> Value {
    json!({
        "driver": "blklogwrites", "node-name": "n", "discard": "unmap",
        "file": disk, "log": { "driver": "file", "filename": log }
    })
}

/// An entry as a tool reads it.
#[derive(Debug, PartialEq)]
struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    /// Its data, or its text if it is a mark.
    data: Vec<u8>,
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn entries(log: &[u8]) -> Vec<Entry> {
    assert_eq!((number(log, 0), number(log, 8)), (0x006a_7366_7773_6872, 1));
    let sector = number(log, 24) as u32 as usize;
    let mut at = sector;
    let mut all = Vec::new();
    for _ in 0..number(log, 16) {
        let head: Vec<u64> = (0..4).map(|word| number(log, at + word * 8)).collect();
        let bytes = if head[2] & 4 != 0 { 0 } else { head[1] as usize * sector };
        let text = log[at + 32..at + 32 + head[3] as usize].to_vec();
        let data = if head[2] & 8 != 0 { text } else { log[at + sector..at + sector + bytes].to_vec() };
        all.push(Entry { sector: head[0], sectors: head[1], flags: head[2], data });
        at += sector + bytes;
    }
    all
}

fn replayed(log: &[u8], size: usize) -> Vec<u8> {
    let sector = number(log, 24) as u32 as usize;
    let mut disk = vec![0; size];
    for entry in entries(log) {
        let start = entry.sector as usize * sector;
        match entry.flags {
            4 => disk[start..start + entry.sectors as usize * sector].fill(0),
            8 => {}
            _ => disk[start..start + entry.data.len()].copy_from_slice(&entry.data),
        }
    }
    disk
}

#[test]
fn what_makes_no_node_is_refused_in_qemus_words() {
    run_control(async |_| {
        let dir = tempfile::tempdir().unwrap();
        let graph = Graph::new(Arc::new(|_| ()));
        let (disk, log) = (image(dir.path(), "d", SIZE, 0), image(dir.path(), "l", SIZE, 0));
        for (wrong, reason) in [
            (json!({ "log-sector-size": 0 }), "Invalid log sector size 0"),
            (json!({ "log-sector-size": 513 }), "Invalid log sector size 513"),
            (json!({ "log-sector-size": 1 << 24 }), "Invalid log sector size 16777216"),
            (json!({ "log-sector-size": -1 }), "Parameter 'log-sector-size' expects uint32"),
            (json!({ "log-super-update-interval": 0 }), "Invalid log superblock update interval 0"),
            (
                json!({ "log-append": true, "log-sector-size": 512 }),
                "log-append and log-sector-size are mutually exclusive",
            ),
            (json!({ "log": "nope" }), "Cannot find device='nope' nor node-name='nope'"),
        ] {
            let error = add(&graph, with(logging(file("d", &disk), &log), &wrong)).await.unwrap_err();
            assert!(error.starts_with(reason), "{error}");
            assert!(graph.nodes().is_empty());
        }
        let most = json!({ "log-sector-size": 8 << 20, "log-super-update-interval": u64::MAX });
        add(&graph, with(logging(file("d", &disk), &log), &most)).await.unwrap();
    });
}

/// The same requests through qemu-io leave the same log, byte for byte.
#[test]
fn the_log_is_that_of_qemu_io() {
    for (sector, interval) in [(512, 4096), (4096, 4096), (512, 2)] {
        run_control(async |local| {
            let options = json!({ "log-sector-size": sector, "log-super-update-interval": interval });
            let ours = Logged::new(options).await;
            let lane = ours.port.handle().lane(&local);
            write(&lane, 0, &[1; 512], NO).await.unwrap();
            write(&lane, 1024, &[2; 4096], NO).await.unwrap();
            lane.write_zeroes(&enter(&lane).await, range(8192, 4096), NO).await.unwrap();
            let unmap = WriteFlags { may_unmap: true, ..NO };
            lane.write_zeroes(&enter(&lane).await, range(16384, 4096), unmap).await.unwrap();
            lane.discard(&enter(&lane).await, range(32768, 65536)).await.unwrap();
            flush(&lane).await.unwrap();
            write(&lane, 100, &[3; 200], NO).await.unwrap();
            write(&lane, 4000, &[4; 5000], NO).await.unwrap();
            flush(&lane).await.unwrap();

            let (disk, log) = (image(ours.dir.path(), "q.raw", SIZE, 0), image(ours.dir.path(), "q.log", 0, 0));
            let options = format!(
                "driver=blklogwrites,discard=unmap,file.driver=file,file.discard=unmap,file.filename={disk},\
                 log.driver=file,log.filename={log},log-sector-size={sector},log-super-update-interval={interval}"
            );
            let commands = [
                "write -P 1 0 512",
                "write -P 2 1024 4096",
                "write -z 8192 4096",
                "write -zu 16384 4096",
                "discard 32k 64k",
                "flush",
                "write -P 3 100 200",
                "write -P 4 4000 5000",
                "flush",
            ];
            let each = commands.iter().flat_map(|command| ["-c", command]);
            let out = Command::new("qemu-io").args(["-t", "writeback", "--image-opts", &options]).args(each).output();
            let out = out.expect("qemu-io is installed (qemu-utils)");
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
            let (ours_log, theirs) = (std::fs::read(&ours.log).unwrap(), std::fs::read(&log).unwrap());
            assert_eq!(entries(&ours_log), entries(&theirs), "sectors of {sector}");
            let (same, rest) = ours_log.split_at(theirs.len());
            assert!(same == theirs && rest.iter().all(|byte| *byte == 0), "sectors of {sector}");
            assert!(std::fs::read(&ours.disk).unwrap() == std::fs::read(&disk).unwrap());
            ours.assert_replays();
        });
    }
}

#[test]
fn a_log_goes_on_where_it_ended_and_qemu_goes_on_with_it() {
    run_control(async |local| {
        let logged = Logged::new(json!({ "log-sector-size": 4096 })).await;
        let lane = logged.port.handle().lane(&local);
        write(&lane, 0, &[1; 4096], NO).await.unwrap();
        flush(&lane).await.unwrap();
        drop(lane);
        let Logged { graph, node, port, disk, log, dir } = logged;
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
        let before = entries(&std::fs::read(&log).unwrap()).len();
        for name in graph.nodes().into_iter().map(|node| node.name).collect::<Vec<_>>() {
            let node = graph.find(&name).unwrap();
            graph.permit().remove(node).await.unwrap();
        }

        let append = with(logging(file("disk", &disk), &log), &json!({ "log-append": true }));
        let node = add(&graph, append).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        // Sectors of 4 KiB, as the superblock says: logged with what is beside it.
        write(&lane, 512, &[2; 512], NO).await.unwrap();
        flush(&lane).await.unwrap();
        drop(lane);
        port.detach(&mut graph.permit()).await;
        let after = entries(&std::fs::read(&log).unwrap());
        assert_eq!(after.len(), before + 2);
        let expected = [vec![1; 512], vec![2; 512], vec![1; 3072]].concat();
        assert_eq!(after[before], Entry { sector: 0, sectors: 1, flags: 0, data: expected });
        let resized = graph.permit().resize(node, SIZE as u64 + 4096, Preallocation::Off).await;
        resized.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        write(&lane, SIZE as u64, &[3; 4096], NO).await.unwrap();
        flush(&lane).await.unwrap();
        drop(lane);
        port.detach(&mut graph.permit()).await;
        let marked = entries(&std::fs::read(&log).unwrap());
        let size = format!("size={}", SIZE + 4096).into_bytes();
        assert_eq!(marked[before + 2], Entry { sector: 0, sectors: 0, flags: 8, data: size });
        drop(graph);

        // A program that knows nothing of our mark passes over it.
        let copy = dir.path().join("copy.log");
        std::fs::copy(&log, &copy).unwrap();
        let options = format!(
            "driver=blklogwrites,file.driver=file,file.filename={disk},log.driver=file,log.filename={},log-append=on,\
             file.locking=off",
            copy.display()
        );
        let out = Command::new("qemu-io").args(["--image-opts", &options, "-c", "write -P 9 0 4096"]).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let theirs = entries(&std::fs::read(&copy).unwrap());
        assert_eq!(theirs[..marked.len()], marked);
        assert_eq!(theirs[marked.len()], Entry { sector: 0, sectors: 1, flags: 0, data: vec![9; 4096] });
    });
}

/// What is wrong with a log to be continued fails the first write; nothing is written, and reads go on.
#[test]
fn a_log_that_is_none_is_not_continued() {
    let superblock = |entries: u64, sector: u32| {
        [
            &0x006a_7366_7773_6872_u64.to_le_bytes()[..],
            &1_u64.to_le_bytes(),
            &entries.to_le_bytes(),
            &sector.to_le_bytes(),
        ]
        .concat()
    };
    let mut odd = superblock(1, 512);
    odd.resize(512, 0);
    odd.extend([0, 0, 1 << 40].iter().flat_map(|word: &u64| word.to_le_bytes()));
    let mut long = superblock(2, 512);
    long.resize(512, 0);
    long.extend([0, 1 << 60, 0].iter().flat_map(|word: &u64| word.to_le_bytes()));
    for bytes in [vec![0; 28], superblock(0, 100), superblock(u64::MAX, 512), odd, long] {
        run_control(async |local| {
            let dir = tempfile::tempdir().unwrap();
            let (disk, log) = (image(dir.path(), "d", SIZE, 7), image(dir.path(), "l", 65536, 0));
            let mut content = bytes.clone();
            content.resize(65536, 0);
            std::fs::write(&log, &content).unwrap();
            let graph = Graph::new(Arc::new(|_| ()));
            let options = with(logging(file("d", &disk), &log), &json!({ "log-append": true }));
            let node = add(&graph, options).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            let lane = port.handle().lane(&local);
            assert_eq!(write(&lane, 0, &[1; 512], NO).await, Err(IoError::Os(libc::EINVAL)));
            assert_eq!(flush(&lane).await, Err(IoError::Os(libc::EINVAL)));
            assert_eq!(read(&lane, range(0, 512)).await.unwrap(), [7; 512]);
            assert_eq!(std::fs::read(&log).unwrap(), content);
        });
    }
}

/// Four threads over the same blocks, each write its own bytes: the log ends with what the disk has.
#[test]
fn writers_of_several_threads_replay_to_what_the_disk_has() {
    run_control(async |_| {
        let logged = Logged::new(json!({})).await;
        let mut running = Vec::new();
        for number in 0..4_u8 {
            let (thread, handle) = (io_thread(), logged.port.handle());
            let (done, result) = block_core::rt::sync::oneshot();
            thread.remote().spawn(move |local| async move {
                let lane = handle.lane(&local);
                for step in 0..100_u64 {
                    let start = (step * 1777 + u64::from(number) * 512) % 60_000;
                    write(&lane, start, &vec![number * 50 + (step % 50) as u8 + 1; 1024], NO).await.unwrap();
                    if step % 25 == 24 {
                        flush(&lane).await.unwrap();
                    }
                }
                let _ = done.send(());
            });
            running.push((thread, result));
        }
        for (_, result) in &mut running {
            result.await.unwrap();
        }
        on(&running[0].0, &logged.port.handle(), async |lane| flush(&lane).await).await.unwrap();
        let flushes = logged.entries().iter().filter(|entry| entry.flags == 1).count();
        assert_eq!((logged.entries().len(), flushes), (400 + 17, 17));
        logged.assert_replays();
    });
}

/// A flush covers what was over when it began, and its entry stands there.
#[test]
fn a_flush_does_not_cover_what_came_later() {
    run_control(async |local| {
        let raw = |disk| {
            let debug = json!({ "driver": "blkdebug", "node-name": "debug", "image": disk });
            json!({ "driver": "raw", "file": debug })
        };
        let logged = Logged::over(json!({}), raw).await;
        let debug = logged.graph.find("debug").unwrap();
        let look = |driver: &Filtered<Blkdebug>| driver.0.breakpoints();
        let breakpoints = logged.graph.look_into(debug, look).unwrap();
        let lane = logged.port.handle().lane(&local);
        write(&lane, 0, &[1; 512], NO).await.unwrap();
        breakpoints.set(DebugEvent::FlushToDisk, "flush");
        let (thread, handle) = (io_thread(), logged.port.handle());
        let (done, result) = block_core::rt::sync::oneshot();
        thread.remote().spawn(move |local| async move {
            let _ = done.send(flush(&handle.lane(&local)).await);
        });
        breakpoints.suspended("flush").await;
        write(&lane, 512, &[2; 512], NO).await.unwrap();
        breakpoints.resume("flush");
        result.await.unwrap().unwrap();
        let order: Vec<_> = logged.entries().iter().map(|entry| (entry.flags, entry.sector)).collect();
        assert_eq!(order, [(0, 0), (1, 0), (0, 1)]);
    });
}

#[test]
fn what_failed_below_is_told_and_logged() {
    run_control(async |local| {
        let rules = json!([
            { "event": "none", "iotype": "write", "once": true }, { "event": "none", "iotype": "flush", "once": true }
        ]);
        let failing = |disk| json!({ "driver": "blkdebug", "image": disk, "inject-error": rules });
        let logged = Logged::over(json!({}), failing).await;
        let lane = logged.port.handle().lane(&local);
        assert_eq!(write(&lane, 0, &[1; 512], NO).await, Err(ERROR));
        assert_eq!(flush(&lane).await, Err(ERROR));
        write(&lane, 512, &[2; 512], NO).await.unwrap();
        flush(&lane).await.unwrap();
        let seen: Vec<_> = logged.entries().iter().map(|entry| (entry.flags, entry.sector)).collect();
        // It may have been written in part; and nothing claims that the first flush was one.
        assert_eq!(seen, [(0, 0), (8, 0), (0, 1), (1, 0)]);
        assert_eq!(logged.entries()[1].data, b"flush failed");
        logged.assert_replays();
    });
}

/// The same for zeroes, of which the first half is written and the second is not; in pieces, as all that is copied.
#[test]
fn of_zeroes_that_failed_halfway_the_log_has_what_is_there() {
    run_control(async |local| {
        let rules = json!([{ "event": "none", "iotype": "write-zeroes", "sector": 1536 }]);
        let failing = |disk: Value| {
            let debug = json!({ "driver": "blkdebug", "image": with(disk, &json!({ "discard": "ignore" })),
                "inject-error": rules, "max-write-zero": 512 << 10, "align": 512 });
            json!({ "driver": "raw", "file": debug })
        };
        let logged = Logged::over(json!({}), failing).await;
        std::fs::write(&logged.disk, vec![7; SIZE]).unwrap();
        let lane = logged.port.handle().lane(&local);
        let result = lane.write_zeroes(&enter(&lane).await, range(0, SIZE as u64), NO).await;
        assert_eq!(result, Err(ERROR));
        flush(&lane).await.unwrap();
        let disk = std::fs::read(&logged.disk).unwrap();
        assert_eq!((disk[0], disk[SIZE - 1]), (0, 7), "halfway");
        logged.assert_replays();
    });
}

/// A log whose entries wait at a valve, below a disk in memory.
async fn slow_log(valve: &Arc<Valve>) -> (Rc<Graph>, Port) {
    let graph = Graph::new(Arc::new(|_| ()));
    support::add(&graph, mem("disk", 0, &Arc::default())).await;
    let log = support::add(&graph, mem("mem", 0, &Arc::default())).await;
    support::add(&graph, park("log", log, valve, true)).await;
    let node = json!({ "driver": "blklogwrites", "node-name": "n", "file": "disk", "log": "log" });
    let node = add(&graph, node).await.unwrap();
    let port = attach(&graph, node, writer()).await.unwrap();
    (graph, port)
}

/// Entries that the superblock does not count are lost after a crash: a flush is not over before it counts them all.
#[test]
fn a_flush_waits_for_the_entries_before_its_own() {
    run_control(async |local| {
        let valve = Valve::shut();
        let (graph, port) = slow_log(&valve).await;
        let handle = port.handle();
        let written = beside(async move { write(&handle.lane(&Local::current()), 0, &[1; 512], NO).await });
        until(|| valve.parked() > 0).await;
        valve.open_for_others();
        let handle = port.handle();
        let flushed = beside(async move { flush(&handle.lane(&Local::current())).await });
        a_while().await;
        assert_eq!((flushed.take(), written.take()), (None, None), "the entry of the write is not there");
        valve.open();
        until(|| flushed.borrow().is_some()).await;
        assert_eq!((flushed.take(), written.take()), (Some(Ok(())), Some(Ok(()))));
        let log = attach(&graph, graph.find("mem").unwrap(), READER).await.unwrap();
        assert_eq!(number(&read(&log.handle().lane(&local), range(0, 512)).await.unwrap(), 16), 2);
    });
}

/// A request that is dropped before its entry is there leaves a gap: the log ends, and whoever flushes hears of it.
#[test]
fn a_request_that_is_dropped_ends_the_log() {
    run_control(async |local| {
        let valve = Valve::shut();
        let (_graph, port) = slow_log(&valve).await;
        let lane = port.handle().lane(&local);
        {
            let mut dropped = Box::pin(write(&lane, 0, &[1; 512], NO));
            while valve.parked() == 0 {
                let polled = std::future::poll_fn(|task| Poll::Ready(dropped.as_mut().poll(task).is_ready())).await;
                assert!(!polled);
                a_moment().await;
            }
        }
        valve.open();
        assert_eq!(flush(&lane).await, Err(IoError::Os(libc::ECANCELED)));
        assert_eq!(write(&lane, 0, &[1; 512], NO).await, Err(IoError::Os(libc::ECANCELED)));
    });
}

/// A log is continued after the last of its entries, whose heads are not read one by one.
#[test]
fn a_long_log_is_continued_soon() {
    run_control(async |local| {
        let graph = Graph::new(Arc::new(|_| ()));
        support::add(&graph, mem("disk", 0, &Arc::default())).await;
        let long = Mem::new(vec![0; ROOM], &Arc::default());
        let log =
            support::add(&graph, NewNode::new("log".into(), NodeOptions::default(), |_| (long, ROOM as u64))).await;
        let write_all = async |more: Value, count: u8| {
            let node = json!({ "driver": "blklogwrites", "node-name": "n", "file": "disk", "log": "log" });
            let node = add(&graph, with(node, &more)).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            let lane = port.handle().lane(&local);
            for _ in 0..4 {
                for number in 0..count {
                    write(&lane, u64::from(number) * 512 % 65024, &[number; 512], NO).await.unwrap();
                }
            }
            flush(&lane).await.unwrap();
            drop(lane);
            port.detach(&mut graph.permit()).await;
            graph.permit().remove(node).await.unwrap();
        };
        write_all(json!({}), 250).await;
        let before = reads(&graph, log);
        write_all(json!({ "log-append": true }), 1).await;
        let looked = reads(&graph, log) - before;
        assert!(looked < 10, "{looked} reads for a log of 1001 entries and 1 MiB");
        let port = attach(&graph, log, READER).await.unwrap();
        let bytes = read(&port.handle().lane(&local), range(0, ROOM as u64)).await.unwrap();
        // A node is flushed when it is removed, too.
        assert_eq!(entries(&bytes).len(), 1002 + 6);
    });
}

/// A log with a gap could not be replayed: writing ends where an entry is missing.
#[test]
fn a_log_that_cannot_be_written_ends_there() {
    run_control(async |local| {
        let dir = tempfile::tempdir().unwrap();
        let (disk, log) = (image(dir.path(), "d", SIZE, 0), image(dir.path(), "l", 4096, 0));
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, logging(file("d", &disk), &log)).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        write(&lane, 0, &[1; 1024], NO).await.unwrap();
        flush(&lane).await.unwrap();
        assert_eq!(write(&lane, 1024, &[2; 2048], NO).await, Err(IoError::NoSpace));
        assert_eq!(write(&lane, 4096, &[3; 512], NO).await, Err(IoError::NoSpace), "although it would fit");
        assert_eq!(read(&lane, range(4096, 512)).await.unwrap(), [0; 512], "what is not logged is not written");
        let whole = entries(&std::fs::read(&log).unwrap());
        assert_eq!(whole.iter().map(|entry| entry.flags).collect::<Vec<_>>(), [0, 1]);

        let failing = json!({
            "driver": "blkdebug", "image": { "driver": "file", "filename": image(dir.path(), "m", ROOM, 0) },
            "inject-error": [{ "event": "none", "iotype": "write", "sector": 1 }]
        });
        let options = with(
            logging(file("e", &image(dir.path(), "e", SIZE, 0)), ""),
            &json!({ "node-name": "o", "log": failing }),
        );
        let node = add(&graph, options).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        assert_eq!(write(&lane, 0, &[1; 512], NO).await, Err(ERROR));
        assert_eq!(flush(&lane).await, Err(ERROR));
    });
}

/// A guest decides how long its requests are; what is copied for the log at once is bounded.
#[test]
fn long_requests_are_logged_in_pieces() {
    run_control(async |local| {
        const LEN: usize = 4 << 20;
        let graph = Graph::new(Arc::new(|_| ()));
        let seen: [Arc<Seen>; 2] = Default::default();
        for (name, seen, len) in [("disk", &seen[0], LEN), ("log", &seen[1], 4 * LEN)] {
            let mem = NewNode::new(name.into(), NodeOptions::default(), |_| (Mem::new(vec![7; len], seen), len as u64));
            support::add(&graph, mem).await;
        }
        let node = json!({ "driver": "blklogwrites", "node-name": "n", "file": "disk", "log": "log",
                           "log-sector-size": 4096 });
        let node = add(&graph, node).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        write(&lane, 0, &vec![1; LEN], NO).await.unwrap();
        lane.write_zeroes(&enter(&lane).await, range(512, LEN as u64 - 1024), NO).await.unwrap();
        assert_eq!(read(&lane, range(LEN as u64 - 1024, 1024)).await.unwrap(), [[0; 512], [1; 512]].concat());
        let largest = seen.each_ref().map(|seen| seen.largest.load(Relaxed));
        assert!(largest.iter().all(|bytes| *bytes <= (1 << 20) + 2 * 4096), "{largest:?}");
    });
}

/// A reader's flush has nothing to log, and a log that nobody may write to stays as it is.
#[test]
fn a_node_that_writes_nothing_logs_no_flush() {
    run_control(async |local| {
        let dir = tempfile::tempdir().unwrap();
        let (disk, log) = (image(dir.path(), "d", SIZE, 0), image(dir.path(), "l", SIZE, 0));
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, with(logging(file("d", &disk), &log), &json!({ "read-only": true }))).await.unwrap();
        let port = attach(&graph, node, READER).await.unwrap();
        flush(&port.handle().lane(&local)).await.unwrap();
        assert!(std::fs::read(&log).unwrap().iter().all(|byte| *byte == 0));
    });
}

/// Requests are parked in the log while the node is drained.
#[test]
fn a_drain_gets_through_to_the_log() {
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let valve = Valve::shut();
        let log = graph.permit().add(mem("mem", 0, &Arc::default())).await.unwrap();
        graph.permit().add(mem("disk", 0, &Arc::default())).await.unwrap();
        graph.permit().add(park("log", log, &valve, true)).await.unwrap();
        let node = json!({ "driver": "blklogwrites", "node-name": "n", "file": "disk", "log": "log" });
        let node = add(&graph, node).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let threads = [io_thread(), io_thread()];
        let results: Vec<_> = (0..8_usize)
            .map(|at| {
                let (handle, (done, result)) = (port.handle(), block_core::rt::sync::oneshot());
                threads[at % 2].remote().spawn(move |local| async move {
                    let _ = done.send(write(&handle.lane(&local), at as u64 * 256, &[1; 512], NO).await);
                });
                result
            })
            .collect();
        while valve.parked() < 1 {
            on(&threads[0], &port.handle(), async |_| ()).await;
        }
        let mut permit = graph.permit();
        let drained = permit.drain(&[node]).await.unwrap();
        // Whoever had not entered before the drain comes after it.
        valve.open_for_others();
        drop(drained);
        for result in results {
            result.await.unwrap().unwrap();
        }
    });
}

#[test]
fn only_the_interval_can_be_changed() {
    run_control(async |_| {
        let logged = Logged::new(json!({})).await;
        let options = logging(with(file("disk", &logged.disk), &json!({ "discard": "unmap" })), &logged.log);
        let now = |more: Value| {
            let mut options = with(options.clone(), &more);
            options["log"] =
                logged.graph.nodes().iter().find(|node| node.name.starts_with('#')).unwrap().name.clone().into();
            options["file"] = "disk".into();
            options
        };
        reopen(&logged.graph, &[now(json!({ "log-super-update-interval": 7 }))]).await.unwrap();
        let refused = reopen(&logged.graph, &[now(json!({ "log-sector-size": 4096 }))]).await.unwrap_err();
        assert!(refused.contains("Cannot change the option 'log-sector-size'"), "{refused}");
        let refused = reopen(&logged.graph, &[now(json!({ "log-append": true }))]).await.unwrap_err();
        assert!(refused.contains("Cannot change the option 'log-append'"), "{refused}");
    });
}
