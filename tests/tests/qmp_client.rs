//! The control socket through the eyes of qemu.qmp, the official client: the scenarios of `python/qmp_client.py`,
//! each against a server of its own.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

use std::path::Path;
use std::process::Command;

use trellis_tests::cloud_kernel::cache;
use trellis_tests::server::Server;

#[test]
fn version_commands_and_schema_agree() {
    run("greeting");
}

#[test]
fn a_client_may_leave_in_any_way_and_another_come() {
    run("reconnect");
}

#[test]
fn nodes_come_and_go() {
    run("nodes");
}

#[test]
fn exports_come_and_go_with_an_event() {
    run("exports");
}

#[test]
fn bad_commands_are_refused_with_the_right_class() {
    run("errors");
}

#[test]
fn iothreads_come_and_go() {
    run("iothreads");
}

#[test]
fn two_monitors_share_one_graph() {
    run("two_monitors");
}

#[test]
fn quit_is_answered_and_ends_the_process_well() {
    let mut server = run("leave");
    let status = server.wait();
    assert!(status.success(), "the server ended with {status}");
}

/// Runs one scenario, and gives back the server that it ran against.
fn run(scenario: &str) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let second = format!("socket,id=second,path={}/second.sock,server=on,wait=off", folder.path().display());
    let server = Server::start(folder.path(), &["--chardev", &second, "--monitor", "chardev=second"]);

    let python = cache().join("venv/bin/python");
    assert!(python.exists(), "no {}: run `.ci/setup`, which brings the QMP client", python.display());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/qmp_client.py");
    let output = Command::new(python).arg(script).arg(scenario).arg(folder.path()).output().unwrap();
    assert!(output.status.success(), "{scenario}: {}", String::from_utf8_lossy(&output.stderr));
    server
}
