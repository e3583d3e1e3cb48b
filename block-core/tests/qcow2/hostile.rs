//! Images that are nonsense: an error that names what is wrong, or errors where it is used; never a panic, a hang, or much
//! memory, and never a write over the image's own tables. Here are the known ones; `qcow2_fuzz/` looks for others.

use std::sync::Arc;

use block_core::base::IoError;
use block_core::graph::{Graph, WriteFlags};
use block_core::rt::{Local, run_control};
use serde_json::json;

use crate::bench::{add, attach, enter, flush, range, read, reopen, with, write, writer};
use crate::peer::{KINDS, Kind, create, node, run};

const SIZE: u64 = 4 << 20;

/// An image with data, zeroes and something compressed.
fn valid(kind: Kind) -> Vec<u8> {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = create(dir.path(), "valid.qcow2", kind, SIZE, None);
    let packed = format!("write -c -P 9 {} {}", 8 * kind.cluster, kind.cluster);
    let data = format!("write -P 5 0 {}", 3 * kind.cluster);
    run("qemu-io", &["-f", "qcow2", "-c", &data, "-c", "write -z 1M 64k", "-c", &packed, &path]);
    std::fs::read(path).unwrap()
}

/// What came of an image.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Refused(String),
    Opened { read: Result<(), IoError>, written: Result<(), IoError> },
}

/// Opens the bytes, reads and writes all over the disk, and closes it.
fn used(bytes: &[u8], more: &serde_json::Value) -> (Outcome, Vec<u8>) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("hostile.qcow2");
    std::fs::write(&path, bytes).unwrap();
    let options = with(node(path.to_str().unwrap(), KINDS[0], None), &json!({ "node-name": "top" }));
    let outcome = run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = match add(&graph, with(options, more)).await {
            Ok(node) => node,
            Err(error) => {
                assert!(graph.find("top").is_none());
                return Outcome::Refused(error);
            }
        };
        let port = attach(&graph, node, writer()).await.unwrap();
        let (lane, size) = (port.handle().lane(&Local::current()), port.geometry().size);
        let (mut all_read, mut written) = (Ok(()), Ok(()));
        let places = [0, 4096, 65536, 131_072, 1 << 20, 524_288, SIZE / 2, SIZE - 512];
        for start in places.into_iter().filter(|start| start + 512 <= size) {
            all_read = all_read.and(read(&lane, range(start, 512)).await.map(drop));
            written = written.and(write(&lane, start, &[7; 512], WriteFlags::default()).await);
        }
        let len = size.min(65536);
        let zeroed = lane.write_zeroes(&enter(&lane).await, range(0, len), WriteFlags::default()).await;
        let discarded = lane.discard(&enter(&lane).await, range(0, len)).await;
        written = written.and(zeroed).and(discarded).and(flush(&lane).await);
        drop(lane);
        port.detach(&mut graph.permit()).await;
        // The second time nobody minds what cannot be written.
        if graph.permit().remove(node).await.is_err() {
            let _ = graph.permit().remove(node).await;
        }
        Outcome::Opened { read: all_read, written }
    });
    (outcome, std::fs::read(path).unwrap())
}

