//! Random work through qcow2, and what a crash may leave of the image: leaks, never more. How: `support/crash.rs`.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

#[path = "support/allowed.rs"]
mod allowed;
#[path = "support/amending.rs"]
mod amending;
#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "support/crash.rs"]
mod crash;
#[path = "support/disk.rs"]
mod disk;
#[path = "support/history.rs"]
mod history;
#[path = "support/qcow2.rs"]
mod qcow2;
#[path = "support/random.rs"]
mod random;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bench::{add, with};
use block_core::catalog;
use block_core::codec::SecretBytes;
use block_core::codec::secret::{Encoding, Secret};
use block_core::drivers::format::qcow2::AmendOptions;
use block_core::graph::{BitmapAction, BitmapChange, Graph, Limits, NodeId, Repair, WriteFlags};
use block_core::rt::{Local, run_control};
use crash::{Report, Trial, cuts};
use disk::{Disk, Event, Log};
use history::{ALL, Past, Used, What};
use random::Random;
use serde_json::{Value, json};

const SIZE: u64 = 64 << 10;

/// States that were judged, of them with leaks, leaked clusters.
static JUDGED: [AtomicUsize; 3] = [const { AtomicUsize::new(0) }; 3];

/// In every state no refcount is too low. QEMU's judge has to agree, where it is asked.
fn check(image: &[u8]) -> Result<(), String> {
    let judged = qcow2::corrupt(image)?;
    let number = JUDGED[0].fetch_add(1, Relaxed);
    JUDGED[1].fetch_add(usize::from(judged.leaks > 0), Relaxed);
    JUDGED[2].fetch_add(judged.leaks, Relaxed);
    if number.is_multiple_of(199) {
        let leaks = qcow2::qemu_check(image)?;
        if leaks != (judged.leaks > 0) {
            return Err(format!("QEMU finds leaks: {leaks}, we find {}", judged.leaks));
        }
    }
    Ok(())
}

/// States with late refcounts, and of them those that had refcounts which are too low.
static LATE: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

/// An image that says that it was not closed may have any refcounts, which QEMU's judge can put right; others are as ever.
/// That we can, and lose nothing, shows when it is opened.
fn check_late(image: &[u8]) -> Result<(), String> {
    if !qcow2::is_dirty(image) {
        return check(image);
    }
    LATE[1].fetch_add(usize::from(qcow2::corrupt(image).is_err()), Relaxed);
    if LATE[0].fetch_add(1, Relaxed).is_multiple_of(199) {
        let mended = qcow2::qemu_mended(image)?;
        let leaks = qcow2::corrupt(&mended)?.leaks;
        if leaks > 0 || qcow2::is_dirty(&mended) {
            return Err(format!("QEMU leaves {leaks} leaks in it"));
        }
    }
    Ok(())
}

fn stack(more: Value) -> impl AsyncFn(&Rc<Graph>) -> NodeId {
    let options = json!({ "driver": "qcow2", "node-name": "top", "discard": "unmap", "file": "disk" });
    let options = with(options, &more);
    async move |graph: &Rc<Graph>| {
        tell(graph, &["word"]);
        add(graph, options.clone()).await.unwrap()
    }
}

/// Secrets that are called what they are.
fn tell(graph: &Rc<Graph>, words: &[&str]) {
    for word in words {
        let secret = Secret::new(SecretBytes::new(word.as_bytes().to_vec()), Encoding::Raw).unwrap();
        graph.objects().insert(word, Arc::new(secret));
    }
}

fn limits() -> Limits {
    Limits { fua: true, discard: true, unmap_zeroes: true, ..Limits::ANY }
}

fn trial(seed: u64, options: &str, resizes: bool) -> Trial {
    Trial { seed, images: vec![qcow2::fresh(options, SIZE)], limits: limits(), size: SIZE, resizes, check }
}

fn all_is_well(name: &str, options: &str, resizes: bool, more: &Value) {
    all_is_well_by(check, name, options, resizes, more);
}

