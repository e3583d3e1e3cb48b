//! Harnesses that tests across rooms share.

pub mod cloud_kernel;
pub mod golden;
pub mod guest;
