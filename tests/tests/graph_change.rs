//! The shape of the graph changes through QMP below guests that do I/O.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::{Value, json};
use trellis_tests::scene::OK_WRITE;
use trellis_tests::vhost_user::client::{Client, Setup};
use trellis_tests::vhost_user::protocol::status;
use trellis_tests::watched::Watched;

const SIZE: u64 = 1 << 20;

/// Export `e` serves `disk`, and `above` stands on `disk` too.
fn stage() -> Watched {
    Watched::builder()
        .image("disk", SIZE, "")
        .arg("--blockdev", "driver=raw,node-name=above,file=disk")
        .export("e", "disk", ",writable=on,num-queues=2")
        .start()
}

fn replace(new: &str) -> Value {
    json!({ "parent-type": "export", "export-id": "e", "new-child": new })
}

fn served_by(server: &Watched) -> Value {
    server.qmp("query-block-exports", &json!({}))[0]["node-name"].clone()
}

fn refusal(server: &Watched, command: &str, arguments: &Value) -> String {
    let reply = server.qmp_raw(&json!({ "execute": command, "arguments": arguments }));
    reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("{command} {arguments}: {reply}")).to_owned()
}

/// Writes and reads back on one queue until `stop`; gives how often.
fn work(socket: &Path, queue: u16, stop: &AtomicBool, rounds: &AtomicU64) {
    let mut guest = Client::start(socket, &Setup { queues: 2, ..Setup::default() });
    let mut round = 0_u8;
    while !stop.load(Ordering::Relaxed) {
        round = round.wrapping_add(1);
        assert_eq!(guest.write(queue, 8, &[round; 4096]), OK_WRITE);
        let (done, bytes) = guest.read(queue, 8, 4096);
        assert_eq!((done.status, bytes), (status::OK, vec![round; 4096]));
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_node_is_put_in_and_taken_out_below_an_export_while_its_guest_works() {
    let server = stage();
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let socket = server.socket("e");
        let (stop, rounds) = (&stop, &rounds);
        scope.spawn(move || work(&socket, 1, stop, rounds));
        for _ in 0..200 {
            server.qmp("x-blockdev-replace", &replace("above"));
            assert_eq!(served_by(&server), "above");
            server.qmp("x-blockdev-replace", &replace("disk"));
            assert_eq!(served_by(&server), "disk");
        }
        let enough = rounds.load(Ordering::Relaxed) + 10;
        while rounds.load(Ordering::Relaxed) < enough {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
    });
    server.qmp("blockdev-del", &json!({ "node-name": "above" }));
}

#[test]
fn a_reopen_leads_to_another_file_and_the_old_one_is_free_at_the_answer() {
    let old = |server: &Watched| format!("file.driver=file,file.filename={}", server.image("disk").display());
    let server = Watched::builder().image("disk", SIZE, "").start();
    server.qmp("blockdev-del", &json!({ "node-name": "disk" }));
    let path = server.image("disk");
    let inline = json!({ "driver": "file", "filename": path });
    server.qmp("blockdev-add", &json!({ "driver": "raw", "node-name": "top", "file": inline }));
    let export = json!({ "type": "vhost-user-blk", "id": "e", "node-name": "top", "writable": true,
        "addr": { "type": "unix", "path": server.socket("e") } });
    server.qmp("block-export-add", &export);
    let mut guest = Client::start(&server.socket("e"), &Setup::default());
    assert_eq!(guest.write(0, 0, &[7; 512]), OK_WRITE);
    server.qmp("blockdev-add", &json!({ "driver": "null-co", "node-name": "null", "size": SIZE, "read-zeroes": true }));
    let reopen = json!({ "options": [{ "driver": "raw", "node-name": "top", "file": "null" }] });
    server.qmp("blockdev-reopen", &reopen);
    // Another program may write the image at once.
    let status = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read -P 7 0 512", "-c", "write -P 8 0 512"])
        .arg(&path)
        .output();
    let status = status.expect("qemu-io is installed");
    assert!(status.status.success() && status.stderr.is_empty(), "{status:?} {}", old(&server));
    assert_eq!(guest.read(0, 0, 512).1, [0; 512]);
    assert_eq!(server.qmp("query-named-block-nodes", &json!({})).as_array().unwrap().len(), 2);
}

#[test]
fn a_replacement_that_makes_no_sense_is_refused() {
    let server = stage();
    for (arguments, reason) in [
        (json!({ "parent-type": "export", "export-id": "x", "new-child": "above" }), "Export 'x' is not found"),
        (replace("nobody"), "Cannot find device='' nor node-name='nobody'"),
        (
            json!({ "parent-type": "driver", "node-name": "above", "child": "backing", "new-child": "disk" }),
            "Node 'above' does not have child 'backing'",
        ),
        (
            json!({ "parent-type": "driver", "node-name": "above", "child": "file", "new-child": "above" }),
            "Making 'above' a file child of 'above' would create a cycle",
        ),
        (
            json!({ "parent-type": "driver", "node-name": "nobody", "child": "file", "new-child": "above" }),
            "Cannot find device='' nor node-name='nobody'",
        ),
    ] {
        assert_eq!(refusal(&server, "x-blockdev-replace", &arguments), reason);
    }
    assert_eq!(served_by(&server), "disk");
}

/// GR-20 as an operator sees it: of several actions one fails.
#[test]
fn gr_20_a_transaction_changes_all_or_nothing() {
    let server = stage();
    let action = |new: &str| json!({ "type": "x-blockdev-replace", "data": replace(new) });
    let abort = json!({ "type": "abort", "data": {} });
    let all = |actions: &[&Value]| json!({ "actions": actions });
    let desc = refusal(&server, "transaction", &all(&[&action("above"), &abort]));
    assert_eq!(desc, "Transaction aborted using Abort action");
    assert_eq!(served_by(&server), "disk");
    let mut ten = vec![action("above"); 10];
    ten[6] = json!({ "type": "x-blockdev-replace", "data":
        { "parent-type": "driver", "node-name": "above", "child": "file", "new-child": "above" } });
    let desc = refusal(&server, "transaction", &json!({ "actions": ten }));
    assert_eq!(desc, "Making 'above' a file child of 'above' would create a cycle");
    assert_eq!(served_by(&server), "disk");
    let reopen = json!({ "type": "blockdev-reopen", "data": { "options":
        [{ "driver": "raw", "node-name": "above", "file": "disk", "read-only": false, "size": 512 }] } });
    server.qmp("transaction", &all(&[&reopen, &action("above")]));
    assert_eq!(served_by(&server), "above");
    let grouped = json!({ "actions": [action("disk")], "properties": { "completion-mode": "grouped" } });
    let desc = refusal(&server, "transaction", &grouped);
    let expected = "Action 'x-blockdev-replace' does not support transaction property completion-mode = grouped";
    assert_eq!(desc, expected);
    server.qmp("transaction", &json!({ "actions": [] }));
}
