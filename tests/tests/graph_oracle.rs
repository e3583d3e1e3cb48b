//! The same commands to trellisd and to `qemu-storage-daemon`: changes of the graph and what is said of it have to be the
//! same, and where one refuses so does the other, in the same words.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use trellis_tests::qmp::Qmp;
use trellis_tests::server::Server;

/// Both daemons, and a folder for each.
struct Both {
    ours: Qmp,
    theirs: Qmp,
    folders: [tempfile::TempDir; 2],
    _servers: [Server; 2],
}

impl Both {
    fn start() -> Self {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let ours = Server::start(folders[0].path(), &[]);
        let theirs = Server::start_peer(folders[1].path(), &[]);
        Self { ours: ours.qmp(), theirs: theirs.qmp(), folders, _servers: [ours, theirs] }
    }

    /// Asks both; what one does the other does too. A refusal of ours may say more than theirs.
    #[track_caller]
    fn ask(&mut self, command: &str, arguments: &Value) {
        let answers = (self.ours.try_execute(command, arguments), self.theirs.try_execute(command, arguments));
        match answers {
            (Ok(_), Ok(_)) => {}
            (Err(ours), Err(theirs)) => {
                let same = ours.class == theirs.class && ours.desc.starts_with(&theirs.desc);
                assert!(same, "{command} {arguments}: '{}' and not '{}'", ours.desc, theirs.desc);
            }
            (ours, theirs) => panic!("{command} {arguments}: {ours:?}, and theirs {theirs:?}"),
        }
    }

    /// Asks both for an export of `node`.
    fn export(&mut self, node: &str, writable: bool) {
        for (qmp, folder) in [&mut self.ours, &mut self.theirs].into_iter().zip(&self.folders) {
            let addr = json!({ "type": "unix", "path": folder.path().join("x.sock") });
            let options =
                json!({ "type": "vhost-user-blk", "id": "x", "node-name": node, "writable": writable, "addr": addr });
            qmp.execute("block-export-add", &options);
        }
    }

    /// Removes the export from both.
    fn unexport(&mut self) {
        for qmp in [&mut self.ours, &mut self.theirs] {
            qmp.execute("block-export-del", &json!({ "id": "x" }));
            qmp.event("BLOCK_EXPORT_DELETED");
        }
    }

    #[track_caller]
    fn expect_same_graph(&mut self) {
        let [ours, theirs] = [&mut self.ours, &mut self.theirs]
            .map(|qmp| Picture::of(&qmp.execute("x-debug-query-block-graph", &json!({}))));
        assert_eq!(ours, theirs);
    }

    #[track_caller]
    fn expect_same_activity(&mut self) {
        let [ours, theirs] = [&mut self.ours, &mut self.theirs].map(|qmp| {
            let nodes = qmp.execute("query-named-block-nodes", &json!({ "flat": true }));
            let of = |node: &Value| (node["node-name"].to_string(), node["active"].clone());
            nodes.as_array().unwrap().iter().map(of).collect::<BTreeMap<_, _>>()
        });
        assert_eq!(ours, theirs);
    }
}

/// A graph without what differs from run to run: numbers, order, and the name of an export, which theirs has not.
#[derive(Debug, PartialEq, Eq)]
struct Picture {
    nodes: BTreeSet<(String, String)>,
    edges: BTreeSet<Edge>,
}

/// Parent, child, name, and what it uses and bears.
type Edge = (String, String, String, BTreeSet<String>, BTreeSet<String>);

impl Picture {
    fn of(answer: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let name = |node: &Value| if node["type"] == "block-backend" { String::new() } else { text(&node["name"]) };
        let list = |answer: &'static str, from: &Value| from[answer].as_array().unwrap().clone();
        let names: BTreeMap<i64, String> =
            list("nodes", answer).iter().map(|node| (node["id"].as_i64().unwrap(), name(node))).collect();
        let end = |edge: &Value, end: &str| names[&edge[end].as_i64().unwrap()].clone();
        let perms = |edge: &Value, of: &'static str| list(of, edge).iter().map(text).collect();
        let edge = |edge: &Value| {
            (
                end(edge, "parent"),
                end(edge, "child"),
                text(&edge["name"]),
                perms(edge, "perm"),
                perms(edge, "shared-perm"),
            )
        };
        Self {
            nodes: list("nodes", answer).iter().map(|node| (text(&node["type"]), name(node))).collect(),
            edges: list("edges", answer).iter().map(edge).collect(),
        }
    }
}

