//! The program as its operators meet it: started with a command line, spoken to over its QMP socket, ended by signals.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A running daemon with one QMP socket, in a directory of its own.
struct Server {
    child: Child,
    folder: tempfile::TempDir,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let child = program(folder.path()).args(["--qmp", "q.sock"]).args(arguments).spawn().unwrap();
        let mut server = Self { child, folder };
        server.wait_for("q.sock");
        server
    }

    /// And where its log goes.
    fn with_piped_stderr() -> (Self, ChildStderr) {
        let folder = tempfile::tempdir().unwrap();
        let mut command = program(folder.path());
        let mut child = command.args(["--qmp", "q.sock"]).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let mut server = Self { child, folder };
        server.wait_for("q.sock");
        (server, stderr)
    }

    /// Makes the image `NAME.qcow2` and opens it as the node `name`.
    fn add_qcow2(&self, client: &mut Client, name: &str) {
        let path = self.path(&format!("{name}.qcow2"));
        let mut make = |options: Value| {
            client.execute("blockdev-create", json!({ "job-id": "make", "options": options }));
            within(LIMIT, || client.execute("query-jobs", json!({}))[0]["status"] == "concluded");
            assert_eq!(client.execute("query-jobs", json!({}))[0].get("error"), None);
            client.execute("job-dismiss", json!({ "id": "make" }));
        };
        make(json!({ "driver": "file", "filename": path, "size": 0 }));
        let file = json!({ "driver": "file", "filename": path });
        make(json!({ "driver": "qcow2", "file": file, "size": 1 << 20 }));
        client.execute("blockdev-add", json!({ "driver": "qcow2", "node-name": name, "file": file }));
    }

    fn has_open(&self, name: &str) -> bool {
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).into_iter().flatten();
        open.flatten().any(|entry| std::fs::read_link(entry.path()).is_ok_and(|path| path == self.path(name)))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn wait_for(&mut self, name: &str) {
        within(LIMIT, || {
            assert!(self.child.try_wait().unwrap().is_none(), "it ended");
            UnixStream::connect(self.path(name)).is_ok()
        });
    }

    fn client(&self) -> Client {
        let mut client = Client::connect(&self.path("q.sock"));
        assert_eq!(client.say(r#"{"execute": "qmp_capabilities"}"#), json!({ "return": {} }));
        client
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    /// The exit code, once the process has ended by itself.
    fn ended(mut self) -> (Option<i32>, tempfile::TempDir) {
        let mut code = None;
        within(LIMIT, || {
            code = self.child.try_wait().unwrap().map(|status| status.code());
            code.is_some()
        });
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        (code.flatten(), folder)
    }

    /// Bytes that stay with the process.
    fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// What it holds while nobody is connected, once it has served somebody.
    fn at_rest(&self) -> AtRest {
        self.client().execute("query-version", json!({}));
        let mut now = AtRest { descriptors: self.descriptors(), resident: self.resident() };
        within(LIMIT, || {
            let before =
                std::mem::replace(&mut now, AtRest { descriptors: self.descriptors(), resident: self.resident() });
            self.idles() && before.descriptors == now.descriptors
        });
        now
    }

    /// Everybody else has gone: nothing of what they did is kept, and nobody computes.
    #[track_caller]
    fn is_back(&self, before: &AtRest) {
        self.client().execute("query-version", json!({}));
        within(LIMIT, || self.descriptors() <= before.descriptors);
        within(LIMIT, || self.resident() < before.resident + MORE_RESIDENT);
        within(LIMIT, || self.idles());
    }

    /// Whether it hardly computes for a tenth of a second.
    fn idles(&self) -> bool {
        let before = self.cpu_ticks();
        #[expect(clippy::disallowed_methods, reason = "something must not happen meanwhile")]
        std::thread::sleep(Duration::from_millis(100));
        self.cpu_ticks() - before <= 1
    }

    /// Processor time used so far, in ticks of 10 ms.
    fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        // User and system time are the 12th and 13th word after the name, which is in parentheses.
        let (_, words) = stat.rsplit_once(')').unwrap();
        words.split_whitespace().skip(11).take(2).map(|word| word.parse::<u64>().unwrap()).sum()
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// See [`Server::at_rest`].
struct AtRest {
    descriptors: usize,
    resident: u64,
}

/// What the allocator may keep of messages that are long gone.
const MORE_RESIDENT: u64 = 16 << 20;

/// A byte-level client.
struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    greeting: Value,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut client = Self { stream, lines, greeting: Value::Null };
        client.greeting = client.line();
        client
    }

    fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert!(line.is_ascii() && line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    /// The answer to one request, events skipped.
    fn say(&mut self, text: &str) -> Value {
        self.send(text);
        self.answer()
    }

    fn answer(&mut self) -> Value {
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
        }
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let mut answer = self.say(&json!({ "execute": command, "arguments": arguments }).to_string());
        answer.as_object_mut().unwrap().remove("return").unwrap_or_else(|| panic!("{command}: {answer}"))
    }

    fn refused(&mut self, command: &str, arguments: Value) -> (String, String) {
        let answer = self.say(&json!({ "execute": command, "arguments": arguments }).to_string());
        let word = |name| answer["error"][name].as_str().unwrap_or_else(|| panic!("{command}: {answer}")).to_owned();
        (word("class"), word("desc"))
    }

    /// An empty qcow2 image in a file below the throttle node `slow`, which is in the group `g`.
    fn add_image_below_a_throttle(&mut self, server: &Server) {
        server.add_qcow2(self, "made");
        self.execute("blockdev-del", json!({ "node-name": "made" }));
        let file = json!({ "driver": "file", "filename": server.path("made.qcow2") });
        let slow = json!({ "driver": "throttle", "node-name": "slow", "throttle-group": "g", "file": file });
        self.execute("blockdev-add", slow);
    }

    /// What `query-blockstats` says of this node, if there is one.
    fn node(&mut self, name: &str) -> Option<Value> {
        let all = self.execute("query-blockstats", json!({ "query-nodes": true }));
        all.as_array().unwrap().iter().find(|node| node["node-name"] == name).cloned()
    }

    /// Whether the other side has closed.
    fn is_closed(&mut self) -> bool {
        matches!(self.lines.read(&mut [0; 4096]), Ok(0) | Err(_))
    }
}

fn program(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trellisd"));
    command.current_dir(folder).env("XDG_RUNTIME_DIR", folder).env_remove("RUNTIME_DIRECTORY");
    command.stdin(Stdio::null());
    command
}

/// Runs the program with arguments that let it end by itself.
fn run(arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let mut child =
        program(folder.path()).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    within(LIMIT, || child.try_wait().unwrap().is_some());
    child.wait_with_output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[track_caller]
fn within(limit: Duration, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit, "it did not happen within {limit:?}");
        #[expect(clippy::disallowed_methods, reason = "the test waits for another process")]
        std::thread::sleep(Duration::from_millis(5));
    }
}

const LIMIT: Duration = Duration::from_secs(20);

// ---- the session ---------------------------------------------------------------------------------------------------

