//! Storage that fails under a running daemon (FS of `hostile-inputs.md`): what its guest, its operator and whoever
//! started it are told. What the drivers do with each failure is `block-core/tests/hostile_fs.rs`, with the table of all
//! rows.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use serde_json::json;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use trellis_tests::qmp::Qmp;
use trellis_tests::scene::{IOERR, OK_WRITE};
use trellis_tests::server::Server;
use trellis_tests::vhost_user::client::{Client, DATA, Setup};
use trellis_tests::vhost_user::protocol::{kind, status};
use trellis_tests::vhost_user::ring::writable;
use trellis_tests::vhost_user::wire::{memfd, pause, seal_future_writes};

const SIZE: u64 = 1 << 20;

/// A server with a node `n` that a guest writes to, and its monitor.
struct Stage {
    server: Server,
    monitor: Qmp,
    folder: TempDir,
}

impl Stage {
    fn new(node: &str) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let image = folder.path().join("n.img");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let node = node.replace("IMAGE", image.to_str().unwrap());
        let socket = folder.path().join("n.sock");
        let export =
            format!("type=vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path={}", socket.display());
        let server = Server::start(folder.path(), &["--blockdev", &node, "--export", &export]);
        let monitor = server.qmp();
        Self { server, monitor, folder }
    }

    fn guest(&self) -> Client {
        Client::start(&self.folder.path().join("n.sock"), &Setup::default())
    }

    fn image(&self) -> File {
        File::options().write(true).open(self.folder.path().join("n.img")).unwrap()
    }

    /// What the next `BLOCK_IO_ERROR` says; the reason is for people.
    fn expect_error(&mut self, operation: &str, nospace: bool) {
        let mut told = self.monitor.event("BLOCK_IO_ERROR");
        let reason = told.as_object_mut().unwrap().remove("reason").unwrap();
        assert!(!reason.as_str().unwrap().is_empty());
        let expected = json!({
            "qom-path": "", "device": "", "node-name": "n", "operation": operation, "action": "report",
            "nospace": nospace,
        });
        assert_eq!(told, expected);
    }

    fn signal(&self, name: &str) {
        let id = self.server.pid().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    fn quit(mut self) -> ExitStatus {
        self.monitor.execute("quit", &json!({}));
        self.server.wait()
    }
}

const FILE: &str = "driver=file,node-name=n,filename=IMAGE,aio=io_uring";

/// A block device that can be made to lose what is written to it: its file is sealed memory.
struct Failing {
    memory: OwnedFd,
    path: PathBuf,
}

impl Failing {
    fn new() -> Self {
        let memory = memfd(SIZE);
        let file = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
        let made = Command::new("losetup").args(["--find", "--show", &file]).output().unwrap();
        assert!(made.status.success(), "these tests need loop devices and the right to use them");
        Self { memory, path: String::from_utf8(made.stdout).unwrap().trim().into() }
    }

    fn node(&self) -> String {
        format!("driver=host_device,node-name=n,filename={}", self.path.display())
    }

    fn fail(&self) {
        seal_future_writes(self.memory.as_fd());
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

#[test]
fn fs_03_a_flush_that_failed_is_told_and_stays_failed() {
    let device = Failing::new();
    let mut stage = Stage::new(&device.node());
    let mut guest = stage.guest();
    assert_eq!(guest.write(0, 0, &[1; 4096]), OK_WRITE);
    assert_eq!(guest.flush(0), OK_WRITE);
    assert_eq!(guest.write(0, 0, &[2; 4096]), OK_WRITE);
    device.fail();
    assert_eq!(guest.flush(0), IOERR);
    stage.expect_error("write", false);
    assert_eq!(guest.flush(0), IOERR, "the kernel itself would say that all is well");
    drop(guest);
    assert!(stage.quit().success(), "what the guest was told is no news");
}

#[test]
fn fs_05_a_close_that_loses_data_ends_with_a_failure() {
    let device = Failing::new();
    let stage = Stage::new(&device.node());
    let mut guest = stage.guest();
    assert_eq!(guest.write(0, 0, &[1; 4096]), OK_WRITE);
    device.fail();
    drop(guest);
    assert_eq!(stage.quit().code(), Some(1));
}

#[test]
fn fs_06_a_write_past_the_limit_on_file_sizes_fails_and_ends_nobody() {
    let mut stage = Stage::new(FILE);
    let limit = ["--fsize=65536", "--pid", &stage.server.pid().to_string()];
    assert!(Command::new("prlimit").args(limit).status().unwrap().success());
    let mut guest = stage.guest();
    assert_eq!(guest.write(0, 1024, &[1; 4096]), IOERR);
    stage.expect_error("write", false);
    assert_eq!(guest.write(0, 0, &[1; 4096]), OK_WRITE);
    assert_eq!(guest.flush(0), OK_WRITE);
    drop(guest);
    assert!(stage.quit().success());
}

#[test]
fn fs_16_a_file_that_was_cut_shorter_is_told_of() {
    let mut stage = Stage::new(FILE);
    let mut guest = stage.guest();
    assert_eq!(guest.write(0, 0, &[1; 4096]), OK_WRITE);
    stage.image().set_len(4096).unwrap();
    // By the ring entry on guest memory, which is the direct path.
    assert_eq!(guest.read(0, 1024, 4096).0.status, status::IOERR);
    stage.expect_error("read", false);
    let (done, bytes) = guest.read(0, 0, 4096);
    assert_eq!((done.status, bytes), (status::OK, vec![1; 4096]));
    stage.image().set_len(SIZE).unwrap();
    assert_eq!(guest.read(0, 1024, 4096).0.status, status::OK, "it is long again");
    drop(guest);
    assert!(stage.quit().success());
}

/// A request that does not come back holds the end up until somebody asks again, or until the service manager kills.
#[test]
fn fs_20_a_disk_that_hangs_does_not_keep_us_for_ever() {
    let mut stage = Stage::new("driver=null-co,node-name=n,size=1048576,latency-ns=120000000000");
    let mut guest = stage.guest();
    let chain = guest.chain(0, kind::IN, 0, &[writable(DATA, 4096)]);
    guest.submit(0, &chain);
    let nodes = stage.monitor.execute("query-named-block-nodes", &json!({}));
    assert_eq!(nodes.as_array().unwrap().len(), 1, "the operator is served meanwhile");
    let stalled = stage.monitor.event("X_BLOCK_EXPORT_STALLED");
    assert_eq!(stalled, json!({ "id": "e", "in-flight": 1, "seconds": 10 }));
    stage.signal("TERM");
    pause(Duration::from_millis(500));
    assert_eq!(stage.server.ended(), None, "it waits for the guest's request");
    let begun = Instant::now();
    stage.signal("TERM");
    assert_eq!(stage.server.wait().code(), Some(1));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}
