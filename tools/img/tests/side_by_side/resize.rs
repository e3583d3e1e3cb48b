//! `resize`.

use super::info::CHAIN;
use super::scene::Scene;

#[test]
fn images_get_other_sizes() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "resize a.qcow2 8M",
        "resize a.qcow2 +1M",
        "resize -q a.qcow2 +0",
        "resize a.qcow2 9M",
        "resize --shrink a.qcow2 -3M",
        "resize a.qcow2 5M --shrink",
        "resize -f raw r.raw +1M",
        "resize -f raw --shrink r.raw 64k",
        "resize --preallocation=full a.qcow2 +1M",
        "resize --preallocation falloc a.qcow2 +1M",
        "resize --preallocation=metadata a.qcow2 +1M",
        "resize -f raw --preallocation=full r.raw +1M",
        "resize b.qcow2 6M",
        "resize --image-opts driver=qcow2,file.filename=b.qcow2 7M",
    ]);
    scene.same_images(&["a.qcow2", "b.qcow2", "r.raw"]);
}

#[test]
fn what_is_no_size_changes_nothing() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "resize a.qcow2 -512k",
        "resize a.qcow2 -- -512k",
        "resize a.qcow2 1M",
        "resize a.qcow2 foo",
        "resize a.qcow2 ''",
        "resize a.qcow2 +",
        "resize a.qcow2 0",
        "resize --shrink a.qcow2 0",
        "resize --shrink a.qcow2 -100G",
        "resize a.qcow2 +100",
        "resize a.qcow2 8E",
        "resize a.qcow2 16E",
        "resize a.qcow2 +9223372036854775807",
        "resize --preallocation=foo a.qcow2 +1M",
        "resize --preallocation=full --shrink a.qcow2 1M",
        "resize -f raw --preallocation=metadata r.raw 8M",
        "resize none 1M",
        "resize -f nosuch a.qcow2 8M",
    ]);
    scene.same_code("why an image is too large is said in our words", &["resize a.qcow2 7E"]);
    scene.same(&["info a.qcow2"]).same_images(&["a.qcow2", "r.raw"]);
}

#[test]
fn a_guessed_format_is_warned_of() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&["resize r.raw +1M", "resize -q r.raw +1M"]).same_images(&["r.raw"]);
}
