//! The drivers, in three rooms: `protocol` talks to the kernel or a peer, `format` knows the bytes of an image and
//! moves none, `filter` says only what it adds. No driver names another; who opens which child is `catalog.rs`.

pub mod format;
pub mod protocol;

use std::future::Future;

use crate::base::Result;
use crate::graph::{ChildId, Driver, NodeOptions};

/// A driver's own options, and how a node is made of them.
pub trait Open: Clone + PartialEq + Send + 'static {
    /// What is opened.
    type Driver: Driver;

    /// Opens what the options name, under the common options of the node. `children` are the driver's names for what
    /// the catalog opens below it, in the order of the catalog's line.
    fn open(&self, common: NodeOptions, children: &[ChildId]) -> impl Future<Output = Result<Opened<Self::Driver>>>;
}

/// A driver that is open and not in the graph yet. Dropping it closes it.
pub struct Opened<D: Driver> {
    /// What all configurations share.
    pub driver: D,
    /// The first configuration.
    pub conf: D::Conf,
    /// The common options in force: `auto_read_only` may have turned `read_only` on.
    pub options: NodeOptions,
}
