//! Exports that begin and end while guests are there and operators are in a hurry.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use trellis_tests::qmp::Qmp;
use trellis_tests::scene::{OK_WRITE, Scene};
use trellis_tests::vhost_user::client::{Client, DATA, Setup};
use trellis_tests::vhost_user::protocol::kind;
use trellis_tests::vhost_user::ring::writable;
use trellis_tests::vhost_user::wire::pause;
use trellis_tests::watched::Watched;

#[test]
fn an_export_with_a_guest_is_removed_only_by_force() {
    let server = Watched::builder().image("n", 1 << 20, "").export("e", "n", ",writable=on").start();
    let mut guest = Client::start(&server.socket("e"), &Setup::default());
    for mode in [json!({ "id": "e" }), json!({ "id": "e", "mode": "safe" })] {
        let refused = server.qmp_raw(&json!({ "execute": "block-export-del", "arguments": mode }));
        assert_eq!(refused["error"]["class"], "GenericError", "{refused}");
        assert_eq!(guest.write(0, 0, &[7; 512]), OK_WRITE, "the guest does not notice");
    }
    let mut monitor = Qmp::connect(&qmp(&server));
    ask(&mut monitor, "block-export-del", json!({ "id": "e", "mode": "hard" }));
    let told = monitor.take_events();
    assert!(
        told.iter().any(|event| event["event"] == "BLOCK_EXPORT_DELETED" && event["data"]["id"] == "e"),
        "{told:?}"
    );
    assert!(guest.wire().closes_within(Duration::from_secs(10), drop), "the guest is disconnected");
    assert!(!server.socket("e").exists());
    server.qmp("blockdev-del", &json!({ "node-name": "n" }));
}

/// As in QEMU, where a drain lets throttled requests go.
#[test]
fn a_throttle_holds_up_neither_removal_nor_quit() {
    let throttled = || {
        let group = json!({ "qom-type": "throttle-group", "id": "g", "limits": { "iops-total": 1 } });
        let disk = json!({ "driver": "null-co", "size": 1 << 20, "read-zeroes": true });
        let node = json!({ "driver": "throttle", "node-name": "n", "throttle-group": "g", "file": disk });
        let builder = Watched::builder().arg("--object", &group.to_string()).arg("--blockdev", &node.to_string());
        let server = builder.export("e", "n", "").start();
        let mut guest = Client::start(&server.socket("e"), &Setup::default());
        for n in 0..32 {
            let chain = guest.chain(u64::from(n), kind::IN, 0, &[writable(DATA, 512)]);
            guest.queue(0).ring.write_chain(3 * n, &chain);
        }
        guest.queue(0).ring.publish_all(&(0..32).map(|n| 3 * n).collect::<Vec<_>>());
        guest.kick(0);
        pause(Duration::from_millis(200));
        let inside = &server.qmp("x-query-export-details", &json!({}))[0]["in-flight"];
        assert!(inside.as_u64().is_some_and(|inside| inside >= 28), "{inside} wait for the throttle");
        (server, guest)
    };
    let (server, guest) = throttled();
    let begun = Instant::now();
    server.qmp("block-export-del", &json!({ "id": "e", "mode": "hard" }));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(server.qmp("query-block-exports", &json!({})).as_array().is_some_and(Vec::is_empty));
    drop((server, guest));
    let (mut server, _guest) = throttled();
    server.qmp("quit", &json!({}));
    assert!(server.ends_within(Duration::from_secs(2)).is_some(), "quit waits for the throttle");
}

#[test]
fn an_export_without_a_guest_is_removed_safely() {
    let server = Watched::builder().image("n", 1 << 20, "").export("e", "n", ",writable=on").start();
    drop(Client::start(&server.socket("e"), &Setup::default()));
    // That it has gone is noticed a little later.
    while server.qmp("x-query-export-details", &json!({}))[0]["connected"] == true {
        pause(Duration::from_millis(5));
    }
    server.qmp("block-export-del", &json!({ "id": "e" }));
}

#[test]
fn a_guest_s_write_crosses_the_threshold_once() {
    let server = Watched::builder().image("n", 1 << 20, "").export("e", "n", ",writable=on").start();
    let mut monitor = Qmp::connect(&qmp(&server));
    ask(&mut monitor, "block-set-write-threshold", json!({ "node-name": "n", "write-threshold": 4096 }));
    let mut guest = Client::start(&server.socket("e"), &Setup::default());
    assert_eq!(guest.write(0, 0, &[7; 4096]), OK_WRITE);
    ask(&mut monitor, "query-version", json!({}));
    assert!(monitor.take_events().is_empty(), "up to the threshold is not past it");
    assert_eq!(guest.write(0, 4, &[7; 4096]), OK_WRITE);
    assert_eq!(guest.write(0, 4, &[7; 4096]), OK_WRITE);
    let mut told = Vec::new();
    for _ in 0..100 {
        ask(&mut monitor, "query-version", json!({}));
        told.append(&mut monitor.take_events());
        pause(Duration::from_millis(5));
    }
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0]["event"], "BLOCK_WRITE_THRESHOLD");
    let expected = json!({ "node-name": "n", "amount-exceeded": 2048, "write-threshold": 4096 });
    assert_eq!(told[0]["data"], expected);
}

