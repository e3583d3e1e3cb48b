//! Clusters that were set free are used again while requests go on: not before the last of those is over that might still
//! be on its way there, and soon enough that an image does not grow, or run full, by being rewritten.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use block_core::base::IoError;
use block_core::graph::{DirectRequest, Graph, NodeId, Passage, Passed, WriteFlags};
use block_core::port::{Port, PortLane};
use block_core::rt::{Local, run_control};
use serde_json::{Value, json};

use crate::bench::{add, attach, enter, flush, io_thread, range, read, started, with, write, writer};
use crate::peer::{KINDS, Kind, check, contents, create, file, node, run};
use crate::random::Random;

const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };

async fn opened(options: &Value) -> (Rc<Graph>, NodeId, Port) {
    let graph = Graph::new(Arc::new(|_| ()));
    let node = add(&graph, with(options.clone(), &json!({ "node-name": "top" }))).await.unwrap();
    let port = attach(&graph, node, writer()).await.unwrap();
    (graph, node, port)
}

async fn closed((graph, node, port): (Rc<Graph>, NodeId, Port)) {
    port.detach(&mut graph.permit()).await;
    graph.permit().remove(node).await.unwrap();
}

/// A request by a ring entry that is under way: where it is in the file.
fn under_way(lane: &PortLane, start: u64, write: bool) -> (u64, Passage) {
    let pin = lane.try_enter().unwrap();
    let request = DirectRequest { write, at: range(start, 4096), fua: false, memory_bits: 0 };
    match lane.direct(&pin, request) {
        Some(Passed::Ring(entry, passage)) => (entry.offset, passage),
        other => panic!("{other:?}"),
    }
}

/// Nothing has happened to the cluster by the end of this that would not have happened at all.
async fn moment() {
    Local::current().sleep(Duration::from_millis(20)).await;
}

/// Others come and go all the time; one request stays.
#[test]
fn a_cluster_is_neither_punched_nor_used_before_the_last_request_is_over() {
    for write_is_late in [false, true] {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = create(dir.path(), "top.qcow2", KINDS[0], 1 << 20, None);
        let ring = with(file(&path), &json!({ "aio": "io_uring" }));
        let options = with(node(&path, KINDS[0], None), &json!({ "file": ring }));
        run_control(async |_| {
            let all = opened(&options).await;
            let lane = all.2.handle().lane(&Local::current());
            let bytes = |at: u64| {
                let mut found = [0; 512];
                std::fs::File::open(&path).unwrap().read_exact_at(&mut found, at).unwrap();
                found
            };
            write(&lane, 0, &[7; 65536], PLAIN).await.unwrap();
            flush(&lane).await.unwrap();
            let (place, late) = under_way(&lane, 4096, write_is_late);
            assert_eq!(bytes(place), [7; 512]);
            // Whoever enters from now on knows nothing of the cluster.
            lane.discard(&enter(&lane).await, range(0, 65536)).await.unwrap();
            for other in 1..6 {
                flush(&lane).await.unwrap();
                moment().await;
                write(&lane, other << 16, &[other as u8; 65536], PLAIN).await.unwrap();
                let (elsewhere, _) = under_way(&lane, (other << 16) + 4096, false);
                assert_ne!(elsewhere, place, "another's before the request is over");
                assert_eq!(bytes(place), [7; 512], "punched before the request is over");
            }
            drop(late);
            moment().await;
            flush(&lane).await.unwrap();
            assert_eq!(bytes(place), [0; 512], "the file below has heard of it");
            write(&lane, 6 << 16, &[6; 65536], PLAIN).await.unwrap();
            let (again, _) = under_way(&lane, (6 << 16) + 4096, false);
            assert_eq!(again, place, "it is used again");
            drop(lane);
            closed(all).await;
        });
        check(&path);
    }
}

/// A sector says whose it is.
fn sector(number: u64, version: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&if at % 2 == 0 { number + 1 } else { version }.to_le_bytes());
    }
    bytes
}

