//! Drivers that end the graph: the kernel, or nothing, is below them.

pub mod file;
pub mod null;