fn disk(name: &str) -> Value {
    json!({ "driver": "null-co", "node-name": name, "size": 1 << 20, "read-zeroes": true })
}

#[test]
fn children_of_a_quorum_come_and_go_as_with_qemu() {
    let mut both = Both::start();
    ["a", "b", "c", "d", "e"].iter().for_each(|name| both.ask("blockdev-add", &disk(name)));
    both.ask(
        "blockdev-add",
        &json!({ "driver": "quorum", "node-name": "q", "children": ["a", "b"], "vote-threshold": 1 }),
    );
    both.ask("blockdev-add", &json!({ "driver": "raw", "node-name": "r", "file": "e" }));
    both.expect_same_graph();
    let child = |edge: &str| json!({ "parent": "q", "child": edge });
    let node = |name: &str| json!({ "parent": "q", "node": name });
    let rounds = [None, Some(false), Some(true)];
    for exported in rounds {
        if let Some(writable) = exported {
            both.export("q", writable);
        }
        for change in [
            node("c"),
            node("r"),
            node("nope"),
            node("c"),
            child("children.9"),
            child("children.1"),
            node("b"),
            child("children.0"),
            child("children.2"),
            child("children.3"),
            child("children.4"),
            node("a"),
            node("b"),
            json!({ "parent": "q" }),
            json!({ "parent": "q", "child": "children.4", "node": "a" }),
            json!({ "parent": "nope", "node": "a" }),
            json!({ "parent": "r", "node": "d" }),
            json!({ "parent": "r", "child": "file" }),
        ] {
            both.ask("x-blockdev-change", &change);
            both.expect_same_graph();
        }
        for arguments in [
            json!({ "node-name": "nope", "iothread": null }),
            json!({ "node-name": "d", "iothread": null }),
            json!({ "node-name": "q", "iothread": null }),
            json!({ "node-name": "q", "iothread": "nope" }),
            json!({ "node-name": "q", "iothread": "nope", "force": true }),
            json!({ "node-name": "q", "iothread": null, "force": true }),
            json!({ "node-name": "q", "iothread": 7 }),
            json!({ "node-name": "q" }),
        ] {
            both.ask("x-blockdev-set-iothread", &arguments);
        }
        if exported.is_some() {
            both.unexport();
        }
    }
}

#[test]
fn nodes_become_inactive_and_active_as_with_qemu() {
    let mut both = Both::start();
    ["a", "b", "c"].iter().for_each(|name| both.ask("blockdev-add", &disk(name)));
    let quorum = |name: &str, children: &[&str]| json!({ "driver": "quorum", "node-name": name, "children": children, "vote-threshold": 1 });
    both.ask("blockdev-add", &quorum("q", &["a", "b"]));
    both.ask("blockdev-add", &json!({ "driver": "raw", "node-name": "r", "file": "q" }));
    both.ask("blockdev-add", &json!({ "driver": "raw", "node-name": "other", "file": "b", "read-only": true }));
    let set = |node: &str, active: bool| json!({ "node-name": node, "active": active });
    let all = |active: bool| json!({ "active": active });
    for exported in [None, Some(false), Some(true)] {
        if let Some(writable) = exported {
            both.export("r", writable);
        }
        for arguments in [
            set("nope", false),
            json!({}),
            set("a", false),
            set("q", false),
            set("r", false),
            set("r", false),
            set("other", false),
            set("a", true),
            set("q", false),
            set("r", true),
            set("c", false),
            set("c", true),
            set("other", true),
            all(true),
            all(false),
            all(false),
            all(true),
            set("other", false),
            all(true),
        ] {
            // Where there is an export, theirs does not activate all nodes when it is asked to, and where a writer holds up
            // all, it has made some inactive.
            if exported.is_some() && (arguments == all(true) || arguments == all(false)) {
                continue;
            }
            both.ask("blockdev-set-active", &arguments);
            both.expect_same_activity();
        }
        if exported.is_some() {
            both.unexport();
        }
    }
    // Nobody active stands on something inactive.
    both.ask("blockdev-set-active", &set("c", false));
    let over = |more: Value| {
        let mut options = json!({ "driver": "raw", "node-name": "over", "file": "c" });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    };
    both.ask("blockdev-add", &over(json!({})));
    both.ask("blockdev-add", &over(json!({ "active": false })));
    both.expect_same_activity();
}

