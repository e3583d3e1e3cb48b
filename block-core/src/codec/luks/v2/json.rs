//! The JSON of a LUKS2 header: what opening needs of it, and a refusal of what we do not know.

use argon2::Algorithm;
use serde_json::{Map, Value};

use super::{Digest, Kdf, MAX_LUKS2_SLOTS, SECTOR, Slot};
use crate::base::{ByteRange, Error, Result};
use crate::codec::base64;
use crate::codec::cipher::Spec;
use crate::codec::fields::shown;
use crate::codec::hash::Hash;
use crate::codec::luks::Payload;
use crate::codec::split::STRIPES;

type Object = Map<String, Value>;

/// The slots that lead to the payload's key, how that is known, and the payload.
pub(super) fn read(tree: &Value) -> Result<(Vec<Slot>, Digest, Payload)> {
    let tree = tree.as_object().ok_or_else(|| wrong("the header"))?;
    check_requirements(tree)?;
    let segments = object(tree, "segments")?;
    let mut all = segments.iter();
    let (Some((name, segment)), None) = (all.next(), all.next()) else {
        return Err(Error::new("The image has several segments, or none: only one that is encrypted is supported"));
    };
    let (members, digest) = digest_of(object(tree, "digests")?, name)?;
    let given = object(tree, "keyslots")?;
    if given.len() > MAX_LUKS2_SLOTS {
        return Err(Error::new(format!("The header has more than {MAX_LUKS2_SLOTS} key slots")));
    }
    let mut slots = Vec::new();
    for (index, slot) in given.iter().filter(|(index, _)| members.iter().any(|member| member == *index)) {
        let number = index.parse().ok().filter(|number: &usize| *number < MAX_LUKS2_SLOTS);
        let number = number.ok_or_else(|| Error::new(format!("'{}' is no number of a key slot", shown(index))))?;
        slots.push(read_slot(number, slot)?);
    }
    // The header does not say the key's length apart from the slots.
    let lengths = slots.iter().map(|slot| slot.key_len);
    let key_len = lengths.clone().max().ok_or_else(|| Error::new("No key slot of the image leads to its key"))?;
    if lengths.min() != Some(key_len) {
        return Err(Error::new("The key slots hold keys of different lengths"));
    }
    Ok((slots, digest, payload(segment, key_len)?))
}

/// An image that is being encrypted anew, or needs something else that nobody here knows, says so.
fn check_requirements(tree: &Object) -> Result<()> {
    let requirements = object(tree, "config")?.get("requirements");
    let Some(mandatory) = requirements.and_then(|requirements| requirements.get("mandatory")) else { return Ok(()) };
    match mandatory.as_array().map(Vec::as_slice) {
        Some([]) => Ok(()),
        Some([first, ..]) => {
            let name = shown(first.as_str().unwrap_or("?"));
            Err(Error::new(format!("The image needs '{name}', which is not supported")))
        }
        None => Err(wrong("requirements")),
    }
}

fn payload(segment: &Value, key_len: usize) -> Result<Payload> {
    let segment = segment.as_object().ok_or_else(|| wrong("segments"))?;
    let kind = text(segment, "type")?;
    if kind != "crypt" {
        return Err(Error::new(format!("A segment of type '{}' is not supported", shown(kind))));
    }
    if segment.contains_key("integrity") {
        return Err(Error::new("Segments with integrity protection are not supported"));
    }
    if segment.get("flags").is_some_and(|flags| flags.as_array().is_none_or(|flags| !flags.is_empty())) {
        return Err(Error::new("Segments with flags are not supported"));
    }
    let size = match text(segment, "size")? {
        "dynamic" => None,
        _ => Some(number(segment, "size")?),
    };
    let unit = segment.get("sector_size").and_then(Value::as_u64).and_then(|size| u32::try_from(size).ok());
    let unit = unit.filter(|size| matches!(size, 512 | 1024 | 2048 | 4096)).ok_or_else(|| wrong("sector_size"))?;
    let (offset, first) = (number(segment, "offset")?, number(segment, "iv_tweak")?);
    if !offset.is_multiple_of(SECTOR as u64) || size.is_some_and(|size| !size.is_multiple_of(unit.into())) {
        return Err(wrong("segments"));
    }
    let spec = Spec::parse_whole(text(segment, "encryption")?)?;
    spec.cipher_key(key_len)?;
    Ok(Payload { offset, size, unit, spec, first, key_len })
}

