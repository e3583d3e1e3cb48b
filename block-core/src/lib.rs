//! The block graph and everything that moves bytes. Rooms, and which may use which, are in ARCHITECTURE.md;
//! `tests/tests/tidy.rs` keeps the list.

pub mod base;
pub mod bitmap;
pub mod catalog;
pub mod codec;
pub mod drivers;
pub mod graph;
pub mod job;
pub mod pipeline;
pub mod port;
pub mod rt;
