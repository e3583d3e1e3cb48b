//! What queries are told about a file.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::json;

use super::Kind;
use crate::base::{IoError, SECTOR};
use crate::graph::DriverInfo;
use crate::rt::system_call;

/// What `driver-specific` of `query-blockstats` counts.
#[derive(Debug, Default)]
pub(super) struct Counts {
    discards_ok: AtomicU64,
    discards_failed: AtomicU64,
    discarded_bytes: AtomicU64,
}

impl Counts {
    /// A discard of `bytes` has ended.
    pub(super) fn discarded(&self, bytes: u64, result: Result<(), IoError>) {
        match result {
            Ok(()) => {
                self.discards_ok.fetch_add(1, Relaxed);
                self.discarded_bytes.fetch_add(bytes, Relaxed);
            }
            Err(_) => {
                self.discards_failed.fetch_add(1, Relaxed);
            }
        }
    }
}

/// The bytes that the file occupies, as far as the kernel tells.
pub(super) fn allocated(fd: &OwnedFd) -> Option<u64> {
    let stat = system_call(|| rustix::fs::fstat(fd)).ok()?;
    u64::try_from(stat.st_blocks).ok()?.checked_mul(SECTOR)
}

/// The answer to queries.
pub(super) fn info(kind: Kind, filename: &str, allocated: Option<u64>, counts: &Counts) -> DriverInfo {
    let driver = kind.name();
    DriverInfo {
        driver,
        filename: filename.to_owned(),
        allocated,
        dirty: Some(false),
        specific: Some(json!({ "type": "file", "data": {} })),
        statistics: Some(json!({
            "driver": driver,
            "discard-nb-ok": counts.discards_ok.load(Relaxed),
            "discard-nb-failed": counts.discards_failed.load(Relaxed),
            "discard-bytes-ok": counts.discarded_bytes.load(Relaxed),
        })),
        ..DriverInfo::default()
    }
}

impl Kind {
    /// The driver's name in QMP.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Regular => "file",
            Self::Device => "host_device",
        }
    }
}
