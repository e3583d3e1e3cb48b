//! How the sectors of a disk are encrypted: the words of LUKS and of QMP for it, and the keyed thing that does it.

use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use serpent::Serpent;
use twofish::Twofish;

use super::fields::shown;
use super::hash::Hash;
use super::iv::Ivs;
use super::modes::{Cbc, Direction, Ecb, IV, Units};
use super::xts::Xts;
use crate::base::{Error, Result};
use crate::rt::Kept;

/// A block cipher, whatever its key's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// AES.
    Aes,
    /// Serpent.
    Serpent,
    /// Twofish.
    Twofish,
    /// CAST-128, whose blocks have 8 bytes.
    Cast5,
}

/// What is done with the blocks of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Each for itself.
    Ecb,
    /// Chained.
    Cbc,
    /// As IEEE 1619 has it.
    Xts,
}

/// What a sector begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvGen {
    /// The low half of its number.
    Plain,
    /// Its number.
    Plain64,
    /// Its number, the other way round. Only cryptsetup makes such images.
    Plain64Be,
    /// Its number, encrypted with a digest of the key.
    Essiv(Hash),
}

/// A cipher in a mode with a vector; the key's length is not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The cipher.
    pub family: Family,
    /// The mode.
    pub mode: Mode,
    /// `None` only where the mode takes none.
    pub iv: Option<IvGen>,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Aes, Self::Serpent, Self::Twofish, Self::Cast5];

    /// By its name in headers.
    pub fn named(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|family| family.name() == name);
        found.ok_or_else(|| Error::new(format!("The cipher '{}' is not supported", shown(name))))
    }

    /// Its name in headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Serpent => "serpent",
            Self::Twofish => "twofish",
            Self::Cast5 => "cast5",
        }
    }

    /// Its name in QMP, with a key of `len` bytes.
    pub fn name_with_key(self, len: usize) -> String {
        format!("{}-{}", self.name(), len * 8)
    }

    fn key_lengths(self) -> &'static [usize] {
        match self {
            Self::Aes | Self::Serpent | Self::Twofish => &[16, 24, 32],
            Self::Cast5 => &[16],
        }
    }

    fn block(self) -> usize {
        match self {
            Self::Aes | Self::Serpent | Self::Twofish => IV,
            Self::Cast5 => 8,
        }
    }
}

impl Mode {
    /// Its name in headers and in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
        }
    }

    /// Keys of one of the cipher's lengths that the mode takes.
    fn keys(self) -> usize {
        match self {
            Self::Ecb | Self::Cbc => 1,
            Self::Xts => 2,
        }
    }
}

impl IvGen {
    /// Its name in QMP, without the hash.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Plain64Be => "plain64be",
            Self::Essiv(_) => "essiv",
        }
    }
}

impl Spec {
    /// From a header's two words, as in `aes` and `xts-plain64`.
    pub fn parse(family: &str, mode: &str) -> Result<Self> {
        let family = Family::named(family)?;
        let unknown = || Error::new(format!("The cipher mode '{}' is not supported", shown(mode)));
        let (name, iv) = mode.split_once('-').map_or((mode, None), |(name, iv)| (name, Some(iv)));
        let mode = match name {
            "ecb" => Mode::Ecb,
            "cbc" => Mode::Cbc,
            "xts" => Mode::Xts,
            _ => return Err(unknown()),
        };
        let iv = match iv.map(|iv| iv.split_once(':').map_or((iv, None), |(iv, hash)| (iv, Some(hash)))) {
            None => None,
            // QEMU writes the hash that it was given, whether the vector uses it or not.
            Some(("plain", _)) => Some(IvGen::Plain),
            Some(("plain64", _)) => Some(IvGen::Plain64),
            Some(("plain64be", None)) => Some(IvGen::Plain64Be),
            Some(("essiv", Some(hash))) => Some(IvGen::Essiv(Hash::named(hash)?)),
            Some(_) => return Err(unknown()),
        };
        // QEMU names a generator whether the mode asks it or not.
        let iv = iv.filter(|_| mode != Mode::Ecb);
        let spec = Self { family, mode, iv };
        spec.check()?;
        Ok(spec)
    }

    /// From one word, as in `aes-xts-plain64`.
    pub fn parse_whole(name: &str) -> Result<Self> {
        let (family, mode) = name.split_once('-').unwrap_or((name, ""));
        Self::parse(family, mode)
    }

