//! Images that a daemon has open, and `trellis-img`: refused in `qemu-img`'s words with its exit code, whichever daemon it is,
//! and not changed.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::json;
use trellis_tests::server::Server;

/// `trellis-img` of the build that the test itself comes from.
fn trellis_img() -> std::path::PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("trellis-img");
    assert!(program.exists(), "build it: `cargo build -p trellis-img`");
    program
}

fn run(program: &Path, folder: &Path, line: &str) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } =
        Command::new("timeout").arg("30").arg(program).args(line.split(' ')).current_dir(folder).output().unwrap();
    let said = String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr);
    (status.code(), said.replace("trellis-img: ", "qemu-img: "))
}

#[test]
fn an_image_that_a_daemon_writes_is_left_alone() {
    for start in [Server::start, Server::start_peer] {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        for line in [
            "create -q -f qcow2 base.qcow2 1M",
            "create -q -f qcow2 -b base.qcow2 -F qcow2 a.qcow2",
            "create -q b.raw 1M",
        ] {
            assert_eq!(run(Path::new("qemu-img"), at, line), (Some(0), String::new()));
        }
        let server = start(at, &[]);
        let mut qmp = server.qmp();
        let file = json!({ "driver": "file", "filename": at.join("a.qcow2") });
        let base = json!({ "driver": "file", "filename": at.join("base.qcow2") });
        let backing = json!({ "driver": "qcow2", "file": base });
        let options = json!({ "driver": "qcow2", "node-name": "disk", "file": file, "backing": backing });
        qmp.execute("blockdev-add", &options);
        let addr = json!({ "type": "unix", "path": at.join("x.sock") });
        let export =
            json!({ "type": "vhost-user-blk", "id": "x", "node-name": "disk", "writable": true, "addr": addr });
        qmp.execute("block-export-add", &export);
        let before = std::fs::read(at.join("a.qcow2")).unwrap();
        for line in [
            "info a.qcow2",
            "check a.qcow2",
            "check -r all a.qcow2",
            "map a.qcow2",
            "compare a.qcow2 b.raw",
            "resize a.qcow2 2M",
            "snapshot -c x a.qcow2",
            "amend -o lazy_refcounts=on a.qcow2",
            "bitmap --add a.qcow2 b0",
            "rebase -b  -q a.qcow2",
            "rebase -u -b  a.qcow2",
            "commit a.qcow2",
            "convert -O raw a.qcow2 x.raw",
            "convert -n -f raw -O qcow2 b.raw a.qcow2",
            "convert -f raw -O qcow2 b.raw a.qcow2",
            "create -f qcow2 a.qcow2 1M",
            "create -f raw a.qcow2 1M",
            "dd if=b.raw of=a.qcow2",
            "resize base.qcow2 2M",
            "info -U a.qcow2",
        ] {
            let ours = run(&trellis_img(), at, line);
            let theirs = run(Path::new("qemu-img"), at, line);
            let masked =
                |said: &str| said.lines().filter(|line| !line.contains("disk size")).collect::<Vec<_>>().join("\n");
            if line.starts_with("commit") {
                // Ours meets the lock of the layer below first.
                assert_eq!(
                    (ours.0, ours.1.contains("lock\nIs another process")),
                    (theirs.0, true),
                    "{line}: {}",
                    ours.1
                );
            } else {
                let both = [&ours, &theirs].map(|ran| (ran.0, masked(&ran.1)));
                assert_eq!(both[0], both[1], "left: ours, right: qemu-img, {line}");
            }
            assert!(std::fs::read(at.join("a.qcow2")).unwrap() == before, "{line} has changed the image");
        }
        qmp.execute("block-export-del", &json!({ "id": "x" }));
        qmp.event("BLOCK_EXPORT_DELETED");
        qmp.execute("blockdev-del", &json!({ "node-name": "disk" }));
        assert_eq!(run(&trellis_img(), at, "check -q a.qcow2"), (Some(0), String::new()));
    }
}
