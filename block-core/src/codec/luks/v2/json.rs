//! What the JSON of a LUKS2 header says: what opening needs of it, and a refusal of what we do not know.

use argon2::Algorithm;

use super::tree::{self, List, Part, Rows, Tree, Word};
use super::{Digest, Kdf, MAX_LUKS2_SLOTS, SECTOR, Slot};
use crate::base::{ByteRange, Error, Result};
use crate::codec::base64;
use crate::codec::cipher::Spec;
use crate::codec::fields::shown;
use crate::codec::hash::Hash;
use crate::codec::luks::Payload;
use crate::codec::split::STRIPES;

/// The slots that lead to the payload's key, how that is known, and the payload.
pub(super) fn read(text: &[u8]) -> Result<(Vec<Slot>, Digest, Payload)> {
    let tree: Part<Tree> = serde_json::from_slice(text).map_err(|_| Error::new("The header's JSON cannot be read"))?;
    let tree = object(&tree, "the header")?;
    check_requirements(object(&tree.config, "config")?)?;
    let [(name, segment)] = rows(&tree.segments, "segments")? else {
        return Err(Error::new("The image has several segments, or none: only one that is encrypted is supported"));
    };
    let (members, digest) = digest_of(rows(&tree.digests, "digests")?, name)?;
    let given = rows(&tree.keyslots, "keyslots")?;
    let mut slots = Vec::new();
    for (index, slot) in given.iter().filter(|(index, _)| members.contains(index)) {
        let number = index.parse().ok().filter(|number: &usize| *number < MAX_LUKS2_SLOTS);
        let number = number.ok_or_else(|| Error::new(format!("'{}' is no number of a key slot", shown(index))))?;
        slots.push(read_slot(number, object(slot, "keyslots")?)?);
    }
    // The header does not say the key's length apart from the slots.
    let lengths = slots.iter().map(|slot| slot.key_len);
    let key_len = lengths.clone().max().ok_or_else(|| Error::new("No key slot of the image leads to its key"))?;
    if lengths.min() != Some(key_len) {
        return Err(Error::new("The key slots hold keys of different lengths"));
    }
    Ok((slots, digest, payload(object(segment, "segments")?, key_len)?))
}

/// An image that is being encrypted anew, or needs something else that nobody here knows, says so.
fn check_requirements(config: &tree::Config) -> Result<()> {
    let Some(requirements) = &config.requirements else { return Ok(()) };
    match &object(requirements, "requirements")?.mandatory {
        List::Absent => Ok(()),
        List::Texts(names) => match names.first() {
            None => Ok(()),
            Some(name) => Err(Error::new(format!("The image needs '{}', which is not supported", shown(name)))),
        },
        List::Other => Err(wrong("requirements")),
    }
}

fn payload(segment: &tree::Segment, key_len: usize) -> Result<Payload> {
    let kind = text(&segment.kind, "type")?;
    if kind != "crypt" {
        return Err(Error::new(format!("A segment of type '{}' is not supported", shown(kind))));
    }
    if !matches!(segment.integrity, Word::Absent) {
        return Err(Error::new("Segments with integrity protection are not supported"));
    }
    match &segment.flags {
        List::Absent => {}
        List::Texts(flags) if flags.is_empty() => {}
        List::Texts(_) | List::Other => return Err(Error::new("Segments with flags are not supported")),
    }
    let size = match text(&segment.size, "size")? {
        "dynamic" => None,
        _ => Some(number(&segment.size, "size")?),
    };
    let unit = small(&segment.sector_size, "sector_size")?;
    if !matches!(unit, 512 | 1024 | 2048 | 4096) {
        return Err(wrong("sector_size"));
    }
    let (offset, first) = (number(&segment.offset, "offset")?, number(&segment.iv_tweak, "iv_tweak")?);
    if !offset.is_multiple_of(SECTOR as u64) || size.is_some_and(|size| !size.is_multiple_of(unit.into())) {
        return Err(wrong("segments"));
    }
    let spec = Spec::parse_whole(text(&segment.encryption, "encryption")?)?;
    spec.cipher_key(key_len)?;
    Ok(Payload { offset, size, unit, spec, first, key_len })
}

/// The digest of a segment, and the slots that lead to its key.
fn digest_of<'t>(digests: &'t [(String, Part<tree::Digest>)], segment: &str) -> Result<(&'t [String], Digest)> {
    let is_its =
        |digest: &&tree::Digest| matches!(&digest.segments, List::Texts(all) if all.iter().any(|one| one == segment));
    let digest = digests.iter().filter_map(|(_, digest)| digest.0.as_ref()).find(is_its);
    let digest = digest.ok_or_else(|| Error::new("The header has no digest for its segment"))?;
    let kind = text(&digest.kind, "type")?;
    if kind != "pbkdf2" {
        return Err(Error::new(format!("A digest of type '{}' is not supported", shown(kind))));
    }
    let read = Digest {
        hash: Hash::named(text(&digest.hash, "hash")?)?,
        iterations: small(&digest.iterations, "iterations")?,
        salt: bytes(&digest.salt, "salt")?,
        digest: bytes(&digest.digest, "digest")?,
    };
    if !(16..=MAX_DIGEST).contains(&read.digest.len()) {
        return Err(wrong("digest"));
    }
    match &digest.keyslots {
        List::Texts(slots) => Ok((slots, read)),
        List::Absent | List::Other => Err(wrong("keyslots")),
    }
}

