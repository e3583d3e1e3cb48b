//! The hashes that LUKS names, and what is made of them.

use std::time::{Duration, Instant};

use digest::Digest;
use pbkdf2::pbkdf2_hmac;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Sha224, Sha256, Sha384, Sha512};

use super::SecretBytes;
use super::fields::shown;
use crate::base::{Error, Result};

/// A hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1: old LUKS1 images.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
}

/// One line for each thing that has to be said of every hash's type.
macro_rules! with {
    ($hash:expr, $name:ident => $work:expr) => {
        match $hash {
            Hash::Sha1 => {
                type $name = Sha1;
                $work
            }
            Hash::Sha224 => {
                type $name = Sha224;
                $work
            }
            Hash::Sha256 => {
                type $name = Sha256;
                $work
            }
            Hash::Sha384 => {
                type $name = Sha384;
                $work
            }
            Hash::Sha512 => {
                type $name = Sha512;
                $work
            }
            Hash::Ripemd160 => {
                type $name = Ripemd160;
                $work
            }
        }
    };
}

impl Hash {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Sha1, Self::Sha224, Self::Sha256, Self::Sha384, Self::Sha512, Self::Ripemd160];

    /// By its name in headers and in QMP.
    pub fn named(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|hash| hash.name() == name);
        found.ok_or_else(|| Error::new(format!("The hash '{}' is not supported", shown(name))))
    }

    /// Its name in headers and in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
        }
    }

    /// Bytes of a digest.
    pub fn size(self) -> usize {
        with!(self, H => <H as Digest>::output_size())
    }

    /// The digest of all parts, one after another.
    pub fn digest(self, parts: &[&[u8]]) -> SecretBytes {
        with!(self, H => {
            let mut hash = H::new();
            parts.iter().for_each(|part| Digest::update(&mut hash, part));
            let mut out = SecretBytes::zeroed(self.size());
            out.expose_mut().copy_from_slice(&hash.finalize());
            out
        })
    }

    /// PBKDF2 (RFC 8018) over HMAC: `len` bytes.
    pub fn derive(self, passphrase: &[u8], salt: &[u8], iterations: u32, len: usize) -> SecretBytes {
        let mut key = SecretBytes::zeroed(len);
        with!(self, H => pbkdf2_hmac::<H>(passphrase, salt, iterations, key.expose_mut()));
        key
    }

    /// How many iterations this machine does in that time for a key of `len` bytes. Takes some time itself.
    pub fn iterations_in(self, time: Duration, len: usize) -> u64 {
        let mut tried = 1024u32;
        loop {
            let begun = Instant::now();
            self.derive(b"passphrase", b"saltsaltsaltsalt", tried, len);
            let took = begun.elapsed();
            if took >= MEASURED || tried >= 1 << 24 {
                let each = u128::from(tried) * time.as_nanos() / took.as_nanos().max(1);
                return u64::try_from(each).unwrap_or(u64::MAX);
            }
            tried *= 2;
        }
    }
}

/// Shorter measurements say little.
const MEASURED: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Of "abc": FIPS 180-4 and the paper on RIPEMD-160.
    #[test]
    fn digests_are_those_of_the_standards() {
        let known = [
            (Hash::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (Hash::Sha224, "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7"),
            (Hash::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (Hash::Ripemd160, "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
        ];
        for (hash, digest) in known {
            assert_eq!(hex(hash.digest(&[b"a", b"bc"]).expose()), digest);
        }
        for hash in Hash::ALL {
            assert_eq!(hash.digest(&[]).len(), hash.size());
            assert_eq!(Hash::named(hash.name()).unwrap(), hash);
        }
        assert_eq!(Hash::named("whirlpool").unwrap_err().full(), "The hash 'whirlpool' is not supported");
    }

    /// RFC 6070.
    #[test]
    fn derived_keys_are_those_of_the_rfc() {
        let key = Hash::Sha1.derive(b"passwordPASSWORDpassword", b"saltSALTsaltSALTsaltSALTsaltSALTsalt", 4096, 25);
        assert_eq!(hex(key.expose()), "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038");
    }

    #[test]
    fn twice_the_time_is_about_twice_the_iterations() {
        let each = Hash::Sha256.iterations_in(Duration::from_millis(100), 32);
        assert!(each > 1000, "{each}");
    }
}
