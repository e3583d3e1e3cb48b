//! An image that keeps its data in another file changes its size: so does the file, and what it had behind the disk's end does
//! not become part of the disk.

use std::sync::Arc;

use block_core::graph::{Graph, Preallocation};
use block_core::rt::run_control;
use serde_json::{Value, json};

use crate::bench::{add, with};
use crate::peer::{KINDS, Kind, check, contents, create, file, node, run};
use crate::writing::in_memory;

const MIB: u64 = 1 << 20;

fn kinds() -> impl Iterator<Item = Kind> {
    KINDS.iter().copied().filter(|kind| kind.external)
}

fn resized(options: Value, size: u64, how: Preallocation) -> Result<(), String> {
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, with(options, &json!({ "node-name": "top" }))).await.unwrap();
        let result = graph.permit().resize(node, size, how).await;
        graph.permit().remove(node).await.unwrap();
        result.map(drop).map_err(|error| error.full())
    })
}

#[test]
fn what_a_data_file_has_behind_the_disk_is_not_seen() {
    for kind in kinds() {
        for how in [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let dir = in_memory();
            let path = create(dir.path(), "top", kind, MIB + 512, None);
            run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1049088", &path]);
            let data = format!("{path}.data");
            let mut bytes = std::fs::read(&data).unwrap();
            bytes.resize(2 * MIB as usize, 0xee);
            std::fs::write(&data, bytes).unwrap();
            resized(node(&path, kind, None), 3 * MIB, how).unwrap();
            check(&path);
            let disk = contents(&path);
            let (old, new) = disk.split_at(MIB as usize + 512);
            assert!(old.iter().all(|byte| *byte == 5), "{kind:?}, {how:?}");
            assert!(new.len() as u64 == 2 * MIB - 512 && new.iter().all(|byte| *byte == 0), "{kind:?}, {how:?}");
            assert_eq!(std::fs::metadata(&data).unwrap().len(), 3 * MIB, "{kind:?}, {how:?}");
            if kind.options.contains("raw") {
                assert!(std::fs::read(&data).unwrap() == disk, "{kind:?}, {how:?}");
            }
            let map = run("qemu-img", &["map", "-f", "qcow2", "--output=json", &path]);
            let has_room = kind.options.contains("raw") || how != Preallocation::Off;
            assert_eq!(map.contains("\"present\": false"), !has_room, "{kind:?}, {how:?}: {map}");
        }
    }
}

#[test]
fn a_data_file_ends_with_a_disk_that_is_cut() {
    for kind in kinds() {
        let dir = in_memory();
        let path = create(dir.path(), "top", kind, 2 * MIB, None);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 2M", &path]);
        resized(node(&path, kind, None), MIB - 512, Preallocation::Off).unwrap();
        check(&path);
        assert!(contents(&path) == vec![5; MIB as usize - 512]);
        assert_eq!(std::fs::metadata(format!("{path}.data")).unwrap().len(), MIB - 512, "{kind:?}");
    }
}

#[test]
fn a_data_file_that_cannot_grow_refuses_a_larger_disk() {
    for kind in kinds() {
        let dir = in_memory();
        let path = create(dir.path(), "top", kind, MIB, None);
        let data = format!("{path}.data");
        std::fs::write(&data, vec![0; MIB as usize]).unwrap();
        let fixed = json!({ "driver": "raw", "size": MIB, "file": file(&data) });
        let options = with(node(&path, kind, None), &json!({ "data-file": fixed }));
        let refused = resized(options.clone(), 2 * MIB, Preallocation::Off).unwrap_err();
        assert!(refused.contains("The data file has 1048576 bytes and cannot grow"), "{refused}");
        assert_eq!(contents(&path).len() as u64, MIB);
        resized(options, MIB / 2, Preallocation::Off).unwrap();
        assert_eq!(contents(&path).len() as u64, MIB / 2);
        check(&path);
    }
}
