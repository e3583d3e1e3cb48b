//! Files, file systems and devices that fail, lie or change under us (FS of `hostile-inputs.md`): one test a row, or the
//! reason why not. Real ones where this machine has them, and calls that a plan has fail where not.
//!
//! | row | here as, or why not |
//! |---|---|
//! | FS-01, FS-02 | jobs and metadata are later features; `fault.rs` has all N, here is what the answer is |
//! | FS-03 | the event in `tests/tests/hostile_fs.rs` |
//! | FS-04 | a full tmpfs, below a raw disk and at every allocation of a qcow2 image; all other errors in `fault.rs` and `qcow2_fault.rs` |
//! | FS-05 | no metadata is written back yet: data that cannot be; the exit status in `tests/tests/hostile_fs.rs` |
//! | FS-06 | a limit on file sizes here and in `tests/tests/hostile_fs.rs`; EDQUOT by a plan, for want of quotas |
//! | FS-09 | no linked entries are ever submitted |
//! | FS-10 | `io_uring_disabled` is the whole machine's: refused by seccomp it looks the same; the log in `daemon/tests/monitor.rs` |
//! | FS-13 | looked into at the first hole over data, not at open: an open writes nothing to a user's image |
//! | FS-14 | a file system that lies about data cannot be told from one with a hole; nothing skips a copy for it yet |
//! | FS-16 | a write past the new end makes the file long again, and is no error; the event in `tests/tests/hostile_fs.rs` |
//! | FS-18 | a file system is not remounted under who writes: EROFS by a plan. Writes are refused from then on; that a disk is read-only is told to a guest when it connects, and cannot be taken back |
//! | FS-19 | no NFS is here: its errors by a plan. The locks are on a descriptor of their own, so where a server has forgotten one (`nfs.recover_lost_locks` is off by default), Linux stops nothing on the descriptor that data goes through: writing goes on, and another host may take the lock |
//! | FS-20 | a `null-co` that takes long, and reads that hang on helper threads (a frozen file system can freeze its machine); the event and the ending in `tests/tests/hostile_fs.rs` |
//! | FS-21, FS-22 | in `crash.rs` |
//! | FS-23 | qcow2 has no checksums: its sanity checks are shown by `images_with_changed_fields_do_no_harm` of `qcow2_fuzz/` |
//!
//! FS-20 does not hold for buffered io_uring writes on Linux 6.18: of 100 files on one ring, 5 waited as long as a
//! neighbour's frozen file system (`fsfreeze`); with `aio=threads` none did. io-wq queues buffered writes by a hash of the
//! inode, which would explain it; that, and whether `cache.direct` helps, was not tried.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "support/qcow2.rs"]
#[expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]
mod qcow2;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bench::{
    Failing, Loop, add, attach, enter, file, flush, image, io_thread, on, range, read, reopen, with, write, writer,
};
use block_core::base::IoError;
use block_core::graph::{DirectRequest, Graph, NodeEvent, NodeId, Settled, WriteFlags};
use block_core::port::{Port, PortLane};
use block_core::rt::fault::{Fault, Faults, Plan, Site};
use block_core::rt::{Engine, IoBuf, IoThread, Local, Op, SharedFd, run_control, within};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde_json::{Value, json};

const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };
const UNMAP: WriteFlags = WriteFlags { may_unmap: true, ..PLAIN };
const EIO: IoError = IoError::Os(libc::EIO);

// ---- the stage --------------------------------------------------------------------------------------------------

/// A node with a writing user, on a thread with a ring; and what the graph has told of it.
struct Stage {
    graph: Rc<Graph>,
    node: NodeId,
    port: Port,
    thread: IoThread,
    events: Arc<Mutex<Vec<NodeEvent>>>,
}

impl Stage {
    async fn new(options: Value) -> Self {
        let events = Arc::<Mutex<Vec<_>>>::default();
        let told = events.clone();
        let graph = Graph::new(Arc::new(move |event| told.lock().unwrap().push(event)));
        let node = add(&graph, options).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        Self { graph, node, port, thread: io_thread(), events }
    }

