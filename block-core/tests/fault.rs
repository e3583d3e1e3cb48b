//! Every call of the runtime and of the protocol drivers fails once, and from then on, in every way that calls fail; the
//! disk holds what it may, errors are reported, nothing is left. How: `support/faults.rs`; what: `support/scenarios.rs`.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/allowed.rs"]
mod allowed;
#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "support/faults.rs"]
mod faults;
#[path = "support/scenarios.rs"]
mod scenarios;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bench::{Loop, with};
use block_core::base::{Error, IoError};
use block_core::drivers::protocol::file::{CreateOptions, create};
use block_core::graph::{
    ChildId, DriverInfo, IoCx, NewNode, NodeId, NodeOptions, OpKind, Preallocation, ReopenRequest, Role,
};
use block_core::pipeline::{Filter, Filtered, Request};
use block_core::rt::fault::{Fault, Faults, Plan};
use block_core::rt::run_control;
use faults::{Above, SIZE, Scene, Subject};
use scenarios::fault_at_every_call;
use serde_json::{Value, json};

fault_at_every_call! { subjects() }

/// `file` with each engine and `raw` over it, in memory; and with `O_DIRECT`, whose blocks are larger than a byte, on a
/// disk and on a device whose blocks are larger than a sector.
fn subjects() -> Vec<Subject> {
    let threads = in_file("/dev/shm", "file with threads", 1, &json!({}));
    let ring = in_file("/dev/shm", "file with io_uring", 1, &json!({ "aio": "io_uring" }));
    let direct = in_file("/tmp", "file with O_DIRECT", 512, &json!({ "aio": "native", "cache": { "direct": true } }));
    let mut raw = in_file("/dev/shm", "raw over file", 1, &json!({ "aio": "io_uring" }));
    let mut below = raw.options;
    below.as_object_mut().unwrap().remove("node-name");
    raw.options = json!({ "driver": "raw", "node-name": "subject", "discard": "unmap", "file": below });
    vec![threads, ring, direct, raw, device()]
}

fn device() -> Subject {
    let subject = in_file("/tmp", "host_device with blocks of 4 KiB", 4096, &json!({}));
    (subject.prepare)(subject.dir.path());
    let device = Loop::with_sectors(subject.dir.path().join("disk.img").to_str().unwrap(), "4096");
    let options = json!({
        "driver": "host_device", "node-name": "subject", "filename": device.path, "discard": "unmap",
        "aio": "io_uring", "cache": { "direct": true },
    });
    // Whatever the last run has left there is written over.
    let prepare = move |_: &Path| assert!(Path::new(&device.path).exists());
    Subject { options, resizes: false, prepare: Box::new(prepare), ..subject }
}

fn in_file(parent: &str, name: &str, block: u64, more: &Value) -> Subject {
    let dir = tempfile::tempdir_in(parent).unwrap();
    let path = dir.path().join("disk.img");
    let options = with(bench::file("subject", path.to_str().unwrap()), &json!({ "discard": "unmap" }));
    let options = with(options, more);
    let prepare = |dir: &Path| std::fs::write(dir.join("disk.img"), vec![0; SIZE.try_into().unwrap()]).unwrap();
    Subject {
        name: name.into(),
        dir,
        prepare: Box::new(prepare),
        options,
        above: None,
        resizes: true,
        buffers: false,
        heals: |_| false,
        block,
        check: |_| Ok(()),
    }
}

/// A file that cannot be made is not left behind; what was there keeps its bytes where nothing was begun.
#[test]
fn making_files() {
    let faults = Faults::default();
    let _entered = faults.enter();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("new.img");
    for preallocation in [Preallocation::Off, Preallocation::Falloc, Preallocation::Full] {
        let options = CreateOptions {
            filename: path.to_str().unwrap().into(),
            size: SIZE,
            preallocation,
            nocow: true,
            extent_size_hint: 0,
        };
        for fault in [libc::EIO, libc::ENOSPC].map(Fault::Errno) {
            for nth in 1.. {
                faults.arm(Plan { nth, fault, lasting: false });
                let made = run_control(async |_| create(options.clone()).await);
                let struck = faults.disarm();
                assert!(made.is_ok() || !path.exists(), "{preallocation:?}, {fault:?} at {nth}: {made:?}");
                assert!(made.is_err() || path.metadata().unwrap().len() == SIZE);
                let _ = std::fs::remove_file(&path);
                if struck.is_empty() {
                    assert!(nth > 5 && made.is_ok());
                    break;
                }
            }
        }
    }
}

// ---- the harness can fail ---------------------------------------------------------------------------------------

/// A filter that gets one thing wrong.
struct Sinner {
    file: ChildId,
    sin: Sin,
}

#[derive(Clone, Copy, Debug)]
enum Sin {
    /// Requests of this kind always go well, as far as anybody is told.
    Swallow(OpKind),
    /// After an error, a file stays open.
    Leak,
}

impl Filter for Sinner {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    async fn after(&self, _: &(), _: IoCx<'_>, request: Request, result: Result<(), IoError>) -> Result<(), IoError> {
        match self.sin {
            Sin::Swallow(kind) if kind == request.kind => Ok(()),
            Sin::Leak if result.is_err() => {
                std::mem::forget(std::fs::File::open(LEAKED.get().unwrap()).unwrap());
                result
            }
            Sin::Swallow(_) | Sin::Leak => result,
        }
    }

    async fn reopen(&self, _: &(), _: ReopenRequest<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn info(&self, _: &()) -> DriverInfo {
        DriverInfo { driver: "sinner", ..DriverInfo::default() }
    }
}

/// What [`Sin::Leak`] opens.
static LEAKED: OnceLock<PathBuf> = OnceLock::new();

fn sinner(below: NodeId, sin: Sin) -> NewNode {
    NewNode::new("sinner".into(), NodeOptions::default(), |edges| {
        let file = edges.to("file", below, Role::Filtered);
        (Filtered(Sinner { file, sin }), ())
    })
}

/// What the harness says of a disk with the filter above it.
fn caught(sin: Sin, scenario: impl AsyncFn(&mut Scene<'_>)) -> String {
    let subject = in_file("/dev/shm", "sinner", 1, &json!({}));
    if matches!(sin, Sin::Leak) {
        LEAKED.set(subject.dir.path().join("disk.img")).expect("there is one test of it");
    }
    let above: Above = Box::new(move |graph, below| {
        Box::pin(async move { Ok(vec![graph.permit().add(sinner(below, sin)).await.unwrap()]) })
    });
    faults::at_every_call(&Subject { above: Some(above), ..subject }, scenario).unwrap_err()
}

#[test]
fn a_driver_that_swallows_errors_is_caught() {
    let write = caught(Sin::Swallow(OpKind::Write), scenarios::writing_blocks);
    assert!(write.contains("(Lost)"), "{write}");
    let read = caught(Sin::Swallow(OpKind::Read), scenarios::reading);
    assert!(read.contains("a read: sector 0 (Torn)"), "{read}");
    let flush = caught(Sin::Swallow(OpKind::Flush), scenarios::flushing);
    assert!(flush.contains("errors of [Sync] were swallowed"), "{flush}");
}

#[test]
fn a_driver_that_leaves_something_open_is_caught() {
    let leak = caught(Sin::Leak, scenarios::writing_blocks);
    assert!(leak.contains("files that are still open"), "{leak}");
}
