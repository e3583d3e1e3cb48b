//! What stands on a command line for an image.

use block_core::graph::SnapshotName;

use crate::Cache;

/// How an image is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileName {
    /// A file's name, or `json:{…}`.
    Name(String),
    /// `--image-opts`: `driver=qcow2,file.filename=…`.
    Options(String),
}

impl FileName {
    /// As it was written.
    pub fn text(&self) -> &str {
        match self {
            Self::Name(text) | Self::Options(text) => text,
        }
    }
}

/// An image, and how it is to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// How it is called.
    pub name: FileName,
    /// `-f`; without it the format is guessed.
    pub format: Option<String>,
    /// `-t` or `-T`.
    pub cache: Cache,
    /// It is going to be written.
    pub writable: bool,
    /// It may become larger by being written, or is going to be given another size.
    pub resizes: bool,
    /// `-U`: other programs may do with it what they like.
    pub force_share: bool,
    /// What it stands on is left alone, and looked at neither.
    pub no_backing: bool,
    /// Its data is left alone: only what the image says of itself is wanted.
    pub no_data: bool,
    /// How many layers down another one is that is going to be written.
    pub writable_layer: Option<usize>,
    /// What is set free is passed on to the file.
    pub unmap: bool,
    /// It is not warned of a guessed format.
    pub quiet: bool,
    /// Only what the image says of itself is wanted: nothing is asked for that opens it.
    pub locked: bool,
    /// The id of the secret that opens it, where its name does not say that.
    pub key_secret: Option<String>,
    /// Not the disk, but an internal snapshot of it.
    pub snapshot: Option<SnapshotName>,
}

impl Given {
    /// An image that is only read, in a format that is guessed.
    pub fn named(name: impl Into<String>) -> Self {
        Self::of(FileName::Name(name.into()))
    }

    /// The same for an image that may be called in another way.
    pub fn of(name: FileName) -> Self {
        Self {
            name,
            format: None,
            cache: Cache::WRITEBACK,
            writable: false,
            resizes: false,
            force_share: false,
            no_backing: false,
            no_data: false,
            writable_layer: None,
            unmap: true,
            quiet: false,
            locked: false,
            key_secret: None,
            snapshot: None,
        }
    }
}