fn changed(bytes: &[u8], at: usize, value: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    bytes
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

const COPIED: u64 = 1 << 63;

/// IMG-16 to IMG-20: an L1 entry that leads somewhere else. It is never written through.
#[test]
fn img_16_to_20_an_l1_entry_into_other_tables_is_not_written_through() {
    let bytes = valid(KINDS[0]);
    let (l1, refcounts) = (word(&bytes, 40), word(&bytes, 48));
    let block = word(&bytes, refcounts);
    for target in [refcounts, block, l1] {
        let (outcome, after) = used(&changed(&bytes, l1 as usize, target | COPIED), &json!({}));
        let Outcome::Opened { written, .. } = outcome else { panic!("{outcome:?}") };
        assert!(written.is_err(), "an L2 table at {target:#x} was written");
        let table = target as usize..target as usize + 4096;
        let mut expected = changed(&bytes, l1 as usize, target | COPIED);
        expected.truncate(after.len());
        assert!(after[table.clone()] == expected[table], "the table at {target:#x} was changed");
        assert_eq!(after[79] & 2, 2, "the image is marked corrupt");
    }
    for target in [0x7000_0000u64, (1 << 55) | COPIED, 0x1_0200 | COPIED] {
        let (outcome, _) = used(&changed(&bytes, l1 as usize, target), &json!({}));
        assert!(matches!(outcome, Outcome::Opened { read: Err(_), .. }), "{target:#x}: {outcome:?}");
    }
}

/// IMG-21 to IMG-24: an L2 entry that leads into tables. Guest data is never written over them.
#[test]
fn img_21_to_24_guest_data_is_not_written_over_tables() {
    let bytes = valid(KINDS[0]);
    let (l1, refcounts) = (word(&bytes, 40), word(&bytes, 48));
    let (block, l2) = (word(&bytes, refcounts), word(&bytes, l1) & !COPIED);
    for target in [refcounts, block, l1, l2] {
        let image = changed(&bytes, l2 as usize, target | COPIED);
        let (outcome, after) = used(&image, &json!({}));
        let Outcome::Opened { written, .. } = outcome else { panic!("{outcome:?}") };
        assert!(written.is_err(), "guest data at {target:#x} was written");
        assert!(after[target as usize..target as usize + 512] == image[target as usize..target as usize + 512]);
        assert_eq!(after[79] & 2, 2, "the image is marked corrupt");
    }
    // Compressed data past the end, and garbage.
    for entry in [(1u64 << 62) | 0x3fff_ffff, (1 << 62) | 0x20] {
        let (outcome, _) = used(&changed(&bytes, l2 as usize, entry), &json!({}));
        assert!(matches!(outcome, Outcome::Opened { read: Err(_), .. }), "{outcome:?}");
    }
}

/// A compressed cluster that is said to lie over tables: when it is given up, their clusters are not set free with it.
#[test]
fn tables_are_not_set_free_with_compressed_data() {
    let bytes = valid(KINDS[0]);
    let (l1, refcounts) = (word(&bytes, 40), word(&bytes, 48));
    let l2 = word(&bytes, l1) & !COPIED;
    for target in [0, refcounts, word(&bytes, refcounts), l1, l2] {
        let image = changed(&bytes, l2 as usize, target | 1 << 62);
        let (outcome, after) = used(&image, &json!({}));
        assert!(matches!(outcome, Outcome::Opened { written: Err(_), .. }), "{target:#x}: {outcome:?}");
        assert!(after[..64] == bytes[..64] && after[refcounts as usize..][..64] == bytes[refcounts as usize..][..64]);
        assert!(after[l1 as usize..][..8] == bytes[l1 as usize..][..8], "{target:#x}: the L1 table");
        assert_eq!(after[79] & 2, 2, "{target:#x}: the image is marked corrupt");
    }
}

/// IMG-25 to IMG-31: refcount blocks that are not there. What has to allocate fails; nothing else does.
#[test]
fn img_25_to_31_refcount_blocks_that_are_not_there_stop_allocations() {
    let bytes = valid(KINDS[0]);
    let refcounts = word(&bytes, 48) as usize;
    for block in [0x200u64, 0x7000_0000, 1 << 63] {
        let (outcome, _) = used(&changed(&bytes, refcounts, block), &json!({}));
        assert!(matches!(outcome, Outcome::Opened { read: Ok(()), written: Err(_) }), "{block:#x}: {outcome:?}");
    }
    // A table that says nothing of the first clusters: they are not handed out, since tables are in them.
    let (outcome, after) = used(&changed(&bytes, refcounts, 0), &json!({}));
    assert!(matches!(outcome, Outcome::Opened { .. }), "{outcome:?}");
    assert!(after[..4] == bytes[..4]);
    let (outcome, _) = used(&changed(&bytes, 48, 0), &json!({}));
    assert!(matches!(&outcome, Outcome::Refused(why) if why.contains("lies over")), "{outcome:?}");
}

/// IMG-32 to IMG-36.
#[test]
fn img_32_to_36_features_are_judged() {
    let bytes = valid(KINDS[0]);
    let refused = |value: u64, more: serde_json::Value| match used(&changed(&bytes, 72, value), &more).0 {
        Outcome::Refused(why) => why,
        opened @ Outcome::Opened { .. } => panic!("{opened:?}"),
    };
    assert!(refused(1 << 63, json!({})).contains("incompatible feature"));
    assert!(refused(2, json!({})).contains("corrupt"));
    assert!(refused(4, json!({})).contains("data-file"));
    let read_only = json!({ "read-only": true });
    let reading = |value| {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, changed(&bytes, 72, value)).unwrap();
        run_control(async |_| {
            let graph = Graph::new(Arc::new(|_| ()));
            let options = with(node(path.to_str().unwrap(), KINDS[0], None), &json!({ "node-name": "top" }));
            add(&graph, with(options.clone(), &read_only)).await.map(drop)?;
            // What may not be written does not become writable later.
            let refused = reopen(&graph, &[with(options, &json!({ "read-only": false }))]).await;
            let expected = ["It is repaired when it is opened for writing", "can only be opened with 'read-only'"];
            assert!(refused.is_err_and(|why| expected.iter().any(|one| why.contains(one))));
            Ok::<(), String>(())
        })
    };
    reading(1).unwrap();
    let (outcome, after) = used(&changed(&bytes, 72, 1), &json!({}));
    assert!(matches!(outcome, Outcome::Opened { read: Ok(()), written: Ok(()) }), "{outcome:?}");
    assert_eq!(word(&after, 72), 0, "it was repaired");
    reading(2).unwrap();
    let (_, after) = used(&changed(&bytes, 88, 1 << 40), &json!({}));
    assert_eq!(word(&after, 88), 0, "an unknown autoclear bit is cleared by writing");
}

