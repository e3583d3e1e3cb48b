//! What every driver has to do, whatever it is: the suite goes through the catalog, so a new line there that has no
//! subject here fails.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "support/random.rs"]
mod random;
mod support;

use std::any::Any;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use bench::{
    Loop, READER, add, attach, crooked, enter, file, flush, image, io_thread, on, range, read, with, write, writer,
};
use block_core::base::{ByteRange, IoError};
use block_core::catalog;
use block_core::codec::SecretBytes;
use block_core::codec::secret::{Encoding, Secret};
use block_core::drivers::filter::throttle::{Limits, ThrottleGroup, ThrottleLimits};
use block_core::graph::{DiscardMode, Extent, Graph, NewNode, NodeOptions, Place, Preallocation, WriteFlags};
use block_core::port::PortLane;
use block_core::rt::{Local, run_control};
use random::Random;
use serde_json::{Value, json};
use support::Mem;
use support::overlay::NewOverlay;

/// One way of having one driver.
struct Subject {
    options: Value,
    /// What is written can be read.
    keeps: bool,
    /// `block_resize` works.
    resizes: bool,
    /// To multiples of this.
    grain: usize,
    /// What is new then reads as zeroes.
    grows_zeroes: bool,
    /// The file in which the node's bytes can be seen from outside, and where in it they begin.
    seen_in: Option<(String, usize)>,
    _held: Option<Box<dyn Any>>,
}

impl Subject {
    /// There is something to write to, whether it is kept or not.
    fn is_written(&self) -> bool {
        self.options["driver"] != "snapshot-access"
    }
}

const SIZE: usize = 1 << 20;

fn subjects(driver: &str, dir: &Path) -> Vec<Subject> {
    match driver {
        "file" => file_subjects(dir).into_iter().chain(file_subjects(Path::new("/dev/shm"))).collect(),
        "host_device" => {
            let sectors = ["512", "4096"];
            let all = sectors.iter().flat_map(|sector| engines(false).into_iter().map(move |engine| (sector, engine)));
            all.map(|(sector, engine)| device(dir, &engine, sector)).collect()
        }
        "null-co" | "null-aio" => vec![
            null(json!({ "driver": driver, "size": SIZE, "read-zeroes": true })),
            null(json!({ "driver": driver, "size": SIZE, "read-zeroes": true, "latency-ns": 1000 })),
        ],
        "raw" => raw_subjects(dir),
        "luks" => luks_subjects(dir),
        "qcow2" => qcow2_subjects(dir),
        "copy-before-write" => vec![copy_before_write(dir)],
        "snapshot-access" => vec![snapshot_access(dir)],
        "throttle" => ["free", "limited"].map(|group| throttled(dir, group)).into(),
        "blkdebug" => blkdebug_subjects(dir),
        "quorum" => quorum_subjects(dir),
        "blklogwrites" => [512, 4096].map(|sector| blklogwrites(dir, sector)).into(),
        "blkreplay" => vec![blkreplay(dir)],
        "blkverify" => vec![blkverify(dir)],
        "preallocate" => preallocate_subjects(dir),
        "copy-on-read" | "compress" => vec![layered(json!({ "driver": driver, "discard": "unmap", "file": "top" }))],
        other => panic!("driver '{other}' has no subject in the conformance suite"),
    }
}

fn engines(is_tmpfs: bool) -> Vec<Value> {
    let all = [("threads", false), ("io_uring", false), ("threads", true), ("io_uring", true), ("native", true)];
    let usable = all.into_iter().filter(|(_, direct)| !(is_tmpfs && *direct));
    usable.map(|(aio, direct)| json!({ "aio": aio, "cache": { "direct": direct }, "discard": "unmap" })).collect()
}

