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

pub use self::budget::{Budget, MAX_ARGON2_MEMORY, MAX_ARGON2_WORK, MAX_DEAR_TRIES, MAX_PBKDF2_ITERATIONS};
use self::budget::{Cost, Left};

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

    /// Looks for the slot that the passphrase fits. `material` is that of [`Header::active`], in that order. Takes as long as
    /// the header says and `budget` allows: not for a thread that others wait for. `None`: it fits none. Fails where one slot
    /// alone costs too much, before anything is derived; and if it fits none of those that could be tried.
    pub fn unlock(
        &self,
        passphrase: &SecretBytes,
        material: Vec<SecretBytes>,
        budget: &Budget,
    ) -> Result<Option<Unlocked>> {
        let mut found = None;
        let missed = self.try_each(passphrase, material, budget, |unlocked| {
            found = Some(unlocked);
            false
        })?;
        if found.is_some() { Ok(found) } else { missed.map(|()| None) }
    }

    /// All slots that the passphrase fits, which are known only where all could be tried. Otherwise as [`Header::unlock`].
    pub fn fitting(
        &self,
        passphrase: &SecretBytes,
        material: Vec<SecretBytes>,
        budget: &Budget,
    ) -> Result<Vec<Unlocked>> {
        let mut all = Vec::new();
        let missed = self.try_each(passphrase, material, budget, |unlocked| {
            all.push(unlocked);
            true
        })?;
        missed.map(|()| all)
    }

    /// `found` says whether the search goes on. What was not tried, and why, is the inner error.
    fn try_each(
        &self,
        passphrase: &SecretBytes,
        material: Vec<SecretBytes>,
        budget: &Budget,
        mut found: impl FnMut(Unlocked) -> bool,
    ) -> Result<Result<()>> {
        let active = self.active();
        if active.is_empty() {
            return Err(Error::new("No key slot of the image is in use: nothing can open it"));
        }
        let costs: Vec<_> = active.iter().map(|slot| self.cost(slot.index, budget)).collect::<Result<_>>()?;
        let (mut left, mut untried, mut failed) = (Left::of(budget), Vec::new(), Ok(()));
        for ((slot, cost), material) in active.into_iter().zip(costs).zip(material) {
            if !left.spend(cost) {
                untried.push(slot.index.to_string());
                continue;
            }
            let key = match self {
                Self::V1(header) => header.try_slot(slot.index, passphrase, material),
                Self::V2(header) => header.try_slot(slot.index, passphrase, material),
            };
            match key {
                Ok(Some(key)) => {
                    if !found(Unlocked { slot: slot.index, key }) {
                        return Ok(Ok(()));
                    }
                }
                Ok(None) => {}
                // Another slot may need less memory.
                Err(error) if failed.is_ok() => failed = Err(error),
                Err(_) => {}
            }
        }
        if !untried.is_empty() && failed.is_ok() {
            let untried = untried.join(", ");
            failed = Err(Error::new(format!("Trying all key slots costs too much; not tried: {untried}")));
        }
        Ok(failed)
    }

    /// What a try of the slot costs. Fails where that is too much.
    fn cost<'b>(&self, index: usize, budget: &'b Budget) -> Result<Cost<'b>> {
        match self {
            Self::V1(header) => header.cost(index, budget),
            Self::V2(header) => header.cost(index, budget),
        }
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
            let material = vec![SecretBytes::zeroed(0), second.duplicate()];
            let unlocked = header.unlock(&word(text), material, &Budget::default());
            unlocked.map(|unlocked| unlocked.map(|unlocked| unlocked.slot))
        };
        assert_eq!(unlock("b").unwrap(), Some(1));
        assert_eq!(unlock("c").unwrap_err().full(), "The key material is too short");
        let unlock = |text: &str, budget: Budget| {
            let unlocked = header.unlock(&word(text), vec![first.duplicate(), second.duplicate()], &budget);
            unlocked.map(|unlocked| unlocked.map(|unlocked| unlocked.slot))
        };
        assert_eq!(unlock("a", Budget::default()).unwrap(), Some(0));
        // A try is 1000 iterations for the slot and 1000 for the digest. What all cost together is spent in order.
        let one = Budget { pbkdf2_iterations: 2000, tries: 1, ..Budget::default() };
        assert_eq!(unlock("a", one).unwrap(), Some(0));
        for text in ["b", "c"] {
            let refused = unlock(text, one).unwrap_err().full();
            assert_eq!(refused, "Trying all key slots costs too much; not tried: 1", "{text}");
        }
        assert_eq!(unlock("b", Budget { tries: 2, ..one }).unwrap(), Some(1));
        assert_eq!(unlock("c", Budget { tries: 2, ..one }).unwrap(), None);
        let refused = unlock("a", Budget { pbkdf2_iterations: 1999, ..one }).unwrap_err().full();
        assert!(refused.ends_with("a try of one slot may ask for 1999 in all"), "{refused}");
        let all = |text: &str, budget: Budget| {
            let fitting = header.fitting(&word(text), vec![first.duplicate(), second.duplicate()], &budget);
            fitting.map(|all| all.into_iter().map(|unlocked| unlocked.slot).collect::<Vec<_>>())
        };
        assert_eq!(all("b", Budget::default()).unwrap(), [1]);
        assert!(all("a", one).is_err(), "slot 1 may be another one that it fits");
    }
}
