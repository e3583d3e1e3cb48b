//! Which files an image names, for who opens them before the image.

use super::crypt;
use super::extensions::Extensions;
use super::header::{DATA_FILE, Header, MAGIC};
use super::open::part;
use crate::base::{ByteRange, Result, ResultExt, SECTOR};
use crate::graph::Child;

/// Files that an image names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct References {
    /// What it stands on.
    pub backing_file: Option<String>,
    /// The format of that, if it is named too.
    pub backing_format: Option<String>,
    /// The image keeps its data in another file, whatever it says of the name.
    pub has_data_file: bool,
    /// What it calls that file.
    pub data_file: Option<String>,
    /// How the disk is encrypted, if it is: `aes` or `luks`.
    pub encryption: Option<&'static str>,
}

/// The first bytes are those of an image.
pub fn is_it(start: &[u8]) -> bool {
    let version = start.get(4..8).and_then(|version| version.try_into().ok()).map_or(0, u32::from_be_bytes);
    start.starts_with(&MAGIC) && version >= 2
}

/// What the image in `file` names. Only its first cluster is looked at.
pub async fn references(file: Child<'_>) -> Result<References> {
    let sector = part(file, ByteRange::whole(SECTOR)).await.doing(|| "Could not read the header")?;
    let header = Header::parse(&sector)?;
    let cluster = ByteRange::whole(1 << header.cluster_bits);
    let cluster = part(file, cluster).await.doing(|| "Could not read the header extensions")?;
    let has_data_file = header.has(DATA_FILE);
    let Extensions { backing_file, backing_format, data_file, .. } = Extensions::parse(&header, &cluster)?;
    let encryption = crypt::kind(&header);
    Ok(References { backing_file, backing_format, has_data_file, data_file, encryption })
}
