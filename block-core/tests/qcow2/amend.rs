//! Images that are changed in what they say of themselves, beside copies that QEMU's programs change.

use std::sync::Arc;

use block_core::graph::Graph;
use block_core::rt::run_control;
use serde_json::{Value, json};

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