    async fn on<T: Send + 'static>(&self, work: impl AsyncFnOnce(Rc<PortLane>) -> T + Send + 'static) -> T {
        on(&self.thread, &self.port.handle(), work).await
    }

    async fn read(&self, start: u64, len: u64) -> Result<Vec<u8>, IoError> {
        self.on(async move |lane| read(&lane, range(start, len)).await).await
    }

    async fn write(&self, start: u64, bytes: Vec<u8>) -> Result<(), IoError> {
        self.on(async move |lane| write(&lane, start, &bytes, PLAIN).await).await
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.on(async |lane| flush(&lane).await).await
    }

    async fn zero(&self, start: u64, len: u64, flags: WriteFlags) -> Result<(), IoError> {
        self.on(async move |lane| lane.write_zeroes(&enter(&lane).await, range(start, len), flags).await).await
    }

    /// The errors that operators were told of.
    fn told(&self) -> Vec<(bool, IoError)> {
        let error = |event: &NodeEvent| match event {
            NodeEvent::IoError { node, write, error } => {
                assert_eq!(node, "n");
                Some((*write, *error))
            }
            NodeEvent::WriteThreshold { .. }
            | NodeEvent::QuorumReportBad { .. }
            | NodeEvent::QuorumFailure { .. }
            | NodeEvent::ImageCorrupted { .. } => None,
        };
        self.events.lock().unwrap().iter().filter_map(error).collect()
    }

    async fn end(self) {
        self.port.detach(&mut self.graph.permit()).await;
        self.graph.permit().remove(self.node).await.unwrap();
    }
}

/// A file of 1 MiB of sevens in memory, as node `n`, with each engine.
fn each_engine(test: impl AsyncFn(Stage, PathBuf)) {
    each_engine_under(&Faults::default(), test);
}

/// The same, where calls can be made to fail.
fn each_engine_under(faults: &Faults, test: impl AsyncFn(Stage, PathBuf)) {
    let _entered = faults.enter();
    for aio in ["threads", "io_uring"] {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = image(dir.path(), "x.img", 1 << 20, 7);
        let options = with(file("n", &path), &json!({ "aio": aio, "discard": "unmap" }));
        run_control(async |_| test(Stage::new(options.clone()).await, path.into()).await);
    }
}

fn once(nth: u64, errno: i32) -> Plan {
    Plan { nth, fault: Fault::Errno(errno), lasting: false }
}

fn lasting(errno: i32) -> Plan {
    Plan { nth: 1, fault: Fault::Errno(errno), lasting: true }
}

/// Something that is mounted, until dropped.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount").args(arguments).arg(dir.path()).status();
        assert!(mounted.unwrap().success(), "these tests need the right to mount");
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy"]).arg(self.path()).status();
    }
}

/// Runs a test of this file once more, in a process of its own that it may spoil. There, gives what the first one says.
fn in_a_child(test: &str, say: &str) -> Option<String> {
    if let Some(said) = std::env::var_os(CHILD) {
        return said.into_string().ok();
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", test, "--nocapture"]).env(CHILD, say).output().unwrap();
    let (status, text) = (output.status, String::from_utf8_lossy(&output.stdout));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(status.success() && text.contains("1 passed"), "{status}: {text}{errors}");
    None
}

const CHILD: &str = "TRELLIS_TEST_CHILD";

// ---- errors of the storage ---------------------------------------------------------------------------------------

#[test]
fn fs_01_a_read_error_is_that_requests_alone() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, _| {
        for nth in 1..=3 {
            faults.arm(once(nth, libc::EIO));
            for number in 1..=3 {
                let expected = if number == nth { Err(EIO) } else { Ok(vec![7; 4096]) };
                assert_eq!(stage.read(8192, 4096).await, expected);
            }
            assert_eq!(faults.disarm(), [Site::Read]);
        }
        assert_eq!(stage.told(), [(false, EIO)], "once a second");
        stage.end().await;
    });
}

#[test]
fn fs_02_a_write_error_is_that_requests_alone() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, path| {
        faults.arm(once(2, libc::EIO));
        let results = [
            stage.write(0, vec![1; 4096]).await,
            stage.write(4096, vec![2; 4096]).await,
            stage.write(8192, vec![3; 4096]).await,
        ];
        assert_eq!(results, [Ok(()), Err(EIO), Ok(())]);
        assert_eq!(faults.disarm(), [Site::Write]);
        assert_eq!(stage.told(), [(true, EIO)]);
        let now = fs::read(path).unwrap();
        let expected = [[1; 4096], [7; 4096], [3; 4096], [7; 4096]].concat();
        assert_eq!(now[..expected.len()], expected);
        stage.end().await;
    });
}

