//! The header of LUKS1: 592 bytes, and after them the material of eight key slots.

use std::time::Duration;

use super::budget::Cost;
use super::{Active, Budget, MAGIC, Payload, check_apart};
use crate::base::{ByteRange, Error, Result};
use crate::codec::SecretBytes;
use crate::codec::cipher::Spec;
use crate::codec::fields::Fields;
use crate::codec::hash::Hash;
use crate::codec::split::{STRIPES, merge, split};

/// Key slots that there are.
pub const SLOTS: usize = 8;
/// Bytes of the header itself.
pub const LEN: usize = 592;

/// A header that holds what the specification and our limits ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    spec: Spec,
    hash: Hash,
    /// In sectors.
    payload: u32,
    key_len: usize,
    digest: [u8; DIGEST],
    salt: [u8; SALT],
    iterations: u32,
    uuid: String,
    slots: [Slot; SLOTS],
}

/// A key slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Slot {
    is_active: bool,
    iterations: u32,
    salt: [u8; SALT],
    /// Where its material is, in sectors.
    sector: u32,
}

/// What is said of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// A passphrase may fit it.
    pub is_active: bool,
    /// Of PBKDF2, if it is in use.
    pub iterations: u32,
    /// Where its material is, in bytes.
    pub offset: u64,
}

/// Where random bytes come from.
pub type Random<'r> = &'r mut dyn FnMut(&mut [u8]) -> Result<()>;

/// What a new header is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct New {
    /// How the payload is encrypted, and the material.
    pub spec: Spec,
    /// Bytes of the key.
    pub key_len: usize,
    /// For PBKDF2 and the splitter.
    pub hash: Hash,
    /// How long one try of a passphrase shall take on this machine.
    pub time: Duration,
    /// The payload is in a file of its own, and begins there with the first byte.
    pub detached: bool,
}

impl New {
    /// Bytes of the header with the material of all its slots; the payload lies behind them, if it is in the same file.
    pub fn header_len(&self) -> u64 {
        u64::from(self.header_sectors()) * SECTOR
    }

    fn header_sectors(&self) -> u32 {
        FIRST_MATERIAL + material_sectors(self.key_len) * words(SLOTS)
    }
}

impl Header {
    /// From the first bytes of a file of `end` bytes. `detached`: the payload is in another file.
    pub fn parse(bytes: &[u8], end: u64, detached: bool) -> Result<Self> {
        let fields = Fields(bytes);
        let spec =
            Spec::parse(fields.name("The cipher's name", 8, NAME)?, fields.name("The cipher's mode", 40, NAME)?)?;
        let hash = Hash::named(fields.name("The hash's name", 72, NAME)?)?;
        let key_len = fields.u32(108)?;
        let key_len = usize::try_from(key_len).ok().filter(|len| *len <= MAX_KEY);
        let key_len = key_len.ok_or_else(|| Error::new(format!("Keys have at most {MAX_KEY} bytes")))?;
        spec.cipher_key(key_len)?;
        let mut slots = <[Slot; SLOTS]>::default();
        for (at, slot) in (AT_SLOTS..).step_by(SLOT_LEN).zip(&mut slots) {
            *slot = Slot::parse(&fields, at)?;
        }
        let header = Self {
            spec,
            hash,
            payload: fields.u32(104)?,
            key_len,
            digest: fields.bytes(112)?,
            salt: fields.bytes(132)?,
            iterations: fields.u32(164)?,
            uuid: fields.name("The UUID", 168, 40)?.to_owned(),
            slots,
        };
        header.check(end, detached)?;
        Ok(header)
    }

    fn check(&self, end: u64, detached: bool) -> Result<()> {
        let areas: Vec<_> = (0..SLOTS).map(|index| (index, self.material(index))).collect();
        check_apart(&areas)?;
        let payload = self.payload().offset;
        for (index, area) in areas {
            if area.start() < LEN as u64 {
                return Err(Error::new(format!("The material of key slot {index} lies over the header")));
            }
            if !detached && area.end() > payload {
                return Err(Error::new(format!("The material of key slot {index} lies over the payload")));
            }
            if self.slots[index].is_active && area.end() > end {
                return Err(Error::new(format!("The material of key slot {index} ends behind the end of the file")));
            }
        }
        Ok(())
    }

