//! Drivers that stand above another node and say only what they add.

pub mod quorum;
