//! Making images: one variant a format, as `blockdev-create` has them.

use qmp::Qapi;

use crate::base::{Error, Result};
use crate::drivers::protocol::file::{self, EXTENT_SIZE_HINT};
use crate::graph::Preallocation;

/// What is to be made.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union, tag = "driver", tag_name = "BlockdevDriver")]
pub enum BlockdevCreateOptions {
    /// A regular file of the host.
    #[qapi(rename = "file")]
    File(BlockdevCreateOptionsFile),
}

/// A regular file of the host.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevCreateOptionsFile {
    /// The path. A file that is there already loses its contents, unless somebody uses it.
    pub filename: String,
    /// In bytes.
    pub size: u64,
    /// Whether space is reserved or written.
    #[qapi(default = PreallocMode::Off)]
    pub preallocation: PreallocMode,
    /// No copy-on-write (btrfs); elsewhere nothing.
    #[qapi(default = false)]
    pub nocow: bool,
    /// Allocate in pieces of this many bytes (XFS); 0: as the file system likes. Elsewhere nothing.
    #[qapi(default = u64::from(EXTENT_SIZE_HINT))]
    pub extent_size_hint: u64,
}

/// How room is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum PreallocMode {
    /// Nothing is allocated.
    Off,
    /// Tables are allocated, data is not.
    Metadata,
    /// Space is reserved without being written.
    Falloc,
    /// Zeroes are written.
    Full,
}

impl From<PreallocMode> for Preallocation {
    fn from(mode: PreallocMode) -> Self {
        match mode {
            PreallocMode::Off => Self::Off,
            PreallocMode::Metadata => Self::Metadata,
            PreallocMode::Falloc => Self::Falloc,
            PreallocMode::Full => Self::Full,
        }
    }
}

/// Makes an image. If that fails, what was not there before is gone again.
pub async fn create(options: BlockdevCreateOptions) -> Result<()> {
    match options {
        BlockdevCreateOptions::File(own) => create_file(own).await,
    }
}

async fn create_file(own: BlockdevCreateOptionsFile) -> Result<()> {
    let hint = u32::try_from(own.extent_size_hint);
    file::create(file::CreateOptions {
        filename: own.filename,
        size: own.size,
        preallocation: own.preallocation.into(),
        nocow: own.nocow,
        extent_size_hint: hint.map_err(|_| Error::new("Extent size hint must not be larger than 4294967295"))?,
    })
    .await
}
