//! What a file says of itself: which format it is in, and which other files its image names.
//!
//! For tools, which open what they are pointed at as people expect. The daemon asks neither: its nodes are what operators
//! say, and no file is opened because an image names it.

use crate::base::{ByteRange, Result, ResultExt};
use crate::drivers::format::qcow2;
use crate::graph::Child;
use crate::rt::IoBuf;

pub use crate::drivers::format::qcow2::References;
pub use crate::drivers::format::start::{PROBED, guessed};

/// The format that a file seems to be in, by its first bytes: `raw` where they are no format's. A format that there is no
/// driver for is refused by its name, so that nobody takes its tables for a disk.
pub async fn probe(file: Child<'_>) -> Result<&'static str> {
    guessed(&first_bytes(file).await?)
}

/// The bytes that a format is known by: [`PROBED`] of them, or all.
pub async fn first_bytes(file: Child<'_>) -> Result<Vec<u8>> {
    let at = ByteRange::whole(file.size().min(PROBED));
    let buf = IoBuf::private(at.len()).doing(|| "Could not read the first bytes")?;
    file.read(at, buf.clone()).await.doing(|| "Could not read image for determining its format")?;
    Ok(buf.to_vec())
}

/// Which files the image in `file` names, if `driver` is a format whose images do.
pub async fn references(driver: &str, file: Child<'_>) -> Result<References> {
    match driver {
        "qcow2" => qcow2::references(file).await,
        _ => Ok(References::default()),
    }
}
