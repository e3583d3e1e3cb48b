//! The header of LUKS2: two copies of a binary header, each with an area of JSON behind it; then the material of key slots.
//!
//! It is read, never written: opening an image changes nothing of it. What its JSON may say and we do not know is refused.

use std::sync::{Mutex, MutexGuard, PoisonError};

use zeroize::Zeroizing;

use super::budget::Cost;
use super::{Active, Budget, MAGIC, Payload, check_apart};
use crate::base::{ByteRange, Error, Result};
use crate::codec::SecretBytes;
use crate::codec::cipher::Spec;
use crate::codec::fields::Fields;
use crate::codec::hash::Hash;
use crate::codec::split::{STRIPES, merge};

mod json;
mod tree;

/// Where the second copy can be, and how large each is then.
pub const SIZES: [u64; 9] =
    [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, MAX_LUKS2_HEADER];
/// The largest copy of a header, its JSON included, in bytes.
pub const MAX_LUKS2_HEADER: u64 = 4 << 20;
/// Key slots that a header may have.
pub const MAX_LUKS2_SLOTS: usize = 32;

/// A header that holds what the specification and our limits ask.
#[derive(Clone, Debug)]
pub struct Header {
    label: String,
    uuid: String,
    slots: Vec<Slot>,
    digest: Digest,
    payload: Payload,
}

/// A key slot that leads to the payload's key.
#[derive(Clone, Debug)]
struct Slot {
    index: usize,
    /// 2: tried before the others. 0: only where it is named, which nobody can here.
    priority: u64,
    /// Bytes of the key that it holds.
    key_len: usize,
    material: ByteRange,
    /// How the material is encrypted, with a key of so many bytes.
    spec: Spec,
    material_key: usize,
    hash: Hash,
    kdf: Kdf,
}

/// How a passphrase becomes the key of the material.
#[derive(Clone, Debug)]
enum Kdf {
    Pbkdf2 { hash: Hash, iterations: u32, salt: Vec<u8> },
    Argon2 { algorithm: argon2::Algorithm, passes: u32, memory_kib: u32, lanes: u32, salt: Vec<u8> },
}

/// How a key is known to be the right one.
#[derive(Clone, Debug)]
struct Digest {
    hash: Hash,
    iterations: u32,
    salt: Vec<u8>,
    digest: Vec<u8>,
}

/// Which copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copy {
    /// At the beginning of the file.
    First,
    /// Behind it.
    Second,
}

/// How many bytes the copy that begins with these has, at `offset` of the file. Nothing else is true of it yet.
pub fn extent(copy: Copy, beginning: &[u8], offset: u64) -> Result<u64> {
    let fields = Fields(beginning);
    let magic = if copy == Copy::First { MAGIC } else { SECOND_MAGIC };
    if fields.bytes(0)? != magic || fields.u16(6)? != 2 {
        return Err(Error::new("There is no LUKS2 header"));
    }
    let (size, own) = (fields.u64(8)?, fields.u64(256)?);
    if own != offset {
        return Err(Error::new(format!("The header says that it is at {own}, and is at {offset}")));
    }
    if !SIZES.contains(&size) || (copy == Copy::Second && size != offset) {
        return Err(Error::new(format!("A LUKS2 header of {size} bytes is none")));
    }
    Ok(size)
}

/// A copy that nothing has damaged. Whether we understand what it says has not been asked: only of the younger copy that
/// counts, since the older one may say something else.
pub struct Whole {
    sequence: u64,
    bytes: Vec<u8>,
}

impl Whole {
    /// From all bytes of a copy. Reads all of them: not for a thread that others wait for.
    pub fn check(bytes: Vec<u8>) -> Result<Self> {
        check_sum(&bytes)?;
        Ok(Self { sequence: Fields(&bytes).u64(16)?, bytes })
    }

    /// The younger of two copies has the higher number.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
}

