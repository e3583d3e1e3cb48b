//! `bench`.

use super::scene::Scene;

#[test]
fn requests_are_sent() {
    let mut scene =
        Scene::new(&["create -q -f raw a.raw 4M", "create -q -f qcow2 b.qcow2 4M", "create -q -f raw z.raw 0"]);
    scene.same(&[
        "bench -c 10 -d 2 -f raw a.raw",
        "bench -w -c 10 -f raw a.raw",
        "bench -w --pattern=0x41 -c 10 -f raw a.raw",
        "bench -c 10 -w b.qcow2",
        "bench -c 10 -S 0 -f raw a.raw",
        "bench -c 10 -S 1M -f raw a.raw",
        "bench -c 10 -o 1M -f raw a.raw",
        "bench -c 2 -o 9M -f raw a.raw",
        "bench -c 2 -s 8M -f raw a.raw",
        "bench -c 2 -f raw z.raw",
        "bench -c 10 -w -d 4 --flush-interval=4 -f raw a.raw",
        "bench -c 10 -w -d 4 --flush-interval=5 --no-drain -f raw a.raw",
        "bench -c 10 --no-drain -f raw a.raw",
        "bench -c 10 -t none -f raw a.raw",
        "bench -c 10 -n -t none -f raw a.raw",
        "bench -c 10 -i threads -f raw a.raw",
        "bench -q -U -c 10 -f raw a.raw",
        "bench -c 10 a.raw",
        "bench --image-opts -c 10 driver=raw,file.filename=a.raw",
    ]);
    scene.same_images(&["a.raw", "b.qcow2"]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    Scene::new(&["create -q -f raw a.raw 4M"]).same(&[
        "bench",
        "bench a.raw b.raw",
        "bench nofile",
        "bench -f bogus a.raw",
        "bench -f raw --image-opts a.raw",
        "bench --bogus",
        "bench -c x a.raw",
        "bench -c 0 a.raw",
        "bench -c -1 a.raw",
        "bench -d 0 a.raw",
        "bench -d x a.raw",
        "bench -s 0 a.raw",
        "bench -s x a.raw",
        "bench -s 3G a.raw",
        "bench -S x a.raw",
        "bench -S 2147483648 a.raw",
        "bench -o x a.raw",
        "bench -o -1 a.raw",
        "bench --flush-interval=x a.raw",
        "bench --flush-interval=-1 a.raw",
        "bench --flush-interval=2 -w -c 10 -f raw a.raw",
        "bench --flush-interval=2 -c 10 -f raw a.raw",
        "bench --pattern=256 -w a.raw",
        "bench --pattern=x a.raw",
        "bench -t bogus a.raw",
        "bench -i bogus a.raw",
        "bench -i native -f raw a.raw",
        "bench -U -w -f raw a.raw",
    ]);
}