    /// The combination is one that there is.
    pub fn check(&self) -> Result<()> {
        if self.mode == Mode::Xts && self.family.block() != IV {
            return Err(Error::new(format!("XTS needs blocks of 16 bytes, which '{}' has not", self.family.name())));
        }
        if self.mode != Mode::Ecb && self.iv.is_none() {
            return Err(Error::new(format!("The cipher mode '{}' needs an initial vector", self.mode.name())));
        }
        Ok(())
    }

    /// A header's second word.
    pub fn mode_name(&self) -> String {
        let mode = self.mode.name();
        match self.iv {
            None => format!("{mode}-plain64"),
            Some(IvGen::Essiv(hash)) => format!("{mode}-essiv:{}", hash.name()),
            Some(iv) => format!("{mode}-{}", iv.name()),
        }
    }

    /// The cipher's own key length, for a key of `len` bytes. Fails where the mode and the cipher have no such key.
    pub fn cipher_key(&self, len: usize) -> Result<usize> {
        let own = len / self.mode.keys();
        if own * self.mode.keys() != len || !self.family.key_lengths().contains(&own) {
            let name = format!("{}-{}", self.family.name(), self.mode_name());
            return Err(Error::new(format!("A key of {len} bytes does not fit the cipher '{name}'")));
        }
        Ok(own)
    }

    /// The key's length for the cipher's own length.
    pub fn whole_key(&self, own: usize) -> usize {
        own * self.mode.keys()
    }

    /// Ready for use with units of `unit` bytes: 512 to 4096, a power of two.
    pub fn keyed(&self, key: &[u8], unit: usize) -> Result<SectorCipher> {
        debug_assert!(unit.is_power_of_two() && (512..=4096).contains(&unit));
        self.check()?;
        self.cipher_key(key.len())?;
        let ivs = match self.iv {
            None => Ivs::Null,
            Some(IvGen::Plain) => Ivs::Plain,
            Some(IvGen::Plain64) => Ivs::Plain64,
            Some(IvGen::Plain64Be) => Ivs::Plain64Be(self.family.block()),
            Some(IvGen::Essiv(hash)) => {
                let digest = hash.digest(&[key]);
                let ecb = Self { mode: Mode::Ecb, iv: None, ..*self };
                ecb.cipher_key(digest.len())
                    .map_err(|_| Error::new(format!("ESSIV with '{}' has no key length of the cipher", hash.name())))?;
                Ivs::Essiv(ecb.units(digest.expose())?, self.family.block())
            }
        };
        Ok(SectorCipher { units: self.units(key)?, ivs, unit })
    }

    /// One chain of whole blocks that begins with `iv`, decrypted in place: not a disk.
    pub(super) fn decrypt_chained(&self, key: &[u8], iv: [u8; IV], data: &mut [u8]) -> Result<()> {
        let unit = data.len();
        self.units(key)?.run(&mut [iv], unit, data, Direction::Decrypt);
        Ok(())
    }

    fn units(&self, key: &[u8]) -> Result<Box<dyn Units>> {
        let own = self.cipher_key(key.len())?;
        Ok(match (self.family, self.mode) {
            (Family::Aes, Mode::Ecb) if own == 16 => kept(|| Ecb::<Aes128>::new(key))?,
            (Family::Aes, Mode::Ecb) if own == 24 => kept(|| Ecb::<Aes192>::new(key))?,
            (Family::Aes, Mode::Ecb) => kept(|| Ecb::<Aes256>::new(key))?,
            (Family::Aes, Mode::Cbc) if own == 16 => kept(|| Cbc::<Aes128>::new(key))?,
            (Family::Aes, Mode::Cbc) if own == 24 => kept(|| Cbc::<Aes192>::new(key))?,
            (Family::Aes, Mode::Cbc) => kept(|| Cbc::<Aes256>::new(key))?,
            (Family::Aes, Mode::Xts) if own == 16 => kept(|| Xts::<Aes128>::new(key))?,
            (Family::Aes, Mode::Xts) if own == 24 => kept(|| Xts::<Aes192>::new(key))?,
            (Family::Aes, Mode::Xts) => kept(|| Xts::<Aes256>::new(key))?,
            (Family::Serpent, Mode::Ecb) => kept(|| Ecb::<Serpent>::new(key))?,
            (Family::Serpent, Mode::Cbc) => kept(|| Cbc::<Serpent>::new(key))?,
            (Family::Serpent, Mode::Xts) => kept(|| Xts::<Serpent>::new(key))?,
            (Family::Twofish, Mode::Ecb) => kept(|| Ecb::<Twofish>::new(key))?,
            (Family::Twofish, Mode::Cbc) => kept(|| Cbc::<Twofish>::new(key))?,
            (Family::Twofish, Mode::Xts) => kept(|| Xts::<Twofish>::new(key))?,
            (Family::Cast5, Mode::Ecb) => kept(|| Ecb::<Cast5>::new(key))?,
            (Family::Cast5, Mode::Cbc) => kept(|| Cbc::<Cast5>::new(key))?,
            (Family::Cast5, Mode::Xts) => unreachable!("`check` has refused it"),
        })
    }
}