/// The disk of one of several who churn: clusters `me`, `me + 2` and so on.
struct Churn {
    lane: Rc<PortLane>,
    random: Random,
    me: u64,
    cluster: u64,
    clusters: u64,
    mine: Vec<u8>,
    /// Clusters of mine that have data, at most so many.
    live: Vec<u64>,
    most: usize,
}

impl Churn {
    async fn run(mut self, steps: u64) -> Result<Vec<u8>, IoError> {
        for step in 1..=steps {
            match self.random.below(24) {
                0 => flush(&self.lane).await?,
                1..5 => self.look().await?,
                _ if self.live.len() >= self.most => self.discard().await?,
                5..9 if !self.live.is_empty() => self.discard().await?,
                _ => self.write(step).await?,
            }
        }
        Ok(self.mine)
    }

    async fn write(&mut self, step: u64) -> Result<(), IoError> {
        let number = self.random.below(self.clusters / 2) * 2 + self.me;
        let (mut start, mut end) = (number * self.cluster, (number + 1) * self.cluster);
        if self.random.below(2) == 0 {
            start += self.random.below(self.cluster / 512) * 512;
            end = start + (1 + self.random.below((end - start) / 512)) * 512;
        }
        let bytes: Vec<u8> = (start / 512..end / 512).flat_map(|number| sector(number, step)).collect();
        write(&self.lane, start, &bytes, PLAIN).await?;
        self.mine[start as usize..end as usize].copy_from_slice(&bytes);
        if !self.live.contains(&number) {
            self.live.push(number);
        }
        Ok(())
    }

    async fn discard(&mut self) -> Result<(), IoError> {
        let number = self.live.swap_remove(self.random.below(self.live.len() as u64) as usize);
        let at = range(number * self.cluster, self.cluster);
        self.lane.discard(&enter(&self.lane).await, at).await?;
        self.mine[at.start() as usize..at.end() as usize].fill(0);
        Ok(())
    }

    async fn look(&mut self) -> Result<(), IoError> {
        let number = self.random.below(self.clusters / 2) * 2 + self.me;
        let at = range(number * self.cluster, self.cluster);
        let seen = read(&self.lane, at).await?;
        assert!(seen == self.mine[at.start() as usize..at.end() as usize], "cluster {number}");
        Ok(())
    }
}

/// Reads everything, over and over: no sector has anything of another's. One that is being written may be old and new in
/// part: memory, where the image lies here, has no sectors.
async fn watch(lane: Rc<PortLane>, size: u64, stop: Arc<AtomicBool>) -> u64 {
    let (mut random, mut looks) = (Random(77), 0);
    while !stop.load(Relaxed) {
        let start = random.below(size / 512) * 512;
        let at = range(start, (64 << 10).min(size - start));
        let seen = read(&lane, at).await.unwrap();
        for (number, found) in (start / 512..).zip(seen.chunks_exact(512)) {
            for pair in found.chunks_exact(16) {
                let whose = u64::from_le_bytes(pair[..8].try_into().unwrap());
                assert!(whose == 0 || whose == number + 1, "sector {number} has what is sector {}'s", whose - 1);
            }
        }
        looks += 1;
    }
    looks
}

struct Trial<'a> {
    kind: Kind,
    path: &'a str,
    options: Value,
    size: u64,
    /// Clusters that have data at any time, in hundredths of all.
    percent: u64,
    steps: u64,
    /// Drains come and go meanwhile.
    drains: bool,
}