fn read_slot(index: usize, slot: &tree::Keyslot) -> Result<Slot> {
    let kind = text(&slot.kind, "type")?;
    if kind != "luks2" {
        return Err(Error::new(format!("A key slot of type '{}' is not supported", shown(kind))));
    }
    let (area, af, kdf) = (object(&slot.area, "area")?, object(&slot.af, "af")?, object(&slot.kdf, "kdf")?);
    if text(&area.kind, "type")? != "raw" || text(&af.kind, "type")? != "luks1" {
        return Err(Error::new(format!("Key slot {index} keeps its material in a way that is not supported")));
    }
    let stripes = small(&af.stripes, "stripes")?;
    if stripes != STRIPES {
        return Err(Error::new(format!("Key slot {index} has {stripes} stripes; LUKS has {STRIPES}")));
    }
    let (key_len, material_key) = (key_len(&slot.key_size)?, key_len(&area.key_size)?);
    let material = ByteRange::new(number(&area.offset, "offset")?, number(&area.size, "size")?);
    let material = material.ok_or_else(|| wrong("area"))?;
    let needed = (key_len * STRIPES as usize).next_multiple_of(SECTOR);
    if material.len() < needed as u64 || !material.start().is_multiple_of(SECTOR as u64) {
        return Err(Error::new(format!("The material of key slot {index} is too short for its key")));
    }
    let spec = Spec::parse_whole(text(&area.encryption, "encryption")?)?;
    spec.cipher_key(material_key)?;
    let priority = match slot.priority {
        Word::Absent => 1,
        Word::Number(priority) => priority,
        Word::Text(_) | Word::Other => return Err(wrong("priority")),
    };
    let hash = Hash::named(text(&af.hash, "hash")?)?;
    Ok(Slot { index, priority, key_len, material, spec, material_key, hash, kdf: read_kdf(kdf)? })
}

fn read_kdf(kdf: &tree::Kdf) -> Result<Kdf> {
    let salt = bytes(&kdf.salt, "salt")?;
    let algorithm = match text(&kdf.kind, "type")? {
        "pbkdf2" => {
            let hash = Hash::named(text(&kdf.hash, "hash")?)?;
            return Ok(Kdf::Pbkdf2 { hash, iterations: small(&kdf.iterations, "iterations")?, salt });
        }
        "argon2i" => Algorithm::Argon2i,
        "argon2id" => Algorithm::Argon2id,
        other => return Err(Error::new(format!("The key derivation '{}' is not supported", shown(other)))),
    };
    let (passes, memory_kib) = (small(&kdf.time, "time")?, small(&kdf.memory, "memory")?);
    let lanes = small(&kdf.cpus, "cpus")?;
    if !(1..=MAX_LANES).contains(&lanes) {
        return Err(wrong("cpus"));
    }
    // What the algorithm refuses is refused before it begins.
    argon2::Params::new(memory_kib, passes, lanes, None).map_err(|_| wrong("kdf"))?;
    if salt.len() < argon2::MIN_SALT_LEN {
        return Err(wrong("salt"));
    }
    Ok(Kdf::Argon2 { algorithm, passes, memory_kib, lanes, salt })
}

fn key_len(of: &Word) -> Result<usize> {
    let len = usize::try_from(small(of, "key_size")?).ok();
    len.filter(|len| (1..=MAX_KEY).contains(len)).ok_or_else(|| wrong("key_size"))
}

fn object<'t, T>(part: &'t Part<T>, name: &str) -> Result<&'t T> {
    part.0.as_ref().ok_or_else(|| wrong(name))
}

fn rows<'t, T>(part: &'t Part<Rows<T>>, name: &str) -> Result<&'t [(String, T)]> {
    match object(part, name)? {
        Rows::Few(rows) => Ok(rows),
        Rows::Many => Err(Error::new(format!("The header has more than {MAX_LUKS2_SLOTS} {name}"))),
    }
}

fn text<'t>(of: &'t Word, name: &str) -> Result<&'t str> {
    match of {
        Word::Text(text) => Ok(text),
        Word::Absent | Word::Number(_) | Word::Other => Err(wrong(name)),
    }
}

/// Numbers of 64 bits stand there as text.
fn number(of: &Word, name: &str) -> Result<u64> {
    let text = text(of, name)?;
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits).ok_or_else(|| wrong(name))
}

fn small(of: &Word, name: &str) -> Result<u32> {
    match of {
        Word::Number(number) => u32::try_from(*number).map_err(|_| wrong(name)),
        Word::Absent | Word::Text(_) | Word::Other => Err(wrong(name)),
    }
}

fn bytes(of: &Word, name: &str) -> Result<Vec<u8>> {
    let bytes = base64::decode(text(of, name)?.as_bytes()).ok_or_else(|| wrong(name))?;
    if bytes.len() > MAX_DIGEST {
        return Err(wrong(name));
    }
    Ok(bytes.to_vec())
}

fn wrong(name: &str) -> Error {
    Error::new(format!("The header's JSON has no valid '{name}'"))
}

const MAX_LANES: u32 = 4;
const MAX_KEY: usize = 64;
/// Salts and digests have 32 or 64 bytes.
const MAX_DIGEST: usize = 64;