fn kept<U: Units + 'static>(make: impl FnOnce() -> Result<U>) -> Result<Box<dyn Units>> {
    Ok(Box::new(Kept::new(make)?))
}

/// A keyed cipher for the units of a disk, whose round keys are in pages of their own ([`Kept`]). Any thread may use it.
pub struct SectorCipher {
    units: Box<dyn Units>,
    ivs: Ivs,
    unit: usize,
}

impl SectorCipher {
    /// Encrypts whole units in place; `first` is the number of the first one, counted in sectors of 512 bytes.
    pub fn encrypt(&self, first: u64, data: &mut [u8]) {
        self.run(first, data, Direction::Encrypt);
    }

    /// Decrypts them.
    pub fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.run(first, data, Direction::Decrypt);
    }

    fn run(&self, first: u64, data: &mut [u8], direction: Direction) {
        assert!(data.len().is_multiple_of(self.unit), "only whole units are encrypted");
        let step = self.unit as u64 / SECTOR;
        let mut number = first;
        for batch in data.chunks_mut(self.unit * UNITS) {
            let mut ivs = [[0; IV]; UNITS];
            let ivs = &mut ivs[..batch.len() / self.unit];
            self.ivs.fill(number, step, ivs);
            number = number.wrapping_add(ivs.len() as u64 * step);
            self.units.run(ivs, self.unit, batch, direction);
        }
    }
}

impl std::fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SectorCipher(units of {} bytes)", self.unit)
    }
}

