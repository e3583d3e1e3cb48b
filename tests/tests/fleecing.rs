//! What a backup program does over QMP: it notes what changes, keeps what a disk had while its guest goes on, and reads
//! that through an export of its own.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use trellis_tests::scene::OK_WRITE;
use trellis_tests::vhost_user::client::{Client, Setup};
use trellis_tests::vhost_user::protocol::status;
use trellis_tests::watched::Watched;

const SIZE: u64 = 1 << 20;

/// Export `e` serves `disk`; `room` is as large.
fn stage() -> Watched {
    Watched::builder().image("disk", SIZE, "").image("room", SIZE, "").export("e", "disk", ",writable=on").start()
}

fn refusal(server: &Watched, command: &str, arguments: &Value) -> String {
    let reply = server.qmp_raw(&json!({ "execute": command, "arguments": arguments }));
    reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("{command} {arguments}: {reply}")).to_owned()
}

fn bitmaps(server: &Watched, node: &str) -> Value {
    let nodes = server.qmp("query-named-block-nodes", &json!({}));
    let found = nodes.as_array().unwrap().iter().find(|found| found["node-name"] == node);
    found.unwrap()["dirty-bitmaps"].clone()
}

fn named(name: &str) -> Value {
    json!({ "node": "disk", "name": name })
}

fn action(kind: &str, data: &Value) -> Value {
    json!({ "type": kind, "data": data })
}

/// The digest is what qemu-storage-daemon 10.0.2 says after writes to the same parts.
#[test]
fn a_bitmap_notes_what_a_guest_writes_as_qemus_does() {
    let server = stage();
    server.qmp("block-dirty-bitmap-add", &json!({ "node": "disk", "name": "b", "granularity": 65536 }));
    let mut guest = Client::start(&server.socket("e"), &Setup::default());
    for (sector, len) in [(127, 1024), (600, 512), (2047, 512)] {
        assert_eq!(guest.write(0, sector, &vec![1; len]), OK_WRITE);
    }
    let expected = json!({ "name": "b", "count": 262_144, "granularity": 65536, "recording": true, "busy": false,
        "persistent": false });
    assert_eq!(bitmaps(&server, "disk"), json!([expected]));
    let digest = server.qmp("x-debug-block-dirty-bitmap-sha256", &named("b"));
    assert_eq!(digest["sha256"], "f6e2b493a8fac362b63cd6cd6016123790c699ef92ab6ddbf4ef8ffc35f973f9");
    server.qmp("block-dirty-bitmap-disable", &named("b"));
    assert_eq!(guest.write(0, 1000, &[1; 512]), OK_WRITE);
    assert_eq!(bitmaps(&server, "disk")[0]["count"], 262_144);
    server.qmp("block-dirty-bitmap-enable", &named("b"));
    server.qmp("block-dirty-bitmap-clear", &named("b"));
    assert_eq!(bitmaps(&server, "disk")[0]["count"], 0);
    server.qmp("block-dirty-bitmap-remove", &named("b"));
    assert_eq!(bitmaps(&server, "disk"), Value::Null);
}

