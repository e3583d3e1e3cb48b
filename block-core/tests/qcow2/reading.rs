//! What QEMU's programs write is read, whatever they were told to make.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use block_core::base::IoError;
use block_core::graph::Graph;
use block_core::rt::{Local, run_control};
use serde_json::{Value, json};

use crate::bench::{READER, add, attach, enter, range, read, with};
use crate::peer::{KINDS, Kind, contents, create, file, node, run, work};
use crate::random::Random;

fn size(kind: Kind) -> u64 {
    // Neither whole clusters nor whole tables, and more than one L2 table where clusters are small.
    if kind.cluster > 1 << 20 { (9 << 20) + 1536 } else { (3 << 20) + 512 }
}

/// What a node shows, read in pieces of all sizes.
fn seen(options: &Value) -> Vec<u8> {
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, with(options.clone(), &json!({ "node-name": "top", "read-only": true }))).await.unwrap();
        let port = attach(&graph, node, READER).await.unwrap();
        let (lane, size) = (port.handle().lane(&Local::current()), port.geometry().size);
        let (mut all, mut at, mut random) = (vec![0; size as usize], 0, Random(size | 1));
        while at < size {
            let len = (1 + random.below(300_000)).min(size - at);
            all[at as usize..(at + len) as usize].copy_from_slice(&read(&lane, range(at, len)).await.unwrap());
            at += len;
        }
        let mut status = 0;
        while status < size {
            let pin = enter(&lane).await;
            status += lane.map(&pin, range(status, size - status)).await.unwrap().len;
        }
        drop(lane);
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
        all
    })
}

fn same(seen: &[u8], expected: &[u8], what: &str) {
    assert_eq!(seen.len(), expected.len(), "{what}");
    let differs = seen.iter().zip(expected).position(|(one, other)| one != other);
    assert_eq!(differs, None, "the first byte of {what} that differs");
}

fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

#[test]
fn images_of_every_kind_are_read() {
    let mut random = Random(0x5eed);
    for (number, kind) in KINDS.iter().enumerate() {
        let dir = in_memory();
        let path = create(dir.path(), "top.qcow2", *kind, size(*kind), None);
        work(&path, *kind, size(*kind), &mut random, 60);
        same(&seen(&node(&path, *kind, None)), &contents(&path), &format!("kind {number}, {}", kind.options));
    }
}

/// A chain: qcow2 over qcow2 over raw, each shorter or longer than the one above it.
fn chain(dir: &Path, top: Kind, middle: Kind, random: &mut Random) -> (String, Value) {
    let base = dir.join("base.raw").to_str().unwrap().to_owned();
    let base_bytes: Vec<u8> = (0..2_500_000u32 / 512 * 512).map(|at| (at / 512 % 253) as u8 | 1).collect();
    std::fs::write(&base, base_bytes).unwrap();
    let below = create(dir, "middle.qcow2", middle, 4 << 20, Some((&base, "raw")));
    work(&below, middle, 4 << 20, random, 30);
    let path = create(dir, "top.qcow2", top, size(top), Some((&below, "qcow2")));
    work(&path, top, size(top), random, 30);
    let raw = json!({ "driver": "raw", "file": file(&base) });
    (path, node(&below, middle, Some(raw)))
}

#[test]
fn chains_of_every_kind_are_read() {
    let mut random = Random(0xc4a1);
    // What has a raw data file has no backing file.
    let kinds: Vec<_> = KINDS.iter().filter(|kind| !kind.options.contains("raw")).collect();
    for (number, kind) in kinds.iter().enumerate() {
        let dir = in_memory();
        let middle = kinds[(number + 5) % kinds.len()];
        let (path, below) = chain(dir.path(), **kind, *middle, &mut random);
        let expected = contents(&path);
        same(&seen(&node(&path, **kind, Some(below))), &expected, &format!("{} over {}", kind.options, middle.options));
    }
}

/// The caches are too small for anything to stay in them.
#[test]
fn small_caches_are_enough() {
    let mut random = Random(7);
    let kind = Kind { options: "compat=1.1,cluster_size=512", cluster: 512, external: false };
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", kind, 6 << 20, None);
    work(&path, kind, 6 << 20, &mut random, 100);
    let options = with(node(&path, kind, None), &json!({ "l2-cache-size": 512, "refcount-cache-size": 512 }));
    same(&seen(&options), &contents(&path), "all");
}

