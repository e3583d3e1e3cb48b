//! What is written is what QEMU's programs read, and they find the image in order: no error and no leak.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use block_core::base::{ByteRange, IoError};
use block_core::graph::{DirectRequest, Graph, Passed, Preallocation, WriteFlags};
use block_core::port::PortLane;
use block_core::rt::{IoBuf, Local, run_control};
use serde_json::{Value, json};

use crate::bench::{Loop, add, attach, enter, flush, image, io_thread, range, read, started, with, write, writer};
use crate::peer::{KINDS, Kind, check, contents, create, file, node, run, work};
use crate::random::Random;

const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };

/// What a disk should have.
pub(crate) struct Model {
    pub(crate) bytes: Vec<u8>,
    pub(crate) random: Random,
    pub(crate) cluster: u64,
    pub(crate) compresses: bool,
}

impl Model {
    fn at(&mut self, most: u64) -> ByteRange {
        let size = self.bytes.len() as u64;
        let start = self.random.below(size);
        // Often whole sectors, sometimes anything.
        let unit = if self.random.below(4) == 0 { 1 } else { 512 };
        let start = start / unit * unit;
        let len = (1 + self.random.below(most)).next_multiple_of(unit).min(size - start);
        range(start, len)
    }

    fn clusters(&mut self, most: u64) -> ByteRange {
        let at = self.at(most);
        let start = at.start() / self.cluster * self.cluster;
        let end = at.end().next_multiple_of(self.cluster).min(self.bytes.len() as u64);
        ByteRange::between(start, end).unwrap()
    }

    fn set(&mut self, at: ByteRange, bytes: &[u8]) {
        self.bytes[at.start() as usize..at.end() as usize].copy_from_slice(bytes);
    }

    fn fresh(&mut self, len: u64) -> Vec<u8> {
        let seed = self.random.next();
        (0..len).map(|at| (seed >> (at / 64 % 8 * 8)) as u8 ^ (at / 512) as u8).collect()
    }

    pub(crate) async fn step(&mut self, lane: &PortLane) -> Result<(), IoError> {
        let most = if self.random.below(6) == 0 { 6 * self.cluster.min(200_000) } else { 20_000 };
        match self.random.below(16) {
            0..7 => {
                let at = self.at(most);
                let bytes = self.fresh(at.len());
                write(lane, at.start(), &bytes, PLAIN).await?;
                self.set(at, &bytes);
            }
            7..9 => {
                let (at, may_unmap) = (self.at(3 * most), self.random.below(2) == 0);
                lane.write_zeroes(&enter(lane).await, at, WriteFlags { may_unmap, ..PLAIN }).await?;
                self.set(at, &vec![0; at.len() as usize]);
            }
            9..11 => {
                let at = self.at(3 * most);
                let before = self.bytes[at.start() as usize..at.end() as usize].to_vec();
                lane.discard(&enter(lane).await, at).await?;
                let now = read(lane, at).await?;
                assert!(now.iter().zip(&before).all(|(now, before)| now == before || *now == 0), "a discard of {at:?}");
                self.set(at, &now);
            }
            11 if self.compresses => {
                let at = self.clusters(most);
                let bytes = self.fresh(at.len());
                let buf = IoBuf::from_slice(&bytes)?;
                lane.write(&enter(lane).await, at, buf, WriteFlags { compressed: true, ..PLAIN }).await?;
                self.set(at, &bytes);
            }
            12 => flush(lane).await?,
            _ => {
                let at = self.at(most);
                let seen = read(lane, at).await?;
                let expected = &self.bytes[at.start() as usize..at.end() as usize];
                let differs = seen.iter().zip(expected).position(|(one, other)| one != other);
                assert_eq!(differs, None, "the first byte that differs in {at:?}");
            }
        }
        Ok(())
    }
}

/// Random work through a node that is opened for it and closed after it.
fn session(options: &Value, model: &mut Model, steps: u64, resizes: bool) {
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, with(options.clone(), &json!({ "node-name": "top" }))).await.unwrap();
        let mut port = attach(&graph, node, writer()).await.unwrap();
        for step in 0..steps {
            let lane = port.handle().lane(&Local::current());
            model.step(&lane).await.unwrap();
            drop(lane);
            if resizes && step % 40 == 39 {
                port.detach(&mut graph.permit()).await;
                let size = (1 << 20) + model.random.below(5 << 11) * 512;
                graph.permit().resize(node, size, Preallocation::Off).await.unwrap();
                model.bytes.resize(size as usize, 0);
                port = attach(&graph, node, writer()).await.unwrap();
            }
        }
        let lane = port.handle().lane(&Local::current());
        let size = model.bytes.len() as u64;
        assert!(read(&lane, range(0, size)).await.unwrap() == model.bytes, "before it is closed");
        drop(lane);
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
    });
}