impl Header {
    /// From a copy in a file of `end` bytes. `detached`: the payload is in another file. Reads all of the JSON: not for a thread
    /// that others wait for.
    pub fn parse(copy: &Whole, end: u64, detached: bool) -> Result<Self> {
        let fields = Fields(&copy.bytes);
        let text = copy.bytes.get(BINARY..).unwrap_or_default();
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let (slots, digest, payload) = json::read(text)?;
        let label = fields.name("The label", 24, 48)?.to_owned();
        let uuid = fields.name("The UUID", 168, 40)?.to_owned();
        let header = Self { label, uuid, slots, digest, payload };
        header.check(copy.bytes.len() as u64, end, detached)?;
        Ok(header)
    }

    fn check(&self, size: u64, end: u64, detached: bool) -> Result<()> {
        let payload = if detached { u64::MAX } else { self.payload.offset };
        if payload < 2 * size {
            return Err(Error::new("The payload lies over the header"));
        }
        let areas: Vec<_> = self.slots.iter().map(|slot| (slot.index, slot.material)).collect();
        check_apart(&areas)?;
        for (index, area) in areas {
            if area.start() < 2 * size {
                return Err(Error::new(format!("The material of key slot {index} lies over the header")));
            }
            if area.end() > payload {
                return Err(Error::new(format!("The material of key slot {index} lies over the payload")));
            }
            if area.end() > end {
                return Err(Error::new(format!("The material of key slot {index} ends behind the end of the file")));
            }
        }
        Ok(())
    }

    /// What the disk is called, if it is.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The disk's name, as the header has it.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// The hash of the key's digest.
    pub fn hash(&self) -> Hash {
        self.digest.hash
    }

    /// Iterations over the key itself.
    pub fn digest_iterations(&self) -> u32 {
        self.digest.iterations
    }

    /// The numbers of the slots and where their material is, in bytes.
    pub fn slots(&self) -> impl Iterator<Item = (usize, u64)> {
        self.slots.iter().map(|slot| (slot.index, slot.material.start()))
    }

    /// The guest's data.
    pub fn payload(&self) -> Payload {
        self.payload
    }

    pub(super) fn active(&self) -> Vec<Active> {
        let mut slots: Vec<_> = self.slots.iter().filter(|slot| slot.priority > 0).collect();
        slots.sort_by_key(|slot| (u64::MAX - slot.priority, slot.index));
        slots.into_iter().map(|slot| Active { index: slot.index, material: slot.stripes() }).collect()
    }

    /// What a try of the slot costs. Fails where that is too much.
    pub(super) fn cost<'b>(&self, index: usize, budget: &'b Budget) -> Result<Cost<'b>> {
        let (mut cost, slot) = (Cost::within(budget), self.slot(index)?);
        let Digest { hash, iterations, ref digest, .. } = self.digest;
        cost.pbkdf2("The key's digest", hash, iterations, digest.len())?;
        let what = format!("Key slot {index}");
        match slot.kdf {
            Kdf::Pbkdf2 { hash, iterations, .. } => cost.pbkdf2(&what, hash, iterations, slot.material_key)?,
            Kdf::Argon2 { memory_kib, passes, .. } => cost.argon2(&what, memory_kib, passes)?,
        }
        Ok(cost)
    }

    fn slot(&self, index: usize) -> Result<&Slot> {
        let slot = self.slots.iter().find(|slot| slot.index == index);
        slot.ok_or_else(|| Error::new(format!("There is no key slot {index}")))
    }

    pub(super) fn try_slot(
        &self,
        index: usize,
        passphrase: &SecretBytes,
        mut material: SecretBytes,
    ) -> Result<Option<SecretBytes>> {
        let slot = self.slot(index)?;
        let derived = slot.kdf.derive(passphrase, slot.material_key)?;
        slot.spec.keyed(derived.expose(), SECTOR)?.decrypt(0, material.expose_mut());
        let stripes = material.expose().get(..slot.key_len * STRIPES as usize);
        let stripes = stripes.ok_or_else(|| Error::new("The key material is too short"))?;
        let key = merge(slot.hash, stripes, slot.key_len)?;
        let Digest { hash, iterations, salt, digest } = &self.digest;
        let is_right = hash.derive(key.expose(), salt, *iterations, digest.len()).is(digest);
        Ok(is_right.then_some(key))
    }
}

