//! Images that are in order, and images that are not: what is found wrong is what QEMU's judge finds wrong, and what was
//! repaired is in order for it.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block_core::graph::{CheckReport, Graph, Repair};
use block_core::rt::run_control;
use serde_json::{Value, json};

use crate::bench::{add, with};
use crate::peer::{KINDS, Kind, check, contents, create, node, run, work};
use crate::random::Random;

const SIZE: u64 = (3 << 20) + 512;
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What QEMU's judge says, in our words.
fn judged(path: &str) -> CheckReport {
    let arguments = ["60", "qemu-img", "check", "-f", "qcow2", "--output=json", path];
    let output = Command::new("timeout").args(arguments).output().unwrap();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let number = |name: &str| said[name].as_u64().unwrap_or(0);
    CheckReport {
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        check_errors: number("check-errors"),
        corruptions_fixed: number("corruptions-fixed"),
        leaks_fixed: number("leaks-fixed"),
        image_end: number("image-end-offset"),
        total_clusters: number("total-clusters"),
        allocated_clusters: number("allocated-clusters"),
        fragmented_clusters: number("fragmented-clusters"),
        compressed_clusters: number("compressed-clusters"),
    }
}

/// What we say of an image, in a node that may be written if anything is to be put right.
fn checked(path: &str, kind: Kind, repair: Repair) -> Result<CheckReport, String> {
    let more = json!({ "node-name": "top", "read-only": repair == Repair::Nothing });
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, with(node(path, kind, None), &more)).await?;
        let report = graph.permit().check(node, repair).await.map_err(|error| error.full())?;
        graph.permit().remove(node).await.map_err(|error| error.full())?;
        Ok(report)
    })
}

fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// An image with everything in it: data, zeroes, something compressed, a snapshot, and bitmaps where it may have them.
fn full(dir: &Path, kind: Kind, random: &mut Random) -> String {
    let path = create(dir, "full.qcow2", kind, SIZE, None);
    work(&path, kind, SIZE, random, 40);
    // Where compressed clusters lie together, small refcounts leave no room for a snapshot.
    let is_narrow = ["refcount_bits=1", "refcount_bits=2"].iter().any(|few| kind.options.ends_with(few));
    if !kind.external && !is_narrow {
        run("qemu-img", &["snapshot", "-c", "before", &path]);
        work(&path, kind, SIZE, random, 10);
    }
    if !kind.options.contains("0.10") {
        run("qemu-img", &["bitmap", "--add", "-g", "512", &path, "first"]);
        work(&path, kind, SIZE, random, 10);
        run("qemu-img", &["bitmap", "--add", &path, "second"]);
    }
    path
}

#[test]
fn images_of_every_kind_are_in_order_as_qemu_counts_them() {
    let mut random = Random(0xc4ec);
    for kind in KINDS {
        let dir = in_memory();
        let path = full(dir.path(), *kind, &mut random);
        let expected = judged(&path);
        assert_eq!((expected.corruptions, expected.leaks), (0, 0));
        assert_eq!(checked(&path, *kind, Repair::Nothing), Ok(expected), "{}", kind.options);
        let before = std::fs::read(&path).unwrap();
        assert_eq!(checked(&path, *kind, Repair::All), Ok(expected), "{}", kind.options);
        assert!(std::fs::read(&path).unwrap() == before, "{}: nothing was to be put right", kind.options);
    }
}

/// An image as bytes, to be spoilt.
struct Bytes {
    all: Vec<u8>,
    cluster: u64,
    order: u32,
}

