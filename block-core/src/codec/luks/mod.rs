//! LUKS: what stands before an encrypted disk, and how a passphrase leads to its key.
//!
//! `v1` is the older header, read and written (LUKS1 On-Disk Format Specification 1.2.3); `v2` the newer one, read
//! (LUKS2 On-Disk Format Specification 1.1.x); `budget` what deriving may cost. Both versions say the same to those above:
//! where the payload is and how it is encrypted, where the material of the key slots is, and the key, once they are given
//! that material and a passphrase.

mod budget;
mod info;
pub mod v1;
pub mod v2;

use super::SecretBytes;
use super::cipher::{SectorCipher, Spec};
use super::fields::Fields;
use crate::base::{ByteRange, Error, Result};

pub use self::budget::{Budget, MAX_ARGON2_MEMORY, MAX_ARGON2_WORK, MAX_PBKDF2_ITERATIONS};

/// The first bytes of either version.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Bytes from the beginning of the file that say which version it is, and all that a header of version 1 has.
pub const BEGINNING: u64 = 4096;

/// The version that the first bytes of a file name.
pub fn version(beginning: &[u8]) -> Result<u16> {
    if beginning.get(..MAGIC.len()) != Some(&MAGIC) {
        return Err(Error::new("Volume is not in LUKS format"));
    }
    Fields(beginning).u16(MAGIC.len())
}

/// The guest's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Where it begins in the file, in bytes; a multiple of 512.
    pub offset: u64,
    /// Its bytes; `None`: up to the end of the file.
    pub size: Option<u64>,
    /// What is encrypted at once, in bytes: 512 to 4096.
    pub unit: u32,
    /// How.
    pub spec: Spec,
    /// The number of its first sector of 512 bytes.
    pub first: u64,
    /// Bytes of the key.
    pub key_len: usize,
}

impl Payload {
    /// Ready for use, numbers counted from the payload's first sector.
    pub fn cipher(&self, key: &SecretBytes) -> Result<SectorCipher> {
        self.spec.keyed(key.expose(), self.unit as usize)
    }

    fn check(&self, end: u64) -> Result<()> {
        if self.offset > end {
            return Err(Error::new(format!(
                "The payload begins at {}, behind the end of the file ({end})",
                self.offset
            )));
        }
        match self.size.map(|size| self.offset.checked_add(size)) {
            None => Ok(()),
            Some(Some(last)) if last <= end => Ok(()),
            Some(_) => Err(Error::new(format!("The payload ends behind the end of the file ({end})"))),
        }
    }
}

/// A key slot that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// Its number.
    pub index: usize,
    /// Where its material is in the header's file.
    pub material: ByteRange,
}

/// A passphrase fitted.
#[derive(Debug)]
pub struct Unlocked {
    /// The slot that it fitted.
    pub slot: usize,
    /// The key of the payload.
    pub key: SecretBytes,
}

/// Either header.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "an image has one")]
pub enum Header {
    /// The older one.
    V1(v1::Header),
    /// The newer one.
    V2(v2::Header),
}

impl Header {
    /// The guest's data.
    pub fn payload(&self) -> Payload {
        match self {
            Self::V1(header) => header.payload(),
            Self::V2(header) => header.payload(),
        }
    }

    /// The disk lies in `end` bytes of the file that has the payload.
    pub fn check_payload(&self, end: u64) -> Result<()> {
        self.payload().check(end)
    }

    /// The slots that a passphrase may fit, in the order in which they are tried.
    pub fn active(&self) -> Vec<Active> {
        match self {
            Self::V1(header) => header.active(),
            Self::V2(header) => header.active(),
        }
    }

    /// Fails where looking for the slot that a passphrase fits could cost more than `budget`. Nothing is derived.
    pub fn check_costs(&self, budget: &Budget) -> Result<()> {
        match self {
            Self::V1(header) => header.check_costs(budget),
            Self::V2(header) => header.check_costs(budget),
        }
    }

    /// Looks for the slot that the passphrase fits. `material` is that of [`Header::active`], in that order. Takes as long as
    /// the header says: not for a thread that others wait for. `None`: it fits none. Fails if it fits none of those that could
    /// be tried.
    pub fn unlock(&self, passphrase: &SecretBytes, material: Vec<SecretBytes>) -> Result<Option<Unlocked>> {
        let active = self.active();
        if active.is_empty() {
            return Err(Error::new("No key slot of the image is in use: nothing can open it"));
        }
        let mut failed = Ok(None);
        for (slot, material) in active.into_iter().zip(material) {
            let key = match self {
                Self::V1(header) => header.try_slot(slot.index, passphrase, material),
                Self::V2(header) => header.try_slot(slot.index, passphrase, material),
            };
            match key {
                Ok(Some(key)) => return Ok(Some(Unlocked { slot: slot.index, key })),
                Ok(None) => {}
                // Another slot may need less memory.
                Err(error) if failed.is_ok() => failed = Err(error),
                Err(_) => {}
            }
        }
        failed
    }
}

/// Reads a row of areas that may not share a byte.
fn check_apart(areas: &[(usize, ByteRange)]) -> Result<()> {
    for (at, (index, area)) in areas.iter().enumerate() {
        if let Some((other, _)) = areas.iter().skip(at + 1).find(|(_, other)| other.overlaps(*area)) {
            return Err(Error::new(format!("The material of key slots {index} and {other} overlaps")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::codec::hash::Hash;

    /// A slot that cannot be tried says nothing of the others.
    #[test]
    fn a_slot_that_fails_does_not_end_the_search() {
        let word = |text: &str| SecretBytes::new(text.as_bytes().to_vec());
        let mut random = |out: &mut [u8]| {
            out.fill(7);
            Ok(())
        };
        let spec = Spec::parse_whole("aes-xts-plain64").unwrap();
        let new = v1::New { spec, key_len: 32, hash: Hash::Sha256, time: Duration::ZERO, detached: false };
        let (mut header, key, first) = v1::Header::create(&new, &word("a"), &mut random).unwrap();
        let second = header.fill(1, &word("b"), &key, Duration::ZERO, &mut random).unwrap();
        let header = Header::V1(header);
        let unlock = |text: &str| {
            let unlocked = header.unlock(&word(text), vec![SecretBytes::zeroed(0), second.duplicate()]);
            unlocked.map(|unlocked| unlocked.map(|unlocked| unlocked.slot))
        };
        assert_eq!(unlock("b").unwrap(), Some(1));
        assert_eq!(unlock("c").unwrap_err().full(), "The key material is too short");
        assert_eq!(header.unlock(&word("a"), vec![first, second.duplicate()]).unwrap().unwrap().slot, 0);
    }
}
