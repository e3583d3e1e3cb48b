//! Harnesses that tests across rooms share: a server to start, a client that can lie, and the check after each lie.
//!
//! Nothing here asserts what an answer must be; that is said in `tests/`, one named test a row.
#![expect(
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers; lengths that a server gives are compared, never trusted"
)]

pub mod scene;
pub mod server;
pub mod vhost_user;