impl Trial<'_> {
    /// Two threads churn and a third one watches; nothing is drained but where the trial says so. Gives how long the
    /// file is before the node is closed.
    fn run(&self) -> u64 {
        let Self { kind, path, size, .. } = *self;
        let clusters = size / kind.cluster;
        let (expected, len) = run_control(async |_| {
            let all = opened(&self.options).await;
            let threads: Vec<_> = (0..3).map(|_| io_thread()).collect();
            let (stop, steps) = (Arc::new(AtomicBool::new(false)), self.steps);
            let most = (clusters / 2 * self.percent / 100) as usize;
            let work: Vec<_> = (0..2u64)
                .map(|me| {
                    started(&threads[me as usize], &all.2.handle(), async move |lane| {
                        let (random, mine) = (Random(0x7000 + me), vec![0; size as usize]);
                        let churn =
                            Churn { lane, random, me, cluster: kind.cluster, clusters, mine, live: Vec::new(), most };
                        churn.run(steps).await
                    })
                })
                .collect();
            let told = stop.clone();
            let watching = started(&threads[2], &all.2.handle(), async move |lane| watch(lane, size, told).await);
            let draining = self.drains.then(|| {
                let (graph, node, stop) = (all.0.clone(), all.1, stop.clone());
                Local::current().spawn(async move {
                    while !stop.load(Relaxed) {
                        drop(graph.permit().drain(&[node]).await.unwrap());
                        Local::current().sleep(Duration::from_millis(3)).await;
                    }
                });
            });
            let mut expected = vec![0; size as usize];
            for (me, work) in (0u64..).zip(work) {
                let mine = work.await.unwrap().unwrap();
                for number in (me..clusters).step_by(2) {
                    let at = (number * kind.cluster) as usize..((number + 1) * kind.cluster) as usize;
                    expected[at.clone()].copy_from_slice(&mine[at]);
                }
            }
            stop.store(true, Relaxed);
            assert!(watching.await.unwrap() > 10);
            if draining.is_some() {
                moment().await;
            }
            let len = std::fs::metadata(path).unwrap().len();
            let lane = all.2.handle().lane(&Local::current());
            assert!(read(&lane, range(0, size)).await.unwrap() == expected, "{}", kind.options);
            drop(lane);
            closed(all).await;
            (expected, len)
        });
        check(path);
        assert!(contents(path) == expected, "{}", kind.options);
        len
    }
}

/// Without a drain the file is no longer than what has data at a time, by half and what a few tables and a batch of freed
/// clusters take. A thread that the kernel does not let run in the middle of a request keeps clusters from being used
/// again meanwhile: on a busy machine one run says little, so the best of three counts.
#[test]
fn a_file_does_not_grow_by_being_rewritten() {
    for kind in [KINDS[0], KINDS[5], KINDS[11]] {
        let size = 512 * kind.cluster;
        let live = size * 60 / 100;
        let rewritten = || {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let path = create(dir.path(), "top.qcow2", kind, size, None);
            let options = node(&path, kind, None);
            Trial { kind, path: &path, options, size, percent: 60, steps: 6000, drains: false }.run()
        };
        let mut lengths = Vec::new();
        while lengths.len() < 3 && lengths.last().is_none_or(|len| *len > live * 3 / 2 + 96 * kind.cluster) {
            lengths.push(rewritten());
        }
        let least = lengths.iter().min().unwrap();
        assert!(*least <= live * 3 / 2 + 96 * kind.cluster, "{}: {lengths:?} bytes for {live}", kind.options);
    }
}

/// A file whose end does not move has room for what has data at a time, and for not much more.
fn fixed(dir: &Path, kind: Kind, drains: bool) {
    let size = 512 * kind.cluster;
    let path = create(dir, "top.qcow2", kind, size, None);
    let room = 512 * 60 / 100 * kind.cluster;
    std::fs::File::options().write(true).open(&path).unwrap().set_len(room).unwrap();
    let below = json!({ "driver": "raw", "size": room, "file": file(&path), "discard": "unmap" });
    let options = with(node(&path, kind, None), &json!({ "file": below }));
    Trial { kind, path: &path, options, size, percent: 50, steps: 6000, drains }.run();
}

#[test]
fn a_device_does_not_run_full_by_being_rewritten() {
    for kind in [KINDS[0], KINDS[5], KINDS[11]] {
        fixed(tempfile::tempdir_in("/dev/shm").unwrap().path(), kind, false);
    }
}

