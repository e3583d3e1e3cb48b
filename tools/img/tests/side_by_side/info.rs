//! `info`.

use super::scene::Scene;

/// A chain in a folder below, an image with snapshots and bitmaps, one with a data file, and raw ones.
pub(crate) const CHAIN: &[&str] = &[
    "create -q -f qcow2 a.qcow2 4M",
    "qemu-io -c 'write -P 1 0 64k' -c 'write -P 2 128k 128k' -c 'write -z 1M 64k' a.qcow2",
    "create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2",
    "qemu-io -c 'write -P 3 64k 64k' -c 'write -c -P 3 3M 64k' b.qcow2",
    "create -q -f qcow2 -b b.qcow2 -F qcow2 c.qcow2",
    "qemu-io -c 'write -P 4 64k 4k' -c 'write -P 4 2M 64k' c.qcow2",
    "create -q -f raw r.raw 1M",
    "qemu-io -f raw -c 'write -P 1 64k 4k' r.raw",
];

#[test]
fn images_are_described() {
    Scene::new(CHAIN).same_reads(&[
        "info a.qcow2",
        "info --output json a.qcow2",
        "info --output=json -f qcow2 b.qcow2",
        "info b.qcow2",
        "info --backing-chain c.qcow2",
        "info -b --output json c.qcow2",
        "info r.raw",
        "info --output json r.raw",
        "info -f raw a.qcow2",
        "info -U a.qcow2",
        "info --image-opts driver=qcow2,file.filename=a.qcow2",
        "info 'json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"a.qcow2\"}}'",
        "info file:a.qcow2",
    ]);
}

#[test]
fn what_an_image_has_is_listed() {
    let mut setup = CHAIN.to_vec();
    setup.extend([
        "snapshot -c one a.qcow2",
        "snapshot -c 'another one' a.qcow2",
        "bitmap --add a.qcow2 b0",
        "bitmap --add --disable -g 32k a.qcow2 b1",
        "create -q -f qcow2 -o data_file=x.data,data_file_raw=on d.qcow2 1M",
        "create -q -f qcow2 -o compat=0.10 old.qcow2 1M",
        "create -q -f qcow2 -o extended_l2=on,lazy_refcounts=on,refcount_bits=1,compression_type=zstd e.qcow2 1M",
        "create -q -f qcow2 -u -b gone -F raw f.qcow2 1M",
    ]);
    Scene::new(&setup).same_reads(&[
        "info a.qcow2",
        "info --output json a.qcow2",
        "info d.qcow2",
        "info --output json d.qcow2",
        "info old.qcow2",
        "info e.qcow2",
        "info f.qcow2",
        "info --output json f.qcow2",
        "info --backing-chain f.qcow2",
    ]);
}

#[test]
fn a_name_that_is_not_beside_us_is_shown_in_full() {
    let scene = Scene::new(CHAIN);
    for folder in [scene.theirs(), scene.ours()] {
        std::fs::create_dir(folder.join("d")).unwrap();
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-b", "../a.qcow2", "-F", "qcow2", "b.qcow2"])
            .current_dir(folder.join("d"))
            .status();
        assert!(made.unwrap().success());
    }
    let mut scene = scene;
    scene.same(&["info d/b.qcow2", "info --output json d/b.qcow2", "info --backing-chain d/b.qcow2"]);
}

#[test]
fn what_cannot_be_opened_is_said() {
    Scene::new(CHAIN).same_reads(&[
        "info none",
        "info -f raw none",
        "info -f nosuch a.qcow2",
        "info -f qcow2 r.raw",
        "info --image-opts driver=qcow2,file.filename=none",
        "info --image-opts driver=nosuch,file.filename=a.qcow2",
        "info -- -f",
    ]);
    Scene::new(CHAIN).same_code("the kernel's answer is passed on", &["info ."]);
}
