//! Encrypted qcow2 images whose clusters have room before they are written, and those that keep their data in another file.

use std::os::unix::fs::MetadataExt;

use block_core::catalog::{self, BlockdevCreateOptions};
use block_core::graph::Preallocation;
use block_core::rt::run_control;
use serde_json::{Value, json};

use crate::bench::{add, with};
use crate::in_qcow2::{by_qemu, check, image};
use crate::peer::{OBJECT, Place, SIZE, WORD, contents, create, graph, noise, run, scribble};

fn file(path: &str) -> Value {
    json!({ "driver": "file", "filename": path })
}

/// An image of ours.
fn made(path: &str, more: &Value) {
    std::fs::write(path, b"").unwrap();
    let encrypt = json!({ "format": "luks", "key-secret": "s0", "iter-time": 1 });
    let options = json!({ "driver": "qcow2", "size": SIZE, "file": file(path), "encrypt": encrypt });
    create(&with(options, more), &[WORD]).unwrap();
}

/// Whoever makes them, both programs see the same, and go on writing.
fn goes_on(place: &Place, path: &str, disk: &Value, mut model: Vec<u8>, what: &str) {
    assert!(contents(disk, &[WORD]).unwrap() == model, "{what}");
    assert!(by_qemu(place, path, "luks") == model, "{what}: QEMU reads something else");
    check(path);
    scribble(disk, &[WORD], &mut model, 11);
    assert!(contents(disk, &[WORD]).unwrap() == model, "{what}, written");
    assert!(by_qemu(place, path, "luks") == model, "{what}, written: QEMU reads something else");
    check(path);
    let source = format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=word,file.filename={path}");
    let bytes = ["-c", "write -P 77 8k 100k", "-c", "write -z 300k 100k", "-c", "discard 500k 100k"];
    run("qemu-io", &[&["--object", OBJECT, "--image-opts", &source][..], &bytes].concat());
    model[8 << 10..108 << 10].fill(77);
    model[300 << 10..400 << 10].fill(0);
    let (after, theirs) = (contents(disk, &[WORD]).unwrap(), by_qemu(place, path, "luks"));
    assert!(after == theirs, "{what}, written by QEMU");
    assert!(after[..500 << 10] == model[..500 << 10] && after[600 << 10..] == model[600 << 10..], "{what}, by QEMU");
}

/// What nobody wrote reads as zeroes here; QEMU makes images that read as noise.
#[test]
fn room_in_advance_reads_as_zeroes() {
    let place = Place::new();
    for kind in [json!({}), json!({ "version": "v2" }), json!({ "cluster-size": 16384, "extended-l2": true })] {
        for mode in ["metadata", "falloc", "full"] {
            let path = place.file("room.qcow2");
            made(&path, &with(json!({ "preallocation": mode }), &kind));
            let blocks = std::fs::metadata(&path).unwrap().blocks() * 512;
            assert!(mode == "metadata" || blocks > SIZE as u64, "{kind}, {mode}: {blocks} bytes");
            let is_sparse = blocks < 2 * SIZE as u64;
            assert!(mode != "metadata" || kind != json!({}) || is_sparse, "{blocks} bytes for tables only");
            goes_on(&place, &path, &image(&path, "luks"), vec![0; SIZE], &format!("{kind}, {mode}"));
        }
    }
}

#[test]
fn data_in_another_file() {
    let place = Place::new();
    for mode in ["off", "metadata", "falloc", "full"] {
        let (path, data) = (place.file("image.qcow2"), place.with("data", &noise(1, SIZE)));
        made(&path, &json!({ "preallocation": mode, "data-file": file(&data) }));
        let disk = with(image(&path, "luks"), &json!({ "data-file": file(&data) }));
        goes_on(&place, &path, &disk, vec![0; SIZE], mode);
        let (raw, plain) = (std::fs::read(&data).unwrap(), contents(&disk, &[WORD]).unwrap());
        assert_eq!(raw.len(), SIZE);
        assert!(!raw.windows(64).any(|window| window == [77; 64]), "{mode}: there is plain text in the data file");
        assert!(plain.windows(64).any(|window| window == [77; 64]));
    }
}

/// As a raw data file holds the encrypted disk, what was in it reads as something else.
#[test]
fn data_in_a_raw_file() {
    let place = Place::new();
    let (path, data) = (place.file("image.qcow2"), place.with("data", &noise(1, SIZE)));
    made(&path, &json!({ "data-file": file(&data), "data-file-raw": true }));
    assert!(std::fs::read(&data).unwrap() == noise(1, SIZE), "what it has is kept");
    let disk = with(image(&path, "luks"), &json!({ "data-file": file(&data), "discard": "unmap" }));
    let model = by_qemu(&place, &path, "luks");
    goes_on(&place, &path, &disk, model, "raw");
}