impl Bytes {
    fn of(path: &str) -> Self {
        let all = std::fs::read(path).unwrap();
        let word = |at: usize| u32::from_be_bytes(all[at..at + 4].try_into().unwrap());
        let (cluster, order) = (1u64 << word(20), if word(4) == 2 { 4 } else { word(96) });
        Self { all, cluster, order }
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.all[at as usize..at as usize + 8].try_into().unwrap())
    }

    fn set(&mut self, at: u64, word: u64) {
        self.all[at as usize..at as usize + 8].copy_from_slice(&word.to_be_bytes());
    }

    /// Where the refcount of a cluster is: the byte, and the bit in it.
    fn place(&self, cluster: u64) -> (u64, u32) {
        let per_block = (self.cluster * 8) >> self.order;
        let block = self.word(self.word(48) + cluster / per_block * 8);
        let first = (cluster % per_block) << self.order;
        (block + first / 8, (first % 8) as u32)
    }

    fn set_refcount(&mut self, cluster: u64, to: u64) {
        let (at, shift) = self.place(cluster);
        if self.order < 3 {
            let mask = ((1u32 << (1 << self.order)) - 1) << shift;
            let byte = &mut self.all[at as usize];
            *byte = *byte & !(mask as u8) | (to << shift) as u8;
            return;
        }
        let len = 1 << (self.order - 3);
        self.all[at as usize..at as usize + len].copy_from_slice(&to.to_be_bytes()[8 - len..]);
    }

    /// Bytes of an L2 entry.
    fn step(&self) -> u64 {
        if self.all[7] == 3 && self.word(72) & 16 != 0 { 16 } else { 8 }
    }

    /// A place in an active L2 table, with an entry of a cluster that is somebody's alone.
    fn alone(&self) -> u64 {
        let step = self.step();
        let (l1, entries) = (self.word(40), self.word(32) & 0xffff_ffff);
        let tables = (0..entries).map(|entry| self.word(l1 + entry * 8) & OFFSET).filter(|table| *table != 0);
        let places = tables.flat_map(|table| (0..self.cluster / step).map(move |entry| table + entry * step));
        let mut found = places.filter(|at| self.word(*at) & COPIED != 0 && self.word(*at) & OFFSET != 0);
        found.next().expect("something was written since the snapshot")
    }
}