fn all_is_well_by(check: fn(&[u8]) -> Result<(), String>, name: &str, options: &str, resizes: bool, more: &Value) {
    let seeds: u64 = std::env::var("TRELLIS_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(2);
    let mut states = 0;
    for seed in 1..=seeds {
        let trial = Trial { check, ..trial(seed, options, resizes) };
        let report = trial.run(stack(more.clone()), stack(more.clone()));
        assert_eq!(report.first, None, "{name}, seed {seed}: {report:?}");
        states += report.states;
    }
    let [judged, leaky, leaks] = JUDGED.each_ref().map(|count| count.load(Relaxed));
    eprintln!("{name}: {states} crash states; of all so far, {judged}, {leaky} have leaks, {leaks} clusters together");
    assert!(states > 1000);
}

#[test]
fn a_crash_leaves_leaks_at_most_with_small_clusters() {
    all_is_well("512 B", "cluster_size=512", false, &json!({}));
    all_is_well("512 B, resized", "cluster_size=512,refcount_bits=64", true, &json!({}));
}

#[test]
fn a_crash_leaves_leaks_at_most_with_large_clusters() {
    all_is_well("4 KiB", "cluster_size=4096", true, &json!({}));
    all_is_well("4 KiB, 1 bit", "cluster_size=4096,refcount_bits=1", false, &json!({ "discard-no-unref": true }));
    all_is_well("version 2", "cluster_size=4096,compat=0.10", false, &json!({}));
}

#[test]
fn a_crash_leaves_leaks_at_most_with_subclusters() {
    all_is_well("subclusters", "cluster_size=16K,extended_l2=on", true, &json!({}));
}

#[test]
fn a_crash_leaves_leaks_at_most_with_small_caches() {
    let small = json!({ "l2-cache-size": 512, "refcount-cache-size": 512, "l2-cache-entry-size": 512 });
    all_is_well("small caches", "cluster_size=512", false, &small);
}

/// With `lazy-refcounts` nothing is lost either, although refcounts come late: the image is dirty meanwhile.
#[test]
fn a_crash_leaves_an_image_that_can_be_repaired_where_refcounts_are_late() {
    let by_image = json!({});
    all_is_well_by(check_late, "late, 512 B", "cluster_size=512,lazy_refcounts=on", true, &by_image);
    all_is_well_by(check_late, "late, 64-bit", "cluster_size=512,refcount_bits=64,lazy_refcounts=on", false, &by_image);
    let by_node = json!({ "lazy-refcounts": true });
    all_is_well_by(check_late, "late, subclusters", "cluster_size=16K,extended_l2=on", true, &by_node);
    let [late, low] = LATE.each_ref().map(|count| count.load(Relaxed));
    eprintln!("{late} states with late refcounts, {low} with some that are too low");
    assert!(late > 1000 && low > 100);
}

/// A flush leaves refcounts alone and the image dirty; when it is closed all is in order, and so is what a node that was
/// told not to be late writes.
#[test]
fn late_refcounts_are_in_the_image_when_it_is_closed() {
    let fresh = qcow2::fresh("cluster_size=512,lazy_refcounts=on", SIZE);
    for (lazy, options) in [(true, json!({})), (false, json!({ "lazy-refcounts": false }))] {
        let log = Log::default();
        let at_flush = run_control(async |_| {
            let graph = Graph::new(Arc::new(|_| ()));
            graph.permit().add(Disk::node(0, fresh.clone(), limits(), &log)).await.unwrap();
            let node = stack(options.clone())(&graph).await;
            let port = bench::attach(&graph, node, bench::writer()).await.unwrap();
            let lane = port.handle().lane(&Local::current());
            bench::write(&lane, 4096, &[5; 8192], WriteFlags::default()).await.unwrap();
            bench::flush(&lane).await.unwrap();
            let image = last(&fresh, &log.events());
            drop(lane);
            port.detach(&mut graph.permit()).await;
            graph.permit().remove(node).await.unwrap();
            image
        });
        assert_eq!(qcow2::is_dirty(&at_flush), lazy);
        assert_eq!(qcow2::corrupt(&at_flush).is_err(), lazy);
        // As whoever finds it after a crash sees it.
        let (seen, _) = opened(&at_flush, contents);
        assert_eq!(seen.unwrap().unwrap()[4096..12288], [5; 8192]);
        let closed = last(&fresh, &log.events());
        assert!(!qcow2::is_dirty(&closed));
        assert_eq!(qcow2::corrupt(&closed).unwrap().leaks, 0);
        assert!(!qcow2::qemu_check(&closed).unwrap());
    }
}

#[test]
fn a_crash_leaves_leaks_at_most_in_an_encrypted_image() {
    let encrypt = json!({ "encrypt": { "format": "luks", "key-secret": "word" } });
    for (name, options) in [("4 KiB", "cluster_size=4096"), ("subclusters", "cluster_size=16K,extended_l2=on")] {
        let options = format!("{options},{}", qcow2::ENCRYPTED);
        all_is_well(&format!("encrypted, {name}"), &options, true, &encrypt);
    }
}

/// The key slots of an encrypted disk are changed, and the power fails: what opened it and is not erased opens it still, and
/// what is said to be done is.
#[test]
fn a_crash_leaves_the_old_key_slots_or_the_new_ones() {
    let fresh = qcow2::fresh(&format!("cluster_size=4096,{}", qcow2::ENCRYPTED), SIZE);
    let top = |word: &str| {
        let encrypt = json!({ "format": "luks", "key-secret": word });
        json!({ "driver": "qcow2", "node-name": "top", "file": "disk", "encrypt": encrypt })
    };
    let changed = |image: &[u8], change: &Value| {
        let log = Log::default();
        run_control(async |_| {
            let graph = Graph::new(Arc::new(|_| ()));
            tell(&graph, &["word", "other"]);
            graph.permit().add(Disk::node(0, image.to_vec(), limits(), &log)).await.unwrap();
            let node = add(&graph, top("word")).await.unwrap();
            let encrypt = with(json!({ "format": "luks" }), change);
            let options = qmp::schema::from_value(json!({ "driver": "qcow2", "encrypt": encrypt })).unwrap();
            catalog::amend(&graph, node, options, false).await.unwrap();
            graph.permit().remove(node).await.unwrap();
        });
        log.events()
    };
    let opens = |image: &[u8], word: &str| {
        run_control(async |_| {
            let graph = Graph::new(Arc::new(|_| ()));
            tell(&graph, &["word", "other"]);
            graph.permit().add(Disk::node(0, image.to_vec(), limits(), &Log::default())).await.unwrap();
            add(&graph, with(top(word), &json!({ "read-only": true }))).await.is_ok()
        })
    };
    // Slot 6 lies in two sectors of the header.
    let fill = json!({ "state": "active", "new-secret": "other", "iter-time": 1, "keyslot": 6 });
    let erase = json!({ "state": "inactive", "old-secret": "other" });
    let mut start = fresh;
    for (change, is_filled) in [(fill, true), (erase, false)] {
        let log = changed(&start, &change);
        let (mut before, mut after) = (0, 0);
        for cut in cuts(&log, &mut Random(7)) {
            let image = cut.images(std::slice::from_ref(&start), &log).remove(0);
            assert!(opens(&image, "word"), "{change}, {cut:?}");
            assert_eq!(qcow2::corrupt(&image).map(|judged| judged.leaks), Ok(0), "{change}, {cut:?}");
            let opened = opens(&image, "other");
            before += usize::from(opened != is_filled);
            after += usize::from(opened == is_filled);
        }
        eprintln!("{change}: {before} states before, {after} after");
        assert!(before > 0 && after > 0);
        start = last(&start, &log);
        assert_eq!(opens(&start, "other"), is_filled, "{change}");
    }
}

/// There is room for what the disk has and for little else, so that a cluster which is set free is soon another's.
#[test]
fn a_crash_leaves_leaks_at_most_where_clusters_are_used_again() {
    for (options, room) in [("cluster_size=512", 140 * 512), ("cluster_size=4096", 22 * 4096)] {
        let tight = json!({ "file": { "driver": "raw", "file": "disk", "size": room, "discard": "unmap" } });
        for seed in 1..=3 {
            let mut trial = trial(seed, options, false);
            trial.images[0].resize(room, 0);
            let report = trial.run(stack(tight.clone()), stack(tight.clone()));
            assert_eq!(report.first, None, "{options}, seed {seed}: {report:?}");
            assert!(report.states > 300, "{}", report.states);
        }
    }
}

/// The judge sees what it has to see: flushes that are dropped make refcounts come too late.
#[test]
fn an_image_whose_flushes_are_dropped_is_caught() {
    let careless = json!({ "file": { "driver": "raw", "file": "disk", "cache": { "no-flush": true } } });
    let Report { first, lost, .. } = trial(1, "cluster_size=512", false).run(stack(careless), stack(json!({})));
    assert!(first.is_some() && lost > 0, "{first:?}");
}

/// A node over the image, and its user.
async fn used(image: Vec<u8>, log: &Log) -> Used {
    let graph = Graph::new(Arc::new(|_| ()));
    graph.permit().add(Disk::node(0, image, limits(), log)).await.unwrap();
    let node = stack(json!({}))(&graph).await;
    Used::new(graph, node).await
}

/// A change of the snapshots is cut off everywhere: they are as before, or as after it, and nothing is lost.
fn cut_off(options: &str, what: What) -> usize {
    let (log, mut past) = (Log::default(), Past::new(SIZE));
    let fresh = qcow2::fresh(options, SIZE);
    let begun = run_control(async |_| {
        let used = used(fresh.clone(), &log).await;
        past.made(&used).await;
        let begun = log.events().len();
        used.change(what).await.unwrap();
        begun
    });
    let (mut start, events) = (fresh, log.events());
    for event in &events[..begun] {
        if let Event::Change(_, change) = event {
            change.apply(&mut start);
        }
    }
    let after = past.after(what);
    let (mut done, mut undone) = (0, 0);
    let cuts = cuts(&events[begun..], &mut Random(7));
    for (number, cut) in cuts.iter().enumerate() {
        let image = cut.images(std::slice::from_ref(&start), &events[begun..]).remove(0);
        let which = format!("{options}, {what:?}, {cut:?}");
        qcow2::corrupt(&image).unwrap_or_else(|wrong| panic!("{which}: {wrong}"));
        let image = if number % 17 == 0 {
            qcow2::qemu_repaired(&image).unwrap_or_else(|wrong| panic!("{which}: {wrong}"))
        } else {
            image
        };
        let found = run_control(async |_| used(image, &Log::default()).await.all().await);
        let found = found.unwrap_or_else(|wrong| panic!("{which}: {wrong}"));
        assert!(found == past || found == after, "{which}");
        done += usize::from(found == after);
        undone += usize::from(found == past);
    }
    assert!(done > 0 && undone > 0, "{options}, {what:?}: it is done in {done} states, and not in {undone}");
    cuts.len()
}

#[test]
fn a_crash_leaves_snapshots_as_they_were_or_as_they_shall_be() {
    for options in ["cluster_size=512", "cluster_size=4096,compat=0.10", "cluster_size=16K,extended_l2=on"] {
        for what in ALL {
            eprintln!("{options}, {what:?}: {} states", cut_off(options, what));
        }
    }
}

/// The image behind all of a log.
fn last(start: &[u8], log: &[Event]) -> Vec<u8> {
    let mut image = start.to_vec();
    for event in log {
        if let Event::Change(_, change) = event {
            change.apply(&mut image);
        }
    }
    image
}

/// Opens an image for writing, lets somebody use it, and closes it; gives what was seen, or why it cannot be opened, and
/// what was done to the disk.
fn opened<T>(image: &[u8], work: impl AsyncFn(&Rc<Graph>, NodeId) -> T) -> (Result<T, String>, Vec<Event>) {
    over(image, &json!("disk"), work)
}

/// The same through `file`, which leads to the node `disk`.
fn over<T>(image: &[u8], file: &Value, work: impl AsyncFn(&Rc<Graph>, NodeId) -> T) -> (Result<T, String>, Vec<Event>) {
    let log = Log::default();
    let result = run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        graph.permit().add(Disk::node(0, image.to_vec(), limits(), &log)).await.unwrap();
        let options = json!({ "driver": "qcow2", "node-name": "top", "discard": "unmap", "file": file });
        let node = add(&graph, options).await?;
        let value = work(&graph, node).await;
        graph.permit().remove(node).await.map_err(|error| error.full())?;
        Ok(value)
    });
    (result, log.events())
}

