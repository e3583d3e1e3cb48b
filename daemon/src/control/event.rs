//! What clients are told unasked.

use std::time::{Duration, SystemTime};

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

/// Adds all events to the schema.
pub(crate) fn describe(collector: &mut Collector) {
    collector.event::<BlockExportDeleted>("BLOCK_EXPORT_DELETED", &[]);
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
        }
    }

    fn now(name: &'static str, data: &impl Qapi, key: Option<String>) -> Self {
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { name, data: data.to_value(), time, key }
    }
}
