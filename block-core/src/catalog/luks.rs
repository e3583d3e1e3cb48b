//! How new encrypted disks are defined, in QMP's words.

use std::time::Duration;

use qmp::Qapi;

use crate::base::{Error, Result};
use crate::codec::cipher::{Family, IvGen, Mode, Spec};
use crate::codec::hash::Hash;
use crate::codec::luks::v1;
use crate::codec::secret::Secret;
use crate::drivers::format::luks::CreateOptions;
use crate::drivers::keys::needed_secret;
use crate::graph::Objects;

/// How a disk is encrypted, and what opens it (QEMU: `QCryptoBlockCreateOptionsLUKS`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "QCryptoBlockCreateOptionsLUKS")]
pub struct LuksCreateOptions {
    /// The id of the secret that will open it.
    pub key_secret: Option<String>,
    /// The cipher; aes-256 if absent.
    pub cipher_alg: Option<QCryptoCipherAlgo>,
    /// Its mode; xts if absent.
    pub cipher_mode: Option<QCryptoCipherMode>,
    /// What a sector begins with; plain64 if absent.
    pub ivgen_alg: Option<QCryptoIvGenAlgo>,
    /// The hash for `essiv`; sha256 if absent.
    pub ivgen_hash_alg: Option<QCryptoHashAlgo>,
    /// The hash for what is derived; sha256 if absent.
    pub hash_alg: Option<QCryptoHashAlgo>,
    /// How long one try of a passphrase takes on this machine, in milliseconds; 2000 if absent.
    pub iter_time: Option<u64>,
}

/// A cipher and its key's length in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum QCryptoCipherAlgo {
    /// AES.
    #[qapi(rename = "aes-128")]
    Aes128,
    /// AES.
    #[qapi(rename = "aes-192")]
    Aes192,
    /// AES.
    #[qapi(rename = "aes-256")]
    Aes256,
    /// CAST-128.
    #[qapi(rename = "cast5-128")]
    Cast5,
    /// Serpent.
    #[qapi(rename = "serpent-128")]
    Serpent128,
    /// Serpent.
    #[qapi(rename = "serpent-192")]
    Serpent192,
    /// Serpent.
    #[qapi(rename = "serpent-256")]
    Serpent256,
    /// Twofish.
    #[qapi(rename = "twofish-128")]
    Twofish128,
    /// Twofish.
    #[qapi(rename = "twofish-192")]
    Twofish192,
    /// Twofish.
    #[qapi(rename = "twofish-256")]
    Twofish256,
}

/// What is done with the blocks of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum QCryptoCipherMode {
    /// Each for itself: equal blocks of a disk look equal.
    Ecb,
    /// Chained.
    Cbc,
    /// As IEEE 1619 has it.
    Xts,
}

/// What a sector begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum QCryptoIvGenAlgo {
    /// The low half of its number.
    Plain,
    /// Its number.
    Plain64,
    /// Its number, encrypted.
    Essiv,
}

/// A hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum QCryptoHashAlgo {
    /// SHA-1.
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

impl LuksCreateOptions {
    /// What will open the disk.
    pub(super) fn passphrase(&self, objects: &Objects) -> Result<Secret> {
        needed_secret(objects, self.key_secret.as_deref())
    }

    /// What its header is made of. It has to be said which secret opens it.
    pub(super) fn header(&self, size: u64, detached: bool) -> Result<v1::New> {
        if self.key_secret.is_none() {
            return Err(Error::new("Parameter 'key-secret' is required for cipher"));
        }
        Ok(self.parsed(size)?.header(detached))
    }

    /// A disk of `size` bytes.
    pub(super) fn parsed(&self, size: u64) -> Result<CreateOptions> {
        let plain = CreateOptions::of(size);
        let (family, own) = self.cipher_alg.map_or((Family::Aes, 32), QCryptoCipherAlgo::parts);
        let mode = match self.cipher_mode {
            Some(QCryptoCipherMode::Ecb) => Mode::Ecb,
            Some(QCryptoCipherMode::Cbc) => Mode::Cbc,
            Some(QCryptoCipherMode::Xts) | None => Mode::Xts,
        };
        let iv = match self.ivgen_alg {
            // A mode without vectors has a generator in QEMU's words, and does not ask it.
            _ if mode == Mode::Ecb => None,
            Some(QCryptoIvGenAlgo::Plain) => Some(IvGen::Plain),
            Some(QCryptoIvGenAlgo::Plain64) | None => Some(IvGen::Plain64),
            Some(QCryptoIvGenAlgo::Essiv) => Some(IvGen::Essiv(self.ivgen_hash_alg.map_or(Hash::Sha256, Hash::from))),
        };
        let spec = Spec { family, mode, iv };
        if self.iter_time == Some(0) {
            return Err(Error::new("'iter-time' must not be 0"));
        }
        Ok(CreateOptions {
            spec,
            key_len: spec.whole_key(own),
            hash: self.hash_alg.map_or(plain.hash, Hash::from),
            time: self.iter_time.map_or(plain.time, Duration::from_millis),
            ..plain
        })
    }
}

impl QCryptoCipherAlgo {
    /// The cipher and the bytes of its own key.
    fn parts(self) -> (Family, usize) {
        match self {
            Self::Aes128 => (Family::Aes, 16),
            Self::Aes192 => (Family::Aes, 24),
            Self::Aes256 => (Family::Aes, 32),
            Self::Cast5 => (Family::Cast5, 16),
            Self::Serpent128 => (Family::Serpent, 16),
            Self::Serpent192 => (Family::Serpent, 24),
            Self::Serpent256 => (Family::Serpent, 32),
            Self::Twofish128 => (Family::Twofish, 16),
            Self::Twofish192 => (Family::Twofish, 24),
            Self::Twofish256 => (Family::Twofish, 32),
        }
    }
}

impl From<QCryptoHashAlgo> for Hash {
    fn from(hash: QCryptoHashAlgo) -> Self {
        match hash {
            QCryptoHashAlgo::Sha1 => Self::Sha1,
            QCryptoHashAlgo::Sha224 => Self::Sha224,
            QCryptoHashAlgo::Sha256 => Self::Sha256,
            QCryptoHashAlgo::Sha384 => Self::Sha384,
            QCryptoHashAlgo::Sha512 => Self::Sha512,
            QCryptoHashAlgo::Ripemd160 => Self::Ripemd160,
        }
    }
}
