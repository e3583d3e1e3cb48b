//! What a client of the control socket may send (QMP) of `hostile-inputs.md`: bytes on the socket of a running daemon, one
//! test a row. After each, the same session and both exports work, and descriptors, memory and processor time are back.
//!
//! | row | here as, or why not |
//! |---|---|
//! | QMP-18, QMP-19, QMP-21, QMP-22, QMP-25 | in `daemon/tests/monitor.rs` |
//! | QMP-20 | an id of 1 MiB is echoed; a larger one is refused, and not echoed |
//! | QMP-23, QMP-24, QMP-26 | in `hostile_graph.rs` |
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};
use trellis_tests::lines::{LineError, Lines};
use trellis_tests::scene::{DISK, Scene};

/// A session of which every byte is ours.
struct Session {
    lines: Lines,
}

impl Session {
    /// Before negotiation.
    fn greeted(scene: &mut Scene) -> Self {
        let mut session = Self { lines: Lines::connect(&scene.server().dir().join("control.sock")).unwrap() };
        assert!(session.answer().get("QMP").is_some(), "no greeting");
        session
    }

    fn negotiated(scene: &mut Scene) -> Self {
        let mut session = Self::greeted(scene);
        session.send(b"{\"execute\":\"qmp_capabilities\"}");
        assert_eq!(session.answer(), json!({ "return": {} }));
        session
    }

    fn send(&mut self, bytes: &[u8]) {
        self.lines.send_bytes(bytes).unwrap();
    }

    fn line(&mut self) -> String {
        self.lines.next(Instant::now() + PATIENCE).expect("an answer in time")
    }

    fn answer(&mut self) -> Value {
        serde_json::from_str(&self.line()).unwrap()
    }

    /// Nothing comes for a while.
    fn is_silent(&mut self) -> bool {
        matches!(self.lines.next(Instant::now() + Duration::from_millis(200)), Err(LineError::TimedOut))
    }

    /// The session ends; what comes before is given.
    fn until_closed(&mut self) -> Vec<Value> {
        let mut answers = Vec::new();
        loop {
            match self.lines.next(Instant::now() + PATIENCE) {
                Ok(line) => answers.push(serde_json::from_str(&line).unwrap()),
                // Closed with bytes of ours unread, it is a reset.
                Err(LineError::Closed | LineError::Io(_)) => return answers,
                Err(LineError::TimedOut) => panic!("the session is still open"),
            }
        }
    }

    /// The next answer is the one to this command: all before it have been taken.
    fn works(&mut self) {
        self.send(b"{\"execute\":\"query-version\",\"id\":\"good\"}");
        let answer = self.answer();
        assert_eq!(answer["id"], "good", "{answer}");
        assert_eq!(answer["return"]["qemu"]["major"], 10);
    }

    /// An error with these words, of this class.
    fn error(&mut self, class: &str, words: &str) {
        let answer = self.answer();
        assert_eq!(answer["error"]["class"], class, "{answer}");
        let desc = answer["error"]["desc"].as_str().unwrap();
        assert!(desc.contains(words), "{desc:?} has no {words:?}");
        assert!(desc.len() < 4096, "an error repeats what it refuses");
    }

    /// Whatever was begun ends, and all errors about it are taken.
    fn resynchronise(&mut self) {
        self.send(b"\xff");
        while self.answer()["error"]["desc"] != "JSON parse error, stray '\u{fffd}'" {}
        self.works();
    }

    /// These bytes are answered by one error, and the session goes on.
    fn refused(&mut self, bytes: &[u8], words: &str) {
        self.send(bytes);
        self.error("GenericError", words);
        self.works();
    }
}

/// A scene, a session, and the look around afterwards.
fn on_a_session(attack: impl FnOnce(&mut Scene, Session)) {
    let mut scene = Scene::new();
    let session = Session::negotiated(&mut scene);
    attack(&mut scene, session);
    scene.still_good();
}

fn request(command: &str, arguments: &str) -> Vec<u8> {
    format!("{{\"execute\":\"{command}\",\"arguments\":{arguments}}}").into_bytes()
}

#[test]
fn qmp_01_a_command_before_negotiation() {
    let mut scene = Scene::new();
    let mut session = Session::greeted(&mut scene);
    for command in ["query-version", "quit", "no-such"] {
        session.send(&request(command, "{}"));
        session.error("CommandNotFound", "qmp_capabilities");
    }
    session.send(&request("qmp_capabilities", "{}"));
    assert_eq!(session.answer(), json!({ "return": {} }));
    session.works();
    drop(session);
    scene.still_good();
}

#[test]
fn qmp_02_what_is_no_request() {
    on_a_session(|_, mut session| {
        session.refused(b"{}", "'execute'");
        for text in ["[]", "\"x\"", "1\n", "null\n"] {
            session.refused(text.as_bytes(), "must be a JSON object");
        }
    });
}