fn swap(dir: &Path, kind: Kind, seed: u64, backed: bool, more: &Value, resizes: bool) {
    // Other work than in other runs, where that is wanted.
    let other: u64 = std::env::var("TRELLIS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let seed = seed + (other << 20);
    let what = format!("seed {seed:#x}, {}, backed: {backed}, {more}", kind.options);
    eprintln!("{what}");
    let size = if kind.cluster > 1 << 20 { (9 << 20) + 1536 } else { (3 << 20) + 512 };
    let base = dir.join("base.raw").to_str().unwrap().to_owned();
    std::fs::write(&base, (0..2_000_000u32).map(|at| (at / 512 % 253) as u8 | 1).collect::<Vec<_>>()).unwrap();
    let backing = backed.then_some((base.as_str(), "raw"));
    let path = create(dir, "top.qcow2", kind, size, backing);
    let below = backed.then(|| json!({ "driver": "raw", "file": file(&base) }));
    let options = with(node(&path, kind, below), more);
    let compresses = !kind.external;
    let mut model = Model { bytes: contents(&path), random: Random(seed), cluster: kind.cluster, compresses };
    for round in 0..3 {
        session(&options, &mut model, 120, resizes);
        check(&path);
        assert!(contents(&path) == model.bytes, "{what}: what QEMU reads after round {round}");
        let mut random = Random(seed + round + 1);
        let size = model.bytes.len() as u64;
        work(&path, kind, size, &mut random, 20);
        model.bytes = contents(&path);
    }
}

pub(crate) fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

#[test]
fn images_of_every_kind_are_written() {
    for (number, kind) in KINDS.iter().enumerate() {
        swap(in_memory().path(), *kind, 0x1000 + number as u64, false, &json!({}), false);
    }
}

#[test]
fn images_of_every_kind_are_written_over_others() {
    for (number, kind) in KINDS.iter().filter(|kind| !kind.options.contains("raw")).enumerate() {
        swap(in_memory().path(), *kind, 0x2000 + number as u64, true, &json!({}), false);
    }
}

#[test]
fn images_of_every_kind_change_their_size() {
    for (number, kind) in KINDS.iter().enumerate() {
        for backed in [false, true].into_iter().filter(|backed| !(*backed && kind.options.contains("raw"))) {
            let dir = in_memory();
            swap(dir.path(), *kind, 0x3000 + number as u64, backed, &json!({}), true);
            if kind.options.contains("raw") {
                let disk = contents(dir.path().join("top.qcow2").to_str().unwrap());
                assert!(disk == std::fs::read(dir.path().join("top.qcow2.data")).unwrap(), "the data file is the disk");
            }
        }
    }
}

#[test]
fn options_change_nothing_that_can_be_read() {
    let all = [
        json!({ "l2-cache-size": 512, "refcount-cache-size": 512, "l2-cache-entry-size": 512 }),
        json!({ "discard-no-unref": true }),
        json!({ "pass-discard-request": false, "pass-discard-other": true, "overlap-check": "none" }),
        json!({ "detect-zeroes": "unmap", "overlap-check": { "template": "constant", "active-l2": true } }),
        json!({ "file": { "driver": "blkdebug", "align": 512, "image": null } }),
    ];
    for (number, more) in all.iter().enumerate().filter(|(_, more)| more.get("file").is_none()) {
        for kind in [KINDS[0], KINDS[4], KINDS[10]] {
            swap(in_memory().path(), kind, 0x4000 + number as u64, number % 2 == 0, more, false);
        }
    }
}

/// QEMU leaves data behind the end of a disk that it makes smaller, inside the last cluster.
#[test]
fn what_lies_behind_the_end_does_not_come_back() {
    for (number, kind) in KINDS.iter().enumerate().filter(|(_, kind)| !kind.external && kind.cluster >= 65536) {
        let dir = in_memory();
        let path = create(dir.path(), "top.qcow2", *kind, 4 << 20, None);
        let packed = if number % 2 == 0 { "-c " } else { "" };
        run("qemu-io", &["-f", "qcow2", "-c", &format!("write {packed}-P 5 0 4M"), &path]);
        run("qemu-img", &["resize", "-q", "--shrink", "-f", "qcow2", &path, "2060k"]);
        let options = with(node(&path, *kind, None), &json!({ "node-name": "top" }));
        run_control(async |_| {
            let graph = Graph::new(Arc::new(|_| ()));
            let node = add(&graph, options).await.unwrap();
            graph.permit().resize(node, 4 << 20, Preallocation::Off).await.unwrap();
            graph.permit().remove(node).await.unwrap();
        });
        check(&path);
        let bytes = contents(&path);
        let end = 2060 << 10;
        assert!(bytes[..end].iter().all(|byte| *byte == 5) && bytes[end..].iter().all(|byte| *byte == 0), "{kind:?}");
    }
}

/// QEMU 10.0.2 goes on to pack compressed data into a cluster that was set free and is another's by now, and destroys what
/// is there: `qemu-io -d unmap -c 'write -c -P 1 0 512' -c 'discard 0 512' -c 'write -P 2 512 512' -c 'write -c -P 3 1024 512'`
/// on clusters of 512 bytes.
#[test]
fn compressed_data_does_not_go_where_other_data_is_by_now() {
    let dir = in_memory();
    let kind = Kind { options: "cluster_size=512", cluster: 512, external: false };
    let path = create(dir.path(), "top.qcow2", kind, 1 << 20, None);
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, with(node(&path, kind, None), &json!({ "node-name": "top" }))).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&Local::current());
        let packed = WriteFlags { compressed: true, ..PLAIN };
        for round in 0..3 {
            let start = round * 2048;
            write(&lane, start, &[1; 512], packed).await.unwrap();
            lane.discard(&enter(&lane).await, range(start, 512)).await.unwrap();
            flush(&lane).await.unwrap();
            write(&lane, start + 512, &[2; 512], PLAIN).await.unwrap();
            write(&lane, start + 1024, &[3; 512], packed).await.unwrap();
            let seen = read(&lane, range(start, 1536)).await.unwrap();
            assert!(seen[512..1024] == [2; 512] && seen[1024..] == [3; 512]);
        }
        drop(lane);
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
    });
    check(&path);
}

