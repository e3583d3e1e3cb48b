//! Encrypted disks through the daemon: the same words as `qemu-storage-daemon`'s, and no secret anywhere where it is not
//! needed.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use trellis_tests::qmp::Qmp;
use trellis_tests::server::Server;
use trellis_tests::vhost_user::wire::pause;

/// A daemon with a folder of its own.
struct Side {
    qmp: Qmp,
    folder: tempfile::TempDir,
    server: Server,
}

impl Side {
    fn new(ours: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let start = if ours { Server::start } else { Server::start_peer };
        let server = start(folder.path(), &[]);
        Self { qmp: server.qmp(), folder, server }
    }

    fn both() -> [Self; 2] {
        [true, false].map(Self::new)
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn tell(&mut self, command: &str, arguments: Value) -> Value {
        self.qmp.execute(command, &arguments)
    }

    /// Why it is refused; empty if it is not. The folder's name is the same in both.
    fn refused(&mut self, command: &str, arguments: &Value) -> String {
        let answer = self.qmp.try_execute(command, arguments);
        answer.err().map(|error| error.desc.replace(self.folder.path().to_str().unwrap(), "DIR")).unwrap_or_default()
    }

    fn secret(&mut self, id: &str, data: &str) {
        self.tell("object-add", json!({ "qom-type": "secret", "id": id, "data": data }));
    }

    /// Makes an image, and gives why it could not.
    fn create(&mut self, name: &str, more: &Value) -> Option<Value> {
        let filename = self.path(name);
        File::create(&filename).unwrap();
        let mut options = json!({
            "driver": "luks", "size": 1 << 20, "file": { "driver": "file", "filename": filename }
        });
        if more.get("driver").is_none() {
            options["iter-time"] = json!(10);
        }
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.job("blockdev-create", json!({ "job-id": "make", "options": options }))
    }

    /// Carries a job called `make` out, and gives why it failed.
    fn job(&mut self, command: &str, arguments: Value) -> Option<Value> {
        self.tell(command, arguments);
        while self.qmp.event("JOB_STATUS_CHANGE")["status"] != "concluded" {}
        let jobs = self.tell("query-jobs", json!({}));
        self.tell("job-dismiss", json!({ "id": "make" }));
        jobs[0].get("error").cloned()
    }

    fn node(&self, name: &str, secret: &str) -> Value {
        let file = json!({ "driver": "file", "filename": self.path(name) });
        json!({ "driver": "luks", "node-name": "disk", "key-secret": secret, "file": file })
    }
}

#[test]
fn an_image_is_made_and_described_as_qemu_does() {
    let seen = Side::both().map(|mut side| {
        side.secret("word", "open sesame");
        assert_eq!(side.create("plain.luks", &json!({ "key-secret": "word" })), None);
        let other = json!({
            "key-secret": "word", "cipher-alg": "serpent-128", "cipher-mode": "cbc", "ivgen-alg": "essiv",
            "ivgen-hash-alg": "sha256", "hash-alg": "sha512"
        });
        assert_eq!(side.create("other.luks", &other), None);
        let described = ["plain.luks", "other.luks"].map(|name| {
            let node = side.node(name, "word");
            side.tell("blockdev-add", node);
            let nodes = side.tell("query-named-block-nodes", json!({ "flat": true }));
            side.tell("blockdev-del", json!({ "node-name": "disk" }));
            let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap().clone();
            let mut data = node["image"]["format-specific"]["data"].clone();
            // What no two images have in common.
            for member in ["uuid", "master-key-iters"] {
                assert!(data.as_object_mut().unwrap().remove(member).is_some());
            }
            assert!(data["slots"][0].as_object_mut().unwrap().remove("iters").is_some());
            let of_image = ["format", "virtual-size", "encrypted"].map(|member| node["image"][member].clone());
            (data, of_image, node["encrypted"].clone(), node["drv"].clone())
        });
        let sizes = ["plain.luks", "other.luks"].map(|name| std::fs::metadata(side.path(name)).unwrap().len());
        (described, sizes)
    });
    assert_eq!(seen[0], seen[1]);
}

#[test]
fn refusals_are_those_that_clients_know() {
    let seen = Side::both().map(|mut side| {
        side.secret("word", "open sesame");
        side.secret("wrong", "open says me");
        side.secret("short", "0123");
        side.secret("long", "0123456789abcdef0123456789abcdef");
        assert_eq!(side.create("plain.luks", &json!({ "key-secret": "word" })), None);
        std::fs::write(side.path("bad.b64"), "%%%").unwrap();
        let object = |more: Value| {
            let mut all = json!({ "qom-type": "secret", "id": "other" });
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            ("object-add", all)
        };
        let missing = side.path("missing");
        let mut cases = vec![
            object(json!({})),
            object(json!({ "data": "a", "file": "b" })),
            object(json!({ "data": "a", "id": "word" })),
            object(json!({ "data": "a", "keyid": "nobody", "iv": "AAECAwQFBgcICQoLDA0ODw==" })),
            object(json!({ "data": "a", "keyid": "word" })),
            object(json!({ "data": "a", "keyid": "short", "iv": "AAECAwQFBgcICQoLDA0ODw==" })),
            object(json!({ "data": "a", "keyid": "long", "iv": "AAEC" })),
            object(json!({ "data": "a", "keyid": "long" })),
            object(json!({ "data": "a", "format": "hex" })),
            ("qom-get", json!({ "path": "/objects/word", "property": "nothing" })),
            ("object-del", json!({ "id": "nobody" })),
        ];
        for secret in ["nobody", "wrong"] {
            cases.push(("blockdev-add", side.node("plain.luks", secret)));
        }
        let mut without = side.node("plain.luks", "word");
        without.as_object_mut().unwrap().remove("key-secret");
        cases.push(("blockdev-add", without));
        let said: Vec<_> = cases.iter().map(|(command, arguments)| side.refused(command, arguments)).collect();
        // These are refused in other words.
        for other in [json!({ "file": missing }), json!({ "format": "base64", "file": side.path("bad.b64") })] {
            let (command, arguments) = object(other);
            assert_ne!(side.refused(command, &arguments), "");
        }
        let missing = side.create("new.luks", &json!({ "key-secret": "nobody" }));
        (said, missing)
    });
    let [ours, theirs] = seen;
    // Where the image is named as well, the reason comes last.
    let differ = |(ours, theirs): &(&String, &String)| theirs.is_empty() || !ours.ends_with(theirs.as_str());
    let others: Vec<_> = ours.0.iter().zip(&theirs.0).filter(differ).collect();
    assert_eq!(others, []);
    assert_eq!(ours.1, theirs.1);
}

/// The key slots in a qcow2 image, and what is refused; QEMU says the same.
#[test]
fn key_slots_in_a_qcow2_image_are_changed_as_qemu_does() {
    let seen = Side::both().map(|mut side| {
        for (id, word) in [("word", "open sesame"), ("other", "open says me")] {
            side.secret(id, word);
        }
        let encrypt = json!({ "format": "luks", "key-secret": "word", "iter-time": 10 });
        assert_eq!(side.create("disk.qcow2", &json!({ "driver": "qcow2", "encrypt": encrypt })), None);
        assert_eq!(side.create("plain.qcow2", &json!({ "driver": "qcow2" })), None);
        let file = json!({ "driver": "file", "filename": side.path("disk.qcow2") });
        let encrypt = json!({ "format": "luks", "key-secret": "word" });
        side.tell("blockdev-add", json!({ "driver": "qcow2", "node-name": "disk", "encrypt": encrypt, "file": file }));
        let file = json!({ "driver": "file", "filename": side.path("plain.qcow2") });
        side.tell("blockdev-add", json!({ "driver": "qcow2", "node-name": "plain", "file": file }));
        let mut said = Vec::new();
        for (node, force, change) in [
            ("plain", false, json!({ "state": "active", "new-secret": "other" })),
            ("disk", false, json!({ "state": "active", "new-secret": "other", "keyslot": 2, "iter-time": 10 })),
            ("disk", false, json!({ "state": "active", "new-secret": "nobody" })),
            ("disk", false, json!({ "state": "active", "new-secret": "other", "secret": "word", "iter-time": 10 })),
            ("disk", false, json!({ "state": "inactive", "keyslot": 0 })),
            ("disk", false, json!({ "state": "inactive", "old-secret": "other" })),
            ("disk", true, json!({ "state": "inactive", "keyslot": 1 })),
        ] {
            let mut encrypt = json!({ "format": "luks" });
            encrypt.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let options = json!({ "driver": "qcow2", "encrypt": encrypt });
            said.push(side.job(
                "x-blockdev-amend",
                json!({ "job-id": "make", "node-name": node, "options": options, "force": force }),
            ));
            let nodes = side.tell("query-named-block-nodes", json!({ "flat": true }));
            let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap();
            let slots = &node["image"]["format-specific"]["data"]["encrypt"]["slots"];
            let active: Vec<_> = slots.as_array().unwrap().iter().map(|slot| slot["active"].clone()).collect();
            said.push(Some(json!(active)));
        }
        for name in ["disk", "plain"] {
            side.tell("blockdev-del", json!({ "node-name": name }));
        }
        said
    });
    let [ours, theirs] = seen;
    let differ = |(ours, theirs): &(&Option<Value>, &Option<Value>)| ours != theirs;
    let mut others: Vec<_> = ours.iter().zip(&theirs).filter(differ).collect();
    // The last slot stays, for a reason in other words.
    others.retain(|(ours, _)| !ours.as_ref().is_some_and(|said| said.to_string().contains("this needs 'force'")));
    assert_eq!(others, []);
    assert_eq!(ours.iter().flatten().filter(|said| said.is_string()).count(), 3);
}

/// A secret that is encrypted with another one, made as QEMU's manual says.
#[test]
fn a_wrapped_secret_opens_what_the_plain_one_does() {
    let seen = Side::both().map(|mut side| {
        std::fs::write(side.path("master"), "0123456789abcdef0123456789abcdef").unwrap();
        std::fs::write(side.path("word"), "open sesame").unwrap();
        let key = "3031323334353637383961626364656630313233343536373839616263646566";
        let iv = "000102030405060708090a0b0c0d0e0f";
        let arguments = ["enc", "-aes-256-cbc", "-a", "-K", key, "-iv", iv, "-in", &side.path("word")];
        let wrapped = Command::new("openssl").args(arguments).output().unwrap();
        let wrapped = String::from_utf8(wrapped.stdout).unwrap().trim().to_owned();
        let master = side.path("master");
        side.tell("object-add", json!({ "qom-type": "secret", "id": "master", "file": master }));
        side.tell(
            "object-add",
            json!({
                "qom-type": "secret", "id": "word", "keyid": "master", "format": "base64", "data": wrapped,
                "iv": "AAECAwQFBgcICQoLDA0ODw=="
            }),
        );
        side.secret("plain", "open sesame");
        assert_eq!(side.create("plain.luks", &json!({ "key-secret": "plain" })), None);
        let node = side.node("plain.luks", "word");
        side.refused("blockdev-add", &node)
    });
    assert_eq!(seen, ["", ""]);
}

/// Neither the passphrase nor the key of the disk is to be found where nobody needs it any more, however the passphrase came;
/// and while somebody does, the passphrase is in no answer and in no log.
#[test]
fn secrets_leave_nothing_behind() {
    const MARKERS: [&str; 5] = [
        "unmistakable passphrase 8d1f of a file",
        "unmistakable passphrase 77c3 of a command, and long enough for a buffer to grow under it, as texts do",
        "unmistakable passphrase 905a in base64",
        "unmistakable passphrase 41e9 of the command line",
        "unmistakable passphrase 2b60 of the command line, in JSON",
    ];
    let folder = tempfile::tempdir().unwrap();
    let encoded = base64(MARKERS[2].as_bytes());
    let inline = format!("--object=secret,id=w3,data={}", MARKERS[3].replace(',', ",,"));
    let object = json!({ "qom-type": "secret", "id": "w4", "data": MARKERS[4] }).to_string();
    let server = Server::start(folder.path(), &[&inline, "--object", &object]);
    let mut side = Side { qmp: server.qmp(), folder, server };
    std::fs::write(side.path("word"), MARKERS[0]).unwrap();
    let file = side.path("word");
    side.tell("object-add", json!({ "qom-type": "secret", "id": "w0", "file": file }));
    side.tell("object-add", json!({ "qom-type": "secret", "id": "w1", "data": MARKERS[1] }));
    side.tell("object-add", json!({ "qom-type": "secret", "id": "w2", "data": encoded, "format": "base64" }));
    let argv = std::fs::read(format!("/proc/{}/cmdline", side.server.pid())).unwrap();
    assert!(!has(&argv, b"unmistakable"), "{}", String::from_utf8_lossy(&argv));
    let mut answers = Vec::new();
    // What is refused is forgotten, too.
    for wrong in [
        json!({ "id": "w1", "data": MARKERS[1] }),
        json!({ "id": "w9", "data": MARKERS[1], "nothing": 1 }),
        json!({ "id": "w9", "data": MARKERS[1], "file": MARKERS[1] }),
        json!({ "id": "w9", "data": MARKERS[2], "format": "base64" }),
        json!({ "id": 1, "data": MARKERS[1] }),
    ] {
        let mut arguments = wrong;
        arguments["qom-type"] = json!("secret");
        let refused = side.refused("object-add", &arguments);
        assert_ne!(refused, "");
        answers.push(json!(refused));
    }
    let mut keys = Vec::new();
    for (number, marker) in MARKERS.iter().enumerate() {
        for kind in ["luks1", "luks2", "qcow2"] {
            let (name, secret) = (format!("{number}.{kind}"), format!("w{number}"));
            std::fs::write(side.path("key"), marker).unwrap();
            let mut node = side.node(&name, &secret);
            match kind {
                "luks1" => assert_eq!(side.create(&name, &json!({ "key-secret": secret })), None),
                "luks2" => {
                    File::create(side.path(&name)).unwrap().set_len(17 << 20).unwrap();
                    let quick = ["--pbkdf", "argon2id", "--pbkdf-memory", "64", "--pbkdf-force-iterations", "4"];
                    let format = ["-q", "luksFormat", "--type", "luks2", "--key-file", &side.path("key")];
                    let format = Command::new("cryptsetup").args(format).arg(side.path(&name)).args(quick).status();
                    assert!(format.unwrap().success());
                }
                _ => {
                    let encrypt = json!({ "format": "luks", "key-secret": secret, "iter-time": 10 });
                    assert_eq!(side.create(&name, &json!({ "driver": "qcow2", "encrypt": encrypt })), None);
                    let encrypt = json!({ "format": "luks", "key-secret": secret });
                    let file = node["file"].clone();
                    node = json!({ "driver": "qcow2", "node-name": "disk", "encrypt": encrypt, "file": file });
                }
            }
            side.tell("blockdev-add", node);
            assert!(holds(&side, marker.as_bytes()), "{name}: the search finds what is there");
            if kind != "qcow2" {
                let key = volume_key(&side, &name);
                // The cipher keeps it in two halves.
                assert!(holds(&side, &key[..32]), "{name}: the search finds what is there");
                keys.push((name, key));
            }
            answers.extend([
                side.tell("query-named-block-nodes", json!({})),
                side.tell("query-blockstats", json!({})),
                side.tell("query-jobs", json!({})),
                json!(side.qmp.take_events()),
            ]);
            side.tell("blockdev-del", json!({ "node-name": "disk" }));
        }
    }
    for number in 0..MARKERS.len() {
        let path = format!("/objects/w{number}");
        answers.push(side.tell("qom-list", json!({ "path": path })));
        answers.push(side.tell("qom-get", json!({ "path": path, "property": "file" })));
        answers.push(json!(side.refused("qom-get", &json!({ "path": path, "property": "data" }))));
    }
    answers.push(side.tell("query-qmp-schema", json!({})));
    let is_told = |text: &str| text.contains("unmistakable") || text.contains(&encoded);
    assert!(answers.iter().all(|answer| !is_told(&answer.to_string())), "{answers:?}");
    for (name, key) in &keys {
        for half in key.chunks(32) {
            assert!(gone(&side, half), "{name}: the key of the disk is still there");
        }
    }
    for number in 0..MARKERS.len() {
        side.tell("object-del", json!({ "id": format!("w{number}") }));
    }
    for marker in MARKERS {
        assert!(gone(&side, marker.as_bytes()), "'{marker}' is still there");
        // Also a part of it, which a buffer that grew may have left.
        assert!(gone(&side, &marker.as_bytes()[..30]), "a part of '{marker}' is still there");
        assert!(gone(&side, &base64(marker.as_bytes()).as_bytes()[..30]), "'{marker}' is still there, in base64");
    }
    let said = side.server.said();
    assert!(!is_told(&said), "{said}");
}

fn base64(bytes: &[u8]) -> String {
    let output =
        Command::new("sh").args(["-c", "printf %s \"$0\" | base64 -w0", str::from_utf8(bytes).unwrap()]).output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

/// A secret that the kernel keeps for the user; and keys that are not to be had.
#[test]
fn the_kernels_keys_open_disks() {
    let seen = Side::both().map(|mut side| {
        let name = format!("trellis-test-{}", side.server.pid());
        let plain = Key::add(&name, "open sesame");
        let encoded = Key::add(&format!("{name}-encoded"), "b3BlbiBzZXNhbWU=");
        let gone = Key::add(&format!("{name}-gone"), "open sesame");
        let lost = gone.0;
        drop(gone);
        side.secret("word", "open sesame");
        assert_eq!(side.create("plain.luks", &json!({ "key-secret": "word" })), None);
        let keyring = |id: &str, serial: i32| json!({ "qom-type": "secret_keyring", "id": id, "serial": serial });
        side.tell("object-add", keyring("kept", plain.0));
        let mut base64 = keyring("encoded", encoded.0);
        base64["format"] = json!("base64");
        side.tell("object-add", base64);
        let mut said = Vec::new();
        for secret in ["kept", "encoded"] {
            let node = side.node("plain.luks", secret);
            said.push(side.refused("blockdev-add", &node));
            side.tell("blockdev-del", json!({ "node-name": "disk" }));
            for property in ["type", "format", "keyid", "iv"] {
                let asked = json!({ "path": format!("/objects/{secret}"), "property": property });
                said.push(side.tell("qom-get", asked).to_string());
            }
        }
        for id in ["kept", "word"] {
            said.push(side.tell("qom-list", json!({ "path": format!("/objects/{id}") })).to_string());
        }
        // It was read once: the disk opens when the key is gone, and the object is.
        drop((plain, encoded));
        let node = side.node("plain.luks", "kept");
        said.push(side.refused("blockdev-add", &node));
        let asked = json!({ "path": "/objects/kept", "property": "serial" });
        let shown = side.tell("qom-get", asked.clone()).as_i64();
        let refused = [lost, 0, i32::MAX].map(|serial| side.refused("object-add", &keyring("other", serial)));
        assert!(refused.iter().all(|refused| !refused.is_empty()), "{refused:?}");
        let own = side.refused("qom-get", &json!({ "path": "/objects/kept", "property": "data" }));
        side.tell("object-del", json!({ "id": "kept" }));
        (said, shown.is_some(), own)
    });
    assert_eq!(seen[0], seen[1]);
}

/// A key of the user, gone with the value.
struct Key(i32);

impl Key {
    fn add(name: &str, data: &str) -> Self {
        let output = Command::new("keyctl").args(["add", "user", name, data, "@u"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let number = String::from_utf8(output.stdout).unwrap().trim().parse();
        Self(number.unwrap_or_else(|_| panic!("the user has to have a keyring: {said}")))
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        let number = self.0.to_string();
        let _ = Command::new("keyctl").args(["revoke", &number]).status();
        let _ = Command::new("keyctl").args(["unlink", &number, "@u"]).stderr(Stdio::null()).status();
    }
}

/// An error of the command line that has a secret in it does not repeat it.
#[test]
fn the_command_line_is_not_repeated() {
    let program = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("trellisd");
    for option in [
        "secret,id=1,data=unmistakable",
        "secret,id=a,data=unmistakable,format=base64,zz=1",
        // A comma in a secret that was not doubled.
        "secret,id=a,data=ab,unmistakable",
        "secret,id=a,data=ab,unmistakable=c",
        "secret,id=a,data=ab,unmistakable.0=c",
        "secret,id=a,data=ab,format=unmistakable",
        "secret,id=a,dta=unmistakable",
        "unmistakable,id=a",
        r#"{"qom-type":"secret","id":"1","d\u0061ta":"unmistakable"}"#,
        r#"{"qom-type":"secret","id":"a","unmistakable":"x"}"#,
        r#"{"qom-type":"secret","id":"a","data":"unmistakable""#,
        "data=unmistakable",
    ] {
        let output = Command::new(&program).args(["--object", option]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && !said.is_empty() && !said.contains("unmistakable"), "{said}");
    }
    let output = Command::new(&program).args(["--object", "iothread"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.ends_with("--object: Parameter 'id' is missing\n"), "{said}");
}

/// A secret that stands on the command line, or in a command, is flagged; one in a file, or one that is encrypted, is not.
#[test]
fn an_inline_secret_is_flagged() {
    let mut side = Side::new(true);
    std::fs::write(side.path("master"), "0123456789abcdef0123456789abcdef").unwrap();
    let master = side.path("master");
    side.tell("object-add", json!({ "qom-type": "secret", "id": "master", "file": master }));
    side.tell("object-add", json!({
        "qom-type": "secret", "id": "wrapped", "keyid": "master", "format": "base64", "data": "MYNSl5uYV6V9tOH5RSXtDA==",
        "iv": "AAECAwQFBgcICQoLDA0ODw=="
    }));
    assert!(!side.server.said().contains("was given with `data`"), "{}", side.server.said());
    side.secret("inline", "open sesame");
    let said = side.server.said();
    assert!(said.contains("was given with `data`") && said.contains("inline") && !said.contains("sesame"), "{said}");
}

/// A file that has no end, or none yet, holds no thread.
#[test]
fn a_secret_is_in_a_file_or_comes_through_a_pipe() {
    let mut side = Side::new(true);
    let refuse = |side: &mut Side, file: &str| {
        side.refused("object-add", &json!({ "qom-type": "secret", "id": "word", "file": file }))
    };
    for file in ["/dev/zero", "/dev"] {
        let refused = refuse(&mut side, file);
        assert!(refused.ends_with("it is no regular file, nor a pipe"), "{refused}");
    }

    let pipe = side.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let refused = refuse(&mut side, &pipe);
    assert!(refused.ends_with("the pipe was not written and closed within 10 s"), "{refused}");

    let script = format!("exec > {pipe}; printf 'open '; sleep 0.3; printf sesame");
    let mut writer = Command::new("sh").args(["-c", &script]).spawn().unwrap();
    side.tell("object-add", json!({ "qom-type": "secret", "id": "word", "file": pipe }));
    assert!(writer.wait().unwrap().success());
    side.secret("same", "open sesame");
    assert_eq!(side.create("plain.luks", &json!({ "key-secret": "word" })), None);
    let node = side.node("plain.luks", "same");
    side.tell("blockdev-add", node);

    // More than there may be is not read to its end.
    let script = format!("head -c 1000000 /dev/zero > {pipe}");
    let mut writer = Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).spawn().unwrap();
    let refused = side.refused("object-add", &json!({ "qom-type": "secret", "id": "long", "file": pipe }));
    assert!(refused.ends_with("is longer than 65536 bytes"), "{refused}");
    assert!(!writer.wait().unwrap().success(), "the writer hears that nobody reads");
}

/// As cryptsetup gets it out of the header.
fn volume_key(side: &Side, name: &str) -> Vec<u8> {
    let arguments = ["-q", "luksDump", "--dump-master-key", "--key-file", &side.path("key"), &side.path(name)];
    let output = Command::new("cryptsetup").args(arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, hex) = text.split_once("dump:").unwrap();
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).take(128).collect();
    digits.chunks(2).map(|two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}

/// The daemon's memory has these bytes nowhere, perhaps after a moment.
fn gone(side: &Side, bytes: &[u8]) -> bool {
    let begun = Instant::now();
    while holds(side, bytes) {
        if begun.elapsed() > Duration::from_secs(3) {
            return false;
        }
        pause(Duration::from_millis(100));
    }
    true
}

fn holds(side: &Side, bytes: &[u8]) -> bool {
    let pid = side.server.pid();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let readable = maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|mode| mode.starts_with('r')));
    readable.filter_map(|line| line.split(' ').next()?.split_once('-')).any(|(start, end)| {
        let [start, end] = [start, end].map(|at| u64::from_str_radix(at, 16).unwrap());
        let mut part = vec![0; usize::try_from(end - start).unwrap()];
        memory.read_at(&mut part, start).is_ok_and(|count| has(&part[..count], bytes))
    })
}

fn has(all: &[u8], part: &[u8]) -> bool {
    let mut at = 0;
    while let Some(first) = all[at..].iter().position(|byte| *byte == part[0]) {
        at += first;
        if all[at..].starts_with(part) {
            return true;
        }
        at += 1;
    }
    false
}
