//! `amend`, `bitmap`, `commit` and `rebase`.

use super::info::CHAIN;
use super::locked::Writer;
use super::scene::Scene;

#[test]
fn bitmaps_come_and_go() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "bitmap --add a.qcow2 b0",
        "bitmap --add --disable -g 32k a.qcow2 b1",
        "bitmap --clear a.qcow2 b0",
        "bitmap --enable a.qcow2 b1",
        "bitmap --merge b0 a.qcow2 b1",
        "bitmap --add --merge b0 -b a.qcow2 -F qcow2 b.qcow2 b9",
        "bitmap --add -g 0 a.qcow2 b2",
        "bitmap --remove a.qcow2 b2",
        "bitmap --add --remove a.qcow2 b2",
        "info --image-opts driver=qcow2,file.filename=b.qcow2",
    ]);
    scene.same_images(&["a.qcow2", "b.qcow2"]);
    // What qemu-img finds in either is the same.
    scene.same_bitmaps(&["a.qcow2", "b.qcow2"]);
}

#[test]
fn what_cannot_be_done_to_a_bitmap_is_said() {
    let mut setup = CHAIN.to_vec();
    setup.push("bitmap --add a.qcow2 b0");
    let mut scene = Scene::new(&setup);
    scene.same(&[
        "bitmap --add a.qcow2 b0",
        "bitmap --remove a.qcow2 nope",
        "bitmap --clear a.qcow2 nope",
        "bitmap --merge nope a.qcow2 b0",
        "bitmap --merge b0 -b a.qcow2 -F qcow2 b.qcow2 b9",
        "bitmap a.qcow2 b0",
        "bitmap --add a.qcow2",
        "bitmap --add -g 5 a.qcow2 bb",
        "bitmap --add -g 256 a.qcow2 bb",
        "bitmap --add -g foo a.qcow2 bb",
        "bitmap --add -g -1 a.qcow2 bb",
        "bitmap --add -g 4G a.qcow2 bb",
        "bitmap --add -g 9223372036854775808 a.qcow2 bb",
        "bitmap --add -g 2G a.qcow2 bb",
        "bitmap --remove -g 4k a.qcow2 b0",
        "bitmap --remove -b a.qcow2 a.qcow2 b0",
        "bitmap --remove -F qcow2 a.qcow2 b0",
        "bitmap --add none b0",
        "bitmap --merge b0 -b none a.qcow2 b0",
    ]);
    scene.same_code("nodes' own names are others", &["bitmap -f raw --add r.raw bb", "bitmap --add r.raw bb"]);
}

#[test]
fn images_are_amended() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "amend -f qcow2 -o refcount_bits=32 a.qcow2",
        "amend -f qcow2 -o lazy_refcounts=on a.qcow2",
        "amend -o size=8M a.qcow2",
        "amend -o compat=1.1 b.qcow2",
        "amend -o backing_file=a.qcow2,backing_fmt=qcow2 b.qcow2",
        "amend -o refcount_bits=16,lazy_refcounts=off a.qcow2",
        "amend -t unsafe -o compat=v3 c.qcow2",
        "info a.qcow2",
    ]);
    scene.same_images(&["a.qcow2", "b.qcow2", "c.qcow2"]);
    let mut scene = Scene::new(&["create -q -f qcow2 o.qcow2 1M", "qemu-io -c 'write -P 1 0 64k' o.qcow2"]);
    scene.same(&["amend -o compat=0.10 o.qcow2"]).same_images(&["o.qcow2"]);
    scene.same(&[
        "amend -o lazy_refcounts=on o.qcow2",
        "amend -o refcount_bits=8 o.qcow2",
        "amend -o compat=1.1,refcount_bits=8 o.qcow2",
    ]);
    scene.same_images(&["o.qcow2"]);
}

#[test]
fn what_cannot_be_amended_is_said() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "amend -o cluster_size=4k a.qcow2",
        "amend -o nosuch=1 a.qcow2",
        "amend a.qcow2",
        "amend -o help",
        "amend -f raw -o size=1M r.raw",
        "amend -o backing_file=r.raw,backing_fmt=raw b.qcow2",
        "amend -o data_file=x a.qcow2",
        "amend -o lazy_refcounts=maybe a.qcow2",
        "amend -o compat=7 a.qcow2",
        "amend -o size=x a.qcow2",
        "amend -o size=-1 a.qcow2",
        "amend -o size=100 a.qcow2",
        "amend -o refcount_bits=0 a.qcow2",
        "amend -o refcount_bits=3 a.qcow2",
        "amend -o refcount_bits=128 a.qcow2",
        "amend",
        "amend -f raw -o help",
        "amend -o compat=1.1 none",
        "amend -t foo -o compat=1.1 a.qcow2",
    ]);
    scene.same_code("help texts are our own", &["amend -f qcow2 -o help", "amend -o help a.qcow2"]);
    scene.same_images(&["a.qcow2", "b.qcow2"]);
}

/// The chain, and another base with something else in it.
fn two_bases() -> Vec<&'static str> {
    let mut setup = CHAIN.to_vec();
    setup.extend([
        "convert -O qcow2 a.qcow2 a2.qcow2",
        "qemu-io -c 'write -P 9 512k 128k' -c 'write -z 0 64k' a2.qcow2",
    ]);
    setup
}

