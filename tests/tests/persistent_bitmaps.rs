//! Dirty bitmaps that a qcow2 image keeps, over QMP: what one server leaves in the image the other one finds, be it ours or
//! QEMU's, and it goes on from there.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use trellis_tests::qmp::Qmp;
use trellis_tests::scene::OK_WRITE;
use trellis_tests::server::Server;
use trellis_tests::vhost_user::client::{Client, Setup};

const GRANULE: u64 = 65536;

/// A server with the image in node `disk`, and an export of it.
struct Scene {
    server: Server,
    qmp: Qmp,
    socket: std::path::PathBuf,
}

impl Scene {
    fn new(start: impl FnOnce(&Path, &[&str]) -> Server, folder: &Path, image: &str) -> Self {
        let server = start(folder, &[]);
        let mut qmp = server.qmp();
        let file = json!({ "driver": "file", "filename": image });
        qmp.execute("blockdev-add", &json!({ "driver": "qcow2", "node-name": "disk", "file": file }));
        let socket = folder.join("x.sock");
        let addr = json!({ "type": "unix", "path": socket });
        let export =
            json!({ "type": "vhost-user-blk", "id": "x", "node-name": "disk", "writable": true, "addr": addr });
        qmp.execute("block-export-add", &export);
        Self { server, qmp, socket }
    }

    /// QEMU's has one monitor for one client.
    fn quit(mut self) {
        self.qmp.execute("quit", &json!({}));
        assert!(self.server.wait().success());
    }

    fn write(&self, granules: &[u64]) {
        let mut guest = Client::start(&self.socket, &Setup::default());
        for granule in granules {
            assert_eq!(guest.write(0, granule * GRANULE / 512, &[7; 512]), OK_WRITE);
        }
    }

    fn add(&mut self, name: &str, more: &Value) {
        let mut arguments = json!({ "node": "disk", "name": name, "granularity": GRANULE, "persistent": true });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.qmp.execute("block-dirty-bitmap-add", &arguments);
    }

    fn change(&mut self, command: &str, name: &str) {
        self.qmp.execute(command, &json!({ "node": "disk", "name": name }));
    }

    /// Name, dirty bytes, whether it records; all are kept.
    fn bitmaps(&mut self) -> Vec<(String, u64, bool)> {
        let nodes = self.qmp.execute("query-named-block-nodes", &json!({ "flat": true }));
        let disk = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap();
        let all = disk["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        assert!(all.iter().all(|bitmap| bitmap["persistent"] == true && bitmap["busy"] == false), "{all:?}");
        let one = |bitmap: &Value| {
            let name = bitmap["name"].as_str().unwrap().to_owned();
            (name, bitmap["count"].as_u64().unwrap(), bitmap["recording"] == true)
        };
        let mut all: Vec<_> = all.iter().map(one).collect();
        all.sort();
        all
    }
}

fn image(folder: &Path) -> String {
    let path = folder.join("disk.qcow2").to_str().unwrap().to_owned();
    let status = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &path, "8M"]).status();
    assert!(status.expect("qemu-img is installed").success());
    path
}

fn found(pairs: &[(&str, u64, bool)]) -> Vec<(String, u64, bool)> {
    pairs.iter().map(|(name, granules, recording)| ((*name).to_owned(), granules * GRANULE, *recording)).collect()
}

#[test]
fn servers_take_over_bitmaps_from_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path());
    let run = |start: fn(&Path, &[&str]) -> Server| Scene::new(start, folder.path(), &image);

    let mut ours = run(Server::start);
    ours.add("first", &json!({}));
    ours.add("still", &json!({ "disabled": true }));
    ours.write(&[1, 2]);
    assert_eq!(ours.bitmaps(), found(&[("first", 2, true), ("still", 0, false)]));
    ours.quit();

    let mut theirs = run(Server::start_peer);
    assert_eq!(theirs.bitmaps(), found(&[("first", 2, true), ("still", 0, false)]));
    theirs.add("second", &json!({}));
    theirs.change("block-dirty-bitmap-enable", "still");
    theirs.write(&[2, 9]);
    theirs.quit();

    let mut ours = run(Server::start);
    let now = found(&[("first", 3, true), ("second", 2, true), ("still", 2, true)]);
    assert_eq!(ours.bitmaps(), now);
    ours.change("block-dirty-bitmap-remove", "first");
    ours.change("block-dirty-bitmap-clear", "second");
    ours.change("block-dirty-bitmap-disable", "still");
    ours.write(&[100]);
    ours.quit();

    let info = Command::new("qemu-img").args(["info", "--output=json", &image]).output().unwrap();
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    let listed = &info["format-specific"]["data"]["bitmaps"];
    let flags: Vec<_> =
        listed.as_array().unwrap().iter().map(|one| (one["name"].clone(), one["flags"].clone())).collect();
    assert_eq!(flags, [(json!("still"), json!([])), (json!("second"), json!(["auto"]))]);
    let mut theirs = run(Server::start_peer);
    assert_eq!(theirs.bitmaps(), found(&[("second", 1, true), ("still", 2, false)]));
    theirs.quit();
}

#[test]
fn a_server_that_is_killed_leaves_bitmaps_that_nobody_believes() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path());
    let mut ours = Scene::new(Server::start, folder.path(), &image);
    ours.add("first", &json!({}));
    ours.quit();
    let ours = Scene::new(Server::start, folder.path(), &image);
    ours.write(&[1]);
    // Dropping a server kills it.
    drop(ours);
    let mut ours = Scene::new(Server::start, folder.path(), &image);
    let nodes = ours.qmp.execute("query-named-block-nodes", &json!({ "flat": true }));
    let disk = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap();
    assert_eq!(disk["dirty-bitmaps"][0]["inconsistent"], true, "{disk}");
    let arguments = json!({ "node": "disk", "name": "first" });
    let refused = ours.qmp.try_execute("block-dirty-bitmap-clear", &arguments).unwrap_err().desc;
    assert!(refused.contains("inconsistent"), "{refused}");
    ours.change("block-dirty-bitmap-remove", "first");
    assert!(ours.bitmaps().is_empty());
    ours.quit();
}
