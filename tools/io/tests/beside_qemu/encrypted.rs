//! Encrypted images.

use super::support::Bench;

const SECRET: [&str; 2] = ["--object", "secret,id=s,data=hello"];

fn luks() -> Bench {
    let bench = Bench::new();
    bench.make("qemu-img", "create -q --object secret,id=s,data=hello -f luks -o key-secret=s,iter-time=10 e.luks 1M");
    bench
}

fn said(commands: &[&'static str], more: &[&'static str], image: &'static str) -> Vec<&'static str> {
    let commands = commands.iter().flat_map(|command| ["-c", *command]);
    more.iter().copied().chain(commands).chain([image]).collect()
}

#[test]
fn luks_is_opened_with_a_secret() {
    let bench = luks();
    let options = "driver=luks,key-secret=s,file.filename=e.luks";
    let with = [SECRET[0], SECRET[1], "--image-opts"];
    for commands in [
        &["write -P 5 0 64k", "read -P 5 0 64k", "read -v 0 16", "read -P 6 0 512"][..],
        &["write -z 64k 64k", "read -P 0 64k 64k", "write -zu 0 4k", "read -P 0 0 4k", "write -P 7 1000k 24k"],
        &["write -P 5 512 1k", "read -P 5 512 1k", "write -P 3 1 510", "read -P 3 1 510", "read 1M 1"],
        &["length", "truncate 2M", "length", "write -P 9 2047k 1k", "read -P 9 2047k 1k"],
        &["map", "alloc 0 1M", "flush", "discard 0 64k", "write -P 1 0 512", "aio_write -P 2 4k 4k", "aio_flush"],
        &["write -c 0 64k", "writev -P 4 0 1k 2k", "readv -P 4 0 1k 2k"],
    ] {
        bench.same(&said(commands, &with, options), "");
    }
    bench.same(&said(&["read -q 0 512"], &[with[0], with[1], "--image-opts", "-r"], options), "");
    bench.same(&said(&["read 0 512"], &["-f", "luks"], "e.luks"), "");
    bench.same(&said(&["read 0 512"], &[], "e.luks"), "");
    bench.same(&said(&["read 0 512"], &["--object", "secret,id=s,data=wrong", "--image-opts"], options), "");
    bench.same(&said(&["read 0 512"], &["--object", "secret,id=s"], "a.raw"), "");
    let open = "open -o driver=luks,key-secret=s e.luks";
    bench.same(&[SECRET[0], SECRET[1], "-c", open, "-c", "write -P 8 0 4k", "-c", "read -P 8 0 4k", "-c", "close"], "");
}

/// In place, so that both write the same bytes to the same places.
#[test]
fn encrypted_qcow2_is_opened_with_a_secret() {
    let bench = Bench::new();
    let keys = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    bench.make("qemu-img", &format!("create -q --object secret,id=s,data=hello -f qcow2 -o {keys} e.crypt 1M"));
    let options = "driver=qcow2,encrypt.key-secret=s,file.filename=e.crypt";
    bench.make("qemu-io", &format!("--object secret,id=s,data=hello --image-opts -c |=write -P 1 0 256k| {options}"));
    let with = [SECRET[0], SECRET[1], "--image-opts"];
    for commands in [
        &["read -P 1 0 256k", "write -P 5 64k 64k", "read -P 5 64k 64k", "read -P 0 512k 4k"][..],
        &["write -P 5 512 1k", "read -P 5 512 1k", "write -P 3 1 510", "read -P 3 1 510", "read -P 1 64k 64k"],
        &["map", "alloc 0 1M", "length", "flush", "read -v 0 16"],
    ] {
        bench.same(&said(commands, &with, options), "");
    }
    bench.same(&said(&["read 0 512"], &[], "e.crypt"), "");
    bench.same(&said(&["read 0 512"], &["--object", "secret,id=s,data=wrong", "--image-opts"], options), "");
}
