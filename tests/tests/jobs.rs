//! Jobs that make images, here and in `qemu-storage-daemon`: the same answers, the same lives, the same files.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use serde_json::{Value, json};
use trellis_tests::qmp::{Qmp, QmpError};
use trellis_tests::server::Server;

/// A daemon with a folder of its own.
struct Side {
    qmp: Qmp,
    folder: tempfile::TempDir,
    _server: Server,
}

impl Side {
    fn both() -> [Self; 2] {
        let start = |ours: bool| {
            let folder = tempfile::tempdir().unwrap();
            let start = if ours { Server::start } else { Server::start_peer };
            let server = start(folder.path(), &[]);
            Self { qmp: server.qmp(), folder, _server: server }
        };
        [start(true), start(false)]
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// Begins a job that makes `name`, and follows it to its end: the states that it went through, and its report.
    fn create(&mut self, id: &str, name: &str, more: &Value) -> Result<(Vec<Value>, Value), QmpError> {
        let mut options = json!({ "driver": "file", "filename": self.path(name), "size": 1 << 20 });
        let members = options.as_object_mut().unwrap();
        members.extend(more.as_object().unwrap().clone());
        self.qmp.try_execute("blockdev-create", &json!({ "job-id": id, "options": options }))?;
        let mut states = Vec::new();
        while states.last() != Some(&json!("concluded")) {
            let event = self.qmp.event("JOB_STATUS_CHANGE");
            assert_eq!(event["id"], id);
            states.push(event["status"].clone());
        }
        let jobs = self.qmp.execute("query-jobs", &json!({}));
        Ok((states, jobs[0].clone()))
    }

    fn tell(&mut self, command: &str, id: &str) -> Result<Value, QmpError> {
        self.qmp.try_execute(command, &json!({ "id": id }))
    }
}

#[test]
fn an_image_is_made_as_qemu_makes_it() {
    let mut sides = Side::both();
    let seen = sides.each_mut().map(|side| {
        let plain = side.create("plain", "plain.img", &json!({})).unwrap();
        let full = side.create("full", "full.img", &json!({ "preallocation": "full", "size": 8192 })).unwrap();
        let stat = ["plain.img", "full.img"].map(|name| std::fs::metadata(side.path(name)).unwrap().len());
        let twice = side.create("plain", "other.img", &json!({})).unwrap_err().desc;
        let states = [plain.0, full.0];
        (states, plain.1, full.1, stat, twice, side.qmp.execute("query-jobs", &json!({})))
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].3, [1 << 20, 8192]);
    assert_eq!(seen[0].0[0], ["created", "running", "waiting", "pending", "concluded"]);
}

#[test]
fn a_job_that_fails_keeps_its_reason() {
    let mut sides = Side::both();
    let seen = sides.each_mut().map(|side| {
        let (states, mut report) = side.create("missing", "no/folder.img", &json!({})).unwrap();
        let name = side.path("no/folder.img");
        let error = report["error"].take().as_str().unwrap().replace(&name, "FILE");
        (states, report, error)
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].0, ["created", "running", "aborting", "concluded"]);
    // What no file system has is refused, before there is a file.
    for side in &mut sides {
        let (states, report) = side.create("tables", "tables.img", &json!({ "preallocation": "metadata" })).unwrap();
        assert_eq!(states[2], "aborting");
        let error = report["error"].as_str().unwrap();
        assert!(error.contains("nsupported preallocation mode"), "{error}");
    }
    assert!(!std::fs::exists(sides[0].path("tables.img")).unwrap());
}

#[test]
fn what_is_over_takes_one_order_only() {
    let mut sides = Side::both();
    let seen = sides.each_mut().map(|side| {
        let bad_id = side.create("1st", "x.img", &json!({})).unwrap_err().desc;
        let unknown = side.tell("job-dismiss", "nobody").unwrap_err().desc;
        side.create("job", "x.img", &json!({})).unwrap();
        let verbs = ["job-cancel", "job-pause", "job-complete", "job-finalize"];
        let refused = verbs.map(|verb| side.tell(verb, "job").unwrap_err().desc);
        side.tell("job-dismiss", "job").unwrap();
        let last = side.qmp.event("JOB_STATUS_CHANGE");
        (bad_id, unknown, refused, last, side.qmp.execute("query-jobs", &json!({})))
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].3, json!({ "id": "job", "status": "null" }));
    assert_eq!(seen[0].4, json!([]));
}

/// A file that is there loses its contents to a new image, but not while somebody writes to it. QEMU empties it where the
/// writer bears others, as an export does.
#[test]
fn an_image_in_use_is_not_made_anew() {
    let [mut side, _peer] = Side::both();
    std::fs::write(side.path("used.img"), [7; 4096]).unwrap();
    let node = json!({ "driver": "file", "node-name": "used", "filename": side.path("used.img") });
    let addr = json!({ "type": "unix", "path": side.path("x.sock") });
    let export = json!({ "type": "vhost-user-blk", "id": "x", "node-name": "used", "writable": true, "addr": addr });
    side.qmp.execute("blockdev-add", &node);
    side.qmp.execute("block-export-add", &export);
    let (_, report) = side.create("again", "used.img", &json!({})).unwrap();
    assert!(report["error"].as_str().unwrap().ends_with("it is in use by node 'used'"), "{report}");
    assert_eq!(std::fs::read(side.path("used.img")).unwrap(), [7; 4096]);
    side.qmp.execute("block-export-del", &json!({ "id": "x" }));
    side.qmp.event("BLOCK_EXPORT_DELETED");
    side.qmp.execute("blockdev-del", &json!({ "node-name": "used" }));
    let (_, report) = side.create("now", "used.img", &json!({})).unwrap();
    assert!(report.get("error").is_none(), "{report}");
    assert_eq!(std::fs::metadata(side.path("used.img")).unwrap().len(), 1 << 20);
}
