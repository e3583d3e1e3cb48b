//! The process `trellisd`, as a library so that tests reach its rooms.

pub mod export;