    /// As it stands in the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(6, &1u16.to_be_bytes());
        put(8, self.spec.family.name().as_bytes());
        put(40, self.spec.mode_name().as_bytes());
        put(72, self.hash.name().as_bytes());
        put(104, &self.payload.to_be_bytes());
        put(108, &words(self.key_len).to_be_bytes());
        put(112, &self.digest);
        put(132, &self.salt);
        put(164, &self.iterations.to_be_bytes());
        put(168, self.uuid.as_bytes());
        for (at, slot) in (AT_SLOTS..).step_by(SLOT_LEN).zip(&self.slots) {
            let state = if slot.is_active { ACTIVE } else { INACTIVE };
            put(at, &state.to_be_bytes());
            put(at + 4, &slot.iterations.to_be_bytes());
            put(at + 8, &slot.salt);
            put(at + 40, &slot.sector.to_be_bytes());
            put(at + 44, &STRIPES.to_be_bytes());
        }
        bytes
    }

    /// A header for a new key, which slot 0 gives to whoever knows the passphrase, and the material of that slot.
    pub fn create(new: &New, passphrase: &SecretBytes, random: Random<'_>) -> Result<(Self, SecretBytes, SecretBytes)> {
        new.spec.check()?;
        new.spec.cipher_key(new.key_len)?;
        let mut key = SecretBytes::zeroed(new.key_len);
        random(key.expose_mut())?;
        let area = material_sectors(new.key_len);
        let mut header = Self {
            spec: new.spec,
            hash: new.hash,
            payload: if new.detached { 0 } else { new.header_sectors() },
            key_len: new.key_len,
            digest: [0; DIGEST],
            salt: [0; SALT],
            // The digest is asked once a slot, so it takes an eighth.
            iterations: iterations(new.hash, new.time / words(SLOTS), DIGEST)?,
            uuid: uuid(random)?,
            slots: std::array::from_fn(|index| Slot {
                sector: FIRST_MATERIAL + area * words(index),
                ..Slot::default()
            }),
        };
        random(&mut header.salt)?;
        let digest = header.digest_of(&key);
        header.digest.copy_from_slice(digest.expose());
        let material = header.fill(0, passphrase, &key, new.time, random)?;
        Ok((header, key, material))
    }

    /// From now on the passphrase leads to the key through this slot, once its material stands in the file.
    pub fn fill(
        &mut self,
        index: usize,
        passphrase: &SecretBytes,
        key: &SecretBytes,
        time: Duration,
        random: Random<'_>,
    ) -> Result<SecretBytes> {
        let mut slot = Slot {
            is_active: true,
            iterations: iterations(self.hash, time, self.key_len)?,
            sector: self.slots[index].sector,
            ..Slot::default()
        };
        random(&mut slot.salt)?;
        let mut stripes = SecretBytes::zeroed(self.key_len * STRIPES as usize);
        random(stripes.expose_mut())?;
        let stripes = split(self.hash, key, stripes)?;
        let mut material = SecretBytes::zeroed(self.material_len());
        material.expose_mut()[..stripes.len()].copy_from_slice(stripes.expose());
        let derived = self.hash.derive(passphrase.expose(), &slot.salt, slot.iterations, self.key_len);
        self.crypt(&derived, material.expose_mut(), true)?;
        self.slots[index] = slot;
        Ok(material)
    }

    /// No passphrase leads through this slot any more. Whoever has its material and an older header still gets in.
    pub fn clear(&mut self, index: usize) {
        let sector = self.slots[index].sector;
        self.slots[index] = Slot { sector, ..Slot::default() };
    }

    /// The guest's data.
    pub fn payload(&self) -> Payload {
        let Self { spec, key_len, payload, .. } = self;
        Payload {
            offset: u64::from(*payload) * SECTOR,
            size: None,
            unit: 512,
            spec: *spec,
            first: 0,
            key_len: *key_len,
        }
    }

    /// Where a slot's material is.
    pub fn material(&self, index: usize) -> ByteRange {
        let start = u64::from(self.slots[index].sector) * SECTOR;
        ByteRange::new(start, self.material_len() as u64).expect("32 bits of sectors are no large file")
    }

    /// Whole sectors: with keys of 24 bytes the stripes end in the middle of one.
    fn material_len(&self) -> usize {
        (self.key_len * STRIPES as usize).next_multiple_of(UNIT)
    }

    /// The hash of PBKDF2 and of the splitter.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// The disk's name, as the header has it.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Iterations over the key itself.
    pub fn digest_iterations(&self) -> u32 {
        self.iterations
    }

    /// What is said of the slots.
    pub fn slots(&self) -> [SlotInfo; SLOTS] {
        std::array::from_fn(|index| {
            let Slot { is_active, iterations, sector, .. } = self.slots[index];
            SlotInfo { is_active, iterations, offset: u64::from(sector) * SECTOR }
        })
    }

    pub(super) fn active(&self) -> Vec<Active> {
        let indices = (0..SLOTS).filter(|index| self.slots[*index].is_active);
        indices.map(|index| Active { index, material: self.material(index) }).collect()
    }

    /// What a try of the slot costs. Fails where that is too much.
    pub(super) fn cost<'b>(&self, index: usize, budget: &'b Budget) -> Result<Cost<'b>> {
        let mut cost = Cost::within(budget);
        cost.pbkdf2("The key's digest", self.hash, self.iterations, DIGEST)?;
        let iterations = self.slots[index].iterations;
        cost.pbkdf2(&format!("Key slot {index}"), self.hash, iterations, self.key_len)?;
        Ok(cost)
    }

    /// Fails where a try of one slot costs too much. Nothing is derived.
    pub fn check_costs(&self, budget: &Budget) -> Result<()> {
        self.active().iter().try_for_each(|slot| self.cost(slot.index, budget).map(drop))
    }

    /// The key, if the passphrase fits this slot.
    pub(super) fn try_slot(
        &self,
        index: usize,
        passphrase: &SecretBytes,
        mut material: SecretBytes,
    ) -> Result<Option<SecretBytes>> {
        let slot = &self.slots[index];
        let derived = self.hash.derive(passphrase.expose(), &slot.salt, slot.iterations, self.key_len);
        self.crypt(&derived, material.expose_mut(), false)?;
        let stripes = material.expose().get(..self.key_len * STRIPES as usize);
        let stripes = stripes.ok_or_else(|| Error::new("The key material is too short"))?;
        let key = merge(self.hash, stripes, self.key_len)?;
        Ok(self.digest_of(&key).is(&self.digest).then_some(key))
    }

    fn digest_of(&self, key: &SecretBytes) -> SecretBytes {
        self.hash.derive(key.expose(), &self.salt, self.iterations, DIGEST)
    }

    fn crypt(&self, key: &SecretBytes, material: &mut [u8], encrypt: bool) -> Result<()> {
        let cipher = self.spec.keyed(key.expose(), UNIT)?;
        if encrypt {
            cipher.encrypt(0, material)
        } else {
            cipher.decrypt(0, material)
        }
        Ok(())
    }
}