#[test]
fn fs_03_after_a_failed_fdatasync_all_fail_until_a_reopen() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, path| {
        stage.write(0, vec![1; 4096]).await.unwrap();
        faults.arm(once(1, libc::EIO));
        assert_eq!(stage.flush().await, Err(EIO));
        assert_eq!(faults.disarm(), [Site::Sync]);
        assert_eq!(stage.flush().await, Err(IoError::FlushLatched));
        assert_eq!(stage.read(0, 512).await, Ok(vec![1; 512]), "all else works");
        assert_eq!(stage.told(), [(true, EIO)]);
        reopen(&stage.graph, &[file("n", path.to_str().unwrap())]).await.unwrap();
        stage.flush().await.unwrap();
        stage.end().await;
    });
}

#[test]
fn fs_04_a_full_disk_takes_writes_again_when_it_has_space() {
    for aio in ["threads", "io_uring"] {
        let mount = Mount::new(&["-t", "tmpfs", "-o", "size=256k", "tmpfs"]);
        let path = mount.path().join("x.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let other = mount.path().join("other");
        fs::write(&other, vec![0; 128 << 10]).unwrap();
        run_control(async |_| {
            let stage = Stage::new(with(file("n", path.to_str().unwrap()), &json!({ "aio": aio }))).await;
            let mut taken = 0;
            let refused = loop {
                match stage.write(taken << 12, vec![9; 4096]).await {
                    Ok(()) => taken += 1,
                    Err(error) => break error,
                }
                assert!(taken < 64, "the disk is not full");
            };
            assert_eq!(refused, IoError::NoSpace);
            assert_eq!(stage.told(), [(true, IoError::NoSpace)]);
            assert_eq!(stage.write(0, vec![8; 4096]).await, Ok(()), "what has space can be written");
            assert_eq!(stage.read(taken << 12, 4096).await, Ok(vec![0; 4096]));
            fs::remove_file(&other).unwrap();
            stage.write(taken << 12, vec![9; 4096]).await.unwrap();
            stage.flush().await.unwrap();
            assert_eq!(stage.read(taken << 12, 4096).await, Ok(vec![9; 4096]));
            stage.end().await;
        });
    }
}

/// The space ends at one allocation after another: guest data, L2 tables, refcount blocks. There is never an image whose
/// tables contradict each other, and all goes on once there is space.
#[test]
fn fs_04_an_image_on_a_full_disk_stays_whole() {
    const PAGE: usize = 4096;
    let fresh = qcow2::fresh("cluster_size=512", 1 << 20);
    for pages in 1..=24 {
        let mount = Mount::new(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"]);
        let path = mount.path().join("x.img");
        fs::write(&path, &fresh).unwrap();
        let other = mount.path().join("other");
        let taken = fresh.len().div_ceil(PAGE) + pages;
        fs::write(&other, vec![0; (1 << 20) - taken * PAGE]).unwrap();
        run_control(async |_| {
            let options = json!({ "driver": "qcow2", "node-name": "n",
                                  "file": { "driver": "file", "filename": path, "aio": "io_uring" } });
            let stage = Stage::new(options).await;
            // Far apart, so that there is a table for each few of them.
            let place = |number: u64| (number * 37 % 256) << 12;
            let mut written = 0;
            let refused = loop {
                let result = match stage.write(place(written), vec![9; 1024]).await {
                    Ok(()) => stage.flush().await,
                    error => error,
                };
                match result {
                    Ok(()) => written += 1,
                    Err(error) => break error,
                }
                assert!(written < 256, "the disk is not full");
            };
            assert_eq!(refused, IoError::NoSpace);
            qcow2::corrupt(&fs::read(&path).unwrap()).unwrap_or_else(|wrong| panic!("{pages} pages: {wrong}"));
            fs::remove_file(&other).unwrap();
            for number in written..written + 20 {
                stage.write(place(number), vec![9; 1024]).await.unwrap();
            }
            stage.flush().await.unwrap();
            stage.end().await;
            let judged = qcow2::corrupt(&fs::read(&path).unwrap());
            judged.unwrap_or_else(|wrong| panic!("{pages} pages, at the end: {wrong}"));
            let again = Stage::new(json!({ "driver": "qcow2", "node-name": "n",
                                           "file": { "driver": "file", "filename": path } }))
            .await;
            for number in 0..written + 20 {
                assert_eq!(again.read(place(number), 1024).await, Ok(vec![9; 1024]), "{pages} pages, write {number}");
            }
            again.end().await;
        });
    }
}

#[test]
fn fs_05_what_cannot_be_written_back_at_the_close_is_said() {
    let failing = Failing::new();
    run_control(async |_| {
        let options = json!({ "driver": "host_device", "node-name": "n", "filename": failing.device.path });
        let Stage { graph, node, port, thread, .. } = Stage::new(options).await;
        on(&thread, &port.handle(), async |lane| write(&lane, 0, &[1; 4096], PLAIN).await).await.unwrap();
        failing.fail();
        port.detach(&mut graph.permit()).await;
        let error = graph.permit().remove(node).await.unwrap_err().full();
        assert!(error.starts_with("Could not flush node 'n' before removing it: "), "{error}");
        graph.permit().remove(node).await.unwrap();
    });
}

#[test]
fn fs_06_past_a_limit_on_file_sizes_a_write_fails() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 7);
    let Some(path) = in_a_child("fs_06_past_a_limit_on_file_sizes_a_write_fails", &path) else { return };
    // As the daemon does.
    nix::sys::signal::SigSet::from(nix::sys::signal::Signal::SIGXFSZ).thread_block().unwrap();
    let limit = Some(64 << 10);
    setrlimit(Resource::Fsize, Rlimit { current: limit, maximum: limit }).unwrap();
    for aio in ["threads", "io_uring"] {
        run_control(async |_| {
            let stage = Stage::new(with(file("n", &path), &json!({ "aio": aio }))).await;
            let too_big = Err(IoError::Os(libc::EFBIG));
            assert_eq!(stage.write(128 << 10, vec![1; 4096]).await, too_big);
            assert_eq!(stage.write(60 << 10, vec![1; 8192]).await, too_big, "half of it is no success");
            assert_eq!(stage.told(), [(true, IoError::Os(libc::EFBIG))]);
            stage.write(0, vec![1; 4096]).await.unwrap();
            stage.flush().await.unwrap();
            assert_eq!(stage.read(128 << 10, 4096).await, Ok(vec![7; 4096]));
            stage.end().await;
        });
    }
}

