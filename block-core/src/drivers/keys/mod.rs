//! Keys of encrypted disks, for the formats that have them: what takes long is done on a helper thread. `ring` is the key
//! slots of an open image.

mod ring;

use std::time::Duration;

use crate::base::{ByteRange, Error, IoError, Result, ResultExt};
use crate::codec::SecretBytes;
use crate::codec::cipher::SectorCipher;
use crate::codec::luks::{Budget, Header, Unlocked, v1};
use crate::codec::secret::Secret;
use crate::graph::{Child, Objects, WriteFlags};
use crate::rt::{IoBuf, blocking_long, random};

pub use self::ring::{Home, KeyChange, KeyRing};

/// The secret of this id.
pub fn secret(objects: &Objects, id: &str) -> Result<Secret> {
    let found = objects.find::<Secret>(id);
    found.map(|secret| (*secret).clone()).ok_or_else(|| Error::new(format!("No secret with id '{id}'")))
}

/// The secret that an option names, which may not be left out.
pub fn needed_secret(objects: &Objects, id: Option<&str>) -> Result<Secret> {
    secret(objects, id.ok_or_else(|| Error::new("Parameter 'key-secret' is required for cipher"))?)
}

/// The material of the slots that may open the disk, whose header begins at `base` of the child.
pub async fn read_material(child: Child<'_>, base: u64, header: &Header) -> Result<Vec<SecretBytes>> {
    let mut all = Vec::new();
    for slot in header.active() {
        let doing = || format!("Could not read the material of key slot {}", slot.index);
        let at = slot.material.shifted(base).ok_or(IoError::OutOfRange).doing(doing)?;
        all.push(SecretBytes::new(fetch(child, at).await.doing(doing)?));
    }
    Ok(all)
}

/// The key, if the passphrase fits a slot.
pub async fn unlock(header: Header, passphrase: Secret, material: Vec<SecretBytes>) -> Result<(Header, Unlocked)> {
    let derived = blocking_long(move || {
        let unlocked = header.unlock(passphrase.bytes(), material, &Budget::default())?;
        let unlocked = unlocked.ok_or_else(|| Error::new("Invalid password, cannot unlock any keyslot"))?;
        Ok((header, unlocked))
    });
    derived.await
}

/// The keys of an image that is being made.
#[derive(Debug)]
pub struct NewKeys {
    /// The header.
    pub header: v1::Header,
    /// The material of its first slot.
    pub material: SecretBytes,
    /// What the disk is encrypted with.
    pub key: SecretBytes,
}

impl NewKeys {
    /// Derives them. What we would not open is not made either.
    pub async fn derive(new: v1::New, passphrase: Secret) -> Result<Self> {
        let made = blocking_long(move || {
            let mut source = |out: &mut [u8]| random(out).doing(|| "There are no random bytes");
            let (header, key, material) = v1::Header::create(&new, passphrase.bytes(), &mut source)?;
            Ok::<_, Error>(Self { header, material, key })
        });
        let made = made.await?;
        check_time(&made.header)?;
        Ok(made)
    }

    /// Ready for use.
    pub fn cipher(&self) -> Result<SectorCipher> {
        self.header.payload().cipher(&self.key)
    }
}

/// One more passphrase for the key, in a header that is not written yet; and the slot's material.
pub async fn filled(
    mut header: v1::Header,
    index: usize,
    passphrase: Secret,
    key: SecretBytes,
    time: Duration,
) -> Result<(v1::Header, SecretBytes)> {
    let derived = blocking_long(move || {
        let mut source = |out: &mut [u8]| random(out).doing(|| "There are no random bytes");
        let material = header.fill(index, passphrase.bytes(), &key, time, &mut source)?;
        Ok((header, material))
    });
    let (header, material): (v1::Header, SecretBytes) = derived.await?;
    check_time(&header)?;
    Ok((header, material))
}

fn check_time(header: &v1::Header) -> Result<()> {
    header.check_costs(&Budget::default()).doing(|| "The iteration time is too long")
}

/// All of the range.
pub async fn fetch(child: Child<'_>, at: ByteRange) -> Result<Vec<u8>, IoError> {
    let buf = IoBuf::private(at.len())?;
    child.read(at, buf.clone()).await?;
    Ok(buf.to_vec())
}

/// Writes bytes.
pub async fn put(child: Child<'_>, start: u64, bytes: &[u8]) -> Result<(), IoError> {
    let at = ByteRange::new(start, bytes.len() as u64).ok_or(IoError::OutOfRange)?;
    let buf = IoBuf::private(at.len())?;
    buf.write_at(0, bytes);
    child.write(at, buf, WriteFlags::default()).await
}
