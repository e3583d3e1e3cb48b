//! Harnesses that tests across rooms share.

pub mod cloud_kernel;
pub mod golden;
pub mod guest;
pub mod lines;
pub mod process;
pub mod qmp;
pub mod scene;
pub mod server;
pub mod tables;
pub mod vhost_user;
pub mod watched;
