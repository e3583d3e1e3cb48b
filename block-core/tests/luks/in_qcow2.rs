//! Encrypted qcow2 images: the keys in the image, data clusters encrypted by their places; and the old ones, which are read.

use std::cell::Cell;
use std::rc::Rc;

use block_core::catalog;
use block_core::graph::{Graph, NodeId, Preallocation, SnapshotName, WriteFlags};
use block_core::rt::run_control;
use block_core::rt::sync::yield_now;
use serde_json::{Value, json};

use crate::bench::{add, attach, io_thread, on, with, write, writer};
use crate::peer::{OBJECT, Place, SIZE, WORD, contents, create, described, graph, noise, opens, run, scribble};

pub(crate) fn image(path: &str, format: &str) -> Value {
    let file = json!({ "driver": "file", "filename": path });
    let encrypt = json!({ "format": format, "key-secret": "s0" });
    json!({ "driver": "qcow2", "node-name": "disk", "file": file, "encrypt": encrypt })
}

pub(crate) fn by_qemu(place: &Place, path: &str, format: &str) -> Vec<u8> {
    let out = place.file("by-qemu.raw");
    let source = format!("driver=qcow2,encrypt.format={format},encrypt.key-secret=word,file.filename={path}");
    run("qemu-img", &["convert", "--object", OBJECT, "--image-opts", &source, "-O", "raw", &out]);
    std::fs::read(&out).unwrap()
}

pub(crate) fn check(path: &str) {
    check_with(path, OBJECT);
}

/// With the secret `word`.
pub(crate) fn check_with(path: &str, object: &str) {
    let source = format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=word,file.filename={path}");
    run("qemu-img", &["check", "-q", "--object", object, "--image-opts", &source]);
}

#[test]
fn images_of_qemu() {
    let place = Place::new();
    let plain = noise(1, SIZE);
    let source = place.with("plain.raw", &plain);
    for (number, options) in ["", ",cluster_size=512", ",cluster_size=16k,extended_l2=on", ",encrypt.cipher-mode=cbc"]
        .into_iter()
        .enumerate()
    {
        let path = place.file("image.qcow2");
        let own = format!("encrypt.format=luks,encrypt.key-secret=word,encrypt.iter-time=10{options}");
        run("qemu-img", &["convert", "--object", OBJECT, "-f", "raw", "-O", "qcow2", "-o", &own, &source, &path]);
        let (disk, mut model) = (image(&path, "luks"), plain.clone());
        assert!(contents(&disk, &[WORD]).unwrap() == model, "'{options}': we read something else");
        scribble(&disk, &[WORD], &mut model, number as u64 * 7);
        assert!(by_qemu(&place, &path, "luks") == model, "'{options}': QEMU reads something else");
        check(&path);
        // What is shared with a snapshot is copied, and encrypted for its new place.
        let target = format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=word,file.filename={path}");
        run("qemu-img", &["snapshot", "--object", OBJECT, "--image-opts", "-c", "one", &target]);
        let before = model.clone();
        scribble(&disk, &[WORD], &mut model, number as u64 * 7 + 3);
        assert!(by_qemu(&place, &path, "luks") == model && contents(&disk, &[WORD]).unwrap() == model);
        run("qemu-img", &["snapshot", "--object", OBJECT, "--image-opts", "-a", "one", &target]);
        assert!(contents(&disk, &[WORD]).unwrap() == before, "'{options}': the snapshot is another one");
        check(&path);
    }
}

#[test]
fn images_that_we_make() {
    let place = Place::new();
    for more in [json!({}), json!({ "cluster-size": 512 }), json!({ "cluster-size": 2 << 20, "version": "v2" })] {
        let path = place.with("image.qcow2", b"");
        let mut options = json!({
            "driver": "qcow2", "size": SIZE, "file": { "driver": "file", "filename": path },
            "encrypt": { "format": "luks", "key-secret": "s0", "iter-time": 10 }
        });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        create(&options, &[WORD]).unwrap();
        check(&path);
        let (disk, mut model) = (image(&path, "luks"), vec![0; SIZE]);
        assert!(contents(&disk, &[WORD]).unwrap() == model, "{more}: what was never written is zeroes");
        scribble(&disk, &[WORD], &mut model, 5);
        assert!(contents(&disk, &[WORD]).unwrap() == model);
        assert!(by_qemu(&place, &path, "luks") == model, "{more}: QEMU reads something else");
        check(&path);
        assert_eq!(described(&disk, &[WORD])["data"]["encrypt"]["cipher-alg"], "aes-256");
        let raw = std::fs::read(&path).unwrap();
        let start = model.iter().position(|byte| *byte != 0).unwrap();
        let part = &model[start..start + 64];
        assert!(!raw.windows(part.len()).any(|window| window == part), "{more}: there is plain text in the file");
    }
}