/// What is known of a cluster's place is enough for a ring entry: no future, no copy.
#[test]
fn requests_whose_place_is_known_go_straight_to_the_file() {
    let dir = in_memory();
    for kind in [KINDS[0], KINDS[10]] {
        let path = create(dir.path(), "top.qcow2", kind, 1 << 20, None);
        run_control(async |_| {
            let graph = Graph::new(Arc::new(|_| ()));
            let ring = with(file(&path), &json!({ "aio": "io_uring" }));
            let options = with(node(&path, kind, None), &json!({ "node-name": "top", "file": ring }));
            let node = add(&graph, options).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            let lane = port.handle().lane(&Local::current());
            let sent = |start: u64, write: bool| {
                let pin = lane.try_enter().unwrap();
                lane.direct(&pin, DirectRequest { write, at: range(start, 4096), fua: false, memory_bits: 0 })
            };
            assert!(sent(0, true).is_none(), "there is no room yet");
            write(&lane, 0, &vec![7; 65536], PLAIN).await.unwrap();
            lane.write_zeroes(&enter(&lane).await, range(65536, 65536), PLAIN).await.unwrap();
            for write in [false, true] {
                assert!(matches!(sent(8192, write), Some(Passed::Ring(..))), "{}", kind.options);
                assert!(sent(65536 - 2048, write).is_none(), "two places are two requests");
            }
            assert!(matches!(sent(65536, false), Some(Passed::Zeroed)));
            assert!(sent(65536, true).is_none() && sent(131_072, true).is_none());
            lane.discard(&enter(&lane).await, range(0, 65536)).await.unwrap();
            assert!(sent(8192, true).is_none(), "its room is gone");
        });
    }
}

