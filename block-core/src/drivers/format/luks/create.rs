//! Making an image of LUKS1. The header is the last thing that is written, so that half an image is none.

use std::time::Duration;

use crate::base::{ByteRange, Error, IoError, Result, ResultExt, SECTOR};
use crate::codec::cipher::{Family, IvGen, Mode, Spec};
use crate::codec::hash::Hash;
use crate::codec::luks::{v1, v2};
use crate::codec::secret::Secret;
use crate::drivers::keys::{NewKeys, put};
use crate::graph::{Child, Preallocation};

/// What a new image is to be (QEMU: `BlockdevCreateOptionsLUKS`; the files are nodes, and given apart).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk; a multiple of 512.
    pub size: u64,
    /// How sectors are encrypted.
    pub spec: Spec,
    /// Bytes of the key.
    pub key_len: usize,
    /// For what is derived.
    pub hash: Hash,
    /// How long one try of a passphrase takes on this machine.
    pub time: Duration,
    /// How room is made.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// A disk of `size` bytes as QEMU makes it where nothing else is said.
    pub fn of(size: u64) -> Self {
        Self {
            size,
            spec: Spec { family: Family::Aes, mode: Mode::Xts, iv: Some(IvGen::Plain64) },
            key_len: 64,
            hash: Hash::Sha256,
            time: Duration::from_secs(2),
            preallocation: Preallocation::Off,
        }
    }

    /// What its header is made of.
    pub fn header(&self, detached: bool) -> v1::New {
        let Self { spec, key_len, hash, time, .. } = *self;
        v1::New { spec, key_len, hash, time, detached }
    }

    /// Derives its keys; what is not made is refused before. Takes long: not in the graph, where others would wait for it.
    pub async fn keys(&self, detached: bool, passphrase: Secret) -> Result<NewKeys> {
        if i64::try_from(self.size).is_err() || !self.size.is_multiple_of(SECTOR) {
            return Err(Error::new("Image size must be a multiple of 512 bytes, and at most 8 EiB"));
        }
        if self.preallocation == Preallocation::Metadata {
            return Err(Error::new("Unsupported preallocation mode 'metadata'"));
        }
        let new = self.header(detached);
        self.end(if detached { 0 } else { new.header_len() })?;
        NewKeys::derive(new, passphrase).await
    }

    /// Where the disk ends in its file.
    fn end(&self, payload: u64) -> Result<u64> {
        let disk = ByteRange::new(payload, self.size);
        disk.map(ByteRange::end).ok_or_else(|| Error::new("The disk is too large for a file"))
    }
}

/// Makes an image in `file`, whose contents are lost, with its header in `header` if that is given; then `file` holds the disk
/// alone, and need not be given where it is made otherwise. `keys` are those of [`CreateOptions::keys`]. The caller may write and resize both, and nobody else uses them.
pub async fn create(
    file: Option<Child<'_>>,
    header: Option<Child<'_>>,
    options: &CreateOptions,
    keys: &NewKeys,
) -> Result<()> {
    let doing = || "Could not create the luks image";
    let keeper = header.or(file).ok_or_else(|| Error::new("Either 'file' or 'header' has to be given"))?;
    let NewKeys { header: new, material, .. } = keys;
    let end = options.end(new.payload().offset)?;
    // What was there is no image from here on.
    emptied(keeper).await.doing(doing)?;
    if let Some(file) = file {
        if header.is_some() {
            emptied(file).await.doing(doing)?;
        }
        grown(file, end, options.preallocation).await.doing(doing)?;
    }
    // The material of all slots has its room, so that whoever fills one later finds it.
    let last = new.material(v1::SLOTS - 1).end();
    if keeper.size() < last {
        grown(keeper, last, Preallocation::Off).await.doing(doing)?;
    }
    put(keeper, new.material(0).start(), material.expose()).await.doing(doing)?;
    if let (Some(file), Some(_)) = (file, header) {
        file.flush().await.doing(doing)?;
    }
    keeper.flush().await.doing(doing)?;
    put(keeper, 0, &new.to_bytes()).await.doing(doing)?;
    keeper.flush().await.doing(doing)
}

/// Nothing that is there is a header of either version any more: second copies of LUKS2 are looked for at all their places, when
/// the first one is gone.
async fn emptied(child: Child<'_>) -> Result<(), IoError> {
    if child.moving_end().is_some() {
        return child.set_end(0, Preallocation::Off).await;
    }
    put(child, 0, &[0; v1::LEN]).await?;
    for place in v2::SIZES {
        if place.checked_add(WIPED as u64).is_some_and(|end| end <= child.size()) {
            put(child, place, &[0; WIPED]).await?;
        }
    }
    // Before anything new is written: a crash leaves no mixture.
    child.flush().await
}

/// Space that a file system cannot reserve is written.
async fn grown(file: Child<'_>, end: u64, how: Preallocation) -> Result<(), IoError> {
    if file.moving_end().is_none() {
        return if file.size() < end { Err(IoError::NoSpace) } else { Ok(()) };
    }
    match file.set_end(end, how).await {
        Err(IoError::Unsupported) if how == Preallocation::Falloc => file.set_end(end, Preallocation::Full).await,
        other => other,
    }
}

/// Bytes at the place of a header: its magic, and what a device writes at once.
const WIPED: usize = 512;
