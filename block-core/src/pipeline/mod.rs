//! A request above a driver: checked once, kept apart from what it overlaps, aligned, split, and handed down.
//!
//! This is where [`Child`](crate::graph::Child) gets its `read` and `write`; it is also where the two friendlier
//! kinds of driver author are served: [`Format`] says where data is, [`Filter`] says what it adds.

mod align;
mod announce;
mod child;
mod direct;
mod filter;
mod format;
pub mod sealed;
mod status;
mod zeroes;

pub use filter::{Filter, Filtered, Request};
pub use format::{Access, Format, Mapped, NoTicket, Ticket, read_mapped, write_mapped};
pub use sealed::Seal;
pub use status::{Content, Status};
