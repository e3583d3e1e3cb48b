//! Words that every room uses: ranges, units and the two kinds of error. No I/O, no threads, no `unsafe`.

mod canary;
mod error;
mod range;
pub(crate) mod shim;

pub(crate) use canary::canary;
pub use error::{Error, IoError, Result, ResultExt};
pub use range::{ByteRange, SECTOR, align_down, align_up, is_aligned};
