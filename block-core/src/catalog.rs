//! The registry: one line a driver. From it come the driver's name in QMP, its branch of [`BlockdevOptions`], how it
//! is opened, and its place in the test suites that go through all drivers.
//!
//! Opening happens here too: names, inherited options, inline children. A tree of nodes is opened bottom-up without
//! being in the graph, and then added in one change: an error leaves no node, no lock and no descriptor.

use std::any::Any;
use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use qmp::Qapi;
use qmp::schema::Union;

use crate::base::{Error, Result};
use crate::drivers::Open;
use crate::drivers::format::raw::RawOptions;
use crate::drivers::protocol::file::{FileOptions, HostDeviceOptions};
use crate::drivers::protocol::null::{NullAioOptions, NullOptions};
use crate::graph::{
    ChildId, DetectZeroes, DiscardMode, Edges, Graph, GraphEdit, NewNode, NodeId, NodeOptions, Permit, Reopen, Role,
};

drivers! {
    /// A regular file of the host.
    "file" File(FileNode): FileOptions {}
    /// A block device of the host.
    "host_device" HostDevice(HostDeviceNode): HostDeviceOptions {}
    /// A disk of nothing.
    "null-co" NullCo(NullCoNode): NullOptions {}
    /// A disk of nothing, under another name.
    "null-aio" NullAio(NullAioNode): NullAioOptions {}
    /// The bytes of a file as they are.
    "raw" Raw(RawNode): RawOptions {
        /// Where the bytes are.
        file: Data
    }
}
