//! What makes a program a well-behaved process: background, pid file, inherited descriptors, signals, limits.
//! Nothing here knows QMP or blocks.

pub mod background;
pub mod inherited;
pub mod pidfile;
pub mod signals;
pub mod socket;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit on open files to what the system lets us have: each export and each queue needs several.
pub fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("could not raise the limit on open files: {error}");
    }
}
