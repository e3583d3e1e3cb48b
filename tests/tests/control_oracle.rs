//! The same questions to trellisd and to `qemu-storage-daemon`: what is answered has to be the same, member by member, and
//! what is refused has to be refused with the same class. The words may differ.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use std::process::Command;

use serde_json::{Value, json};
use trellis_tests::qmp::Qmp;
use trellis_tests::server::Server;

/// Both daemons, and a folder for each.
struct Both {
    all: [(Qmp, tempfile::TempDir, Server); 2],
    wrong: String,
}

impl Both {
    /// With the images `base.qcow2`, `top.qcow2` above it, and `raw`, one MiB each.
    fn start() -> Self {
        let start = |start: fn(&std::path::Path, &[&str]) -> Server| {
            let folder = tempfile::tempdir().unwrap();
            for line in [
                "create -q -f raw raw 1M",
                "create -q -f qcow2 base.qcow2 1M",
                "create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
            ] {
                let made = Command::new("qemu-img").args(line.split(' ')).current_dir(folder.path()).status();
                assert!(made.unwrap().success(), "{line}");
            }
            let server = start(folder.path(), &[]);
            (server.qmp(), folder, server)
        };
        Self { all: [start(Server::start), start(Server::start_peer)], wrong: String::new() }
    }

    /// Asks both, and notes where they differ. `$FOLDER` is the folder of each.
    fn ask(&mut self, command: &str, arguments: &Value) {
        self.ask_about(command, arguments, |answer| answer);
    }

    /// The same for a part of the answer.
    fn ask_about(&mut self, command: &str, arguments: &Value, part: impl Fn(Value) -> Value) {
        let [ours, theirs] = self.all.each_mut().map(|(qmp, folder, _)| {
            let folder = folder.path().to_str().unwrap();
            let arguments = serde_json::from_str(&arguments.to_string().replace("$FOLDER", folder)).unwrap();
            match qmp.try_execute(command, &arguments) {
                Ok(answer) => {
                    Ok(part(in_order(serde_json::from_str(&answer.to_string().replace(folder, "$FOLDER")).unwrap())))
                }
                Err(error) => Err(error.class),
            }
        });
        if ours != theirs {
            self.wrong += &format!("{command} {arguments}\n  ours   {ours:?}\n  theirs {theirs:?}\n");
        }
    }

    #[track_caller]
    fn is_right(&self) {
        assert!(self.wrong.is_empty(), "{}", self.wrong);
    }
}

/// Properties have no order.
fn in_order(mut answer: Value) -> Value {
    if let Value::Array(list) = &mut answer
        && list.iter().all(|of| of.get("name").is_some() && of.get("type").is_some())
    {
        list.sort_by_key(|of| of["name"].to_string());
    }
    answer
}

fn add_objects(both: &mut Both) {
    both.ask("object-add", &json!({ "qom-type": "iothread", "id": "io0" }));
    both.ask("object-add", &json!({ "qom-type": "throttle-group", "id": "tg" }));
    both.ask("object-add", &json!({ "qom-type": "iothread", "id": "control" }));
    both.ask("object-add", &json!({ "qom-type": "iothread", "id": "objects" }));
}

#[test]
fn places_of_the_object_tree_are_found_alike() {
    let mut both = Both::start();
    add_objects(&mut both);
    for path in [
        "/",
        "",
        "//",
        "objects",
        "/objects",
        "/objects/",
        "//objects",
        "/objects//io0",
        "/objects/io0",
        "io0",
        "io0/",
        "objects/io0",
        "/io0",
        "/chardevs",
        "chardevs/",
        "/chardevs/control",
        "control",
        "chardevs/control",
        "zz",
        "/zz",
        "/objects/zz",
        "tg",
        "/objects/io0/x",
        "/objects/io0/type",
        "type",
        " /objects",
        "/backend",
        "backend",
        "/objects/objects",
        "objects/objects",
    ] {
        both.ask("qom-list", &json!({ "path": path }));
        for property in ["type", "", "zz", "objects", "io0", "control", "connected", "poll-max-ns"] {
            both.ask("qom-get", &json!({ "path": path, "property": property }));
        }
        for property in ["type", "zz", "io0", "connected", "addr"] {
            both.ask("qom-set", &json!({ "path": path, "property": property, "value": "x" }));
        }
    }
    both.ask("qom-get", &json!({ "path": "/chardevs/control", "property": "addr" }));
    both.is_right();
}