/// All of a disk, as far as it can be read.
async fn contents(graph: &Rc<Graph>, node: NodeId) -> Result<Vec<u8>, String> {
    let port = bench::attach(graph, node, bench::READER).await.unwrap();
    let lane = port.handle().lane(&Local::current());
    let bytes = bench::read(&lane, bench::range(0, port.geometry().size)).await;
    drop(lane);
    port.detach(&mut graph.permit()).await;
    bytes.map_err(|error| error.to_string())
}

/// A repair may end anywhere: what it leaves is repaired by the next one, and what is called clean is.
#[test]
fn a_crash_during_a_repair_leaves_what_can_be_repaired() {
    let mut states = 0;
    for options in ["cluster_size=512", "cluster_size=4096"] {
        let fill = async |graph: &Rc<Graph>, node| {
            let port = bench::attach(graph, node, bench::writer()).await.unwrap();
            let lane = port.handle().lane(&Local::current());
            let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8 | 1).collect();
            bench::write(&lane, 0, &bytes[..SIZE as usize / 2], WriteFlags::default()).await.unwrap();
            bench::write(&lane, SIZE - 4096, &bytes[..4096], WriteFlags::default()).await.unwrap();
            drop(lane);
            port.detach(&mut graph.permit()).await;
        };
        let fresh = qcow2::fresh(options, SIZE);
        let (filled, log) = opened(&fresh, fill);
        filled.unwrap();
        let good = last(&fresh, &log);
        let expected = opened(&good, contents).0.unwrap();
        let mut spoilt = good;
        qcow2::spoil(&mut spoilt);
        qcow2::corrupt(&spoilt).unwrap_err();
        let (seen, log) = opened(&spoilt, contents);
        assert!(seen.unwrap() == expected);
        for cut in cuts(&log, &mut Random(7)) {
            let image = cut.images(std::slice::from_ref(&spoilt), &log).remove(0);
            let judged = qcow2::corrupt(&image);
            assert!(qcow2::is_dirty(&image) || judged.is_ok(), "{cut:?}: it is called clean, and {judged:?}");
            let (seen, log) = opened(&image, contents);
            assert!(seen.unwrap() == expected, "{cut:?}");
            let mended = last(&image, &log);
            assert!(!qcow2::is_dirty(&mended));
            assert_eq!(qcow2::corrupt(&mended).map(|judged| judged.leaks), Ok(0), "{cut:?}");
            states += 1;
        }
    }
    eprintln!("{states} crash states of a repair");
    assert!(states > 50);
}