/// A layer over another one: partly written clusters are filled up with what is below, encrypted.
#[test]
fn over_a_backing_file() {
    let place = Place::new();
    let mut model = noise(3, SIZE);
    let base = place.with("base.raw", &model);
    let path = place.with("image.qcow2", b"");
    let options = json!({
        "driver": "qcow2", "size": SIZE, "file": { "driver": "file", "filename": path },
        "backing-file": base, "backing-fmt": "raw",
        "encrypt": { "format": "luks", "key-secret": "s0", "iter-time": 10 }
    });
    create(&options, &[WORD]).unwrap();
    let mut disk = image(&path, "luks");
    disk["backing"] = json!({ "driver": "raw", "file": { "driver": "file", "filename": base } });
    scribble(&disk, &[WORD], &mut model, 1);
    assert!(contents(&disk, &[WORD]).unwrap() == model && by_qemu(&place, &path, "luks") == model);
    check(&path);
}

#[test]
fn old_images_are_read() {
    let place = Place::new();
    let plain = noise(9, SIZE);
    let source = place.with("plain.raw", &plain);
    let path = place.file("old.qcow2");
    let own = "encrypt.format=aes,encrypt.key-secret=word";
    run("qemu-img", &["convert", "--object", OBJECT, "-f", "raw", "-O", "qcow2", "-o", own, &source, &path]);
    let mut disk = image(&path, "aes");
    assert!(opens(&disk, &[WORD]).unwrap_err().contains("can only be opened with 'read-only'"));
    disk["read-only"] = json!(true);
    assert!(contents(&disk, &[WORD]).unwrap() == plain);
    assert!(contents(&disk, &["another word"]).unwrap() != plain, "nothing tells that the word is wrong");
}

