//! `trellis-img` and `qemu-img`, side by side: each script is run by both on copies of the same files, and after every line
//! exit code, output and errors are compared, and at the end the images.
//!
//! Where they differ, a line says why; docs/trellis-img.md has these reasons as a table.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

mod bench;
mod change;
mod check;
mod compare;
mod convert;
mod create;
mod dd;
mod device;
mod encrypted;
mod hostile;
mod info;
mod interrupted;
mod locked;
mod luks;
mod map;
mod measure;
mod numbers;
mod rate;
mod resize;
mod scene;
mod snapshot;
mod storage;
mod usage;
