//! Images that are changed in what they say of themselves, beside copies that QEMU's programs change.

use std::sync::Arc;

use block_core::drivers::format::qcow2::AmendOptions;
use block_core::graph::Graph;
use block_core::rt::run_control;
use serde_json::{Value, json};

use crate::amending;
use crate::bench::{add, with};
use crate::peer::{KINDS, check, contents, create, file, node, run, work};
use crate::random::Random;

const SIZE: u64 = 1 << 20;

/// What QEMU says of an image.
fn info(path: &str) -> Value {
    let mut info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", path])).unwrap();
    let members = info.as_object_mut().unwrap();
    // What a copy has not in common with its original.
    for member in ["filename", "full-backing-filename", "actual-size", "children"] {
        members.remove(member);
    }
    info
}

#[test]
fn another_backing_file_is_what_qemu_makes_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.img").to_str().unwrap().to_owned();
    std::fs::write(&base, vec![7; SIZE as usize]).unwrap();
    let mut random = Random(5);
    for (number, kind) in KINDS.iter().filter(|kind| !kind.options.contains("data_file_raw")).enumerate() {
        let path = create(dir.path(), &format!("{number}.qcow2"), *kind, SIZE, Some((&base, "raw")));
        work(&path, *kind, SIZE, &mut random, 20);
        let before = contents(&path);
        let copy = format!("{path}.copy");
        // Beside the original, where QEMU finds what it is told is the base.
        let other = |len: usize| format!("{}base.img", "./".repeat(len / 2));
        for len in [0, 30, 2, 150] {
            let name = format!("{}/{}", dir.path().display(), other(len));
            std::fs::copy(&path, &copy).unwrap();
            let rebased = ["rebase", "-u", "-f", "qcow2", "-b", &name, "-F", "raw", &copy];
            if kind.cluster == 512 && name.len() > 80 {
                continue;
            }
            run("qemu-img", &rebased);
            run_control(async |_| {
                let graph = Graph::new(Arc::new(|_| ()));
                let options = node(&path, *kind, Some(file(&base)));
                let top = add(&graph, with(options, &json!({ "node-name": "top" }))).await.unwrap();
                graph.permit().change_backing_file(top, top, Some(&name)).await.unwrap();
                let shown = graph.info(top).await.unwrap().backing;
                assert_eq!(shown, Some((name.clone(), Some("raw".into()))));
                graph.permit().remove(top).await.unwrap();
            });
            assert_eq!(info(&path), info(&copy), "{kind:?}");
            check(&path);
            assert!(contents(&path) == before, "{kind:?}");
        }
        run_control(async |_| {
            let graph = Graph::new(Arc::new(|_| ()));
            let options = node(&path, *kind, Some(file(&base)));
            let top = add(&graph, with(options, &json!({ "node-name": "top" }))).await.unwrap();
            let long = "n".repeat(1024);
            for refused in [&*long, "a\0b"] {
                graph.permit().change_backing_file(top, top, Some(refused)).await.unwrap_err();
            }
            graph.permit().change_backing_file(top, top, None).await.unwrap();
            assert_eq!(graph.info(top).await.unwrap().backing, None);
            graph.permit().remove(top).await.unwrap();
        });
        assert!(info(&path).get("backing-filename").is_none());
        check(&path);
    }
}

fn amended(path: &str, options: &AmendOptions) -> Result<(), String> {
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, with(file(path), &json!({ "node-name": "file" }))).await.unwrap();
        let result = amending::amend(&graph, node, options).await;
        graph.permit().remove(node).await.unwrap();
        result
    })
}

/// What `qemu-img` is told, as options here.
fn options(text: &str) -> AmendOptions {
    let mut options = AmendOptions::default();
    for (name, value) in text.split(',').filter_map(|one| one.split_once('=')) {
        let on = Some(value == "on");
        match name {
            "compat" => options.version = Some(if value == "1.1" { 3 } else { 2 }),
            "refcount_bits" => options.refcount_bits = Some(value.parse().unwrap()),
            "lazy_refcounts" => options.lazy_refcounts = on,
            "data_file" => options.data_file = Some(value.into()),
            "data_file_raw" => options.data_file_raw = on,
            other => panic!("{other}"),
        }
    }
    options
}

