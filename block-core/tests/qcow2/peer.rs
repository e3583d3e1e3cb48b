//! QEMU's programs, and the kinds of image that they make.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::bench::with;
use crate::random::Random;

/// A way of making an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) options: &'static str,
    /// Bytes in a cluster.
    pub(crate) cluster: u64,
    /// Guest data is in a file of its own.
    pub(crate) external: bool,
}

const fn kind(options: &'static str, cluster: u64) -> Kind {
    Kind { options, cluster, external: false }
}

const fn external(options: &'static str, cluster: u64) -> Kind {
    Kind { options, cluster, external: true }
}

/// All that can be combined, with small and large clusters.
pub(crate) const KINDS: &[Kind] = &[
    kind("compat=1.1", 65536),
    kind("compat=0.10", 65536),
    kind("compat=0.10,cluster_size=512", 512),
    kind("compat=1.1,cluster_size=512,refcount_bits=1", 512),
    kind("compat=1.1,cluster_size=512,refcount_bits=64,lazy_refcounts=on", 512),
    kind("compat=1.1,cluster_size=4096,refcount_bits=2", 4096),
    kind("compat=1.1,cluster_size=4096,refcount_bits=4,compression_type=zstd", 4096),
    kind("compat=1.1,cluster_size=2M,refcount_bits=8", 2 << 20),
    kind("compat=1.1,lazy_refcounts=on,refcount_bits=32", 65536),
    kind("compat=1.1,compression_type=zstd", 65536),
    kind("compat=1.1,extended_l2=on", 65536),
    kind("compat=1.1,extended_l2=on,cluster_size=16K,compression_type=zstd", 16384),
    kind("compat=1.1,extended_l2=on,cluster_size=2M", 2 << 20),
    external("compat=1.1", 65536),
    external("compat=1.1,cluster_size=4096,data_file_raw=on", 4096),
    external("compat=1.1,extended_l2=on,cluster_size=16K", 16384),
];

/// Runs a program of QEMU's. It has to end well, and in time.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new("timeout").arg("60").arg(program).args(arguments).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    said
}

/// An image of so many bytes, perhaps over another; gives its path.
pub(crate) fn create(dir: &Path, name: &str, kind: Kind, size: u64, backing: Option<(&str, &str)>) -> String {
    let path = dir.join(name).to_str().unwrap().to_owned();
    let mut options = kind.options.to_owned();
    if kind.external {
        options += &format!(",data_file={path}.data");
    }
    let size = size.to_string();
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if let Some((backing, format)) = backing {
        arguments.extend(["-b", backing, "-F", format]);
    }
    arguments.extend([path.as_str(), &size]);
    run("qemu-img", &arguments);
    path
}

/// Lets qemu-io do random work on an image.
pub(crate) fn work(path: &str, kind: Kind, size: u64, random: &mut Random, steps: u64) {
    let (mut commands, mut packing) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        let start = random.below(size / 512) * 512;
        let len = (1 + random.below((size - start) / 512).min(random.below(400))) * 512;
        let pattern = 1 + random.below(250);
        let whole = |at: u64| at / kind.cluster * kind.cluster;
        let (first, clusters) = (whole(start), (1 + random.below(3)) * kind.cluster);
        let packed = !kind.external && first + clusters <= size && kind.cluster < 1 << 20;
        let command = match random.below(8) {
            0..3 => format!("write -P {pattern} {start} {len}"),
            3 => format!("write -z {start} {len}"),
            4 => format!("write -z -u {start} {len}"),
            5 => format!("discard {start} {len}"),
            6 if packed => {
                packing.push(format!("write -c -P {pattern} {first} {clusters}"));
                continue;
            }
            _ => format!("write -P {pattern} {start} {}", len.min(1024)),
        };
        commands.push(command);
    }
    // QEMU goes on to pack into a cluster that was set free and has become another's since; so it packs first, and another
    // process does the rest.
    qemu_io(path, &packing);
    qemu_io(path, &commands);
    check(path);
}

fn qemu_io(path: &str, commands: &[String]) {
    if commands.is_empty() {
        return;
    }
    let mut arguments = vec!["-f", "qcow2", "-d", "unmap"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command.as_str()]));
    arguments.push(path);
    // A compressed write over what is there fails, and that is all right.
    let output = Command::new("timeout").arg("60").arg("qemu-io").args(arguments).output().unwrap();
    assert!(output.status.code().is_some_and(|code| code < 2), "{output:?}");
}

/// What QEMU sees in an image.
pub(crate) fn contents(path: &str) -> Vec<u8> {
    let raw = format!("{path}.contents");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", path, &raw]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

/// QEMU finds nothing wrong with an image: no error, and no leak.
pub(crate) fn check(path: &str) {
    let output = Command::new("timeout").args(["60", "qemu-img", "check", "-f", "qcow2", path]).output().unwrap();
    if !output.status.success() {
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if let Ok(kept) = std::env::var("TRELLIS_KEEP") {
            std::fs::copy(path, kept).unwrap();
        }
        panic!("qemu-img check {path}: {said}");
    }
}

pub(crate) fn file(path: &str) -> Value {
    json!({ "driver": "file", "filename": path, "discard": "unmap" })
}

/// A node over an image, whose backing is given or null.
pub(crate) fn node(path: &str, kind: Kind, backing: Option<Value>) -> Value {
    let node = json!({
        "driver": "qcow2", "file": file(path), "discard": "unmap", "backing": backing.unwrap_or(Value::Null),
    });
    if kind.external { with(node, &json!({ "data-file": file(&format!("{path}.data")) })) } else { node }
}
