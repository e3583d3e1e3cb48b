//! Command lines that say nothing sensible.

use super::info::CHAIN;
use super::scene::Scene;

#[test]
fn nonsense_is_refused_in_the_same_words() {
    Scene::new(CHAIN).same(&[
        "",
        "nosuch",
        "--nope",
        "info",
        "info a.qcow2 b.qcow2",
        "info --zzz a.qcow2",
        "info -f",
        "info -Z a.qcow2",
        "info --fo raw a.qcow2",
        "info --form qcow2 a.qcow2",
        "info -fqcow2 a.qcow2",
        "info a.qcow2 -f qcow2",
        "info --image-opts=x a.qcow2",
        "info --format",
        "info --image-opts -f raw a.qcow2",
        "info --output xml a.qcow2",
        "check",
        "check -r foo a.qcow2",
        "check -T foo a.qcow2",
        "map",
        "map --output=xml a.qcow2",
        "compare",
        "compare a.qcow2",
        "compare a.qcow2 b.qcow2 c.qcow2",
        "create",
        "resize",
        "resize a.qcow2",
        "snapshot",
        "snapshot -c x -d y a.qcow2",
        "snapshot -l -c y a.qcow2",
        "measure",
        "measure --size 1G a.qcow2",
        "measure --size 1G -f qcow2",
        "measure a.qcow2 b.qcow2",
    ]);
}

#[test]
fn help_is_in_our_words() {
    Scene::new(&[]).same_code("help texts are our own", &["--help", "-h", "info --help", "create -h", "--version"]);
}
