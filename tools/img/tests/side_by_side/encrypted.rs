//! Encrypted qcow2 images.

use super::scene::Scene;

/// An encrypted image with data, an empty one, and the same data in the open.
const IMAGES: &[&str] = &[
    "create -q -f raw a.raw 1M",
    "qemu-io -f raw -c 'write -P 1 0 128k' -c 'write -P 2 512k 64k' -c 'write -P 3 1023k 512' a.raw",
    "convert @s -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 a.raw a.qcow2",
    "create -q @s -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 e.qcow2 1M",
];

const OLD: &[&str] = &[
    "create -q -f raw a.raw 1M",
    "qemu-io -f raw -c 'write -P 1 0 128k' -c 'write -P 3 1023k 512' a.raw",
    "convert @s -O qcow2 -o encryption=on,encrypt.key-secret=s a.raw old.qcow2",
];

#[test]
fn what_an_image_says_of_its_keys_needs_none() {
    let mut setup = IMAGES.to_vec();
    setup.extend([
        "snapshot @s -c one --image-opts crypt:a.qcow2",
        "bitmap @s --add --image-opts crypt:a.qcow2 b0",
        "create -q @s -f qcow2 -b a.qcow2 -F qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 o.qcow2",
        "create -q -f qcow2 -b o.qcow2 -F qcow2 p.qcow2",
        "create -q @s -f luks -o key-secret=s,iter-time=10,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha1 a.luks 1M",
    ]);
    let mut scene = Scene::new(&setup);
    scene.same_reads(&[
        "info a.qcow2",
        "info --output json a.qcow2",
        "info -f qcow2 e.qcow2",
        "info @s --image-opts crypt:a.qcow2",
        "info @s --output json --image-opts crypt:a.qcow2",
        "info @wrong --image-opts crypt:a.qcow2",
        "info --image-opts driver=qcow2,file.filename=a.qcow2",
        "info --image-opts driver=qcow2,encrypt.format=luks,file.filename=a.qcow2",
        "info --backing-chain p.qcow2",
        "info --backing-chain --output json o.qcow2",
        "info a.luks",
        "info --output json a.luks",
        "info -f luks a.luks",
        "info -U a.luks",
        "info @s --image-opts luks:a.luks",
        "info @wrong --output json --image-opts luks:a.luks",
        "info --image-opts driver=luks,file.filename=a.luks",
        "info -f raw a.luks",
        "info -f luks a.raw",
    ]);
    scene.same(&["create -f qcow2 -b p.qcow2 -F qcow2 1.qcow2", "create -f qcow2 -b a.luks -F luks 2.qcow2"]);
    let mut scene = Scene::new(OLD);
    scene.same_reads(&["info old.qcow2", "info --output json old.qcow2", "info @s --image-opts crypt:old.qcow2"]);
}

/// Whatever needs the disk needs a key.
#[test]
fn nothing_else_is_done_without_a_key() {
    Scene::new(IMAGES).same(&[
        "check a.qcow2",
        "check @wrong --image-opts crypt:a.qcow2",
        "map a.qcow2",
        "snapshot -l a.qcow2",
        "snapshot -c x a.qcow2",
        "resize a.qcow2 2M",
        "bitmap --add a.qcow2 b",
        "rebase -u -b '' a.qcow2",
        "amend -o compat=1.1 a.qcow2",
        "measure -O qcow2 a.qcow2",
        "convert -O raw a.qcow2 x.raw",
        "compare a.qcow2 a.raw",
        "dd if=a.qcow2 of=x.raw",
        "bench -c 1 a.qcow2",
        "commit a.qcow2",
        "map @s --image-opts driver=qcow2,encrypt.format=aes,encrypt.key-secret=s,file.filename=a.qcow2",
        "map @s --image-opts driver=qcow2,encrypt.format=luks,file.filename=a.qcow2",
        "map --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=a.qcow2",
    ]);
}