async fn change(graph: &Rc<Graph>, node: NodeId, name: &str, what: BitmapAction) {
    let step = BitmapChange { node, name: name.into(), what };
    graph.permit().transact(vec![Box::new(step)]).await.unwrap();
}

async fn written(graph: &Rc<Graph>, node: NodeId, start: u64, len: usize) {
    let port = bench::attach(graph, node, bench::writer()).await.unwrap();
    let lane = port.handle().lane(&Local::current());
    bench::write(&lane, start, &vec![7; len], WriteFlags::default()).await.unwrap();
    drop(lane);
    port.detach(&mut graph.permit()).await;
}

fn new_bitmap(recording: bool) -> BitmapAction {
    BitmapAction::Add { granularity: Some(512), recording, persistent: true }
}

/// What the crash states of an image with bitmaps are like.
#[derive(Debug, Default)]
struct Bitmaps {
    states: usize,
    believed: usize,
    doubted: usize,
    absent: usize,
    /// The first thing that is wrong.
    first: Option<String>,
}

impl Bitmaps {
    /// Works through an image with a bitmap, whose file is `file`, and looks at what a crash may leave.
    fn of(options: &str, file: &Value) -> Self {
        let fresh = qcow2::fresh(options, SIZE);
        let disk = json!("disk");
        let (made, log) = over(&fresh, &disk, async |graph, node| change(graph, node, "old", new_bitmap(true)).await);
        made.unwrap();
        let start = last(&fresh, &log);
        let work = async |graph: &Rc<Graph>, node| {
            written(graph, node, 4096, 1024).await;
            change(graph, node, "young", new_bitmap(true)).await;
            let then = contents(graph, node).await.unwrap();
            written(graph, node, 20480, 3000).await;
            let top = json!({ "driver": "qcow2", "node-name": "top", "discard": "unmap", "file": file });
            bench::reopen(graph, &[with(top.clone(), &json!({ "discard": "ignore" }))]).await.unwrap();
            change(graph, node, "sum", new_bitmap(false)).await;
            change(graph, node, "sum", BitmapAction::Merge(vec![(node, "young".into())])).await;
            bench::reopen(graph, &[top]).await.unwrap();
            written(graph, node, 40960, 512).await;
            change(graph, node, "sum", BitmapAction::Remove).await;
            then
        };
        let (then, log) = over(&start, file, work);
        let (first, then) = (vec![0; SIZE as usize], then.unwrap());
        let mut all = Self::default();
        for cut in cuts(&log, &mut Random(11)) {
            let image = cut.images(std::slice::from_ref(&start), &log).remove(0);
            if let Err(why) = all.judge(&image, [("old", &first), ("young", &then)]) {
                all.first.get_or_insert(format!("{cut:?}: {why}"));
            }
        }
        all
    }

