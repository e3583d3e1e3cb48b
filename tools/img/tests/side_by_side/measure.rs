//! `measure`.

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
fn what_cannot_be_measured_is_said() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "measure -O nosuch --size 1G",
        "measure -O qcow2 -l nosuch a.qcow2",
        "measure --size -1",
        "measure --size x",
        "measure --size 8E",
        "measure -O file --size 1M",
        "measure -O qcow2 -o nosuch=1 --size 1T",
        "measure -O qcow2 none",
    ]);
}