#[test]
fn images_are_made() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "create @s -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 1.qcow2 4M",
        "create @s -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,encrypt.hash-alg=sha1 2.qcow2 4M",
        "create @s -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,compat=0.10 3.qcow2 4M",
        "create @s -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,cluster_size=512 4.qcow2 4M",
        "create @s -f qcow2 -b a.raw -F raw -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 5.qcow2",
        "create -f qcow2 -o encryption=off 6.qcow2 1M",
        "create -f qcow2 -o encrypt.format=luks x.qcow2 4M",
        "create -f qcow2 -o encrypt.key-secret=s x.qcow2 4M",
        "create -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s x.qcow2 4M",
        "create @s -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=x x.qcow2 4M",
        "create @s -f qcow2 -o encryption=on,encrypt.format=luks,encrypt.key-secret=s x.qcow2 4M",
        "convert @s -c -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s a.raw x.qcow2",
    ]);
    scene.same_disks("crypt", &["1.qcow2", "2.qcow2", "3.qcow2", "4.qcow2", "5.qcow2"]).same_images(&["6.qcow2"]);
    scene.same_code(
        "values are refused by their full names",
        &[
            "create -f qcow2 -o encrypt.format=nope x.qcow2 4M",
            "create @s -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=nope x.qcow2 4M",
        ],
    );
    scene.same_code("the old encryption is not made any more", &["create -f qcow2 -o encryption=on x.qcow2 4M"]);
    scene.codes(
        "the old encryption is not made any more",
        0,
        1,
        &[
            "create @s -f qcow2 -o encryption=on,encrypt.key-secret=s x.qcow2 4M",
            "create @s -f qcow2 -o encrypt.format=aes,encrypt.key-secret=s x.qcow2 4M",
            "measure @s -O qcow2 --size 1G -o encrypt.format=aes,encrypt.key-secret=s",
        ],
    );
    let keys = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    scene.same(&[
        &format!("create @s -f qcow2 -o {keys},preallocation=metadata 7.qcow2 1M"),
        &format!("create @s -f qcow2 -o {keys},preallocation=full 8.qcow2 1M"),
        &format!("create @s -f qcow2 -o {keys},data_file=d 9.qcow2 1M"),
        "convert @s -n --target-image-opts a.raw crypt:7.qcow2",
        "convert @s -n --target-image-opts a.raw crypt:8.qcow2",
        "convert @s -n --target-image-opts a.raw crypt:9.qcow2",
        "compare @s --image-opts crypt:9.qcow2 driver=raw,file.filename=a.raw",
        // What is found in a raw data file is no zeroes once it is decrypted.
        &format!("convert @s -O qcow2 -o {keys},data_file=e,data_file_raw=on a.raw 10.qcow2"),
        "compare @s --image-opts crypt:10.qcow2 driver=raw,file.filename=a.raw",
    ]);
    scene.same_disks("crypt", &["7.qcow2", "8.qcow2"]);
}

#[test]
fn disks_are_copied_compared_and_measured() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "convert @s -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 a.raw 1.qcow2",
        "convert @s --image-opts crypt:a.qcow2 2.raw",
        "convert @s --image-opts -O qcow2 -c crypt:a.qcow2 3.qcow2",
        "convert @s -n --target-image-opts a.raw crypt:e.qcow2",
        "convert @s -O qcow2 -B a.raw -F raw -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 a.raw 4.qcow2",
        "compare @s --image-opts crypt:1.qcow2 driver=raw,file.filename=a.raw",
        "compare @s --image-opts crypt:e.qcow2 crypt:a.qcow2",
        "map @s --image-opts crypt:e.qcow2",
        "map @s --image-opts crypt:a.qcow2",
        "map @s --output json --image-opts crypt:a.qcow2",
        "check @s --image-opts crypt:1.qcow2",
        "dd @s --image-opts bs=64k count=5 skip=1 if=crypt:a.qcow2 of=6.raw",
        "resize @s --image-opts crypt:a.qcow2 2M",
        "resize @s --shrink --image-opts crypt:a.qcow2 1M",
        "snapshot @s -c one --image-opts crypt:a.qcow2",
        "convert @s -n --target-image-opts 6.raw crypt:a.qcow2",
        "snapshot @s -a one --image-opts crypt:a.qcow2",
        "bitmap @s --add --image-opts crypt:a.qcow2 b0",
        "measure --size 1G -O qcow2 -o encrypt.format=luks",
        "measure @s --size 1G -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        "measure @s --size 1G -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-alg=aes-128",
        "measure @s --size 1G -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,cluster_size=512",
        "measure @s -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 a.raw",
        "measure @s -O qcow2 --image-opts crypt:e.qcow2",
    ]);
    let why = "what the driver cannot is said before anything is written";
    scene.same_code(why, &["convert @s -c -n --target-image-opts a.raw crypt:e.qcow2"]);
    scene
        .same_disks("crypt", &["1.qcow2", "e.qcow2", "4.qcow2", "a.qcow2"])
        .same_images(&["2.raw", "3.qcow2", "6.raw"]);
}

