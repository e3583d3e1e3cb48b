//! The block graph: its shape, the lock over it, and what a request may see of it.
//!
//! Requests (any thread): [`Root`] → [`Lane`] → [`ViewPin`] → [`IoCx`] → [`Child`]. The control task:
//! [`Graph`] → [`Permit`] → [`Drained`] → [`GraphEdit`]. Driver authors: [`Driver`]. What moves bytes between a
//! child's caller and its driver is in `pipeline/`.

mod activity;
mod agreement;
mod backing;
mod bitmaps;
mod blockers;
mod change;
mod check;
mod control;
mod cx;
mod debug_event;
mod drain;
mod driver;
mod edges;
mod edit;
#[doc(hidden)] // public for the models alone
pub mod gate;
mod geometry;
#[doc(hidden)] // public for the models alone
pub mod grace;
#[doc(hidden)] // public for the models alone
pub mod haste;
mod id;
mod job_cx;
mod lane;
mod node;
mod objects;
mod options;
mod passage;
mod permission;
mod picture;
mod prepare;
mod reopen;
mod resize;
mod shape;
mod snapshots;
mod stats;
#[doc(hidden)] // public for the models alone
pub mod tracked;
mod transaction;
#[doc(hidden)] // public for the models alone
pub mod uses;
mod view;
mod visit;

pub use backing::BackingName;
pub use bitmaps::{BitmapAction, BitmapChange, NodeBitmap};
pub use blockers::{Blocker, Frozen, Operation};
pub use change::Change;
pub use check::{CheckReport, Finding, FindingKind, Findings, Repair};
pub use control::{Committed, Graph, NodeReport, Permit};
pub use cx::{Child, Forked, IoCx};
pub use debug_event::{DebugEvent, Pause};
pub use drain::{Drained, Exclusive};
pub(crate) use driver::DynDriver;
pub use driver::{
    AmendRequest, Amending, ChildChange, Direct, DirectRequest, Driver, DriverInfo, End, Extent, LongWork, Place,
    Preallocation, ReopenRequest, RingEntry, Settled, WriteFlags,
};
pub(crate) use edit::NewRoot;
pub use edit::{DrainedSet, Edges, GraphEdit, NewNode, Owner};
pub use geometry::{Geometry, Limits, MAX_SEGMENTS, MAX_TRANSFER};
pub use grace::Grace;
pub use id::{ChildId, NodeId};
pub use job_cx::{Entered, JobCx};
pub(crate) use lane::Here;
pub use lane::{Lane, Root, ViewPin};
pub use node::{EventSink, NodeEvent, QuorumOp};
pub use objects::Objects;
pub use options::{DetectZeroes, DiscardMode, NodeOptions};
pub use passage::{DirectPlan, Passage, Passed};
pub use permission::{PermSet, Perms, Role};
pub use picture::{EdgeReport, VertexReport};
pub use prepare::Locks;
pub use reopen::Reopen;
pub(crate) use snapshots::Snapshotted;
pub use snapshots::{NewSnapshot, SnapshotChange, SnapshotInfo, SnapshotName, TakeSnapshot};
pub use stats::{OpKind, OpTotals, Totals};
pub(crate) use tracked::{Ticket, Tracked};
pub use transaction::{Pending, Step};
