//! Images that we make are QEMU's too, whatever they are to be.

use std::path::Path;
use std::sync::Arc;

use block_core::drivers::format::qcow2::{CreateOptions, create};
use block_core::graph::{Graph, PermSet, Perms, Preallocation};
use block_core::port::PORT;
use block_core::rt::{Local, run_control};
use serde_json::Value;

use crate::bench::{add, attach, with};
use crate::peer::{check, contents, file, run};

/// Makes an image in a file that has something in it, and one for its data where the options name it.
fn made(dir: &Path, options: &CreateOptions) -> Result<String, String> {
    let path = crate::bench::image(dir, "made.qcow2", 300_000, 0xee);
    // QEMU opens what an image names.
    let data = options.data_file.as_ref().map(|name| crate::bench::image(dir, name, 5000, 0xee));
    let options = &CreateOptions { data_file: data.clone(), ..options.clone() };
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let perms = Perms {
            uses: PermSet::CONSISTENT_READ | PermSet::WRITE | PermSet::RESIZE,
            shares: PermSet::CONSISTENT_READ,
        };
        let mut ports = Vec::new();
        for (name, path) in [("image", Some(&path)), ("data", data.as_ref())] {
            let Some(path) = path else { continue };
            let node = add(&graph, with(file(path), &serde_json::json!({ "node-name": name }))).await.unwrap();
            ports.push(attach(&graph, node, perms).await.unwrap());
        }
        let mut jobs: Vec<_> = ports.iter().map(|port| port.handle().job(&Local::current())).collect();
        let result = match &mut jobs[..] {
            [image] => image.step(async |cx| create(cx.child(PORT), None, options, None).await).await,
            [image, data] => {
                image
                    .step(async |cx| {
                        let image = cx.child(PORT);
                        data.step(async |cx| create(image, Some(cx.child(PORT)), options, None).await).await
                    })
                    .await
            }
            _ => unreachable!("one image, and perhaps one file for its data"),
        };
        drop(jobs);
        for port in ports {
            port.detach(&mut graph.permit()).await;
        }
        result.map(|()| path.clone()).map_err(|error| error.full())
    })
}

fn kinds() -> Vec<CreateOptions> {
    let plain = CreateOptions::of(5 << 20);
    let small = CreateOptions { cluster_size: 512, refcount_bits: 64, ..plain.clone() };
    let bit = CreateOptions { cluster_size: 4096, refcount_bits: 1, ..plain.clone() };
    let old = CreateOptions { version: 2, cluster_size: 4096, ..plain.clone() };
    let subclusters = CreateOptions { extended_l2: true, cluster_size: 16384, zstd: true, ..plain.clone() };
    let external = CreateOptions { data_file: Some("data.raw".into()), data_file_raw: true, ..plain.clone() };
    let other = CreateOptions { data_file: Some("data".into()), ..plain.clone() };
    let empty = CreateOptions { size: 0, ..plain.clone() };
    let lazy = CreateOptions { lazy_refcounts: true, cluster_size: 2 << 20, ..plain.clone() };
    let all = [plain, small, bit, old, subclusters, external, other, empty, lazy];
    let ways = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    all.into_iter().flat_map(|one| ways.map(|preallocation| CreateOptions { preallocation, ..one.clone() })).collect()
}

#[test]
fn what_is_made_is_in_order_and_empty() {
    for options in kinds() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = made(dir.path(), &options).unwrap_or_else(|error| panic!("{options:?}: {error}"));
        check(&path);
        let bytes = contents(&path);
        assert_eq!(bytes.len() as u64, options.size, "{options:?}");
        // What a raw data file has is the disk's.
        let kept = if options.data_file_raw { 5000 } else { 0 };
        assert!(bytes[..kept].iter().all(|byte| *byte == 0xee), "{options:?}");
        assert!(bytes[kept..].iter().all(|byte| *byte == 0), "{options:?}");
        let said = run("qemu-img", &["info", "-f", "qcow2", "--output=json", &path]);
        let said: Value = serde_json::from_str(&said).unwrap();
        let data = &said["format-specific"]["data"];
        assert_eq!(data["compat"], if options.version == 2 { "0.10" } else { "1.1" });
        assert_eq!(data["refcount-bits"], options.refcount_bits);
        assert_eq!(said["cluster-size"], options.cluster_size);
        if options.version == 3 {
            assert_eq!(data["compression-type"], if options.zstd { "zstd" } else { "zlib" });
            assert_eq!(data["extended-l2"], options.extended_l2);
            assert_eq!(data["lazy-refcounts"], options.lazy_refcounts);
        }
        let mapped = run("qemu-img", &["map", "-f", "qcow2", "--output=json", &path]);
        let is_sparse = options.preallocation == Preallocation::Off && !options.data_file_raw;
        let all = is_sparse || options.size == 0;
        assert_eq!(mapped.contains("\"offset\""), !all, "{options:?}: {mapped}");
    }
}

#[test]
fn names_are_where_qemu_looks_for_them() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let base = crate::bench::image(dir.path(), "base.raw", 1 << 20, 7);
    let (backing_file, backing_format) = (Some(base), Some("raw".to_owned()));
    let options = CreateOptions { backing_file, backing_format, ..CreateOptions::of(2 << 20) };
    let path = made(dir.path(), &options).unwrap();
    let bytes = contents(&path);
    assert!(bytes[..1 << 20].iter().all(|byte| *byte == 7) && bytes[1 << 20..].iter().all(|byte| *byte == 0));
    let external = CreateOptions { data_file: Some("data.raw".into()), ..CreateOptions::of(1 << 20) };
    let path = made(dir.path(), &external).unwrap();
    let said = run("qemu-img", &["info", "-f", "qcow2", "--output=json", &path]);
    assert!(said.contains("data.raw"), "{said}");
}

#[test]
fn what_contradicts_itself_is_refused() {
    let plain = CreateOptions::of(1 << 20);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for bad in [
        CreateOptions { cluster_size: 1000, ..plain.clone() },
        CreateOptions { cluster_size: 256, ..plain.clone() },
        CreateOptions { size: 1000, ..plain.clone() },
        CreateOptions { size: 1 << 63, ..plain.clone() },
        CreateOptions { size: 1 << 50, cluster_size: 512, ..plain.clone() },
        CreateOptions { refcount_bits: 3, ..plain.clone() },
        CreateOptions { version: 4, ..plain.clone() },
        CreateOptions { version: 2, zstd: true, ..plain.clone() },
        CreateOptions { extended_l2: true, cluster_size: 4096, ..plain.clone() },
        CreateOptions { data_file_raw: true, ..plain.clone() },
        CreateOptions { backing_file: Some("x".repeat(1024)), ..plain.clone() },
        CreateOptions { backing_format: Some("raw".into()), ..plain.clone() },
        CreateOptions { backing_file: Some("x".into()), preallocation: Preallocation::Full, ..plain },
    ] {
        made(dir.path(), &bad).unwrap_err();
    }
}