impl Slot {
    /// The part of the material that says something, in whole sectors.
    fn stripes(&self) -> ByteRange {
        let len = (self.key_len * STRIPES as usize).next_multiple_of(SECTOR);
        ByteRange::new(self.material.start(), len as u64).expect("the material is longer")
    }
}

impl Kdf {
    fn derive(&self, passphrase: &SecretBytes, len: usize) -> Result<SecretBytes> {
        match self {
            Self::Pbkdf2 { hash, iterations, salt } => Ok(hash.derive(passphrase.expose(), salt, *iterations, len)),
            Self::Argon2 { algorithm, passes, memory_kib, lanes, salt } => {
                let said = |error: argon2::Error| Error::new(format!("Argon2 failed: {error}"));
                let params = argon2::Params::new(*memory_kib, *passes, *lanes, Some(len)).map_err(said)?;
                let blocks = params.block_count();
                let argon2 = argon2::Argon2::new(*algorithm, argon2::Version::V0x13, params);
                let _turn = argon2_turn();
                let mut matrix = Zeroizing::new(Vec::new());
                let no_memory = |_| Error::new(format!("There are no {memory_kib} KiB of memory for Argon2"));
                matrix.try_reserve_exact(blocks).map_err(no_memory)?;
                matrix.resize(blocks, argon2::Block::new());
                let mut key = SecretBytes::zeroed(len);
                let (word, out) = (passphrase.expose(), key.expose_mut());
                argon2.hash_password_into_with_memory(word, salt, out, matrix.as_mut_slice()).map_err(said)?;
                Ok(key)
            }
        }
    }
}

/// Held while Argon2 is at work: one derivation at a time in the whole process, however many images are being opened, since each
/// may have as much memory as one may ask for.
fn argon2_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sum is over the whole copy, with zeroes where it stands itself.
fn check_sum(bytes: &[u8]) -> Result<()> {
    let fields = Fields(bytes);
    let hash = Hash::named(fields.name("The checksum's name", 72, 32)?)?;
    let (before, after) = (fields.slice(0, AT_SUM)?, bytes.get(AT_SUM + SUM..).unwrap_or_default());
    let digest = hash.digest(&[before, &[0; SUM], after]);
    if !digest.is(fields.slice(AT_SUM, hash.size())?) {
        return Err(Error::new("The header's checksum is wrong"));
    }
    Ok(())
}

const SECOND_MAGIC: [u8; 6] = *b"SKUL\xba\xbe";
/// Bytes before the JSON.
const BINARY: usize = 4096;
const AT_SUM: usize = 448;
const SUM: usize = 64;
const SECTOR: usize = 512;

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    use super::*;

    fn kdf() -> Kdf {
        Kdf::Argon2 { algorithm: argon2::Algorithm::Argon2id, passes: 3, memory_kib: 32, lanes: 4, salt: vec![2; 16] }
    }

    /// The memory of each is bounded, and so is that of all of them.
    #[test]
    fn argon2_is_at_work_once_in_the_process() {
        let turn = argon2_turn();
        let (sender, receiver) = channel();
        let other = std::thread::Builder::new().spawn(move || {
            let key = kdf().derive(&SecretBytes::new(b"word".to_vec()), 32);
            sender.send(key.is_ok()).unwrap();
        });
        assert_eq!(receiver.recv_timeout(Duration::from_millis(300)), Err(RecvTimeoutError::Timeout));
        drop(turn);
        assert_eq!(receiver.recv_timeout(Duration::from_secs(60)), Ok(true));
        other.unwrap().join().unwrap();
    }
}