    /// A bitmap that is believed has a mark for all that is not as it was before.
    fn judge(&mut self, image: &[u8], bases: [(&str, &Vec<u8>); 2]) -> Result<(), String> {
        self.states += 1;
        if self.states.is_multiple_of(61) {
            qcow2::qemu_check(image)?;
        }
        let look = async |graph: &Rc<Graph>, node| {
            let report = graph.permit().check(node, Repair::Nothing).await.unwrap();
            (report, graph.node(node).unwrap().bitmaps, contents(graph, node).await)
        };
        let (report, bitmaps, now) = over(image, &json!("disk"), look).0?;
        if !report.is_consistent() {
            return Err(format!("{report:?}"));
        }
        let now = now?;
        for (name, before) in bases {
            let Some(bitmap) = bitmaps.iter().find(|bitmap| bitmap.name == name) else {
                self.absent += 1;
                continue;
            };
            if bitmap.inconsistent {
                self.doubted += 1;
                continue;
            }
            self.believed += 1;
            for at in (0..SIZE).step_by(512) {
                let part = at as usize..at as usize + 512;
                if now[part.clone()] != before[part] && bitmap.bits.next_dirty(bench::range(at, 512)).is_none() {
                    return Err(format!("'{name}' has no mark for {at}"));
                }
            }
        }
        Ok(())
    }
}

