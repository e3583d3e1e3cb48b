//! `create`.

use super::info::CHAIN;
use super::scene::Scene;

#[test]
fn images_are_made() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "create -f qcow2 1.qcow2 1M",
        "create 2.raw 1M",
        "create -f raw 3.raw 1000",
        "info 3.raw",
        "create -f qcow2 4.qcow2 1000",
        "create -f qcow2 5.qcow2 0",
        "create -f raw 6.raw 0",
        "create -q -f raw -o preallocation=full 7.raw 1M",
        "create -f raw -o preallocation=falloc 8.raw 1M",
        "create -f qcow2 -o cluster_size=4k,compat=1.1 9.qcow2 1M",
        "create -f qcow2 -o preallocation=metadata,lazy_refcounts=on,refcount_bits=8,compression_type=zstd 10.qcow2 1M",
        "create -f qcow2 -o preallocation=full 11.qcow2 1M",
        "create -f qcow2 -o preallocation=falloc -o cluster_size=128k 12.qcow2 1M",
        "create -f qcow2 -o size=2M 13.qcow2",
        "create -f qcow2 -o compat=0.10 14.qcow2 1M",
        "create -f qcow2 -o extended_l2=on 15.qcow2 1M",
        "create -f qcow2 -o data_file=16.data,data_file_raw=on 16.qcow2 1M",
        "create -f qcow2 -o nocow=on,extent_size_hint=1M 17.qcow2 1M",
        "create -f qcow2 -o lazy_refcounts 18.qcow2 1M",
        "create -f qcow2 -o nolazy_refcounts 19.qcow2 1M",
        "create -f file 20.raw 1M",
        "create -f qcow2 21.qcow2 64T",
    ]);
    let all = ["1.qcow2", "2.raw", "3.raw", "4.qcow2", "5.qcow2", "7.raw", "8.raw", "9.qcow2", "10.qcow2", "11.qcow2"];
    scene.same_images(&all).same_images(&["12.qcow2", "13.qcow2", "14.qcow2", "15.qcow2", "21.qcow2"]);
}

#[test]
fn images_stand_on_others() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "create -f qcow2 -b a.qcow2 -F qcow2 1.qcow2",
        "create -f qcow2 -b a.qcow2 -F qcow2 2.qcow2 1M",
        "create -f qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2,compat=1.1 3.qcow2",
        "create -f qcow2 -b a.qcow2 4.qcow2",
        "create -f qcow2 -b r.raw 4.qcow2",
        "create -f qcow2 -u -b a.qcow2 4.qcow2",
        "create -f qcow2 -u -b none -F qcow2 5.qcow2 1M",
        "create -f qcow2 -b none -F raw 6.qcow2",
        "create -f qcow2 -b none -F raw 6.qcow2 1M",
        "create -f qcow2 -b a.qcow2 -F nosuch 6.qcow2",
        "create -f qcow2 -b a.qcow2 -F qcow2 a.qcow2",
        "create -f qcow2 -b '' 6.qcow2 1M",
        "create -f raw -b a.qcow2 6.raw 1M",
        "create -f raw -F qcow2 6.raw 1M",
        "create -F qcow2 -f qcow2 6.qcow2 1M",
        "create -f qcow2 -o backing_fmt=raw 6.qcow2 1M",
    ]);
    let why = "the last cluster of a new image is a whole one";
    scene.same_code(why, &["info --output json 3.qcow2"]).same(&["info 1.qcow2", "info 5.qcow2"]);
    scene.same_images(&["1.qcow2", "2.qcow2", "3.qcow2"]);
}

#[test]
fn sizes_are_read_as_qemu_img_reads_them() {
    let words = [
        "1Q",
        "-1",
        "0x10",
        "0x10k",
        "1.5",
        "1.5k",
        "1e3",
        "100b",
        "1kk",
        "''",
        "1KB",
        ".5k",
        "' 1k'",
        "+1k",
        "1.k",
        "nan",
        "0x1p",
        "8E",
        "9223372036854775808",
        "18446744073709551616",
        "1.5E",
        "9223372036854775296",
        "9223372036854775807",
    ];
    let lines: Vec<_> = words.iter().map(|word| format!("create -f qcow2 x.qcow2 {word}")).collect();
    let lines: Vec<_> = lines.iter().map(String::as_str).collect();
    let mut scene = Scene::new(&[]);
    let (plain, large) = lines.split_at(lines.len() - 3);
    scene.same(plain).same_code("why an image is too large is said in our words", large);
    scene.same(&["create -f raw x.raw 1.5E", "create -f raw x.raw -- -5", "create -f raw x.raw 8E"]);
}

