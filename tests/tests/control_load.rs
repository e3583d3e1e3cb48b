//! What one client of the control socket asks for, or leaves unread, keeps nobody else waiting: other clients, signals and the
//! service manager's watchdog have their turn in between.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use serde_json::{Value, json};
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};
use trellis_tests::lines::Lines;
use trellis_tests::vhost_user::wire::pause;
use trellis_tests::watched::Watched;

/// A session of which every byte is ours.
struct Session(Lines);

impl Session {
    fn negotiated(server: &Watched) -> Self {
        let mut session = Self(Lines::connect(&server.dir().join("control.sock")).unwrap());
        session.line();
        session.send(&json!({ "execute": "qmp_capabilities" }));
        session.line();
        session
    }

    fn send(&mut self, message: &Value) {
        self.0.send(&message.to_string()).unwrap();
    }

    fn line(&mut self) -> String {
        self.0.next(Instant::now() + PATIENCE).expect("an answer in time")
    }
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

/// Their answers fill the socket, and then what the daemon keeps for the client.
const COMMANDS: u32 = 45;
const PATIENCE: Duration = Duration::from_secs(20);
