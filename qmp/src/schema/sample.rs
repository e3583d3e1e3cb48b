//! Option types for tests: a graph of drivers in small, with each form that the derive knows.

use super::{Qapi, Size, Value};

/// Options of a node.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub(super) struct NodeOptions {
    #[qapi(flatten)]
    pub(super) common: Common,
    #[qapi(flatten)]
    pub(super) driver: Driver,
}

/// What every node accepts.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub(super) struct Common {
    /// The name by which others
    /// refer to this node.
    pub(super) node_name: Option<String>,
    /// Refuse writes.
    #[qapi(default)]
    pub(super) read_only: bool,
    /// What happens to discards.
    #[qapi(default = Discard::Ignore)]
    pub(super) discard: Discard,
    /// How the host caches.
    pub(super) cache: Option<Cache>,
}

/// Modes of discard.
#[derive(Clone, Copy, Debug, PartialEq, Qapi)]
#[qapi(name = "BlockdevDiscardOptions")]
pub(super) enum Discard {
    /// Drop them.
    Ignore,
    /// Pass them on.
    #[qapi(feature = "unstable")]
    Unmap,
}

/// Cache options.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub(super) struct Cache {
    #[qapi(default)]
    pub(super) direct: bool,
}

#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union, tag = "driver", tag_name = "BlockdevDriver")]
pub(super) enum Driver {
    Raw(Box<Raw>),
    NullCo(Null),
    #[qapi(rename = "blk-quorum")]
    Quorum(Quorum),
    Void,
}

/// A window on its file.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(feature = "dynamic")]
pub(super) struct Raw {
    pub(super) file: NodeRef,
    pub(super) backing: Option<NodeRefOrNull>,
    pub(super) offset: Option<i64>,
    pub(super) size: Option<Size>,
}

/// Nothing.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub(super) struct Null {
    #[qapi(default = 1 << 30)]
    pub(super) size: i64,
    #[qapi(default, feature = "unstable")]
    pub(super) latency_ns: u64,
    pub(super) r#type: Option<u16>,
    pub(super) any: Option<Value>,
}

#[derive(Clone, Debug, PartialEq, Qapi)]
pub(super) struct Quorum {
    pub(super) children: Vec<NodeRef>,
}

#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(alternate, name = "BlockdevRef")]
pub(super) enum NodeRef {
    Definition(Box<NodeOptions>),
    Reference(String),
}

#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(alternate, name = "BlockdevRefOrNull")]
pub(super) enum NodeRefOrNull {
    Definition(Box<NodeOptions>),
    Reference(String),
    Null,
}

/// A switch or a list; on the command line the switch is a word.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(alternate)]
pub(super) enum Switch {
    Flag(bool),
    List(Vec<u32>),
}