#[test]
fn bitmaps_that_make_no_sense_are_refused_in_qemus_words() {
    let server = stage();
    server.qmp("block-dirty-bitmap-add", &named("b"));
    let merge = |source: Value| json!({ "node": "disk", "target": "b", "bitmaps": [source] });
    for (command, arguments, reason) in [
        ("add", json!({ "node": "nope", "name": "b" }), "Cannot find device='nope' nor node-name='nope'"),
        ("add", named("b"), "Bitmap already exists: b"),
        ("add", named(""), "Bitmap name cannot be empty"),
        (
            "add",
            json!({ "node": "disk", "name": "c", "granularity": 513 }),
            "Granularity must be power of 2 and at least 512",
        ),
        (
            "add",
            json!({ "node": "disk", "name": "c", "persistent": true }),
            "Can't store persistent bitmaps to disk: Operation not supported",
        ),
        ("remove", named("c"), "Dirty bitmap 'c' not found"),
        ("clear", json!({ "node": "nope", "name": "b" }), "Node 'nope' not found"),
        ("enable", named("c"), "Dirty bitmap 'c' not found"),
        ("disable", named("c"), "Dirty bitmap 'c' not found"),
        ("merge", merge(json!("c")), "Dirty bitmap 'c' not found"),
        ("merge", merge(json!({ "node": "nope", "name": "b" })), "Node 'nope' not found"),
    ] {
        assert_eq!(refusal(&server, &format!("block-dirty-bitmap-{command}"), &arguments), reason);
    }
    server.qmp("block-dirty-bitmap-merge", &json!({ "node": "disk", "target": "b", "bitmaps": [] }));
    let actions = json!({ "actions": [
        action("block-dirty-bitmap-add", &named("c")),
        action("block-dirty-bitmap-merge", &merge(json!("c"))),
        action("block-dirty-bitmap-disable", &named("b")),
        action("block-dirty-bitmap-remove", &named("nope")),
    ] });
    assert_eq!(refusal(&server, "transaction", &actions), "Dirty bitmap 'nope' not found");
    let left = bitmaps(&server, "disk");
    assert_eq!((left.as_array().unwrap().len(), &left[0]["recording"]), (1, &json!(true)));
}

/// Insert the filter, export the snapshot, read it while the guest overwrites its disk, and take all of it away.
#[test]
fn a_snapshot_is_read_through_an_export_while_the_guest_overwrites_its_disk() {
    let server = stage();
    let mut guest = Client::start(&server.socket("e"), &Setup::default());
    for sector in (0..SIZE / 512).step_by(8) {
        assert_eq!(guest.write(0, sector, &block(sector, 0)), OK_WRITE);
    }
    let filter = json!({ "driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "room" });
    server.qmp("blockdev-add", &filter);
    let led = |to: &str| json!({ "parent-type": "export", "export-id": "e", "new-child": to });
    server.qmp("x-blockdev-replace", &led("cbw"));
    server.qmp("blockdev-add", &json!({ "driver": "snapshot-access", "node-name": "snapshot", "file": "cbw" }));
    let export = json!({ "type": "vhost-user-blk", "id": "s", "node-name": "snapshot",
        "addr": { "type": "unix", "path": server.socket("s") } });
    server.qmp("block-export-add", &export);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (socket, over) = (server.socket("s"), &over);
        let backup = scope.spawn(move || {
            let mut backup = Client::start(&socket, &Setup::default());
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) || rounds < 2 {
                for sector in (0..SIZE / 512).step_by(8) {
                    let (done, bytes) = backup.read(0, sector, 4096);
                    assert_eq!((done.status, bytes), (status::OK, block(sector, 0)), "round {rounds}, {sector}");
                }
                rounds += 1;
            }
        });
        for round in 1..=5 {
            for sector in (0..SIZE / 512).step_by(8) {
                assert_eq!(guest.write(0, sector, &block(sector, round)), OK_WRITE);
            }
        }
        over.store(true, Ordering::Relaxed);
        backup.join().unwrap();
    });
    server.qmp("block-export-del", &json!({ "id": "s", "mode": "hard" }));
    while server.qmp("query-block-exports", &json!({})).as_array().unwrap().len() > 1 {
        std::thread::yield_now();
    }
    server.qmp("blockdev-del", &json!({ "node-name": "snapshot" }));
    server.qmp("x-blockdev-replace", &led("disk"));
    server.qmp("blockdev-del", &json!({ "node-name": "cbw" }));
    assert_eq!(guest.read(0, 8, 4096).1, block(8, 5));
}

/// What a guest writes there in a round.
fn block(sector: u64, round: u8) -> Vec<u8> {
    vec![u8::try_from(sector / 8).unwrap() ^ (round << 4) ^ round; 4096]
}