#[test]
fn types_of_the_object_tree_are_described_alike() {
    let mut both = Both::start();
    let ours = |answer: Value| {
        // Theirs has more types; those that both have must be the same.
        let known = [
            "object",
            "container",
            "iothread",
            "event-loop-base",
            "chardev",
            "chardev-fd",
            "chardev-socket",
            "chardev-null",
            "chardev-stdio",
            "throttle-group",
            "secret",
            "secret_common",
            "secret_keyring",
        ];
        let mut list = answer.as_array().unwrap().clone();
        list.retain(|of| known.iter().any(|name| of["name"] == *name));
        list.sort_by_key(|of| of["name"].to_string());
        Value::Array(list)
    };
    for of in [
        "object",
        "container",
        "iothread",
        "event-loop-base",
        "chardev",
        "chardev-socket",
        "chardev-stdio",
        "throttle-group",
        "secret",
        "secret_common",
        "user-creatable",
        "zz",
        "",
    ] {
        for with_abstract in [false, true] {
            both.ask_about("qom-list-types", &json!({ "implements": of, "abstract": with_abstract }), ours);
        }
        if of != "user-creatable" {
            both.ask("qom-list-properties", &json!({ "typename": of }));
        }
    }
    both.ask_about("qom-list-types", &json!({ "abstract": true }), ours);
    both.is_right();
}

#[test]
fn sizes_and_numbers_have_the_same_bounds() {
    let mut both = Both::start();
    let null = |member: &str, value: u64| json!({ "driver": "null-co", "node-name": "n", (member): value });
    let largest = (i64::MAX.cast_unsigned() >> 30) << 30;
    for size in [largest + 1, largest] {
        both.ask("blockdev-add", &null("size", size));
    }
    both.ask("blockdev-del", &json!({ "node-name": "n" }));
    // A node that takes 292 years for a flush is not removed in time.
    for latency in [i64::MAX.cast_unsigned() + 1, i64::MAX.cast_unsigned()] {
        both.ask("blockdev-add", &null("latency-ns", latency));
    }
    for threads in [(1_u64 << 31) - 1, 1 << 31] {
        let id = format!("io{threads}");
        both.ask("object-add", &json!({ "qom-type": "iothread", "id": id, "thread-pool-max": threads }));
    }
    both.is_right();
}

#[test]
fn exports_and_jobs_are_listed_alike() {
    let mut both = Both::start();
    both.ask("blockdev-add", &json!({ "driver": "null-co", "node-name": "n" }));
    for id in ["a", "b", "c"] {
        let addr = json!({ "type": "unix", "path": format!("$FOLDER/{id}.sock") });
        let options = json!({ "type": "vhost-user-blk", "id": id, "node-name": "n", "addr": addr });
        both.ask("block-export-add", &options);
    }
    both.ask("query-block-exports", &json!({}));
    let new = json!({ "driver": "file", "filename": "$FOLDER/new", "size": 512 });
    both.ask("blockdev-create", &json!({ "job-id": "j", "options": new }));
    both.ask("query-block-jobs", &json!({}));
    both.ask("query-block-jobs", &json!({ "zz": 1 }));
    both.is_right();
}

/// Names apart: where a file name alone does not say all, theirs are descriptions in JSON.
#[test]
fn images_are_described_alike() {
    let mut both = Both::start();
    let file = |name: &str| json!({ "driver": "file", "node-name": name, "filename": format!("$FOLDER/{name}") });
    let mut add = |options: Value| both.ask("blockdev-add", &options);
    ["raw", "base.qcow2", "top.qcow2"].iter().for_each(|name| add(file(name)));
    add(json!({ "driver": "null-co", "node-name": "null", "size": 1 << 20 }));
    add(json!({ "driver": "raw", "node-name": "raw-null", "file": "null" }));
    add(json!({ "driver": "raw", "node-name": "r", "file": "raw" }));
    add(json!({ "driver": "qcow2", "node-name": "b", "file": "base.qcow2" }));
    add(json!({ "driver": "raw", "node-name": "raw-b", "file": "b" }));
    add(json!({ "driver": "copy-on-read", "node-name": "c", "file": "b" }));
    add(json!({ "driver": "blkdebug", "node-name": "d", "image": "b" }));
    for backing in [json!("b"), Value::Null, json!("c"), json!("null"), json!("r")] {
        both.ask(
            "blockdev-add",
            &json!({ "driver": "qcow2", "node-name": "t", "file": "top.qcow2", "backing": backing }),
        );
        for flat in [false, true] {
            both.ask_about("query-named-block-nodes", &json!({ "flat": flat }), without_descriptions);
        }
        both.ask_about("query-blockstats", &json!({ "query-nodes": true }), chains);
        both.ask("blockdev-del", &json!({ "node-name": "t" }));
    }
    both.is_right();
}

/// Covers names that are not the path of one file.
fn without_descriptions(mut answer: Value) -> Value {
    match &mut answer {
        Value::Object(members) => {
            for (name, value) in members.iter_mut() {
                let names_an_image = matches!(name.as_str(), "file" | "filename" | "backing_file");
                *value = if names_an_image { Value::Null } else { without_descriptions(value.take()) };
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| *value = without_descriptions(value.take())),
        _ => {}
    }
    answer
}

/// Which nodes are shown below which.
fn chains(answer: Value) -> Value {
    match answer {
        Value::Array(list) => list.into_iter().map(chains).collect(),
        other => json!([other["node-name"], other.get("parent").cloned().map(chains)]),
    }
}