/// Wherever the power fails: a bitmap that the image calls true has a mark for all that has changed since it was made; the
/// image has leaks at most.
#[test]
fn after_a_crash_no_bitmap_says_too_little() {
    for options in ["cluster_size=512", "cluster_size=4096", "cluster_size=16K,extended_l2=on"] {
        let found = Bitmaps::of(options, &json!("disk"));
        eprintln!("{options}: {found:?}");
        assert_eq!(found.first, None, "{options}");
        assert!(found.states > 300 && found.believed > 50 && found.doubted > 50, "{options}: {found:?}");
    }
}

/// The same is seen to fail where flushes are dropped: what is marked in use may come after what was written.
#[test]
fn a_bitmap_whose_flushes_are_dropped_is_caught() {
    let careless = json!({ "driver": "raw", "file": "disk", "cache": { "no-flush": true } });
    let found = Bitmaps::of("cluster_size=4096", &careless);
    assert!(found.first.is_some(), "{found:?}");
}

/// Opens an image over a node of nothing, and lets it name these backing files one after another; gives what it names
/// then, and what was done to the disk.
fn renamed(image: &[u8], names: &[&str]) -> (Option<String>, Vec<Event>) {
    let log = Log::default();
    let named = run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        graph.permit().add(Disk::node(0, image.to_vec(), limits(), &log)).await.unwrap();
        let below = json!({ "driver": "null-co", "size": SIZE, "read-zeroes": true });
        let options = json!({ "driver": "qcow2", "node-name": "top", "file": "disk", "backing": below });
        let node = add(&graph, options).await.unwrap();
        for name in names {
            graph.permit().change_backing_file(node, node, Some(name)).await.unwrap();
        }
        let named = graph.info(node).await.unwrap().backing.map(|(name, _)| name);
        graph.permit().remove(node).await.unwrap();
        named
    });
    (named, log.events())
}