#[test]
fn qmp_03_a_message_that_is_cut() {
    on_a_session(|_, mut session| {
        session.send(b"{\"execute\":\"query-ver");
        assert!(session.is_silent(), "half a message is answered");
        session.refused(b"\n", "stray");
        session.send(b"{\"execute\":");
        assert!(session.is_silent());
        session.refused(b"\xff", "stray");
        // A byte at a time is a message all the same.
        request("query-version", "{}").iter().for_each(|byte| session.send(&[*byte]));
        assert!(session.answer().get("return").is_some());
    });
}

#[test]
fn qmp_04_garbage() {
    on_a_session(|scene, mut session| {
        session.send(&[0; 99]);
        (0..99).for_each(|_| session.error("GenericError", "stray"));
        session.works();
        session.send(&[1; 5000]);
        assert_eq!(session.until_closed().len(), 100);
        let all: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        let mut session = Session::negotiated(scene);
        // It may be closed while we still write.
        let _ = session.lines.send_bytes(&all);
        session.until_closed();
    });
}

#[test]
fn qmp_05_a_fresh_start_amid_a_message() {
    on_a_session(|_, mut session| {
        session.send(b"{\"execute\":\"quit\",\"arguments\":{\xff{\"execute\":\"query-version\",\"id\":5}");
        session.error("GenericError", "stray");
        assert_eq!(session.answer()["id"], 5);
        session.works();
    });
}

#[test]
fn qmp_06_what_is_no_unicode() {
    on_a_session(|_, mut session| {
        for bytes in [b"\x80".as_slice(), b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3"] {
            session.refused(&[b"{\"execute\":\"".as_slice(), bytes, b"\"}"].concat(), "invalid UTF-8");
        }
        for escape in ["\\ud800", "\\udc00", "\\ud800\\ud800"] {
            session.refused(format!("{{\"execute\":\"{escape}\"}}").as_bytes(), "not a valid Unicode");
        }
    });
}

#[test]
fn qmp_07_an_overlong_nul() {
    on_a_session(|_, mut session| session.refused(b"{\"execute\":\"qu\xc0\x80it\"}", "invalid UTF-8"));
}