/// A device has an end that does not move: what does not fit is refused, and what did is kept.
#[test]
fn a_device_that_is_full_says_so() {
    for kind in [KINDS[0], KINDS[4]] {
        let dir = tempfile::tempdir().unwrap();
        let device = Loop::over(&image(dir.path(), "device", 2 << 20, 0xee));
        let options = ["create", "-q", "-f", "qcow2", "-o", kind.options, &device.path, "16M"];
        run("qemu-img", &options);
        let below = json!({ "driver": "host_device", "filename": device.path, "discard": "unmap" });
        let options = with(node(&device.path, kind, None), &json!({ "node-name": "top", "file": below }));
        let (written, seen) = run_control(async |_| {
            let graph = Graph::new(Arc::new(|_| ()));
            let node = add(&graph, options).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            let lane = port.handle().lane(&Local::current());
            let mut written = Vec::new();
            let failed = loop {
                let start = written.len() as u64 * 70_000;
                match write(&lane, start, &[written.len() as u8 + 1; 50_000], PLAIN).await {
                    Ok(()) => written.push(start),
                    Err(error) => break error,
                }
            };
            assert_eq!(failed, IoError::NoSpace);
            flush(&lane).await.unwrap();
            let end = *written.last().unwrap() + 70_000;
            let seen = read(&lane, range(0, end)).await.unwrap();
            drop(lane);
            port.detach(&mut graph.permit()).await;
            graph.permit().remove(node).await.unwrap();
            (written, seen)
        });
        assert!(written.len() > 15, "{}", written.len());
        for (number, start) in written.iter().enumerate() {
            let start = *start as usize;
            assert!(seen[start..start + 50_000].iter().all(|byte| *byte == number as u8 + 1));
            assert!(seen[start + 50_000..start + 70_000].iter().all(|byte| *byte == 0), "what is around it is zeroes");
        }
        check(&device.path);
    }
}

/// Several threads allocate, overwrite and zero in one image at once, each in clusters of its own and at their borders.
#[test]
fn threads_write_side_by_side() {
    for (number, kind) in [KINDS[0], KINDS[4], KINDS[5], KINDS[10], KINDS[13]].into_iter().enumerate() {
        let dir = in_memory();
        let size = 8 << 20;
        let path = create(dir.path(), "top.qcow2", kind, size, None);
        let expected = run_control(async |_| {
            let graph = Graph::new(Arc::new(|_| ()));
            let options = with(node(&path, kind, None), &json!({ "node-name": "top" }));
            let node = add(&graph, options).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            let threads: Vec<_> = (0..4).map(|_| io_thread()).collect();
            let work: Vec<_> = threads
                .iter()
                .zip(0u64..)
                .map(|(thread, me)| {
                    let seed = 0x5000 + me * 77 + number as u64;
                    started(thread, &port.handle(), async move |lane| stripes(lane, me, seed, size).await)
                })
                .collect();
            let mut expected = vec![0; size as usize];
            for (me, work) in (0u64..).zip(work) {
                let mine = work.await.unwrap();
                for sector in (me..size / 512).step_by(4) {
                    let at = (sector * 512) as usize;
                    expected[at..at + 512].copy_from_slice(&mine[at..at + 512]);
                }
            }
            let lane = port.handle().lane(&Local::current());
            assert!(read(&lane, range(0, size)).await.unwrap() == expected, "before it is closed, {}", kind.options);
            drop(lane);
            port.detach(&mut graph.permit()).await;
            graph.permit().remove(node).await.unwrap();
            expected
        });
        check(&path);
        assert!(contents(&path) == expected, "{}", kind.options);
    }
}

/// Writes every fourth sector, from number `me` on: all clusters are everybody's.
async fn stripes(lane: Rc<PortLane>, me: u64, seed: u64, size: u64) -> Vec<u8> {
    let (mut random, mut mine) = (Random(seed), vec![0; size as usize]);
    for step in 0..1500u64 {
        let sector = random.below(size / 2048) * 4 + me;
        let at = range(sector * 512, 512);
        let bytes = vec![(step % 251) as u8 ^ me as u8; 512];
        match random.below(12) {
            0 => {
                lane.write_zeroes(&enter(&lane).await, at, PLAIN).await.unwrap();
                mine[at.start() as usize..at.end() as usize].fill(0);
            }
            1 => flush(&lane).await.unwrap(),
            _ => {
                write(&lane, at.start(), &bytes, PLAIN).await.unwrap();
                mine[at.start() as usize..at.end() as usize].copy_from_slice(&bytes);
                assert!(read(&lane, at).await.unwrap() == bytes);
            }
        }
    }
    mine
}