#[test]
fn options_are_read_as_qemu_img_reads_them() {
    let mut scene = Scene::new(&[]);
    scene.same(&[
        "create -f qcow2 -o cluster_size=1 x.qcow2 1M",
        "create -f qcow2 -o cluster_size=0 x.qcow2 1M",
        "create -f qcow2 -o cluster_size=abc x.qcow2 1M",
        "create -f qcow2 -o cluster_size=-1 x.qcow2 1M",
        "create -f qcow2 -o cluster_size=2M x.qcow2 1M",
        "create -f qcow2 -o cluster_size=4M x.qcow2 1M",
        "create -f qcow2 -o refcount_bits=-1 x.qcow2 1M",
        "create -f qcow2 -o refcount_bits=0 x.qcow2 1M",
        "create -f qcow2 -o refcount_bits=64 x.qcow2 1M",
        "create -f qcow2 -o refcount_bits=128 x.qcow2 1M",
        "create -f qcow2 -o refcount_bits=abc x.qcow2 1M",
        "create -f qcow2 -o refcount_bits=18446744073709551616 x.qcow2 1M",
        "create -f qcow2 -o nosuch=1 x.qcow2 1M",
        "create -f qcow2 -o lazy_refcounts=maybe x.qcow2 1M",
        "create -f qcow2 -o compat=9 x.qcow2 1M",
        "create -f qcow2 -o size=2M x.qcow2 1M",
        "create -f qcow2 -o , x.qcow2 1M",
        "create -f qcow2 -o preallocation=nope x.qcow2 1M",
        "create -f qcow2 -o compression_type=lzo x.qcow2 1M",
        "create -f qcow2 -o data_file_raw=on x.qcow2 1M",
        "create -f raw -o preallocation=metadata x.raw 1M",
        "create -f raw -o nosuch=on x.raw 1M",
        "create -f nosuch x 1M",
        "create -f nosuch -o help",
        "create -f qcow2 x.qcow2",
        "create -f qcow2 a b c",
        "create -f qcow2 none/x 1M",
        "create -f raw none/x 1M",
    ]);
    scene.same_code(
        "it is said as QMP says it",
        &["create -f raw -o preallocation=nope x.raw 1M", "create -f raw . 1M"],
    );
    scene.same_code(
        "what an older version cannot hold is said in one sentence",
        &[
            "create -f qcow2 -o compat=0.10,lazy_refcounts=on x.qcow2 1M",
            "create -f qcow2 -o compat=0.10,refcount_bits=8 x.qcow2 1M",
            "create -f qcow2 -o compat=0.10,compression_type=zstd x.qcow2 1M",
            "create -f qcow2 -o compat=0.10,extended_l2=on x.qcow2 1M",
        ],
    );
    scene
        .same_code("help texts are our own", &["create -f qcow2 -o help", "create -f raw -o help x", "create -o help"]);
    scene.same(&["create -f qcow2 -o encrypt.format=luks x.qcow2 1M"]);
    scene.codes("the format is not supported yet", 0, 1, &["create -f vdi x.vdi 1M"]);
}

/// A data file is named like an image.
#[test]
fn data_files_may_be_named_with_their_protocol() {
    let mut scene = Scene::new(&["create -q -f raw s.raw 1M", "qemu-io -f raw -c 'write -P 7 0 1M' s.raw"]);
    scene.same(&[
        "create -f qcow2 -o data_file=file:a.data a.qcow2 1M",
        "convert -f raw -O qcow2 -o data_file=file:b.data s.raw b.qcow2",
        "convert -f raw -O qcow2 -o data_file=./c:c.data s.raw c.qcow2",
        "info c.qcow2",
        "check a.qcow2",
        "compare s.raw b.qcow2",
        "compare s.raw c.qcow2",
    ]);
    for name in ["a.data", "b.data", "c:c.data"] {
        assert!(scene.ours().join(name).exists(), "{name}");
    }
    scene.codes("there is no driver yet", 1, 1, &["create -f qcow2 -o data_file=nbd:x d.qcow2 1M"]);
    assert!(!scene.ours().join("nbd:x").exists() && !scene.ours().join("d.qcow2").exists());
}