#[test]
fn the_end_waits_for_an_export_that_is_being_removed() {
    let node = "driver=null-co,node-name=n,size=1048576,read-zeroes=on,latency-ns=2000000000";
    let mut server = Watched::builder().arg("--blockdev", node).export("e", "n", ",writable=on").start();
    let mut guest = Client::start(&server.socket("e"), &Setup::default());
    let read = guest.chain(0, kind::IN, 0, &[writable(DATA, 512)]);
    guest.submit(0, &read);
    pause(Duration::from_millis(100));
    let path = qmp(&server);
    let mut remover = Qmp::connect(&path);
    let removal = std::thread::Builder::new()
        .spawn(move || {
            remover.ask(&json!({ "execute": "block-export-del", "arguments": { "id": "e", "mode": "hard" } }))
        })
        .expect("a thread");
    pause(Duration::from_millis(100));
    server.qmp("quit", &json!({}));
    let mut late = Qmp::connect(&path);
    let add = json!({ "type": "vhost-user-blk", "id": "late", "node-name": "n",
        "addr": { "type": "unix", "path": server.socket("late") } });
    let refused = late.ask(&json!({ "execute": "block-export-add", "arguments": add }));
    assert_eq!(refused["error"]["desc"], "The daemon is ending", "{refused}");
    drop(late);
    assert!(removal.join().expect("an answer").get("return").is_some());
    let ended = server.ends_within(Duration::from_secs(10)).expect("it ends");
    assert!(ended.success(), "{ended}: {}", server.log());
    assert!(!server.log().contains("could not"), "{}", server.log());
    assert_eq!(guest.used(0).len, 513, "what was under way was answered");
}

#[test]
fn a_refused_export_leaves_nothing_behind() {
    let mut scene = Scene::new();
    let server = scene.server();
    let add = |server: &mut Watched, id: &str, extra: &Value| {
        let mut arguments = json!({ "type": "vhost-user-blk", "id": id, "node-name": "disk-a",
            "addr": { "type": "unix", "path": server.socket(id) } });
        let extra = extra.as_object().expect("an object").clone();
        arguments.as_object_mut().expect("an object").extend(extra);
        server.qmp_raw(&json!({ "execute": "block-export-add", "arguments": arguments }))
    };
    let fds = server.fds();
    let missing = server.dir().join("missing/s");
    let wrong = [
        json!({ "addr": { "type": "unix", "path": missing } }),
        json!({ "addr": { "type": "unix", "path": server.socket("b") } }),
        json!({ "addr": { "type": "unix", "path": server.image("disk-a") } }),
        json!({ "addr": { "type": "fd", "str": "12345" } }),
        json!({ "num-queues": 0 }),
        json!({ "logical-block-size": 513 }),
        json!({ "node-name": "nobody" }),
        json!({ "iothread": "nobody" }),
        json!({ "iothread": "e", "iothread-vq-mapping": [] }),
        json!({ "serial": "123456789012345678901" }),
    ];
    for extra in &wrong {
        let refused = add(server, "e", extra);
        assert!(refused.get("error").is_some(), "{extra}: {refused}");
    }
    assert!(add(server, "a", &json!({})).get("error").is_some(), "the id is taken");
    assert!(server.image("disk-a").exists() && server.socket("b").exists());
    pause(Duration::from_millis(100));
    assert_eq!(server.fds(), fds);
    assert!(!threads(server).contains(&"e\n".to_owned()), "the export's own thread is gone with it");
    let good = add(server, "e", &json!({}));
    assert!(good.get("return").is_some(), "the id was given back each time: {good}");
    assert!(threads(server).contains(&"e\n".to_owned()));
    server.qmp("block-export-del", &json!({ "id": "e" }));
    scene.still_good();
}

/// The names of the server's threads, each with its line end.
fn threads(server: &Watched) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("it runs");
    tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok()).collect()
}

fn qmp(server: &Watched) -> PathBuf {
    server.dir().join("control.sock")
}

fn ask(monitor: &mut Qmp, command: &str, arguments: Value) {
    let reply = monitor.ask(&json!({ "execute": command, "arguments": arguments }));
    assert!(reply.get("return").is_some(), "{command}: {reply}");
}
