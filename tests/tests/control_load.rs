//! What one client of the control socket asks for, or leaves unread, keeps nobody else waiting: other clients, signals and the
//! service manager's watchdog have their turn in between.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use trellis_tests::process::wait_for;
use trellis_tests::vhost_user::wire::pause;
use trellis_tests::watched::Watched;

/// A client that takes long lines as fast as they come, and reads only when it is asked to.
struct Session(BufReader<UnixStream>);

impl Session {
    fn negotiated(server: &Watched) -> Self {
        let stream = UnixStream::connect(server.dir().join("control.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut session = Self(BufReader::with_capacity(1 << 20, stream));
        session.line();
        session.send(&json!({ "execute": "qmp_capabilities" }));
        session.line();
        session
    }

    fn send(&mut self, message: &Value) {
        self.0.get_mut().write_all(message.to_string().as_bytes()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer in time");
        line
    }

    /// The answer, as it came.
    fn execute(&mut self, command: &str, arguments: &Value) -> String {
        self.send(&json!({ "execute": command, "arguments": arguments }));
        let answer = self.line();
        assert!(answer.starts_with("{\"return\": "), "{command}: {}", &answer[..answer.len().min(1000)]);
        answer
    }
}

/// Chains of nodes, each as deep as a chain may be.
fn add_chains(session: &mut Session, driver: &str, chains: usize) {
    for chain in 0..chains {
        let lowest = json!({ "driver": "null-co", "node-name": format!("n{chain}-0"), "size": 1 << 20 });
        session.execute("blockdev-add", &lowest);
        for above in 1..DEPTH {
            let (name, file) = (format!("n{chain}-{above}"), format!("n{chain}-{}", above - 1));
            session.execute("blockdev-add", &json!({ "driver": driver, "node-name": name, "file": file }));
        }
    }
}

/// How long another client waits for an answer at the most while `work` goes on.
fn others_wait(server: &Watched, work: impl FnOnce()) -> Duration {
    let (mut other, over) = (Session::negotiated(server), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let longest = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                let asked = Instant::now();
                other.execute("query-version", &json!({}));
                longest = longest.max(asked.elapsed());
            }
            longest
        });
        work();
        over.store(true, Ordering::Relaxed);
        longest.join().unwrap()
    })
}

fn rows(answer: &str) -> usize {
    serde_json::from_str::<Value>(answer).unwrap()["return"].as_array().unwrap().len()
}

/// Processor time of the control thread.
fn control_time(server: &Watched) -> Duration {
    let spent = fs::read_to_string(format!("/proc/{0}/task/{0}/schedstat", server.pid())).unwrap();
    Duration::from_nanos(spent.split(' ').next().unwrap().parse().unwrap())
}

fn limit_descriptors(server: &Watched, limit: u32) {
    let arguments = [format!("--nofile={limit}:1024"), format!("--pid={}", server.pid())];
    assert!(Command::new("prlimit").args(arguments).status().unwrap().success());
}

/// To wait for a client that may read as well as write takes a descriptor more.
#[test]
fn a_client_that_does_not_read_costs_no_time_where_descriptors_run_short() {
    let server = Watched::builder().start();
    let mut session = Session::negotiated(&server);
    limit_descriptors(&server, 3);
    let before = control_time(&server);
    let long = "x".repeat(8 << 10);
    for number in 0..COMMANDS {
        session.send(&json!({ "execute": "query-version", "id": [number, long] }));
        pause(Duration::from_millis(50));
    }
    let spent = control_time(&server) - before;
    assert!(spent < Duration::from_millis(150), "the control thread computed for {spent:?}");
    limit_descriptors(&server, 1024);
    for number in 0..COMMANDS {
        let answer: Value = serde_json::from_str(&session.line()).unwrap();
        assert_eq!(answer["id"][0], number);
    }
}

/// The more stands on a node, the more often each answer tells of it.
#[test]
fn a_query_of_many_nodes_lets_others_in_between() {
    let server = Watched::builder().start();
    let mut session = Session::negotiated(&server);
    add_chains(&mut session, "copy-on-read", 20);
    for (command, arguments) in
        [("query-named-block-nodes", json!({})), ("query-blockstats", json!({ "query-nodes": true }))]
    {
        let longest = others_wait(&server, || {
            let answer = session.execute(command, &arguments);
            assert_eq!(rows(&answer), 20 * DEPTH);
        });
        assert!(longest < A_MOMENT, "{command} kept others waiting for {longest:?}");
    }
}