#[test]
fn fs_06_a_quota_is_a_full_disk() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, _| {
        faults.arm(once(1, libc::EDQUOT));
        assert_eq!(stage.write(0, vec![1; 4096]).await, Err(IoError::NoSpace));
        stage.write(0, vec![1; 4096]).await.unwrap();
        stage.end().await;
    });
}

// ---- short transfers, and what passes ---------------------------------------------------------------------------

const SHORT: Plan = Plan { nth: 1, fault: Fault::Short, lasting: true };

#[test]
fn fs_07_a_short_read_is_continued_and_zeroes_follow_only_the_end() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, _| {
        faults.arm(SHORT);
        assert_eq!(stage.read(4096, 65536).await, Ok(vec![7; 65536]));
        assert!(faults.disarm().len() >= 16, "half, and half of the rest, and so on");
        stage.end().await;
    });
    // The last sector is not whole in the file.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = image(dir.path(), "short.img", 1000, 7);
    run_control(async |_| {
        let stage = Stage::new(file("n", &path)).await;
        assert_eq!(stage.read(512, 512).await, Ok([vec![7; 488], vec![0; 24]].concat()));
        stage.end().await;
    });
}

/// With `O_DIRECT` nothing can be read from within a block: the kernel's own short reads.
#[test]
fn fs_07_a_block_that_is_cut_is_the_end_of_the_file_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 8192 + 1000, 7);
    let direct = json!({ "aio": "native", "cache": { "direct": true } });
    run_control(async |_| {
        let stage = Stage::new(with(file("n", &path), &direct)).await;
        assert_eq!(stage.read(8192, 1024).await, Ok([vec![7; 1000], vec![0; 24]].concat()));
        File::options().write(true).open(&path).unwrap().set_len(4096 + 100).unwrap();
        assert_eq!(stage.read(0, 4096).await, Ok(vec![7; 4096]));
        assert_eq!(stage.read(0, 8192).await, Err(EIO));
        stage.end().await;
    });
}

/// Who makes the file grow moves its end while somebody reads there. (tmpfs takes transfers of any length as `O_DIRECT`, so
/// that a short one can be made.)
#[test]
fn fs_07_an_end_that_moves_while_it_is_looked_at_is_read_again() {
    let faults = Faults::default();
    let _entered = faults.enter();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 7);
    for aio in ["threads", "native"] {
        run_control(async |_| {
            let stage = Stage::new(with(file("n", &path), &json!({ "aio": aio, "cache": { "direct": true } }))).await;
            for nth in 1..=2 {
                faults.arm(Plan { nth, fault: Fault::Short, lasting: false });
                assert_eq!(stage.read(4096, 4096).await, Ok(vec![7; 4096]), "{aio}");
                assert_eq!(stage.read(4096, 4096).await, Ok(vec![7; 4096]), "{aio}");
                assert_eq!(faults.disarm(), [Site::Read]);
            }
            faults.arm(SHORT);
            assert_eq!(stage.read(4096, 4096).await, Err(EIO), "a block that stays cut");
            faults.disarm();
            stage.end().await;
        });
    }
}

