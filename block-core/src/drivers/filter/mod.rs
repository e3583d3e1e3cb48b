//! Drivers that stand above another node and say only what they add.

pub mod blkdebug;
pub mod copy_before_write;
pub mod quorum;
pub mod snapshot_access;
pub mod throttle;