/// The same with a bitmap that has data; and where its extension, directory, table and data are.
fn with_bitmap(kind: Kind) -> (Vec<u8>, [u64; 4]) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("bitmap.qcow2").to_str().unwrap().to_owned();
    std::fs::write(&path, valid(kind)).unwrap();
    run("qemu-img", &["bitmap", "--add", "-g", "512", &path, "one"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write 1M 4k", &path]);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.resize(bytes.len().next_multiple_of(kind.cluster as usize), 0);
    let at = bytes.windows(4).position(|four| four == [0x23, 0x85, 0x28, 0x75]).unwrap() as u64 + 8;
    let directory = word(&bytes, at + 16);
    let table = word(&bytes, directory);
    let data = (0..).map(|entry| word(&bytes, table + entry * 8)).find(|word| *word > 1).unwrap();
    (bytes, [at, directory, table, data])
}

/// IMG-40: the bitmap directory is somewhere else, or larger than it can be.
#[test]
fn img_40_a_bitmap_directory_that_cannot_be_is_refused() {
    let (bytes, [at, directory, ..]) = with_bitmap(KINDS[0]);
    let (l1, refcounts) = (word(&bytes, 40), word(&bytes, 48));
    for target in [0, l1, refcounts, word(&bytes, refcounts), 0x7000_0000, 1 << 55, 1 << 63, directory + 512] {
        let (outcome, after) = used(&changed(&bytes, at as usize + 16, target), &json!({}));
        assert!(matches!(outcome, Outcome::Refused(_)), "{target:#x}: {outcome:?}");
        assert!(after == changed(&bytes, at as usize + 16, target), "{target:#x}: nothing is written");
    }
    for size in [0u64, 24, 40, 64 << 20, (64 << 20) + 8, u64::MAX] {
        let (outcome, _) = used(&changed(&bytes, at as usize + 8, size), &json!({}));
        assert!(matches!(outcome, Outcome::Refused(_)), "{size}: {outcome:?}");
    }
    for count in [0u64, 2, 65535, 65536, 0xffff_ffff] {
        let (outcome, _) = used(&changed(&bytes, at as usize, count << 32), &json!({}));
        assert!(matches!(outcome, Outcome::Refused(_)), "{count}: {outcome:?}");
    }
}

/// IMG-40: a directory that lies over a table of the image is not written.
#[test]
fn img_40_a_bitmap_directory_over_a_table_is_not_written() {
    let (bytes, [at, directory, ..]) = with_bitmap(KINDS[0]);
    let moved = |place: u64| {
        let mut image = changed(&bytes, at as usize + 16, place);
        image.copy_within(directory as usize..directory as usize + 512, place as usize);
        let (outcome, after) = used(&image, &json!({}));
        let table = place as usize / 65536 * 65536;
        assert!(after[table..table + 65536] == image[table..table + 65536], "{place:#x}: {outcome:?}");
        outcome
    };
    let (l1, refcounts) = (word(&bytes, 40), word(&bytes, 48));
    let l2 = word(&bytes, l1) & !COPIED;
    assert!(matches!(moved(l2 + 32768), Outcome::Refused(_)), "it is not where a cluster begins");
    for place in [l1, refcounts, l2, word(&bytes, refcounts)] {
        moved(place);
    }
}

/// IMG-40: tables of bitmaps that lead to nonsense, to each other, or to other tables, which stay as they are.
#[test]
fn img_40_bitmap_tables_that_lead_elsewhere_do_no_harm() {
    let (bytes, [_, directory, table, data]) = with_bitmap(KINDS[0]);
    let (l1, refcounts) = (word(&bytes, 40), word(&bytes, 48));
    let (block, l2) = (word(&bytes, refcounts), word(&bytes, l1) & !COPIED);
    let entry = (table..).step_by(8).find(|at| word(&bytes, *at) == data).unwrap() as usize;
    for nonsense in [2, data | 1, data + 512, 1 << 63, 1 << 56, 0x7000_0000, 1 << 55] {
        let (outcome, _) = used(&changed(&bytes, entry, nonsense), &json!({}));
        assert!(matches!(outcome, Outcome::Refused(_)), "{nonsense:#x}: {outcome:?}");
    }
    for target in [0x1_0000, l1, refcounts, block, l2, table, directory] {
        for place in [entry, directory as usize] {
            let image = changed(&bytes, place, target);
            let (outcome, after) = used(&image, &json!({}));
            let header = word(&after, 40) == l1 && word(&after, 48) == refcounts;
            assert!(header && word(&after, l1) & !COPIED == l2, "{target:#x}: {outcome:?}");
            assert_eq!(word(&after, refcounts), block, "{target:#x}: {outcome:?}");
        }
    }
}

/// IMG-40, and memory: many bitmaps of a huge disk, of which the image is small.
#[test]
fn img_40_bitmaps_take_no_more_memory_than_is_allowed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("huge.qcow2").to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", &path, "8T"]);
    run("qemu-img", &["bitmap", "--add", "-g", "4k", &path, "0"]);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.resize(bytes.len().next_multiple_of(2 << 20), 0);
    let at = bytes.windows(4).position(|four| four == [0x23, 0x85, 0x28, 0x75]).unwrap() + 8;
    let (directory, table) = (word(&bytes, at as u64 + 16), word(&bytes, word(&bytes, at as u64 + 16)));
    // 600 bitmaps with one table, all of it ones.
    let entry = bytes[directory as usize..directory as usize + 24].to_vec();
    let named = |number| [&entry[..18], &[0, 3, 0, 0, 0, 0], format!("{number:03}").as_bytes(), &[0; 5]].concat();
    let all: Vec<u8> = (0..600).flat_map(named).collect();
    let mut image = changed(&bytes, at + 8, all.len() as u64);
    image = changed(&image, at, 600 << 32);
    image[directory as usize..directory as usize + all.len()].copy_from_slice(&all);
    let entries = u32::from_be_bytes(entry[8..12].try_into().unwrap()) as usize;
    for number in 0..entries {
        image = changed(&image, table as usize + number * 8, 1);
    }
    let (outcome, _) = used(&image, &json!({}));
    assert!(matches!(&outcome, Outcome::Refused(why) if why.contains("bitmaps have more than")), "{outcome:?}");
}