/// A way of spoiling an image.
type Damage = (&'static str, fn(&mut Bytes, u64));

/// Those whose repair loses nothing. The number is the byte in an active L2 table.
const DAMAGES: &[Damage] = &[
    ("a refcount of data is too high", |bytes, at| {
        let cluster = (bytes.word(at) & OFFSET) / bytes.cluster;
        let most = if bytes.order == 6 { u64::MAX } else { (1 << (1u32 << bytes.order)) - 1 };
        bytes.set_refcount(cluster, most.min(7));
    }),
    ("a refcount of data is 0", |bytes, at| bytes.set_refcount((bytes.word(at) & OFFSET) / bytes.cluster, 0)),
    ("a table's refcount is 0", |bytes, at| bytes.set_refcount(at / bytes.cluster, 0)),
    ("the header's refcount is 0", |bytes, _| bytes.set_refcount(0, 0)),
    ("data is not said to be alone", |bytes, at| bytes.set(at, bytes.word(at) & !COPIED)),
    ("a table is not said to be alone", |bytes, _| {
        let l1 = bytes.word(40);
        bytes.set(l1, bytes.word(l1) & !COPIED);
    }),
    ("a cluster is forgotten", |bytes, at| {
        (at..at + bytes.step()).step_by(8).for_each(|at| bytes.set(at, 0));
    }),
    ("a refcount block is forgotten", |bytes, _| {
        let table = bytes.word(48);
        bytes.set(table, 0);
    }),
    ("a refcount block is nowhere", |bytes, _| {
        let table = bytes.word(48);
        bytes.set(table, bytes.word(table) + 512 * u64::from(bytes.cluster > 512));
    }),
    ("all refcounts are 0", |bytes, _| {
        let block = bytes.word(bytes.word(48)) as usize;
        let cluster = bytes.cluster as usize;
        bytes.all[block..block + cluster].fill(0);
    }),
];

#[test]
fn what_is_wrong_is_what_qemu_finds_and_is_repaired() {
    let mut random = Random(0xda4a);
    let kinds = KINDS.iter().filter(|kind| !kind.external);
    let (mut found, mut fixed) = (CheckReport::default(), CheckReport::default());
    for kind in kinds {
        let dir = in_memory();
        let path = full(dir.path(), *kind, &mut random);
        let whole = Bytes::of(&path);
        let at = whole.alone();
        for (what, spoil) in DAMAGES {
            let what = format!("{what} ({})", kind.options);
            let mut bytes = Bytes::of(&path);
            spoil(&mut bytes, at);
            if bytes.all == whole.all {
                continue;
            }
            let spoilt = dir.path().join("spoilt.qcow2").to_str().unwrap().to_owned();
            let before = CheckReport { image_end: 0, ..judged(&path) };
            std::fs::write(&spoilt, &bytes.all).unwrap();
            let expected = judged(&spoilt);
            assert!(expected.corruptions + expected.leaks > 0, "{what}: {expected:?}");
            let ours = checked(&spoilt, *kind, Repair::Nothing).unwrap_or_else(|said| panic!("{what}: {said}"));
            if what.contains("nowhere") {
                // QEMU cannot ask such a block for anything, and calls each time an error.
                assert!(ours.corruptions > 0, "{what}: {ours:?}");
            } else {
                assert_eq!(ours, expected, "{what}");
            }
            assert!(std::fs::read(&spoilt).unwrap() == bytes.all, "{what}: nothing was to be put right");
            let seen =
                if what.contains("forgotten (") && what.contains("a cluster") { None } else { Some(contents(&path)) };
            let report = checked(&spoilt, *kind, Repair::All).unwrap_or_else(|said| panic!("{what}: {said}"));
            check(&spoilt);
            let left = CheckReport { corruptions_fixed: 0, leaks_fixed: 0, ..report };
            assert_eq!(left, judged(&spoilt), "{what}");
            assert_eq!((report.corruptions_fixed, report.leaks_fixed), (ours.corruptions, ours.leaks), "{what}");
            if let Some(seen) = seen {
                assert_eq!(CheckReport { image_end: 0, ..left }, before, "{what}");
                assert!(contents(&spoilt) == seen, "{what}: a repair changed what the guest has");
            }
            found.corruptions += ours.corruptions;
            found.leaks += ours.leaks;
            fixed.corruptions += report.corruptions_fixed;
            fixed.leaks += report.leaks_fixed;
        }
    }
    eprintln!(
        "{} corruptions and {} leaks, {} and {} repaired",
        found.corruptions, found.leaks, fixed.corruptions, fixed.leaks
    );
    assert!(found.corruptions > 100 && found.leaks > 10);
}

/// Only what is too much goes: nothing that is wrong besides is touched.
#[test]
fn leaks_alone_can_be_repaired() {
    let mut random = Random(0x1ea4);
    for kind in [KINDS[0], KINDS[2], KINDS[10]] {
        let dir = in_memory();
        let path = full(dir.path(), kind, &mut random);
        let at = Bytes::of(&path).alone();
        let spoilt = dir.path().join("spoilt.qcow2").to_str().unwrap().to_owned();
        for (harms, clean) in [(&[0][..], true), (&[0, 4], true), (&[0, 2], false)] {
            let mut bytes = Bytes::of(&path);
            harms.iter().for_each(|harm| DAMAGES[*harm].1(&mut bytes, at));
            std::fs::write(&spoilt, &bytes.all).unwrap();
            let ours = checked(&spoilt, kind, Repair::Leaks).unwrap();
            let left = CheckReport { corruptions_fixed: 0, leaks_fixed: 0, ..ours };
            assert_eq!(left, judged(&spoilt));
            assert_eq!((ours.leaks_fixed, ours.leaks, ours.corruptions == 0), (1, 0, clean), "{ours:?}");
        }
    }
}

/// An image that was not closed in good order is repaired before anybody writes, and opened as it is by who only reads.
#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let mut random = Random(0xd17e);
    for kind in [KINDS[0], KINDS[8], KINDS[10]] {
        let dir = in_memory();
        let path = full(dir.path(), kind, &mut random);
        let (mut bytes, seen) = (Bytes::of(&path), contents(&path));
        let at = bytes.alone();
        DAMAGES[1].1(&mut bytes, at);
        bytes.all[79] |= 1;
        std::fs::write(&path, &bytes.all).unwrap();
        let opened = async |more: Value| {
            let graph = Graph::new(Arc::new(|_| ()));
            let node = add(&graph, with(node(&path, kind, None), &with(json!({ "node-name": "top" }), &more))).await?;
            let dirty = graph.info(node).await.unwrap().dirty;
            graph.permit().remove(node).await.unwrap();
            Ok::<_, String>(dirty)
        };
        assert_eq!(run_control(async |_| opened(json!({ "read-only": true })).await), Ok(Some(true)));
        assert!(std::fs::read(&path).unwrap() == bytes.all, "who only reads changes nothing");
        assert_eq!(run_control(async |_| opened(json!({})).await), Ok(Some(false)));
        check(&path);
        assert!(contents(&path) == seen);
    }
}

