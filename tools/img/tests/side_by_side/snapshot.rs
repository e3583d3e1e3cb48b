//! `snapshot`.

use super::info::CHAIN;
use super::scene::Scene;

#[test]
fn snapshots_come_and_go() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "snapshot -l a.qcow2",
        "snapshot -c one a.qcow2",
        "snapshot -c 'another one' a.qcow2",
        "resize a.qcow2 8M",
        "snapshot -a one a.qcow2",
        "snapshot -a 2 a.qcow2",
        "snapshot -d one a.qcow2",
        "snapshot -d 2 a.qcow2",
        "snapshot -c in-b b.qcow2",
    ]);
    let why = "no count of instructions is made up";
    scene.same_code(why, &["snapshot a.qcow2", "snapshot -l -U a.qcow2", "snapshot -l b.qcow2"]);
    scene.same(&["snapshot -d 'another one' a.qcow2", "snapshot -l a.qcow2"]);
    scene.same_images(&["a.qcow2", "b.qcow2"]);
}

#[test]
fn what_is_not_there_is_said() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "snapshot -a none a.qcow2",
        "snapshot -d none a.qcow2",
        "snapshot -l none",
        "snapshot -l r.raw",
        "snapshot -f raw -c x r.raw",
        "snapshot -f raw -a x r.raw",
        "snapshot -f raw -d x r.raw",
        "snapshot -c x -U a.qcow2",
    ]);
    scene.same(&["snapshot -c x a.qcow2"]);
    scene.codes("two snapshots of one name are not made", 0, 1, &["snapshot -c x a.qcow2"]);
}
