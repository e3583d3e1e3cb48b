//! `dd`.

use super::scene::Scene;

const IMAGES: &[&str] = &[
    "create -q -f raw a.raw 4M",
    "qemu-io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 2M 64k' a.raw",
    "create -q -f raw small.raw 2M",
    "create -q -f qcow2 b.qcow2 4M",
    "qemu-io -c 'write -P 3 64k 128k' b.qcow2",
];

#[test]
fn parts_are_copied() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "dd if=a.raw of=1.raw",
        "dd -f raw -O raw if=a.raw of=2.raw bs=1M count=1",
        "dd -f raw -O raw if=a.raw of=3.raw bs=1M skip=1",
        "dd -f raw -O raw if=a.raw of=4.raw bs=1M skip=9",
        "dd -f raw -O raw if=a.raw of=5.raw count=0",
        "dd -f raw -O qcow2 if=a.raw of=6.qcow2 bs=100 count=7",
        "dd -O raw if=b.qcow2 of=7.raw",
        "dd -f raw -O raw if=a.raw if=small.raw of=8.raw",
        "dd -f raw -O raw if=a.raw of=9.raw bs=1k bs=2k",
        "dd -f raw -O raw if=a.raw of=10.raw bs=1M count=9 skip=2",
        "dd -f raw -O raw if=a.raw of=11.raw bs=1000 count=3 skip=1",
        "dd -U -f raw -O raw if=a.raw of=12.raw bs=3M",
        "dd --image-opts if=driver=raw,file.filename=a.raw of=13.raw",
        "dd -f raw -O raw if=a.raw of=14.raw bs=1k count=3 skip=4",
    ]);
    scene.same_images(&["1.raw", "2.raw", "3.raw", "4.raw", "5.raw", "6.qcow2", "7.raw", "8.raw", "9.raw", "10.raw"]);
    scene.same_images(&["11.raw", "12.raw", "13.raw", "14.raw"]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "dd",
        "dd if=a.raw",
        "dd of=x.raw",
        "dd -f raw -O raw if=a.raw of=x.raw bs=0",
        "dd -f raw -O raw if=a.raw of=x.raw bs=x",
        "dd -f raw -O raw if=a.raw of=x.raw bs=-1",
        "dd -f raw -O raw if=a.raw of=x.raw bs=3G",
        "dd -f raw -O raw if=a.raw of=x.raw count=x",
        "dd -f raw -O raw if=a.raw of=x.raw count=-1",
        "dd -f raw -O raw if=a.raw of=x.raw skip=x",
        "dd -f raw -O raw if=a.raw of=x.raw seek=1",
        "dd -f raw -O raw if=a.raw of=x.raw conv=notrunc",
        "dd -f raw -O raw if=a.raw of=x.raw bs",
        "dd -f raw -O raw a.raw",
        "dd -f raw -O raw if=nofile of=x.raw",
        "dd -f raw -O bogus if=a.raw of=x.raw",
        "dd -f bogus if=a.raw of=x.raw",
        "dd --image-opts -f raw if=driver=raw,file.filename=a.raw of=x.raw",
        "dd -f raw -O raw if=a.raw of=nodir/x",
        "dd --bogus",
        "dd -n if=a.raw of=x.raw",
    ]);
    scene.codes("the source would be lost", 0, 1, &["dd -f raw -O raw if=a.raw of=a.raw"]);
}