#[test]
fn fs_08_a_short_write_is_continued_or_fails() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, path| {
        faults.arm(SHORT);
        stage.write(4096, vec![1; 65536]).await.unwrap();
        assert!(faults.disarm().len() >= 16);
        let now = fs::read(path).unwrap();
        assert!(now[4096..][..65536].iter().all(|byte| *byte == 1) && now[..4096] == [7; 4096]);
        stage.end().await;
    });
    // The kernel's own: there is room for half of it.
    let mount = Mount::new(&["-t", "tmpfs", "-o", "size=64k", "tmpfs"]);
    let path = mount.path().join("x.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    run_control(async |_| {
        let stage = Stage::new(file("n", path.to_str().unwrap())).await;
        assert_eq!(stage.write(0, vec![1; 128 << 10]).await, Err(IoError::NoSpace));
        stage.end().await;
    });
}

#[test]
fn fs_09_what_passes_is_tried_again_and_not_for_ever() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, _| {
        for errno in [libc::EINTR, libc::EAGAIN, libc::ECANCELED] {
            for nth in 1..=4 {
                faults.arm(once(nth, errno));
                stage.write(0, vec![1; 4096]).await.unwrap();
                assert_eq!(stage.read(0, 4096).await, Ok(vec![1; 4096]));
                stage.zero(4096, 4096, PLAIN).await.unwrap();
                stage.flush().await.unwrap();
                assert_eq!(faults.disarm().len(), 1);
            }
            faults.arm(lasting(errno));
            let begun = Instant::now();
            assert_eq!(stage.write(0, vec![1; 4096]).await, Err(IoError::Os(errno)));
            assert!(begun.elapsed() < Duration::from_secs(5));
            assert!((2..=100).contains(&faults.disarm().len()), "tried again, and not for ever");
            if errno == libc::EINTR {
                continue;
            }
            assert!(begun.elapsed() > Duration::from_millis(20), "what the kernel is short of takes time to come back");
            // Nothing was asked of the file: nothing that was written is lost.
            faults.arm(lasting(errno));
            assert_eq!(stage.flush().await, Err(IoError::Os(errno)));
            faults.disarm();
            stage.flush().await.unwrap();
        }
        stage.flush().await.unwrap();
        stage.end().await;
    });
}

// ---- the ring ---------------------------------------------------------------------------------------------------

#[test]
fn fs_10_where_io_uring_is_refused_threads_do_it() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 7);
    let Some(path) = in_a_child("fs_10_where_io_uring_is_refused_threads_do_it", &path) else { return };
    seccomp::refuse_io_uring();
    run_control(async |_| {
        let stage = Stage::new(with(file("n", &path), &json!({ "aio": "io_uring" }))).await;
        assert_eq!(stage.thread.engine_name(), "epoll");
        stage.write(0, vec![1; 4096]).await.unwrap();
        stage.flush().await.unwrap();
        assert_eq!(stage.read(0, 8192).await, Ok([vec![1; 4096], vec![7; 4096]].concat()));
        stage.end().await;
    });
}

/// More than fits the ring, both ways: every request gets its own answer.
#[test]
fn fs_11_a_full_ring_loses_no_completion() {
    const REQUESTS: u64 = 10_000;
    each_engine(async |stage, path| {
        let file = File::options().write(true).open(path).unwrap();
        for sector in 0..2048_u32 {
            file.write_all_at(&sector.to_le_bytes(), u64::from(sector) * 512).unwrap();
        }
        stage
            .on(async |lane| {
                let mut answers = Vec::new();
                for number in 0..REQUESTS {
                    let (lane, (done, answer)) = (lane.clone(), block_core::rt::sync::oneshot());
                    Local::current().spawn(async move {
                        let bytes = read(&lane, range(number % 2048 * 512, 512)).await.unwrap();
                        let _ = done.send(u32::from_le_bytes(bytes[..4].try_into().unwrap()));
                    });
                    answers.push(answer);
                }
                for (number, answer) in (0..REQUESTS).zip(answers) {
                    assert_eq!(u64::from(answer.await.unwrap()), number % 2048);
                }
            })
            .await;
        stage.end().await;
    });
}

// ---- space ------------------------------------------------------------------------------------------------------

