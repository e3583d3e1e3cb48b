//! A Linux guest in a real QEMU, on disks that the server under test exports.
//!
//! [`Guest`] boots QEMU on the server's vhost-user sockets and runs shell commands in it. What the guest consists of is
//! `initramfs.rs` and `init.sh`; its kernel comes from [`crate::cloud_kernel`]. Everything that is waited for has a
//! limit: a peer that hangs fails its test.

mod initramfs;
mod machine;

pub use machine::Guest;
