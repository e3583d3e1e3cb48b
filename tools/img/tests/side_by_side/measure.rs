//! `measure`.

use std::process::Command;

use super::info::CHAIN;
use super::scene::Scene;

#[test]
fn files_are_measured_before_they_are_made() {
    let mut setup = CHAIN.to_vec();
    setup.extend(["snapshot -c one a.qcow2", "bitmap --add a.qcow2 b0", "bitmap --add -g 512 a.qcow2 b1"]);
    Scene::new(&setup).same_reads(&[
        "measure --size 1G",
        "measure --size 1G -O qcow2",
        "measure --output json --size 1G -O qcow2",
        "measure -O qcow2 a.qcow2",
        "measure -O raw b.qcow2",
        "measure --output json -O qcow2 b.qcow2",
        "measure -O qcow2 c.qcow2",
        "measure -O qcow2 r.raw",
        "measure -O qcow2 -o cluster_size=4k c.qcow2",
        "measure -O qcow2 -o cluster_size=2M c.qcow2",
        "measure -O qcow2 -o compat=0.10 a.qcow2",
        "measure -O qcow2 -o cluster_size=4k --size 1G",
        "measure -O qcow2 -o preallocation=full --size 1G",
        "measure -O qcow2 -o preallocation=metadata --size 1G",
        "measure -O qcow2 -l one a.qcow2",
        "measure -O qcow2 -l snapshot.name=one a.qcow2",
        "measure --size 0 -O qcow2",
        "measure --size 1 -O qcow2",
        "measure --size 1 -O raw",
        "measure -O qcow2 -o extended_l2=on,cluster_size=64k --size 1T",
        "measure -O qcow2 -o refcount_bits=1 --size 1T",
        "measure -O qcow2 -o refcount_bits=64 --size 1T",
        "measure -O qcow2 -o backing_file=x --size 1T",
        "measure -O qcow2 --size 8191P",
    ]);
}

#[test]
fn holes_of_a_raw_data_file_take_no_room() {
    let mut scene = Scene::new(&[]);
    for side in [scene.theirs(), scene.ours()] {
        // Copied, it would have no block at all, which qemu-img sees.
        let line = "create -q -f qcow2 -o data_file=a.data,data_file_raw=on a.qcow2 1M";
        assert!(Command::new("qemu-img").args(line.split(' ')).current_dir(side).status().unwrap().success());
    }
    scene.same_code("qemu-img counts all of it", &["measure -O qcow2 a.qcow2"]);
    let said = scene.ours_says("measure -O qcow2 a.qcow2").out;
    assert!(scene.ours_says("convert -O qcow2 a.qcow2 b.qcow2").code == Some(0));
    let bytes = std::fs::metadata(scene.ours().join("b.qcow2")).unwrap().len();
    assert!(said.contains("required size: 393216\n") && bytes <= 393_216, "{bytes} bytes, not {said}");
}

#[test]
fn what_cannot_be_measured_is_said() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "measure -O nosuch --size 1G",
        "measure -O qcow2 -l nosuch a.qcow2",
        "measure -O qcow2 -l snapshot.id=7 a.qcow2",
        "measure -f raw -l one r.raw",
        "measure --size -1",
        "measure --size x",
        "measure --size 8E",
        "measure -O file --size 1M",
        "measure -O qcow2 -o nosuch=1 --size 1T",
        "measure -O qcow2 none",
    ]);
    scene.same_code(
        "the inner parameter is said in one message",
        &["measure -O qcow2 -l snapshot.bogus=1 a.qcow2", "measure -l snapshot.bogus=1 --output=x a.qcow2"],
    );
}