#[test]
fn fs_12_where_fallocate_is_refused_zeroes_are_written() {
    let faults = Faults::default();
    let forever = [libc::EOPNOTSUPP, libc::ENOSYS, libc::EPERM, libc::ENODEV];
    for errno in forever.into_iter().chain([libc::EINVAL, libc::ETXTBSY]) {
        each_engine_under(&faults, async |stage, path| {
            // Reads and writes go well.
            let refused = async |start: u64, flags: WriteFlags| {
                faults.arm(Plan { nth: 1, fault: Fault::Errno(errno), lasting: true });
                let no_fallback = WriteFlags { no_fallback: true, ..flags };
                assert_eq!(stage.zero(start, 4096, no_fallback).await, Err(IoError::Unsupported), "{errno}");
                let struck = faults.disarm();
                stage.zero(start, 4096, flags).await.unwrap();
                struck.iter().filter(|site| **site == Site::Fallocate).count()
            };
            assert!(refused(0, PLAIN).await > 0);
            for (start, flags) in [(4096, UNMAP), (8192, PLAIN)] {
                let asked_again = refused(start, flags).await > 0;
                assert_eq!(asked_again, !forever.contains(&errno), "{errno} at {start}");
            }
            let now = fs::read(path).unwrap();
            assert!(now[..12288].iter().all(|byte| *byte == 0) && now[12288] == 7);
            assert_eq!(stage.told(), [], "nothing has failed");
            stage.end().await;
        });
    }
}

#[test]
fn fs_13_holes_that_keep_their_data_are_found_out() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, path| {
        let lie = |nth, lasting| faults.arm(Plan { nth, fault: Fault::Lie, lasting });
        // The first hole lies; what comes instead does not.
        lie(1, false);
        stage.zero(0, 8192, UNMAP).await.unwrap();
        assert_eq!(faults.disarm(), [Site::Fallocate]);
        assert!(fs::read(&path).unwrap()[..8192].iter().all(|byte| *byte == 0));
        // No hole is believed any more: nothing is left to lie.
        lie(1, true);
        stage.on(async |lane| lane.discard(&enter(&lane).await, range(8192, 8192)).await).await.unwrap();
        assert_eq!(faults.disarm(), [], "no more holes are made");
        stage.end().await;
    });
    each_engine_under(&faults, async |stage, _| {
        // A hole where there was nothing tells nothing.
        stage.zero(0, 4096, UNMAP).await.unwrap();
        stage.zero(0, 4096, UNMAP).await.unwrap();
        faults.arm(Plan { nth: 1, fault: Fault::Errno(libc::EIO), lasting: true });
        assert_eq!(stage.zero(8192, 4096, UNMAP).await, Err(EIO));
        assert_eq!(faults.disarm(), [Site::Fallocate], "one hole was looked into, and that was enough");
        stage.end().await;
    });
}

#[test]
fn fs_14_what_cannot_be_found_out_about_holes_is_data() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, path| {
        File::options().write(true).open(path).unwrap().set_len(1 << 20).unwrap();
        stage.zero(0, 1 << 19, UNMAP).await.unwrap();
        let is_data = async |start: u64| {
            let map =
                async move |lane: Rc<PortLane>| lane.map(&enter(&lane).await, range(start, 1 << 19)).await.unwrap();
            matches!(stage.on(map).await.place, block_core::graph::Place::Here)
        };
        assert!(!is_data(0).await && is_data(1 << 19).await);
        for errno in [libc::EINVAL, libc::EIO, libc::EOPNOTSUPP] {
            faults.arm(lasting(errno));
            assert!(is_data(0).await && is_data(1 << 19).await, "{errno}");
            assert!(!faults.disarm().is_empty());
        }
        stage.end().await;
    });
}

/// A device of 4 KiB blocks, and a file on a file system on it: both say what they need, and get it.
#[test]
fn fs_15_blocks_that_are_too_small_for_o_direct_are_bounced() {
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::with_sectors(&image(dir.path(), "device.img", 16 << 20, 0), "4096");
    assert!(Command::new("mkfs.ext4").args(["-q", "-F", &device.path]).status().unwrap().success());
    let mount = Mount::new(&[&device.path]);
    let path = image(mount.path(), "x.img", 1 << 20, 7);
    for aio in ["threads", "io_uring"] {
        run_control(async |_| {
            let direct = json!({ "aio": aio, "cache": { "direct": true } });
            let stage = Stage::new(with(file("n", &path), &direct)).await;
            assert_eq!(stage.port.geometry().limits.request_alignment, 4096);
            stage.write(512, vec![1; 512]).await.unwrap();
            let expected = [vec![7; 512], vec![1; 512], vec![7; 3072]].concat();
            assert_eq!(stage.read(0, 4096).await, Ok(expected));
            assert_eq!(stage.read(1024, 512).await, Ok(vec![7; 512]));
            stage.write(512, vec![7; 512]).await.unwrap();
            stage.end().await;
        });
    }
}