/// An image names the old backing file or the new one, wherever the power fails; and nothing else in it has changed.
#[test]
fn a_crash_leaves_the_old_backing_files_name_or_the_new_one() {
    for options in ["cluster_size=512", "cluster_size=2048", "cluster_size=4096,compat=0.10", "cluster_size=64K"] {
        let fresh = qcow2::fresh(options, SIZE);
        let mut start = last(&fresh, &renamed(&fresh, &["one.img"]).1);
        for new in ["another.img", &"long".repeat(12), "s"] {
            let (old, _) = renamed(&start, &[]);
            let (named, log) = renamed(&start, &[new]);
            assert_eq!(named.as_deref(), Some(new));
            let (mut before, mut after) = (0, 0);
            for cut in cuts(&log, &mut Random(7)) {
                let image = cut.images(std::slice::from_ref(&start), &log).remove(0);
                assert_eq!(qcow2::corrupt(&image).map(|judged| judged.leaks), Ok(0), "{options}, {cut:?}");
                let (found, _) = renamed(&image, &[]);
                assert!(found == old || found == named, "{options}, {cut:?}: {found:?}");
                before += usize::from(found == old);
                after += usize::from(found == named);
            }
            assert!(before > 0 && after > 0, "{options}: {before} before, {after} after");
            start = last(&start, &log);
        }
    }
}