#[test]
fn nothing_is_answered_before_negotiation() {
    let server = Server::start(&[]);
    let mut client = Client::connect(&server.path("q.sock"));
    assert_eq!(client.greeting["QMP"]["version"]["qemu"], json!({ "major": 10, "minor": 0, "micro": 2 }));
    let early = client.say(r#"{"execute": "query-version", "id": 1}"#);
    assert_eq!((&early["error"]["class"], &early["id"]), (&json!("CommandNotFound"), &json!(1)));
    assert_eq!(client.say(r#"{"execute": "qmp_capabilities"}"#), json!({ "return": {} }));
    assert_eq!(client.execute("query-version", json!({}))["qemu"]["major"], 10);
    let again = client.say(r#"{"execute": "qmp_capabilities"}"#);
    assert_eq!(again["error"]["class"], "CommandNotFound");
}

#[test]
fn what_is_listed_can_be_run_and_what_cannot_is_not_listed() {
    let server = Server::start(&[]);
    let mut client = server.client();
    let listed = client.execute("query-commands", json!({}));
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|command| command["name"].as_str().unwrap()).collect();
    let schema = client.execute("query-qmp-schema", json!({}));
    let described =
        schema.as_array().unwrap().iter().filter(|entry| entry["meta-type"] == "command").map(|e| &e["name"]);
    assert_eq!(described.collect::<Vec<_>>().len(), names.len());
    for name in names.iter().filter(|name| **name != "quit" && **name != "qmp_capabilities") {
        // Whatever it says to an argument that nobody has, it knows the command.
        let (class, desc) = client.refused(name, json!({ "nobody-has-this": 1 }));
        assert_eq!(class, "GenericError", "{name}: {desc}");
    }
    assert_eq!(client.refused("no-such-command", json!({})).0, "CommandNotFound");
}

#[test]
fn nodes_and_their_refusals() {
    let server = Server::start(&["--blockdev", "null-co,node-name=n0,size=1048576"]);
    let mut client = server.client();
    client.execute("blockdev-add", json!({ "driver": "raw", "node-name": "r0", "file": "n0" }));
    let nodes = client.execute("query-named-block-nodes", json!({ "flat": true }));
    let sizes: Vec<_> = nodes.as_array().unwrap().iter().map(|node| &node["image"]["virtual-size"]).collect();
    assert_eq!(sizes, [1 << 20, 1 << 20]);
    assert!(client.refused("blockdev-del", json!({ "node-name": "n0" })).1.contains("in use"));
    assert_eq!(
        client.refused("blockdev-del", json!({ "node-name": "zz" })).1,
        "Failed to find node with node-name='zz'"
    );
    assert_eq!(
        client.refused("block_resize", json!({ "node-name": "n0", "size": -1 })).1,
        "Parameter 'size' expects a >0 size"
    );
    assert_eq!(client.refused("block_resize", json!({ "size": 512 })).1, "Cannot find device='' nor node-name=''");
    client.refused("block_resize", json!({ "node-name": "n0", "size": 1000 }));
    assert_eq!(
        client.refused("block-set-write-threshold", json!({ "node-name": "zz", "write-threshold": 1 })).1,
        "Device 'zz' not found"
    );
    client.execute("block-set-write-threshold", json!({ "node-name": "n0", "write-threshold": 4096 }));
    let stats = client.execute("query-blockstats", json!({ "query-nodes": true }));
    assert_eq!(stats[1]["parent"]["node-name"], "n0");
    assert_eq!(client.execute("query-blockstats", json!({})), json!([]));
    assert_eq!(client.execute("query-block", json!({})), json!([]));
    client.execute("blockdev-del", json!({ "node-name": "r0" }));
    client.execute("blockdev-del", json!({ "node-name": "n0" }));
}

#[test]
fn objects_are_seen_changed_and_guarded() {
    let server = Server::start(&["--object", "iothread,id=io0"]);
    let mut client = server.client();
    client.execute("qom-set", json!({ "path": "/objects/io0", "property": "poll-max-ns", "value": 5 }));
    assert_eq!(client.execute("qom-get", json!({ "path": "io0", "property": "poll-max-ns" })), 5);
    let missing = client.refused("qom-get", json!({ "path": "/objects/zz", "property": "type" }));
    assert_eq!(missing, ("DeviceNotFound".to_owned(), "Device '/objects/zz' not found".to_owned()));
    let listed = client.execute("qom-list", json!({ "path": "/objects" }));
    assert_eq!(listed[1], json!({ "name": "io0", "type": "child<iothread>" }));
    let types = client.execute("qom-list-types", json!({ "implements": "user-creatable" }));
    let expected = [
        ("iothread", "event-loop-base"),
        ("secret", "secret_common"),
        ("secret_keyring", "secret_common"),
        ("throttle-group", "object"),
    ];
    assert_eq!(types, json!(expected.map(|(name, parent)| json!({ "name": name, "parent": parent }))));
    client.execute("object-del", json!({ "id": "io0" }));
    assert_eq!(client.refused("object-del", json!({ "id": "io0" })).1, "object 'io0' not found");
}

/// GR-24: a group that a node uses stays, and its limits change under it.
#[test]
fn a_throttle_group_is_seen_changed_and_guarded() {
    let server = Server::start(&["--object", "throttle-group,id=g0,limits.iops-total=100,x-bps-read=9"]);
    let mut client = server.client();
    let limits = |client: &mut Client| client.execute("qom-get", json!({ "path": "g0", "property": "limits" }));
    let now = limits(&mut client);
    assert_eq!([&now["iops-total"], &now["bps-read"], &now["bps-read-max-length"]], [100, 9, 1]);
    client.execute("qom-set", json!({ "path": "g0", "property": "limits", "value": { "bps-read": 0 } }));
    assert_eq!(client.execute("qom-get", json!({ "path": "g0", "property": "x-bps-read" })), 0);
    assert_eq!(limits(&mut client)["iops-total"], 100, "what is left out stays");
    for (property, value, reason) in [
        (
            "limits",
            json!({ "iops-read": 1 }),
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        ("limits", json!({ "zz": 1 }), "Parameter 'limits.zz' is unexpected"),
        ("limits", json!(5), "Invalid parameter type for 'limits', expected: object"),
        ("x-iops-total", json!(5), "Property cannot be set after initialization"),
        ("type", json!("x"), "Property 'throttle-group.type' is not writable"),
        ("zz", json!(5), "Property 'throttle-group.zz' not found"),
    ] {
        let set = json!({ "path": "/objects/g0", "property": property, "value": value });
        assert_eq!(client.refused("qom-set", set).1, reason);
    }
    assert_eq!(limits(&mut client)["iops-total"], 100, "a refused change changes nothing");
    let listed = client.execute("qom-list", json!({ "path": "/objects" }));
    assert_eq!(listed[1], json!({ "name": "g0", "type": "child<throttle-group>" }));
    let properties = client.execute("qom-list-properties", json!({ "typename": "throttle-group" }));
    assert_eq!(properties, client.execute("qom-list", json!({ "path": "/objects/g0" })));
    assert_eq!(properties.as_array().unwrap().len(), 21);

    let node =
        json!({ "driver": "throttle", "node-name": "t0", "throttle-group": "g0", "file": { "driver": "null-co" } });
    client.execute("blockdev-add", node.clone());
    assert_eq!(client.refused("object-del", json!({ "id": "g0" })).1, "object 'g0' is in use, can not be deleted");
    client.execute("blockdev-del", json!({ "node-name": "t0" }));
    client.execute("object-del", json!({ "id": "g0" }));
    assert_eq!(client.refused("blockdev-add", node).1, "Throttle group 'g0' does not exist");
    let wrong = json!({ "qom-type": "throttle-group", "id": "g0", "limits": { "bps-total": 1, "bps-total-max": 0, "iops-total-max": 1 } });
    assert_eq!(client.refused("object-add", wrong).1, "bps_max/iops_max require corresponding bps/iops values");
    client.execute("object-add", json!({ "qom-type": "throttle-group", "id": "g0" }));
}

#[test]
fn an_export_holds_its_node_and_its_thread_and_tells_both_monitors_of_its_end() {
    let server =
        Server::start(&["--object", "iothread,id=io0", "--blockdev", "null-co,node-name=n0", "--qmp", "q2.sock"]);
    let mut client = server.client();
    let mut other = Client::connect(&server.path("q2.sock"));
    other.say(r#"{"execute": "qmp_capabilities"}"#);
    let path = server.path("e0.sock");
    let options = json!({
        "type": "vhost-user-blk", "id": "e0", "node-name": "n0", "iothread": "io0", "addr": { "type": "unix", "path": path },
    });
    client.execute("block-export-add", options.clone());
    assert!(path.exists());
    assert_eq!(client.refused("block-export-add", options).1, "Block export id 'e0' is already in use");
    let shown = json!([{ "id": "e0", "type": "vhost-user-blk", "node-name": "n0", "shutting-down": false }]);
    assert_eq!(client.execute("query-block-exports", json!({})), shown);
    assert!(client.refused("blockdev-del", json!({ "node-name": "n0" })).1.contains("in use"));
    assert_eq!(client.refused("object-del", json!({ "id": "io0" })).1, "object 'io0' is in use, can not be deleted");
    client.execute("block-export-del", json!({ "id": "e0" }));
    let event = other.line();
    assert_eq!((&event["event"], &event["data"]), (&json!("BLOCK_EXPORT_DELETED"), &json!({ "id": "e0" })));
    assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_700_000_000);
    assert!(!path.exists());
    client.execute("object-del", json!({ "id": "io0" }));
    assert_eq!(client.refused("block-export-del", json!({ "id": "e0" })).1, "Export 'e0' is not found");
}

#[test]
fn exports_that_make_no_sense_leave_nothing_behind() {
    let server = Server::start(&[
        "--blockdev",
        "null-co,node-name=n0",
        "--blockdev",
        "null-co,node-name=ro,read-only=on",
        "--blockdev",
        "null-co,node-name=idle,active=off",
    ]);
    let mut client = server.client();
    let file = server.path("precious");
    std::fs::write(&file, "data").unwrap();
    let long = server.path(&"a".repeat(200));
    let unix = |path: &Path| json!({ "type": "unix", "path": path });
    let good = unix(&server.path("e.sock"));
    let add = |changes: Value| {
        let mut options = json!({ "type": "vhost-user-blk", "id": "e0", "node-name": "n0", "addr": good });
        options.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        options
    };
    for (changes, sentence) in [
        (json!({ "id": "0e" }), "Invalid block export id"),
        (json!({ "node-name": "zz" }), "Cannot find device='' nor node-name='zz'"),
        (json!({ "node-name": "ro", "writable": true }), "Cannot export read-only node as writable"),
        (json!({ "iothread": "zz" }), "iothread \"zz\" not found"),
        (json!({ "allow-inactive": true }), "does not support inactive"),
        (json!({ "node-name": "idle" }), "Node 'idle' is inactive"),
        (json!({ "num-queues": 0 }), "num-queues"),
        (json!({ "num-queues": 65536 }), "num-queues"),
        (json!({ "logical-block-size": 3 }), "logical-block-size"),
        (json!({ "addr": { "type": "inet", "host": "::", "port": "1" } }), "'unix' and 'fd'"),
        (json!({ "addr": { "type": "fd", "str": "999" } }), ""),
        (json!({ "addr": unix(&file) }), ""),
        (json!({ "addr": unix(&long) }), "107 is the limit"),
        (json!({ "addr": unix(Path::new("/nonexistent/e.sock")) }), "No such file"),
        (json!({ "zz": 1 }), "'zz' is unexpected"),
    ] {
        let (class, desc) = client.refused("block-export-add", add(changes.clone()));
        assert_eq!(class, "GenericError");
        assert!(desc.contains(sentence), "{changes}: {desc}");
    }
    assert_eq!(client.execute("query-block-exports", json!({})), json!([]));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "data");
    client.execute("block-export-add", add(json!({})));
}

// ---- several clients, and clients that do not behave ---------------------------------------------------------------

#[test]
fn one_slow_client_does_not_hold_up_another() {
    let server = Server::start(&["--qmp", "q2.sock"]);
    // QMP-21: it sends for ever and reads nothing.
    let mut flood = server.client();
    flood.stream.set_nonblocking(true).unwrap();
    let line = r#"{"execute": "query-qmp-schema"}"#.repeat(64);
    let mut sent = 0_usize;
    let refused = (0..4096).any(|_| match flood.stream.write(line.as_bytes()) {
        Ok(count) => {
            sent += count;
            false
        }
        Err(_) => true,
    });
    let before = server.resident();
    let mut other = Client::connect(&server.path("q2.sock"));
    other.say(r#"{"execute": "qmp_capabilities"}"#);
    for _ in 0..100 {
        other.execute("query-version", json!({}));
    }
    within(LIMIT, || {
        (0..64).for_each(|_| sent += flood.stream.write(line.as_bytes()).unwrap_or(0));
        flood.stream.write(line.as_bytes()).is_err()
    });
    assert!(refused || sent < 64 << 20, "the socket held the client back after {sent} bytes");
    let grown = server.resident().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes were kept for a client that does not read");
}

/// The lesson of the peer, whose commands all wait for each other: a slow one holds up only who asked for it.
#[test]
fn a_slow_command_does_not_hold_up_another_monitor() {
    let second = 1_000_000_000_u64;
    let slow = format!("null-co,node-name=slow,latency-ns={second}");
    let server = Server::start(&["--blockdev", &slow, "--qmp", "q2.sock"]);
    let mut waiting = server.client();
    let mut other = Client::connect(&server.path("q2.sock"));
    other.say(r#"{"execute": "qmp_capabilities"}"#);
    let start = Instant::now();
    // Its flush takes a second.
    waiting.send(r#"{"execute": "blockdev-del", "arguments": {"node-name": "slow"}}"#);
    let mut longest = Duration::ZERO;
    for _ in 0..50 {
        let before = Instant::now();
        other.execute("blockdev-add", json!({ "driver": "null-co", "node-name": "n0" }));
        other.execute("blockdev-del", json!({ "node-name": "n0" }));
        longest = longest.max(before.elapsed());
    }
    let meanwhile = start.elapsed();
    assert_eq!(waiting.answer(), json!({ "return": {} }));
    assert!(start.elapsed() >= Duration::from_nanos(second), "the slow command was not slow");
    assert!(meanwhile < Duration::from_nanos(second), "100 commands took {meanwhile:?}");
    assert!(longest < Duration::from_millis(500), "one pair took {longest:?}");
}

/// QMP-22: whoever asked has gone, but what was asked is done, and done whole.
#[test]
fn a_command_outlives_its_client() {
    let server = Server::start(&["--object", "throttle-group,id=g"]);
    let before = server.at_rest();
    let mut other = server.client();
    other.add_image_below_a_throttle(&server);
    let limit = |client: &mut Client, bytes: u64| {
        let limits = json!({ "bps-read": bytes });
        client.execute("qom-set", json!({ "path": "g", "property": "limits", "value": limits }));
    };
    // The first read passes; each after it waits for hours, until somebody lifts the limit.
    limit(&mut other, 1);
    let mut client = server.client();
    client.send(r#"{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "q", "file": "slow"}}"#);
    within(LIMIT, || other.node("slow").is_some_and(|node| node["stats"]["rd_operations"] != 0));
    drop(client);
    assert!(other.node("q").is_none(), "the command is over already");
    other.execute("query-version", json!({}));
    assert!(other.node("q").is_none(), "the command is over before its image was read");
    limit(&mut other, 0);
    within(LIMIT, || other.node("q").is_some());
    assert!(other.refused("blockdev-del", json!({ "node-name": "slow" })).1.contains("in use"));
    for name in ["q", "slow"] {
        other.execute("blockdev-del", json!({ "node-name": name }));
    }
    drop(other);
    server.is_back(&before);
}

/// A shell that pipes commands in and closes its side still gets every answer.
#[test]
fn a_client_that_stops_sending_gets_its_answers() {
    let server = Server::start(&[]);
    let mut client = server.client();
    client.send(&r#"{"execute": "query-version"}"#.repeat(20));
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    for _ in 0..20 {
        assert!(client.line()["return"].is_object());
    }
    assert!(client.is_closed());
}

/// QMP-18.
#[test]
fn a_message_without_end_is_cut_off() {
    let server = Server::start(&[]);
    let before = server.at_rest();
    let chunk = "a".repeat(1 << 20);
    let mut client = server.client();
    client.send(r#"{"execute": ""#);
    (0..63).for_each(|_| client.send(&chunk));
    client.send(r#""}"#);
    assert_eq!(client.answer()["error"]["class"], "CommandNotFound", "a message of 63 MiB is taken");
    client.execute("query-version", json!({}));

    client.send(r#"{"execute": ""#);
    (0..63).for_each(|_| client.send(&chunk));
    let cut = (63..80).find_map(|_| client.stream.write_all(chunk.as_bytes()).err());
    let cut = cut.expect("80 MiB of one string were taken").kind();
    // Not that nobody reads any more, which would be a time-out.
    assert!([ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&cut), "{cut:?}");
    drop(client);
    server.is_back(&before);
}

/// QMP-19 and QMP-20.
#[test]
fn large_and_odd_messages() {
    let server = Server::start(&[]);
    let before = server.at_rest();
    let mut client = server.client();
    let id = json!({ "deep": ["x".repeat((1 << 20) - 100)] });
    let answer = client.say(&json!({ "execute": "query-version", "id": id }).to_string());
    assert_eq!(answer["id"], id);
    // A number and a comma are two tokens.
    let with_numbers = |count| format!("{{\"execute\": \"query-version\", \"id\": [{}1]}}", "1,".repeat(count));
    let taken = client.say(&with_numbers(1_000_000));
    assert_eq!(taken["return"]["qemu"]["major"], 10);
    assert_eq!(taken["id"].as_array().unwrap().len(), 1_000_001);
    drop(taken);
    assert_eq!(client.say(&with_numbers(1_100_000))["error"]["desc"], "JSON token count limit exceeded");
    client.execute("query-version", json!({}));
    drop(client);
    server.is_back(&before);
}

#[test]
fn requests_behind_large_answers_are_answered() {
    let server = Server::start(&[]);
    let mut client = server.client();
    for number in 0..200 {
        client.execute("blockdev-add", json!({ "driver": "null-co", "node-name": format!("n{number}") }));
    }
    client.stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    client.send(r#"{"execute":"query-named-block-nodes"}{"execute":"query-version"}{"execute":"query-version"}"#);
    assert_eq!(client.answer()["return"].as_array().unwrap().len(), 200);
    assert_eq!(client.answer()["return"]["qemu"]["major"], 10);
    assert_eq!(client.answer()["return"]["qemu"]["major"], 10);

    let id = "i".repeat(70_000);
    client.send(&format!(r#"{{"execute":"query-version","id":"{id}"}}{{"execute":"query-version"}}"#));
    assert_eq!(client.answer()["id"], id);
    assert_eq!(client.answer()["return"]["qemu"]["major"], 10);

    client.send(&r#"{"execute":"x"}"#.repeat(3000));
    for number in 0..3000 {
        assert_eq!(client.answer()["error"]["class"], "CommandNotFound", "{number}");
    }
}

/// QMP-25.
#[test]
fn connections_are_counted_and_given_back() {
    let server = Server::start(&[]);
    let before = server.at_rest();
    let crowd: Vec<_> = (0..1000).map(|_| UnixStream::connect(server.path("q.sock")).unwrap()).collect();
    let is_served = |mut stream: &UnixStream| {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        match stream.read(&mut [0; 16]) {
            Ok(count) => count > 0,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("neither greeted nor closed: {error}"),
        }
    };
    let served = crowd.iter().filter(|stream| is_served(stream)).count();
    assert_eq!(served, 64);
    drop(crowd);
    server.is_back(&before);
}

/// A health check with a time-out must not lock everybody out while a disk hangs.
#[test]
fn clients_that_have_left_take_no_place() {
    let hour = 3_600_000_000_000_u64;
    let server = Server::start(&["--blockdev", &format!("null-co,node-name=stuck,latency-ns={hour}")]);
    for number in 0..70 {
        let mut client = server.client();
        let add = json!({ "driver": "qcow2", "node-name": format!("q{number}"), "file": "stuck" });
        client.send(&json!({ "execute": "blockdev-add", "arguments": add }).to_string());
    }
    let mut half_closed = server.client();
    half_closed.send(r#"{"execute": "query-version"}"#);
    half_closed.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(half_closed.answer()["return"]["qemu"]["major"], 10);
    server.client().execute("query-version", json!({}));
}

/// QMP-23.
#[test]
fn of_two_clients_that_want_the_same_one_is_refused() {
    let server = Server::start(&[]);
    let (mut one, mut two) = (server.client(), server.client());
    let add = r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n0"}}"#;
    one.send(add);
    two.send(add);
    let answers = [one.answer(), two.answer()];
    assert_eq!(answers.iter().filter(|answer| answer["error"].is_object()).count(), 1, "{answers:?}");
}

// ---- the process ---------------------------------------------------------------------------------------------------

#[test]
fn quit_is_answered_and_everything_is_removed() {
    let server = Server::start(&["--pidfile", "x.pid", "--blockdev", "null-co,node-name=n0"]);
    within(LIMIT, || server.path("x.pid").exists());
    let pid = std::fs::read_to_string(server.path("x.pid")).unwrap();
    assert_eq!(pid.trim(), server.child.id().to_string());
    let mut client = server.client();
    assert_eq!(client.execute("quit", json!({})), json!({}));
    assert!(client.is_closed());
    let (code, folder) = server.ended();
    assert_eq!(code, Some(0));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn signals_end_it_in_good_order() {
    for signal in ["TERM", "INT", "HUP"] {
        let server = Server::start(&["--blockdev", "null-co,node-name=n0", "--object", "iothread,id=io0"]);
        let mut client = server.client();
        let addr = json!({ "type": "unix", "path": server.path("e.sock") });
        client.execute(
            "block-export-add",
            json!({ "type": "vhost-user-blk", "id": "e0", "node-name": "n0", "iothread": "io0", "addr": addr }),
        );
        server.signal(signal);
        assert_eq!(client.line()["event"], "BLOCK_EXPORT_DELETED");
        let (code, folder) = server.ended();
        assert_eq!(code, Some(0), "{signal}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{signal}");
    }
}

#[test]
fn a_second_daemon_leaves_the_first_one_s_files_alone() {
    let server = Server::start(&["--pidfile", "x.pid"]);
    within(LIMIT, || server.path("x.pid").exists());
    let second = |arguments: &[&str]| {
        let output = program(server.folder.path()).args(arguments).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        stderr(&output)
    };
    assert!(second(&["--qmp", "q.sock"]).contains("another process listens"));
    assert!(second(&["--object", "iothread,id=a", "--pidfile", "x.pid"]).contains("another process holds it"));
    server.client().execute("query-version", json!({}));
    assert!(server.path("x.pid").exists());
}

#[test]
fn a_killed_daemon_s_socket_gives_way() {
    let mut server = Server::start(&[]);
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    assert!(server.path("q.sock").exists());
    server.child = program(server.folder.path()).args(["--qmp", "q.sock"]).spawn().unwrap();
    server.wait_for("q.sock");
    server.client().execute("query-version", json!({}));
}

#[test]
fn fs_10_a_ring_that_is_refused_is_logged() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = program(folder.path());
    // It ends at the second object, which is none.
    command.args(["--object", "iothread,id=a", "--object", "iothread,id=a"]).stderr(Stdio::piped());
    let said = |command: &mut Command| stderr(&command.output().unwrap());
    let refused = "io_uring is refused";
    assert!(!said(&mut command).contains(refused));
    let log = said(command.env("TRELLIS_NO_IO_URING", "1"));
    assert_eq!(log.matches(refused).count(), 1, "{log}");
}

/// Bytes may still be under way in a disk that does not answer: one signal waits for it, a second one does not.
#[test]
fn a_second_signal_is_faster() {
    let hour = 3_600_000_000_000_u64;
    let server = Server::start(&["--blockdev", &format!("null-co,node-name=stuck,latency-ns={hour}")]);
    server.client();
    server.signal("TERM");
    #[expect(clippy::disallowed_methods, reason = "something must not happen meanwhile")]
    std::thread::sleep(Duration::from_millis(200));
    assert!(server.path("q.sock").exists(), "it waits for the flush of its node");
    let start = Instant::now();
    server.signal("TERM");
    let (code, folder) = server.ended();
    assert_eq!(code, Some(1), "a flush that did not finish is a failure");
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// `systemctl stop` after `quit` is not a second wish.
#[test]
fn a_signal_after_quit_is_the_first_one() {
    let hour = 3_600_000_000_000_u64;
    let mut server = Server::start(&["--blockdev", &format!("null-co,node-name=stuck,latency-ns={hour}")]);
    server.client().send(r#"{"execute": "quit"}"#);
    for _ in 0..2 {
        #[expect(clippy::disallowed_methods, reason = "something must not happen meanwhile")]
        std::thread::sleep(Duration::from_millis(2500));
        assert!(server.child.try_wait().unwrap().is_none(), "it waits for the flush of its node");
        server.signal("TERM");
    }
    assert_eq!(server.ended().0, Some(1));
}

/// Whoever started us may read our stderr late, or never: then lines are lost, and counted, and nothing else is.
#[test]
fn a_log_that_nobody_reads_holds_nothing_up() {
    let (mut server, mut stderr) = Server::with_piped_stderr();
    for _ in 0..2000 {
        Client::connect(&server.path("q.sock"));
    }
    server.client().execute("query-version", json!({}));
    let start = Instant::now();
    server.signal("TERM");
    let ended = |server: &mut Server| server.child.try_wait().unwrap().is_some();
    within(Duration::from_secs(2), || ended(&mut server));
    assert!(start.elapsed() < Duration::from_secs(2));
    let mut log = String::new();
    stderr.read_to_string(&mut log).unwrap();
    assert!(log.contains("a QMP client has connected"), "what fits into the pipe is there");

    // The same with a reader who wakes up.
    let (mut server, mut stderr) = Server::with_piped_stderr();
    for _ in 0..6000 {
        Client::connect(&server.path("q.sock"));
    }
    let reader = std::thread::Builder::new().spawn(move || {
        let mut log = String::new();
        stderr.read_to_string(&mut log).unwrap();
        log
    });
    server.client().execute("quit", json!({}));
    within(LIMIT, || ended(&mut server));
    let log = reader.unwrap().join().unwrap();
    assert!(log.contains("lines of the log were dropped"), "it is told that lines are missing");
    assert!(log.contains("a client asked us to quit") && log.contains("ending as asked"), "the last lines are there");
}

#[test]
fn the_last_lines_of_the_log_are_written() {
    for signals in [1, 2] {
        let (mut server, mut stderr) = Server::with_piped_stderr();
        let hour = 3_600_000_000_000_u64;
        let mut client = server.client();
        if signals == 2 {
            client.execute("blockdev-add", json!({ "driver": "null-co", "node-name": "n", "latency-ns": hour }));
        }
        for _ in 0..signals {
            server.signal("TERM");
            #[expect(clippy::disallowed_methods, reason = "the second one is to be a second one")]
            std::thread::sleep(Duration::from_millis(100));
        }
        within(LIMIT, || server.child.try_wait().unwrap().is_some());
        let mut log = String::new();
        stderr.read_to_string(&mut log).unwrap();
        assert!(log.contains("SIGTERM: ending"), "{log}");
        assert!(signals == 1 || log.contains("ending without waiting any longer"), "{log}");
    }
}

/// One disk that hangs is no reason to lose what is in memory of the others: whoever started us may kill us soon.
#[test]
fn a_stuck_node_keeps_no_other_from_being_closed() {
    let mut server = Server::start(&["--blockdev", "null-co,node-name=n,latency-ns=1000000000000"]);
    let mut client = server.client();
    server.add_qcow2(&mut client, "b");
    let mut stuck = server.client();
    stuck.send(
        &json!({ "execute": "blockdev-add", "arguments": { "driver": "qcow2", "node-name": "q", "file": "n" } })
            .to_string(),
    );
    client.execute("query-version", json!({}));
    assert!(server.has_open("b.qcow2"));
    server.signal("TERM");
    within(Duration::from_secs(5), || !server.has_open("b.qcow2"));
    assert!(server.child.try_wait().unwrap().is_none(), "it waits for the command");
    server.signal("TERM");
    let (code, folder) = server.ended();
    assert_eq!(code, Some(1), "a node that cannot be closed is a failure");
    assert!(!folder.path().join("q.sock").exists());
}

/// The same below a job that does not end, and where a second signal follows at once.
#[test]
fn a_stuck_job_keeps_no_node_from_being_closed() {
    for signals in [1, 2] {
        let mut server = Server::start(&["--blockdev", "null-co,node-name=n,latency-ns=1000000000000"]);
        let mut client = server.client();
        server.add_qcow2(&mut client, "b");
        client.execute("block-dirty-bitmap-add", json!({ "node": "b", "name": "kept", "persistent": true }));
        let options = json!({ "driver": "qcow2", "file": "n", "size": 1 << 20 });
        client.execute("blockdev-create", json!({ "job-id": "j", "options": options }));
        for _ in 0..signals {
            server.signal("TERM");
            #[expect(clippy::disallowed_methods, reason = "the second one is to be a second one")]
            std::thread::sleep(Duration::from_millis(20));
        }
        if signals == 1 {
            within(Duration::from_secs(5), || !server.has_open("b.qcow2"));
            assert!(server.child.try_wait().unwrap().is_none(), "it waits for the job");
            server.signal("TERM");
        }
        let (code, folder) = server.ended();
        assert_eq!(code, Some(1));
        let next =
            Server::start(&["--blockdev", &format!("file,node-name=f,filename={}/b.qcow2", folder.path().display())]);
        let mut client = next.client();
        client.execute("blockdev-add", json!({ "driver": "qcow2", "node-name": "b", "file": "f" }));
        let nodes = client.execute("query-named-block-nodes", json!({}));
        let bitmaps =
            nodes.as_array().unwrap().iter().find_map(|node| node.get("dirty-bitmaps")).expect("it was stored");
        assert_eq!((&bitmaps[0]["name"], bitmaps[0].get("inconsistent")), (&json!("kept"), None), "{signals} signals");
    }
}

#[test]
fn many_nodes_are_closed_soon() {
    let mut server = Server::start(&[]);
    let mut client = server.client();
    for number in 0..8000 {
        client.execute("blockdev-add", json!({ "driver": "null-co", "node-name": format!("n{number}") }));
    }
    let start = Instant::now();
    server.signal("TERM");
    within(LIMIT, || server.child.try_wait().unwrap().is_some());
    assert!(start.elapsed() < Duration::from_secs(2), "it took {:?}", start.elapsed());
}

/// What is answered with success after that would be lost.
#[test]
fn behind_quit_nothing_is_run() {
    let server = Server::start(&[]);
    let mut client = server.client();
    server.add_qcow2(&mut client, "b");
    let bitmap = json!({ "node": "b", "name": "bitmap", "persistent": true });
    let image = json!({ "driver": "file", "filename": server.path("new"), "size": 0 });
    let commands = [
        ("quit", json!({})),
        ("blockdev-add", json!({ "driver": "null-co", "node-name": "late" })),
        ("block-dirty-bitmap-add", bitmap),
        ("blockdev-create", json!({ "job-id": "late", "options": image })),
    ];
    let text = commands.map(|(command, arguments)| json!({ "execute": command, "arguments": arguments }).to_string());
    client.send(&text.concat());
    assert_eq!(client.answer(), json!({ "return": {} }));
    for _ in 1..text.len() {
        assert_eq!(client.answer()["error"]["desc"], "The daemon is ending");
    }
    assert!(client.is_closed());
    let (code, folder) = server.ended();
    assert_eq!(code, Some(0));
    assert!(!folder.path().join("new").exists());
}

#[test]
fn the_umask_says_whether_the_group_may_connect() {
    for (umask, mode) in [("077", 0o600), ("022", 0o660), ("007", 0o660), ("027", 0o660)] {
        let folder = tempfile::tempdir().unwrap();
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("umask {umask}; exec \"$0\" --qmp q.sock")).arg(env!("CARGO_BIN_EXE_trellisd"));
        let child = shell.current_dir(folder.path()).stdin(Stdio::null()).spawn().unwrap();
        let mut server = Server { child, folder };
        server.wait_for("q.sock");
        let found = std::fs::metadata(server.path("q.sock")).unwrap().permissions().mode() & 0o777;
        assert_eq!(found, mode, "umask {umask}: {found:o}");
    }
}

#[test]
fn a_start_without_a_place_for_its_error_fails_as_any_other() {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["--nonsense"][..],
        &["--blockdev", "null-co"],
        &["--object", "secret,id=s,data=open", "--blockdev", "null-co"],
        &["--daemonize", "--blockdev", "null-co"],
    ] {
        let status = program(folder.path()).args(arguments).stderr(full()).status().unwrap();
        assert_eq!(status.code(), Some(1), "{arguments:?}: {status}");
    }
}

#[test]
fn the_service_manager_hears_of_readiness_life_and_end() {
    let folder = tempfile::tempdir().unwrap();
    let manager = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let heard = || {
        let mut text = [0; 256];
        let count = manager.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..count]).into_owned()
    };
    let mut command = program(folder.path());
    command.args(["--qmp", "q.sock"]).env("NOTIFY_SOCKET", folder.path().join("notify")).env("WATCHDOG_USEC", "100000");
    let mut child = command.spawn().unwrap();
    let ready = heard();
    assert!(ready.starts_with("READY=1\n") && ready.contains("STATUS="), "{ready}");
    assert!(UnixStream::connect(folder.path().join("q.sock")).is_ok(), "ready means that clients are served");
    assert_eq!(heard().trim_end(), "WATCHDOG=1");
    assert_eq!(heard().trim_end(), "WATCHDOG=1");
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "TERM", &id]).status().unwrap().success());
    within(LIMIT, || heard().starts_with("STOPPING=1\n"));
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_listening_socket_may_be_passed_by_number() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("passed.sock");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let chardev = format!("socket,id=c,fd={},server=on,wait=off", listener.as_raw_fd());
    let mut child = program(folder.path()).args(["--chardev", &chardev, "--monitor", "c"]).spawn().unwrap();
    let mut client = Client::connect(&path);
    client.say(r#"{"execute": "qmp_capabilities"}"#);
    assert_eq!(client.execute("query-chardev", json!({}))[0]["label"], "c");
    client.execute("quit", json!({}));
    assert!(child.wait().unwrap().success());
    assert!(path.exists(), "its file belongs to who passed it");
}

#[test]
fn systemd_passes_the_control_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("q.sock");
    let mut activator = Command::new("systemd-socket-activate");
    activator.arg("--fdname=qmp").arg("-l").arg(&path).arg(env!("CARGO_BIN_EXE_trellisd"));
    let mut child = activator.stdin(Stdio::null()).spawn().expect("systemd-socket-activate is a part of systemd");
    within(LIMIT, || path.exists());
    // The activator becomes the daemon at the first connection; the connection waits meanwhile.
    let mut client = Client::connect(&path);
    client.say(r#"{"execute": "qmp_capabilities"}"#);
    assert_eq!(
        client.execute("query-block-exports", json!({})),
        json!([]),
        "with a control socket there is no scratch disk"
    );
    client.execute("quit", json!({}));
    assert!(child.wait().unwrap().success());
}

#[test]
fn options_are_obeyed_in_order() {
    let early = run(&[
        "--export",
        "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=e",
        "--blockdev",
        "null-co,node-name=n",
    ]);
    assert_eq!(early.status.code(), Some(1));
    assert_eq!(
        stderr(&early).lines().last().unwrap(),
        "trellisd: --export vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=e: \
         Cannot find device='' nor node-name='n'"
    );
    for (arguments, sentence) in [
        (&["foo"][..], "trellisd: foo: Unexpected argument"),
        (&["--zzz"], "trellisd: unrecognized option '--zzz'"),
        (&["--blockdev"], "trellisd: option '--blockdev' requires an argument"),
        (&["--blockdev", "null-co"], "'node-name' must be specified for the root node"),
        (&["--monitor", "zz"], "trellisd: --monitor zz: chardev \"zz\" not found"),
        (&["--chardev", "null,id=c", "--monitor", "c", "--monitor", "c"], "chardev 'c' is already in use"),
        (&["--nbd-server", "addr.type=unix,addr.path=x"], "no NBD server"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(stderr(&output).contains(sentence), "{}", stderr(&output));
    }
    for help in [&["--help"][..], &["--object", "help"], &["--blockdev", "file,help"], &["--export", "help"], &["-V"]] {
        let output = run(help);
        assert_eq!(output.status.code(), Some(0), "{help:?}");
        assert!(!output.stdout.is_empty());
    }
}

#[test]
fn the_foreground_ends_when_the_background_is_ready() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--daemonize", "--pidfile", "x.pid", "--qmp", "q.sock", "--blockdev", "null-co,node-name=n0"];
    let output = program(folder.path()).args(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(folder.path().join("x.pid").exists(), "ready means that the pid file is there");
    let mut client = Client::connect(&folder.path().join("q.sock"));
    client.say(r#"{"execute": "qmp_capabilities"}"#);
    client.execute("quit", json!({}));
    within(LIMIT, || std::fs::read_dir(folder.path()).unwrap().count() == 0);

    let failed = program(folder.path()).args(["--daemonize", "--blockdev", "null-co"]).output().unwrap();
    assert_eq!(failed.status.code(), Some(1));
    assert!(stderr(&failed).contains("node-name"), "the reason is seen in the foreground");
}

/// Whoever started it would go on without a daemon.
#[test]
fn a_background_that_is_ended_while_it_is_set_up_is_no_success() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--daemonize", "--chardev", "socket,id=c,path=q.sock,server=on", "--monitor", "c"];
    let mut foreground = program(folder.path()).args(arguments).spawn().unwrap();
    within(LIMIT, || folder.path().join("q.sock").exists());
    let children = format!("/proc/{0}/task/{0}/children", foreground.id());
    let background = std::fs::read_to_string(children).unwrap();
    assert!(Command::new("kill").args(["-s", "TERM", background.trim()]).status().unwrap().success());
    within(LIMIT, || foreground.try_wait().unwrap().is_some());
    assert_eq!(foreground.wait().unwrap().code(), Some(1));
    let help = run(&["--daemonize", "--blockdev", "help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(!help.stdout.is_empty());
}

/// Where the directory alone is longer than a socket's address may be.
#[test]
fn sockets_in_a_long_directory() {
    let folder = tempfile::tempdir().unwrap();
    let long = folder.path().join("d".repeat(120));
    std::fs::create_dir(&long).unwrap();
    let export = "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=e.sock";
    let arguments = ["--pidfile", "x.pid", "--blockdev", "null-co,node-name=n", "--qmp", "q.sock", "--export", export];
    let mut child = program(&long).args(arguments).spawn().unwrap();
    within(LIMIT, || {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        long.join("x.pid").exists()
    });
    assert!(long.join("e.sock").exists() && long.join("q.sock").exists());
    assert!(Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status().unwrap().success());
    assert!(child.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(&long).unwrap().count(), 0);
}

#[test]
fn an_argument_that_is_no_text_is_named() {
    let bad = std::ffi::OsStr::from_bytes(b"null-co,node-name=\xff");
    let folder = tempfile::tempdir().unwrap();
    let output = program(folder.path()).args(["--qmp", "q.sock", "--blockdev"]).arg(bad).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("option '--blockdev'"), "{}", stderr(&output));
    let joined = std::ffi::OsStr::from_bytes(b"--export=\xff");
    let output = program(folder.path()).arg(joined).output().unwrap();
    assert!(stderr(&output).contains("option '--export'"), "{}", stderr(&output));
}

#[test]
fn trace_help_is_printed() {
    for word in ["help", "?"] {
        let output = run(&["-T", word]);
        assert_eq!(output.status.code(), Some(0), "{word}");
        assert!(String::from_utf8(output.stdout).unwrap().contains("block_core"), "{word}");
    }
}

#[test]
fn a_trace_pattern_that_names_nothing_here_is_a_warning() {
    let output = run(&["-T", "blk_*_complete", "--blockdev", "null-co"]);
    assert!(stderr(&output).contains("blk_*_complete"), "{}", stderr(&output));
    assert!(stderr(&output).contains("node-name"), "the start goes on: {}", stderr(&output));
}

#[test]
fn a_monitor_that_waits_holds_up_what_follows() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--chardev", "socket,id=c,path=q.sock,server=on", "--monitor", "c", "--pidfile", "x.pid"];
    let mut child = program(folder.path()).args(arguments).spawn().unwrap();
    within(LIMIT, || folder.path().join("q.sock").exists());
    #[expect(clippy::disallowed_methods, reason = "something must not happen meanwhile")]
    std::thread::sleep(Duration::from_millis(100));
    assert!(!folder.path().join("x.pid").exists());
    let mut client = Client::connect(&folder.path().join("q.sock"));
    client.say(r#"{"execute": "qmp_capabilities"}"#);
    within(LIMIT, || folder.path().join("x.pid").exists());
    client.execute("quit", json!({}));
    assert!(child.wait().unwrap().success());
}

/// As with QEMU: whoever finds the socket may rely on all that the command line asks for.
#[test]
fn commands_wait_until_the_command_line_is_obeyed() {
    let mut server = Server::start(&[
        "--chardev",
        "socket,id=later,path=later.sock,server=on,wait=on",
        "--blockdev",
        "null-co,node-name=n",
    ]);
    let mut client = server.client();
    client.send(r#"{"execute": "query-named-block-nodes"}"#);
    client.stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let early = client.lines.fill_buf().map(<[u8]>::to_vec);
    assert!(early.is_err(), "it was answered with {early:?} while the set-up waited");
    client.stream.set_read_timeout(Some(LIMIT)).unwrap();
    server.wait_for("later.sock");
    assert_eq!(client.answer()["return"][0]["node-name"], "n");
}

#[test]
fn commands_of_a_client_that_left_before_the_command_line_was_obeyed_are_not_run() {
    let mut server = Server::start(&["--chardev", "socket,id=later,path=later.sock,server=on,wait=on"]);
    let mut leaves = server.client();
    leaves.send(r#"{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "ghost"}}"#);
    drop(leaves);
    let mut client = server.client();
    client.send(r#"{"execute": "query-named-block-nodes"}"#);
    std::thread::park_timeout(Duration::from_millis(300));
    server.wait_for("later.sock");
    assert_eq!(client.answer()["return"], json!([]));
}

#[test]
fn a_chardev_that_waits_holds_up_what_follows() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--chardev", "socket,id=c,path=q.sock,server=on", "--qmp", "later.sock", "--monitor", "c"];
    let mut child = program(folder.path()).args(arguments).spawn().unwrap();
    within(LIMIT, || folder.path().join("q.sock").exists());
    #[expect(clippy::disallowed_methods, reason = "something must not happen meanwhile")]
    std::thread::sleep(Duration::from_millis(100));
    assert!(!folder.path().join("later.sock").exists());
    let mut client = Client::connect(&folder.path().join("q.sock"));
    assert!(folder.path().join("later.sock").exists());
    client.say(r#"{"execute": "qmp_capabilities"}"#);
    client.execute("quit", json!({}));
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_monitor_on_stdin_and_stdout() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = program(folder.path());
    command.args(["--chardev", "stdio,id=c,signal=off", "--monitor", "c"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(|line| {
        let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
        line
    });
    assert!(lines.next().unwrap()["QMP"].is_object());
    let requests = r#"{"execute": "qmp_capabilities"}{"execute": "query-chardev"}{"execute": "query-qmp-schema"}{"execute": "quit"}"#;
    child.stdin.take().unwrap().write_all(requests.as_bytes()).unwrap();
    assert_eq!(lines.next().unwrap(), json!({ "return": {} }));
    assert_eq!(lines.next().unwrap()["return"][0]["filename"], "stdio");
    assert!(lines.next().unwrap()["return"].as_array().unwrap().len() > 100);
    assert_eq!(lines.next().unwrap(), json!({ "return": {} }), "the last answer is written before it ends");
    assert!(child.wait().unwrap().success());

    let twice = run(&["--chardev", "stdio,id=c", "--chardev", "stdio,id=d"]);
    assert!(stderr(&twice).contains("stdin and stdout"), "{}", stderr(&twice));
    let daemon = run(&["--daemonize", "--chardev", "stdio,id=c"]);
    assert_eq!(daemon.status.code(), Some(1));
    assert!(stderr(&daemon).contains("--daemonize"), "{}", stderr(&daemon));
}

/// The socket is somebody else's, and stays; so does the word about the thread, which changes nothing.
#[test]
fn an_export_on_a_socket_that_was_inherited() {
    let folder = tempfile::tempdir().unwrap();
    let socket = UnixListener::bind(folder.path().join("e.sock")).unwrap();
    let mut server = Command::new("sh");
    server.args(["-c", "exec \"$0\" \"$@\" 7<&0", env!("CARGO_BIN_EXE_trellisd"), "--qmp", "q.sock"]);
    server.args(["--blockdev", "null-co,node-name=n,size=1048576,read-zeroes=on", "--object", "iothread,id=t"]);
    server.args(["--export", "vhost-user-blk,id=e,node-name=n,addr.type=fd,addr.str=7,iothread=t,fixed-iothread=on"]);
    server.current_dir(folder.path()).stdin(Stdio::from(std::os::fd::OwnedFd::from(socket)));
    let mut server = Server { child: server.spawn().unwrap(), folder };
    server.wait_for("q.sock");
    // VHOST_USER_GET_FEATURES of version 1, and its answer with 8 bytes of payload.
    let ask = |mut frontend: UnixStream| {
        frontend.set_read_timeout(Some(LIMIT)).unwrap();
        frontend.write_all(&[1u32, 1, 0].map(u32::to_le_bytes).concat()).unwrap();
        let mut answer = [0; 20];
        frontend.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..12], [1u32, 5, 8].map(u32::to_le_bytes).concat());
        u64::from_le_bytes(answer[12..].try_into().unwrap())
    };
    for _ in 0..3 {
        let features = ask(UnixStream::connect(server.path("e.sock")).unwrap());
        assert_ne!(features & 1 << 32, 0, "VIRTIO_F_VERSION_1 in {features:#x}");
    }
    let mut client = server.client();
    client.execute("block-export-del", json!({ "id": "e", "mode": "hard" }));
    assert!(server.path("e.sock").exists(), "whoever made the socket removes it");
    client.execute("quit", json!({}));
    assert!(server.child.wait().unwrap().success());
}

/// A guest at the socket of QMP, or at that of another guest's disk, would be served what is not its own.
#[test]
fn no_export_takes_a_socket_of_the_daemon_s_own() {
    let server = Server::start(&["--blockdev", "null-co,node-name=n"]);
    let mut client = server.client();
    let mut export = |id: &str, addr: Value| {
        let export = json!({ "type": "vhost-user-blk", "id": id, "node-name": "n", "addr": addr });
        client.say(&json!({ "execute": "block-export-add", "arguments": export }).to_string())
    };
    let other = server.path("e.sock");
    assert_eq!(export("e", json!({ "type": "unix", "path": other })), json!({ "return": {} }));
    for number in 3..100 {
        let answer = export("f", json!({ "type": "fd", "str": number.to_string() }));
        let refused = answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("descriptor {number}: {answer}"));
        assert!(refused.contains(&format!("descriptor '{number}'")), "{refused}");
        // What we were passed by whoever runs the test is none.
        assert!(refused.contains("passed") || refused.ends_with("is not a listening unix socket"), "{refused}");
    }
}

/// What qemu-storage-daemon takes we take, or `docs/control.md` says that we do not.
#[test]
fn chardevs_as_the_peer_takes_them() {
    const BOTH: (bool, bool) = (true, true);
    const THEY: (bool, bool) = (true, false);
    const NEITHER: (bool, bool) = (false, false);
    let table = [
        ("socket,id=c,path=s,server=on,wait=off", BOTH),
        ("socket,id=c,path=s,server,nowait", BOTH),
        ("socket,id=c,path=s,server=on,wait=off,mux=off", BOTH),
        ("socket,id=c,path=s,server=on,wait=off,telnet=off", BOTH),
        ("socket,id=c,path=s,server=on,wait=off,websocket=off", BOTH),
        ("socket,id=c,path=s,server=on,wait=off,delay=on", BOTH),
        ("socket,id=c,path=s,server=on,wait=off,delay", BOTH),
        ("socket,id=c,path=s,server=on,wait=off,nodelay=on", BOTH),
        ("socket,id=c,path=s,server=on,wait=off,nodelay", BOTH),
        ("socket,id=c,path=s,server=on,wait=off,abstract=off", BOTH),
        ("socket,id=c,path=s,server=on,wait=off,abstract=off,tight=off", BOTH),
        ("stdio,id=c", BOTH),
        ("stdio,id=c,signal=off", BOTH),
        ("null,id=c", BOTH),
        ("null,id=c,mux=off", BOTH),
        ("socket,id=c,path=s,server=on,wait=off,abstract=on", THEY),
        ("socket,id=c,path=s,server=on,wait=off,telnet=on", THEY),
        ("socket,id=c,path=s,server=on,wait=off,logfile=log", THEY),
        ("ringbuf,id=c,size=64", THEY),
        ("file,id=c,path=f", THEY),
        ("socket,id=c,path=s,server=on,wait=off,tls-creds=t", NEITHER),
        ("socket,id=c,path=s,server=on,wait=off,reconnect=1", NEITHER),
        ("socket,id=c", NEITHER),
        ("null", NEITHER),
    ];
    // Whoever takes it complains about what stands behind it.
    let takes = |program: &str, line: &str| {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(program);
        command.args(["--chardev", line, "--monitor", "nobody"]).current_dir(folder.path()).stdin(Stdio::null());
        let said = stderr(&command.output().expect("qemu-storage-daemon is what we are compared with"));
        assert!(said.contains("nobody") || said.contains("--chardev") || said.contains("chardev"), "{line}: {said}");
        said.contains("\"nobody\" not found")
    };
    for (line, expected) in table {
        let found = (takes("qemu-storage-daemon", line), takes(env!("CARGO_BIN_EXE_trellisd"), line));
        assert_eq!(found, expected, "{line}");
    }
}

#[test]
fn without_options_it_serves_a_scratch_disk() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = program(folder.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut place = |name: &str| {
        let line = lines.find(|line| line.trim_start().starts_with(name)).unwrap();
        PathBuf::from(line.split_whitespace().nth(1).unwrap())
    };
    let (disk, control) = (place("disk:"), place("control:"));
    assert!(disk.exists());
    let mut client = Client::connect(&control);
    client.say(r#"{"execute": "qmp_capabilities"}"#);
    let exports = client.execute("query-block-exports", json!({}));
    assert_eq!(exports[0]["node-name"], "scratch");
    client.execute("quit", json!({}));
    assert!(child.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