#[test]
fn without_the_secret_nothing_opens() {
    let place = Place::new();
    let path = place.with("image.qcow2", b"");
    let file = json!({ "driver": "file", "filename": path });
    let encrypt = json!({ "format": "luks", "key-secret": "s0", "iter-time": 1 });
    let options = json!({ "driver": "qcow2", "size": SIZE, "file": file, "encrypt": encrypt });
    create(&options, &[WORD]).unwrap();
    let refused = |options: &Value| opens(options, &[WORD, "wrong"]).unwrap_err();
    let mut disk = image(&path, "luks");
    disk["encrypt"]["key-secret"] = json!("s1");
    assert!(refused(&disk).ends_with("Invalid password, cannot unlock any keyslot"));
    disk["encrypt"]["key-secret"] = json!("s7");
    assert!(refused(&disk).ends_with("No secret with id 's7'"));
    disk["encrypt"] = json!({ "format": "aes", "key-secret": "s0" });
    assert!(refused(&disk).contains("Header reported 'luks' encryption format"));
    disk.as_object_mut().unwrap().remove("encrypt");
    assert!(refused(&disk).ends_with("Parameter 'encrypt.key-secret' is required for cipher"));
    // The header says where its keys are, and lies.
    let good = std::fs::read(&path).unwrap();
    let at = good.windows(4).position(|window| window == 0x0537_be77_u32.to_be_bytes()).unwrap();
    let disk = image(&path, "luks");
    for (field, value, expected) in [
        (8, u64::MAX, "impossible place"),
        (8, 0, "impossible place"),
        (8, 512, "impossible place"),
        (8, 1 << 40, "Could not read the image's LUKS header"),
        (16, 0, "impossible place"),
        (16, u64::MAX, "impossible place"),
        (16, 4096, "ends behind the end"),
    ] {
        let mut bytes = good.clone();
        bytes[at + field..at + field + 8].copy_from_slice(&value.to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let refused = refused(&disk);
        assert!(refused.contains(expected), "{refused} instead of {expected}");
    }
    let mut bytes = good.clone();
    bytes[at..at + 4].copy_from_slice(&7u32.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    assert!(refused(&disk).contains("encryption metadata is missing"));
}

const AT_SIZE: u64 = 24;

/// What is written at these places of the image in the file.
fn patch(path: &str, changes: &[(u64, u64)]) {
    let mut bytes = std::fs::read(path).unwrap();
    for (at, value) in changes {
        bytes[*at as usize..][..8].copy_from_slice(&value.to_be_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

/// A header may say that a disk ends inside a sector, and so may a snapshot: it ends with the last whole one, as in QEMU.
#[test]
fn a_disk_that_ends_inside_a_sector() {
    let (place, whole) = (Place::new(), SIZE + 3 * 512);
    let path = place.with("image.qcow2", b"");
    let options = json!({
        "driver": "qcow2", "size": whole + 512, "file": { "driver": "file", "filename": path },
        "encrypt": { "format": "luks", "key-secret": "s0", "iter-time": 1 }
    });
    create(&options, &[WORD]).unwrap();
    let target = format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=word,file.filename={path}");
    run("qemu-img", &["snapshot", "--object", OBJECT, "--image-opts", "-c", "one", &target]);
    let bytes = std::fs::read(&path).unwrap();
    let snapshot = u64::from_be_bytes(bytes[64..72].try_into().unwrap());
    assert_eq!(bytes[snapshot as usize + 48..][..8], (whole as u64 + 512).to_be_bytes());
    patch(&path, &[(AT_SIZE, whole as u64 + 488), (snapshot + 48, whole as u64 + 1)]);

    let (disk, mut model) = (image(&path, "luks"), vec![0; whole]);
    let all = contents(&disk, &[WORD]).unwrap();
    assert!(all == model, "{} bytes", all.len());
    // Clusters are filled up to the end.
    scribble(&disk, &[WORD], &mut model, 2);
    assert!(contents(&disk, &[WORD]).unwrap() == model && by_qemu(&place, &path, "luks") == model);
    for (more, how) in [(512, Preallocation::Off), (70_144, Preallocation::Metadata), (512, Preallocation::Full)] {
        changed(&disk, async |graph, node| {
            graph.permit().resize(node, (model.len() + more) as u64, how).await.unwrap();
        });
        model.resize(model.len() + more, 0);
        assert!(contents(&disk, &[WORD]).unwrap() == model && by_qemu(&place, &path, "luks") == model, "{how:?}");
        patch(&path, &[(AT_SIZE, model.len() as u64 + 511)]);
        assert!(contents(&disk, &[WORD]).unwrap() == model);
    }
    changed(&disk, async |graph, node| {
        let which = SnapshotName { id: None, name: Some("one".into()) };
        graph.permit().apply_snapshot(node, which).await.unwrap();
    });
    model = vec![0; whole];
    assert!(contents(&disk, &[WORD]).unwrap() == model);
    scribble(&disk, &[WORD], &mut model, 6);
    assert!(contents(&disk, &[WORD]).unwrap() == model && by_qemu(&place, &path, "luks") == model);
    check(&path);
}

/// What is below may end inside a sector, too: where the disk grows over it, it is covered.
#[test]
fn over_a_backing_file_that_ends_inside_a_sector() {
    let place = Place::new();
    let raw = place.with("base.raw", &noise(3, SIZE + 100_352));
    let base = place.file("base.qcow2");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw, &base]);
    patch(&base, &[(AT_SIZE, SIZE as u64 + 100_007)]);
    let path = place.with("image.qcow2", b"");
    for version in ["v2", "v3"] {
        let options = json!({
            "driver": "qcow2", "size": SIZE - 512, "file": { "driver": "file", "filename": path }, "version": version,
            "backing-file": base, "backing-fmt": "qcow2",
            "encrypt": { "format": "luks", "key-secret": "s0", "iter-time": 1 }
        });
        create(&options, &[WORD]).unwrap();
        let mut disk = image(&path, "luks");
        disk["backing"] = json!({ "driver": "qcow2", "file": { "driver": "file", "filename": base } });
        changed(&disk, async |graph, node| {
            graph.permit().resize(node, 2 * SIZE as u64, Preallocation::Off).await.unwrap();
        });
        let mut model = noise(3, SIZE - 512);
        model.resize(2 * SIZE, 0);
        assert!(contents(&disk, &[WORD]).unwrap() == model && by_qemu(&place, &path, "luks") == model, "{version}");
    }
}

/// Where the image's LUKS header is.
pub(crate) fn keys(path: &str) -> std::ops::Range<usize> {
    let bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(4).position(|window| window == 0x0537_be77_u32.to_be_bytes()).unwrap();
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    number(at + 8)..number(at + 8) + number(at + 16)
}

/// Refcounts and tables that lie do not lead a guest over the keys.
#[test]
fn keys_are_watched() {
    let place = Place::new();
    let path = place.with("image.qcow2", b"");
    let options = json!({
        "driver": "qcow2", "size": SIZE, "file": { "driver": "file", "filename": path },
        "encrypt": { "format": "luks", "key-secret": "s0", "iter-time": 1 }
    });
    create(&options, &[WORD]).unwrap();
    let disk = image(&path, "luks");
    scribble(&disk, &[WORD], &mut vec![0; SIZE], 1);
    let (good, keys) = (std::fs::read(&path).unwrap(), keys(&path));
    let number = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
    let word = |at: u64| number(at as usize) & 0x00ff_ffff_ffff_fe00;
    let (l1, block) = (number(40), word(number(48)));
    let clusters = keys.start as u64 >> 16..keys.end as u64 >> 16;
    assert_eq!(clusters.start % 4, 0);
    let free: Vec<_> = (clusters.start / 4..clusters.end / 4).map(|four| (block + four * 8, 0)).collect();
    let lies = [
        ("free clusters", free),
        ("a cluster of the guest", vec![(word(l1), 1 << 63 | keys.start as u64)]),
        ("an L2 table", vec![(l1, 1 << 63 | keys.start as u64)]),
    ];
    for (what, lie) in lies {
        std::fs::write(&path, &good).unwrap();
        patch(&path, &lie);
        let failed = run_control(async |_| {
            let graph = graph(&[WORD]);
            let node = add(&graph, disk.clone()).await.unwrap();
            let port = attach(&graph, node, writer()).await.unwrap();
            let thread = io_thread();
            let failed = on(&thread, &port.handle(), async move |lane| {
                let mut failed = 0;
                for start in (0..SIZE).step_by(65536) {
                    let flags = WriteFlags { fua: true, ..WriteFlags::default() };
                    failed += usize::from(write(&lane, start as u64, &noise(1, 65536), flags).await.is_err());
                }
                failed
            })
            .await;
            port.detach(&mut graph.permit()).await;
            let _ = graph.permit().remove(node).await;
            failed
        });
        let after = std::fs::read(&path).unwrap();
        assert!(after[keys.clone()] == good[keys.clone()], "{what}: the keys are gone ({failed} writes failed)");
    }
    // Material that nobody has written is a fine L1 table, by itself.
    std::fs::write(&path, &good).unwrap();
    patch(&path, &[(40, keys.end as u64 & !0xffff)]);
    let refused = opens(&disk, &[WORD]).unwrap_err();
    assert!(refused.ends_with("In the image the active L1 table lies over the LUKS header"), "{refused}");
}

/// Deriving a key takes long: whoever uses the same file meanwhile does not wait for it.
#[test]
fn a_file_is_free_while_keys_are_derived() {
    let place = Place::new();
    let path = place.with("image", b"");
    run_control(async |local| {
        let graph = graph(&[WORD]);
        let file = json!({ "driver": "file", "filename": path, "node-name": "file" });
        let file = add(&graph, file).await.unwrap();
        let encrypt = json!({ "format": "luks", "key-secret": "s0", "iter-time": 1500 });
        let (over, is_over) = (Rc::new(Cell::new(0)), |over: &Rc<Cell<u32>>| over.get());
        let work = async |options: Value, is_new: bool| {
            let (graph, over) = (graph.clone(), over.clone());
            local.spawn(async move {
                if is_new {
                    catalog::create(&graph, qmp::schema::from_value(options).unwrap()).await.unwrap();
                } else {
                    let node = add(&graph, options).await.unwrap();
                    graph.permit().remove(node).await.unwrap();
                }
                over.set(over.get() + 1);
            });
        };
        let luks = json!({ "driver": "luks", "size": SIZE, "file": "file", "key-secret": "s0", "iter-time": 1500 });
        let qcow2 = json!({ "driver": "qcow2", "size": SIZE, "file": "file", "encrypt": encrypt });
        let disk = with(image(&path, "luks"), &json!({ "file": "file" }));
        for (count, (options, is_new)) in [(luks, true), (qcow2, true), (disk, false)].into_iter().enumerate() {
            work(options, is_new).await;
            for _ in 0..30 {
                yield_now().await;
                let port = attach(&graph, file, writer()).await;
                if is_new {
                    port.unwrap().detach(&mut graph.permit()).await;
                } else if let Ok(port) = port {
                    port.detach(&mut graph.permit()).await;
                }
                let raw =
                    add(&graph, json!({ "driver": "raw", "node-name": "raw", "file": "file", "read-only": true }));
                let raw = raw.await.unwrap();
                graph.permit().remove(raw).await.unwrap();
            }
            assert_eq!(is_over(&over), count as u32, "others waited");
            while is_over(&over) == count as u32 {
                yield_now().await;
            }
        }
    });
}

/// Something is done to the node.
fn changed(disk: &Value, work: impl AsyncFnOnce(&Rc<Graph>, NodeId)) {
    run_control(async |_| {
        let graph = graph(&[WORD]);
        let node = add(&graph, disk.clone()).await.unwrap();
        work(&graph, node).await;
        graph.permit().remove(node).await.unwrap();
    });
}