// ---- files that change under us ---------------------------------------------------------------------------------

#[test]
fn fs_16_a_file_that_somebody_cut_shorter_is_no_file_of_zeroes() {
    each_engine(async |stage, path| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len((1 << 19) + 100).unwrap();
        assert_eq!(stage.read(0, 1 << 19).await, Ok(vec![7; 1 << 19]));
        for (start, len) in [(1 << 19, 512), ((1 << 20) - 512, 512), (0, 1 << 20)] {
            assert_eq!(stage.read(start, len).await, Err(EIO), "{start}");
        }
        assert_eq!(stage.told(), [(false, EIO)]);
        stage.flush().await.unwrap();
        file.set_len(1 << 20).unwrap();
        assert_eq!(stage.read((1 << 20) - 512, 512).await, Ok(vec![0; 512]), "it is long again");
        stage.end().await;
    });
}

#[test]
fn fs_17_a_file_without_a_name_is_served_on() {
    each_engine(async |stage, path| {
        let moved = path.with_extension("moved");
        fs::rename(&path, &moved).unwrap();
        stage.write(0, vec![1; 4096]).await.unwrap();
        stage.flush().await.unwrap();
        assert_eq!(fs::read(&moved).unwrap()[..4096], [1; 4096]);
        fs::remove_file(&moved).unwrap();
        stage.write(4096, vec![2; 4096]).await.unwrap();
        stage.flush().await.unwrap();
        assert_eq!(stage.read(0, 8192).await, Ok([vec![1; 4096], vec![2; 4096]].concat()));
        stage.end().await;
    });
}

/// What would change the file fails from then on, without asking the file system again; reading goes on.
#[test]
fn fs_18_a_file_system_that_turned_read_only_is_not_written_to() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, path| {
        stage.write(8192, vec![3; 4096]).await.unwrap();
        faults.arm(lasting(libc::EROFS));
        let refused = IoError::Os(libc::EROFS);
        assert_eq!(stage.write(0, vec![1; 4096]).await, Err(refused));
        assert_eq!(stage.told(), [(true, refused)]);
        let struck = faults.disarm().len();
        assert_eq!(struck, 1, "it was asked once");
        // It would take the next one; nobody asks.
        assert_eq!(stage.write(0, vec![1; 4096]).await, Err(refused));
        assert_eq!(stage.zero(0, 4096, UNMAP).await, Err(refused));
        assert_eq!(stage.on(async |lane| lane.discard(&enter(&lane).await, range(0, 4096)).await).await, Err(refused));
        stage.flush().await.unwrap();
        assert_eq!(stage.read(0, 4096).await, Ok(vec![7; 4096]));
        assert_eq!(stage.read(8192, 4096).await, Ok(vec![3; 4096]));
        reopen(&stage.graph, &[file("n", path.to_str().unwrap())]).await.unwrap();
        stage.write(0, vec![1; 4096]).await.unwrap();
        stage.end().await;
    });
}

/// Nor by the way that takes no detour, whichever way it was heard of.
#[test]
fn fs_18_the_direct_path_asks_no_more_either() {
    let faults = Faults::default();
    let _entered = faults.enter();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 7);
    run_control(async |_| {
        let stage = Stage::new(with(file("n", &path), &json!({ "aio": "io_uring" }))).await;
        let is_direct = async |write| {
            let request = DirectRequest { write, at: range(0, 4096), fua: false, memory_bits: 0 };
            stage.on(async move |lane| lane.direct(&enter(&lane).await, request).is_some()).await
        };
        let asked = DirectRequest { write: true, at: range(0, 4096), fua: false, memory_bits: 0 };
        let answered = async move |lane: Rc<PortLane>| lane.settle(&enter(&lane).await, asked, -libc::EROFS);
        for by_settling in [false, true] {
            assert!(is_direct(true).await && is_direct(false).await);
            faults.arm(lasting(libc::EROFS));
            if by_settling {
                assert_eq!(stage.on(answered).await, Settled::Failed(IoError::Os(libc::EROFS)));
            } else {
                stage.write(0, vec![1; 4096]).await.unwrap_err();
            }
            faults.disarm();
            assert!(!is_direct(true).await && is_direct(false).await);
            reopen(&stage.graph, &[with(file("n", &path), &json!({ "aio": "io_uring" }))]).await.unwrap();
        }
        stage.end().await;
    });
}

