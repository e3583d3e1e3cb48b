//! Valid qcow2 images with one to three fields changed, by name: opened, read, written, resized and closed. Never a panic, a
//! hang, much memory, or a write to what was only to be read.
//!
//! `TRELLIS_CASES` says how many (100000 if absent), `TRELLIS_SEED` which; a case that fails says its number, and
//! `TRELLIS_CASE` runs that one alone.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]
#![expect(clippy::disallowed_methods, reason = "the cases run on plain threads, and one watches")]

#[path = "../support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "../support/random.rs"]
mod random;

mod fields;
mod memory;
mod paper;
mod samples;
mod watch;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use block_core::base::{ByteRange, IoError};
use block_core::codec::SecretBytes;
use block_core::codec::secret::{Encoding, Secret};
use block_core::graph::{Graph, Preallocation, WriteFlags};
use block_core::port::{PORT, PortLane};
use block_core::rt::sync::oneshot;
use block_core::rt::{Local, run_control};
use serde_json::{Value, json};

use bench::{READER, add, attach, enter, flush, read, with, write, writer};
use fields::Mutation;
use memory::Peak;
use paper::{Paper, Sheet};
use random::Random;
use samples::Sample;
use watch::Watch;

/// What no case may need, in bytes.
const MAX_MEMORY: usize = 256 << 20;
/// Requests to the files below that no case may need.
const MAX_REQUESTS: u64 = 50_000;
/// Bytes of a header that nothing changes: magic to `cluster_bits`.
const FOREVER: u64 = 24;