#[test]
fn a_device_does_not_run_full_while_drains_come_and_go() {
    fixed(tempfile::tempdir_in("/dev/shm").unwrap().path(), KINDS[5], true);
}

/// Those who want room wait for each other's clusters and turns, and for nobody's end.
#[test]
fn who_waits_for_room_waits_for_nobody_who_waits() {
    let kind = KINDS[0];
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = create(dir.path(), "top.qcow2", kind, 4 << 20, None);
    // The image's tables, and eight clusters of data.
    let room = (4 + 8) * kind.cluster;
    std::fs::File::options().write(true).open(&path).unwrap().set_len(room).unwrap();
    let below = json!({ "driver": "raw", "size": room, "file": file(&path), "discard": "unmap" });
    let options = with(node(&path, kind, None), &json!({ "file": below }));
    run_control(async |_| {
        let all = opened(&options).await;
        let lane = all.2.handle().lane(&Local::current());
        let mut filled = 0;
        while write(&lane, filled << 16, &[1; 65536], PLAIN).await.is_ok() {
            filled += 1;
        }
        assert!(filled >= 7, "{filled}");
        for round in 0..20 {
            // Many for one cluster, some for others, before what they need has been committed.
            let gone = round % filled;
            lane.discard(&enter(&lane).await, range(gone << 16, 65536)).await.unwrap();
            let writes = (0..12).map(|part| {
                let lane = &lane;
                async move { write(lane, ((32 + round) << 16) + part * 512, &[2; 512], PLAIN).await }
            });
            let done = block_core::rt::sync::together(writes).await;
            assert!(done.iter().all(|one| one.is_ok()), "{round}: {done:?}");
            let more = write(&lane, 31 << 16, &[3; 512], PLAIN).await;
            assert_eq!(more, Err(IoError::NoSpace), "nothing is going to be free");
            lane.discard(&enter(&lane).await, range((32 + round) << 16, 65536)).await.unwrap();
            write(&lane, gone << 16, &[1; 65536], PLAIN).await.unwrap();
        }
        drop(lane);
        closed(all).await;
    });
    check(&path);
}

/// One sets free what the image was full of, and another takes room just then, from the image's beginning on: neither gets
/// the other's, and what has a new owner is not punched. That the moment between is not seen is `Refs::lower`'s, whose test
/// needs no luck.
#[test]
fn what_is_being_set_free_is_not_taken_before_it_has_rested() {
    let kind = KINDS[3];
    let half = 4u64 << 20;
    for round in 0..4 {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = create(dir.path(), "top.qcow2", kind, 2 * half, None);
        run("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 9 0 {half}"), &path]);
        let options = node(&path, kind, None);
        run_control(async |_| {
            let all = opened(&options).await;
            let threads: Vec<_> = (0..2).map(|_| io_thread()).collect();
            let freeing = started(&threads[0], &all.2.handle(), async move |lane| {
                for part in 0..32 {
                    let at = range(part * half / 32, half / 32);
                    lane.discard(&enter(&lane).await, at).await.unwrap();
                    flush(&lane).await.unwrap();
                }
            });
            let taking = started(&threads[1], &all.2.handle(), async move |lane| {
                for number in half / 512..2 * half / 512 {
                    write(&lane, number * 512, &sector(number, round), PLAIN).await.unwrap();
                    if number % 512 == 0 {
                        flush(&lane).await.unwrap();
                    }
                }
            });
            freeing.await.unwrap();
            taking.await.unwrap();
            let lane = all.2.handle().lane(&Local::current());
            for _ in 0..3 {
                flush(&lane).await.unwrap();
                moment().await;
            }
            let seen = read(&lane, range(half, half)).await.unwrap();
            for (number, found) in (half / 512..).zip(seen.chunks_exact(512)) {
                assert!(found == sector(number, round), "sector {number}");
            }
            drop(lane);
            closed(all).await;
        });
        check(&path);
    }
}