/// Images that change places while a list is made are in no list twice, one above the other for ever.
#[test]
fn a_query_of_nodes_that_change_places_ends() {
    let server = Watched::builder().start();
    let mut session = Session::negotiated(&server);
    let limited =
        Command::new("prlimit").args([format!("--as={}", 4_u64 << 30), format!("--pid={}", server.pid())]).status();
    assert!(limited.unwrap().success());
    let image = |number: usize, backing: Option<usize>| {
        let backing = backing.map(|below| format!("q{below}"));
        json!({ "driver": "qcow2", "node-name": format!("q{number}"), "file": format!("f{number}"), "read-only": true,
            "backing": backing })
    };
    for number in [0, 1] {
        let path = server.dir().join(format!("{number}.qcow2"));
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status();
        assert!(made.unwrap().success());
        let file = json!({ "driver": "file", "node-name": format!("f{number}"), "filename": path, "read-only": true });
        session.execute("blockdev-add", &file);
        session.execute("blockdev-add", &image(number, None));
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut other = Session::negotiated(&server);
            while !over.load(Ordering::Relaxed) {
                for (above, below) in [(0, 1), (1, 0)] {
                    other.execute("blockdev-reopen", &json!({ "options": [image(above, Some(below))] }));
                    other.execute("blockdev-reopen", &json!({ "options": [image(above, None)] }));
                }
            }
        });
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            let answer = session.execute("query-named-block-nodes", &json!({}));
            let answer: Value = serde_json::from_str(&answer).unwrap();
            for node in answer["return"].as_array().unwrap() {
                let below = &node["image"]["backing-image"];
                assert!(below["backing-image"].is_null(), "{node}");
                assert_eq!(node["backing_file"], below["filename"], "one moment");
            }
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_transaction_of_many_steps_takes_no_time_to_speak_of() {
    let server = Watched::builder().start();
    let mut session = Session::negotiated(&server);
    add_chains(&mut session, "raw", 20);
    let adds = (0..2000).map(|number| {
        let data = json!({ "node": format!("n{}-0", number % 20), "name": format!("b{number}") });
        json!({ "type": "block-dirty-bitmap-add", "data": data })
    });
    let adds = json!({ "actions": adds.collect::<Vec<_>>() });
    let reopens = (0..20).map(|chain| {
        let options = |above| {
            json!({ "driver": "raw", "node-name": format!("n{chain}-{above}"), "file": format!("n{chain}-{}", above - 1) })
        };
        json!({ "type": "blockdev-reopen", "data": { "options": (1..DEPTH).map(options).collect::<Vec<_>>() } })
    });
    let reopens = json!({ "actions": reopens.collect::<Vec<_>>() });
    for actions in [adds, reopens] {
        let longest = others_wait(&server, || {
            session.execute("transaction", &actions);
        });
        assert!(longest < A_MOMENT, "a transaction kept others waiting for {longest:?}");
    }
}

/// All actions are made in one turn, on a node that has as many bitmaps as a node may have.
#[test]
fn a_transaction_has_a_number_of_actions_that_can_be_made_in_a_turn() {
    let server = Watched::builder().start();
    let mut session = Session::negotiated(&server);
    session.execute("blockdev-add", &json!({ "driver": "null-co", "node-name": "n", "size": 1 << 20 }));
    let actions = |kind: &str, numbers: std::ops::Range<usize>| {
        let action = |number| json!({ "type": kind, "data": { "node": "n", "name": format!("b{number}") } });
        json!({ "actions": numbers.map(action).collect::<Vec<_>>() })
    };
    let too_many = actions("block-dirty-bitmap-add", 0..ACTIONS + 1);
    session.send(&json!({ "execute": "transaction", "arguments": too_many }));
    let answer: Value = serde_json::from_str(&session.line()).unwrap();
    assert_eq!(answer["error"]["desc"], format!("A transaction may not have more than {ACTIONS} actions"));
    for from in [0, ACTIONS, 2 * ACTIONS] {
        session.execute("transaction", &actions("block-dirty-bitmap-add", from..from + ACTIONS));
    }
    // There may be one bitmap less than four times as many.
    let last = actions("block-dirty-bitmap-add", 3 * ACTIONS..4 * ACTIONS - 1);
    let all = actions("block-dirty-bitmap-remove", 0..ACTIONS);
    for actions in [last, all] {
        let longest = others_wait(&server, || {
            session.execute("transaction", &actions);
        });
        assert!(longest < A_WHILE, "a transaction kept others waiting for {longest:?}");
    }
}

#[test]
fn a_client_that_leaves_while_its_list_is_made_leaves_nothing_behind() {
    let server = Watched::builder().start();
    let mut session = Session::negotiated(&server);
    add_chains(&mut session, "raw", 10);
    let whole = control_time(&server);
    assert_eq!(rows(&session.execute("query-blockstats", &json!({ "query-nodes": true }))), 10 * DEPTH);
    let whole = control_time(&server) - whole;
    let (fds, spent) = (server.fds(), control_time(&server));
    for _ in 0..20 {
        let mut leaving = Session::negotiated(&server);
        leaving.send(&json!({ "execute": "query-blockstats", "arguments": { "query-nodes": true } }));
    }
    session.execute("query-version", &json!({}));
    wait_for("the end of the sessions", PATIENCE, || (server.fds() == fds).then_some(()));
    let spent = control_time(&server) - spent;
    assert!(spent < 10 * whole, "{spent:?} for twenty lists that nobody waits for, where one takes {whole:?}");
}

const DEPTH: usize = 63;
/// As many as a transaction may have.
const ACTIONS: usize = 16_384;
/// Far more than others may be kept waiting, and far less than they were.
const A_MOMENT: Duration = Duration::from_millis(200);
/// The same where it was half a minute: tens of thousands of bitmaps take tens of milliseconds, several times that under load.
const A_WHILE: Duration = Duration::from_secs(1);
/// Their answers fill the socket, and then what the daemon keeps for the client.
const COMMANDS: u32 = 45;
const PATIENCE: Duration = Duration::from_secs(20);