/// Units whose vectors are made together.
const UNITS: usize = 64;
const SECTOR: u64 = 512;

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        let names = [
            ("aes", "xts-plain64"),
            ("aes", "xts-plain"),
            ("aes", "cbc-essiv:sha256"),
            ("serpent", "cbc-plain64be"),
            ("twofish", "xts-plain64"),
            ("cast5", "cbc-plain64"),
            ("aes", "ecb-plain64"),
        ];
        for (family, mode) in names {
            let spec = Spec::parse(family, mode).unwrap();
            assert_eq!((spec.family.name(), spec.mode_name().as_str()), (family, mode));
            assert_eq!(Spec::parse_whole(&format!("{family}-{mode}")).unwrap(), spec);
        }
    }

    #[test]
    fn what_is_unknown_is_said() {
        let refused = |family, mode| Spec::parse(family, mode).unwrap_err().full();
        assert_eq!(refused("camellia", "xts-plain64"), "The cipher 'camellia' is not supported");
        assert_eq!(refused("aes", "ctr-plain64"), "The cipher mode 'ctr-plain64' is not supported");
        assert_eq!(refused("aes", "xts-essiv"), "The cipher mode 'xts-essiv' is not supported");
        assert_eq!(refused("aes", "cbc-essiv:tiger"), "The hash 'tiger' is not supported");
        assert_eq!(refused("aes", "xts"), "The cipher mode 'xts' needs an initial vector");
        assert_eq!(refused("cast5", "xts-plain64"), "XTS needs blocks of 16 bytes, which 'cast5' has not");
        let xts = Spec::parse("aes", "xts-plain64").unwrap();
        assert_eq!(xts.cipher_key(64).unwrap(), 32);
        for len in [0, 1, 16, 33, 63, 128] {
            assert!(xts.cipher_key(len).is_err() && xts.keyed(&vec![0; len], 512).is_err(), "{len}");
        }
        let essiv = Spec::parse("aes", "cbc-essiv:sha1").unwrap();
        assert_eq!(essiv.keyed(&[0; 16], 512).unwrap_err().full(), "ESSIV with 'sha1' has no key length of the cipher");
    }

    #[test]
    fn every_cipher_gives_back_what_it_took() {
        for family in Family::ALL {
            for mode in ["ecb", "cbc-plain", "cbc-essiv:sha256", "xts-plain64"] {
                let Ok(spec) = Spec::parse(family.name(), mode) else {
                    assert_eq!((family, mode), (Family::Cast5, "xts-plain64"));
                    continue;
                };
                for own in family.key_lengths() {
                    if family == Family::Cast5 && mode == "cbc-essiv:sha256" {
                        continue; // no key of 32 bytes
                    }
                    let key: Vec<u8> = (1..).take(spec.whole_key(*own)).collect();
                    let cipher = spec.keyed(&key, 512).unwrap();
                    let plain: Vec<u8> = (0..512 * 70usize).map(|at| (at / 3) as u8).collect();
                    let mut data = plain.clone();
                    cipher.encrypt(7, &mut data);
                    assert_ne!(data, plain);
                    // A sector in the middle is what it is alone.
                    let mut one = data[512 * 66..512 * 67].to_vec();
                    cipher.decrypt(7 + 66, &mut one);
                    assert_eq!(one, plain[512 * 66..512 * 67], "{family:?} {mode}");
                    cipher.decrypt(7, &mut data);
                    assert_eq!(data, plain, "{family:?} {mode}");
                }
            }
        }
    }

    /// What is made of a key is as secret as the key: it is in pages of its own, which are in no dump and not swapped out.
    #[test]
    fn round_keys_are_where_secrets_may_stay() {
        let flags = |address: usize| {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut is_here = false;
            let line = smaps.lines().find(|line| {
                let range = line.split(' ').next().and_then(|range| range.split_once('-'));
                let number = |text| usize::from_str_radix(text, 16).ok();
                if let Some((Some(start), Some(end))) = range.map(|(start, end)| (number(start), number(end))) {
                    is_here = (start..end).contains(&address);
                }
                is_here && line.starts_with("VmFlags")
            });
            line.unwrap().to_owned()
        };
        let local = 7;
        assert!(!flags(std::ptr::from_ref(&local).addr()).contains(" dd"), "ordinary memory is dumped");
        for (name, len) in
            [("aes-xts-plain64", 64), ("aes-cbc-essiv:sha256", 32), ("serpent-ecb", 32), ("cast5-cbc-plain", 16)]
        {
            let cipher = Spec::parse_whole(name).unwrap().keyed(&vec![5; len], 512).unwrap();
            let essiv = if let Ivs::Essiv(units, _) = &cipher.ivs { Some(units.place()) } else { None };
            assert_eq!(essiv.is_some(), name.contains("essiv"));
            for place in [Some(cipher.units.place()), essiv].into_iter().flatten() {
                let flags = flags(place);
                assert!(flags.contains(" dd") && flags.contains(" lo"), "{name}: {flags}");
            }
        }
    }

    /// `cargo test --release -p block-core --lib how_fast -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn how_fast() {
        for (name, key) in [("aes-xts-plain64", 64), ("aes-xts-plain64", 32), ("aes-cbc-essiv:sha256", 32)] {
            let cipher = Spec::parse_whole(name).unwrap().keyed(&(0..key).collect::<Vec<u8>>(), 512).unwrap();
            for at_once in [4096, 512 << 10] {
                let mut data = vec![0; at_once];
                for (what, turn) in [("encrypt", true), ("decrypt", false)] {
                    let begun = std::time::Instant::now();
                    let mut bytes = 0;
                    while begun.elapsed() < std::time::Duration::from_millis(300) {
                        for _ in 0..16 {
                            if turn {
                                cipher.encrypt(bytes, &mut data)
                            } else {
                                cipher.decrypt(bytes, &mut data)
                            }
                            bytes += at_once as u64;
                        }
                    }
                    let speed = bytes as f64 / begun.elapsed().as_secs_f64() / f64::from(1 << 30);
                    eprintln!("{name}, key of {key} bytes, {at_once} at once: {what} {speed:.2} GiB/s");
                }
            }
        }
    }

    #[test]
    fn large_units_count_in_sectors() {
        let spec = Spec::parse("aes", "xts-plain64").unwrap();
        let key: Vec<u8> = (0..64).collect();
        let (large, plain) = (spec.keyed(&key, 4096).unwrap(), vec![5; 8192]);
        let mut both = plain.clone();
        large.encrypt(8, &mut both);
        let mut second = plain[4096..].to_vec();
        large.encrypt(16, &mut second);
        assert_eq!(both[4096..], second);
    }
}
