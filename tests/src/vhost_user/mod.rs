//! A vhost-user-blk front-end of our own, from bytes upwards, with full control over what is wrong.
//!
//! `protocol` has the numbers, `wire` the socket, `memory` what the guest shares, `ring` the split virtqueue, `client` a
//! front-end that behaves unless told otherwise. Every wait ends after [`PATIENCE`].
#![expect(
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers; lengths that a server gives are compared, never trusted"
)]

pub mod client;
pub mod memory;
pub mod protocol;
pub mod ring;
pub mod wire;

use std::time::Duration;

/// How long any single answer may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(5);