/// What cannot be repaired is not written: there is no node, and the image is as dirty as before.
#[test]
fn a_dirty_image_that_cannot_be_repaired_is_refused() {
    let dir = in_memory();
    let path = full(dir.path(), KINDS[0], &mut Random(3));
    let mut bytes = Bytes::of(&path);
    let at = bytes.alone();
    bytes.set(at, bytes.word(at) + 512);
    bytes.all[79] |= 1;
    std::fs::write(&path, &bytes.all).unwrap();
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let refused = add(&graph, with(node(&path, KINDS[0], None), &json!({ "node-name": "top" }))).await.unwrap_err();
        assert!(refused.contains("could not be repaired: 1 corruptions"), "{refused}");
        assert!(graph.nodes().is_empty());
    });
    assert_eq!(std::fs::read(&path).unwrap()[79] & 1, 1);
}

/// Not every node can be checked, and only what may be written is repaired.
#[test]
fn sync_op_check() {
    let dir = in_memory();
    let path = create(dir.path(), "a.qcow2", KINDS[0], SIZE, None);
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let raw = add(&graph, json!({ "driver": "null-co", "node-name": "raw" })).await.unwrap();
        let refused = graph.permit().check(raw, Repair::Nothing).await.unwrap_err().full();
        assert!(refused.contains("does not support checks"), "{refused}");
        let more = json!({ "node-name": "top", "read-only": true });
        let node = add(&graph, with(node(&path, KINDS[0], None), &more)).await.unwrap();
        let refused = graph.permit().check(node, Repair::Leaks).await.unwrap_err().full();
        assert!(refused.contains("read-only"), "{refused}");
        graph.permit().check(node, Repair::Nothing).await.unwrap();
    });
}

/// Sixty-five thousand snapshots over the same hundred tables: each table is read once, which takes a moment. Following each
/// snapshot's by itself would take hours.
#[test]
fn snapshots_that_share_their_tables_are_gone_through_at_once() {
    const TABLES: u64 = 100;
    const SNAPSHOTS: u64 = 65_000;
    let dir = in_memory();
    let kind = KINDS[0];
    let path = create(dir.path(), "many.qcow2", kind, TABLES << 29, None);
    let writes: Vec<String> = (0..TABLES).map(|number| format!("write -P 1 {} 64k", number << 29)).collect();
    run("qemu-io", &writes.iter().flat_map(|write| ["-c", write]).chain(["-f", "qcow2", &path]).collect::<Vec<_>>());
    let mut image = Bytes::of(&path);
    let l1 = image.word(40);
    let table = (image.all.len() as u64).next_multiple_of(65536);
    image.all.resize(table as usize, 0);
    for number in 0..SNAPSHOTS {
        let (id, mut entry) = (format!("{number:05}"), Vec::new());
        entry.extend(l1.to_be_bytes());
        entry.extend((TABLES as u32).to_be_bytes());
        entry.extend((id.len() as u16).to_be_bytes());
        entry.extend([0; 2 + 4 + 4 + 8 + 4]);
        entry.extend(16u32.to_be_bytes());
        entry.extend(0u64.to_be_bytes());
        entry.extend((TABLES << 29).to_be_bytes());
        entry.extend(id.as_bytes());
        entry.resize(entry.len().next_multiple_of(8), 0);
        image.all.extend(entry);
    }
    image.all[60..64].copy_from_slice(&(SNAPSHOTS as u32).to_be_bytes());
    image.set(64, table);
    std::fs::write(&path, &image.all).unwrap();
    let begun = Instant::now();
    let report = checked(&path, kind, Repair::Nothing).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    // The L1 table's cluster, each table and each cluster of data have a refcount of 1, and the snapshots' table has none.
    let listed = (image.all.len() as u64 - table).div_ceil(65536);
    assert_eq!((report.corruptions, report.check_errors), (1 + 2 * TABLES + listed, 0), "{report:?}");
}