fn file_subjects(dir: &Path) -> Vec<Subject> {
    let scratch = tempfile::tempdir_in(dir).unwrap();
    let held: Rc<dyn Any> = Rc::new(scratch);
    let dir = held.downcast_ref::<tempfile::TempDir>().unwrap().path();
    let is_tmpfs = dir.starts_with("/dev/shm");
    let subject = |(number, engine): (usize, Value)| {
        // The last sector is not complete in the file; in the node it is.
        let path = image(dir, &format!("{number}.img"), SIZE - 100, 0);
        let options = with(with(file("subject", &path), &json!({ "detect-zeroes": "unmap" })), &engine);
        Subject {
            options,
            keeps: true,
            grows_zeroes: true,
            grain: 512,
            resizes: true,
            seen_in: Some((path, 0)),
            _held: Some(Box::new(held.clone())),
        }
    };
    engines(is_tmpfs).into_iter().enumerate().map(subject).collect()
}

/// The same files with a filter above.
fn preallocate_subjects(dir: &Path) -> Vec<Subject> {
    let above = |file: Subject| {
        let own =
            json!({ "driver": "preallocate", "discard": "unmap", "node-name": "subject", "prealloc-size": 65536 });
        let file_options = with(file.options, &json!({ "node-name": "file" }));
        Subject { options: with(own, &json!({ "file": file_options })), ..file }
    };
    file_subjects(dir).into_iter().map(above).collect()
}

fn device(dir: &Path, engine: &Value, sector: &str) -> Subject {
    let path = image(dir, "device.img", SIZE, 0);
    let device = Loop::with_sectors(&path, sector);
    let options = json!({ "driver": "host_device", "node-name": "subject", "filename": device.path });
    let held: Option<Box<dyn Any>> = Some(Box::new(device));
    Subject {
        options: with(options, engine),
        keeps: true,
        grows_zeroes: true,
        grain: 512,
        resizes: false,
        seen_in: None,
        _held: held,
    }
}

fn null(options: Value) -> Subject {
    let options = with(options, &json!({ "node-name": "subject" }));
    Subject { options, keeps: false, grows_zeroes: true, grain: 512, resizes: false, seen_in: None, _held: None }
}

/// The groups are those of [`graph`].
fn throttled(dir: &Path, group: &str) -> Subject {
    let path = image(dir, "throttled.img", SIZE, 0);
    let file = json!({ "driver": "file", "filename": path });
    let options = json!({ "driver": "throttle", "node-name": "subject", "throttle-group": group, "file": file });
    Subject {
        options,
        keeps: true,
        grows_zeroes: true,
        grain: 512,
        resizes: true,
        seen_in: Some((path, 0)),
        _held: None,
    }
}

/// The layers are those of [`graph`].
fn layered(options: Value) -> Subject {
    let options = with(options, &json!({ "node-name": "subject" }));
    Subject { options, keeps: true, grows_zeroes: true, grain: 512, resizes: true, seen_in: None, _held: None }
}

/// A graph with what the subjects refer to: throttle groups, and an image in two layers.
async fn graph() -> Rc<Graph> {
    let graph = Graph::new(Arc::new(|_| ()));
    let limited = ThrottleLimits { iops_total: Some(100_000), bps_total: Some(1 << 30), ..ThrottleLimits::default() };
    for (id, limits) in [("free", ThrottleLimits::default()), ("limited", limited)] {
        graph.objects().insert(id, ThrottleGroup::new(limits.over(Limits::default()).unwrap()));
    }
    let word = Secret::new(SecretBytes::new(b"word".to_vec()), Encoding::Raw).unwrap();
    graph.objects().insert("word", Arc::new(word));
    let base = Mem::new(vec![7; SIZE], &Arc::default());
    let base = NewNode::new("base".into(), NodeOptions::default(), |_| (base, SIZE as u64));
    let base = support::add(&graph, base).await;
    let options = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
    NewOverlay { cluster: 512, size: SIZE as u64, backing: Some(base), options }.add(&graph, "top").await;
    graph
}

fn raw_subjects(dir: &Path) -> Vec<Subject> {
    let path = image(dir, "raw.img", SIZE + 8192, 0);
    let below = json!({ "driver": "file", "filename": path });
    let direct = json!({ "driver": "file", "filename": path, "aio": "io_uring", "cache": { "direct": true } });
    let raw = |more: Value, offset: usize, resizes: bool| {
        let options = with(json!({ "driver": "raw", "node-name": "subject", "discard": "unmap" }), &more);
        Subject {
            options,
            keeps: true,
            grows_zeroes: true,
            grain: 512,
            resizes,
            seen_in: Some((path.clone(), offset)),
            _held: None,
        }
    };
    vec![
        raw(json!({ "file": below }), 0, true),
        raw(json!({ "file": below, "offset": 1536 }), 1536, true),
        raw(json!({ "file": direct, "offset": 512, "size": SIZE }), 512, false),
    ]
}