/// What came of the cases.
#[derive(Default)]
struct Tally {
    next: AtomicU64,
    /// Opened for reading, and for writing.
    read: AtomicU64,
    written: AtomicU64,
    /// Requests that failed.
    failed: AtomicU64,
    /// The most bytes, and the most requests to files, that a case needed.
    memory: AtomicU64,
    requests: AtomicU64,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

#[test]
fn images_with_changed_fields_do_no_harm() {
    let samples = Arc::new(samples::all());
    let (one, seed) = (number("TRELLIS_CASE"), number("TRELLIS_SEED").unwrap_or(1));
    let cases = number("TRELLIS_CASES").unwrap_or(100_000);
    let end = one.map_or(cases, |one| one + 1);
    let tally = Arc::new(Tally { next: AtomicU64::new(one.unwrap_or(0)), ..Tally::default() });
    let workers: Vec<_> = (0..if one.is_some() { 1 } else { 2 })
        .map(|_| {
            let (samples, tally, watch) = (samples.clone(), tally.clone(), Watch::default());
            let watched = watch.clone();
            let work = move || {
                run_control(async |_| {
                    loop {
                        let case = tally.next.fetch_add(1, Relaxed);
                        if case >= end {
                            break;
                        }
                        run(case, seed, &samples, &tally, &watched).await;
                    }
                });
            };
            (std::thread::spawn(work), watch)
        })
        .collect();
    watch::until_over(workers);
    let [read, written, failed, memory, requests] =
        [&tally.read, &tally.written, &tally.failed, &tally.memory, &tally.requests].map(|count| count.load(Relaxed));
    eprintln!(
        "seed {seed}: {read} of {cases} could be read, {written} written; {failed} requests failed; at most {} KiB and \
         {requests} requests to files a case",
        memory >> 10
    );
    if one.is_none() && cases >= 1000 {
        // Else the changes are too wild, or too tame, to find anything.
        assert!(read > cases / 4 && written > cases / 8 && failed > cases / 8, "{read} {written} {failed}");
    }
}

/// One case, from its number alone.
async fn run(case: u64, seed: u64, samples: &[Sample], tally: &Tally, watch: &Watch) {
    let mut random =
        Random((case + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.wrapping_mul(0xd134_2543_de82_ef95) | 1);
    (0..4).for_each(|_| _ = random.next());
    let sample = &samples[random.below(samples.len() as u64) as usize];
    let mutations = sample.fields.mutations(&sample.image, &mut random);
    let _said = watch.begin(format!("case {case} of seed {seed}: {}, {}", sample.name, Mutation::all(&mutations)));
    let peak = Peak::begin();
    let sheets = Sheets::of(sample, &mutations);
    {
        let graph = Graph::new(Arc::new(|_| ()));
        let word = SecretBytes::new(samples::WORD.as_bytes().to_vec());
        graph.objects().insert("word", Arc::new(Secret::new(word, Encoding::Raw).unwrap()));
        sheets.put(&graph).await;
        reading(&graph, sample, &sheets, &mut random, tally).await;
        writing(&graph, sample, &sheets, &mut random, tally).await;
    }
    let (used, requests) = (peak.bytes(), sheets.requests());
    assert!(used <= MAX_MEMORY, "{used} bytes of memory");
    assert!(requests <= MAX_REQUESTS, "{requests} requests to files");
    tally.memory.fetch_max(used as u64, Relaxed);
    tally.requests.fetch_max(requests, Relaxed);
}

/// The files of a case.
struct Sheets {
    disk: Arc<Sheet>,
    data: Option<Arc<Sheet>>,
    base: Option<Arc<Sheet>>,
    encrypted: bool,
}

impl Sheets {
    fn of(sample: &Sample, mutations: &[Mutation]) -> Self {
        let disk = Sheet::of(&sample.image);
        mutations.iter().for_each(|mutation| mutation.apply(&disk));
        let (data, base) = (sample.data.as_ref().map(Sheet::of), sample.base.as_ref().map(Sheet::of));
        Self { disk, data, base, encrypted: sample.encrypted }
    }

    async fn put(&self, graph: &Rc<Graph>) {
        let all = [("disk", Some(&self.disk)), ("data", self.data.as_ref()), ("base", self.base.as_ref())];
        for (name, sheet) in all {
            if let Some(sheet) = sheet {
                graph.permit().add(Paper::node(name, sheet)).await.unwrap();
            }
        }
    }

    fn requests(&self) -> u64 {
        let others = self.data.iter().chain(&self.base);
        self.disk.requests() + others.map(|sheet| sheet.requests()).sum::<u64>()
    }

    fn options(&self) -> Value {
        let backing = if self.base.is_some() { json!("base") } else { Value::Null };
        let mut options = json!({
            "driver": "qcow2", "node-name": "top", "file": "disk", "discard": "unmap", "backing": backing,
        });
        if self.encrypted {
            options["encrypt"] = json!({ "format": "luks", "key-secret": "word" });
        }
        if self.data.is_some() { with(options, &json!({ "data-file": "data" })) } else { options }
    }
}

/// Opened for reading: nothing is written, whatever the image says.
async fn reading(graph: &Rc<Graph>, sample: &Sample, sheets: &Sheets, random: &mut Random, tally: &Tally) {
    let options = with(sheets.options(), &json!({ "read-only": true }));
    let Ok(node) = add(graph, options).await else {
        assert!(graph.find("top").is_none());
        return;
    };
    tally.read.fetch_add(1, Relaxed);
    let port = attach(graph, node, READER).await.unwrap();
    let (lane, size) = (port.handle().lane(&Local::current()), port.geometry().size);
    for _ in 0..4 {
        let Some(at) = sample.place(size, random) else { break };
        note(tally, read(&lane, at).await.map(drop));
        note(tally, enter(&lane).await.cx().child(PORT).status(at).await.map(drop));
    }
    drop(lane);
    port.detach(&mut graph.permit()).await;
    graph.permit().remove(node).await.unwrap();
    let changed = [Some(&sheets.disk), sheets.data.as_ref(), sheets.base.as_ref()]
        .map(|sheet| sheet.map_or(0, |one| one.changes()));
    assert_eq!(changed, [0; 3], "an image that is only read was written: image, data, backing");
}

/// Opened for writing, and everything done to it that a guest and an operator do.
async fn writing(graph: &Rc<Graph>, sample: &Sample, sheets: &Sheets, random: &mut Random, tally: &Tally) {
    // One that was not closed in good order is repaired, as far as that goes, before it is refused.
    let is_dirty = sheets.disk.get(79, 1)[0] & 1 == 1;
    let Ok(node) = add(graph, sheets.options()).await else {
        assert!(graph.find("top").is_none());
        assert!(is_dirty || sheets.disk.changes() == 0, "an image that was refused was written");
        return;
    };
    tally.written.fetch_add(1, Relaxed);
    let header = sheets.disk.get(0, FOREVER);
    let port = attach(graph, node, writer()).await.unwrap();
    let size = port.geometry().size;
    let mut others = Vec::new();
    for _ in 0..2 {
        let (lane, mut random) = (port.handle().lane(&Local::current()), Random(random.next() | 1));
        let places: Vec<_> = (0..6).filter_map(|_| sample.place(size, &mut random)).collect();
        let (done, over) = oneshot();
        Local::current().spawn(async move {
            let mut failed = 0;
            for at in places {
                failed += u64::from(step(&lane, at, &mut random).await.is_err());
            }
            let _ = done.send(failed + u64::from(flush(&lane).await.is_err()));
        });
        others.push(over);
    }
    for over in others {
        tally.failed.fetch_add(over.await.unwrap(), Relaxed);
    }
    port.detach(&mut graph.permit()).await;
    if random.below(4) == 0 {
        let size = [0, 512, size + 512, size + (64 << 20), size / 2 / 512 * 512, 1 << 50][random.below(6) as usize];
        let _ = graph.permit().resize(node, size.min(1 << 60), Preallocation::Off).await;
    }
    // The second time nobody minds what cannot be written.
    if graph.permit().remove(node).await.is_err() {
        let _ = graph.permit().remove(node).await;
    }
    assert_eq!(sheets.base.as_ref().map_or(0, |base| base.changes()), 0, "the backing file was written");
    assert_eq!(sheets.disk.get(0, FOREVER), header, "something was written over the header");
}

async fn step(lane: &PortLane, at: ByteRange, random: &mut Random) -> Result<(), IoError> {
    match random.below(9) {
        0 | 1 => read(lane, at).await.map(drop),
        2..5 => write(lane, at.start(), &vec![7; at.len() as usize], WriteFlags::default()).await,
        5 => {
            let flags = WriteFlags { may_unmap: random.below(2) == 0, ..WriteFlags::default() };
            lane.write_zeroes(&enter(lane).await, at, flags).await
        }
        6 => lane.discard(&enter(lane).await, at).await,
        7 => enter(lane).await.cx().child(PORT).status(at).await.map(drop),
        _ => {
            let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
            write(lane, at.start(), &vec![9; at.len() as usize], flags).await
        }
    }
}

fn note(tally: &Tally, result: Result<(), IoError>) {
    tally.failed.fetch_add(u64::from(result.is_err()), Relaxed);
}

/// The harness sees a write where there must be none, and memory that is used.
#[test]
fn harm_is_noticed() {
    let sheet = Sheet::of(&vec![1; 9000].into());
    sheet.put(8190, &[2; 4]);
    assert_eq!((sheet.changes(), sheet.get(8189, 6)), (1, vec![1, 2, 2, 2, 2, 1]));
    sheet.zero(4096, 4096);
    assert_eq!(sheet.get(8191, 2), [0, 2]);
    let peak = Peak::begin();
    drop(std::hint::black_box(vec![1u8; 1 << 20]));
    assert!((1 << 20..2 << 20).contains(&peak.bytes()), "{}", peak.bytes());
}