#[test]
fn images_stand_on_others_and_stay_what_they_are() {
    for line in [
        "rebase -b a2.qcow2 -F qcow2 b.qcow2",
        "rebase -b a.qcow2 -F qcow2 c.qcow2",
        "rebase -b '' c.qcow2",
        "rebase -c -b '' c.qcow2",
        "rebase -b r.raw -F raw b.qcow2",
        "rebase -t none -T none -b a2.qcow2 -F qcow2 c.qcow2",
        "rebase -f qcow2 -b a2.qcow2 -F qcow2 c.qcow2",
    ] {
        let mut scene = Scene::new(&two_bases());
        let before = scene.contents("c.qcow2");
        scene.same(&[line]);
        let image = if line.contains("b.qcow2") { "b.qcow2" } else { "c.qcow2" };
        scene.same_images(&[image, "c.qcow2"]).same_sum_of_maps(&[image]);
        if image == "c.qcow2" {
            assert!(scene.contents("c.qcow2") == before, "{line}: the disk is another one");
        }
    }
}

#[test]
fn only_the_name_changes_where_that_is_said() {
    let mut scene = Scene::new(&two_bases());
    scene.same(&[
        "rebase -u -b none -F qcow2 c.qcow2",
        "info c.qcow2",
        "rebase -u -b '' c.qcow2",
        "info c.qcow2",
        "rebase -u -b b.qcow2 -F qcow2 c.qcow2",
        "rebase -u c.qcow2",
        "info c.qcow2",
        "rebase -b a.qcow2 c.qcow2",
        "rebase -u -b a.qcow2 c.qcow2",
        "rebase -b none -F qcow2 b.qcow2",
        "rebase -b a.qcow2 -F nope c.qcow2",
        "rebase c.qcow2",
        "rebase",
        "rebase -b c.qcow2 -F qcow2 c.qcow2",
        "rebase -f raw -b a.qcow2 -F qcow2 r.raw",
        "rebase -u -f raw -b a.qcow2 -F qcow2 r.raw",
        "rebase -T foo -b a.qcow2 -F qcow2 c.qcow2",
        "rebase -t foo -b a.qcow2 -F qcow2 c.qcow2",
        "rebase -b a.qcow2 -F qcow2 none",
    ]);
    scene.same_images(&["b.qcow2", "c.qcow2"]);
}

#[test]
fn layers_are_committed() {
    for (line, images) in [
        ("commit c.qcow2", &["b.qcow2", "c.qcow2"][..]),
        ("commit -d c.qcow2", &["b.qcow2", "c.qcow2"]),
        ("commit -b a.qcow2 c.qcow2", &["a.qcow2", "b.qcow2", "c.qcow2"]),
        ("commit -b b.qcow2 c.qcow2", &["b.qcow2", "c.qcow2"]),
        ("commit -q b.qcow2", &["a.qcow2", "b.qcow2", "c.qcow2"]),
        ("commit -r 0 c.qcow2", &["b.qcow2", "c.qcow2"]),
        ("commit -r 9223372036854775807 c.qcow2", &["b.qcow2", "c.qcow2"]),
        ("commit -t unsafe -r 100M c.qcow2", &["b.qcow2", "c.qcow2"]),
    ] {
        let mut scene = Scene::new(CHAIN);
        scene.same(&[line]).same_images(images);
        scene.same_sum_of_maps(images);
    }
    // A base that is shorter grows.
    let mut scene = Scene::new(&[
        "create -q -f raw short.raw 1M",
        "create -q -f qcow2 -b short.raw -F raw long.qcow2 4M",
        "qemu-io -c 'write -P 2 3M 64k' long.qcow2",
    ]);
    scene.same(&["commit long.qcow2"]).same_images(&["short.raw", "long.qcow2"]);
}

#[test]
fn what_cannot_be_committed_is_said() {
    Scene::new(CHAIN).same(&[
        "commit -b none c.qcow2",
        "commit a.qcow2",
        "commit",
        "commit -r foo c.qcow2",
        "commit -r -1 c.qcow2",
        "commit -r 9223372036854775808 c.qcow2",
        "commit none",
        "commit -t foo c.qcow2",
    ]);
}

/// `-U` is for looking at images: what is written is locked all the same.
#[test]
fn a_rebase_may_be_told_to_share() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "rebase -U -u -b a.qcow2 -F qcow2 c.qcow2",
        "rebase -U -b '' b.qcow2",
        "info b.qcow2",
        "info c.qcow2",
    ]);
    scene.same_images(&["b.qcow2"]);
    let _writers = [Writer::of(&scene, true, "b.qcow2"), Writer::of(&scene, false, "b.qcow2")];
    scene.same(&["rebase -U -u -b a.qcow2 -F qcow2 b.qcow2"]);
}

/// The new base stands on the image itself: whoever opens it below finds it locked, or the way comes back to itself.
#[test]
fn an_image_cannot_stand_on_its_own_child() {
    let mut scene = Scene::new(CHAIN);
    scene.same_code("it is not said how far down", &["rebase -b b.qcow2 -F qcow2 a.qcow2"]);
    assert!(scene.ours_says("rebase -b b.qcow2 -F qcow2 a.qcow2").err.contains("Failed to get shared \"write\" lock"));
    scene.same_images(&["a.qcow2", "b.qcow2"]);
}

#[test]
fn who_is_quiet_shows_no_progress() {
    Scene::new(CHAIN).same(&[
        "rebase -q -p -b '' c.qcow2",
        "commit -q -p b.qcow2",
        "amend -q -p -o lazy_refcounts=on a.qcow2",
        "compare -q -p a.qcow2 a.qcow2",
        "convert -q -p -O raw a.qcow2 x.raw",
    ]);
}