impl Slot {
    fn parse(fields: &Fields<'_>, at: usize) -> Result<Self> {
        let index = (at - AT_SLOTS) / SLOT_LEN;
        let is_active = match fields.u32(at)? {
            ACTIVE => true,
            INACTIVE => false,
            other => return Err(Error::new(format!("Key slot {index} is neither active nor inactive ({other:#x})"))),
        };
        let stripes = fields.u32(at + 44)?;
        if stripes != STRIPES {
            return Err(Error::new(format!("Key slot {index} has {stripes} stripes; LUKS has {STRIPES}")));
        }
        let (iterations, salt, sector) = (fields.u32(at + 4)?, fields.bytes(at + 8)?, fields.u32(at + 40)?);
        Ok(Self { is_active, iterations, salt, sector })
    }
}

fn iterations(hash: Hash, time: Duration, len: usize) -> Result<u32> {
    if time > MAX_ITER_TIME {
        let most = MAX_ITER_TIME.as_millis();
        return Err(Error::new(format!("'iter-time' is at most {most} ms, not {}", time.as_millis())));
    }
    let each = hash.iterations_in(time, len).max(MIN_ITERATIONS.into());
    u32::try_from(each).map_err(|_| Error::new("The iteration time is too long: a header has 32 bits for iterations"))
}

/// Sectors of a slot's material, up to a multiple of 4 KiB.
fn material_sectors(key_len: usize) -> u32 {
    let bytes = words(key_len) * STRIPES;
    bytes.div_ceil(512).next_multiple_of(8)
}

/// RFC 4122, version 4.
fn uuid(random: Random<'_>) -> Result<String> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [(0, 8), (8, 12), (12, 16), (16, 20), (20, 32)];
    Ok(parts.map(|(from, to)| &hex[from..to]).join("-"))
}

fn words(small: usize) -> u32 {
    u32::try_from(small).expect("keys and slots are small")
}

const SECTOR: u64 = 512;
const UNIT: usize = 512;
const NAME: usize = 32;
const DIGEST: usize = 20;
const SALT: usize = 32;
const AT_SLOTS: usize = 208;
const SLOT_LEN: usize = 48;
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
/// The largest key of any cipher here.
const MAX_KEY: usize = 64;
/// The first sector behind the header, at a multiple of 4 KiB.
const FIRST_MATERIAL: u32 = 8;
const MIN_ITERATIONS: u32 = 1000;
/// The longest time that one try of a passphrase is made to take.
pub const MAX_ITER_TIME: Duration = Duration::from_secs(20);

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]
mod tests;