#[test]
fn images_of_qemu_with_room_and_data_files() {
    let place = Place::new();
    let data = place.file("data");
    for (options, external) in [
        ("preallocation=metadata", false),
        ("preallocation=falloc", false),
        ("preallocation=full,compat=0.10", false),
        ("data_file", true),
        ("preallocation=metadata,data_file", true),
        ("preallocation=full,data_file", true),
        ("data_file_raw=on,data_file", true),
    ] {
        let (path, own) =
            (place.file("image.qcow2"), "encrypt.format=luks,encrypt.key-secret=word,encrypt.iter-time=10");
        let own = if external { format!("{own},{options}={data}") } else { format!("{own},{options}") };
        let _ = std::fs::remove_file(&data);
        run("qemu-img", &["create", "-q", "--object", OBJECT, "-f", "qcow2", "-o", &own, &path, &SIZE.to_string()]);
        let more = if external { json!({ "data-file": file(&data) }) } else { json!({}) };
        let model = by_qemu(&place, &path, "luks");
        goes_on(&place, &path, &with(image(&path, "luks"), &more), model, options);
    }
}

/// The disk grows, with room for what is new: zeroes, wherever the data is.
#[test]
fn room_for_what_is_new() {
    let place = Place::new();
    for mode in [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for external in [None, Some(false), Some(true)] {
            let (path, data) = (place.file("image.qcow2"), place.with("data", b""));
            let (mut more, mut disk) = (json!({}), image(&path, "luks"));
            if let Some(raw) = external {
                more = json!({ "data-file": file(&data), "data-file-raw": raw });
                disk["data-file"] = file(&data);
            }
            made(&path, &more);
            let mut model = by_qemu(&place, &path, "luks");
            scribble(&disk, &[WORD], &mut model, 3);
            let size = SIZE * 2 + 512 * 7;
            run_control(async |_| {
                let graph = graph(&[WORD]);
                let node = add(&graph, disk.clone()).await.unwrap();
                graph.permit().resize(node, size as u64, mode).await.unwrap();
                graph.permit().remove(node).await.unwrap();
            });
            model.resize(size, 0);
            goes_on(&place, &path, &disk, model, &format!("{mode:?}, {external:?}"));
        }
    }
}

#[test]
fn measures_are_those_of_qemu() {
    let node = json!({ "driver": "null-co", "node-name": "none" });
    let encrypt = |more: Value| with(json!({ "key-secret": "word" }), &more);
    let qcow2 = |encrypt: Value, more: Value| {
        let encrypt = with(encrypt, &json!({ "format": "luks" }));
        with(json!({ "driver": "qcow2", "file": node, "size": 1 << 30, "encrypt": encrypt }), &more)
    };
    let luks = |more: Value| with(json!({ "driver": "luks", "file": node, "size": 1 << 30 }), &more);
    let small = json!({ "cipher-alg": "aes-128" });
    for (ours, format, theirs) in [
        (
            qcow2(encrypt(json!({})), json!({})),
            "qcow2",
            "encrypt.format=luks,encrypt.key-secret=word,encrypt.iter-time=10",
        ),
        (
            qcow2(encrypt(small.clone()), json!({ "cluster-size": 512 })),
            "qcow2",
            "encrypt.format=luks,encrypt.key-secret=word,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,cluster_size=512",
        ),
        (
            qcow2(encrypt(json!({})), json!({ "preallocation": "full" })),
            "qcow2",
            "encrypt.format=luks,encrypt.key-secret=word,encrypt.iter-time=10,preallocation=full",
        ),
        (luks(encrypt(json!({}))), "luks", "key-secret=word,iter-time=10"),
        (
            luks(encrypt(json!({ "cipher-alg": "aes-256", "cipher-mode": "cbc" }))),
            "luks",
            "key-secret=word,iter-time=10,cipher-alg=aes-256,cipher-mode=cbc",
        ),
    ] {
        let options: BlockdevCreateOptions = qmp::schema::from_value(ours).unwrap();
        let measured = catalog::measure(&options, 0, None).unwrap();
        let arguments = ["measure", "--output=json", "--object", OBJECT, "-O", format, "-o", theirs, "--size", "1G"];
        let said: Value = serde_json::from_str(&run("qemu-img", &arguments)).unwrap();
        let [required, all] = ["required", "fully-allocated"].map(|member| said[member].as_u64().unwrap());
        assert_eq!((measured.required, measured.fully_allocated), (required, all), "{theirs}");
    }
    let options = qmp::schema::from_value(qcow2(json!({}), json!({}))).unwrap();
    let refused = catalog::measure(&options, 0, None).unwrap_err().full();
    assert_eq!(refused, "Parameter 'key-secret' is required for cipher");
}