/// Small and large sectors, and a header elsewhere. The secret is that of [`graph`].
fn luks_subjects(dir: &Path) -> Vec<Subject> {
    let key = dir.join("word.key");
    std::fs::write(&key, "word").unwrap();
    let subject = |name: &str, how: &[&str], begins: usize, grain: usize, more: Value| {
        let path = image(dir, name, SIZE + begins, 0);
        let quick = ["60", "cryptsetup", "-q", "luksFormat", "--pbkdf-force-iterations", "1000", "--key-file"];
        let mut format = std::process::Command::new("timeout");
        let status = format.args(quick).arg(&key).args(how).arg(&path).status();
        assert!(status.unwrap().success(), "cryptsetup makes an image");
        let file = json!({ "driver": "file", "filename": path });
        let options = json!({ "driver": "luks", "node-name": "subject", "key-secret": "word", "file": file });
        let options = with(options, &more);
        Subject { options, keeps: true, grows_zeroes: false, grain, resizes: true, seen_in: None, _held: None }
    };
    let header = dir.join("header").to_str().unwrap().to_owned();
    let luks2 = ["--type", "luks2", "--pbkdf", "pbkdf2", "--sector-size"];
    vec![
        subject(
            "one.luks",
            &["--type", "luks1"],
            2 << 20,
            512,
            json!({ "detect-zeroes": "unmap", "discard": "unmap" }),
        ),
        subject("two.luks", &[&luks2[..], &["512"]].concat(), 16 << 20, 512, json!({})),
        subject("large.luks", &[&luks2[..], &["4096"]].concat(), 16 << 20, 4096, json!({})),
        subject(
            "apart.luks",
            &["--type", "luks1", "--header", &header],
            0,
            512,
            json!({ "header": { "driver": "file", "filename": header } }),
        ),
    ]
}

/// Small clusters, subclusters, and an image over another.
fn qcow2_subjects(dir: &Path) -> Vec<Subject> {
    let made = |name: &str, options: &[&str], more: Value| {
        let path = dir.join(name).to_str().unwrap().to_owned();
        let size = SIZE.to_string();
        let arguments = [&["create", "-q", "-f", "qcow2"], options, &[path.as_str(), size.as_str()]].concat();
        let status = std::process::Command::new("timeout").args(["60", "qemu-img"]).args(arguments).status();
        assert!(status.unwrap().success(), "qemu-img makes an image");
        let file = json!({ "driver": "file", "filename": path });
        let options = json!({ "driver": "qcow2", "node-name": "subject", "discard": "unmap", "file": file });
        Subject {
            options: with(options, &more),
            keeps: true,
            grows_zeroes: true,
            grain: 512,
            resizes: true,
            seen_in: None,
            _held: None,
        }
    };
    vec![
        made("small.qcow2", &["-o", "cluster_size=512"], json!({ "discard-no-unref": true })),
        made("plain.qcow2", &["-o", "compat=0.10"], json!({ "detect-zeroes": "on" })),
        made("subclusters.qcow2", &["-o", "extended_l2=on,cluster_size=16k"], json!({})),
        made("over.qcow2", &["-b", "base.raw", "-F", "raw", "-u"], json!({ "backing": "base" })),
    ]
}

/// An image and room for what it had.
fn kept(dir: &Path, size: usize) -> (String, Value) {
    let (path, room) = (image(dir, "kept.img", size, 0), image(dir, "room.img", size, 0));
    let below = json!({ "driver": "file", "filename": path, "discard": "unmap" });
    let target = json!({ "driver": "file", "filename": room });
    (path, json!({ "driver": "copy-before-write", "discard": "unmap", "file": below, "target": target }))
}

fn copy_before_write(dir: &Path) -> Subject {
    // The last cluster is not complete.
    let (path, options) = kept(dir, SIZE + 8192);
    let options = with(options, &json!({ "node-name": "subject" }));
    Subject {
        options,
        keeps: true,
        grows_zeroes: true,
        grain: 512,
        resizes: false,
        seen_in: Some((path, 0)),
        _held: None,
    }
}

