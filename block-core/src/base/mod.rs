//! Words that every room uses: ranges, units and the two kinds of error. No I/O, no threads, no `unsafe`.

mod canary;
#[cfg(counted)]
#[doc(hidden)] // public for one test alone
pub mod counted;
mod error;
mod range;
pub(crate) mod shim;
mod sparingly;

pub(crate) use canary::canary;
pub use error::{Error, IoError, Result, ResultExt};
pub use range::{ByteRange, SECTOR, align_down, align_up, is_aligned};
pub use sparingly::Sparingly;