/// Each change is done to an image and, by QEMU, to a copy: both are the same then, or both are refused in the same words.
#[test]
fn an_image_is_amended_as_qemu_amends_it() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.img").to_str().unwrap().to_owned();
    std::fs::write(&base, vec![7; SIZE as usize]).unwrap();
    let changes = [
        "compat=1.1",
        "compat=0.10",
        "lazy_refcounts=on",
        "lazy_refcounts=off",
        "refcount_bits=1",
        "refcount_bits=2",
        "refcount_bits=8",
        "refcount_bits=16",
        "refcount_bits=64",
        "refcount_bits=3",
        "compat=1.1,refcount_bits=32",
        "compat=1.1,lazy_refcounts=on",
        "compat=0.10,refcount_bits=16",
        "compat=0.10,refcount_bits=8",
        "compat=0.10,lazy_refcounts=on",
        "data_file_raw=on",
        "data_file_raw=off",
        "data_file=x",
    ];
    let (mut random, mut done, mut refused) = (Random(9), 0, 0);
    for (number, kind) in KINDS.iter().enumerate() {
        let backing = (!kind.options.contains("data_file_raw")).then_some((&*base, "raw"));
        let path = create(dir.path(), &format!("{number}.qcow2"), *kind, SIZE, backing);
        work(&path, *kind, SIZE, &mut random, 20);
        if number % 3 == 1 && !kind.external && !kind.options.contains("refcount_bits=1") {
            run("qemu-img", &["snapshot", "-c", "s", &path]);
        }
        let (ours, theirs) = (format!("{path}.ours"), format!("{path}.theirs"));
        for change in changes.into_iter().skip(number % 2).step_by(2) {
            // Where that is not what QEMU does, the next test looks at it; and QEMU takes minutes for large blocks.
            let older = change.starts_with("compat=0.10") && !kind.options.contains("compat=0.10");
            if older || (change.contains("refcount_bits") && kind.cluster > 1 << 20) {
                continue;
            }
            std::fs::copy(&path, &ours).unwrap();
            std::fs::copy(&path, &theirs).unwrap();
            let output = std::process::Command::new("timeout")
                .args(["60", "qemu-img", "amend", "-f", "qcow2", "-o", change, &theirs])
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let which = format!("{kind:?}, {change}: QEMU said {said}");
            match amended(&ours, &options(change)) {
                Ok(()) => {
                    assert!(output.status.success(), "{which}");
                    done += 1;
                    assert_eq!(info(&ours), info(&theirs), "{which}");
                    // Nothing is where that name leads.
                    if !change.starts_with("data_file=") {
                        check(&ours);
                        assert!(contents(&ours) == contents(&path), "{which}");
                    }
                }
                Err(error) => {
                    refused += 1;
                    assert!(!output.status.success(), "{which}, and we {error}");
                    let ours = error.split(':').next().unwrap();
                    assert!(said.contains(ours), "{which}, and we {error}");
                }
            }
        }
    }
    eprintln!("{done} done, {refused} refused");
    assert!(done > 40 && refused > 20);
}

#[test]
fn an_image_becomes_one_of_version_2_where_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.img").to_str().unwrap().to_owned();
    std::fs::write(&base, vec![7; SIZE as usize]).unwrap();
    let images = [
        ("", "write -P 5 4096 100k", Ok(())),
        ("cluster_size=512", "write -P 5 4096 100k", Ok(())),
        ("refcount_bits=16,lazy_refcounts=on", "write -P 5 4096 100k", Ok(())),
        ("", "write -z 0 64k", Err("clusters of zeroes")),
        ("extended_l2=on", "write 0 4k", Err("Cannot downgrade an image with incompatible features 0x10 set")),
        (
            "compression_type=zstd",
            "write -c 0 64k",
            Err("Cannot downgrade an image with incompatible features 0x8 set"),
        ),
        ("refcount_bits=8", "write 0 4k", Err("compat=0.10 requires refcount_bits=16")),
    ];
    for (number, (made, command, expected)) in images.into_iter().enumerate() {
        let path = dir.path().join(format!("{number}.qcow2")).to_str().unwrap().to_owned();
        let made = format!("compat=1.1,{made}");
        let made = made.trim_end_matches(',');
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", made, "-b", &base, "-F", "raw", &path, "1M"]);
        run("qemu-io", &["-f", "qcow2", "-c", command, &path]);
        let (bytes, before, theirs) = (std::fs::read(&path).unwrap(), contents(&path), format!("{path}.theirs"));
        std::fs::copy(&path, &theirs).unwrap();
        let result = amended(&path, &options("compat=0.10"));
        match expected {
            Ok(()) => {
                result.unwrap();
                run("qemu-img", &["amend", "-f", "qcow2", "-o", "compat=0.10", &theirs]);
                assert_eq!(info(&path), info(&theirs), "{made}");
                check(&path);
                assert!(contents(&path) == before, "{made}");
                amended(&path, &options("compat=1.1,refcount_bits=4")).unwrap();
                amended(&path, &options("compat=0.10,refcount_bits=16")).unwrap();
                assert_eq!(info(&path), info(&theirs), "{made}, to and fro");
                check(&path);
            }
            Err(why) => {
                let said = result.unwrap_err();
                assert!(said.contains(why), "{made}: {said}");
                assert!(std::fs::read(&path).unwrap() == bytes, "{made}: something was written");
            }
        }
    }
    // Bitmaps would be lost.
    let path = dir.path().join("bitmap.qcow2").to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path, "1M"]);
    run("qemu-img", &["bitmap", "--add", &path, "b"]);
    assert!(amended(&path, &options("compat=0.10")).unwrap_err().contains("bitmaps"));
    amended(&path, &options("refcount_bits=64,lazy_refcounts=on")).unwrap();
    check(&path);
    assert_eq!(info(&path)["format-specific"]["data"]["bitmaps"][0]["name"], "b");
}

#[test]
fn names_are_set_without_opening_what_they_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2").to_str().unwrap().to_owned();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path, "1M"]);
    let named = |name: &str, format: Option<&str>| AmendOptions {
        backing_file: Some(name.into()),
        backing_format: format.map(Into::into),
        ..AmendOptions::default()
    };
    amended(&path, &named("nowhere.img", Some("raw"))).unwrap();
    let shown = info(&path);
    assert_eq!((&shown["backing-filename"], &shown["backing-filename-format"]), (&json!("nowhere.img"), &json!("raw")));
    amended(&path, &named(&"n".repeat(1023), None)).unwrap();
    assert_eq!(info(&path)["backing-filename-format"], "raw");
    amended(&path, &named(&"n".repeat(1024), None)).unwrap_err();
    amended(&path, &named("", None)).unwrap();
    let format = AmendOptions { backing_format: Some("raw".into()), ..AmendOptions::default() };
    amended(&path, &format).unwrap_err();
    assert!(info(&path).get("backing-filename").is_none() && info(&path).get("backing-filename-format").is_none());
    check(&path);
}