fn snapshot_access(dir: &Path) -> Subject {
    let (_, below) = kept(dir, SIZE);
    let options = json!({ "driver": "snapshot-access", "node-name": "subject", "file": below });
    Subject { options, keeps: false, grows_zeroes: true, grain: 512, resizes: false, seen_in: None, _held: None }
}

fn blkdebug_subjects(dir: &Path) -> Vec<Subject> {
    let path = image(dir, "blkdebug.img", SIZE, 0);
    let below = json!({ "driver": "file", "filename": path });
    let subject = |more: Value| {
        let options = json!({ "driver": "blkdebug", "node-name": "subject", "discard": "unmap", "image": below });
        let seen_in = Some((path.clone(), 0));
        Subject {
            options: with(options, &more),
            keeps: true,
            grows_zeroes: true,
            grain: 512,
            resizes: true,
            seen_in,
            _held: None,
        }
    };
    let odd = json!({
        "align": 4096, "max-transfer": 8192, "opt-write-zero": 12288, "max-write-zero": 24576,
        "opt-discard": 12288, "max-discard": 24576, "set-state": [{ "event": "pwritev", "new_state": 2 }]
    });
    vec![subject(json!({})), subject(odd)]
}

fn quorum_subjects(dir: &Path) -> Vec<Subject> {
    let vote = |more: Value, files: &[&str], threshold: usize| {
        let path = |name: &&str| image(dir, &format!("{name}-of-{}.img", files.len()), SIZE, 0);
        let paths: Vec<String> = files.iter().map(path).collect();
        let children: Vec<Value> = paths.iter().map(|path| json!({ "driver": "file", "filename": path })).collect();
        let options = json!({ "driver": "quorum", "node-name": "subject", "children": children, "discard": "unmap" });
        let options = with(with(options, &json!({ "vote-threshold": threshold })), &more);
        Subject {
            options,
            keeps: true,
            grows_zeroes: true,
            grain: 512,
            resizes: true,
            seen_in: Some((paths[0].clone(), 0)),
            _held: None,
        }
    };
    vec![
        vote(json!({ "rewrite-corrupted": true }), &["a", "b", "c"], 2),
        vote(json!({ "blkverify": true }), &["d", "e"], 2),
        vote(json!({ "read-pattern": "fifo" }), &["f", "g", "h", "i"], 1),
        vote(json!({}), &["j"], 1),
    ]
}

fn blklogwrites(dir: &Path, sector: u32) -> Subject {
    let (path, log) = (image(dir, "logged.img", SIZE, 0), image(dir, "logged.log", 64 << 20, 0));
    let options = json!({
        "driver": "blklogwrites", "node-name": "subject", "discard": "unmap", "log-sector-size": sector,
        "file": { "driver": "file", "filename": path }, "log": { "driver": "file", "filename": log }
    });
    Subject {
        options,
        keeps: true,
        grows_zeroes: true,
        grain: 512,
        resizes: true,
        seen_in: Some((path, 0)),
        _held: None,
    }
}

fn blkreplay(dir: &Path) -> Subject {
    let path = image(dir, "replay.img", SIZE, 0);
    let options = json!({
        "driver": "blkreplay", "node-name": "subject", "discard": "unmap", "x-patience-ms": 1,
        "image": { "driver": "file", "filename": path }
    });
    Subject {
        options,
        keeps: true,
        grows_zeroes: true,
        grain: 512,
        resizes: true,
        seen_in: Some((path, 0)),
        _held: None,
    }
}

fn blkverify(dir: &Path) -> Subject {
    let (test, raw) = (image(dir, "test.img", SIZE, 0), image(dir, "right.img", SIZE, 0));
    let options = json!({
        "driver": "blkverify", "node-name": "subject", "discard": "unmap",
        "test": { "driver": "file", "filename": test },
        "raw": { "driver": "file", "filename": raw, "cache": { "direct": true }, "aio": "io_uring" }
    });
    Subject {
        options,
        keeps: true,
        grows_zeroes: true,
        grain: 512,
        resizes: false,
        seen_in: Some((test, 0)),
        _held: None,
    }
}

