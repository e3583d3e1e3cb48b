//! Image formats: they say where guest data is, and `pipeline` moves it.

pub mod luks;
pub mod qcow2;
pub mod raw;
pub(crate) mod start;