/// What was not needed for a whole interval is read again when it is; blkdebug says that it is.
#[test]
fn unused_tables_are_forgotten() {
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", KINDS[0], 1 << 20, None);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 64k", &path]);
    let seconds = |interval: u64| {
        run_control(async |local| {
            let graph = Graph::new(Arc::new(|_| ()));
            let rules = json!({
                "set-state": [{ "event": "flush_to_disk", "new_state": 2 }],
                "inject-error": [{ "event": "l2_load", "state": 2, "errno": 5, "once": true }],
            });
            let below = with(json!({ "driver": "blkdebug", "image": file(&path) }), &rules);
            let options = json!({ "driver": "qcow2", "node-name": "top", "file": below, "backing": null });
            let node = add(&graph, with(options, &json!({ "cache-clean-interval": interval }))).await.unwrap();
            let port = attach(&graph, node, READER).await.unwrap();
            let lane = port.handle().lane(&Local::current());
            assert_eq!(read(&lane, range(0, 512)).await.unwrap(), [7; 512]);
            lane.flush(&enter(&lane).await).await.unwrap();
            assert_eq!(read(&lane, range(0, 512)).await.unwrap(), [7; 512], "it is in memory");
            local.sleep(Duration::from_millis(2500)).await;
            let seen = read(&lane, range(0, 512)).await;
            drop(lane);
            port.detach(&mut graph.permit()).await;
            graph.permit().remove(node).await.unwrap();
            seen
        })
    };
    assert_eq!(seconds(1), Err(IoError::from_errno(5)));
    assert_eq!(seconds(0).unwrap(), [7; 512]);
}

#[test]
fn an_image_with_a_snapshot_shows_what_is_active() {
    let mut random = Random(9);
    let dir = in_memory();
    let path = create(dir.path(), "top.qcow2", KINDS[0], 3 << 20, None);
    work(&path, KINDS[0], 3 << 20, &mut random, 20);
    run("qemu-img", &["snapshot", "-c", "before", &path]);
    work(&path, KINDS[0], 3 << 20, &mut random, 20);
    same(&seen(&node(&path, KINDS[0], None)), &contents(&path), "the active state");
}

/// No file is opened because an image names it; what it names is said.
#[test]
fn img_45_to_50_what_an_image_names_is_not_opened() {
    let dir = in_memory();
    let secret = crate::bench::image(dir.path(), "secret", 1 << 20, 0x5a);
    let path = create(dir.path(), "top.qcow2", KINDS[0], 1 << 20, Some((&secret, "raw")));
    let external = create(dir.path(), "outside.qcow2", KINDS[13], 1 << 20, None);
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let refused =
            add(&graph, json!({ "driver": "qcow2", "node-name": "top", "file": file(&path) })).await.unwrap_err();
        assert!(refused.contains(&secret) && refused.contains("give 'backing'"), "{refused}");
        let options = json!({ "driver": "qcow2", "node-name": "top", "file": file(&external), "backing": null });
        let refused = add(&graph, options).await.unwrap_err();
        assert!(refused.contains("give 'data-file'"), "{refused}");
        assert!(graph.find("top").is_none());
        // It was said that there is none: then there is none.
        let node = add(&graph, with(node(&path, KINDS[0], None), &json!({ "node-name": "top" }))).await.unwrap();
        let port = attach(&graph, node, READER).await.unwrap();
        let lane = port.handle().lane(&Local::current());
        assert!(read(&lane, range(0, 1 << 20)).await.unwrap().iter().all(|byte| *byte == 0));
    });
}

#[test]
fn what_is_known_of_an_image_is_what_qemu_says() {
    let dir = in_memory();
    for (number, kind) in KINDS.iter().enumerate() {
        let path = create(dir.path(), &format!("{number}.qcow2"), *kind, 1 << 20, None);
        if !kind.options.contains("0.10") {
            run("qemu-img", &["bitmap", "--add", "-g", "512", &path, "one"]);
            run("qemu-img", &["bitmap", "--add", "--disable", &path, "two"]);
        }
        let said: Value =
            serde_json::from_str(&run("qemu-img", &["info", "-f", "qcow2", "--output=json", &path])).unwrap();
        let ours = run_control(async |_| {
            let graph = Graph::new(Arc::new(|_| ()));
            let node = add(&graph, with(node(&path, *kind, None), &json!({ "node-name": "top" }))).await.unwrap();
            graph.info(node).await.unwrap().specific.unwrap()
        });
        assert_eq!(ours, said["format-specific"], "{}", kind.options);
    }
}