/// Refcounts get another width, and the power fails: the image has the old ones or the new ones, and leaks at most.
#[test]
fn a_crash_leaves_refcounts_of_the_old_width_or_of_the_new_one() {
    let mut states = 0;
    for (options, widths) in [("cluster_size=512", [64, 1, 16]), ("cluster_size=4096,compat=0.10", [8, 32, 2])] {
        let fresh = qcow2::fresh(options, SIZE);
        let fill = async |graph: &Rc<Graph>, node| written(graph, node, 4096, 20000).await;
        let (filled, log) = opened(&fresh, fill);
        filled.unwrap();
        let mut start = last(&fresh, &log);
        let expected = opened(&start, contents).0.unwrap();
        for bits in widths {
            let log = Log::default();
            run_control(async |_| {
                let graph = Graph::new(Arc::new(|_| ()));
                let disk = Disk::node(0, start.clone(), limits(), &log);
                let disk = graph.permit().add(disk).await.unwrap();
                let version = Some(3);
                let options = AmendOptions { refcount_bits: Some(bits), version, ..AmendOptions::default() };
                amending::amend(&graph, disk, &options).await.unwrap();
            });
            let log = log.events();
            let (mut before, mut after) = (0, 0);
            for (number, cut) in cuts(&log, &mut Random(7)).into_iter().enumerate() {
                let image = cut.images(std::slice::from_ref(&start), &log).remove(0);
                let judged = qcow2::corrupt(&image);
                assert!(judged.is_ok(), "{options}, {bits} bits, {cut:?}: {judged:?}");
                if number.is_multiple_of(7) {
                    qcow2::qemu_check(&image).unwrap();
                }
                let order = if image[7] == 2 { 4 } else { image[99] };
                after += usize::from(1 << order == bits);
                before += usize::from(1 << order != bits);
                assert!(opened(&image, contents).0.unwrap() == expected, "{options}, {bits} bits, {cut:?}");
                states += 1;
            }
            assert!(before > 0 && after > 0, "{options}, {bits} bits: {before} before, {after} after");
            start = last(&start, &log);
            assert_eq!(qcow2::corrupt(&start).map(|judged| judged.leaks), Ok(0), "{options}, {bits} bits");
        }
    }
    eprintln!("{states} crash states");
    assert!(states > 50);
}

/// Opens an image over a node of nothing, fills its sectors where `writes`, and empties the layer where not; gives what the
/// disk has then, and what was done to the image.
fn layered(image: &[u8], writes: bool, empties: bool) -> (Vec<u8>, Vec<Event>) {
    let log = Log::default();
    let seen = run_control(async |local| {
        let graph = Graph::new(Arc::new(|_| ()));
        graph.permit().add(Disk::node(0, image.to_vec(), limits(), &log)).await.unwrap();
        let below = json!({ "driver": "null-co", "size": SIZE, "read-zeroes": true });
        let options = json!({ "driver": "qcow2", "node-name": "top", "file": "disk", "backing": below });
        let node = add(&graph, options).await.unwrap();
        if writes {
            let port = bench::attach(&graph, node, bench::writer()).await.unwrap();
            let lane = port.handle().lane(&local);
            bench::write(&lane, 0, &[MARK; SIZE as usize], WriteFlags::default()).await.unwrap();
            drop(lane);
            port.detach(&mut graph.permit()).await;
        }
        if empties {
            graph.permit().empty(node).await.unwrap();
        }
        let seen = contents(&graph, node).await.unwrap();
        graph.permit().remove(node).await.unwrap();
        seen
    });
    (seen, log.events())
}

/// A layer that is emptied shows what it had or what it stands on, wherever the power fails; and it is in order.
#[test]
fn a_crash_leaves_what_a_layer_had_or_what_it_stands_on() {
    for options in ["cluster_size=512", "cluster_size=4096,compat=0.10", "cluster_size=16K,extended_l2=on"] {
        let fresh = qcow2::fresh(options, SIZE);
        let (full, log) = layered(&fresh, true, false);
        assert!(full.iter().all(|byte| *byte == MARK));
        let start = last(&fresh, &log);
        let (empty, log) = layered(&start, false, true);
        assert!(empty.iter().all(|byte| *byte == 0), "{options}: something is left");
        let end = last(&start, &log);
        assert_eq!(qcow2::corrupt(&end).map(|judged| judged.leaks), Ok(0), "{options}");
        let (mut before, mut after) = (0, 0);
        for cut in cuts(&log, &mut Random(11)) {
            let image = cut.images(std::slice::from_ref(&start), &log).remove(0);
            check(&image).unwrap_or_else(|wrong| panic!("{options}, {cut:?}: {wrong}"));
            let (seen, _) = layered(&image, false, false);
            assert!(seen.iter().all(|byte| [0, MARK].contains(byte)), "{options}, {cut:?}: somebody else's bytes");
            before += usize::from(seen == full);
            after += usize::from(seen == empty);
        }
        assert!(before > 0 && after > 0, "{options}: {before} before, {after} after");
    }
}

const MARK: u8 = 0x5a;