/// The digest of a segment, and the slots that lead to its key.
fn digest_of(digests: &Object, segment: &str) -> Result<(Vec<String>, Digest)> {
    let is_its = |digest: &&Object| list(digest, "segments").is_ok_and(|all| all.iter().any(|one| one == segment));
    let digest = digests.values().filter_map(Value::as_object).find(is_its);
    let digest = digest.ok_or_else(|| Error::new("The header has no digest for its segment"))?;
    let kind = text(digest, "type")?;
    if kind != "pbkdf2" {
        return Err(Error::new(format!("A digest of type '{}' is not supported", shown(kind))));
    }
    let read = Digest {
        hash: Hash::named(text(digest, "hash")?)?,
        iterations: small(digest, "iterations")?,
        salt: bytes(digest, "salt")?,
        digest: bytes(digest, "digest")?,
    };
    if !(16..=MAX_DIGEST).contains(&read.digest.len()) {
        return Err(wrong("digest"));
    }
    Ok((list(digest, "keyslots")?, read))
}

fn read_slot(index: usize, slot: &Value) -> Result<Slot> {
    let slot = slot.as_object().ok_or_else(|| wrong("keyslots"))?;
    let kind = text(slot, "type")?;
    if kind != "luks2" {
        return Err(Error::new(format!("A key slot of type '{}' is not supported", shown(kind))));
    }
    let (area, af, kdf) = (object(slot, "area")?, object(slot, "af")?, object(slot, "kdf")?);
    if text(area, "type")? != "raw" || text(af, "type")? != "luks1" {
        return Err(Error::new(format!("Key slot {index} keeps its material in a way that is not supported")));
    }
    let stripes = small(af, "stripes")?;
    if stripes != STRIPES {
        return Err(Error::new(format!("Key slot {index} has {stripes} stripes; LUKS has {STRIPES}")));
    }
    let (key_len, material_key) = (key_len(slot)?, key_len(area)?);
    let material = ByteRange::new(number(area, "offset")?, number(area, "size")?).ok_or_else(|| wrong("area"))?;
    let needed = (key_len * STRIPES as usize).next_multiple_of(SECTOR);
    if material.len() < needed as u64 || !material.start().is_multiple_of(SECTOR as u64) {
        return Err(Error::new(format!("The material of key slot {index} is too short for its key")));
    }
    let spec = Spec::parse_whole(text(area, "encryption")?)?;
    spec.cipher_key(material_key)?;
    Ok(Slot {
        index,
        priority: slot.get("priority").map_or(Some(1), Value::as_u64).ok_or_else(|| wrong("priority"))?,
        key_len,
        material,
        spec,
        material_key,
        hash: Hash::named(text(af, "hash")?)?,
        kdf: read_kdf(kdf)?,
    })
}

fn read_kdf(kdf: &Object) -> Result<Kdf> {
    let salt = bytes(kdf, "salt")?;
    let algorithm = match text(kdf, "type")? {
        "pbkdf2" => {
            let hash = Hash::named(text(kdf, "hash")?)?;
            return Ok(Kdf::Pbkdf2 { hash, iterations: small(kdf, "iterations")?, salt });
        }
        "argon2i" => Algorithm::Argon2i,
        "argon2id" => Algorithm::Argon2id,
        other => return Err(Error::new(format!("The key derivation '{}' is not supported", shown(other)))),
    };
    let (passes, memory_kib, lanes) = (small(kdf, "time")?, small(kdf, "memory")?, small(kdf, "cpus")?);
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

fn key_len(of: &Object) -> Result<usize> {
    let len = of.get("key_size").and_then(Value::as_u64).and_then(|len| usize::try_from(len).ok());
    len.filter(|len| (1..=MAX_KEY).contains(len)).ok_or_else(|| wrong("key_size"))
}

fn object<'o>(of: &'o Object, name: &str) -> Result<&'o Object> {
    of.get(name).and_then(Value::as_object).ok_or_else(|| wrong(name))
}

fn text<'o>(of: &'o Object, name: &str) -> Result<&'o str> {
    of.get(name).and_then(Value::as_str).ok_or_else(|| wrong(name))
}

/// Numbers of 64 bits stand there as text.
fn number(of: &Object, name: &str) -> Result<u64> {
    let text = text(of, name)?;
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits).ok_or_else(|| wrong(name))
}

fn small(of: &Object, name: &str) -> Result<u32> {
    of.get(name).and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok()).ok_or_else(|| wrong(name))
}

fn bytes(of: &Object, name: &str) -> Result<Vec<u8>> {
    let bytes = base64::decode(text(of, name)?.as_bytes()).ok_or_else(|| wrong(name))?;
    if bytes.len() > MAX_DIGEST {
        return Err(wrong(name));
    }
    Ok(bytes.to_vec())
}

fn list(of: &Object, name: &str) -> Result<Vec<String>> {
    let all = of.get(name).and_then(Value::as_array).ok_or_else(|| wrong(name))?;
    all.iter().map(|one| one.as_str().map(str::to_owned).ok_or_else(|| wrong(name))).collect()
}

fn wrong(name: &str) -> Error {
    Error::new(format!("The header's JSON has no valid '{name}'"))
}

const MAX_LANES: u32 = 4;
const MAX_KEY: usize = 64;
/// Salts and digests have 32 or 64 bytes.
const MAX_DIGEST: usize = 64;
