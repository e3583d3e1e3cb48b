//! What clients are told unasked.

use std::time::{Duration, SystemTime};

use block_core::base::{ByteRange, IoError, SECTOR};
use block_core::graph::{NodeEvent, QuorumOp};
use block_core::job::Status;
use qmp::Qapi;
use qmp::schema::{Collector, Value};

use crate::commands::{JobStatus, signed};

/// An event with the time at which it happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its name on the wire.
    pub name: &'static str,
    /// Its members.
    pub data: Value,
    /// Since 1970.
    pub time: Duration,
    /// Events of one key come at most once a second, the last one winning. `None`: each one is told.
    pub key: Option<String>,
}

/// An export is gone, with its socket and its threads.
#[derive(Clone, Debug, Qapi)]
struct BlockExportDeleted {
    /// The export's id.
    id: String,
}

/// A guest's requests wait, and none has ended for a while: storage hangs, or a throttle holds them. Told once; what ends
/// it is in the log.
#[derive(Clone, Debug, Qapi)]
struct BlockExportStalled {
    /// The export's id.
    id: String,
    /// Requests that wait.
    in_flight: u32,
    /// No request has ended for so long, at least.
    seconds: u64,
}

/// A write went past a node's threshold, which is disarmed now.
#[derive(Clone, Debug, Qapi)]
struct BlockWriteThreshold {
    /// The node.
    node_name: String,
    /// Bytes by which the write went past it.
    amount_exceeded: u64,
    /// The threshold in bytes.
    write_threshold: u64,
}

/// A request on a node failed.
#[derive(Clone, Debug, Qapi)]
struct BlockIoError {
    /// Empty: exports are no objects of the tree.
    qom_path: String,
    /// Empty: there are no devices.
    device: String,
    /// The node that the request came in at.
    node_name: Option<String>,
    /// What kind of request it was; all but reads count as writes.
    operation: IoOperationType,
    /// What became of it. It is always reported: the guest sees an error.
    action: BlockErrorAction,
    /// The storage is full.
    nospace: Option<bool>,
    /// The error in words, for people.
    reason: String,
}

/// What kind of request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
enum IoOperationType {
    /// A read.
    Read,
    /// A write, or anything else that changes or keeps data.
    Write,
}

/// What becomes of a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
enum BlockErrorAction {
    /// Nobody is told.
    Ignore,
    /// The guest is told.
    Report,
    /// The guest is stopped.
    Stop,
}

/// A copy in a quorum failed, or said something else than most.
#[derive(Clone, Debug, Qapi)]
struct QuorumReportBad {
    /// What it was asked.
    r#type: QuorumOpType,
    /// How it failed; absent where it gave other data.
    error: Option<String>,
    /// The copy.
    node_name: String,
    /// The first sector of 512 bytes.
    sector_num: i64,
    /// How many sectors.
    sectors_count: i64,
}

/// The tables of an image contradict each other.
#[derive(Clone, Debug, Qapi)]
struct BlockImageCorrupted {
    /// Always empty: there are no named devices here.
    device: String,
    /// The node.
    node_name: Option<String>,
    /// What is wrong.
    msg: String,
    /// Where in the file, in bytes.
    offset: Option<i64>,
    /// How many bytes of it.
    size: Option<i64>,
    /// Nothing is written to the image any more. Always true.
    fatal: bool,
}

/// What the copies in a quorum were asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
enum QuorumOpType {
    /// To read.
    Read,
    /// To write data or zeroes, or to discard.
    Write,
    /// To make stable.
    Flush,
}

/// Too few copies in a quorum agreed, and a request failed.
#[derive(Clone, Debug, Qapi)]
struct QuorumFailure {
    /// The quorum.
    reference: String,
    /// The first sector of 512 bytes.
    sector_num: i64,
    /// How many sectors.
    sectors_count: i64,
}

/// A job has come to another part of its life.
#[derive(Clone, Debug, Qapi)]
struct JobStatusChange {
    /// The job.
    id: String,
    /// Where it is now.
    status: JobStatus,
}

/// Adds all events to the schema.
pub(crate) fn describe(collector: &mut Collector) {
    collector.event::<BlockExportDeleted>("BLOCK_EXPORT_DELETED", &[]);
    collector.event::<BlockExportStalled>("X_BLOCK_EXPORT_STALLED", &[]);
    collector.event::<BlockImageCorrupted>("BLOCK_IMAGE_CORRUPTED", &[]);
    collector.event::<BlockIoError>("BLOCK_IO_ERROR", &[]);
    collector.event::<BlockWriteThreshold>("BLOCK_WRITE_THRESHOLD", &[]);
    collector.event::<JobStatusChange>("JOB_STATUS_CHANGE", &[]);
    collector.event::<QuorumReportBad>("QUORUM_REPORT_BAD", &[]);
    collector.event::<QuorumFailure>("QUORUM_FAILURE", &[]);
}

