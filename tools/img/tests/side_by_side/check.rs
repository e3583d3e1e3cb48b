//! `check`.

use std::os::unix::fs::FileExt;

use super::info::CHAIN;
use super::scene::Scene;

const IMAGE: &[&str] = &[
    "create -q -f qcow2 a.qcow2 4M",
    "qemu-io -c 'write -P 1 0 64k' -c 'write -P 2 128k 128k' -c 'write -c -P 2 1M 128k' a.qcow2",
];

/// Changes bytes of an image in both folders.
fn put(scene: &Scene, at: u64, bytes: &[u8]) {
    for folder in [scene.theirs(), scene.ours()] {
        let file = std::fs::OpenOptions::new().write(true).open(folder.join("a.qcow2")).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }
}

#[test]
fn what_is_in_order_is_said_to_be() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "check a.qcow2",
        "check --output json a.qcow2",
        "check -q a.qcow2",
        "check -q --output=json a.qcow2",
        "check -r all a.qcow2",
        "check -r leaks b.qcow2",
        "check c.qcow2",
        "check -U a.qcow2",
        "check -U -r all a.qcow2",
        "check -T none a.qcow2",
        "check r.raw",
        "check --output json r.raw",
        "check none",
        "check -f qcow2 r.raw",
        "check --image-opts driver=qcow2,file.filename=a.qcow2",
    ]);
    Scene::new(&["create -q -f qcow2 z.qcow2 0"]).same(&["check z.qcow2"]);
}

#[test]
fn leaks_are_found_and_given_back() {
    let mut scene = Scene::new(IMAGE);
    // The only L2 table's first entry: its cluster is lost.
    put(&scene, 0x40000, &[0; 8]);
    scene.same(&["check a.qcow2", "check --output json a.qcow2", "check -q a.qcow2"]);
    put(&scene, 0x40010, &[0; 8]);
    scene.same(&["check a.qcow2", "check -r leaks a.qcow2", "check a.qcow2", "check --output json a.qcow2"]);
    scene.same_images(&["a.qcow2"]);
}

/// A word of a table says something that cannot be: what is found, and in which order.
#[test]
fn findings_are_told_one_by_one() {
    let harms: &[(&str, u64, &[u8])] = &[
        ("a refcount that is too high", 0x2000a, &[0, 2]),
        ("a flag that is missing", 0x40000, &[0]),
        ("a cluster behind the end", 0x40000, &[0x80, 0, 0, 0x80, 0, 0, 0, 0]),
        ("a cluster of two places", 0x40000, &[0x80, 0, 0, 0, 0, 6, 0, 0]),
        ("reserved bits in an L1 entry", 0x30000, &[0xc0]),
        ("reserved bits in an L2 entry", 0x40000, &[0xa0]),
        ("an L2 table behind the end", 0x30000, &[0x80, 0, 0, 0x80, 0, 0, 0, 0]),
        ("a block behind the end", 0x10008, &[0, 0, 0, 0x80, 0, 0, 0, 0]),
        ("a block between clusters", 0x10008, &[0, 0, 0, 0, 0, 0, 2, 0]),
    ];
    for (harm, at, bytes) in harms {
        let mut scene = Scene::new(IMAGE);
        put(&scene, *at, bytes);
        eprintln!("{harm}");
        scene.same(&["check a.qcow2", "check --output json a.qcow2"]);
    }
}

/// What is put right is told of behind what was found.
#[test]
fn repairs_are_told_one_by_one() {
    let mut scene = Scene::new(IMAGE);
    put(&scene, 0x40000, &[0]);
    scene.same(&["check -r all a.qcow2", "check a.qcow2"]);
    let mut scene = Scene::new(IMAGE);
    put(&scene, 0x40000, &[0x80, 0, 0, 0, 0, 6, 0, 0]);
    let (theirs, ours) = scene.both("check -r all a.qcow2");
    assert!(ours.err.lines().count() == 6 && ours.err == theirs.err, "{}{}", theirs.err, ours.err);
    scene.same(&["check a.qcow2"]).same_images(&["a.qcow2"]);
}

#[test]
fn corruptions_are_found_and_repaired() {
    let mut scene = Scene::new(IMAGE);
    // The refcount of the first data cluster.
    put(&scene, 0x2000a, &[0; 2]);
    scene
        .same(&["check a.qcow2", "check --output json a.qcow2"])
        .codes(
            "a refcount that is too low is put right where it stands; qemu-img gives up",
            1,
            2,
            &["check -r leaks a.qcow2"],
        )
        .same_code("refcounts are put right where they stand", &["check -r all a.qcow2"])
        .same(&["check a.qcow2"])
        .same_images(&["a.qcow2"]);
}

/// What is in use cannot be known then: what looks like a leak may be somebody's data.
#[test]
fn an_image_that_cannot_be_read_is_no_image_with_leaks() {
    let scene = Scene::new(IMAGE);
    let broken = "driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename=a.qcow2,\
                  file.inject-error.0.event=none,file.inject-error.0.sector=512,file.inject-error.0.iotype=read";
    for options in ["", "--output=json ", "-q ", "-r leaks ", "-r all "] {
        let (theirs, ours) = scene.both(&format!("check {options}--image-opts {broken}"));
        assert_eq!((ours.code, &ours.out), (theirs.code, &theirs.out), "{options}{}", ours.err);
        assert!(ours.code == Some(1) && !ours.err.contains("Leaked"), "{options}{}", ours.err);
        assert!(ours.err.contains("ERROR: I/O error") && ours.err.contains("Check failed"), "{options}{}", ours.err);
    }
    let (theirs, ours) = scene.both(&format!("check --image-opts {broken}"));
    assert_eq!(ours.err.lines().last(), theirs.err.lines().last());
}

#[test]
fn marks_of_an_unclean_end_are_seen() {
    let mut scene = Scene::new(IMAGE);
    put(&scene, 76, &[0, 0, 0, 1]);
    scene.same(&["info a.qcow2", "check a.qcow2", "info a.qcow2"]);
    put(&scene, 76, &[0, 0, 0, 2]);
    scene.same(&["check a.qcow2", "info a.qcow2"]);
    scene.same_code("what is said of a corrupt image is ours", &["resize a.qcow2 8M"]);
}
