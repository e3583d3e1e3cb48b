//! Drivers that stand above another node and say only what they add.

pub mod blkdebug;
pub mod blklogwrites;
pub mod blkreplay;
pub mod blkverify;
pub mod compress;
pub mod copy_before_write;
pub mod copy_on_read;
pub mod preallocate;
pub mod quorum;
pub mod snapshot_access;
pub mod throttle;
