//! What clients are told unasked.

use std::time::{Duration, SystemTime};

use block_core::base::IoError;
use block_core::graph::NodeEvent;
use qmp::Qapi;
use qmp::schema::{Collector, Value};

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

/// Adds all events to the schema.
pub(crate) fn describe(collector: &mut Collector) {
    collector.event::<BlockExportDeleted>("BLOCK_EXPORT_DELETED", &[]);
    collector.event::<BlockIoError>("BLOCK_IO_ERROR", &[]);
    collector.event::<BlockWriteThreshold>("BLOCK_WRITE_THRESHOLD", &[]);
}

impl Event {
    /// An export is gone.
    pub fn export_deleted(id: &str) -> Self {
        Self::now("BLOCK_EXPORT_DELETED", &BlockExportDeleted { id: id.to_owned() }, None)
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
        }
    }

    fn now(name: &'static str, data: &impl Qapi, key: Option<String>) -> Self {
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { name, data: data.to_value(), time, key }
    }
}
