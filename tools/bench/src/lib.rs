//! Driving a vhost-user-blk server from outside: a client, a server under supervision, and what the kernel says about both.
//!
//! The commands of `trellis-bench` and the tests that need a well-behaved virtio-blk client stand on this library. It knows
//! nothing of Trellis: every server that takes the command line of `qemu-storage-daemon` can be driven and measured.

pub mod client;
pub mod process;
pub mod qmp;
pub mod server;
pub mod storage;
pub mod sys;