#[test]
fn qmp_08_a_nul_in_a_name() {
    on_a_session(|scene, mut session| {
        session.send(b"{\"execute\":\"quit\\u0000\"}");
        session.error("CommandNotFound", "quit");
        session.works();
        let node = r#"{"driver":"null-co","node-name":"a\u0000b"}"#;
        session.refused(&request("blockdev-add", node), "node-name");
        let image = scene.server().image("disk-b");
        let file = format!(r#"{{"driver":"file","node-name":"n","filename":"{}\u0000x"}}"#, image.display());
        session.refused(&request("blockdev-add", &file), "filename");
    });
}

#[test]
fn qmp_09_single_quotes() {
    on_a_session(|_, mut session| {
        session.send(b"{'execute':'query-version','id':'it\\'s'}");
        let answer = session.answer();
        assert_eq!(answer["id"], "it's");
        assert!(answer.get("return").is_some());
        session.works();
    });
}

#[test]
fn qmp_10_commas_and_comments() {
    on_a_session(|_, mut session| {
        session.refused(b"{\"execute\":\"query-version\",}", "expecting value");
        session.refused(b"{\"execute\":\"query-version\",\"arguments\":{},\"id\":[1,]}", "expecting value");
        session.send(b"{\"execute\":\"query-version\" /* c */}");
        session.error("GenericError", "stray '/'");
        session.resynchronise();
    });
}

#[test]
fn qmp_11_a_key_twice() {
    on_a_session(|_, mut session| {
        session.refused(b"{\"execute\":\"query-version\",\"execute\":\"quit\"}", "duplicate key");
        let node = r#"{"driver":"null-co","node-name":"a","node-name":"b"}"#;
        session.refused(&request("blockdev-add", node), "duplicate key");
    });
}

#[test]
fn qmp_12_members_that_nobody_knows() {
    on_a_session(|_, mut session| {
        session.refused(b"{\"execute\":\"query-version\",\"foo\":1}", "'foo'");
        session.refused(&request("query-version", r#"{"foo":1}"#), "'foo'");
        session.refused(&request("blockdev-add", r#"{"driver":"null-co","node-name":"n","foo":1}"#), "'foo'");
    });
}

#[test]
fn qmp_13_members_of_another_type() {
    on_a_session(|_, mut session| {
        for arguments in ["[]", "null", "1", "\"\""] {
            session.refused(&request("query-version", arguments), "'arguments' must be an object");
        }
        for name in ["1", "null", "[]", "{}"] {
            session.refused(format!("{{\"execute\":{name}}}").as_bytes(), "'execute' must be a string");
        }
    });
}

#[test]
fn qmp_14_out_of_band_without_the_capability() {
    on_a_session(|_, mut session| session.refused(b"{\"exec-oob\":\"query-version\"}", "'exec-oob' is unexpected"));
}

#[test]
fn qmp_15_numbers_that_are_no_size() {
    on_a_session(|scene, mut session| {
        for size in ["18446744073709551616", "-1", "1.5", "1e400", "\"1\"", "9223372036854775808", "null"] {
            // What is no number at all breaks the message, and its end is an error too.
            session.send(&request("block_resize", &format!("{{\"node-name\":\"disk-a\",\"size\":{size}}}")));
            session.error("GenericError", if size == "1e400" { "number out of range" } else { "'size'" });
            session.resynchronise();
        }
        let image = scene.server().image("disk-a");
        assert_eq!(fs::metadata(image).unwrap().size(), DISK, "the disk has another size");
    });
}

#[test]
fn qmp_16_deep_nesting() {
    on_a_session(|scene, mut session| {
        let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        let with_id = |depth| format!("{{\"execute\":\"query-version\",\"id\":{}}}", nested(depth));
        session.send(with_id(1023).as_bytes());
        // Deeper than serde_json reads.
        let answer = session.line();
        assert!(answer.starts_with("{\"return\"") && answer.contains(&nested(1023)), "1024 levels are taken");
        session.refused(with_id(1029).as_bytes(), "nesting depth");
        let before = scene.server().rss_anon_kib();
        session.send(&vec![b'['; 1_000_000]);
        session.error("GenericError", "nesting depth");
        let grown = scene.server().rss_anon_kib().saturating_sub(before);
        assert!(grown < 4096, "{grown} KiB for brackets");
        session.refused(b"\xff", "stray");
    });
}

#[test]
fn qmp_17_a_string_of_a_mebibyte() {
    on_a_session(|_, mut session| {
        let long = "x".repeat(1 << 20);
        let begun = Instant::now();
        session.refused(
            &request("blockdev-add", &format!(r#"{{"driver":"null-co","node-name":"{long}"}}"#)),
            "Node name too long",
        );
        session.send(format!("{{\"execute\":\"{long}\"}}").as_bytes());
        assert_eq!(session.answer()["error"]["class"], "CommandNotFound");
        session.works();
        assert!(begun.elapsed() < PATIENCE / 4, "it took {:?}", begun.elapsed());
    });
}

#[test]
fn qmp_20_any_id() {
    on_a_session(|_, mut session| {
        for id in [json!({ "a": [1, 2.5, "é", { "b": null }] }), json!(null), json!("x".repeat(1 << 20))] {
            for (command, member) in [("query-version", "return"), ("no-such", "error")] {
                session.send(json!({ "execute": command, "id": id }).to_string().as_bytes());
                let answer = session.answer();
                assert!(answer.get(member).is_some());
                assert_eq!(answer["id"], id);
            }
        }
        let larger = json!({ "execute": "query-version", "id": "x".repeat((1 << 20) + 1) });
        session.send(larger.to_string().as_bytes());
        let answer = session.answer();
        assert_eq!(answer["error"]["desc"], "QMP input member 'id' is larger than 1 MiB");
        assert_eq!(answer.get("id"), None);
        session.works();
    });
}

/// The name is that of a file and of a socket, so that it is opened, told and logged.
#[test]
fn qmp_27_formats_and_terminal_codes_in_names() {
    on_a_session(|scene, mut session| {
        let name = "%s%n $(reboot) `id` \u{1b}[31m";
        let dir = scene.server().dir().to_owned();
        let path = dir.join(name);
        fs::write(&path, [0; 4096]).unwrap();
        let mut run = |command: &str, arguments: Value| {
            session.send(json!({ "execute": command, "arguments": arguments }).to_string().as_bytes());
            loop {
                let answer = session.answer();
                if answer.get("event").is_none() {
                    return answer;
                }
            }
        };
        let missing = json!({ "driver": "file", "node-name": "n", "filename": dir.join("no").join(name) });
        let desc = run("blockdev-add", missing)["error"]["desc"].as_str().unwrap().to_owned();
        assert!(desc.contains("%s%n $(reboot) `id` \\u{1b}[31m"), "{desc:?}");
        let file = json!({ "driver": "file", "node-name": "n", "filename": path });
        assert_eq!(run("blockdev-add", file), json!({ "return": {} }));
        let nodes = run("query-named-block-nodes", json!({}));
        let told = nodes["return"].as_array().unwrap().iter().find(|node| node["node-name"] == "n").unwrap();
        assert_eq!(told["file"], path.to_str().unwrap());
        let socket = dir.join(format!("{name}.sock"));
        let addr = json!({ "type": "unix", "path": socket });
        let export = json!({ "type": "vhost-user-blk", "id": "x", "node-name": "n", "addr": addr });
        assert_eq!(run("block-export-add", export), json!({ "return": {} }));
        assert!(socket.exists());
        assert_eq!(run("block-export-del", json!({ "id": "x" })), json!({ "return": {} }));
        // The export is gone a little later than its removal is answered.
        let end = Instant::now() + PATIENCE;
        while run("blockdev-del", json!({ "node-name": "n" })).get("error").is_some() && Instant::now() < end {}
        drop(session);
        let log = scene.server().log();
        assert!(!log.contains('\u{1b}'), "a terminal code in the log: {log:?}");
    });
}

/// Longer than anything here may take.
const PATIENCE: Duration = Duration::from_secs(20);