#[test]
fn every_driver_keeps_its_promises() {
    let dir = tempfile::tempdir().unwrap();
    for driver in catalog::drivers() {
        for subject in subjects(driver, dir.path()) {
            eprintln!("{driver}: {}", subject.options);
            run_control(async |local| conform(&local, &subject).await);
        }
    }
}

async fn conform(_: &Rc<Local>, subject: &Subject) {
    let graph = graph().await;
    let node = add(&graph, subject.options.clone()).await.unwrap();
    let perms = if subject.is_written() { writer() } else { READER };
    let port = attach(&graph, node, perms).await.unwrap();
    let size = port.geometry().size as usize;
    let thread = io_thread();
    let (keeps, is_written) = (subject.keeps, subject.is_written());
    let start = if keeps { on(&thread, &port.handle(), whole).await } else { vec![0; size] };
    let mut model = on(&thread, &port.handle(), async move |lane| {
        bounds(&lane, size as u64).await;
        let model = if keeps { random_work(&lane, start).await } else { vec![0; size] };
        if is_written { side_by_side(&lane, model, keeps).await } else { model }
    })
    .await;
    if let Some((path, offset)) = &subject.seen_in {
        let seen = std::fs::read(path).unwrap();
        let seen = &seen[*offset..seen.len().min(offset + size)];
        assert_same(seen, &model[..seen.len()]);
        assert!(model[seen.len()..].iter().all(|byte| *byte == 0));
    }
    port.detach(&mut graph.permit()).await;
    for (new, how) in [
        (size + 4096, Preallocation::Off),
        (size - 8192, Preallocation::Off),
        (size + 512, Preallocation::Falloc),
        (size + 65536, Preallocation::Full),
    ] {
        let result = graph.permit().resize(node, new as u64, how).await;
        let resizes = subject.resizes && new.is_multiple_of(subject.grain);
        assert_eq!(result.is_ok(), resizes, "{:?}", result.err());
        if resizes {
            model.resize(new, 0);
        }
    }
    let port = attach(&graph, node, perms).await.unwrap();
    assert_eq!(port.geometry().size as usize, model.len());
    let known = if subject.grows_zeroes { model.len() } else { size - 8192 };
    on(&thread, &port.handle(), async move |lane| {
        assert_same(&whole(lane.clone()).await[..known], &model[..known]);
        bounds(&lane, model.len() as u64).await;
    })
    .await;
    port.detach(&mut graph.permit()).await;
    graph.permit().remove(node).await.unwrap();
}

async fn whole(lane: Rc<PortLane>) -> Vec<u8> {
    let size = lane.geometry(&enter(&lane).await).size;
    read(&lane, range(0, size)).await.unwrap()
}

fn assert_same(seen: &[u8], expected: &[u8]) {
    assert_eq!(seen.len(), expected.len());
    let differs = seen.iter().zip(expected).position(|(one, other)| one != other);
    assert_eq!(differs, None, "the first byte that differs");
}

/// Nothing reaches past the end; everything up to it is there.
async fn bounds(lane: &PortLane, size: u64) {
    for at in [range(size, 512), range(size - 512, 1024), range(size - 1, 2), range(1 << 60, 512)] {
        assert_eq!(read(lane, at).await, Err(IoError::OutOfRange));
        let bytes = vec![1; at.len() as usize];
        assert_eq!(write(lane, at.start(), &bytes, WriteFlags::default()).await, Err(IoError::OutOfRange));
        let pin = enter(lane).await;
        assert_eq!(lane.write_zeroes(&pin, at, WriteFlags::default()).await, Err(IoError::OutOfRange));
        assert_eq!(lane.discard(&pin, at).await, Err(IoError::OutOfRange));
        assert_eq!(lane.map(&pin, at).await, Err(IoError::OutOfRange));
    }
    read(lane, range(size - 512, 512)).await.unwrap();
}

