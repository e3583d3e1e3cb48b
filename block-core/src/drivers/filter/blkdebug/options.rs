//! What operators write about a blkdebug node.

use qmp::Qapi;

use crate::graph::{DebugEvent, PermSet};

/// A filter that makes requests fail, wait, or come in odd pieces, for tests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsBlkdebug")]
pub struct BlkdebugOptions {
    /// A file of rules: sections `[inject-error]` and `[set-state]` with lines `key = "value"`.
    pub config: Option<String>,
    /// Requests have to be multiples of this many bytes, a power of two; without it, or with 0, as the image wants it.
    pub align: Option<i64>,
    /// Bytes in one read or write at the most, a multiple of the alignment; 0: as the image wants it.
    pub max_transfer: Option<i32>,
    /// Zeroes are passed on in multiples of this many bytes, a multiple of the alignment; 0: as the image wants it.
    pub opt_write_zero: Option<i32>,
    /// Bytes in one write of zeroes at the most, a multiple of `opt-write-zero`; 0: as the image wants it.
    pub max_write_zero: Option<i32>,
    /// Discards are passed on in multiples of this many bytes, a multiple of the alignment; 0: as the image wants it.
    pub opt_discard: Option<i32>,
    /// Bytes in one discard at the most, a multiple of `opt-discard`; 0: as the image wants it.
    pub max_discard: Option<i32>,
    /// Which requests fail, and when.
    pub inject_error: Option<Vec<InjectErrorOptions>>,
    /// Which events lead from one state to another. A node begins in state 1.
    pub set_state: Option<Vec<SetStateOptions>>,
    /// Permissions on the image that the node takes besides what its users need.
    pub take_child_perms: Option<Vec<BlockPermission>>,
    /// Permissions on the image that the node lets nobody else have.
    pub unshare_child_perms: Option<Vec<BlockPermission>>,
}

/// Requests that fail once an event has happened. The rules of an event are in force until another event sets off
/// such rules of its own; the first one that fits a request decides.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlkdebugInjectErrorOptions")]
pub struct InjectErrorOptions {
    /// What sets the rule off.
    pub event: DebugEvent,
    /// The state in which the event sets it off; 0 or without it: any.
    pub state: Option<i64>,
    /// Which requests fail; without it all but `block-status`.
    pub iotype: Option<IoType>,
    /// How they fail: an errno of Linux, 5 (EIO) if absent. 0: they pass, and no later rule makes them fail.
    pub errno: Option<i64>,
    /// Only requests that this sector of 512 bytes is part of; −1 or without it: all.
    pub sector: Option<i64>,
    /// The rule is gone after one request. False if absent.
    pub once: Option<bool>,
    /// The request fails before it waits for anything. False if absent.
    pub immediately: Option<bool>,
}

/// An event that leads to another state.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlkdebugSetStateOptions")]
pub struct SetStateOptions {
    /// What sets the rule off.
    pub event: DebugEvent,
    /// The state in which it does; 0 or without it: any.
    pub state: Option<i64>,
    /// The state afterwards. If several rules fit, the first one decides.
    #[qapi(rename = "new_state")]
    pub new_state: i64,
}

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlkdebugIOType")]
pub enum IoType {
    /// A read.
    Read,
    /// A write of data.
    Write,
    /// A write of zeroes.
    WriteZeroes,
    /// A discard.
    Discard,
    /// A flush.
    Flush,
    /// The question where data is.
    BlockStatus,
}

/// A permission on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum BlockPermission {
    /// Reads see data that no other user is half-way through changing.
    ConsistentRead,
    /// Writes that change what a reader sees.
    Write,
    /// Writes that leave what a reader sees as it was.
    WriteUnchanged,
    /// Changes of the size.
    Resize,
}

impl From<BlockPermission> for PermSet {
    fn from(one: BlockPermission) -> Self {
        match one {
            BlockPermission::ConsistentRead => Self::CONSISTENT_READ,
            BlockPermission::Write => Self::WRITE,
            BlockPermission::WriteUnchanged => Self::WRITE_UNCHANGED,
            BlockPermission::Resize => Self::RESIZE,
        }
    }
}