#[test]
fn fs_19_errors_of_network_file_systems_are_told_of() {
    let faults = Faults::default();
    each_engine_under(&faults, async |stage, path| {
        for errno in [libc::ESTALE, libc::ETIMEDOUT] {
            let refused = Err(IoError::Os(errno));
            faults.arm(lasting(errno));
            assert_eq!(stage.read(0, 4096).await, refused.map(|()| Vec::new()));
            assert_eq!(stage.write(0, vec![1; 4096]).await, refused);
            assert_eq!(stage.flush().await, refused);
            faults.disarm();
            assert_eq!(stage.flush().await, Err(IoError::FlushLatched), "what the server has lost is not known");
            reopen(&stage.graph, &[file("n", path.to_str().unwrap())]).await.unwrap();
        }
        assert_eq!(stage.told()[0], (false, IoError::Os(libc::ESTALE)));
        stage.end().await;
    });
}

/// A write that takes its time, on the thread of a file that others use.
#[test]
fn fs_20_a_disk_that_hangs_holds_up_nobody_else() {
    each_engine(async |stage, _| {
        let hangs =
            json!({ "driver": "null-co", "node-name": "hangs", "size": 4096, "latency-ns": HANG_MS * 1_000_000 });
        let hangs = add(&stage.graph, hangs).await.unwrap();
        let neighbour = attach(&stage.graph, hangs, writer()).await.unwrap();
        let begun = Instant::now();
        let (done, answer) = block_core::rt::sync::oneshot();
        let handle = neighbour.handle();
        stage.thread.remote().spawn(async move |local| {
            let _ = done.send(write(&handle.lane(&local), 0, &[1; 4096], PLAIN).await);
        });
        for _ in 0..20 {
            stage.write(0, vec![6; 4096]).await.unwrap();
            stage.flush().await.unwrap();
        }
        assert!(begun.elapsed() < HANG && neighbour.in_flight() > 0, "it held up somebody");
        assert_eq!(answer.await.unwrap(), Ok(()));
        neighbour.detach(&mut stage.graph.permit()).await;
        stage.graph.permit().remove(hangs).await.unwrap();
        stage.end().await;
    });
}

/// More requests hang in the kernel than one file has threads for, on behalf of one descriptor: what else needs helpers does
/// not notice.
#[test]
fn fs_20_a_file_that_hangs_has_only_its_own_threads() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let paths = ["x.img", "y.img"].map(|name| image(dir.path(), name, 1 << 20, 7));
    run_control(async |local| {
        let stage = Stage::new(with(file("n", &paths[0]), &json!({ "aio": "threads" }))).await;
        let (never_ready, writer) = std::io::pipe().unwrap();
        let (never_ready, byte): (SharedFd, _) = (Arc::new(never_ready.into()), IoBuf::alloc(1, 1).unwrap());
        let read = || Op::Read { fd: never_ready.clone(), buf: byte.clone(), offset: u64::MAX };
        let hanging: Vec<_> = (0..100).map(|_| local.submit(Engine::Pool, read(), None)).collect();
        let others = within(&local, Duration::from_secs(10), async {
            stage.write(0, vec![6; 4096]).await.unwrap();
            assert_eq!(stage.read(0, 4096).await, Ok(vec![6; 4096]));
            stage.flush().await.unwrap();
            let other = add(&stage.graph, file("other", &paths[1])).await.unwrap();
            stage.graph.permit().remove(other).await.unwrap();
        });
        others.await.expect("nobody else waits");
        drop(writer);
        for hung in hanging {
            assert_eq!(hung.await, 0);
        }
        stage.end().await;
    });
}

const HANG_MS: u64 = 2000;
const HANG: Duration = Duration::from_millis(HANG_MS);

/// A filter for system calls that says no to io_uring, for this thread and all that it starts.
mod seccomp {
    #![expect(unsafe_code, reason = "prctl has no safe form for filters")]

    pub(super) fn refuse_io_uring() {
        let (setup, register) = (425, 427);
        let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
        let jump = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
        let mut filter = [
            // The number of the call is the first word of what the filter is shown.
            statement(0x20, 0),
            jump(0x35, setup, 0, 2),
            jump(0x25, register, 1, 0),
            statement(0x06, libc::SECCOMP_RET_ERRNO | 1),
            statement(0x06, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: 5, filter: filter.as_mut_ptr() };
        // SAFETY: the call takes no pointers.
        let kept = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        // SAFETY: the program and its five instructions live until the call returns; the kernel keeps a copy.
        let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        assert_eq!((kept, set), (0, 0));
    }
}