impl Event {
    /// An export is gone.
    pub fn export_deleted(id: &str) -> Self {
        Self::now("BLOCK_EXPORT_DELETED", &BlockExportDeleted { id: id.to_owned() }, None)
    }

    /// Nothing gets on in an export.
    pub fn export_stalled(id: &str, in_flight: u32, seconds: u64) -> Self {
        Self::now("X_BLOCK_EXPORT_STALLED", &BlockExportStalled { id: id.to_owned(), in_flight, seconds }, None)
    }

    /// A job has come to another part of its life.
    pub fn job_status_change(id: &str, status: Status) -> Self {
        Self::now("JOB_STATUS_CHANGE", &JobStatusChange { id: id.to_owned(), status: status.into() }, None)
    }

    /// Something happened to a node.
    pub fn of_node(event: NodeEvent) -> Self {
        match event {
            NodeEvent::WriteThreshold { node, exceeded, threshold } => {
                let key = format!("BLOCK_WRITE_THRESHOLD {node}");
                let data =
                    BlockWriteThreshold { node_name: node, amount_exceeded: exceeded, write_threshold: threshold };
                // A guest decides when it writes, and a client may re-arm at once.
                Self::now("BLOCK_WRITE_THRESHOLD", &data, Some(key))
            }
            NodeEvent::IoError { node, write, error } => {
                let key = format!("BLOCK_IO_ERROR {node}");
                let data = BlockIoError {
                    qom_path: String::new(),
                    device: String::new(),
                    node_name: Some(node),
                    operation: if write { IoOperationType::Write } else { IoOperationType::Read },
                    action: BlockErrorAction::Report,
                    nospace: Some(error == IoError::NoSpace),
                    reason: error.to_string(),
                };
                Self::now("BLOCK_IO_ERROR", &data, Some(key))
            }
            NodeEvent::ImageCorrupted { node, what, at } => {
                let data = BlockImageCorrupted {
                    device: String::new(),
                    node_name: Some(node),
                    msg: what,
                    offset: i64::try_from(at.start()).ok(),
                    size: i64::try_from(at.len()).ok(),
                    fatal: true,
                };
                Self::now("BLOCK_IMAGE_CORRUPTED", &data, None)
            }
            NodeEvent::QuorumReportBad { node, op, error, at } => {
                let key = format!("QUORUM_REPORT_BAD {node}");
                let (sector_num, sectors_count) = sectors(at);
                let (r#type, error) = (op.into(), error.map(system_text));
                let data = QuorumReportBad { r#type, error, node_name: node, sector_num, sectors_count };
                Self::now("QUORUM_REPORT_BAD", &data, Some(key))
            }
            NodeEvent::QuorumFailure { node, at } => {
                let key = format!("QUORUM_FAILURE {node}");
                let (sector_num, sectors_count) = sectors(at);
                Self::now("QUORUM_FAILURE", &QuorumFailure { reference: node, sector_num, sectors_count }, Some(key))
            }
        }
    }

    fn now(name: &'static str, data: &impl Qapi, key: Option<String>) -> Self {
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { name, data: data.to_value(), time, key }
    }
}

impl From<QuorumOp> for QuorumOpType {
    fn from(op: QuorumOp) -> Self {
        match op {
            QuorumOp::Read => Self::Read,
            QuorumOp::Write => Self::Write,
            QuorumOp::Flush => Self::Flush,
        }
    }
}

/// The sectors that a range touches: the first, and how many.
fn sectors(at: ByteRange) -> (i64, i64) {
    let first = at.start() / SECTOR;
    (signed(first), signed(at.end().div_ceil(SECTOR) - first))
}

/// The C library's text for an error, as clients of QEMU know it.
fn system_text(error: IoError) -> String {
    let errno = error.errno();
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    text.trim_end_matches(&format!(" (os error {errno})")).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_quorums_events_are_told_in_sectors() {
        let at = ByteRange::new(700, 1000).unwrap();
        let (node, op) = ("n".to_owned(), QuorumOp::Read);
        let bad = |error| Event::of_node(NodeEvent::QuorumReportBad { node: node.clone(), op, error, at }).data;
        let other_data = json!({ "type": "read", "node-name": "n", "sector-num": 1, "sectors-count": 3 });
        assert_eq!(bad(None), other_data);
        assert_eq!(bad(Some(IoError::NoSpace))["error"], "No space left on device");
        let failure = Event::of_node(NodeEvent::QuorumFailure { node, at: ByteRange::new(512, 512).unwrap() });
        assert_eq!(failure.data, json!({ "reference": "n", "sector-num": 1, "sectors-count": 1 }));
        assert!(failure.key.is_some(), "a guest can cause as many as it likes");
    }
}
