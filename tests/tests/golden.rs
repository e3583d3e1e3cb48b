//! The control socket's words, kept in files: a whole session, and the schema, which is the API.
//!
//! A diff in either file is a change that operators see. `TRELLIS_BLESS=1` rewrites them.

use std::fs::File;
use std::time::Duration;

use serde_json::json;
use trellis_tests::golden;
use trellis_tests::lines::Lines;
use trellis_tests::process::wait_for;
use trellis_tests::server::Server;

#[test]
fn a_session_reads_as_it_always_did() {
    let folder = tempfile::tempdir().unwrap();
    File::create(folder.path().join("image.raw")).unwrap().set_len(1 << 20).unwrap();
    let mut server = Server::start(folder.path(), &[]);
    let listens = || Lines::connect(server.control()).ok();
    let mut lines = wait_for("the control socket", Duration::from_secs(20), listens);
    golden::replay("session.txt", &mut lines, folder.path().to_str().unwrap());
    // The session ends with `quit`.
    assert!(server.wait().success());
}

#[test]
fn the_schema_is_the_reviewed_one() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path(), &[]);
    golden::same("schema.json", &server.qmp().execute("query-qmp-schema", &json!({})));
}
