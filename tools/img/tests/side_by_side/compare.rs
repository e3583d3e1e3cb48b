//! `compare`.

use super::info::CHAIN;
use super::scene::Scene;

#[test]
fn contents_are_compared() {
    let mut setup = CHAIN.to_vec();
    setup.extend([
        "convert -O raw a.qcow2 a.raw",
        "create -q -f raw big.raw 6M",
        "create -q -f raw small.raw 4M",
        "create -q -f raw tail.raw 6M",
        "qemu-io -f raw -c 'write -P 9 5M 1k' tail.raw",
        "convert -O qcow2 c.qcow2 flat.qcow2",
        "create -q -f qcow2 empty.qcow2 1M",
        "create -q -f qcow2 zeroed.qcow2 1M",
        "qemu-io -c 'write -z 0 64k' zeroed.qcow2",
    ]);
    Scene::new(&setup).same_reads(&[
        "compare a.qcow2 b.qcow2",
        "compare a.qcow2 a.raw",
        "compare a.raw a.qcow2",
        "compare c.qcow2 flat.qcow2",
        "compare -s a.qcow2 r.raw",
        "compare a.qcow2 r.raw",
        "compare r.raw a.qcow2",
        "compare big.raw small.raw",
        "compare small.raw big.raw",
        "compare -s big.raw small.raw",
        "compare -q big.raw small.raw",
        "compare tail.raw small.raw",
        "compare small.raw tail.raw",
        "compare tail.raw big.raw",
        "compare -f raw -F raw big.raw small.raw",
        "compare --image-opts driver=raw,file.filename=big.raw driver=raw,file.filename=small.raw",
        "compare -s a.qcow2 a.raw",
        "compare -s a.qcow2 a.qcow2",
        "compare -s c.qcow2 flat.qcow2",
        "compare -s empty.qcow2 zeroed.qcow2",
        "compare empty.qcow2 zeroed.qcow2",
        "compare -U a.qcow2 a.raw",
        "compare -T none a.qcow2 a.raw",
    ]);
}

#[test]
fn what_fails_has_a_code_of_its_own() {
    Scene::new(CHAIN).same_reads(&[
        "compare a.qcow2 none",
        "compare none a.qcow2",
        "compare -f qcow2 r.raw a.qcow2",
        "compare -F nosuch r.raw a.qcow2",
        "compare -T foo a.qcow2 b.qcow2",
        "compare --image-opts -f raw driver=raw,file.filename=r.raw driver=raw,file.filename=r.raw",
    ]);
}

#[test]
fn progress_is_shown() {
    let why = "steps of progress are our own";
    Scene::new(CHAIN).same_code(why, &["compare -p a.qcow2 a.qcow2"]).same(&["compare -p r.raw a.qcow2"]);
}