/// What `query-named-block-nodes` says of the images below: how many, which, and the pictures inside each other.
fn chains(qmp: &mut Qmp, flat: bool, folder: &std::path::Path) -> BTreeMap<String, Value> {
    /// QEMU describes an image whose backing node was given; we call it after its file.
    fn plain(name: &Value) -> Value {
        match name.as_str().and_then(|name| name.strip_prefix("json:")) {
            Some(options) => options.parse::<Value>().unwrap()["file"]["filename"].clone(),
            None => name.clone(),
        }
    }
    fn names(image: &Value) -> Value {
        let member = |name: &str| image.get(name).map(plain).unwrap_or_default();
        let below = image.get("backing-image").map_or(Value::Null, names);
        let format = if image["format"] == "copy-on-read" { Value::Null } else { member("filename") };
        json!([format, member("format"), member("backing-filename"), member("full-backing-filename"), below])
    }
    let nodes = qmp.execute("query-named-block-nodes", &json!({ "flat": flat }));
    let folder = folder.to_str().unwrap();
    let told = |node: &Value| {
        let text =
            json!([node["backing_file_depth"], node.get("backing_file").map(plain), names(&node["image"])]).to_string();
        (node["node-name"].as_str().unwrap().to_owned(), text.replace(folder, "FOLDER").parse().unwrap())
    };
    nodes.as_array().unwrap().iter().map(told).filter(|(name, _): &(String, _)| !name.starts_with('#')).collect()
}

#[test]
fn a_chain_of_images_is_told_as_qemu_tells_it() {
    let mut both = Both::start();
    for folder in &both.folders {
        for line in [
            "create -q -f raw base.raw 1M",
            "create -q -f qcow2 -b base.raw -F raw middle.qcow2",
            "create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2",
        ] {
            let made = std::process::Command::new("qemu-img").args(line.split(' ')).current_dir(folder.path()).status();
            assert!(made.unwrap().success(), "qemu-img {line}");
        }
    }
    let [ours, theirs] = both.folders.each_ref().map(|folder| {
        let file = |name: &str| json!({ "driver": "file", "filename": folder.path().join(name) });
        let middle = json!({
            "driver": "qcow2", "node-name": "middle", "file": file("middle.qcow2"),
            "backing": { "driver": "raw", "node-name": "base", "file": file("base.raw") },
        });
        let top = json!({ "driver": "qcow2", "node-name": "top", "file": file("top.qcow2"), "backing": middle });
        [top, json!({ "driver": "copy-on-read", "node-name": "filter", "file": "top" })]
    });
    // Empty is null, as people write it on a command line.
    for (qmp, top) in [(&mut both.ours, &ours[0]), (&mut both.theirs, &theirs[0])] {
        let mut bare = top.clone();
        bare["backing"] = json!("");
        qmp.execute("blockdev-add", &bare);
        qmp.execute("blockdev-del", &json!({ "node-name": "top" }));
    }
    ours.iter().for_each(|node| drop(both.ours.execute("blockdev-add", node)));
    theirs.iter().for_each(|node| drop(both.theirs.execute("blockdev-add", node)));
    for flat in [false, true] {
        let told = chains(&mut both.ours, flat, both.folders[0].path());
        assert_eq!(told, chains(&mut both.theirs, flat, both.folders[1].path()), "flat: {flat}");
        assert_eq!(told["top"][0], if flat { 0 } else { 2 });
    }
}