#[test]
fn layers_may_be_encrypted() {
    let mut setup = IMAGES.to_vec();
    setup.extend([
        "create -q @s -f qcow2 -b a.qcow2 -F qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 o.qcow2",
        "create -q -f qcow2 -b a.qcow2 -F qcow2 p.qcow2",
    ]);
    let chain = |name: &str| {
        format!("driver=qcow2,{name},backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename=a.qcow2")
    };
    let (o, p) = (chain("encrypt.key-secret=s,file.filename=o.qcow2"), chain("file.filename=p.qcow2"));
    let mut scene = Scene::new(&setup);
    scene.same(&[
        "compare o.qcow2 a.raw",
        "compare p.qcow2 a.raw",
        "map @s --image-opts crypt:o.qcow2",
        &format!("compare @s --image-opts {o} driver=raw,file.filename=a.raw"),
        &format!("convert @s -n --target-image-opts e.qcow2 {p}"),
        &format!("rebase @s -b '' --image-opts {o}"),
        "compare @s --image-opts crypt:o.qcow2 driver=raw,file.filename=a.raw",
        &format!("dd @s --image-opts if={p} of=x.raw bs=64k"),
        &format!("commit @s --image-opts {p}"),
        "rebase @s -u -b a.raw -F raw --image-opts crypt:o.qcow2",
    ]);
    scene.same_disks("crypt", &["o.qcow2", "a.qcow2"]).same_images(&["x.raw"]);
}

#[test]
fn key_slots_are_changed() {
    let mut scene = Scene::new(IMAGES);
    let slots = "info e.qcow2";
    scene.same(&[
        "amend @s @t --image-opts -o encrypt.state=active,encrypt.new-secret=t,encrypt.iter-time=10 crypt:e.qcow2",
        slots,
        "amend @s @t --image-opts -o encrypt.state=active,encrypt.new-secret=t,encrypt.keyslot=5,encrypt.iter-time=10 crypt:e.qcow2",
        slots,
        "amend @s @t --image-opts -o encrypt.state=inactive,encrypt.old-secret=t crypt:e.qcow2",
        slots,
        "amend @s @t --image-opts -o encrypt.state=active,encrypt.new-secret=t,encrypt.keyslot=1,encrypt.iter-time=10,lazy_refcounts=on crypt:e.qcow2",
        "amend @s --image-opts -o compat=1.1,size=2M crypt:e.qcow2",
        slots,
        "amend @s --image-opts -o encrypt.format=luks crypt:e.qcow2",
        "amend @s --image-opts -o encrypt.state=active crypt:e.qcow2",
        "convert --object secret,id=s,data=world --image-opts crypt:e.qcow2 x.raw",
    ]);
    scene.same_code(
        "values are refused by their full names",
        &[
            "amend @s --image-opts -o encrypt.state=nope crypt:e.qcow2",
            "amend @s @t --image-opts -o encrypt.new-secret=t crypt:e.qcow2",
        ],
    );
    scene.same_disks("crypt", &["e.qcow2"]).same_images(&["x.raw"]);
}

/// A slot that is erased is gone: what else is refused of the same line is refused before.
#[test]
fn a_refusal_leaves_the_key_slots_alone() {
    let mut scene = Scene::new(IMAGES);
    let line = |more: &str| {
        format!("amend @s --force --image-opts -o encrypt.state=inactive,encrypt.keyslot=0,{more} crypt:e.qcow2")
    };
    scene.same(&[&line("refcount_bits=3"), "info e.qcow2"]).same_disks("crypt", &["e.qcow2"]);
    // The key is still there for what comes before.
    scene.same_code_at_least(&line("lazy_refcounts=on,size=2M"));
    scene.same(&["info e.qcow2"]);
}

/// Of the old encryption: images are read, and not written.
#[test]
fn old_images_are_read() {
    let mut scene = Scene::new(OLD);
    scene.same(&[
        "convert @s --image-opts crypt:old.qcow2 1.raw",
        "compare @s --image-opts crypt:old.qcow2 driver=raw,file.filename=a.raw",
        "map @s --output json --image-opts crypt:old.qcow2",
        "check @s --image-opts crypt:old.qcow2",
        "convert -O raw old.qcow2 x.raw",
        "map @s --image-opts driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename=old.qcow2",
    ]);
    scene.codes("it is not written any more", 0, 1, &["resize @s --image-opts crypt:old.qcow2 2M"]);
    scene.same_images(&["1.raw"]);
}
