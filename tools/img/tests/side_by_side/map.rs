//! `map`.

use super::info::CHAIN;
use super::scene::Scene;

#[test]
fn bytes_are_found_in_their_layers() {
    Scene::new(CHAIN).same_reads(&[
        "map a.qcow2",
        "map --output json a.qcow2",
        "map b.qcow2",
        "map --output json b.qcow2",
        "map c.qcow2",
        "map --output json c.qcow2",
        "map r.raw",
        "map --output json r.raw",
        "map -f raw a.qcow2",
        "map -U b.qcow2 --output=json",
        "map none",
    ]);
}

#[test]
fn a_part_can_be_asked_for() {
    Scene::new(CHAIN).same_reads(&[
        "map --output json --start-offset 100 --max-length 100000 b.qcow2",
        "map --start-offset 100 --max-length 100000 b.qcow2",
        "map --start-offset 5M b.qcow2",
        "map --output json --start-offset 5M b.qcow2",
        "map --output json --start-offset 4M b.qcow2",
        "map --output json --start-offset 4194303 b.qcow2",
        "map --max-length 0 a.qcow2",
        "map --output json --max-length 0 a.qcow2",
        "map --output json --max-length 1 a.qcow2",
        "map --start-offset -1 a.qcow2",
        "map --start-offset x a.qcow2",
        "map --max-length=-5 a.qcow2",
        "map --max-length x a.qcow2",
        "map --start-offset 9223372036854775807 a.qcow2",
        "map --start-offset 9223372036854775808 a.qcow2",
        "map --max-length 9223372036854775807 a.qcow2",
        "map --max-length 9223372036854775808 a.qcow2",
    ]);
}

#[test]
fn a_short_layer_says_zeroes_behind_its_end() {
    Scene::new(&[
        "create -q -f raw short.raw 1M",
        "qemu-io -f raw -c 'write -P 1 0 64k' short.raw",
        "create -q -f qcow2 -b short.raw -F raw long.qcow2 4M",
        "qemu-io -c 'write -P 2 3M 64k' long.qcow2",
    ])
    .same_reads(&["map --output json long.qcow2", "map long.qcow2"]);
}