/// Random requests, checked against a model; gives the model.
async fn random_work(lane: &PortLane, mut model: Vec<u8>) -> Vec<u8> {
    let mut random = Random(42);
    for step in 0..400 {
        let at = anywhere(&mut random, model.len());
        let here = at.start() as usize..at.end() as usize;
        let flags = WriteFlags { fua: random.below(4) == 0, may_unmap: random.below(2) == 0, ..WriteFlags::default() };
        match random.below(6) {
            0 | 1 => {
                let bytes: Vec<u8> = here.clone().map(|at| (at as u64 % 251) as u8 ^ step as u8).collect();
                write(lane, at.start(), &bytes, flags).await.unwrap();
                model[here].copy_from_slice(&bytes);
            }
            2 => {
                lane.write_zeroes(&enter(lane).await, at, flags).await.unwrap();
                model[here].fill(0);
            }
            3 => {
                lane.discard(&enter(lane).await, at).await.unwrap();
                let now = read(lane, at).await.unwrap();
                let old_or_zero = now.iter().zip(&model[here.clone()]).all(|(now, old)| *now == 0 || now == old);
                assert!(old_or_zero, "a discard left something else at {at:?}");
                model[here].copy_from_slice(&now);
            }
            4 => flush(lane).await.unwrap(),
            _ => assert_same(&read(lane, at).await.unwrap(), &model[here]),
        }
    }
    // A write of nothing but zeroes, which may have been detected, is a write.
    write(lane, 65536, &[0; 8192], WriteFlags::default()).await.unwrap();
    model[65536..65536 + 8192].fill(0);
    flush(lane).await.unwrap();
    mapped(lane, &model).await;
    model
}

/// The extents cover everything once, and what is said to be zero is.
async fn mapped(lane: &PortLane, model: &[u8]) {
    let mut at = 0;
    while at < model.len() {
        let rest = range(at as u64, (model.len() - at) as u64);
        let Extent { len, place } = lane.map(&enter(lane).await, rest).await.unwrap();
        assert!((1..=rest.len()).contains(&len), "{len} of {rest:?}");
        let end = at + len as usize;
        if matches!(place, Place::Zero { .. }) {
            assert!(model[at..end].iter().all(|byte| *byte == 0), "{at}..{end} is said to be zero");
        }
        at = end;
    }
}

/// Four writers whose sectors are neighbours, all at once: with larger blocks each write is a read-modify-write, and
/// none may lose another's.
async fn side_by_side(lane: &Rc<PortLane>, mut model: Vec<u8>, keeps: bool) -> Vec<u8> {
    const WRITERS: usize = 4;
    let sectors = 256;
    let mut tasks = Vec::new();
    for number in 0..WRITERS {
        let (lane, (done, result)) = (lane.clone(), block_core::rt::sync::oneshot());
        Local::current().spawn(async move {
            for sector in (number..sectors).step_by(WRITERS) {
                let bytes = [number as u8 + 1; 512];
                write(&lane, sector as u64 * 512, &bytes, WriteFlags::default()).await.unwrap();
            }
            let _ = done.send(());
        });
        tasks.push(result);
    }
    for task in tasks {
        task.await.unwrap();
    }
    if keeps {
        for sector in 0..sectors {
            model[sector * 512..][..512].fill((sector % WRITERS) as u8 + 1);
        }
    }
    assert_same(&whole(lane.clone()).await, &model);
    model
}

/// Bytes, sectors or blocks, at least one byte, inside `size`.
fn anywhere(random: &mut Random, size: usize) -> ByteRange {
    let unit = [1, 512, 4096][random.below(3) as usize];
    let units = size as u64 / unit;
    let start = random.below(units);
    let len = 1 + random.below((units - start).min(64 * 1024 / unit));
    range(start * unit, len * unit)
}

/// The suite can fail: a driver that forgets is caught.
#[test]
#[should_panic(expected = "the first byte that differs")]
fn a_driver_that_forgets_is_caught() {
    run_control(async |local| {
        let options = json!({ "driver": "null-co", "node-name": "subject", "size": SIZE, "read-zeroes": true });
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, options).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        let buf = crooked(512);
        buf.fill(7);
        lane.write(&enter(&lane).await, range(0, 512), buf, WriteFlags::default()).await.unwrap();
        assert_same(&read(&lane, range(0, 512)).await.unwrap(), &[7; 512]);
    });
}
