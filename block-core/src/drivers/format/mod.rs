//! Image formats: they say where guest data is, and `pipeline` moves it.

pub mod luks;
pub mod qcow2;
pub mod raw;
pub(crate) mod start;

use crate::base::IoError;
use crate::graph::{Child, Preallocation};

/// Fails where a file that cannot grow ends before `end`. Asked before a new image destroys what is there.
fn check_room(child: Child<'_>, end: u64) -> Result<(), IoError> {
    if child.moving_end().is_none() && child.size() < end { Err(IoError::NoSpace) } else { Ok(()) }
}

/// The file of a new image has room up to `end`. Space that a file system cannot reserve is written.
async fn grown(child: Child<'_>, end: u64, how: Preallocation) -> Result<(), IoError> {
    check_room(child, end)?;
    if child.moving_end().is_none() {
        return Ok(());
    }
    match child.set_end(end, how).await {
        Err(IoError::Unsupported) if how == Preallocation::Falloc => child.set_end(end, Preallocation::Full).await,
        other => other,
    }
}
